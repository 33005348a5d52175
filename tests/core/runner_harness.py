"""Start a runner as a backend does, and watch it from outside: its arguments, its journal, its output, its end.

`RUNNERS` is the one list of what is tested: a runner in another language joins it and passes the same tests. Nothing
here or in the tests knows how a runner works, only what `fray._runner` documents, and for `ENGINE_RUNNERS` what
packages/fray-docker/runner does.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import json
import os
import platform
import py_compile
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fray.supervision import runner_source

DEADLINE_SECONDS = 60.0
ISOLATED = ("-I", "-S")


@dataclass(frozen=True)
class Runner:
    """A runner under test.

    Attributes:
        name: What the tests call it.
        argv: Returns what its options are appended to; may write to the directory that it is given.
        is_python: Whether an interpreter runs it, which has flags and imports.
    """

    name: str
    argv: Callable[[Path], list[str]]
    is_python: bool = True


@dataclass(frozen=True)
class Setting:
    """A runner, and where it runs: as a process among others, or as PID 1 of a namespace of its own."""

    runner: Runner
    is_init: bool = False

    def __str__(self) -> str:
        return f"{self.runner.name}-{'init' if self.is_init else 'child'}"


def _from_source(python: str) -> Callable[[Path], list[str]]:
    return lambda _: [python, *ISOLATED, str(runner_source())]


def _compiled(directory: Path) -> list[str]:
    compiled = py_compile.compile(str(runner_source()), cfile=str(directory / "runner.pyc"), doraise=True)
    return [sys.executable, *ISOLATED, str(compiled)]


def _static() -> list[Runner]:
    """The runner for images without Python, where there is one for this machine.

    `FRAY_TEST_STATIC_RUNNER` names another build of it to be tested.
    """
    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    binaries = Path(__file__).parents[2] / "packages/fray-docker/src/fray/backend/docker/runner"
    path = os.environ.get("FRAY_TEST_STATIC_RUNNER") or str(binaries / f"fray-runner-{architecture}")
    return [Runner("static", lambda _: [path], is_python=False)] if architecture else []


def _other_interpreters() -> dict[str, str]:
    """The other Pythons from 3.8 on that are installed here: one path for each version."""
    found: dict[str, str] = {}
    for minor in range(8, 15):
        version = f"3.{minor}"
        if minor == sys.version_info.minor:
            continue
        installed = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python{version}")))
        on_path = [f"{folder}/python{version}" for folder in os.get_exec_path()]
        for candidate in [*installed, *on_path]:
            if os.access(candidate, os.X_OK) and _is_python(candidate, (3, minor)):
                found[version] = candidate
                break
    return found


def _is_python(path: str, version: tuple[int, int]) -> bool:
    # A version manager's shim of that name may stand for no interpreter at all.
    said = subprocess.run([path, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True)
    return said.stdout.split() == [str(number) for number in version]


# Those that can frame their output for an engine's log.
ENGINE_RUNNERS = _static()
# The whole suite runs on these.
RUNNERS = [Runner("source", _from_source(sys.executable)), *ENGINE_RUNNERS]
# And the essential tests on these too.
MORE_RUNNERS = [
    Runner("pyc", _compiled),
    *(Runner(f"python{version}", _from_source(path)) for version, path in _other_interpreters().items()),
]


@functools.cache
def own_pid_namespace() -> tuple[str, ...]:
    """The command that makes what follows it PID 1 of a namespace; empty where the machine does not allow it."""
    for command in (
        ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc"),
        ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ):
        try:
            probe = subprocess.run([*command, "sh", "-c", "echo $$; ls /proc"], capture_output=True, text=True)
        except FileNotFoundError:
            break
        if probe.returncode == 0 and probe.stdout.startswith("1\n"):
            return command
    return ()


def settings(runners: Sequence[Runner]) -> list[Setting]:
    """Each runner as a child, and as PID 1 too where the machine lets it."""
    places = (False, True) if own_pid_namespace() else (False,)
    return [Setting(runner, is_init) for runner in runners for is_init in places]


def until(condition: Callable[[], Any], what: str) -> Any:
    """Poll until the condition holds; return what it gave."""
    give_up = time.monotonic() + DEADLINE_SECONDS
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > give_up:
            raise AssertionError(f"waited {DEADLINE_SECONDS:g} s in vain: {what}")
        time.sleep(0.005)


def parse_journal(content: bytes) -> list[dict[str, Any]]:
    """The events of a journal: the whole lines before the first NUL."""
    text = content.split(b"\0", 1)[0]
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def handover(secrets: Mapping[str, str]) -> bytes:
    """What goes to a runner's standard input under `--handover stdin`."""
    pairs = b"".join(f"{name}={value}".encode() + b"\0" for name, value in secrets.items())
    return b"%d\n%s" % (len(pairs), pairs)


