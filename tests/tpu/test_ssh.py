"""Commands on every worker, over real SSH servers on loopback."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fray.backend.tpu._ssh import SshOptions, Worker, WorkerEnd, WorkerLine, run_on_workers, ssh_command
from fray.errors import ConnectionFailedError, InvalidTypeError, InvalidValueError

from .sshd import Server, make_key, require_openssh

DEADLINE_SECONDS = 60


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    require_openssh()
    return make_key(tmp_path_factory.mktemp("key") / "id")


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory, key: Path) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        started = []
        for number in range(3):
            server = Server(tmp_path_factory.mktemp("sshd") / str(number), key)
            stack.callback(server.close)
            started.append(server)
        yield started


@pytest.fixture
def options(tmp_path: Path, key: Path) -> SshOptions:
    return SshOptions(identity_file=key, known_hosts=tmp_path / "known hosts", grace_seconds=1)


@pytest.fixture
def workers(servers: list[Server]) -> list[Worker]:
    return [Worker(rank, "127.0.0.1", server.port, f"slice-w{rank}") for rank, server in enumerate(servers)]


class Output:
    """What has come, and a way to wait for something in it."""

    def __init__(self) -> None:
        self.lines: list[WorkerLine] = []
        self._awaited: list[tuple[Callable[[WorkerLine], bool], threading.Event]] = []

    def __call__(self, line: WorkerLine) -> None:
        self.lines.append(line)
        for matches, event in self._awaited:
            if matches(line):
                event.set()

    def when(self, matches: Callable[[WorkerLine], bool], act: Callable[[], object]) -> threading.Thread:
        event = threading.Event()
        self._awaited.append((matches, event))

        def wait() -> None:
            assert event.wait(DEADLINE_SECONDS)
            act()

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        return thread

    def of(self, rank: int, *, is_error: bool = False) -> list[bytes]:
        return [line.content for line in self.lines if line.rank == rank and line.is_error is is_error]


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def test_a_command_runs_on_every_worker_and_its_lines_say_where(workers: list[Worker], options: SshOptions) -> None:
    output = Output()
    command = "echo \"$SSH_CONNECTION\" | cut -d ' ' -f 4; echo to stderr >&2; printf 'no newline'"
    ends = run_on_workers(workers, command, options, on_line=output)
    assert ends == [WorkerEnd(rank, 0) for rank in range(3)]
    for worker in workers:
        assert output.of(worker.rank) == [str(worker.port).encode(), b"no newline"]
        assert output.of(worker.rank, is_error=True) == [b"to stderr"]


def test_words_are_quoted_and_a_text_is_a_shell_command(workers: list[Worker], options: SshOptions) -> None:
    output = Output()
    run_on_workers(workers[:1], ["printf", "%s\n", "two words", "$HOME", "it's"], options, on_line=output)
    run_on_workers(workers[:1], "for i in 1 2; do echo $i; done | tail -n 1", options, on_line=output)
    assert output.of(0) == [b"two words", b"$HOME", b"it's", b"2"]


def test_exact_bytes_come_through_whatever_they_are(workers: list[Worker], options: SshOptions) -> None:
    output = Output()
    program = "import sys; sys.stdout.buffer.write(b'\\xff\\x00\\r\\n' + b'x' * 200_000 + b'\\nend')"
    ends = run_on_workers(workers[:1], [sys.executable, "-c", program], options, on_line=output)
    assert ends == [WorkerEnd(0, 0)]
    assert output.lines[0].content == b"\xff\x00\r"
    assert b"".join(output.of(0)) == b"\xff\x00\r" + b"x" * 200_000 + b"end"


@pytest.mark.parametrize(
    ("command", "code"), [("exit 3", 3), ("exit 255", 255), ("kill -9 $$", 137), ("nonesuch", 127)]
)
def test_the_exit_code_is_the_commands(workers: list[Worker], options: SshOptions, command: str, code: int) -> None:
    assert run_on_workers(workers[:1], command, options) == [WorkerEnd(0, code)]


def test_the_first_failure_stops_the_others_and_their_children(
    tmp_path: Path, workers: list[Worker], options: SshOptions
) -> None:
    gate = fifo(tmp_path / "gate")
    port = workers[1].port
    # The failing one waits until the others have said that they run, with a child each that would not end by itself.
    command = f"""
        case "$SSH_CONNECTION" in
        *" {port}") cat {shlex.quote(str(gate))}; exit 7 ;;
        esac
        trap 'echo got TERM; exit 1' TERM
        {sys.executable} -c 'import signal; signal.pause()' & echo "child $!"; wait
    """
    output = Output()
    seen: set[int] = set()

    def all_run(line: WorkerLine) -> bool:
        seen.add(line.rank)
        return seen == {0, 2}

    opener = output.when(all_run, lambda: gate.write_text("go\n"))
    ends = run_on_workers(workers, command, options, on_line=output)
    opener.join(DEADLINE_SECONDS)
    assert ends == [WorkerEnd(0, 1, was_stopped=True), WorkerEnd(1, 7), WorkerEnd(2, 1, was_stopped=True)]
    for rank in (0, 2):
        assert b"got TERM" in output.of(rank)
        child = int(output.of(rank)[0].split()[1])
        assert _is_dead(child)


def test_one_may_fail_where_the_others_may_go_on(workers: list[Worker], options: SshOptions) -> None:
    command = f'case "$SSH_CONNECTION" in *" {workers[0].port}") exit 7 ;; esac; echo done'
    output = Output()
    ends = run_on_workers(workers, command, options, on_line=output, may_go_on=True)
    assert ends == [WorkerEnd(0, 7), WorkerEnd(1, 0), WorkerEnd(2, 0)]
    assert output.of(2) == [b"done"]


def test_a_worker_that_cannot_be_reached_says_why_and_stops_the_others(
    workers: list[Worker], options: SshOptions
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = Worker(9, "127.0.0.1", closed.getsockname()[1])
        ends = run_on_workers([*workers[:1], gone], "sleep 1000", options)
    assert ends[1].exit_code is None
    assert ends[1].has_failed
    assert "refused" in ends[1].message
    assert ends[0].was_stopped


@pytest.fixture
def stopped(
    tmp_path: Path, workers: list[Worker], options: SshOptions
) -> Callable[[str, bytes], tuple[WorkerEnd, list[bytes]]]:
    """Runs a command on a worker and stops it, by another's failure, when it has said something."""

    def run(command: str, when: bytes) -> tuple[WorkerEnd, list[bytes]]:
        gate = fifo(tmp_path / "gate")
        both = (
            f'case "$SSH_CONNECTION" in *" {workers[1].port}") cat {shlex.quote(str(gate))}; exit 7 ;; esac; {command}'
        )
        output = Output()
        opener = output.when(lambda line: line.content == when, lambda: gate.write_text("go\n"))
        end, other = run_on_workers(workers[:2], both, options, on_line=output)
        opener.join(DEADLINE_SECONDS)
        assert other == WorkerEnd(1, 7)
        return end, output.of(0)

    return run


