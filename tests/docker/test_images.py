"""From a project directory to an image, on the real engine: what is in it, what is rebuilt, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from docker.errors import NotFound

from fray.backend.docker import _buildkit
from fray.backend.docker._context import Context
from fray.backend.docker._engine import Engine
from fray.backend.docker._registry import push
from fray.backend.docker._request import BuildRequest
from fray.backend.docker.images import FrozenBuild, ImageBuilder, ImageRef, build_frozen, index_settings
from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    ImageBuildError,
    InvalidValueError,
    PlatformError,
    UnsupportedError,
)
from fray.uv import find_uv, uv_environment
from tests.requirements import missing

from .registry import Registry

# One user of the engine at a time: tests look at all that is in it.
pytestmark = pytest.mark.xdist_group("docker")

BUILDERS = ["buildkit", "classic"]
LIBRARY = """
[project]
name = "library"
version = "0.1"
requires-python = ">=3.8"
dependencies = ["idna"]
[build-system]
requires = ["uv_build"]
build-backend = "uv_build"
"""
PROJECT = """
[project]
name = "demo"
version = "0.1"
requires-python = ">=3.8"
dependencies = ["sniffio", "library"]
[project.optional-dependencies]
more = ["six"]
[dependency-groups]
dev = ["colorama"]
[tool.uv.workspace]
members = ["library"]
[tool.uv.sources]
library = { workspace = true }
"""


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in index_settings():
        monkeypatch.delenv(name)


@pytest.fixture
def repository(engine: Engine) -> Iterator[str]:
    """A name of its own, whose images are removed."""
    name = f"fray-test/{uuid.uuid4().hex[:12]}"
    yield name
    for image in engine.api.images(name):
        engine.api.remove_image(image["Id"], force=True)


Make = Callable[..., ImageBuilder]


@pytest.fixture
def make(engine: Engine, base_image: str, repository: str) -> Make:
    """Makes builders for this test's engine, base and repository."""

    def builder(directory: Path | None, **options: Any) -> ImageBuilder:
        if options.get("builder") != "classic" and _buildkit.find_cli(engine) is None:
            missing("buildkit", "a docker command with BuildKit")
        if "dockerfile" not in options:
            options.setdefault("base_image", base_image)
        options.setdefault("repository", repository)
        return ImageBuilder(directory, engine=engine, **options)

    return builder


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A directory with two files."""
    directory = tmp_path / "demo"
    (directory / "sub").mkdir(parents=True)
    (directory / "main.py").write_text("print('hello')\n")
    (directory / "sub" / "run.sh").write_text("#!/bin/sh\n")
    (directory / "sub" / "run.sh").chmod(0o755)
    return directory


@pytest.fixture(scope="session")
def locked_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a lock, an extra, a development group and a member that is a package."""
    directory = tmp_path_factory.mktemp("locked") / "demo"
    package = directory / "library" / "src" / "library"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("VALUE = 1\n")
    (directory / "library" / "pyproject.toml").write_text(LIBRARY)
    (directory / "pyproject.toml").write_text(PROJECT)
    done = subprocess.run([find_uv(), "lock"], cwd=directory, env=uv_environment(), capture_output=True, text=True)
    if done.returncode != 0:
        missing("package-index", done.stderr)
    return directory


def run(engine: Engine, image: ImageRef, command: str) -> str:
    """Run a shell command in an image; return what it printed."""
    container = engine.api.create_container(image.id, ["sh", "-c", command])
    try:
        engine.api.start(container)
        code = engine.api.wait(container)["StatusCode"]
        output: str = engine.api.logs(container).decode()
    finally:
        engine.api.remove_container(container, force=True)
    assert code == 0, output
    return output


def layers(engine: Engine, image: ImageRef) -> list[str]:
    found = engine.inspect_image(image.id)
    assert found is not None
    return list(found["RootFS"]["Layers"])


def left_of(engine: Engine, marker: str) -> list[str]:
    """The images and containers that a step with a marker in it has left."""
    found = [
        image["Id"] for image in engine.api.images(all=True) if marker in json.dumps(_history(engine, image["Id"]))
    ]
    return found + [each["Id"] for each in engine.api.containers(all=True) if marker in str(each["Command"])]


