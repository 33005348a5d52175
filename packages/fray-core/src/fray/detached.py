"""Start processes that outlive the one that started them, without leaving zombies to it.

A detached process is one that leaves its starter behind by itself (the runner does so under `--detach`, a backend's
builder by `leave_caller`): what the starter sees is a short-lived child, which is reaped here in passing.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections.abc import Mapping, Sequence

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess

__all__ = ["leave_caller", "program", "reap_launchers", "start_detached"]

# The program sees its starter's own modules, and nothing of a job's environment reaches into it. The packages above its
# module are left empty: their own imports would take longer than most of what such programs do.
_PROGRAM = """
import sys, types
sys.path[:], packages = {}
for name, paths in packages.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = paths
from {} import main
main({})
"""

_launchers: list[subprocess.Popen[bytes]] = []
_lock = allocate_lock()


def program(module: str, *arguments: int) -> list[str]:
    """Return the command line of a program of Fray's: `main(*arguments)` of a module."""
    import sys

    above = module.split(".")[:-1]
    names = [".".join(above[: count + 1]) for count in range(len(above))]
    paths = repr(([each for each in sys.path if each], {name: list(sys.modules[name].__path__) for name in names}))
    code = _PROGRAM.format(paths, module, ", ".join(map(str, arguments)))
    return [sys.executable, "-I", "-S", "-c", code]


def start_detached(
    arguments: Sequence[str], *, environment: Mapping[str, str], keep_fds: Sequence[int] = (), stderr: int
) -> int:
    """Start a program that detaches itself, in a session of its own; return the write end of its standard input.

    Args:
        arguments: The program and its arguments.
        environment: All of its environment.
        keep_fds: File descriptors that it inherits, under the same numbers.
        stderr: A descriptor for what it says of its own trouble; its standard output goes nowhere.

    Raises:
        OSError: The program cannot be started.
    """
    import subprocess  # what has been detached itself (leave_caller) need not pay for it

    reap_launchers()
    process = subprocess.Popen(
        arguments,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        env=environment,
        pass_fds=keep_fds,
        start_new_session=True,
        cwd="/",
    )
    assert process.stdin is not None
    handover = os.dup(process.stdin.fileno())
    process.stdin.close()
    with _lock:
        _launchers.append(process)
    return handover


def reap_launchers() -> None:
    """Reap the launchers that have done their work."""
    with _lock:
        _launchers[:] = [process for process in _launchers if process.poll() is None]


def leave_caller() -> None:
    """Go on as a process that the caller's end does not touch; call it first thing in a detached program."""
    if os.fork():
        os._exit(0)