def test_a_command_that_ignores_being_stopped_is_killed(
    stopped: Callable[[str, bytes], tuple[WorkerEnd, list[bytes]]],
) -> None:
    end, lines = stopped("trap '' TERM; echo $$; echo ready; while :; do sleep 1000; done", b"ready")
    assert end == WorkerEnd(0, 137, was_stopped=True)
    assert _is_dead(int(lines[0]))


def test_a_child_that_outlives_its_parent_is_killed(
    stopped: Callable[[str, bytes], tuple[WorkerEnd, list[bytes]]],
) -> None:
    program = "import signal as s; s.signal(s.SIGTERM, s.SIG_IGN); print('ready', flush=True); s.pause()"
    end, lines = stopped(f"{sys.executable} -c {shlex.quote(program)} & echo $!; wait", b"ready")
    assert end == WorkerEnd(0, 143, was_stopped=True)
    (child,) = [int(line) for line in lines if line != b"ready"]
    assert _is_dead(child)


def test_what_still_runs_when_the_time_is_over_is_stopped(workers: list[Worker], options: SshOptions) -> None:
    (end,) = run_on_workers(workers[:1], "sleep 1000", options, timeout_seconds=0.5)
    assert end.was_stopped


def test_a_lost_connection_is_a_failure_and_the_command_is_stopped(
    tmp_path: Path, key: Path, options: SshOptions
) -> None:
    server = Server(tmp_path / "sshd", key)
    ended = fifo(tmp_path / "ended")
    options = replace(options, grace_seconds=60)  # it ends when it is listened to
    try:
        output = Output()
        cutter = output.when(lambda line: line.content == b"runs", server.end_sessions)
        command = f"trap 'echo ended > {shlex.quote(str(ended))}; exit 1' TERM; echo runs; sleep 1000 & wait"
        (end,) = run_on_workers([Worker(0, "127.0.0.1", server.port)], command, options, on_line=output)
        cutter.join(DEADLINE_SECONDS)
        assert (end.exit_code, end.was_stopped, end.message) == (None, False, "the connection was lost")
        assert ended.read_text() == "ended\n"
    finally:
        server.close()