def _history(engine: Engine, image: str) -> Any:
    try:
        return engine.api.history(image)
    except NotFound:  # another test's, removed meanwhile
        return []


@pytest.mark.parametrize("builder", BUILDERS)
def test_files_are_in_the_workspace_for_a_user_that_is_not_root(
    make: Make, engine: Engine, project: Path, builder: str
) -> None:
    (project / ".dockerignore").write_text("*.log\n!kept.log\n")
    (project / "a.log").write_text("")
    (project / "kept.log").write_text("")
    (project / ".gitignore").write_text("secret\n")
    (project / "secret").write_text("")
    plan = make(project, builder=builder).plan()
    image = make(project, builder=builder).build()
    assert (plan.tag, plan.builder, plan.is_built, plan.files) == (image.tag, builder, False, 5)
    said = run(
        engine, image, "id -u; id -un; pwd; python3 main.py; ls -A; touch sub/new; sub/run.sh; echo $HOME; touch ~/x"
    )
    assert said.split() == [
        *("1000", "fray", "/workspace", "hello"),
        *(".dockerignore", ".gitignore", "kept.log", "main.py", "sub", "/home/fray"),
    ]
    found = engine.inspect_image(image.id)
    assert found is not None
    assert found["Config"]["Labels"].items() >= {"fray.image": "1", "fray.project": "demo"}.items()
    assert "PYTHONUNBUFFERED=1" in found["Config"]["Env"]


def test_both_builders_give_the_same_files(make: Make, engine: Engine, project: Path, repository: str) -> None:
    listing = (
        "cd /; find . -xdev ! -path './proc*' ! -path './sys*' ! -path './dev*' ! -path './etc/host*' "
        "! -path './etc/resolv.conf' ! -path './.dockerenv' ! -name '*.pyc' -printf '%p %m %U %G %l\\n' | sort"
    )
    found = []
    for builder in BUILDERS:
        options = {"package_requirements": ["six"], "ca_bundle": "system", "repository": f"{repository}-{builder}"}
        image = make(project, builder=builder, **options).build()
        try:
            found.append((image.tag.partition(":")[2], run(engine, image, listing)))
        finally:
            engine.api.remove_image(image.id, force=True)
    assert found[0] == found[1]


def test_an_unchanged_project_is_not_built_again(make: Make, engine: Engine, project: Path, tmp_path: Path) -> None:
    first = make(project).build()
    copy = tmp_path / "elsewhere" / "demo"
    shutil.copytree(project, copy)
    os.utime(copy / "main.py", (1, 1))
    said: list[str] = []
    assert make(copy).plan().is_built
    assert make(copy).build(on_progress=said.append) == first
    assert said == []


def test_the_tag_changes_with_each_input(make: Make, project: Path, tmp_path: Path, shell_image: str) -> None:
    (tmp_path / "ca.pem").write_text("x")
    tags = [
        make(project).plan().tag,
        make(None).plan().tag,
        make(project, base_image=shell_image).plan().tag,
        make(project, package_requirements=["six"]).plan().tag,
        make(project, package_requirements=["idna"]).plan().tag,
        make(project, ca_bundle=tmp_path / "ca.pem").plan().tag,
        make(project, keep_user=True).plan().tag,
        make(project, excludes=["sub"]).plan().tag,
    ]
    (project / "main.py").chmod(0o755)
    tags.append(make(project).plan().tag)
    (project / "main.py").write_text("print('other')\n")
    tags.append(make(project).plan().tag)
    (project / "main.py").rename(project / "renamed.py")
    tags.append(make(project).plan().tag)
    (project / "Dockerfile").write_text("ARG A\nFROM scratch AS one\nCOPY . /\nFROM one AS two\n")
    for options in ({}, {"target": "one"}, {"build_args": {"A": "1"}}, {"build_secrets": {"token": "x"}}):
        tags.append(make(project, dockerfile="Dockerfile", **options).plan().tag)
    assert len(set(tags)) == len(tags)
    assert tags[-1] == make(project, dockerfile="Dockerfile", build_secrets={"token": "y"}).plan().tag


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_lock_an_extra_and_requirements_are_installed(
    make: Make, engine: Engine, locked_project: Path, builder: str
) -> None:
    options = {"builder": builder, "ca_bundle": "system", "extras": ["more"], "package_requirements": ["attrs"]}
    image = make(locked_project, **options).build()
    program = "import sniffio, idna, six, attr, library, sys; print(sys.prefix, library.__file__)"
    assert run(engine, image, f'python -c "{program}"') == "/opt/venv /workspace/library/src/library/__init__.py\n"
    assert run(engine, image, "python -c 'import colorama' 2>&1 || true").endswith("No module named 'colorama'\n")
    assert run(engine, image, "ls /opt /dev; command -v uv || true").count("uv") == 0


