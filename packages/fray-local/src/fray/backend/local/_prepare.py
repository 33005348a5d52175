"""The process that prepares a job whose command cannot start at once: environment, then admission, then the runner.

It is started detached, holds the job's lock from the start, writes what the job waits for to its journal, and becomes
the runner by exec, so that there is no moment at which nobody supervises the job.
"""

from __future__ import annotations

import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from fray.backend.local._admission import infeasible, wait_for_admission
from fray.backend.local._environments import EnvironmentPlan, build_environment
from fray.detached import leave_caller
from fray.state import write_all
from fray.uv import uv_environment

__all__ = ["Setup", "main"]


class Setup(NamedTuple):
    """What is to be done before a job's command starts; kept in the job's directory. Holds no secret."""

    runner: list[str]
    permit: str
    lock_fd: int
    journal_fd: int
    log_fd: int
    setup_log: str
    not_before: float
    environment: EnvironmentPlan | None
    resources: dict[str, float]
    ticket: str | None
    ticket_fd: int | None

    def write(self, path: Path) -> None:
        """Store it."""
        environment = self.environment._asdict() if self.environment else None
        path.write_text(json.dumps({**self._asdict(), "environment": environment}))

    @classmethod
    def read(cls, descriptor: int) -> Setup:
        """Load it."""
        known = json.loads(_read_all(descriptor))
        environment = known.pop("environment")
        if environment:
            environment = EnvironmentPlan(**{**environment, "overlays": tuple(environment["overlays"])})
        return cls(environment=environment, **known)


class _Ended(Exception):
    """The job is over before its command could start."""

    def __init__(self, reason: str, message: str = "") -> None:
        super().__init__(reason, message)
        self.reason = reason
        self.message = message


class _Preparation:
    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._child: int | None = None

    def run(self) -> None:
        setup = self._setup
        signal.signal(signal.SIGTERM, self._on_stop)
        signal.signal(signal.SIGINT, self._on_stop)
        self._write({"event": "supervised", "pid": os.getpid()})
        try:
            # The client closes this when the job is accepted; one that dies before leaves no permit behind.
            handover = _read_all(0)
            self._check_permit()
            self._check_feasible()
            if setup.environment:
                self._prepare_environment(setup.environment)
            if setup.ticket:
                wait_for_admission(Path(setup.ticket), setup.resources, self._say)
            # From here on a stop is the runner's to handle: it takes these signals when it is ready for them.
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
            self._check_permit()
            self._become_runner(handover)
        except _Ended as end:
            self._end(end.reason, end.message)
        except Exception as error:
            import traceback

            traceback.print_exc()
            self._end("SETUP_FAILED", f"{type(error).__name__}: {error}")

    def _prepare_environment(self, plan: EnvironmentPlan) -> None:
        descriptor = os.open(self._setup.setup_log, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if not build_environment(plan, descriptor, self._say, self._run):
                said = Path(self._setup.setup_log).read_bytes()
                write_all(self._setup.log_fd, said)
                raise _Ended("SETUP_FAILED", f"uv could not install {plan.title}; its output is in the job's log")
        finally:
            os.close(descriptor)

    def _run(self, command: list[str], directory: str, log: int) -> int:
        os.chdir(directory)
        streams = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, log, 1),
            (os.POSIX_SPAWN_DUP2, log, 2),
        ]
        # A group of its own, so that a stop reaches what uv has started too.
        stops = (signal.SIGTERM, signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)  # a stop finds the child known, or not there
        self._child = os.posix_spawn(
            command[0], command, uv_environment(), file_actions=streams, setpgroup=0, setsigmask=()
        )
        signal.pthread_sigmask(signal.SIG_UNBLOCK, stops)
        status = os.waitpid(self._child, 0)[1]
        self._child = None
        os.chdir("/")
        return os.waitstatus_to_exitcode(status)

    def _become_runner(self, handover: bytes) -> None:
        descriptor = os.memfd_create("handover") if hasattr(os, "memfd_create") else -1
        if descriptor >= 0:
            write_all(descriptor, handover)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            descriptor, write_end = os.pipe()
            if os.fork() == 0:
                os.close(descriptor)
                write_all(write_end, handover)
                os._exit(0)
            os.close(write_end)
        os.dup2(descriptor, 0)
        setup = self._setup
        for fd in (setup.lock_fd, setup.journal_fd, setup.log_fd, setup.ticket_fd):
            if fd is not None:
                os.set_inheritable(fd, True)
        os.execv(setup.runner[0], setup.runner)

    def _check_feasible(self) -> None:
        if message := infeasible(self._setup.resources):
            raise _Ended("INFEASIBLE", message)

    def _check_permit(self) -> None:
        if not Path(self._setup.permit).exists():
            raise _Ended("STOPPED_BY_USER")

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if self._child:
            with suppress(ProcessLookupError, ChildProcessError):  # it has just ended by itself
                os.killpg(self._child, signal.SIGKILL)
                os.waitpid(self._child, 0)
        raise _Ended("STOPPED_BY_USER")

    def _say(self, message: str) -> None:
        with suppress(OSError):  # on a full disk: it says less, and does the same
            self._write({"event": "pending", "message": message})

    def _end(self, reason: str, message: str) -> None:
        self._write({"event": "ended", "reason": reason, **({"message": message} if message else {})})
        os.fsync(self._setup.journal_fd)

    def _write(self, event: dict[str, object]) -> None:
        """Append an event behind the last one, which is looked up: a stop may have interrupted any statement."""
        journal = self._setup.journal_fd
        line = json.dumps({**event, "time": round(max(time.time(), self._setup.not_before), 6)}).encode() + b"\n"
        written = os.pread(journal, os.fstat(journal).st_size, 0).split(b"\0", 1)[0]
        end = len(written)
        last = written.rfind(b"\n", 0, -1) + 1
        if event["event"] == "pending" and b'"event": "pending"' in written[last:]:
            # In place of the last one: the room that was taken for the job's end is not for what it waits for.
            line = line[:-1].ljust(end - last - 1) + b"\n"
            end = last
        os.pwrite(journal, line, end)


def main(descriptor: int) -> None:
    """Prepare the job whose setup can be read from `descriptor` (its path changes when the job is accepted)."""
    setup = Setup.read(descriptor)
    os.close(descriptor)
    leave_caller()
    _Preparation(setup).run()
    os._exit(0)


def _read_all(descriptor: int) -> bytes:
    parts = []
    while part := os.read(descriptor, 1 << 20):
        parts.append(part)
    return b"".join(parts)