def environment_of(pid: int) -> list[bytes]:
    """A live process's environment; empty for one that is gone."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] == b"Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class Job:
    """A runner that was started, in a directory of its own. A context manager that leaves no process behind.

    Every process of it carries `marker` in its environment, by which it is found wherever it went. Commands find the
    directory in `$HERE`.
    """

    def __init__(
        self,
        setting: Setting,
        directory: Path,
        options: Sequence[str],
        *,
        flags: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
    ) -> None:
        self.directory = directory
        self.is_init = setting.is_init
        self.marker = f"FRAY_TEST_MARKER={uuid.uuid4().hex}"
        name, _, value = self.marker.partition("=")
        interpreter, *rest = setting.runner.argv(directory)
        namespace = own_pid_namespace() if setting.is_init else ()
        self.stderr_path = directory / "stderr"
        with self.stderr_path.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*namespace, *wrapper, interpreter, *flags, *rest, *options],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                env={**os.environ, "HERE": str(directory), **(environment or {}), name: value},
                pass_fds=pass_fds,
                cwd=directory,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        give_up = time.monotonic() + DEADLINE_SECONDS
        while left := [*self.processes(), *([self.process.pid] if self.process.poll() is None else [])]:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < give_up, f"cannot be killed: {left}"
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    @property
    def journal(self) -> bytes:
        try:
            return (self.directory / "journal").read_bytes()
        except FileNotFoundError:
            return b""

    @property
    def output(self) -> bytes:
        try:
            return (self.directory / "output").read_bytes()
        except FileNotFoundError:
            return b""

    @property
    def said(self) -> str:
        """What the runner itself wrote to its standard error."""
        return self.stderr_path.read_text()

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        return [event for event in parse_journal(self.journal) if name is None or event["event"] == name]

    def event(self, name: str, count: int = 1) -> dict[str, Any]:
        """Wait for the journal to have `count` such events; return the last of these."""

        def found() -> bool:
            if len(self.events(name)) >= count:
                return True
            # Only while it lives can it come: a dead runner need not be waited for.
            assert self.process.poll() in (None, 0), f"the runner failed: {self.said}"
            return False

        until(found, f"the event {name!r}")
        return self.events(name)[count - 1]

    def wait_for_output(self, text: bytes, count: int = 1) -> None:
        until(lambda: self.output.count(text) >= count, f"{text!r} in the output")

    def release(self, name: str = "release") -> None:
        """Let those go on that wait for this file."""
        (self.directory / name).touch()

    @property
    def runner_pid(self) -> int:
        """The runner's process id as seen from here; it has its signal handlers once this is known."""
        pid = int(self.event("supervised")["pid"])
        return children_of(self.process.pid)[0] if self.is_init else pid

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.runner_pid, number)

    def wait(self) -> dict[str, Any]:
        """Wait for the runner's own end; check what holds for every job, and return the `ended` event."""
        assert self.process.wait(DEADLINE_SECONDS) == 0, self.said
        assert self.processes() == [], "outlived the runner"
        return self.ended()

    def ended(self) -> dict[str, Any]:
        """Wait for the end in the journal, check what holds for every journal, and return its `ended` event."""
        self.event("ended")
        events = self.events()
        names = [event["event"] for event in events]
        assert names.count("ended") == 1
        assert names[-1] == "ended"
        assert names[0] == "supervised"
        times = [event["time"] for event in events]
        assert times == sorted(times)
        attempts = [event["attempt"] for event in events if event["event"] == "started"]
        assert attempts == list(range(1, len(attempts) + 1))
        assert [event["attempt"] for event in events if event["event"] == "exited"] == attempts
        return events[-1]

    def processes(self, role: str | None = None) -> list[int]:
        """The live processes that came of this job, the runner's own included, or those with `ROLE=role`."""
        wanted = {self.marker.encode()} | ({f"ROLE={role}".encode()} if role else set())
        return [
            int(entry)
            for entry in os.listdir("/proc")
            if entry.isdigit() and wanted <= set(environment_of(int(entry))) and not is_zombie(int(entry))
        ]

    def members(self) -> list[int]:
        """The live processes of the command: all but the runner and its guard."""
        supervised = self.event("supervised")
        own = {supervised["pid"], supervised.get("guard"), self.process.pid}
        if self.is_init:
            own.update(children_of(self.process.pid))
        return [pid for pid in self.processes() if pid not in own]


class Starter:
    """Starts jobs in one setting, each in a directory of its own, and cleans up after them."""

    def __init__(self, setting: Setting, directory: Path) -> None:
        self.setting = setting
        self._directory = directory
        self._jobs = contextlib.ExitStack()
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.close()

    @property
    def is_init(self) -> bool:
        return self.setting.is_init

    def new_directory(self) -> Path:
        self._count += 1
        directory = self._directory / f"job{self._count}"
        directory.mkdir()
        return directory

    def __call__(
        self,
        command: str | None,
        *,
        directory: Path | None = None,
        more: Sequence[str] = (),
        flags: Sequence[str] = (),
        wrapper: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        **options: object,
    ) -> Job:
        """Start a runner.

        Args:
            command: What it is to run; the arguments end without one where this is None.
            directory: Where the journal and the output are, and where the runner is started; a new one by default.
            more: Arguments before the options.
            flags: Arguments for the interpreter.
            wrapper: What starts the runner, inside of its namespace.
            environment: Variables to add.
            pass_fds: Descriptors that the runner inherits.
            stdin: As in `subprocess`.
            stdout: As in `subprocess`.
            options: The runner's options, with underscores; None leaves out one of the defaults.
        """
        directory = directory or self.new_directory()
        values: dict[str, object] = {"journal": directory / "journal", "output": directory / "output", **options}
        arguments = [*more]
        for name, value in values.items():
            if value is not None:
                arguments += [f"--{name.replace('_', '-')}", str(value)]
        if command is not None:
            arguments += ["--", command]
        job = Job(
            self.setting,
            directory,
            arguments,
            flags=flags,
            wrapper=wrapper,
            environment=environment,
            pass_fds=pass_fds,
            stdin=stdin,
            stdout=stdout,
        )
        return self._jobs.enter_context(job)


@contextlib.contextmanager
def packet_pipe() -> Iterator[tuple[int, int]]:
    """A pipe in which each write stays one packet: what is read at once was written at once."""
    read_end, write_end = os.pipe2(os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield read_end, write_end
    finally:
        os.close(read_end)
        os.close(write_end)


def read_packet(fd: int) -> bytes:
    """One packet; nothing once there is none, within the deadline."""
    ready, _, _ = select.select([fd], [], [], DEADLINE_SECONDS)
    assert ready, "no event came"
    return os.read(fd, 1 << 16)