def test_each_edit_rebuilds_what_depends_on_it(
    make: Make, engine: Engine, locked_project: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "demo"
    shutil.copytree(locked_project, directory)
    before = layers(engine, make(directory, ca_bundle="system").build())
    (directory / "train.py").write_text("x = 1\n")
    pyproject = directory / "pyproject.toml"
    pyproject.write_text(pyproject.read_text() + "[tool.other]\nx = 1\n")
    source = layers(engine, make(directory, ca_bundle="system").build())
    assert source[:-2] == before[:-2], "the last two are the source, and its package"
    assert source[-2] != before[-2]
    text = pyproject.read_text().replace('"sniffio"', '"sniffio", "attrs"')
    pyproject.write_text(text)
    subprocess.run([find_uv(), "lock"], cwd=directory, env=uv_environment(), capture_output=True, check=True)
    locked = layers(engine, make(directory, ca_bundle="system").build())
    assert locked[: -len(locked) + 3] == before[: -len(before) + 3], "base, certificates and user"
    assert locked[3] != before[3]


@pytest.mark.parametrize("builder", BUILDERS)
def test_requirements_on_a_given_image_leave_its_own_packages(
    make: Make, engine: Engine, base_image: str, tmp_path: Path, repository: str, builder: str
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "Dockerfile").write_text(
        f"FROM {base_image}\nRUN useradd -m app && d=$(python3 -c 'import site; print(site.getsitepackages()[0])') && "
        "mkdir -p $d && echo 'WHO = 1' > $d/base_only.py\nUSER app\nWORKDIR /home/app\n"
    )
    base = make(own, dockerfile="Dockerfile", builder=builder, repository=f"{repository}-base").build()
    try:
        options = {"keep_user": True, "base_image": base.tag, "ca_bundle": "system", "builder": builder}
        plain = make(None, package_requirements=["six"], **options).build()
        program = "import base_only, six, sys; print(sys.prefix, six.__file__.startswith(sys.prefix))"
        assert run(engine, plain, f'id -un; pwd; python3 -c "{program}"') == "app\n/home/app\n/opt/venv True\n"
        (own / "file").write_text("")
        options["base_image"] = plain.tag
        again = make(own, package_requirements=["idna"], **options).build()
        program = "import base_only, six, idna, sys; print(sys.prefix)"
        said = run(engine, again, f'id -un; pwd; touch x; stat -c %U . file; python3 -c "{program}"')
        assert said == "app\n/workspace\napp\napp\n/opt/venv2\n"
    finally:
        engine.api.remove_image(base.tag, force=True)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_base_without_python_is_enough_for_files(
    make: Make, engine: Engine, shell_image: str, project: Path, builder: str
) -> None:
    image = make(project, base_image=shell_image, builder=builder).build()
    assert run(engine, image, "id -u; ls; sub/run.sh") == "1000\nmain.py\nsub\n"
    with pytest.raises(ImageBuildError, match="no python3"):
        make(project, base_image=shell_image, builder=builder, package_requirements=["six"]).build()


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_dockerfile_of_ones_own(
    make: Make, engine: Engine, base_image: str, project: Path, tmp_path: Path, builder: str
) -> None:
    dockerfile = tmp_path / "outside.dockerfile"
    dockerfile.write_text(
        f"FROM {base_image} AS first\nARG WHAT=nothing\nCOPY . /app\nRUN echo $WHAT > /what\nFROM first\nRUN false\n"
    )
    (project / "main.py").write_text("1")
    options = {"dockerfile": dockerfile, "target": "first", "build_args": {"WHAT": "it"}, "builder": builder}
    image = make(project, excludes=["sub"], **options).build()
    assert run(engine, image, "cat /what; ls /app; stat -c %u /app/main.py") == "it\nmain.py\n0\n"
    found = engine.inspect_image(image.id)
    assert found is not None
    assert found["Config"]["Labels"]["fray.project"] == "demo"


def test_a_build_secret_is_in_no_layer_and_no_history(
    make: Make, engine: Engine, base_image: str, project: Path, tmp_path: Path
) -> None:
    secret = uuid.uuid4().hex
    (project / "Dockerfile").write_text(
        f"FROM {base_image}\nRUN --mount=type=secret,id=token [ $(wc -c < /run/secrets/token) = 32 ]\n"
    )
    builder = make(project, dockerfile="Dockerfile", build_secrets={"token": secret})
    frozen = builder.freeze(tmp_path)
    assert secret not in repr(frozen) + json.dumps(frozen.as_dict())
    assert secret.encode() not in (tmp_path / "context.tar").read_bytes()
    output: list[bytes] = []
    with pytest.raises(InvalidValueError, match="token"):
        build_frozen(frozen, engine)
    image = build_frozen(frozen, engine, output.append, build_secrets={"token": secret})
    saved = b"".join(engine.api.get_image(image.tag))
    assert secret.encode() not in saved
    assert secret.encode() not in b"".join(output)
    assert secret not in json.dumps([engine.api.history(image.tag), engine.inspect_image(image.tag)])
    with pytest.raises(UnsupportedError, match="classic builder"):
        make(project, dockerfile="Dockerfile", build_secrets={"token": secret}, builder="classic")


def test_credentials_of_an_index_reach_a_build_without_staying(
    make: Make, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = uuid.uuid4().hex
    monkeypatch.setenv("UV_DEFAULT_INDEX", f"https://user:{secret}@pypi.org/simple")
    image = make(None, package_requirements=["six"], ca_bundle="system").build()
    assert (
        run(engine, image, "python -c 'import six'; env; cat /etc/environment 2>/dev/null || true").count(secret) == 0
    )
    assert secret not in json.dumps([engine.api.history(image.tag), engine.inspect_image(image.tag)])
    with pytest.raises(UnsupportedError, match="UV_DEFAULT_INDEX holds, or may hold, credentials"):
        make(None, package_requirements=["six"], builder="classic").plan()
    monkeypatch.setenv("UV_DEFAULT_INDEX", "https://user:another@pypi.org/simple")
    assert make(None, package_requirements=["six"], ca_bundle="system").plan().tag == image.tag


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("said", ["invalid peer certificate: UnknownIssuer", "[SSL: CERTIFICATE_VERIFY_FAILED]"])
def test_a_certificate_that_is_not_trusted_leads_to_the_option(
    make: Make, base_image: str, project: Path, builder: str, said: str
) -> None:
    (project / "Dockerfile").write_text(f"FROM {base_image}\nRUN echo '{said}'; exit 1\n")
    with pytest.raises(ImageBuildError, match="the option ca_bundle"):
        make(project, dockerfile="Dockerfile", builder=builder).build()


def test_a_certificate_that_the_engine_does_not_trust_is_not_the_images_affair() -> None:
    request = BuildRequest("some:tag", Context())
    said = ["x509: certificate signed by unknown authority"]
    assert "ca_bundle" not in request.failure("the step `[1/4] FROM registry/image` failed", said)
    assert "ca_bundle" in request.failure("the step `[2/4] RUN curl https://there` failed", said)


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_failing_step_is_named_with_its_last_lines(
    make: Make, engine: Engine, base_image: str, project: Path, builder: str
) -> None:
    marker = uuid.uuid4().hex
    (project / "Dockerfile").write_text(f"FROM {base_image}\nRUN echo the reason >&2; exit 7 # {marker}\n")
    output: list[bytes] = []
    said: list[str] = []
    with pytest.raises(ImageBuildError, match=r"RUN echo the reason[\s\S]*the reason\n") as failed:
        make(project, dockerfile="Dockerfile", builder=builder).build(output.append, said.append)
    assert "ca_bundle" not in str(failed.value)
    assert b"the reason" in b"".join(output)
    assert any(each.startswith("building image, step 2/") for each in said)
    assert left_of(engine, marker) == []


def test_a_build_whose_cached_step_is_removed_meanwhile_is_begun_again(
    engine: Engine, make: Make, project: Path, repository: str
) -> None:
    """As when somebody prunes, or removes another image that shares the step."""
    (project / "Dockerfile").write_text(f"FROM scratch\nENV OF={uuid.uuid4().hex}\nCOPY big /big\n")
    (project / "big").write_bytes(os.urandom(1 << 20))
    first = make(project, dockerfile="Dockerfile", builder="classic").build()
    (project / "big").write_bytes(bytes(600 << 20))  # a step that takes a while
    said: list[bytes] = []

    def on_output(output: bytes) -> None:
        said.append(output)
        if output.startswith(b"Step 3") and engine.inspect_image(first.tag):
            engine.api.remove_image(first.tag)  # with the nameless one that it was made from

    second = make(project, dockerfile="Dockerfile", builder="classic").build(on_output)
    assert engine.inspect_image(second.tag) is not None
    assert engine.inspect_image(first.tag) is None
    text = b"".join(said).decode()
    assert "unknown parent image ID" in text
    assert text.count("Step 3/") == 2


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_cancelled_build_leaves_nothing(
    make: Make, engine: Engine, base_image: str, project: Path, builder: str
) -> None:
    # A step that is made anew, and then one that does not end.
    marker = uuid.uuid4().hex
    steps = f"RUN echo {marker} > /made\nRUN echo $((6*7))-begins; sleep 600 # {marker}\n"
    (project / "Dockerfile").write_text(f"FROM {base_image}\n{steps}")
    cancel = threading.Event()

    def on_output(output: bytes) -> None:
        if b"42-begins" in output:
            cancel.set()

    with pytest.raises(ImageBuildError, match="cancelled"):
        make(project, dockerfile="Dockerfile", builder=builder).build(on_output, cancel=cancel)
    assert left_of(engine, marker) == []


def test_an_interrupted_build_leaves_no_command(
    make: Make, engine: Engine, base_image: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "Dockerfile").write_text(f"FROM {base_image}\nRUN echo $((6*7))-begins; sleep 600\n")
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*args, **options))
        return started[-1]

    def on_output(output: bytes) -> None:
        if b"42-begins" in output:
            raise KeyboardInterrupt

    builder = make(project, dockerfile="Dockerfile")
    builder.plan()
    monkeypatch.setattr(_buildkit.subprocess, "Popen", remember)
    with pytest.raises(KeyboardInterrupt):
        builder.build(on_output)
    assert [process.returncode is not None for process in started] == [True]


