"""A uv project's lock as a Ray runtime environment: real projects, real locks, no index."""

from __future__ import annotations

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fray.backend.ray.ray_deps import CPU_TORCH_INDEX, GPU_TORCH_INDEX, build_runtime_env_for_packages, source_root
from fray.errors import InvalidTypeError, InvalidValueError
from fray.types import RuntimeEnv
from fray.uv import find_uv, uv_environment
from tests.ray.ray_harness import Head, RayHarness
from tests.wheels import make_wheel

HERE = Path(__file__).parent


class Project:
    """A uv project whose index is a folder of wheels made on the spot."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.wheels = directory.parent / "wheels"
        for name in ("plain", "extra-thing", "ray", "torch", "torchvision", "nvidia-x", "only-here", "elsewhere"):
            make_wheel(self.wheels, name)

    def write(self, pyproject: str, *, lock: bool = True, **members: str) -> Path:
        settings = f'\n[tool.uv]\nno-index = true\nfind-links = ["{self.wheels.as_uri()}"]\n'
        self.directory.mkdir(exist_ok=True)
        (self.directory / "pyproject.toml").write_text(pyproject.replace("[tool.uv]\n", settings, 1))
        for name, content in members.items():
            folder = self.directory / "packages" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "pyproject.toml").write_text(content)
        if lock:
            command = [find_uv(), "lock", "--quiet", "--python", sys.executable]
            done = subprocess.run(command, cwd=self.directory, env=uv_environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return self.directory


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "project")


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


def test_extras_are_added_and_torch_comes_last(project: Project) -> None:
    directory = project.write(BASIC)
    lines = packages(build_runtime_env_for_packages(["tpu"], project=directory))
    assert lines[-3:] == [f"--extra-index-url {CPU_TORCH_INDEX}", "torch==1.0", "torchvision==1.0"]
    assert "extra-thing==1.0" in lines
    lines = packages(build_runtime_env_for_packages(["gpu"], project=directory))
    assert lines[-3:] == [f"--extra-index-url {GPU_TORCH_INDEX}", "nvidia-x==1.0", "torch==1.0"]
    assert "--extra-index-url" not in " ".join(packages(build_runtime_env_for_packages(project=directory)))


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


def test_more_packages_take_the_place_of_the_locks(project: Project) -> None:
    more = ["Plain>=2", "another"]
    lines = packages(build_runtime_env_for_packages(pip_packages=more, project=project.write(BASIC)))
    assert [line for line in lines if "lain" in line] == ["Plain>=2"]
    assert "another" in lines


def test_what_to_ignore_can_be_said(project: Project) -> None:
    lines = packages(build_runtime_env_for_packages(project=project.write(BASIC), ignore=["plain"]))
    assert "ray==1.0" in lines
    assert "plain==1.0" not in lines


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_either_installer_is_given_the_same(project: Project, installer: Any) -> None:
    built = build_runtime_env_for_packages(["tpu"], project=project.write(BASIC), installer=installer)
    assert "torch==1.0" in packages(built, installer)
    if installer == "uv":
        assert built["uv"]["uv_pip_install_options"] == ["--index-strategy=unsafe-best-match"]


def test_nothing_of_the_callers_is_changed(project: Project) -> None:
    extra, more, variables = ["tpu"], ["another"], {"PYTHONPATH": "mine", "A": "1"}
    built = build_runtime_env_for_packages(extra, more, variables, project=project.write(BASIC))
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
    subprocess.run([find_uv(), "lock", "--quiet"], cwd=directory, env=uv_environment(), check=True)
    with pytest.raises(InvalidValueError, match="workspace's root"):
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


def test_a_wheel_that_cannot_travel_is_refused(project: Project) -> None:
    directory = project.write(
        MEMBER.format(name="app", dependencies='["plain"]')
        + f"[tool.uv]\n[tool.uv.sources]\nplain = {{ path = '{project.wheels}/plain-1.0-py3-none-any.whl' }}\n"
    )
    with pytest.raises(InvalidValueError, match=r"plain-1\.0.*no node of the cluster"):
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
    with pytest.raises(InvalidValueError, match="uv lock"):
        build_runtime_env_for_packages(project=tmp_path)


def test_calls_at_once_do_not_meet(project: Project) -> None:
    directory = project.write(BASIC)
    with ThreadPoolExecutor(4) as pool:
        calls = [
            pool.submit(build_runtime_env_for_packages, [extra], project=directory) for extra in ["tpu", "gpu"] * 4
        ]
    assert len({str(call.result()) for call in calls}) == 2


def test_a_source_root_without_settings(tmp_path: Path) -> None:
    assert source_root(tmp_path) == tmp_path
    (tmp_path / "src").mkdir()
    assert source_root(tmp_path) == tmp_path / "src"
    (tmp_path / "pyproject.toml").write_text('[[tool.poetry.packages]]\ninclude = "x"\nfrom = "lib"\n')
    assert source_root(tmp_path) == tmp_path / "lib"


def test_importing_it_imports_no_ray() -> None:
    program = "import sys, fray.backend.ray.ray_deps; assert not {'ray', 'pydantic', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.xdist_group("ray")
class TestOnACluster:
    def test_a_submit_script_of_somebody_elses(self, ray_head: Head, tmp_path: Path) -> None:
        example = tmp_path / "example"
        shutil.copytree(HERE.parent.parent / "examples" / "ray_submit", example)
        subprocess.run([find_uv(), "lock", "--quiet"], cwd=example, env=uv_environment(), check=True)
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
