"""What users install: the built wheels, by plain pip, in an empty environment."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from uv import find_uv_bin

    directory = tmp_path_factory.mktemp("wheels")
    for package in sorted(ROOT.glob("packages/*/pyproject.toml")):
        command = [find_uv_bin(), "build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable]
        subprocess.run([*command, "--out-dir", str(directory), str(package.parent)], check=True)
    return directory


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from uv import find_uv_bin

    # Empty but for pip; not by the venv module, which some distributions' Pythons lack.
    directory = tmp_path_factory.mktemp("environment")
    command = [find_uv_bin(), "venv", "--quiet", "--seed", "--clear", "--python", sys.executable, str(directory)]
    subprocess.run(command, check=True)
    return directory


def _run(environment: Path, *command: str) -> str:
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        cwd=environment,
        env={"PATH": "/usr/bin:/bin", "HOME": str(environment)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def _pip(environment: Path, *arguments: str) -> None:
    """Pip with the caller's own settings, so that it finds the index that everything else came from."""
    command = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


def test_core_alone_and_then_with_the_local_backend(wheels: Path, environment: Path, tmp_path: Path) -> None:
    _pip(environment, str(next(wheels.glob("fray_core-*.whl"))))
    in_memory = "import fray; c = fray.get_job_context(); print(c.get(c.create_task(lambda: 42)))"
    assert _run(environment, "python", "-c", in_memory) == "42"
    missing = "import fray\ntry: fray.connect('local')\nexcept fray.UsageError as error: print(error)"
    assert "pip install fray-local" in _run(environment, "python", "-c", missing)
    assert _run(environment, "fray", "--version")
    with pytest.raises(AssertionError, match="pip install fray-docker"):
        _run(environment, "fray", "build")

    _pip(environment, "--no-index", "--no-deps", str(next(wheels.glob("fray_local-*.whl"))))
    _pip(environment, "uv", "psutil", "platformdirs")
    job = (
        "import fray\n"
        f"with fray.connect('local:{tmp_path}/store') as cluster:\n"
        "    job_id = cluster.create_job('python -c \"import fray; print(fray.get_job_context())\"')\n"
        "    print(cluster.wait(job_id, 60).status, cluster.get_logs(job_id))"
    )
    assert _run(environment, "python", "-c", job).startswith("SUCCEEDED <fray._local_job_context.LocalJobContext")
    submitted = _run(environment, "fray", "run", "-c", f"local:{tmp_path}/store", "--", "echo", "hello there")
    assert submitted == "hello there"


def test_a_wheel_holds_its_own_files_and_no_others(wheels: Path) -> None:
    import zipfile

    names = {
        path.name.split("-")[0]: [name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/")]
        for path in wheels.glob("*.whl")
    }
    core = [name for name in names["fray_core"] if ".dist-info/" not in name]
    local = [name for name in names["fray_local"] if ".dist-info/" not in name]
    assert all(name.startswith("fray/") for name in core)
    assert not [name for name in core if name.startswith("fray/backend/local")]
    assert all(name.startswith("fray/backend/local/") for name in local)
    assert "fray/backend/local/py.typed" in local
    assert "fray/py.typed" in core
    for members in names.values():
        assert [name for name in members if name.endswith("/licenses/LICENSE")]


def test_the_docker_backend_carries_a_runner_for_each_platform(wheels: Path) -> None:
    with zipfile.ZipFile(next(wheels.glob("fray_docker-*.whl"))) as wheel:
        for machine, number in {"amd64": 0x3E, "arm64": 0xB7}.items():
            program = wheel.read(f"fray/backend/docker/runner/fray-runner-{machine}")
            assert program[:4] == b"\x7fELF"
            assert int.from_bytes(program[18:20], "little") == number  # e_machine
