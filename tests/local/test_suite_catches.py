"""The conformance suite of tier 1 is itself tested: each rule is broken on purpose, and its check must see that."""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import pytest

from fray import FrayError, plugins
from fray.testing import ClusterConformance
from tests.local.broken_backends import BROKEN, Local, Row, Sound, write_distribution
from tests.local.local_harness import LocalHarness

# How a check fails: anything else is a mistake in the broken backend or in the check.
CAUGHT = (AssertionError, pytest.fail.Exception, FrayError, TimeoutError)

# What `RuntimeEnv` refuses, before any backend hears of it.
NOT_A_BACKENDS_TO_BREAK = {"test_frays_own_names_are_refused"}


class Harness(LocalHarness):
    """The local harness for a class of broken_backends; at its end every process of its jobs is killed."""

    def __init__(self, backend: type[Local], root: Path, cache: Path, *, bare_python: bool = False) -> None:
        super().__init__(root, cache)
        self.spec = f"{backend.name}:{root}"
        if bare_python:
            self.options["python"] = sys._base_executable

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for cluster in self._clusters:
            cluster.close()
        for permit in self.root.glob("jobs/*/permit-*"):  # a runner that comes up later ends by itself
            permit.unlink(missing_ok=True)
        # What is forked during one look, by a process that has ended when its turn comes, is seen in the next.
        while self._kill_ours() or self._kill_ours():
            pass

    def _kill_ours(self) -> bool:
        found = [process for process in psutil.process_iter() if self._is_ours(process)]
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=0.1)
        return bool(found)

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process was started for a job of this store: a broken backend lists and stops as it likes."""
        try:
            if process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid():
                return False
            # A broken backend may have left the variable out: its runner's arguments name the store too.
            named = [process.environ().get("FRAY_OUTPUT_DIR", ""), *process.cmdline()]
            return any(each.startswith(f"{self.root}/") for each in named)
        except (psutil.Error, OSError):
            return False


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distribution")
    write_distribution(directory)
    return directory


@pytest.fixture(autouse=True)
def installed(distribution: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the broken backends known: here by their registration, in other processes by a distribution's metadata."""
    before = dict(plugins._registered)
    for backend in (Sound, *(row.broken for row in BROKEN)):
        plugins.register_backend(backend.name, backend)
    monkeypatch.syspath_prepend(distribution)
    repository = Path(__file__).parents[2]
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(distribution), str(repository), *inherited]))
    yield
    plugins._registered.clear()
    plugins._registered.update(before)


def checks() -> dict[str, Callable[..., None]]:
    return {name: check for name, check in vars(ClusterConformance).items() if hasattr(check, "rule")}


def cases_of(check: Callable[..., None]) -> list[dict[str, Any]]:
    """The arguments that pytest would give a parametrised check, one dictionary for each time it would run it."""
    choices: list[list[dict[str, Any]]] = []
    for mark in getattr(check, "pytestmark", ()):
        assert mark.name == "parametrize"
        names, values = mark.args
        if isinstance(names, str):
            names, values = (names,), [(value,) for value in values]
        choices.append([dict(zip(names, each, strict=True)) for each in values])
    return [{name: value for part in parts for name, value in part.items()} for parts in itertools.product(*choices)]


def run_check(row: Row, harness: LocalHarness, tmp_path: Path) -> None:
    check = checks()[row.check]
    case = next(case for case in cases_of(check) if row.parameters.items() <= case.items())
    available = {"self": ClusterConformance(), "harness": harness, "tmp_path": tmp_path, **case}
    check(**{name: available[name] for name in inspect.signature(check).parameters})


def name_of(row: Row) -> str:
    case = "".join(f"-{value}" for value in row.parameters.values())
    return f"{checks()[row.check].rule}-{row.check.removeprefix('test_')}{case}"


def distinct_checks() -> list[Row]:
    """The table's checks and cases, each once, put to the sound backend."""
    rows = [Row(row.check, row.parameters, Sound, row.bare_python) for row in BROKEN]
    return [row for number, row in enumerate(rows) if row not in rows[:number]]


@pytest.mark.parametrize("row", BROKEN, ids=[f"{name_of(row)}-{row.broken.name}" for row in BROKEN])
def test_a_broken_rule_is_caught(row: Row, tmp_path: Path, environment_cache: Path) -> None:
    (tmp_path / "for the check").mkdir()
    with Harness(row.broken, tmp_path / "store", environment_cache, bare_python=row.bare_python) as harness:
        harness.deadline_seconds = 3.0  # what never comes is waited for so long
        with pytest.raises(CAUGHT) as failure:
            run_check(row, harness, tmp_path / "for the check")
    assert f"This breaks rule {checks()[row.check].rule} of the contract." in failure.value.__notes__


@pytest.mark.parametrize("row", distinct_checks(), ids=name_of)
def test_the_sound_backend_is_not_caught(row: Row, tmp_path: Path, environment_cache: Path) -> None:
    (tmp_path / "for the check").mkdir()
    with Harness(row.broken, tmp_path / "store", environment_cache, bare_python=row.bare_python) as harness:
        run_check(row, harness, tmp_path / "for the check")


def test_each_rule_is_broken_and_each_check_catches_something() -> None:
    assert {checks()[row.check].rule for row in BROKEN} == set(range(1, 16))
    assert {row.check for row in BROKEN} == checks().keys() - NOT_A_BACKENDS_TO_BREAK
