"""Commands on the workers of a slice, by OpenSSH's own client.

`ssh_command` is the command line for one worker; `run_on_workers` runs a command on all of them at once. The first that
fails stops the others, and whoever leaves (an interrupt, a time limit, a lost connection) takes the remote commands
along, for the far side watches the connection.

The host keys are kept in a file of Fray's own, under an alias that the caller makes of the slice: Google gives the
address of a deleted TPU VM to somebody else's next, and the user's `known_hosts` would cry wolf for it.
"""

from __future__ import annotations

import os
import re
import selectors
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from fray.errors import ConnectionFailedError, InvalidTypeError, InvalidValueError

__all__ = ["SshOptions", "Worker", "WorkerEnd", "WorkerLine", "run_on_workers", "ssh_command"]

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[?[0-9A-Fa-f:]*:[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]?")
_USER = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*\$?")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_LONGEST_LINE_BYTES = 64 * 1024
# The far side says these on standard error, since ssh's exit code does not tell its own failure from the command's:
# what comes before the first is ssh's, and without the second the connection was lost.
_STARTED = b"\x1efray: started\x1e"
_ENDED = re.compile(rb"(.*)\x1efray: ended (\d+)\x1e", re.DOTALL)

# The command gets a session of its own. When the connection's input ends, for whatever reason, all of that session is
# stopped: ssh would leave it running. `cat` reads descriptor 3, since a shell gives its background jobs no input. The
# signal tells the shell, whose `wait` it interrupts, that it is not over before the whole session is.
_FAR_SIDE = """\
printf '\\036fray: started\\036\\n' >&2
is_stopped=
trap 'is_stopped=yes' USR1
exec 3<&0
setsid "${SHELL:-/bin/sh}" -c "$1" </dev/null 3<&- &
job=$!
(
    cat <&3
    kill -s USR1 "$$"
    kill -s TERM -- "-$job"
    tenths=$(($2 * 10))
    while [ "$tenths" -gt 0 ] && kill -s 0 -- "-$job"; do
        sleep 0.1
        tenths=$((tenths - 1))
    done
    kill -s KILL -- "-$job"
) >/dev/null 2>&1 &
watch=$!
exec 3<&-
while :; do
    wait "$job"
    code=$?
    kill -s 0 "$job" 2>/dev/null || break
done
if [ -n "$is_stopped" ]; then
    wait "$watch"
else
    kill "$watch"
fi 2>/dev/null
printf '\\036fray: ended %s\\036\\n' "$code" >&2
exit "$code"
"""


@dataclass(frozen=True)
class Worker:
    """Where one TPU VM of a slice is reached.

    Attributes:
        rank: Its number, which stands before each line of its output.
        host: A name or an address.
        port: Of its SSH server.
        host_key_alias: The name that its key is kept under; the host itself where None.
    """

    rank: int
    host: str
    port: int = 22
    host_key_alias: str | None = None

    def __post_init__(self) -> None:
        _check_integer("rank", self.rank, 0, None)
        _check_integer("port", self.port, 1, 65535)
        _check_text("host", self.host, _HOST)
        if self.host_key_alias is not None:
            _check_text("host_key_alias", self.host_key_alias, _ALIAS)


@dataclass(frozen=True)
class SshOptions:
    """How workers are reached.

    Attributes:
        user: The user there; ssh's own choice where None.
        identity_file: A private key; ssh's own choice (agent, default keys) where None.
        known_hosts: The file of host keys. A host that is not in it is believed and kept; one whose key changed is not.
        connect_timeout_seconds: For each worker.
        grace_seconds: Between SIGTERM and SIGKILL of a command that is stopped.
        program: The client, with options of its own if need be.
    """

    user: str | None = None
    identity_file: Path | None = None
    known_hosts: Path | None = None
    connect_timeout_seconds: int = 20
    grace_seconds: int = 10
    program: tuple[str, ...] = ("ssh",)

    def __post_init__(self) -> None:
        if self.user is not None:
            _check_text("user", self.user, _USER)
        _check_integer("connect_timeout_seconds", self.connect_timeout_seconds, 1, 3600)
        _check_integer("grace_seconds", self.grace_seconds, 0, 3600)
        for what, path in (("identity_file", self.identity_file), ("known_hosts", self.known_hosts)):
            # ssh splits an option's value at blanks, and takes a quotation mark for one.
            if path is not None and re.search(r'[\x00-\x1f"]', str(path)):
                raise InvalidValueError(f"{what} cannot be {str(path)!r}: ssh reads no such path")
        if self.identity_file is not None and not self.identity_file.is_file():
            raise InvalidValueError(f"there is no key {self.identity_file}")
        if not self.program:
            raise InvalidValueError("program cannot be empty")


@dataclass(frozen=True)
class WorkerLine:
    """A line that a worker's command printed, without its newline."""

    rank: int
    content: bytes
    is_error: bool


@dataclass(frozen=True)
class WorkerEnd:
    """How the command ended on a worker.

    Attributes:
        rank: The worker's.
        exit_code: The command's, 128 + n where signal n ended it; None where the worker was not reached or the
            connection was lost.
        was_stopped: Whether it was stopped here, because another failed or the time was over.
        message: What ssh said, where `exit_code` is None.
    """

    rank: int
    exit_code: int | None
    was_stopped: bool = False
    message: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether this is an end of its own that is no success."""
        return self.exit_code != 0 and not self.was_stopped


def ssh_command(
    worker: Worker, command: str | Sequence[str] | None = None, options: SshOptions | None = None, *, batch: bool = True
) -> list[str]:
    """Return the command line that runs a command on a worker, or opens a shell there.

    Args:
        worker: Which.
        command: A shell command as it stands, or words that are quoted for a shell; None for a login shell.
        options: How it is reached.
        batch: Never ask the user for anything: a password, a passphrase, whether a key is right.
    """
    options = options or SshOptions()
    line = [*options.program]
    settings = {
        "BatchMode": "yes" if batch else "no",
        "ConnectTimeout": str(options.connect_timeout_seconds),
        "StrictHostKeyChecking": "accept-new",
        # A worker that is gone is noticed within a minute, not by a TCP timeout.
        "ServerAliveInterval": "15",
        "ServerAliveCountMax": "3",
        "LogLevel": "ERROR",
    }
    if options.known_hosts is not None:
        settings["UserKnownHostsFile"] = f'"{options.known_hosts}"'
        settings["HashKnownHosts"] = "no"
    if worker.host_key_alias is not None:
        settings["HostKeyAlias"] = worker.host_key_alias
        settings["CheckHostIP"] = "no"
    if options.identity_file is not None:
        settings["IdentitiesOnly"] = "yes"
        line += ["-i", str(options.identity_file)]
    for name, value in settings.items():
        line += ["-o", f"{name}={value}"]
    if worker.port != 22:
        line += ["-p", str(worker.port)]
    if options.user is not None:
        line += ["-l", options.user]
    line += ["--", worker.host.strip("[]")]
    if command is not None:
        line.append(_as_shell(command))
    return line


def run_on_workers(
    workers: Sequence[Worker],
    command: str | Sequence[str],
    options: SshOptions | None = None,
    *,
    timeout_seconds: float | None = None,
    on_line: Callable[[WorkerLine], None] = lambda line: None,
    may_go_on: bool = False,
) -> list[WorkerEnd]:
    """Run a command on every worker at once, and return how it ended on each, by rank.

    Args:
        workers: All of them; each rank once.
        command: A shell command as it stands, or words that are quoted for a shell.
        options: How they are reached.
        timeout_seconds: For all of it; what still runs then is stopped, and said to be.
        on_line: Called with each line as it comes; a longer one than 64 KiB comes in parts.
        may_go_on: Let the others go on when one fails.

    Raises:
        InvalidValueError: Something cannot be right; nothing was run.
        ConnectionFailedError: There is no ssh here.
    """
    options = options or SshOptions()
    text = _as_shell(command)
    if not workers:
        raise InvalidValueError("there are no workers to run the command on")
    ranks = [worker.rank for worker in workers]
    if twice := sorted({rank for rank in ranks if ranks.count(rank) > 1}):
        raise InvalidValueError(f"there are several workers of rank {twice[0]}")
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise InvalidValueError(f"timeout_seconds is above 0, not {timeout_seconds}")
    far_side = shlex.join(["exec", "/bin/sh", "-c", _FAR_SIDE, "fray", text, str(options.grace_seconds)])
    with _Gang(options, on_line, may_go_on) as gang:
        for worker in sorted(workers, key=lambda worker: worker.rank):
            gang.start(worker, ssh_command(worker, far_side, options))
        gang.follow(timeout_seconds)
        return gang.ends()


@dataclass(eq=False)
class _Run:
    """One ssh process."""

    rank: int
    process: subprocess.Popen[bytes]
    # What has come of each stream and is no whole line yet.
    rests: dict[bool, bytes] = field(default_factory=lambda: {False: b"", True: b""})
    open_streams: int = 2
    has_started: bool = False
    is_stopping: bool = False
    # What ssh said before the command started.
    said: list[str] = field(default_factory=list)
    command_exit_code: int | None = None
    is_over: bool = False

    def end(self) -> WorkerEnd:
        if self.command_exit_code is not None:
            return WorkerEnd(self.rank, self.command_exit_code, self.is_stopping)
        if self.has_started:
            return WorkerEnd(self.rank, None, self.is_stopping, "the connection was lost")
        said = " ".join(self.said) or f"ssh ended with {self.process.returncode} and said nothing"
        return WorkerEnd(self.rank, None, self.is_stopping, said)


class _Gang:
    """The ssh processes of one command; none of them outlives it."""

    def __init__(self, options: SshOptions, on_line: Callable[[WorkerLine], None], may_go_on: bool) -> None:
        self._options = options
        self._on_line = on_line
        self._may_go_on = may_go_on
        self._runs: list[_Run] = []
        self._selector = selectors.DefaultSelector()
        self._give_up: float | None = None

    def __enter__(self) -> _Gang:
        return self

    def __exit__(self, *error: object) -> None:
        # After an interrupt, or an error of `on_line`: the far sides see their input end, and stop.
        if any(not run.is_over for run in self._runs):
            self._stop()
            with suppress(KeyboardInterrupt):
                self._pump(None)
        for run in self._runs:
            if not run.is_over:
                run.process.kill()
                run.process.wait()
            for stream in (run.process.stdin, run.process.stdout, run.process.stderr):
                if stream is not None:
                    stream.close()
        self._selector.close()

    def start(self, worker: Worker, line: list[str]) -> None:
        try:
            process = subprocess.Popen(
                line,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # Ctrl-C is for this process to act on: were ssh to get it, what the command still says would be lost.
                start_new_session=True,
            )
        except FileNotFoundError as error:
            raise ConnectionFailedError(
                f"there is no {line[0]} here: install OpenSSH's client (apt install openssh-client)"
            ) from error
        run = _Run(worker.rank, process)
        self._runs.append(run)
        for stream, is_error in ((process.stdout, False), (process.stderr, True)):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ, (run, is_error))

    def follow(self, timeout_seconds: float | None) -> None:
        """Wait for all ends; when the time is over, stop what still runs."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        if not self._pump(deadline):
            self._stop()
            self._pump(None)

    def ends(self) -> list[WorkerEnd]:
        return [run.end() for run in self._runs]

    def _pump(self, deadline: float | None) -> bool:
        """Pass lines on until all have ended; False where the deadline came first."""
        while self._selector.get_map():
            limits = [limit for limit in (deadline, self._give_up) if limit is not None]
            pause = max(0.0, min(limits) - time.monotonic()) if limits else None
            for key, _ in self._selector.select(pause):
                run, is_error = key.data
                self._read(run, key.fileobj, is_error)
            now = time.monotonic()
            if self._give_up is not None and now >= self._give_up:
                self._give_up = None
                for run in self._runs:
                    if not run.is_over:
                        run.process.kill()
            if deadline is not None and now >= deadline and self._selector.get_map():
                return False
        return True

    def _read(self, run: _Run, stream: Any, is_error: bool) -> None:
        try:
            chunk = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return
        run.rests[is_error] += chunk
        for line in _lines(run, is_error, at_end=not chunk):
            self._pass_on(run, line, is_error)
        if not chunk:
            self._selector.unregister(stream)
            run.open_streams -= 1
            if run.open_streams == 0:
                self._ended(run)

    def _pass_on(self, run: _Run, line: bytes, is_error: bool) -> None:
        if is_error and line == _STARTED:
            run.has_started = True
        elif is_error and not run.has_started:
            run.said.append(line.decode(errors="replace").strip())
        elif is_error and (ended := _ENDED.fullmatch(line)):
            run.command_exit_code = int(ended[2])
            if ended[1]:
                self._on_line(WorkerLine(run.rank, ended[1], is_error))
        else:
            self._on_line(WorkerLine(run.rank, line, is_error))

    def _ended(self, run: _Run) -> None:
        run.process.wait()
        run.is_over = True
        if run.end().has_failed and not self._may_go_on:
            self._stop()

    def _stop(self) -> None:
        for run in self._runs:
            if not run.is_over and not run.is_stopping:
                run.is_stopping = True
                _close(run.process.stdin)
                if not run.has_started:
                    run.process.terminate()  # ssh is still connecting: there is no far side that could see it
        if self._give_up is None:
            # A far side that does not answer any more is left to its own watch.
            self._give_up = time.monotonic() + self._options.grace_seconds + 5


def _lines(run: _Run, is_error: bool, *, at_end: bool) -> Iterator[bytes]:
    *whole, rest = run.rests[is_error].split(b"\n")
    if at_end or len(rest) > _LONGEST_LINE_BYTES:
        whole, rest = [*whole, *([rest] if rest else [])], b""
    run.rests[is_error] = rest
    yield from whole


def _close(stream: IO[bytes] | None) -> None:
    if stream is not None:
        with suppress(OSError):  # ssh has gone already
            stream.close()


def _as_shell(command: str | Sequence[str]) -> str:
    if not isinstance(command, str):
        command = shlex.join(command)
    if not command.strip():
        raise InvalidValueError("the command is empty")
    if "\0" in command:
        raise InvalidValueError("a command cannot have a NUL in it")
    return command


def _check_text(what: str, value: object, pattern: re.Pattern[str]) -> None:
    if not isinstance(value, str):
        raise InvalidTypeError(f"{what} must be a string, got {type(value).__name__}: {value!r}")
    if not pattern.fullmatch(value):
        raise InvalidValueError(f"{what} cannot be {value!r}")


def _check_integer(what: str, value: object, least: int, most: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidTypeError(f"{what} must be an integer, got {type(value).__name__}: {value!r}")
    if value < least or (most is not None and value > most):
        raise InvalidValueError(f"{what} cannot be {value}")