@pytest.mark.parametrize("builder", BUILDERS)
def test_what_is_frozen_is_built_as_it_was(
    make: Make, engine: Engine, project: Path, tmp_path: Path, builder: str
) -> None:
    maker = make(project, builder=builder)
    plan = maker.plan()
    frozen = FrozenBuild.from_dict(json.loads(json.dumps(maker.freeze(tmp_path / "context").as_dict())))
    (project / "main.py").write_text("print('later')\n")
    assert frozen.tag == plan.tag
    image = build_frozen(frozen, engine)
    assert image.tag == plan.tag
    assert run(engine, image, "python3 main.py") == "hello\n"


def test_a_base_that_is_nowhere(make: Make, project: Path) -> None:
    with pytest.raises(PlatformError, match=r"fray-test/no-such-base:1.*docker pull"):
        make(project, base_image="127.0.0.1:1/fray-test/no-such-base:1").plan()


def test_a_push_waits_for_a_registry_that_says_nothing_for_longer_than_the_engine_may(
    engine: Engine, shell_image: str, registry: Registry
) -> None:
    with registry.stalled() as stalled, engine.own_client(1) as hasty, ThreadPoolExecutor(1) as executor:
        repository = f"{stalled.stalled_address}/team/slow"
        engine.api.tag(shell_image, repository, "1")
        try:
            pushing = executor.submit(push, hasty, repository, "1", lambda said: None)
            assert stalled.has_held.wait(60)
            time.sleep(3)
            stalled.release()
            assert pushing.result(60).startswith("sha256:")
        finally:
            engine.api.remove_image(f"{repository}:1")


