"""What fray-docker's runner has beyond `fray._runner`: output and events in one stream, for an engine's log."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import pytest
from hypothesis import given, strategies
from hypothesis import settings as hypothesis_settings

from tests.core.runner_harness import (
    DEADLINE_SECONDS,
    ENGINE_RUNNERS,
    Job,
    Setting,
    Starter,
    children_of,
    environment_of,
    handover,
    own_pid_namespace,
    settings,
    until,
)
from tests.requirements import missing

pytestmark = pytest.mark.skipif(not ENGINE_RUNNERS, reason="no static runner for this machine")

AS_CHILD = pytest.mark.parametrize("start", [Setting(runner) for runner in ENGINE_RUNNERS], indirect=True, ids=str)
AS_INIT = pytest.mark.parametrize("start", [Setting(runner, True) for runner in ENGINE_RUNNERS], indirect=True, ids=str)

RS = b"\x1e"
LONGEST_LINE = 15_872
PIPE_SIZE = os.sysconf("SC_PAGE_SIZE")
MARK_FRAMES, MARK_BYTES = 1024, 256 * 1024
ENGINE_STOPPED = "the engine stopped the container (docker stop, or the engine was shut down)"
FOREVER = "while :; do sleep 0.05; done"


def waiting_for(name: str) -> str:
    """Shell: wait for what `Job.release` makes."""
    return f'while [ ! -e "$HERE/{name}" ]; do sleep 0.02; done'


WAIT = waiting_for("release")


class Decoded:
    """A framed stream, taken apart and checked; of a stream that goes on, its whole lines."""

    def __init__(self, log: bytes) -> None:
        self.events: list[dict[str, Any]] = []
        parts: list[bytes] = []
        size = frames = since_event = 0
        log = log[: log.rfind(b"\n") + 1]
        for line in log.split(b"\n")[:-1]:
            assert len(line) < LONGEST_LINE
            if line.startswith(RS + b"{"):
                event = json.loads(line[1:])
                assert event["offset"] == size, event
                self.events.append(event)
                frames = since_event = 0
                continue
            assert frames < MARK_FRAMES, "too many frames without an event"
            assert since_event < MARK_BYTES, "too much output without an event"
            part = _output_of(line)
            parts.append(part)
            size += len(part)
            frames += 1
            since_event += len(part)
        log.decode()
        self.output = b"".join(parts)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]


def _output_of(line: bytes) -> bytes:
    if not line.startswith(RS):
        return line + b"\n"
    assert line[1:2] in (b"+", b"-"), line
    text = re.sub(
        rb"\\(\\|x([0-9a-f]{2})|)",
        lambda found: bytes.fromhex(found[2].decode()) if found[2] else found[1],
        line[2:],
    )
    return text + b"\n" if line[1:2] == b"+" else text


class Framed:
    """A job whose output is framed, and its engine's side: reads only when it is asked to."""

    def __init__(self, job: Job, fd: int | None = None) -> None:
        self.job = job
        self.log = b""
        if fd is None:
            assert job.process.stdout
            fd = job.process.stdout.fileno()
        self._fd = fd
        os.set_blocking(self._fd, False)

    def pull(self) -> Decoded:
        """Read what is there now: once, or a busy job would be followed to its end."""
        with contextlib.suppress(BlockingIOError):
            self.log += os.read(self._fd, 1 << 20)
        return Decoded(self.log)

    def event(self, name: str, count: int = 1) -> dict[str, Any]:
        until(lambda: len(self.pull().named(name)) >= count, f"the event {name!r}")
        return Decoded(self.log).named(name)[count - 1]

    def wait_for_output(self, text: bytes) -> None:
        until(lambda: text in self.pull().output, f"{text!r} in the output")

    @property
    def runner_pid(self) -> int:
        pid = int(self.event("supervised")["pid"])
        return children_of(self.job.process.pid)[0] if self.job.is_init else pid

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        os.kill(self.runner_pid, number)

    def finish(self) -> tuple[Decoded, dict[str, Any], int]:
        """Read to the end; return all of it, the `ended` event, and the process's exit code."""
        parts = [self.log]
        os.set_blocking(self._fd, True)
        while part := os.read(self._fd, 1 << 20):
            parts.append(part)
        self.log = b"".join(parts)
        decoded = Decoded(self.log)
        assert self.log.endswith(b"\n")
        assert [event["event"] for event in decoded.events].count("ended") == 1
        ended = decoded.events[-1]
        assert ended["event"] == "ended"
        assert self.log.rfind(RS + b"{") == self.log[:-1].rfind(b"\n") + 1, "something came behind the end"
        assert ended.get("log_size", 0) == len(decoded.output)
        code = self.job.process.wait(DEADLINE_SECONDS)
        assert self.job.processes() == [], "outlived the runner"
        return decoded, ended, code


