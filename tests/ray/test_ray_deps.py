"""A uv project's lock as a Ray runtime environment: real projects, real locks, an index only of what is made here.

But for the example's own test, which locks and installs what the example depends on.
"""

from __future__ import annotations

import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fray.backend.ray.ray_deps import CPU_TORCH_INDEX, GPU_TORCH_INDEX, build_runtime_env_for_packages, source_roots
from fray.errors import InvalidTypeError, InvalidValueError
from fray.types import JobStatus, RuntimeEnv
from fray.uv import find_uv, uv_environment
from tests.ray.ray_harness import Head, RayHarness
from tests.wheels import make_wheel

HERE = Path(__file__).parent


class Project:
    """A uv project whose index is a folder of wheels made on the spot."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wheels = directory.parent / "wheels"
        for name in ("plain", "extra-thing", "torch", "torchvision", "nvidia-x", "only-here", "elsewhere"):
            make_wheel(self.wheels, name)
        make_wheel(self.wheels, "needed-by-ray")
        make_wheel(self.wheels, "ray", requires=("needed-by-ray", "plain"))

    def write(self, pyproject: str, **members: str) -> Path:
        settings = f'\n[tool.uv]\nno-index = true\nfind-links = ["{self.wheels.as_uri()}"]\n'
        self.directory.mkdir(exist_ok=True)
        (self.directory / "pyproject.toml").write_text(pyproject.replace("[tool.uv]\n", settings, 1))
        for name, content in members.items():
            folder = self.directory / "packages" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pyproject.toml").write_text(content)
        lock_project(self.directory)
        return self.directory


def lock_project(directory: Path) -> None:
    command = [find_uv(), "lock", "--quiet", "--python", sys.executable]
    done = subprocess.run(command, cwd=directory, env=uv_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


class Indexes:
    """Package indexes on this machine: listings of folders, which is what the protocol asks for."""

    class _Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(self._Handler, directory=str(folder)))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def add(self, index: str, name: str, version: str = "1.0") -> None:
        make_wheel(self._folder / index / name, name, version)

    def url(self, index: str) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/{index}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def indexes(tmp_path: Path) -> Iterator[Indexes]:
    (tmp_path / "indexes").mkdir()
    served = Indexes(tmp_path / "indexes")
    yield served
    served.close()


BASIC = """
[project]
name = "basic"
version = "1"
requires-python = ">=3.11"
dependencies = ["plain", "ray", "only-here ; sys_platform == 'linux'", "elsewhere ; sys_platform == 'win32'"]
[project.optional-dependencies]
tpu = ["extra-thing", "torch", "torchvision"]
gpu = ["torch", "nvidia-x"]
[dependency-groups]
dev = ["extra-thing"]
[tool.uv]
"""


def packages(runtime_env: dict[str, Any], installer: str = "pip") -> list[str]:
    return list(runtime_env[installer]["packages"])


def test_the_lock_is_what_is_installed(project: Project) -> None:
    built = build_runtime_env_for_packages(project=project.write(BASIC))
    assert set(built) == {"env_vars", "pip"}
    assert packages(built) == [
        "elsewhere==1.0 ; sys_platform == 'win32'",
        "only-here==1.0 ; sys_platform == 'linux'",
        "plain==1.0",
    ]


def test_what_only_ray_needs_is_the_clusters_too(project: Project) -> None:
    lines = packages(build_runtime_env_for_packages(project=project.write(BASIC)))
    assert "plain==1.0" in lines
    assert not [line for line in lines if "ray" in line]


def test_extras_are_added_and_torch_comes_last(project: Project) -> None:
    directory = project.write(BASIC)
    lines = packages(build_runtime_env_for_packages(["tpu"], project=directory))
    assert lines[-3:] == [f"--extra-index-url {CPU_TORCH_INDEX}", "torch==1.0", "torchvision==1.0"]
    assert "extra-thing==1.0" in lines
    lines = packages(build_runtime_env_for_packages(["gpu"], project=directory))
    assert lines[-3:] == [f"--extra-index-url {GPU_TORCH_INDEX}", "nvidia-x==1.0", "torch==1.0"]
    assert "--extra-index-url" not in " ".join(packages(build_runtime_env_for_packages(project=directory)))


def test_what_cuda_needs_is_not_torch(project: Project) -> None:
    directory = project.write(MEMBER.format(name="app", dependencies='["nvidia-x"]') + "[tool.uv]\n")
    assert packages(build_runtime_env_for_packages(project=directory)) == ["nvidia-x==1.0"]


@pytest.mark.parametrize(("extra", "index"), [("cu128", GPU_TORCH_INDEX), ("cuda", GPU_TORCH_INDEX), ("cube", None)])
def test_extras_that_say_cuda(project: Project, extra: str, index: str | None) -> None:
    lines = packages(build_runtime_env_for_packages([extra], project=project.write(BASIC.replace("gpu", extra))))
    assert f"--extra-index-url {index or CPU_TORCH_INDEX}" in lines


def test_extras_that_exclude_each_other(project: Project) -> None:
    for build in ("cpu", "cu"):
        make_wheel(project.wheels, "torch", f"2.0+{build}")
    directory = project.write(
        MEMBER.format(name="app", dependencies="[]")
        + '[project.optional-dependencies]\ntpu = ["torch==2.0+cpu"]\ngpu = ["torch==2.0+cu"]\n'
        + '[tool.uv]\nconflicts = [[{ extra = "tpu" }, { extra = "gpu" }]]\n'
    )
    assert packages(build_runtime_env_for_packages(["tpu"], project=directory))[-1] == "torch==2.0+cpu"
    assert packages(build_runtime_env_for_packages(["gpu"], project=directory))[-1] == "torch==2.0+cu"
    assert "pip" not in build_runtime_env_for_packages(project=directory)
    with pytest.raises(InvalidValueError, match="incompatible"):
        build_runtime_env_for_packages(["gpu", "tpu"], project=directory)


def test_which_index_serves_torch_can_be_said(project: Project) -> None:
    directory = project.write(BASIC)
    assert "--extra-index-url https://mirror/torch" in packages(
        build_runtime_env_for_packages(["tpu"], project=directory, torch_index="https://mirror/torch")
    )
    without = packages(build_runtime_env_for_packages(["tpu"], project=directory, torch_index=""))
    assert without[-2:] == ["torch==1.0", "torchvision==1.0"]
    assert not [line for line in without if line.startswith("--")]


def test_the_projects_own_index_for_torch_is_used(project: Project) -> None:
    directory = project.write(BASIC)
    with (directory / "pyproject.toml").open("a") as file:
        file.write(
            '[[tool.uv.index]]\nname = "for-tpu"\nurl = "https://mirror/tpu"\nexplicit = true\n'
            '[[tool.uv.index]]\nname = "for-gpu"\nurl = "https://mirror/gpu"\nexplicit = true\n'
            '[tool.uv.sources]\ntorch = [{ index = "for-tpu", extra = "tpu" }, { index = "for-gpu", extra = "gpu" }]\n'
        )
    for extra in ("tpu", "gpu"):
        lines = packages(build_runtime_env_for_packages([extra], project=directory))
        assert f"--extra-index-url https://mirror/{extra}" in lines


def test_indexes_for_different_machines_are_all_asked(project: Project) -> None:
    directory = project.write(BASIC)
    with (directory / "pyproject.toml").open("a") as file:
        file.write(
            '[[tool.uv.index]]\nname = "cpu"\nurl = "https://mirror/cpu"\nexplicit = true\n'
            '[[tool.uv.index]]\nname = "cuda"\nurl = "https://user:hidden@mirror/cuda"\nexplicit = true\n'
            '[tool.uv.sources]\ntorch = [{ index = "cpu", marker = "sys_platform != \'linux\'" }, '
            '{ index = "cuda", marker = "sys_platform == \'linux\'" }]\n'
        )
    lines = packages(build_runtime_env_for_packages(["tpu"], project=directory))
    assert lines[-4:-2] == ["--extra-index-url https://mirror/cpu", "--extra-index-url https://mirror/cuda"]


def test_the_index_that_a_member_names_is_used(project: Project) -> None:
    directory = workspace(project)
    pyproject = directory / "packages" / "one" / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace('["plain"]', '["torch"]'))
    lock_project(directory)
    with (directory / "pyproject.toml").open("a") as file:
        file.write('[[tool.uv.index]]\nname = "shared"\nurl = "https://mirror/shared"\nexplicit = true\n')
    with pyproject.open("a") as file:
        file.write('[tool.uv.sources]\ntorch = { index = "shared" }\n')
    lines = packages(build_runtime_env_for_packages(project=directory))
    assert lines == ["--extra-index-url https://mirror/shared", "torch==1.0"]


def test_the_index_that_the_lock_has_torch_from_is_used(project: Project, indexes: Indexes) -> None:
    indexes.add("main", "plain")
    indexes.add("builds", "torch", "1.0+special")
    directory = project.write(
        MEMBER.format(name="app", dependencies='["torch", "plain"]')
        + f'[[tool.uv.index]]\nurl = "{indexes.url("main")}"\ndefault = true\n'
        + f'[[tool.uv.index]]\nurl = "{indexes.url("builds")}/"\n'
    )
    lines = packages(build_runtime_env_for_packages(project=directory))
    assert lines == ["plain==1.0", f"--extra-index-url {indexes.url('builds')}/", "torch==1.0+special"]


def test_more_packages_take_the_place_of_the_locks(project: Project) -> None:
    make_wheel(project.wheels, "plain", "1.5", requires=("extra-thing",))
    directory = project.write(BASIC)
    assert "extra-thing==1.0" in packages(build_runtime_env_for_packages(project=directory))
    lines = packages(build_runtime_env_for_packages(pip_packages=["Plain>=2", "another"], project=directory))
    assert [line for line in lines if "lain" in line] == ["Plain>=2"]
    assert "another" in lines
    assert "extra-thing==1.0" not in lines  # which the other one may need another of
    with_torch = packages(build_runtime_env_for_packages(pip_packages=["torch<2", "another"], project=directory))
    assert with_torch[-3:] == ["another", f"--extra-index-url {CPU_TORCH_INDEX}", "torch<2"]
    option = "--extra-index-url https://mirror/more"
    built = build_runtime_env_for_packages(pip_packages=[option], project=directory, installer="uv")
    assert packages(built, "uv")[-1] == option
    assert built["uv"]["uv_pip_install_options"] == ["--index-strategy=unsafe-best-match"]


def test_what_to_ignore_can_be_said(project: Project) -> None:
    lines = packages(build_runtime_env_for_packages(project=project.write(BASIC), ignore=["plain"]))
    assert {"ray==1.0", "needed-by-ray==1.0"} <= set(lines)
    assert "plain==1.0" not in lines


def test_the_project_itself_can_be_ignored(project: Project) -> None:
    directory = workspace(project)
    paths = build_runtime_env_for_packages(project=directory, ignore=["two"])["env_vars"]["PYTHONPATH"]
    assert "packages/two" not in paths.split(":")
    alone = build_runtime_env_for_packages(project=directory / "packages" / "one", ignore=["one"])
    assert (packages(alone), alone["env_vars"]["PYTHONPATH"]) == (["plain==1.0"], ".")


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_either_installer_is_given_the_same(project: Project, installer: Any) -> None:
    built = build_runtime_env_for_packages(["tpu"], project=project.write(BASIC), installer=installer)
    assert "torch==1.0" in packages(built, installer)
    if installer == "uv":
        assert built["uv"]["uv_pip_install_options"] == ["--index-strategy=unsafe-best-match"]


def test_nothing_of_the_callers_is_changed(project: Project) -> None:
    extra, more, variables = ["tpu"], ["another"], {"PYTHONPATH": "mine", "A": "1"}
    directory = project.write(BASIC)
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    built = build_runtime_env_for_packages(extra, more, variables, project=directory)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    assert (extra, more, variables) == (["tpu"], ["another"], {"PYTHONPATH": "mine", "A": "1"})
    assert built["env_vars"]["A"] == "1"
    assert built["env_vars"]["PYTHONPATH"].endswith(":mine") or built["env_vars"]["PYTHONPATH"] == "mine"


MEMBER = '[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.11"\ndependencies = {dependencies}\n'
BUILD = '[build-system]\nrequires = ["uv_build"]\nbuild-backend = "uv_build"\n'
SETTINGS = {
    "one": BUILD,
    "two": BUILD + '[tool.uv.build-backend]\nmodule-root = ""\n',
    "three": BUILD + '[tool.hatch.build.targets.wheel]\npackages = ["lib/three"]\n',
    "four": BUILD + '[tool.setuptools.packages.find]\nwhere = ["python"]\n',
}


def workspace(project: Project) -> Path:
    members = {
        name: MEMBER.format(name=name, dependencies='["plain"]' if name == "one" else "[]") + more
        for name, more in SETTINGS.items()
    }
    (project.directory / "packages" / "one" / "src").mkdir(parents=True)
    return project.write(
        "[tool.uv]\n[tool.uv.workspace]\nmembers = ['packages/*']\n",
        **members,
    )


def test_a_workspaces_members_are_found_by_the_path(project: Project) -> None:
    built = build_runtime_env_for_packages(project=workspace(project), env_vars={"PYTHONPATH": "mine"})
    assert packages(built) == ["plain==1.0"]
    assert built["env_vars"]["PYTHONPATH"].split(":") == [
        "packages/four/python",
        "packages/one/src",
        "packages/three/lib",
        "packages/two",
        "mine",
    ]


def test_a_member_alone_is_refused_where_it_needs_others(project: Project) -> None:
    directory = workspace(project)
    alone = build_runtime_env_for_packages(project=directory / "packages" / "one")
    assert (packages(alone), alone["env_vars"]["PYTHONPATH"]) == (["plain==1.0"], "src")
    source = "[tool.uv.sources]\none = { workspace = true }\n"
    (directory / "packages" / "two" / "pyproject.toml").write_text(
        MEMBER.format(name="two", dependencies='["one"]') + SETTINGS["two"] + source
    )
    lock_project(directory)
    with pytest.raises(InvalidValueError, match=f"submit from {directory}"):
        build_runtime_env_for_packages(project=directory / "packages" / "two")
    assert build_runtime_env_for_packages(project=directory / "packages" / "two", python_path=["."])


def test_path_dependencies_in_the_tree_are_found_by_the_path(project: Project) -> None:
    inside = project.directory / "vendored" / "thing"
    inside.mkdir(parents=True)
    (inside / "pyproject.toml").write_text(MEMBER.format(name="thing", dependencies="[]") + BUILD)
    (inside / "src").mkdir()
    directory = project.write(
        MEMBER.format(name="app", dependencies='["thing", "plain"]')
        + "[tool.uv]\n[tool.uv.sources]\nthing = { path = 'vendored/thing' }\n"
    )
    built = build_runtime_env_for_packages(project=directory)
    assert packages(built) == ["plain==1.0"]
    assert "vendored/thing/src" in built["env_vars"]["PYTHONPATH"].split(":")


def test_a_directory_that_does_not_travel_is_refused(project: Project) -> None:
    outside = project.directory.parent / "outside"
    outside.mkdir()
    (outside / "pyproject.toml").write_text(MEMBER.format(name="outside", dependencies="[]") + BUILD)
    directory = project.write(
        MEMBER.format(name="app", dependencies='["outside"]')
        + "[tool.uv]\n[tool.uv.sources]\noutside = { path = '../outside', editable = true }\n"
    )
    with pytest.raises(InvalidValueError, match=f"{outside} would not travel.*move it into the project"):
        build_runtime_env_for_packages(project=directory)
    said = build_runtime_env_for_packages(project=directory, python_path=["/on/the/nodes"])
    assert said["env_vars"]["PYTHONPATH"] == "/on/the/nodes"


WITH_A_WHEEL = MEMBER.format(name="app", dependencies="""["plain ; sys_platform == 'linux'"]""") + (
    "[tool.uv]\n[tool.uv.sources]\nplain = {{ path = '{folder}/plain-1.0-py3-none-any.whl' }}\n"
)


def test_a_wheel_in_the_tree_is_installed_from_there(project: Project) -> None:
    make_wheel(project.directory / "wheels", "plain")
    built = build_runtime_env_for_packages(project=project.write(WITH_A_WHEEL.format(folder="wheels")))
    wheel = project.directory / "wheels" / "plain-1.0-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert packages(built) == [
        f"plain @ file://${{RAY_RUNTIME_ENV_CREATE_WORKING_DIR}}/wheels/{wheel.name}#sha256={digest} "
        "; sys_platform == 'linux'"
    ]
    wheel.unlink()
    with pytest.raises(InvalidValueError, match=str(wheel)):
        build_runtime_env_for_packages(project=project.directory)


def test_a_wheel_that_does_not_travel_is_refused(project: Project) -> None:
    directory = project.write(WITH_A_WHEEL.format(folder=project.wheels))
    with pytest.raises(InvalidValueError, match=r"plain-1\.0.* would not travel.*move it into the project"):
        build_runtime_env_for_packages(project=directory)


def test_git_dependencies_stay_what_they_are(project: Project, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "pyproject.toml").write_text(MEMBER.format(name="from-git", dependencies="[]") + BUILD)
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
    for arguments in (["init", "--quiet"], ["add", "-A"], [*identity, "commit", "--quiet", "-m", "x"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    directory = project.write(
        MEMBER.format(name="app", dependencies='["from-git"]')
        + f"[tool.uv]\n[tool.uv.sources]\nfrom-git = {{ git = '{repository.as_uri()}' }}\n"
    )
    (line,) = packages(build_runtime_env_for_packages(project=directory))
    assert line.startswith(f"from-git @ git+{repository.as_uri()}@")


def test_what_cannot_be_is_refused(project: Project, tmp_path: Path) -> None:
    directory = project.write(BASIC)
    with pytest.raises(InvalidValueError, match="unknown-extra"):
        build_runtime_env_for_packages(["unknown-extra"], project=directory)
    with pytest.raises(InvalidTypeError, match="extra"):
        build_runtime_env_for_packages("tpu", project=directory)
    with pytest.raises(InvalidTypeError, match="python_path"):
        build_runtime_env_for_packages(python_path="src", project=directory)
    with pytest.raises(InvalidValueError, match="uv lock"):
        build_runtime_env_for_packages(project=tmp_path)
    with pytest.raises(InvalidValueError, match="no directory"):
        build_runtime_env_for_packages(project=directory / "mistyped")
    (directory / "uv.lock").write_text("not a lock")
    with pytest.raises(InvalidValueError, match=f"the lock of {directory}: error: Failed to parse"):
        build_runtime_env_for_packages(project=directory)


def test_the_project_is_that_of_the_directory(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = project.write(BASIC + BUILD)
    (directory / "src" / "basic").mkdir(parents=True)
    expected = build_runtime_env_for_packages(project=directory)
    assert expected["env_vars"]["PYTHONPATH"] == "src"
    monkeypatch.chdir(directory / "src")
    assert build_runtime_env_for_packages(project="..") == expected
    assert build_runtime_env_for_packages()["env_vars"]["PYTHONPATH"] == "."
    (tmp_path / "link").symlink_to(directory)
    assert build_runtime_env_for_packages(project=tmp_path / "link") == expected
    other = Project(tmp_path / "other" / "project").write(BASIC.replace("plain", "torch"))
    monkeypatch.setenv("UV_PROJECT", str(other))
    assert build_runtime_env_for_packages(project=directory) == expected
    (directory / "scripts").mkdir()
    with pytest.raises(InvalidValueError, match=f"submit from {directory}"):
        build_runtime_env_for_packages(project=directory / "scripts")


def test_calls_at_once_do_not_meet(project: Project) -> None:
    directory = project.write(BASIC)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(build_runtime_env_for_packages, [extra], project=directory) for extra in ["tpu", "gpu"] * 4
        ]
    assert len({str(call.result()) for call in calls}) == 2


@pytest.mark.parametrize(
    ("settings", "roots"),
    [
        ('[tool.setuptools.packages.find]\nwhere = ["lib", "more"]', ["lib", "more"]),
        ('[tool.setuptools]\npackages = ["x"]\npackage-dir = { "" = "lib" }', ["lib"]),
        ('[tool.hatch.build.targets.wheel]\npackages = ["lib/x", "more/y", "more/z"]', ["lib", "more"]),
        ('[tool.hatch.build.targets.wheel]\npackages = ["x"]', ["."]),
        ('[tool.hatch.build]\nsources = ["lib"]', ["lib"]),
        (
            '[[tool.poetry.packages]]\ninclude = "x"\nfrom = "lib"\n[[tool.poetry.packages]]\ninclude = "y"',
            ["lib", "."],
        ),
        ('[tool.pdm.build]\npackage-dir = "lib"', ["lib"]),
        ('[tool.uv.build-backend]\nmodule-root = "lib"', ["lib"]),
    ],
)
def test_where_modules_are_is_what_the_build_settings_say(tmp_path: Path, settings: str, roots: list[str]) -> None:
    assert source_roots(tmp_path) == [tmp_path]
    (tmp_path / "src").mkdir()
    assert source_roots(tmp_path) == [tmp_path / "src"]
    (tmp_path / "pyproject.toml").write_text(settings)
    assert source_roots(tmp_path) == [tmp_path / each for each in roots]


def test_importing_it_imports_no_ray() -> None:
    program = "import sys, fray.backend.ray.ray_deps; assert not {'ray', 'pydantic', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.xdist_group("ray")
class TestOnACluster:
    def test_a_submit_script_of_somebody_elses(self, ray_head: Head, tmp_path: Path) -> None:
        example = tmp_path / "example"
        shutil.copytree(HERE.parent.parent / "examples" / "ray_submit", example)
        lock_project(example)
        done = subprocess.run(
            [sys.executable, "submit.py", ray_head.dashboard], cwd=example, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "counted to 12,345" in done.stdout

    def test_extras_of_a_job_are_its_projects(self, ray_head: Head, project: Project) -> None:
        directory = project.write(BASIC)
        make = 'import extra_thing, plain, os; print(extra_thing.VERSION, os.environ["PYTHONPATH"].count("mine"))'
        (directory / "show.py").write_text(make)
        with RayHarness(ray_head) as harness:
            env = RuntimeEnv(extras=["small"], working_dir=str(directory), env={"PYTHONPATH": "mine"})
            with pytest.raises(InvalidValueError, match="small"):
                harness.cluster.plan_job("python show.py", env)
            native = harness.cluster.plan_job(
                "python show.py", RuntimeEnv(["x"], extras=["tpu"], working_dir=str(directory))
            )
            assert "torch==1.0" in native.native["runtime_env"]["uv"]["packages"]
            assert "x" in native.native["runtime_env"]["uv"]["packages"]

    @pytest.mark.parametrize("installer", ["pip", "uv"])
    def test_a_job_finds_what_is_locked_and_what_travels(
        self, ray_head: Head, project: Project, indexes: Indexes, installer: str
    ) -> None:
        indexes.add("main", "plain")
        indexes.add("main", "not-asked-for")
        indexes.add("main", "ray")  # Ray refuses a job that would install another
        indexes.add("builds", "torch", "1.0+special")
        make_wheel(project.directory / "wheels", "vendored")
        (project.directory / "packages" / "member" / "src" / "member").mkdir(parents=True)
        (project.directory / "packages" / "member" / "src" / "member" / "__init__.py").write_text("HERE = __file__\n")
        (project.directory / "mine").mkdir()
        (project.directory / "mine" / "my_own.py").write_text("")
        directory = project.write(
            MEMBER.format(name="app", dependencies='["plain", "member", "vendored", "ray"]')
            + '[project.optional-dependencies]\ntpu = ["torch"]\nother = ["not-asked-for"]\n'
            + f'[[tool.uv.index]]\nurl = "{indexes.url("main")}"\ndefault = true\n'
            + f'[[tool.uv.index]]\nname = "builds"\nurl = "{indexes.url("builds")}"\nexplicit = true\n'
            + "[tool.uv.sources]\nmember = { workspace = true }\ntorch = { index = 'builds' }\n"
            + "vendored = { path = 'wheels/vendored-1.0-py3-none-any.whl' }\n"
            + "[tool.uv.workspace]\nmembers = ['packages/*']\n",
            member=MEMBER.format(name="member", dependencies="[]") + BUILD,
        )
        (directory / "show.py").write_text(
            "import importlib.util, os, plain, torch, vendored, my_own\n"
            "os.chdir('/')\n"
            "import member\n"
            "print(plain.VERSION, torch.VERSION, vendored.VERSION, member.HERE)\n"
            "print(importlib.util.find_spec('not_asked_for'))\n"
        )
        variables = {
            "PYTHONPATH": "mine",
            "PIP_INDEX_URL": indexes.url("main"),
            "UV_DEFAULT_INDEX": indexes.url("main"),
            "NO_PROXY": "127.0.0.1",
        }
        with RayHarness(ray_head, installer=installer) as harness:
            env = RuntimeEnv(extras=["tpu"], working_dir=str(directory), env=variables)
            info = harness.run("python show.py", env)
            logs = harness.cluster.get_logs(info.id)
        assert info.status is JobStatus.SUCCEEDED, logs
        assert logs.split()[:3] == ["1.0", "1.0+special", "1.0"]
        assert logs.split()[3].endswith("/packages/member/src/member/__init__.py")
        assert str(ray_head.session_dir) in os.path.realpath(logs.split()[3])
        assert logs.split()[4] == "None"