def test_a_pushed_image_is_pulled_by_digest_and_is_a_base_that_is_not_here(
    make: Make, engine: Engine, project: Path, registry: Registry
) -> None:
    place = f"{registry.address}/team/demo"
    builder = make(project)
    built = builder.build()
    said: list[str] = []
    pushed = builder.push(built, place, said.append)
    try:
        assert pushed.digest is not None
        assert str(pushed) == pushed.digest
        assert pushed.digest.startswith(f"{place}@sha256:")
        assert said
        engine.api.remove_image(built.id, force=True)
        on_top = make(project, base_image=pushed.digest, keep_user=True, excludes=["sub"])
        assert on_top.plan().base == pushed.digest
        assert engine.inspect_image(pushed.digest) is None, "a plan pulls nothing"
        image = on_top.build()
        assert run(engine, image, "id -un; python3 main.py; ls sub") == "fray\nhello\nrun.sh\n"
        assert on_top.plan().is_built, "the tag is the same once the base is here"
        engine.api.remove_image(image.id, force=True)
    finally:
        for name in (pushed.digest, pushed.tag):
            if name and engine.inspect_image(name):
                engine.api.remove_image(name, force=True)


@pytest.mark.usefixtures("docker_config")
def test_a_registry_that_refuses_and_one_that_is_not_there(
    make: Make, project: Path, private_registry: Registry, engine: Engine
) -> None:
    builder = make(project)
    image = builder.build()
    for place, error in (
        (f"{private_registry.address}/team/demo", AuthenticationError),
        ("127.0.0.1:1/team/demo", ConnectionFailedError),
    ):
        with pytest.raises(error):
            builder.push(image, place)
        engine.api.remove_image(f"{place}:{image.tag.partition(':')[2]}")