def _smallest_pipe() -> tuple[int, int]:
    read_end, write_end = os.pipe()
    assert fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_SIZE) == PIPE_SIZE
    return read_end, write_end


def _unread(fd: int) -> int:
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


@pytest.fixture(params=settings(ENGINE_RUNNERS), ids=str)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Starter]:
    with Starter(request.param, tmp_path) as starter:
        yield starter


def begin(start: Starter, command: str, **options: Any) -> Framed:
    return Framed(start(command, journal=None, output="frames:1", stdout=subprocess.PIPE, **options))


def output_of_file(start: Starter, data: bytes) -> tuple[bytes, Decoded]:
    """What becomes of some output; the log as it is, and decoded."""
    directory = start.new_directory()
    (directory / "data").write_bytes(data)
    framed = begin(start, 'cat "$HERE/data"', directory=directory)
    decoded, _, _ = framed.finish()
    assert decoded.output == data
    return framed.log, decoded


def frames_in(log: bytes) -> list[bytes]:
    return [line for line in log.split(b"\n")[:-1] if not line.startswith(RS + b"{")]


class TestFrames:
    def test_text_is_kept_as_it_is(self, start: Starter) -> None:
        text = "plain\n\n  back\\slash \\x41\ttab\rreturn\0nul\x1b[1mbold é\u2028\U0001f600\ufffd\n".encode()
        log, _ = output_of_file(start, text)
        assert text in log

    def test_every_byte_arrives(self, start: Starter) -> None:
        output_of_file(start, bytes(range(256)) * 41)
        output_of_file(start, b"".join(bytes([first, second]) for first in range(256) for second in range(256)))

    @pytest.mark.parametrize(
        ("output", "frames"),
        [
            (b"no newline", [RS + b"-no newline"]),
            (b"\n", [b""]),
            (b"\xff\n", [RS + b"+\\xff"]),
            (b"a\\b\xe9c\xc3\xa9\n", [RS + b"+a\\\\b\\xe9c\xc3\xa9"]),
            (RS + b"{}\n", [RS + b"+" + RS + b"{}"]),
            (RS + b"\n", [RS + b"+" + RS]),
            (b"not first " + RS + b"\n", [b"not first " + RS]),
            (b"\xed\xa0\x80\n", [RS + b"+\\xed\\xa0\\x80"]),
            (b"\xc0\xaf\xe0\x80\xaf\n", [RS + b"+\\xc0\\xaf\\xe0\\x80\\xaf"]),
            (b"\xf4\x90\x80\x80\n", [RS + b"+\\xf4\\x90\\x80\\x80"]),
            (b"\xf4\x8f\xbf\xbf\n", [b"\xf4\x8f\xbf\xbf"]),
            (b"\xe2\x82", [RS + b"-\\xe2\\x82"]),
            (b"x" * (LONGEST_LINE - 1) + b"\n", [b"x" * (LONGEST_LINE - 1)]),
            (b"x" * LONGEST_LINE + b"\n", [RS + b"-" + b"x" * (LONGEST_LINE - 3), b"xxx"]),
            (
                b"x" * (LONGEST_LINE - 4) + "é".encode() * 2 + b"\n",
                [RS + b"-" + b"x" * (LONGEST_LINE - 4), "éé".encode()],
            ),
            (b"\xff" * 5000 + b"\n", [RS + b"-" + b"\\xff" * 3967, RS + b"+" + b"\\xff" * 1033]),
        ],
        ids=range(16),
    )
    def test_what_a_line_becomes(self, start: Starter, output: bytes, frames: list[bytes]) -> None:
        log, _ = output_of_file(start, output)
        assert frames_in(log) == frames

    @AS_CHILD
    def test_long_text_is_cut_between_characters(self, start: Starter) -> None:
        text = "".join(random.Random(0).choices("aé€\U0001f600\\", k=200_000)).encode() + b"\n"
        directory = start.new_directory()
        (directory / "data").write_bytes(text)
        # An event may well come in the midst of a character, as the exit would while the log is slow.
        framed = begin(start, f'cat "$HERE/data"; {WAIT}', directory=directory)
        framed.wait_for_output(text)
        framed.job.release()
        decoded, _, _ = framed.finish()
        assert decoded.output == text
        assert b"\\x" not in framed.log

    def test_long_binary_lines_arrive(self, start: Starter) -> None:
        data = random.Random(1).randbytes(400_000).replace(b"\n", b"\r")
        output_of_file(start, data + b"\n" + data[:70_000])

    def test_output_without_a_newline_is_there_while_the_command_runs(self, start: Starter) -> None:
        framed = begin(start, f"printf '10%%\\r'; {WAIT}; printf '20%%\\r'; {waiting_for('second')}; printf 'done\\n'")
        framed.wait_for_output(b"10%\r")
        framed.job.release()
        framed.wait_for_output(b"20%\r")
        framed.job.release("second")
        decoded, _, _ = framed.finish()
        assert decoded.output == b"10%\r20%\rdone\n"

    def test_a_character_that_comes_in_two_parts_is_one(self, start: Starter) -> None:
        framed = begin(start, f"printf 'caf\\303'; {WAIT}; printf '\\251\\n'")
        framed.wait_for_output(b"caf")
        framed.job.release()
        framed.finish()
        assert frames_in(framed.log) == [RS + b"-caf", "é".encode()]

    @AS_CHILD
    def test_an_event_comes_behind_the_output_before_it(self, start: Starter) -> None:
        framed = begin(start, "printf half; exit 3", retries=2, retry_delay=0.01)
        decoded, ended, code = framed.finish()
        assert decoded.output == b"half" * 3
        assert [event["offset"] for event in decoded.named("started")] == [0, 4, 8]
        assert [event["offset"] for event in decoded.named("exited")] == [4, 8, 12]
        assert (ended["offset"], ended["log_size"], code) == (12, 12, 3)

    @AS_CHILD
    def test_much_output_arrives_with_marks_in_it(self, start: Starter) -> None:
        line = "0123456789" * 7 + "abcdefghi"
        framed = begin(start, f"yes {line} | head -c 100000000")
        decoded, _, _ = framed.finish()
        assert decoded.output == (line + "\n").encode() * (100_000_000 // 80)
        assert len(decoded.named("mark")) >= 100_000_000 // 80 // 1024 - 1
        started = decoded.named("started")[0]
        assert all(event["attempts"] == [[1, started["time"], None, None, None, 0]] for event in decoded.named("mark"))

    @AS_CHILD
    def test_much_binary_output_arrives(self, start: Starter) -> None:
        output_of_file(start, random.Random(2).randbytes(1 << 20) * 8)

    @AS_CHILD
    def test_lines_of_two_bytes_have_marks_too(self, start: Starter) -> None:
        output_of_file(start, b"\xff\n" * 200_000)


WRITER = """
import os, sys
data, cuts = open(sys.argv[1], "rb").read(), map(int, sys.argv[2:])
at = 0
for cut in cuts:
    os.write(1, data[at:cut])
    at = cut
"""
PIECES = strategies.one_of(
    strategies.binary(max_size=300),
    strategies.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")),
    strategies.sampled_from([b"\n", RS, b"\\", b"\\x1e", RS + b"{", RS + b"+", RS + b"-", b"\xf0\x9f", b"\xc3"]),
    strategies.sampled_from([b"x", "é".encode(), b"\xff", b"\\"]).flatmap(
        lambda one: strategies.integers(15_800, 15_900).map(lambda count: one * count)
    ),
)


@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
@given(
    pieces=strategies.lists(PIECES, max_size=30),
    places=strategies.lists(strategies.floats(0, 1, allow_nan=False), max_size=10),
)
def test_any_output_written_in_any_pieces_arrives(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], places: list[float]
) -> None:
    data = b"".join(pieces)
    cuts = [*sorted(int(place * len(data)) for place in places), len(data)]
    with Starter(Setting(ENGINE_RUNNERS[0]), tmp_path_factory.mktemp("pieces")) as start:
        directory = start.new_directory()
        (directory / "data").write_bytes(data)
        writer = [sys.executable, "-I", "-S", "-c", WRITER, str(directory / "data"), *map(str, cuts)]
        decoded, _, _ = begin(start, f"exec {shlex.join(writer)}", directory=directory).finish()
    assert decoded.output == data


