"""What `import fray` gives, and what it costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fray

NAMES = [
    "ActorOptions",
    "Attempt",
    "Capabilities",
    "ClusterContext",
    "FrayError",
    "JobContext",
    "JobExistsError",
    "JobFailedError",
    "JobInfo",
    "JobNotFoundError",
    "JobPlan",
    "JobStatus",
    "Lifetime",
    "LocalClusterContext",
    "LocalJobContext",
    "PlatformError",
    "Resource",
    "RuntimeEnv",
    "TaskOptions",
    "TerminationReason",
    "TpuContext",
    "TpuRunConfig",
    "UnsupportedError",
    "UsageError",
    "WaitTimeoutError",
    "clear_job_context",
    "connect",
    "get_job_context",
    "set_job_context",
    "use_job_context",
]

# What is heavy, and what only some calls need.
NOT_AT_IMPORT = (
    "pydantic",
    "typer",
    "rich",
    "click",
    "psutil",
    "platformdirs",
    "uv",
    "fray.backend",
    "fray.cli",
    "fray.testing",
    "importlib.metadata",
    "concurrent.futures",
    "asyncio",
    "subprocess",
    "json",
    "hashlib",
    "tomllib",
)

# Everything that may be needed inside a job, where only the light part of Fray is.
LIGHT_MODULES = ("fray.types", "fray.cluster", "fray.job", "fray.context", "fray.errors", "fray.tpu", "fray.plugins")

CORE = Path(fray.__file__).parent


def loaded_by(program: str) -> set[str]:
    """The modules in a fresh interpreter after a program."""
    show = f"{program}\nimport sys\nnames = sorted(sys.modules)\nimport json\nprint(json.dumps(names))"
    done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_public_names_are_these() -> None:
    assert fray.__all__ == NAMES == sorted(NAMES)
    assert {name for name in NAMES if not hasattr(fray, name)} == set()


def test_nothing_else_looks_public() -> None:
    modules = {path.stem for path in CORE.glob("*.py")} | {path.name for path in CORE.iterdir() if path.is_dir()}
    others = {name for name in vars(fray) if not name.startswith("_")} - set(NAMES)
    assert others <= modules


def test_all_public_names_can_be_imported_at_once() -> None:
    namespace: dict[str, object] = {}
    exec("from fray import *", namespace)
    assert set(NAMES) <= namespace.keys()


@pytest.mark.parametrize("module", ["fray", *LIGHT_MODULES])
def test_importing_loads_the_standard_library_only(module: str) -> None:
    loaded = loaded_by(f"import {module}") - loaded_by("pass")
    assert {
        name for name in loaded for heavy in NOT_AT_IMPORT if name == heavy or name.startswith(f"{heavy}.")
    } == set()
    assert {name for name in loaded if name.partition(".")[0] not in {*sys.stdlib_module_names, "fray"}} == set()


def test_a_local_job_context_loads_no_third_party() -> None:
    loaded = loaded_by("import fray\ncontext = fray.get_job_context()\ncontext.get(context.create_task(lambda: 42))")
    assert not {"pydantic", "typer", "rich"} & (loaded - loaded_by("pass"))


def test_the_package_is_spread_over_distributions() -> None:
    assert str(CORE) in list(fray.__path__)
    assert not hasattr(fray, "pkgutil")


def old_pythons() -> Iterator[str]:
    for python in sorted(Path("~/.pyenv/versions").expanduser().glob("3.*/bin/python")):
        version = tuple(int(part) for part in python.parents[1].name.split(".")[:2] if part.isdigit())
        if (3, 6) <= version < (3, 11):
            yield str(python)


def test_an_old_python_is_told_the_reason(installed_old_pythons: list[str]) -> None:
    for python in installed_old_pythons:
        done = subprocess.run(
            [python, "-c", "import fray"],
            env={**os.environ, "PYTHONPATH": str(CORE.parent), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        said = done.stderr.splitlines()[-1]
        assert said.startswith("ImportError: fray (and so get_job_context()) needs Python 3.11 or newer"), done.stderr
        assert python in said


@pytest.fixture
def installed_old_pythons() -> list[str]:
    found = list(old_pythons())
    if not found:
        pytest.skip("no Python from 3.6 to 3.10 under ~/.pyenv/versions: the refusal there is not tested")
    return found