def test_what_cannot_be_is_refused_before_anything_is_done(project: Path) -> None:
    with pytest.raises(InvalidValueError, match="uv lock"):
        ImageBuilder(project, extras=["gpu"])
    with pytest.raises(InvalidValueError, match="not a directory"):
        ImageBuilder(project / "none")
    with pytest.raises(InvalidValueError, match="no tag"):
        ImageBuilder(project, repository="a/b:c")
    with pytest.raises(InvalidValueError, match="no Dockerfile"):
        ImageBuilder(project, dockerfile="Dockerfile")
    with pytest.raises(InvalidValueError, match="Dockerfile of your own"):
        ImageBuilder(project, build_args={"A": "1"})
    (project / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(UnsupportedError, match="package_requirements"):
        ImageBuilder(project, dockerfile="Dockerfile", package_requirements=["six"])


def test_too_many_bytes_are_refused_with_the_largest_named(make: Make, project: Path) -> None:
    (project / "big").write_bytes(b"x" * 2000)
    with pytest.raises(InvalidValueError, match=r"big \(2\.0 KiB\)"):
        make(project, upload_limit_bytes=1000).plan()


def test_a_command_with_the_plugin_or_of_an_old_version_is_found_among_others(tmp_path: Path, engine: Engine) -> None:
    def command(name: str, version: str, has_buildx: bool) -> str:
        folder = tmp_path / name
        folder.mkdir()
        script = folder / "docker"
        script.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && echo "Docker version {version}, build x" && exit 0\n'
            f'[ "$1" = buildx ] && exit {0 if has_buildx else 1}\nexit 1\n'
        )
        script.chmod(0o755)
        return str(folder)

    bare, old, new = command("a", "28.2.2", False), command("b", "20.10.24", False), command("c", "28.2.2", True)

    def found(*folders: str) -> str:
        return str(_buildkit._find_cli(os.pathsep.join(folders)))

    assert found(bare) == "None"
    assert found(bare, old) == f"{old}/docker"
    assert found(bare, new, old) == f"{new}/docker buildx"
    assert found(str(tmp_path / "none")) == "None"


def test_settings_of_uv_are_those_that_a_build_can_use() -> None:
    assert index_settings(
        {
            "UV_DEFAULT_INDEX": "https://a/simple",
            "UV_INDEX": "one=https://b/simple file:///c",
            "UV_FIND_LINKS": "/local,https://d",
            "UV_INDEX_ONE_PASSWORD": "x",
            "UV_CACHE_DIR": "/y",
            "UV_INDEX_URL": "file:///z",
        }
    ) == {
        "UV_DEFAULT_INDEX": "https://a/simple",
        "UV_INDEX": "one=https://b/simple",
        "UV_FIND_LINKS": "https://d",
        "UV_INDEX_ONE_PASSWORD": "x",
    }