class TestEngine:
    """The engine's side: its log, its signals, its exit codes."""

    @pytest.mark.parametrize(
        ("command", "exit_code", "options"),
        [
            ("true", 0, {}),
            ("exit 7", 7, {}),
            ("kill -KILL $$", 137, {}),
            ("true", 1, {"more": ["--directory", "/nonexistent"]}),
            (f"trap 'exit 0' TERM; {FOREVER}", 1, {"timeout": 1}),
            (f"trap 'exit 9' TERM; {FOREVER}", 9, {"timeout": 1}),
        ],
    )
    def test_the_process_exits_as_the_job_did(
        self, start: Starter, command: str, exit_code: int, options: dict[str, Any]
    ) -> None:
        assert begin(start, command, **options).finish()[2] == exit_code

    def test_events_say_what_they_do_in_a_journal(self, start: Starter) -> None:
        framed = begin(start, "exit $((3 - FRAY_ATTEMPT))", retries=3, retry_delay=0.01)
        decoded, ended, code = framed.finish()
        assert [event["event"] for event in decoded.events] == [
            *("supervised", "started", "exited", "started", "exited", "started", "exited", "ended")
        ]
        assert [event["exit_code"] for event in decoded.named("exited")] == [2, 1, 0]
        assert (ended.get("reason"), ended["exit_code"], code) == (None, 0, 0)
        starts, exits = decoded.named("started"), decoded.named("exited")
        assert ended["attempts"] == [
            [
                began["attempt"],
                began["time"],
                exited["time"],
                exited["exit_code"],
                exited.get("reason"),
                began["offset"],
            ]
            for began, exited in zip(starts, exits, strict=True)
        ]

    @AS_CHILD
    def test_the_last_attempts_are_told_again(self, start: Starter) -> None:
        framed = begin(start, "echo $FRAY_ATTEMPT; exit 1", retries=20, retry_delay=1e-6)
        _, ended, _ = framed.finish()
        assert [attempt[0] for attempt in ended["attempts"]] == list(range(2, 22))

    def test_a_mark_says_that_the_rest_is_waited_for(self, start: Starter) -> None:
        talk = f"trap '' TERM; echo ready; {WAIT}; yes | head -n 3000"
        framed = begin(
            start, f"sh -c {shlex.quote(talk)} & {waiting_for('first')}; yes | head -n 3000; exit 4", grace=60
        )
        framed.wait_for_output(b"ready")
        framed.job.release("first")
        framed.event("exited")
        framed.job.release()
        decoded, ended, _ = framed.finish()
        exited = decoded.named("exited")[0]
        before = [mark for mark in decoded.named("mark") if mark["time"] < exited["time"]]
        after = [mark for mark in decoded.named("mark") if mark["time"] > exited["time"]]
        assert before
        assert after
        assert not any("stopping" in mark for mark in before)
        assert all(mark["stopping"] is True for mark in after)
        assert all(mark["attempts"][0][2:5] == [exited["time"], 4, "EXITED"] for mark in after)
        assert (ended["reason"], ended["exit_code"]) == ("EXITED", 4)

    @AS_INIT
    def test_what_others_write_to_pid_1s_streams_is_output(self, start: Starter) -> None:
        framed = begin(start, "echo a; echo b >/proc/1/fd/1; echo c >/proc/1/fd/2; printf '\\377' >/proc/1/fd/1")
        assert framed.finish()[0].output == b"a\nb\nc\n\xff"
        assert framed.job.said == ""

    def test_the_command_has_three_descriptors(self, start: Starter) -> None:
        assert begin(start, "ls /proc/$$/fd").finish()[0].output == b"0\n1\n2\n"

    def test_another_descriptor_can_be_the_log(self, start: Starter) -> None:
        read_end, write_end = os.pipe()
        with open(read_end, "rb") as log:
            job = start("echo out", journal=None, output=f"frames:{write_end}", pass_fds=[write_end])
            os.close(write_end)
            decoded = Decoded(log.read())
        assert decoded.output == b"out\n"
        assert decoded.events[-1]["event"] == "ended"
        assert job.process.wait(DEADLINE_SECONDS) == 0

    def test_the_engines_own_stop_loses_the_job(self, start: Starter) -> None:
        framed = begin(start, f"exec 2>/dev/null; trap 'echo saved; exit 0' TERM; echo ready; {FOREVER}", retries=3)
        framed.wait_for_output(b"ready")
        framed.ask_to_stop(signal.SIGPWR)
        decoded, ended, code = framed.finish()
        assert (ended["reason"], ended["message"], ended["exit_code"]) == ("LOST", ENGINE_STOPPED, 0)
        assert [event["reason"] for event in decoded.named("stopping")] == ["LOST"]
        assert decoded.output == b"ready\nsaved\n"
        assert "abandoned" not in ended
        assert code == 1

    @pytest.mark.parametrize("first", [signal.SIGPWR, signal.SIGTERM], ids=["engine", "user"])
    def test_who_stops_it_first_counts(self, start: Starter, first: signal.Signals) -> None:
        framed = begin(start, f"trap 'echo asked' TERM; echo ready; {WAIT}", grace=60)
        framed.wait_for_output(b"ready")
        framed.ask_to_stop(first)
        framed.wait_for_output(b"asked")
        framed.ask_to_stop(signal.SIGTERM if first == signal.SIGPWR else signal.SIGPWR)
        framed.job.release()
        _, ended, _ = framed.finish()
        assert ended["reason"] == ("LOST" if first == signal.SIGPWR else "STOPPED_BY_USER")

    def test_the_engines_stop_between_attempts(self, start: Starter) -> None:
        framed = begin(start, "exit 3", retries=3, retry_delay=50)
        framed.event("exited")
        framed.ask_to_stop(signal.SIGPWR)
        _, ended, code = framed.finish()
        assert (ended["reason"], ended["message"], ended["exit_code"]) == ("LOST", ENGINE_STOPPED, 3)
        assert code == 3

    @pytest.mark.parametrize("how", ["stop", "time limit"])
    def test_a_log_that_blocks_holds_up_neither_a_stop_nor_the_time_limit(self, start: Starter, how: str) -> None:
        read_end, write_end = _smallest_pipe()
        job = start(
            "yes | head -c 30000000; exit 5",  # more than all the pipes and the runner hold
            journal=None,
            output="frames:1",
            stdout=write_end,
            timeout=2 if how == "time limit" else None,
        )
        os.close(write_end)
        framed = Framed(job, read_end)
        pid = framed.runner_pid
        framed.event("started")
        until(lambda: _unread(read_end) == PIPE_SIZE, "a log that blocks")
        members = {process for process in framed.job.processes() if process not in (pid, framed.job.process.pid)}
        if how == "stop":
            os.kill(pid, signal.SIGTERM)
        until(lambda: not any(environment_of(member) for member in members), "the end of the command")
        assert framed.job.process.poll() is None
        resident = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        assert resident
        assert int(resident[1]) < 8192
        _, ended, _ = framed.finish()
        assert ended["reason"] == ("STOPPED_BY_USER" if how == "stop" else "TIMED_OUT")
        assert ended["log_size"] < 30_000_000
        os.close(read_end)

    def test_a_log_that_blocks_loses_nothing(self, start: Starter) -> None:
        framed = begin(start, 'seq 200000; touch "$HERE/done"')
        framed.event("started")
        decoded, ended, _ = framed.finish()
        assert decoded.output == b"".join(b"%d\n" % number for number in range(1, 200_001))
        assert "dropped_bytes" not in ended

    @AS_CHILD
    def test_no_exit_is_missed(self, start: Starter) -> None:
        # At whatever moment it comes: some of these orphans end just before it does.
        for _ in range(200):
            assert begin(start, "for i in 1 2 3 4 5 6 7 8 9 10; do (true &); done").finish()[2] == 0

    def test_without_a_reader_the_job_goes_on(self, start: Starter) -> None:
        framed = begin(start, f'{WAIT}; seq 200000; touch "$HERE/ran"; exit 3')
        framed.event("started")
        assert framed.job.process.stdout
        framed.job.process.stdout.close()
        framed.job.release()
        assert framed.job.process.wait(DEADLINE_SECONDS) == 3
        assert (framed.job.directory / "ran").exists()
        assert "nobody takes the job's output any more" in framed.job.said

    @pytest.mark.parametrize(
        "change",
        [
            {"journal": "journal"},
            {"copy": "copy"},
            {"output": "frames:"},
            {"output": "frames:x"},
            {"output": "frames:-1"},
            {"handover": "whole"},
        ],
    )
    def test_bad_options_are_refused(self, start: Starter, change: dict[str, Any]) -> None:
        job = start('touch "$HERE/ran"', **{"journal": None, "output": "frames:1", **change})
        assert job.process.wait(DEADLINE_SECONDS) == 64
        assert "fray runner:" in job.said
        assert not (job.directory / "ran").exists()


