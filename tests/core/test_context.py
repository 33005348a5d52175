from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fray import JobContext, LocalJobContext, clear_job_context, get_job_context, set_job_context, use_job_context


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("FRAY_JOB_CONTEXT", raising=False)
    clear_job_context()
    yield
    clear_job_context()


def in_a_thread(call: Callable[[], Any]) -> Any:
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()))
    thread.start()
    thread.join()
    return result[0]


# What is set


def test_what_is_set_is_found_until_it_is_cleared() -> None:
    job_context = LocalJobContext()
    set_job_context(job_context)
    assert get_job_context() is job_context
    clear_job_context()
    assert get_job_context() is not job_context


def test_use_job_context_gives_way_to_what_was_before() -> None:
    outer, inner = LocalJobContext(), LocalJobContext()
    with use_job_context(outer) as given:
        assert given is outer
        with use_job_context(inner):
            assert get_job_context() is inner
        assert get_job_context() is outer
        with pytest.raises(ZeroDivisionError), use_job_context(inner):
            _ = 1 / 0
        assert get_job_context() is outer
    assert get_job_context() not in (outer, inner)


def test_a_plain_thread_begins_with_nothing_set() -> None:
    job_context = LocalJobContext()
    with use_job_context(job_context):
        assert in_a_thread(get_job_context) is not job_context
        variables = contextvars.copy_context()
        assert in_a_thread(lambda: variables.run(get_job_context)) is job_context


def test_what_a_thread_sets_is_its_own() -> None:
    in_a_thread(lambda: set_job_context(LocalJobContext()))
    assert get_job_context() is in_a_thread(get_job_context)


def test_asyncio_tasks_inherit_what_is_set() -> None:
    job_context = LocalJobContext()

    async def inner() -> JobContext:
        return get_job_context()

    async def outer() -> JobContext:
        set_job_context(job_context)
        return await asyncio.create_task(inner())

    assert asyncio.run(outer()) is job_context
    assert get_job_context() is not job_context


def test_what_a_task_sets_is_its_own() -> None:
    job_context = LocalJobContext()
    job_context.get(job_context.create_task(set_job_context, (LocalJobContext(),)))
    assert job_context.get(job_context.create_task(get_job_context)) is job_context


# What is found otherwise


def test_without_anything_it_is_one_local_context_for_the_process() -> None:
    job_context = get_job_context()
    assert type(job_context) is LocalJobContext
    assert get_job_context() is job_context
    assert in_a_thread(get_job_context) is job_context


def test_threads_that_ask_at_once_get_one_context() -> None:
    program = (
        "import threading\n"
        "from fray.context import get_job_context\n"
        "barrier, found = threading.Barrier(50), []\n"
        "def ask():\n"
        "    barrier.wait()\n"
        "    found.append(get_job_context())\n"
        "threads = [threading.Thread(target=ask) for _ in range(50)]\n"
        "[thread.start() for thread in threads]\n"
        "[thread.join() for thread in threads]\n"
        "print(len(found), len(set(map(id, found))))\n"
    )
    assert run(program) == "50 1\n"


def test_the_local_one_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    without = get_job_context()
    monkeypatch.setenv("FRAY_JOB_CONTEXT", "local")
    assert get_job_context() is without


def test_what_is_set_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRAY_JOB_CONTEXT", "there-is-none")
    with use_job_context(LocalJobContext()) as job_context:
        assert get_job_context() is job_context


def test_a_name_that_is_not_installed_is_an_error() -> None:
    program = (
        "import fray\n"
        "try:\n"
        "    fray.get_job_context()\n"
        "except fray.UsageError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    assert "BackendNotFoundError no job context is named 'there-is-none'" in run(program, name="there-is-none")


# Installed ones: real distributions on a real path, seen by a real process.

PLUGIN = """
from fray import LocalJobContext

class Context(LocalJobContext):
    made = 0
    def __init__(self):
        type(self).made += 1
        super().__init__()

class First(Context):
    @classmethod
    def detect(cls):
        import sys
        return "engine" in sys.modules

class Second(Context):
    @classmethod
    def detect(cls):
        return True

class Faulty(Context):
    @classmethod
    def detect(cls):
        raise RuntimeError("detect is broken")
"""

REPORT = """
import fray, sys, types
first = fray.get_job_context()
assert fray.get_job_context() is first
print(type(first).__name__, getattr(first, "made", "-"))
sys.modules["engine"] = types.ModuleType("engine")
print(type(fray.get_job_context()).__name__)
"""


def install(directory: Path, **contexts: str) -> Path:
    """Make a distribution of job contexts, as an installer would leave it."""
    (directory / "plugin.py").write_text(PLUGIN)
    (directory / "unloadable.py").write_text("raise ImportError('no engine here')\n")
    metadata = directory / "plugin-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    entries = "".join(f"{name} = {target}\n" for name, target in contexts.items())
    (metadata / "entry_points.txt").write_text(f"[fray.job_contexts]\n{entries}")
    return directory


def run(program: str, path: Path | None = None, name: str | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "FRAY_JOB_CONTEXT"}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    if name is not None:
        environment["FRAY_JOB_CONTEXT"] = name
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_the_environment_names_the_context(tmp_path: Path) -> None:
    path = install(tmp_path, a="plugin:Second", b="plugin:First")
    assert run(REPORT, path, name="b") == "First 1\nFirst\n"


def test_one_that_detects_its_engine_is_found(tmp_path: Path) -> None:
    path = install(tmp_path, mine="plugin:Second")
    assert run(REPORT, path) == "Second 1\nSecond\n"


def test_one_that_does_not_is_passed_over_until_it_does(tmp_path: Path) -> None:
    path = install(tmp_path, mine="plugin:First")
    assert run(REPORT, path) == "LocalJobContext -\nFirst\n"


def test_they_are_asked_in_name_order(tmp_path: Path) -> None:
    path = install(tmp_path, b="plugin:Second", a="plugin:First")
    assert run(REPORT, path) == "Second 1\nFirst\n"


def test_a_broken_one_hides_no_other(tmp_path: Path) -> None:
    path = install(tmp_path, a="unloadable:Context", b="plugin:Faulty", c="plugin:nothing", d="plugin:Second")
    assert run(REPORT, path) == "Second 1\nSecond\n"


def test_importing_it_loads_nothing_heavy() -> None:
    program = (
        "import sys\n"
        "import fray.context\n"
        "heavy = {'importlib.metadata', 'concurrent.futures', 'difflib', 'pydantic', 'typer', 'rich', 'asyncio'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    assert run(program) == "[]\n"