def test_an_interrupt_stops_the_commands_and_passes_on(tmp_path: Path, workers: list[Worker], key: Path) -> None:
    ended = fifo(tmp_path / "ended")
    command = f"trap 'echo ended > {shlex.quote(str(ended))}; exit 1' TERM; echo runs; sleep 1000 & wait"
    program = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from fray.backend.tpu._ssh import *
        try:
            run_on_workers(
                [Worker(0, "127.0.0.1", {workers[0].port})],
                {command!r},
                SshOptions(identity_file=Path({str(key)!r}), known_hosts=Path({str(tmp_path / "known")!r})),
                on_line=lambda line: print(line.content.decode(), flush=True),
            )
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """)
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runs\n"
        process.send_signal(signal.SIGINT)
        assert ended.read_text() == "ended\n"
        assert process.stdout.read() == "interrupted\n"
        assert process.wait(DEADLINE_SECONDS) == 0


def test_host_keys_are_kept_by_alias_and_another_key_is_refused(
    tmp_path: Path, key: Path, servers: list[Server], workers: list[Worker], options: SshOptions
) -> None:
    assert [end.exit_code for end in run_on_workers(workers, "true", options)] == [0, 0, 0]
    assert options.known_hosts is not None
    kept = {line.split()[0]: line.split()[2] for line in options.known_hosts.read_text().splitlines()}
    assert kept == {f"slice-w{rank}": server.public_key for rank, server in enumerate(servers)}
    impostor = Worker(0, "127.0.0.1", servers[1].port, "slice-w0")
    (end,) = run_on_workers([impostor], "echo never", options)
    assert end.exit_code is None
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in end.message


def test_nobody_is_asked_for_a_password(tmp_path: Path, workers: list[Worker], options: SshOptions) -> None:
    stranger = SshOptions(identity_file=make_key(tmp_path / "other"), known_hosts=options.known_hosts)
    (end,) = run_on_workers(workers[:1], "true", stranger)
    assert end.exit_code is None
    assert "Permission denied" in end.message


def test_a_shell_on_one_worker_is_the_same_ssh(workers: list[Worker], options: SshOptions) -> None:
    done = subprocess.run(
        ssh_command(workers[0], None, options), input="echo $((6 * 7))\n", capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("42\n", 0)
    done = subprocess.run(ssh_command(workers[0], "exit 5", options), stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: Worker(0, "-oProxyCommand=touch /tmp/x"),
        lambda: Worker(0, "host name"),
        lambda: Worker(0, "a\nb"),
        lambda: Worker(0, ""),
        lambda: Worker(0, "h", 0),
        lambda: Worker(0, "h", 65536),
        lambda: Worker(-1, "h"),
        lambda: Worker(0, "h", 22, "-x"),
        lambda: SshOptions(user="-l"),
        lambda: SshOptions(user="a b"),
        lambda: SshOptions(identity_file=Path("/no/such/key")),
        lambda: SshOptions(known_hosts=Path('a"b')),
        lambda: SshOptions(connect_timeout_seconds=0),
        lambda: SshOptions(program=()),
        lambda: ssh_command(Worker(0, "h"), " "),
        lambda: ssh_command(Worker(0, "h"), "a\0b"),
        lambda: run_on_workers([], "true"),
        lambda: run_on_workers([Worker(0, "h"), Worker(0, "g")], "true"),
        lambda: run_on_workers([Worker(0, "h")], "true", timeout_seconds=0),
        lambda: run_on_workers([Worker(0, "h")], []),
    ],
)
def test_what_cannot_be_right_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidValueError):
        make()


def test_what_is_of_the_wrong_type_is_refused() -> None:
    for make in (
        lambda: Worker("0", "h"),  # type: ignore[arg-type]
        lambda: Worker(0, None),  # type: ignore[arg-type]
        lambda: Worker(0, "h", True),
    ):
        with pytest.raises(InvalidTypeError):
            make()


def test_a_machine_without_ssh_is_told_what_to_install() -> None:
    with pytest.raises(ConnectionFailedError, match="openssh-client"):
        run_on_workers([Worker(0, "h")], "true", SshOptions(program=("no-such-ssh-here",)))


def _is_dead(pid: int) -> bool:
    """Whether a process has ended and only waits to be asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