class TestHandover:
    SECRET = "correct-horse-battery-staple"

    @staticmethod
    def begin(start: Starter, command: str, data: bytes, *, close: bool, **options: Any) -> Framed:
        framed = begin(start, command, stdin=subprocess.PIPE, **options)
        stdin = framed.job.process.stdin
        assert stdin
        with contextlib.suppress(BrokenPipeError):  # it did not wait for all of that
            stdin.write(data)
            stdin.flush()
            if close:
                stdin.close()
        return framed

    def test_the_job_starts_when_all_that_was_announced_is_there(self, start: Starter) -> None:
        data = handover({"SECRET": self.SECRET, "LINES": "a\nb\n"})
        command = f'[ "$SECRET" = {self.SECRET} ] && echo "$LINES"; cat; readlink /proc/$$/fd/0'
        framed = self.begin(start, command, data, close=False, handover="counted")
        decoded, ended, _ = framed.finish()
        assert decoded.output == b"a\nb\n\n/dev/null\n"
        assert ended["exit_code"] == 0
        assert self.SECRET.encode() not in framed.log

    def test_it_comes_in_pieces(self, start: Starter) -> None:
        data = handover({f"SECRET_{number}": "x" * 10_000 for number in range(100)})
        framed = self.begin(start, "echo ${#SECRET_99}", data[:2], close=False, handover="counted")
        stdin = framed.job.process.stdin
        assert stdin
        for at in range(2, len(data), 70_001):
            stdin.write(data[at : at + 70_001])
            stdin.flush()
        assert framed.finish()[0].output == b"10000\n"

    def test_no_secrets_are_the_word_to_start_too(self, start: Starter) -> None:
        assert (
            self.begin(start, "echo ran", handover({}), close=False, handover="counted").finish()[0].output == b"ran\n"
        )

    @pytest.mark.parametrize("kind", ["counted", "stdin"])
    @pytest.mark.parametrize("part", ["nothing", "half", "nonsense"])
    @pytest.mark.parametrize("end", ["leaves", "stalls"])
    def test_a_client_that_does_not_finish_abandons_the_job(
        self, start: Starter, kind: str, part: str, end: str
    ) -> None:
        whole = handover({"SECRET": self.SECRET})
        data = {"nothing": b"", "half": whole[: len(whole) // 2], "nonsense": b"nonsense\nA=B\0"}[part]
        options: dict[str, Any] = {"handover_timeout": 0.2} if end == "stalls" else {}
        framed = self.begin(start, "echo ran", data, close=end == "leaves", handover=kind, **options)
        decoded, ended, code = framed.finish()
        assert (ended["reason"], ended["abandoned"], ended.get("exit_code")) == ("LOST", True, None)
        assert (decoded.output, code) == (b"", 1)

    @pytest.mark.parametrize(
        ("number", "reason"), [(signal.SIGTERM, "STOPPED_BY_USER"), (signal.SIGPWR, "LOST")], ids=["user", "engine"]
    )
    def test_a_stop_before_the_word(self, start: Starter, number: int, reason: str) -> None:
        framed = self.begin(start, "echo ran", b"100\n", close=False, handover="counted")
        framed.ask_to_stop(number)
        decoded, ended, _ = framed.finish()
        assert (ended["reason"], "abandoned" in ended, decoded.output) == (reason, False, b"")
        assert ended.get("message") == (ENGINE_STOPPED if reason == "LOST" else None)


class TestOutputs:
    def test_the_first_that_can_be_made_is_the_commands(self, start: Starter) -> None:
        directory = start.new_directory()
        wanted = directory / "a" / "b"
        framed = begin(
            start,
            'echo "$FRAY_OUTPUT_DIR"; touch "$FRAY_OUTPUT_DIR/file"; yes | head -n 3000',
            directory=directory,
            outputs=f"/proc/nonexistent/out:/etc/passwd/out:{wanted}:{directory}/c",
            environment={"FRAY_OUTPUT_DIR": "/inherited"},
        )
        decoded, ended, _ = framed.finish()
        assert decoded.output.startswith(f"{wanted}\n".encode())
        assert (wanted / "file").exists()
        assert wanted.stat().st_mode & 0o777 == 0o755
        assert not (directory / "c").exists()
        assert decoded.named("mark")
        assert {event["outputs"] for event in [decoded.events[0], *decoded.named("mark"), ended]} == {str(wanted)}

    def test_one_that_is_there_will_do(self, start: Starter) -> None:
        directory = start.new_directory()
        decoded, _, _ = begin(start, 'cd "$FRAY_OUTPUT_DIR" && pwd', outputs=directory).finish()
        assert decoded.output == f"{directory}\n".encode()

    def test_none_at_all_fails_the_set_up(self, start: Starter) -> None:
        framed = begin(start, "echo ran", outputs="/proc/nonexistent/out:/etc/passwd")
        decoded, ended, code = framed.finish()
        assert (ended["reason"], decoded.output, code) == ("SETUP_FAILED", b"", 1)
        assert ended["message"] == (
            "no directory for $FRAY_OUTPUT_DIR can be made as user "
            f"{0 if start.is_init else os.geteuid()} (tried /proc/nonexistent/out, /etc/passwd)"
        )

    @AS_CHILD
    def test_it_is_no_sign_of_another_job(self, start: Starter) -> None:
        deaf = f"trap '' TERM; echo ready; {FOREVER}"
        directory = start.new_directory()
        framed = begin(
            start,
            f"setsid sh -c {shlex.quote(deaf)} & {FOREVER}",
            outputs=directory,
            grace=0.1,
            environment={"FRAY_JOB_ID": "one", "FRAY_CLUSTER": "here", "FRAY_OUTPUT_DIR": "/elsewhere"},
        )
        framed.wait_for_output(b"ready")
        framed.ask_to_stop()
        framed.finish()


class Cgroup:
    """A cgroup with little memory; a context manager."""

    def __init__(self) -> None:
        self.is_v1 = Path("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists()
        self.root = Path("/sys/fs/cgroup/memory" if self.is_v1 else "/sys/fs/cgroup")
        self.path = self.root / f"fray-test-{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> Self:
        try:
            self.path.mkdir()
            (self.path / ("memory.limit_in_bytes" if self.is_v1 else "memory.max")).write_text(str(64 << 20))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            missing("memory-cgroup", f"needs root, and cgroups that can be written to: {error}")
        return self

    def __exit__(self, *error: object) -> None:
        def is_removed() -> bool:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            return not self.path.exists()

        until(is_removed, "an empty cgroup")

    def wrapper(self, *, as_in_a_container: bool = False) -> list[str]:
        """What starts a program in it, and where that sees it as it would be seen in a container."""
        join = f"echo $$ > {self.path}/cgroup.procs"
        if not as_in_a_container:
            return ["sh", "-c", f'{join}; exec "$@"', "sh"]
        return ["unshare", "--mount", "sh", "-c", f'{join}; mount --bind {self.path} {self.root}; exec "$@"', "sh"]


class TestMemory:
    EAT = f"{sys.executable} -I -S -c 'x = b\"x\" * (300 << 20)'"
    VIEWS = pytest.mark.parametrize("is_contained", [False, True], ids=["host", "container"])

    @AS_INIT
    @VIEWS
    @pytest.mark.parametrize("shell", ["survives", "dies"])
    def test_the_kernels_kill_is_known_for_what_it_is(self, start: Starter, is_contained: bool, shell: str) -> None:
        with Cgroup() as cgroup:
            command = f"exec {self.EAT}" if shell == "dies" else f"{self.EAT}; exit $?"
            _, ended, code = begin(start, command, wrapper=cgroup.wrapper(as_in_a_container=is_contained)).finish()
        assert (ended["reason"], ended["exit_code"], code) == ("OUT_OF_MEMORY", 137, 137)

    @AS_INIT
    @VIEWS
    def test_a_kill_elsewhere_is_none_of_this_jobs(self, start: Starter, is_contained: bool) -> None:
        with Cgroup() as here, Cgroup() as there:
            wrapper = here.wrapper(as_in_a_container=is_contained)
            framed = begin(start, f"{WAIT}; exit 137", wrapper=wrapper)
            framed.event("started")
            killed = subprocess.run([*there.wrapper(), "sh", "-c", f"exec {self.EAT}"])
            assert killed.returncode == -signal.SIGKILL
            framed.job.release()
            _, ended, _ = framed.finish()
        assert ended["reason"] == "EXITED"


class Relay:
    """A relay and the two who are at its ends: whoever prepares the job, and the engine's log."""

    LIFE = RS + b"\n"
    RELEASED = RS + b'{"event":"released","time":1.5}\n'
    ENDED = RS + b'{"event":"ended","time":1.5,"reason":"SETUP_FAILED"}\n'

    def __init__(self, setting: Setting, directory: Path, seconds: str = "60") -> None:
        self.is_init = setting.is_init
        namespace = own_pid_namespace() if setting.is_init else ()
        self.process = subprocess.Popen(
            [*namespace, *setting.runner.argv(directory), "relay", seconds],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def send(self, data: bytes) -> None:
        self.stdin.write(data)
        self.stdin.flush()

    def come_up(self) -> None:
        """Wait until it hears signals."""
        self.send(b"hello\n")
        assert self.stdout.readline() == b"hello\n"

    def signal(self, number: int) -> None:
        os.kill(children_of(self.process.pid)[0] if self.is_init else self.process.pid, number)

    def finish(self) -> tuple[list[bytes], int]:
        """The lines that are left, and the exit code."""
        lines = self.stdout.read().splitlines(keepends=True)
        return lines, self.process.wait(DEADLINE_SECONDS)

    def end(self) -> dict[str, Any]:
        """Its own end, which is all that is left."""
        lines, code = self.finish()
        assert len(lines) == 1
        assert lines[0].startswith(RS + b'{"event":"ended"')
        assert code == 1
        event: dict[str, Any] = json.loads(lines[0][1:])
        assert abs(event.pop("time") - time.time()) < DEADLINE_SECONDS
        return event


class TestRelay:
    LEFT = "the process that prepared the job went away"

    @pytest.fixture(params=settings(ENGINE_RUNNERS), ids=str)
    def relay(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Relay]:
        with Relay(request.param, tmp_path) as relay:
            yield relay

    def test_it_copies_lines_until_the_job_is_released(self, relay: Relay) -> None:
        pending = RS + b'{"event":"pending","time":1.0,"message":"pulling"}\n'
        relay.send(pending + relay.LIFE + b"plain\n\n" + relay.LIFE + RS + b"+text\n" + relay.RELEASED + b"late\n")
        assert relay.finish() == ([pending, b"plain\n", b"\n", RS + b"+text\n", relay.RELEASED], 0)

    def test_it_copies_each_line_at_once(self, relay: Relay) -> None:
        for number in range(100):
            relay.send(b"%d\n" % number)
            assert relay.stdout.readline() == b"%d\n" % number
        relay.send(b"to")
        relay.send(b"rn\n" + relay.RELEASED)
        assert relay.finish() == ([b"torn\n", relay.RELEASED], 0)

    def test_it_copies_much(self, relay: Relay) -> None:
        lines = [b"%d\n" % number for number in range(100_000)]
        writer = threading.Thread(target=relay.send, args=[b"".join(lines) + relay.RELEASED])
        writer.start()
        assert relay.finish() == ([*lines, relay.RELEASED], 0)
        writer.join()

    def test_it_copies_the_jobs_end(self, relay: Relay) -> None:
        relay.send(b"why\n" + relay.ENDED + relay.RELEASED)
        assert relay.finish() == ([b"why\n", relay.ENDED], 1)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
    def test_it_can_be_stopped(self, relay: Relay, number: int) -> None:
        relay.come_up()
        relay.signal(number)
        assert relay.end() == {"event": "ended", "reason": "STOPPED_BY_USER"}

    def test_the_engines_stop_loses_the_job(self, relay: Relay) -> None:
        relay.come_up()
        relay.signal(signal.SIGPWR)
        assert relay.end() == {"event": "ended", "reason": "LOST", "message": ENGINE_STOPPED}

    def test_a_hangup_is_no_stop(self, relay: Relay) -> None:
        relay.come_up()
        relay.signal(signal.SIGHUP)
        relay.send(relay.RELEASED)
        assert relay.finish() == ([relay.RELEASED], 0)

    def test_a_stop_before_the_release_is_read_wins(self, relay: Relay) -> None:
        relay.come_up()
        relay.signal(signal.SIGSTOP)
        relay.send(b"line\n" + relay.RELEASED)
        relay.signal(signal.SIGTERM)
        relay.signal(signal.SIGCONT)
        assert relay.end() == {"event": "ended", "reason": "STOPPED_BY_USER"}

    @pytest.mark.parametrize("sent", [b"", b"torn", b"line\n", RS + b"\n"], ids=["", "torn", "line", "life"])
    def test_whoever_prepares_may_go_away(self, relay: Relay, sent: bytes) -> None:
        relay.send(sent)
        relay.stdin.close()
        if sent == b"line\n":
            assert relay.stdout.readline() == sent
        abandoned = {"abandoned": True} if sent in (b"", b"torn") else {}
        assert relay.end() == {"event": "ended", "reason": "LOST", "message": self.LEFT, **abandoned}

    @pytest.mark.parametrize("sent", [b"", RS + b"\n"], ids=["nothing", "life"])
    @pytest.mark.parametrize("setting", settings(ENGINE_RUNNERS), ids=str)
    def test_whoever_prepares_may_fall_silent(self, setting: Setting, tmp_path: Path, sent: bytes) -> None:
        with Relay(setting, tmp_path, "2") as relay:
            relay.send(sent)
            abandoned = {} if sent else {"abandoned": True}
            assert relay.end() == {"event": "ended", "reason": "LOST", "message": self.LEFT, **abandoned}

    def test_a_line_may_have_16_kib_and_no_more(self, relay: Relay) -> None:
        longest = b"x" * 16_383 + b"\n"
        relay.send(longest)
        assert relay.stdout.readline() == longest
        relay.send(b"x" + longest)
        end = relay.end()
        assert (end["reason"], end["message"]) == ("LOST", "a line of the preparation is longer than 16 KiB")

    @pytest.mark.parametrize("arguments", [["relay"], ["relay", "soon"], ["relay", "0"], ["relay", "1", "2"]])
    def test_it_needs_a_number_of_seconds(self, tmp_path: Path, arguments: Sequence[str]) -> None:
        argv = ENGINE_RUNNERS[0].argv(tmp_path)
        done = subprocess.run([*argv, *arguments], stdin=subprocess.DEVNULL, capture_output=True)
        assert (done.returncode, done.stdout) == (64, b"")
        assert done.stderr.startswith(b"fray runner:")
