"""The runner, from outside: what a backend may rely on, whatever language the runner is written in."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.core.runner_harness import (
    MORE_RUNNERS,
    RUNNERS,
    Job,
    Setting,
    Starter,
    children_of,
    environment_of,
    handover,
    is_zombie,
    own_pid_namespace,
    packet_pipe,
    parse_journal,
    read_packet,
    settings,
    until,
)
from tests.requirements import missing, run_in_mount_namespace

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="watches processes through /proc")

SOAK_ROUNDS = int(os.environ.get("FRAY_SOAK") or 0)

ESSENTIAL = pytest.mark.parametrize(
    "start", [*settings(RUNNERS), *(Setting(runner) for runner in MORE_RUNNERS)], indirect=True, ids=str
)
AS_CHILD = pytest.mark.parametrize("start", [Setting(runner) for runner in RUNNERS], indirect=True, ids=str)
ESSENTIAL_AS_CHILD = pytest.mark.parametrize(
    "start", [Setting(runner) for runner in [*RUNNERS, *MORE_RUNNERS]], indirect=True, ids=str
)
PYTHON_AS_CHILD = pytest.mark.parametrize(
    "start",
    [Setting(runner) for runner in [*RUNNERS, *MORE_RUNNERS] if runner.is_python],
    indirect=True,
    ids=str,
)
STOP_SIGNALS = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])

# Shell: wait for another process to say that it is ready; wait for what `Job.release` makes; live on for ever; live on
# whatever is asked, and say so once that holds.
UNTIL_READY = 'until grep -q ready "$HERE/output"; do sleep 0.01; done'
WAIT = 'while [ ! -e "$HERE/release" ]; do sleep 0.02; done'
FOREVER = "while :; do sleep 0.05; done"
DEAF = f"trap '' TERM INT HUP; echo ready; {FOREVER}"


def as_role(role: str, script: str, *, before: str = "") -> str:
    """Shell: run a script as a process that `Job.processes` finds by its role."""
    return f"env ROLE={role} {before} sh -c {shlex.quote(script)}"


@pytest.fixture(params=settings(RUNNERS), ids=str)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Starter]:
    with Starter(request.param, tmp_path) as starter:
        yield starter


def test_the_runner_was_tested_as_pid_1_too() -> None:
    if not own_pid_namespace():
        missing("pid-namespaces", "needs Linux, util-linux's unshare, and root or user namespaces")


class TestEnds:
    @pytest.mark.parametrize(
        ("command", "exit_code", "reason"),
        [
            ("true", 0, None),
            ("exit 7", 7, "EXITED"),
            ("exit 255", 255, "EXITED"),
            ("kill -KILL $$", 137, "KILLED"),
            ("kill -TERM $$", 143, "KILLED"),
            ("kill -PIPE $$", 141, "KILLED"),
            ("exit 137", 137, "EXITED"),
            ("exec 2>/dev/null; no-such-command-anywhere", 127, "EXITED"),
            ("exec 2>/dev/null; /etc/passwd", 126, "EXITED"),
        ],
    )
    def test_how_the_command_ended_is_recorded(
        self, start: Starter, command: str, exit_code: int, reason: str | None
    ) -> None:
        job = start(command)
        ended = job.wait()
        (exited,) = job.events("exited")
        assert (exited["exit_code"], exited.get("reason")) == (exit_code, reason)
        assert (ended["exit_code"], ended.get("reason")) == (exit_code, reason)
        assert [event["event"] for event in job.events()] == ["supervised", "started", "exited", "ended"]

    def test_a_command_line_of_the_shell_is_taken_as_it_is(self, start: Starter) -> None:
        job = start("-n 2>/dev/null || printf '%s' \"it's \\$HOME\" 'é\u2028\U0001f600'\ntrue")
        assert job.wait()["exit_code"] == 0
        assert job.output == "it's $HOMEé\u2028\U0001f600".encode()

    @pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8"])
    def test_bytes_that_are_no_text_reach_the_command(self, start: Starter, locale: str) -> None:
        odd = os.fsdecode(b"\xff\xfe")
        job = start(f'printf %s "{odd}$ODD"', environment={"LC_ALL": locale, "ODD": odd})
        assert job.wait()["exit_code"] == 0
        assert job.output == b"\xff\xfe\xff\xfe"


class TestRetries:
    @ESSENTIAL
    def test_a_failing_command_is_retried_with_growing_delays(self, start: Starter) -> None:
        job = start('echo "attempt $FRAY_ATTEMPT"; exit $((10 + FRAY_ATTEMPT))', retries=3, retry_delay=0.05)
        ended = job.wait()
        assert job.output == b"attempt 1\nattempt 2\nattempt 3\nattempt 4\n"
        assert (ended["reason"], ended["exit_code"]) == ("EXITED", 14)
        exits = job.events("exited")
        assert [event["exit_code"] for event in exits] == [11, 12, 13, 14]
        assert [float(event.get("retry_in", 0)) for event in exits] == [0.05, 0.1, 0.2, 0]
        starts = job.events("started")
        assert [event["offset"] for event in starts] == [0, 10, 20, 30]
        for before, after, delay in zip(exits, starts[1:], [0.05, 0.1, 0.2], strict=False):
            assert after["time"] - before["time"] >= delay - 0.001

    def test_the_delay_does_not_grow_past_a_minute(self, start: Starter) -> None:
        job = start("exit 1", retries=2, retry_delay=100, timeout=0.05)
        assert job.wait()["reason"] == "TIMED_OUT"

    def test_a_command_that_was_killed_is_retried(self, start: Starter) -> None:
        job = start('[ "$FRAY_ATTEMPT" = 2 ] || kill -KILL $$', retries=5, retry_delay=0.05)
        ended = job.wait()
        assert (ended.get("reason"), ended["exit_code"]) == (None, 0)
        assert [(event["exit_code"], event.get("reason")) for event in job.events("exited")] == [
            (137, "KILLED"),
            (0, None),
        ]

    @pytest.mark.parametrize("exit_code", [126, 127])
    def test_a_command_that_cannot_be_run_is_not_retried(self, start: Starter, exit_code: int) -> None:
        job = start(f"exit {exit_code}", retries=3, retry_delay=0.05)
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("EXITED", exit_code)
        assert len(job.events("started")) == 1

    def test_nothing_of_an_attempt_lives_on_into_the_next(self, start: Starter) -> None:
        left = as_role("left", DEAF, before="setsid")
        job = start(
            f'[ "$FRAY_ATTEMPT" = 2 ] && {{ {WAIT}; exit 0; }}; {left} & {UNTIL_READY}; exit 1',
            retries=1,
            retry_delay=0.05,
            grace=0.1,
        )
        job.event("started", 2)
        assert job.processes("left") == []
        job.release()
        assert job.wait()["exit_code"] == 0


class TestTimeLimit:
    @ESSENTIAL
    def test_a_job_past_its_time_is_stopped_whatever_its_exit_code(self, start: Starter) -> None:
        job = start(f"trap 'exit 0' TERM; {FOREVER}", timeout=1, retries=3, retry_delay=0.05)
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("TIMED_OUT", 0)
        assert len(job.events("started")) == 1
        assert [event["reason"] for event in job.events("stopping")] == ["TIMED_OUT"]

    def test_the_limit_spans_all_attempts(self, start: Starter) -> None:
        job = start("sleep 0.1; exit 1", timeout=0.5, retries=10_000, retry_delay=1e-6)
        assert job.wait()["reason"] == "TIMED_OUT"
        assert 1 <= len(job.events("started")) <= 6  # no more have room in it

    def test_the_limit_holds_between_attempts(self, start: Starter) -> None:
        job = start("exit 9", timeout=1, retries=3, retry_delay=50)
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("TIMED_OUT", 9)
        assert len(job.events("started")) == 1

    def test_an_exit_in_time_stays_though_what_is_left_of_the_job_outlasts_the_limit(self, start: Starter) -> None:
        slow = f"trap '' TERM; echo ready; {WAIT}; echo end"
        job = start(f"{as_role('slow', slow)} & {UNTIL_READY}; exit 0", timeout=2)
        exited = job.event("exited")
        until(lambda: time.time() > exited["time"] + 2, "the time limit")
        job.release()
        assert job.wait().get("reason") is None
        assert job.output == b"ready\nend\n"

    @pytest.mark.parametrize("seconds", [30 * 86400, 1e12])
    def test_a_limit_may_be_months_away(self, start: Starter, seconds: float) -> None:
        job = start(WAIT, timeout=seconds)
        job.event("started")
        job.release()
        assert job.wait()["exit_code"] == 0


class TestStop:
    @ESSENTIAL
    @STOP_SIGNALS
    def test_a_stop_asked_before_the_exit_decides_whatever_the_code(
        self, start: Starter, number: signal.Signals
    ) -> None:
        for code in (0, 7):
            job = start(f"trap 'exit {code}' TERM; echo ready; {FOREVER}", retries=3, retry_delay=0.05)
            job.wait_for_output(b"ready")
            job.ask_to_stop(number)
            ended = job.wait()
            assert (ended["reason"], ended["exit_code"]) == ("STOPPED_BY_USER", code)
            assert [event["event"] for event in job.events()] == [
                "supervised",
                "started",
                "stopping",
                "exited",
                "ended",
            ]

    def test_without_a_permit_nothing_is_started(self, start: Starter) -> None:
        job = start("echo ran", permit="/nonexistent/permit")
        ended = job.wait()
        assert (ended["reason"], ended.get("exit_code")) == ("STOPPED_BY_USER", None)
        assert job.output == b""
        assert job.events("started") == []

    @AS_CHILD
    def test_a_stop_that_waited_for_the_runner_to_come_up_is_heard(self, start: Starter) -> None:
        ask_and_become = (
            "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
            "os.kill(os.getpid(), signal.SIGTERM); os.execvp(sys.argv[1], sys.argv[1:])"
        )
        job = start("echo ran", wrapper=[sys.executable, "-c", ask_and_become])
        assert job.wait()["reason"] == "STOPPED_BY_USER"
        assert job.output == b""

    def test_a_permit_taken_away_is_seen_when_the_command_exits(self, start: Starter) -> None:
        directory = start.new_directory()
        permit = directory / "permit"
        permit.touch()
        job = start(WAIT, directory=directory, permit=permit)
        job.event("started")
        permit.unlink()
        job.release()
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("STOPPED_BY_USER", 0)

    def test_a_permit_taken_away_with_a_signal_stops_a_running_command(self, start: Starter) -> None:
        directory = start.new_directory()
        permit = directory / "permit"
        permit.touch()
        job = start(FOREVER, directory=directory, permit=permit)
        job.event("started")
        permit.unlink()
        job.ask_to_stop()
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("STOPPED_BY_USER", 143)

    def test_a_permit_taken_away_between_attempts_ends_them(self, start: Starter) -> None:
        directory = start.new_directory()
        permit = directory / "permit"
        permit.touch()
        job = start("exit 3", directory=directory, permit=permit, retries=3, retry_delay=4)
        job.event("exited")
        permit.unlink()
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("STOPPED_BY_USER", 3)
        assert len(job.events("started")) == 1

    @STOP_SIGNALS
    def test_a_stop_cuts_the_wait_between_attempts_short(self, start: Starter, number: signal.Signals) -> None:
        job = start("exit 3", retries=3, retry_delay=50)
        job.event("exited")
        job.ask_to_stop(number)
        ended = job.wait()
        assert (ended["reason"], ended["exit_code"]) == ("STOPPED_BY_USER", 3)
        assert len(job.events("started")) == 1

    @ESSENTIAL
    @pytest.mark.parametrize(("exit_code", "reason"), [(0, None), (3, "EXITED")])
    def test_an_exit_recorded_first_stays(self, start: Starter, exit_code: int, reason: str | None) -> None:
        slow = f"trap '' TERM; echo ready; {WAIT}"
        job = start(f"{as_role('slow', slow)} & {UNTIL_READY}; exit {exit_code}", grace=60)
        job.event("exited")
        job.ask_to_stop()
        job.release()
        ended = job.wait()
        assert (ended.get("reason"), ended["exit_code"]) == (reason, exit_code)
        assert job.events("stopping") == []

    def test_the_job_has_not_ended_while_something_of_it_lives(self, start: Starter) -> None:
        slow = f"trap '' TERM; echo ready; {WAIT}"
        job = start(f"{as_role('slow', slow)} & {UNTIL_READY}", grace=60)
        job.event("exited")
        assert job.processes("slow")
        assert job.events("ended") == []
        job.release()
        job.wait()

    @ESSENTIAL
    def test_the_shells_death_does_not_cut_the_others_grace_short(self, start: Starter) -> None:
        careful = (
            f"trap 'asked=yes' TERM; echo ready; until [ $asked ]; do sleep 0.02; done; echo asked; {WAIT}; echo saved"
        )
        job = start(f"{as_role('careful', careful, before='setsid')} & {FOREVER}", grace=60)
        job.wait_for_output(b"ready")
        job.ask_to_stop()
        job.event("exited")
        job.wait_for_output(b"asked")
        job.release()
        assert job.wait()["reason"] == "STOPPED_BY_USER"
        assert job.output.endswith(b"saved\n")

    @AS_CHILD
    def test_what_is_started_to_save_the_work_is_not_asked_to_end(self, start: Starter) -> None:
        # Enough of them that the first are at it while the last are still being asked.
        save = "for i in 1 2 3 4 5; do sh -c 'sleep 0.001; echo saved'; done; exit"
        worker = as_role("worker", f"trap {shlex.quote(save)} TERM; echo ready; {FOREVER}")
        job = start(f"for i in $(seq 30); do {worker} & done; wait", grace=60)
        job.wait_for_output(b"ready", 30)
        job.ask_to_stop()
        assert job.wait()["reason"] == "STOPPED_BY_USER"
        assert job.output.count(b"saved\n") == 150

    def test_stopping_twice_is_stopping_once(self, start: Starter) -> None:
        job = start(f"trap 'echo asked' TERM; echo ready; {WAIT}", grace=60)
        job.wait_for_output(b"ready")
        job.ask_to_stop()
        job.wait_for_output(b"asked")
        job.ask_to_stop(signal.SIGINT)
        job.ask_to_stop()
        job.release()
        assert job.wait()["reason"] == "STOPPED_BY_USER"
        assert job.output.count(b"asked") == 1
        assert len(job.events("stopping")) == 1

    def test_a_hangup_is_no_stop(self, start: Starter) -> None:
        job = start(WAIT)
        job.event("started")
        os.kill(job.runner_pid, signal.SIGHUP)
        job.release()
        assert job.wait().get("reason") is None


class TestTree:
    """Whatever the command left behind dies with the job; `Job.wait` asserts that nothing outlives the runner."""

    @pytest.mark.parametrize("stop", [False, True], ids=["exits", "is-stopped"])
    @pytest.mark.parametrize(
        "launch",
        [
            as_role("left", DEAF),
            as_role("left", DEAF, before="setsid"),
            f"({as_role('left', DEAF, before='setsid')} &)",
            as_role("left", f"({as_role('left', DEAF, before='setsid')} &) ; exit 0", before="nohup setsid"),
        ],
        ids=["deaf", "own-session", "orphan", "daemon"],
    )
    def test_a_deaf_process_dies(self, start: Starter, launch: str, stop: bool) -> None:
        after = FOREVER if stop else UNTIL_READY
        job = start(f"{launch} & {after}", grace=0.1)
        job.wait_for_output(b"ready")
        if stop:
            job.ask_to_stop()
        ended = job.wait()
        assert ended.get("reason") == ("STOPPED_BY_USER" if stop else None)

    def test_everyone_is_asked_before_anyone_is_killed(self, start: Starter) -> None:
        polite = f"trap 'echo asked; exit' TERM; echo ready; {FOREVER}"
        inner = f"{as_role('polite', polite)} & {polite}"
        own_session, orphan = as_role("polite", polite, before="setsid"), f"({as_role('polite', polite)} &)"
        job = start(
            f"{as_role('polite', inner)} & {own_session} & {orphan}"
            ' ; until [ "$(grep -c ready "$HERE/output")" = 4 ]; do :; done',
            grace=60,
        )
        assert job.wait()["exit_code"] == 0
        assert job.output.count(b"asked") == 4

    @pytest.mark.parametrize("grace", [0.1, 60], ids=["killed", "asked"])
    def test_a_stopped_process_dies(self, start: Starter, grace: float) -> None:
        ears = "trap '' TERM; " if grace < 1 else ""
        job = start(
            f"{as_role('stopped', f'{ears} echo ready; kill -STOP $$; {FOREVER}', before='setsid')}", grace=grace
        )
        job.wait_for_output(b"ready")
        until(lambda: any(_is_stopped(pid) for pid in job.processes("stopped")), "a stopped process")
        job.ask_to_stop()
        assert job.wait()["reason"] == "STOPPED_BY_USER"

    def test_a_wide_and_deep_tree_dies(self, start: Starter) -> None:
        directory = start.new_directory()
        script = directory / "tree"
        # 3 + 9 + 27 + 81 + 81 = 201 processes, all of them deaf, every other one in a session of its own.
        script.write_text(
            "trap '' TERM\n"
            'if [ "$1" -gt 0 ]; then\n'
            'sh "$0" $(($1 - 1)) & setsid sh "$0" $(($1 - 1)) & (sh "$0" $(($1 - 1)) &)\n'
            "else (sleep 1000 &)\nfi\necho ready\nwhile :; do sleep 1000; done\n"
        )
        job = start('sh "$HERE/tree" 4', directory=directory, grace=0.1)
        job.wait_for_output(b"ready", 121)
        assert len(job.members()) >= 200
        job.ask_to_stop()
        assert job.wait()["reason"] == "STOPPED_BY_USER"

    def test_a_tree_that_keeps_forking_dies(self, start: Starter) -> None:
        forks = as_role("forks", "trap : TERM; echo ready; while :; do sh -c : & wait; done")
        job = start(f"for i in 1 2 3 4; do {forks} & done; wait", grace=0.1)
        job.wait_for_output(b"ready", 4)
        job.ask_to_stop()
        assert job.wait()["reason"] == "STOPPED_BY_USER"

    def test_a_process_that_answers_by_forking_dies(self, start: Starter) -> None:
        hydra = f"trap {shlex.quote(as_role('head', DEAF, before='setsid') + ' &')} TERM; echo ready; {FOREVER}"
        job = start(as_role("hydra", hydra), grace=0.3)
        job.wait_for_output(b"ready")
        job.ask_to_stop()
        assert job.wait()["reason"] == "STOPPED_BY_USER"

    def test_orphans_that_ended_are_reaped_while_the_command_runs(self, start: Starter) -> None:
        job = start(f"for i in 1 2 3 4 5 6 7 8; do (sh -c 'echo orphan' &); done; {WAIT}")
        job.wait_for_output(b"orphan\n", 8)
        runner = job.runner_pid
        until(lambda: not any(is_zombie(pid) for pid in children_of(runner)), "the orphans to be reaped")
        assert job.events("exited") == []
        job.release()
        assert job.wait()["exit_code"] == 0

    @AS_CHILD
    def test_a_process_whose_first_thread_has_ended_dies(self, start: Starter) -> None:
        program = (
            "import ctypes, os, threading, time\n"
            "threading.Thread(target=lambda: [time.sleep(0.05) for _ in iter(int, 1)]).start()\n"
            "print(os.getpid(), flush=True)\n"
            "ctypes.CDLL(None).pthread_exit(None)\n"
        )
        left = f"{sys.executable} -I -S -c {shlex.quote(program)}"
        job = start(f"(setsid {left} &) ; {WAIT}", grace=0.1)
        job.wait_for_output(b"\n")
        pid = int(job.output)
        until(lambda: is_zombie(pid) and len(os.listdir(f"/proc/{pid}/task")) > 1, "the first thread's end")
        job.release()
        job.ended()
        assert not Path(f"/proc/{pid}").exists()

    @AS_CHILD
    @pytest.mark.parametrize("how", ["exits", "is-stopped", "is-killed-with-its-runner"])
    def test_another_job_submitted_from_inside_is_left_alone(self, start: Starter, how: str) -> None:
        other = f"trap 'echo asked' TERM; {as_role('others-child', DEAF)} & {DEAF}"
        submit = f'FRAY_JOB_ID=inner {as_role("other", other, before="setsid")} > "$HERE/other" &'
        mine = as_role("mine", DEAF, before="setsid")
        directory = start.new_directory()
        (directory / "other").touch()
        job = start(
            f'{submit} {mine} & until [ "$(cat "$HERE/other" "$HERE/output" | grep -c ready)" = 3 ]; do :; done;'
            f" echo both; {WAIT}",
            directory=directory,
            environment={"FRAY_JOB_ID": "outer"},
            grace=0.1,
            detach="yes" if how == "is-killed-with-its-runner" else None,
        )
        job.wait_for_output(b"both")
        if how == "exits":
            job.release()
            job.ended()
        elif how == "is-stopped":
            job.ask_to_stop()
            job.ended()
        else:
            supervised = job.event("supervised")
            os.kill(supervised["pid"], signal.SIGKILL)
            until(lambda: not environment_of(supervised["guard"]), "the guard's end")
        assert job.processes("mine") == []
        assert job.processes("other")
        assert job.processes("others-child")
        assert b"asked" not in (directory / "other").read_bytes()


class TestOutput:
    @ESSENTIAL
    def test_every_byte_arrives(self, start: Starter) -> None:
        directory = start.new_directory()
        data = bytes(range(256)) * 41 + random.Random(0).randbytes(300_000) + b"no newline at the end"
        (directory / "data").write_bytes(data)
        job = start('cat "$HERE/data"', directory=directory)
        job.wait()
        assert job.output == data

    def test_much_output_arrives(self, start: Starter) -> None:
        directory = start.new_directory()
        data = random.Random(1).randbytes(1 << 20) * 50
        (directory / "data").write_bytes(data)
        job = start('cat "$HERE/data"; exit 3', directory=directory)
        assert job.wait()["exit_code"] == 3
        assert job.output == data
        for name in ("data", "output"):
            (directory / name).unlink()

    def test_both_streams_are_one_in_the_order_of_writing(self, start: Starter) -> None:
        job = start("i=0; while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i + 1)); done")
        job.wait()
        assert job.output == b"".join(b"out %d\nerr %d\n" % (i, i) for i in range(200))

    def test_output_is_there_while_the_command_runs(self, start: Starter) -> None:
        job = start(f"printf half; {WAIT}; printf whole")
        job.wait_for_output(b"half")
        job.release()
        job.wait()
        assert job.output == b"halfwhole"

    def test_the_last_words_of_what_was_left_are_kept(self, start: Starter) -> None:
        last = f"trap 'sleep 0.2; head -c 300000 /dev/zero; echo bye; exit' TERM; echo ready; {FOREVER}"
        job = start(f"{as_role('left', last, before='setsid')} & {UNTIL_READY}", grace=60)
        job.wait()
        assert b"\0" * 300_000 + b"bye\n" in job.output

    def test_output_is_appended(self, start: Starter) -> None:
        directory = start.new_directory()
        (directory / "output").write_bytes(b"set up\n")
        job = start("echo run", directory=directory)
        job.wait()
        assert job.output == b"set up\nrun\n"
        assert job.events("started")[0]["offset"] == 7

    def test_output_goes_to_a_descriptor(self, start: Starter) -> None:
        job = start("echo out; echo err >&2", output="fd:1", stdout=subprocess.PIPE)
        assert job.process.stdout
        assert job.process.stdout.read() == b"out\nerr\n"
        job.wait()

    def test_output_goes_to_a_slow_reader_whole(self, start: Starter) -> None:
        here, there = socket.socketpair()
        with here, there:
            # Neither end waits by itself: the runner has to.
            there.setblocking(False)
            job = start("head -c 3000000 /dev/zero", output=f"fd:{there.fileno()}", pass_fds=[there.fileno()])
            there.close()
            job.event("started")
            received = 0
            while data := here.recv(1 << 16):
                received += len(data)
            job.wait()
        assert received == 3_000_000

    def test_what_cannot_be_written_is_counted_and_the_job_goes_on(self, start: Starter) -> None:
        job = start("head -c 200000 /dev/zero; echo failed to see it >&2; exit 0", output="/dev/full")
        ended = job.wait()
        assert ended.get("reason") is None
        assert ended["dropped_bytes"] == 200_000 + len("failed to see it\n")

    def test_nothing_dropped_is_not_mentioned(self, start: Starter) -> None:
        assert "dropped_bytes" not in start("echo fine").wait()

    def test_a_directory_gets_the_output_in_files_of_one_size(self, start: Starter) -> None:
        directory = start.new_directory()
        data = random.Random(2).randbytes((2 << 22) + 1000)
        (directory / "data").write_bytes(data)
        (directory / "log").mkdir()
        job = start('cat "$HERE/data"', directory=directory, output=f"{directory}/log/")
        assert job.wait()["log_size"] == len(data)
        files = sorted((directory / "log").iterdir())
        assert [(file.name, file.stat().st_size) for file in files] == [
            ("00000000", 1 << 22),
            ("00000001", 1 << 22),
            ("00000002", 1000),
        ]
        assert b"".join(file.read_bytes() for file in files) == data

    def test_a_full_file_is_followed_by_the_next_at_once(self, start: Starter) -> None:
        directory = start.new_directory()
        (directory / "log").mkdir()
        job = start(f"head -c {1 << 22} /dev/zero", directory=directory, output=f"{directory}/log/")
        assert job.wait()["log_size"] == 1 << 22
        assert sorted(file.name for file in (directory / "log").iterdir()) == ["00000000", "00000001"]

    def test_no_output_leaves_one_empty_file(self, start: Starter) -> None:
        directory = start.new_directory()
        (directory / "log").mkdir()
        assert start("true", directory=directory, output=f"{directory}/log/").wait()["log_size"] == 0
        assert [(file.name, file.stat().st_size) for file in (directory / "log").iterdir()] == [("00000000", 0)]

    def test_a_copy_gets_all_of_it_too(self, start: Starter) -> None:
        job = start("echo out; echo err >&2", copy="fd:1", stdout=subprocess.PIPE)
        assert job.process.stdout
        assert job.process.stdout.read() == b"out\nerr\n"
        job.wait()
        assert job.output == b"out\nerr\n"

    def test_a_copy_that_cannot_be_written_loses_nothing(self, start: Starter) -> None:
        job = start("echo out", copy="/dev/full")
        assert "dropped_bytes" not in job.wait()
        assert job.output == b"out\n"

    def test_output_that_cannot_be_opened_fails_the_set_up(self, start: Starter) -> None:
        job = start('touch "$HERE/ran"', output="/nonexistent/output")
        ended = job.wait()
        assert ended["reason"] == "SETUP_FAILED"
        assert "/nonexistent/output" in ended["message"]
        assert not (job.directory / "ran").exists()


class TestJournal:
    def test_each_event_is_written_at_once(self, start: Starter) -> None:
        with packet_pipe() as (read_end, write_end):
            job = start("exit 5", journal=f"fd:{write_end}", pass_fds=[write_end], retries=1, retry_delay=0.05)
            packets: list[bytes] = []
            while not packets or b'"ended"' not in packets[-1]:
                packets.append(read_packet(read_end))
            assert job.process.wait(60) == 0
        for packet in packets:
            assert packet.endswith(b"\n")
            assert packet.count(b"\n") == 1
        names = [json.loads(packet)["event"] for packet in packets]
        assert names == ["supervised", "started", "exited", "started", "exited", "ended"]

    def test_a_reader_that_goes_away_does_not_hold_up_the_job(self, start: Starter) -> None:
        read_end, write_end = os.pipe()
        job = start(f'{WAIT}; touch "$HERE/ran"', journal=f"fd:{write_end}", pass_fds=[write_end])
        os.close(write_end)
        assert b"supervised" in read_packet(read_end)
        os.close(read_end)
        job.release()
        assert job.process.wait(60) == 0
        assert (job.directory / "ran").exists()

    @pytest.mark.parametrize("by_descriptor", [False, True], ids=["path", "descriptor"])
    def test_preallocated_space_is_written_into(self, start: Starter, by_descriptor: bool) -> None:
        directory = start.new_directory()
        journal = directory / "journal"
        journal.write_bytes(bytes(16384))
        fd = os.open(journal, os.O_RDWR)
        try:
            job = start(
                "exit 5",
                directory=directory,
                journal=f"fd:{fd}" if by_descriptor else journal,
                pass_fds=[fd] if by_descriptor else [],
            )
        finally:
            os.close(fd)
        assert job.wait()["exit_code"] == 5
        content = job.journal
        assert len(content) == 16384
        text = content.rstrip(b"\0")
        assert b"\0" not in text
        assert [json.loads(line)["event"] for line in text.splitlines()] == ["supervised", "started", "exited", "ended"]

    @pytest.mark.parametrize("space", [0, 16384], ids=["growing", "preallocated"])
    @pytest.mark.parametrize("torn", [b'{"ev', b'{"event":"pending","time":1.0,"message":"' + b"x" * 3000])
    def test_a_predecessors_events_stay_and_its_torn_line_goes(self, start: Starter, space: int, torn: bytes) -> None:
        directory = start.new_directory()
        first = b'{"event":"pending","time":1.0,"message":"building"}\n'
        (directory / "journal").write_bytes((first + torn).ljust(space, b"\0"))
        job = start("true", directory=directory)
        assert job.process.wait(60) == 0
        assert job.journal.startswith(first)
        assert [event["event"] for event in job.events()] == ["pending", "supervised", "started", "exited", "ended"]

    @ESSENTIAL
    def test_no_time_is_before_the_submission_though_the_clock_is_behind(self, start: Starter) -> None:
        submitted = time.time() + 5000
        job = start("exit 1", not_before=f"{submitted:.6f}", retries=1, retry_delay=0.05)
        job.wait()  # which checks their order
        assert all(event["time"] >= submitted for event in job.events())

    def test_times_are_the_clocks(self, start: Starter) -> None:
        before = time.time()
        job = start("true", not_before=1000)
        job.wait()
        after = time.time()
        assert all(before - 0.001 <= event["time"] <= after + 0.001 for event in job.events())

    def test_the_journal_is_for_its_owner_only(self, start: Starter) -> None:
        job = start("true")
        job.wait()
        for name in ("journal", "output"):
            assert (job.directory / name).stat().st_mode & 0o077 == 0

    @AS_CHILD
    def test_the_end_is_recorded_on_a_full_disk_where_space_was_kept(self, start: Starter) -> None:
        said = run_in_mount_namespace(
            _on_a_full_disk(start, f"head -c {1 << 20} /dev/zero; exit 4") + "finish()", start.new_directory()
        )
        events = parse_journal(said.encode())
        assert [event["event"] for event in events] == ["supervised", "started", "exited", "ended"]
        assert events[-1]["exit_code"] == 4
        assert events[-1]["dropped_bytes"] == 1 << 20

    @AS_CHILD
    def test_the_end_is_recorded_once_there_is_space(self, start: Starter) -> None:
        said = run_in_mount_namespace(
            _on_a_full_disk(start, 'touch "$RAN"', keep=0)
            + "wait_for(lambda: os.path.exists(ran) and not children(runner.pid))\n"
            "assert not read_journal()\n"
            "os.unlink(disk + '/filler')\n"
            "finish()",
            start.new_directory(),
        )
        events = parse_journal(said.encode())
        assert events[-1]["event"] == "ended"
        assert events[-1]["exit_code"] == 0


class TestHandover:
    SECRETS: ClassVar = {
        "PLAIN": "value",
        "LINES": "first\nsecond\n\nlast\n",
        "SIGNS": "a=b=c==",
        "EMPTY": "",
        "UNICODE": "schlüssel \U0001f511 \u2028",
        "QUOTES": "\"'`$(touch pwned)\\",
    }

    def start(self, start: Starter, command: str = "cat /proc/$$/environ", **options: Any) -> Job:
        return start(command, handover="stdin", stdin=subprocess.PIPE, **options)

    @staticmethod
    def send(job: Job, data: bytes, *, close: bool = True) -> None:
        assert job.process.stdin
        with suppress(BrokenPipeError):  # it did not wait for all of that
            job.process.stdin.write(data)
            job.process.stdin.flush()
            if close:
                job.process.stdin.close()

    @ESSENTIAL
    def test_secrets_reach_the_command_as_they_are(self, start: Starter) -> None:
        job = self.start(start)
        self.send(job, handover(self.SECRETS))
        job.wait()
        seen = dict(entry.split(b"=", 1) for entry in job.output.split(b"\0")[:-1])
        assert {name: seen[name.encode()].decode() for name in self.SECRETS} == self.SECRETS

    def test_each_attempt_has_them(self, start: Starter) -> None:
        job = self.start(start, 'echo "$PLAIN"; exit 1', retries=1, retry_delay=0.05)
        self.send(job, handover(self.SECRETS))
        job.wait()
        assert job.output == b"value\nvalue\n"

    def test_they_replace_what_was_inherited(self, start: Starter) -> None:
        job = self.start(start, 'echo "$PLAIN"', environment={"PLAIN": "inherited"})
        self.send(job, handover(self.SECRETS))
        job.wait()
        assert job.output == b"value\n"

    def test_none_at_all_is_the_word_to_start(self, start: Starter) -> None:
        job = self.start(start, "echo ran")
        self.send(job, handover({}))
        assert job.wait()["exit_code"] == 0
        assert job.output == b"ran\n"

    def test_a_megabyte_arrives(self, start: Starter) -> None:
        secrets = {f"SECRET_{number}": f"{number}:" + "x" * 10_000 for number in range(100)}
        job = self.start(start)
        self.send(job, handover(secrets))
        assert job.wait()["exit_code"] == 0
        seen = dict(entry.split(b"=", 1) for entry in job.output.split(b"\0")[:-1])
        assert all(seen[name.encode()].decode() == value for name, value in secrets.items())

    def test_what_no_process_can_carry_fails_the_set_up(self, start: Starter) -> None:
        job = self.start(start, "echo ran", retries=3, retry_delay=0.05)
        self.send(job, handover({"HUGE": "x" * 1_000_000}))
        ended = job.wait()
        assert ended["reason"] == "SETUP_FAILED"
        assert "too long" in ended["message"]
        assert job.events("started") == []

    @pytest.mark.parametrize("part", ["nothing", "a-head", "half", "all-but-a-byte", "too-much", "nonsense", "no-pair"])
    def test_a_client_gone_too_early_leaves_a_lost_job_that_never_ran(self, start: Starter, part: str) -> None:
        whole = handover(self.SECRETS)
        data = {
            "nothing": b"",
            "a-head": whole[:2],
            "half": whole[: len(whole) // 2],
            "all-but-a-byte": whole[:-1],
            "too-much": whole + b"x",
            "nonsense": b"nonsense\nA=B\0",
            "no-pair": b"5\nnone\0",
        }[part]
        job = self.start(start, 'touch "$HERE/ran"')
        self.send(job, data)
        ended = job.wait()
        assert (ended["reason"], ended.get("exit_code")) == ("LOST", None)
        assert ended["message"]
        assert job.events("started") == []
        assert not (job.directory / "ran").exists()

    def test_nothing_starts_before_the_word(self, start: Starter) -> None:
        job = self.start(start, "echo ran")
        self.send(job, handover(self.SECRETS), close=False)
        # What follows a stop would be the start, had the runner taken the last byte for the word.
        job.ask_to_stop()
        ended = job.wait()
        assert (ended["reason"], job.output) == ("STOPPED_BY_USER", b"")
        assert job.events("started") == []

    @pytest.mark.parametrize("part", ["nothing", "half", "all"])
    def test_a_client_that_stalls_is_waited_for_so_long(self, start: Starter, part: str) -> None:
        whole = handover(self.SECRETS)
        job = self.start(start, 'touch "$HERE/ran"', handover_timeout=0.2)
        self.send(job, {"nothing": b"", "half": whole[: len(whole) // 2], "all": whole}[part], close=False)
        assert job.wait()["reason"] == "LOST"
        assert not (job.directory / "ran").exists()

    def test_without_its_permit_a_job_is_stopped_rather_than_lost(self, start: Starter) -> None:
        job = self.start(start, "echo ran", permit="/nonexistent/permit")
        self.send(job, b"")
        assert job.wait()["reason"] == "STOPPED_BY_USER"

    @ESSENTIAL_AS_CHILD
    @pytest.mark.parametrize("detach", [None, "yes"], ids=["attached", "detached"])
    def test_no_process_of_the_runner_shows_them(self, start: Starter, detach: str | None) -> None:
        secret = "correct-horse-battery-staple"
        job = self.start(start, f'[ "$SECRET" ] && echo has it; {WAIT}', detach=detach)
        self.send(job, handover({"SECRET": secret}))
        job.wait_for_output(b"has it")
        seen = job.event("supervised")
        (command,) = (pid for pid in job.members() if pid == job.event("started")["pid"])
        assert b"SECRET=" + secret.encode() in environment_of(command)
        for pid in [seen["pid"], *([seen["guard"]] if detach else [])]:
            assert secret not in Path(f"/proc/{pid}/environ").read_text()
        for pid in [seen["pid"], command, *([seen["guard"]] if detach else [])]:
            assert secret not in Path(f"/proc/{pid}/cmdline").read_text()
        job.release()
        job.ended()
        for name in ("journal", "output", "stderr"):
            assert secret not in (job.directory / name).read_text()


class TestSurroundings:
    """What the command finds itself in."""

    @ESSENTIAL
    @pytest.mark.parametrize("caller_ignores", [False, True], ids=["plain", "caller-ignores"])
    def test_signals_do_what_they_do_by_default(self, start: Starter, caller_ignores: bool) -> None:
        names = ("HUP", "INT", "QUIT", "PIPE", "TERM", "CHLD", "XFSZ")
        job = start(
            'grep -E "^Sig(Blk|Ign)" /proc/self/status; (yes; echo "yes: $?" >&2) | head -n 1',
            wrapper=_ignoring(*(signal.Signals[f"SIG{name}"] for name in names)) if caller_ignores else [],
        )
        job.wait()
        lines = job.output.decode().splitlines()
        libc_own = 1 << 31 | 1 << 32  # signals 32 and 33 belong to the C library, which lets nobody set them
        assert [int(line.split()[1], 16) & ~libc_own for line in lines[:2]] == [0, 0]
        assert sorted(lines[2:]) == ["y", f"yes: {128 + signal.SIGPIPE}"]

    @ESSENTIAL
    def test_it_has_three_descriptors_and_no_input(self, start: Starter) -> None:
        directory = start.new_directory()
        fds = [os.open(directory / name, os.O_RDWR | os.O_CREAT) for name in ("journal", "output", "lock")]
        job = start(
            "ls /proc/$$/fd; readlink /proc/$$/fd/0; cat",
            directory=directory,
            journal=f"fd:{fds[0]}",
            output=f"fd:{fds[1]}",
            hold=fds[2],
            pass_fds=fds,
        )
        for fd in fds:
            os.close(fd)
        job.wait()
        assert job.output == b"0\n1\n2\n/dev/null\n"

    @pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&-", "<&- >&- 2>&-"])
    def test_a_caller_may_have_closed_the_standard_descriptors(self, start: Starter, closed: str) -> None:
        job = start(
            "ls /proc/$$/fd; echo err >&2; exit 3",
            wrapper=["sh", "-c", f'exec "$@" {closed}', "sh"],
            retries=1,
            retry_delay=0.05,
        )
        assert job.wait()["exit_code"] == 3
        assert job.output == b"0\n1\n2\nerr\n" * 2
        job = start(
            "true",
            directory=start.new_directory(),
            wrapper=["sh", "-c", f'exec "$@" {closed}', "sh"],
            more=["--directory", "/nonexistent"],
        )
        assert job.wait()["reason"] == "SETUP_FAILED"

    def test_its_umask_is_the_callers(self, start: Starter) -> None:
        job = start("umask", wrapper=["sh", "-c", 'umask 027; exec "$@"', "sh"])
        job.wait()
        assert job.output == b"0027\n"

    def test_its_environment_is_the_runners_and_the_attempt(self, start: Starter) -> None:
        job = start("cat /proc/$$/environ", environment={"ODD": "a=b\nc", "FRAY_ATTEMPT": "99"}, wrapper=["env"])
        job.wait()
        seen = set(job.output.split(b"\0")[:-1])
        expected = {name: value for name, value in os.environ.items() if name != "FRAY_ATTEMPT"}
        expected |= {"ODD": "a=b\nc", "FRAY_ATTEMPT": "1", "HERE": str(job.directory)}
        assert seen == {os.fsencode(f"{name}={value}") for name, value in expected.items()} | {job.marker.encode()}

    def test_it_leads_a_session_of_its_own(self, start: Starter) -> None:
        job = start("cut -d ' ' -f 1,5,6 /proc/$$/stat")
        job.wait()
        own, group, session = job.output.split()
        assert own == group == session

    def test_it_runs_in_the_directory(self, start: Starter) -> None:
        directory = start.new_directory()
        inside = directory / "in side é"
        inside.mkdir()
        job = start("pwd -P", directory=directory, more=["--directory", str(inside)])
        job.wait()
        assert job.output.decode() == f"{inside.resolve()}\n"

    @ESSENTIAL
    def test_a_missing_directory_fails_the_set_up(self, start: Starter) -> None:
        job = start('touch "$HERE/ran"', more=["--directory", '/nonexistent/é"\\\n'], retries=3, retry_delay=0.05)
        ended = job.wait()
        assert (ended["reason"], ended.get("exit_code")) == ("SETUP_FAILED", None)
        assert '/nonexistent/é"\\\n' in ended["message"]
        assert [event["event"] for event in job.events()] == ["supervised", "ended"]
        assert not (job.directory / "ran").exists()

    def test_a_directory_that_is_a_file_fails_the_set_up(self, start: Starter) -> None:
        assert start("true", more=["--directory", "/etc/passwd"]).wait()["reason"] == "SETUP_FAILED"


class TestHold:
    def test_the_lock_is_held_until_the_last_of_the_tree_is_gone(self, start: Starter) -> None:
        directory = start.new_directory()
        with _Lock(directory / "lock") as lock:
            left = as_role("left", DEAF, before="setsid")
            job = start(f"({left} &); {WAIT}", directory=directory, grace=0.2, hold=lock.fd, pass_fds=[lock.fd])
            lock.hand_on()
            job.wait_for_output(b"ready")
            assert not lock.take()
            job.release()
            until(lock.take, "the lock")
            assert job.processes("left") == []
            assert job.events("ended")

    def test_several_may_be_held(self, start: Starter) -> None:
        directory = start.new_directory()
        with _Lock(directory / "one") as one, _Lock(directory / "two") as two:
            job = start(WAIT, directory=directory, more=["--hold", str(one.fd)], hold=two.fd, pass_fds=[one.fd, two.fd])
            one.hand_on()
            two.hand_on()
            job.event("started")
            assert not one.take()
            assert not two.take()
            job.release()
            until(one.take, "the first lock")
            until(two.take, "the second lock")


class TestDetach:
    @staticmethod
    def start(start: Starter, command: str, **options: Any) -> Job:
        job = start(command, detach="yes", **options)
        assert job.process.wait(60) == 0
        return job

    @AS_CHILD
    def test_the_caller_gets_away_at_once_and_the_job_goes_on(self, start: Starter) -> None:
        job = self.start(start, f"{WAIT}; echo done; exit 6")
        assert job.events("exited") == []
        supervised = job.event("supervised")
        assert supervised["guard"] not in (supervised["pid"], job.process.pid, None)
        job.release()
        assert job.ended()["exit_code"] == 6
        assert job.output == b"done\n"
        until(lambda: not job.processes(), "the guard's end")

    @AS_CHILD
    @pytest.mark.parametrize("whom", ["pid", "guard"])
    def test_it_can_be_stopped(self, start: Starter, whom: str) -> None:
        job = self.start(start, f"trap 'exit 0' TERM; echo ready; {FOREVER}")
        job.wait_for_output(b"ready")
        os.kill(job.event("supervised")[whom], signal.SIGTERM)
        assert job.ended()["reason"] == "STOPPED_BY_USER"
        until(lambda: not job.processes(), "the guard's end")

    @AS_CHILD
    def test_its_secrets_are_handed_over_behind_the_callers_back(self, start: Starter) -> None:
        job = start('echo "$SECRET"', detach="yes", handover="stdin", stdin=subprocess.PIPE)
        assert job.process.wait(60) == 0
        TestHandover.send(job, handover({"SECRET": "late"}))
        assert job.ended()["exit_code"] == 0
        assert job.output == b"late\n"

    @ESSENTIAL_AS_CHILD
    @pytest.mark.parametrize("ignored", [False, True], ids=["plain", "caller-ignores-children"])
    def test_the_guard_kills_the_whole_tree_of_a_killed_runner(self, start: Starter, ignored: bool) -> None:
        directory = start.new_directory()
        with _Lock(directory / "lock") as lock:
            left = as_role("left", DEAF, before="setsid")
            job = self.start(
                start,
                f"({left} &); {left} & {as_role('left', DEAF)} & {FOREVER}",
                directory=directory,
                hold=lock.fd,
                pass_fds=[lock.fd],
                grace=600,
                wrapper=_ignoring(signal.SIGCHLD) if ignored else [],
            )
            lock.hand_on()
            job.wait_for_output(b"ready", 3)
            assert not lock.take()
            os.kill(job.event("supervised")["pid"], signal.SIGKILL)
            until(lock.take, "the lock")
            guard = job.event("supervised")["guard"]
            assert [pid for pid in job.processes() if pid != guard] == []
        assert job.events("ended") == []

    @AS_CHILD
    def test_the_job_goes_on_without_its_guard(self, start: Starter) -> None:
        job = self.start(start, f"{WAIT}; echo done")
        job.event("started")
        guard = job.event("supervised")["guard"]
        os.kill(guard, signal.SIGKILL)
        until(lambda: not environment_of(guard), "the guard's end")
        job.release()
        assert job.ended()["exit_code"] == 0
        assert job.output == b"done\n"

    @AS_CHILD
    @pytest.mark.parametrize("when", ["running", "between attempts", "before the handover"])
    def test_whoever_lets_go_of_the_leash_kills_all_of_it(self, start: Starter, when: str) -> None:
        leash, other_end = os.pipe()
        options: dict[str, Any] = {"leash": leash, "pass_fds": [leash], "grace": 600}
        if when == "running":
            left = as_role("left", DEAF, before="setsid")
            job = self.start(start, f"({left} &); {left} & {as_role('left', DEAF)} & {FOREVER}", **options)
            job.wait_for_output(b"ready", 3)
        elif when == "between attempts":
            job = self.start(start, "exit 1", retries=1, retry_delay=600, **options)
            job.event("exited")
        else:
            job = start("echo never", detach="yes", handover="stdin", stdin=subprocess.PIPE, **options)
            assert job.process.wait(60) == 0
            job.event("supervised")
        os.close(leash)
        os.close(other_end)
        until(lambda: not job.processes(), "the end of all")
        assert job.events("ended") == []
        assert b"never" not in job.output

    @AS_CHILD
    def test_it_does_not_keep_the_callers_directory_busy(self, start: Starter) -> None:
        job = self.start(start, f"pwd; {WAIT}")
        job.event("started")
        supervised = job.event("supervised")
        assert {os.readlink(f"/proc/{supervised[who]}/cwd") for who in ("pid", "guard")} == {"/"}
        job.release()
        job.ended()


class TestProgram:
    @pytest.mark.parametrize(
        "change",
        [
            {"command": None},
            {"journal": None},
            {"output": None},
            {"more": ["--no-such-option", "1"]},
            {"more": ["stray"]},
            {"more": ["--grace", "soon"]},
            {"more": ["--timeout", ""]},
            {"more": ["--retries", "1.5"]},
            {"more": ["--hold", "lock"]},
            {"more": ["--detach", "perhaps"]},
            {"more": ["--handover", "stdout"]},
        ],
        ids=lambda change: "=".join(change.get("more", [*change, ""])),
    )
    def test_bad_options_are_refused_and_nothing_is_run(self, start: Starter, change: dict[str, Any]) -> None:
        job = start(**{"command": 'touch "$HERE/ran"', **change})
        assert job.process.wait(60) == 64
        assert "fray runner:" in job.said
        assert "Traceback" not in job.said
        assert job.journal == b""
        assert not (job.directory / "ran").exists()

    def test_more_than_one_command_is_refused(self, start: Starter) -> None:
        job = start("true", more=["--", 'touch "$HERE/ran"'])
        assert job.process.wait(60) == 64
        assert not (job.directory / "ran").exists()

    @PYTHON_AS_CHILD
    def test_warnings_are_no_trouble(self, start: Starter) -> None:
        job = start(
            f'[ "$FRAY_ATTEMPT" = 2 ] || exit 1; {as_role("left", DEAF)} & {FOREVER}',
            flags=["-W", "error"],
            handover="stdin",
            stdin=subprocess.PIPE,
            detach="yes",
            retries=1,
            retry_delay=0.01,
            timeout=60,
            grace=0.1,
        )
        TestHandover.send(job, handover({"A": "B"}))
        job.wait_for_output(b"ready")
        os.kill(job.event("supervised")["pid"], signal.SIGTERM)
        assert job.ended()["reason"] == "STOPPED_BY_USER"
        until(lambda: not job.processes(), "the guard's end")
        assert job.said == ""

    @PYTHON_AS_CHILD
    def test_it_imports_next_to_nothing(self, start: Starter) -> None:
        job = start(
            f'[ "$FRAY_ATTEMPT" = 2 ] || exit 1; {as_role("left", DEAF)} & {FOREVER}',
            flags=["-X", "importtime"],
            handover="stdin",
            stdin=subprocess.PIPE,
            retries=1,
            retry_delay=0.01,
            timeout=60,
            grace=0.1,
        )
        TestHandover.send(job, handover({"A": "B"}))
        job.wait_for_output(b"ready")
        job.ask_to_stop()
        job.wait()
        imported = {line.rsplit("|", 1)[1].strip() for line in job.said.splitlines() if line.startswith("import time:")}
        assert "select" in imported
        # What Python itself needs to start: its codecs, and `io` for the standard streams.
        bare = {"_io", "io", "abc", "_abc", "marshal", "posix", "zipimport", "time", "winreg", "site", "stat", "_stat"}
        bare |= {"_frozen_importlib_external", "_imp", "_thread", "_warnings", "_weakref", "codecs", "_codecs"}
        own = {"imported package", "select", "sys", "_signal", "_ctypes", "_locale"}
        assert {name for name in imported if not name.startswith("encodings")} <= bare | own


class TestRandomTrees:
    """Random trees with random manners, stopped at random moments: nothing is left, and the end is the right one."""

    @pytest.mark.parametrize("seed", range(10))
    def test_random_trees(self, start: Starter, seed: int) -> None:
        _run_random_tree(start, seed)

    @pytest.mark.soak
    @pytest.mark.skipif(not SOAK_ROUNDS, reason="a soak: FRAY_SOAK gives the number of rounds")
    def test_many_random_trees(self, start: Starter) -> None:
        for seed in range(10, 10 + 10 * SOAK_ROUNDS):
            _run_random_tree(start, seed)


def _run_random_tree(start: Starter, seed: int) -> None:
    rng = random.Random(seed)
    directory = start.new_directory()
    count = rng.randint(1, 12)
    for number in range(count):
        (directory / f"node{number}").write_text(_random_node(rng, number, count))
    timeout = rng.choice([None, None, 0.3])
    retries = rng.choice([0, 0, 2])
    job = start(
        '. "$HERE/node0"',
        directory=directory,
        grace=rng.choice([0, 0.05, 0.2]),
        timeout=timeout,
        retries=retries,
        retry_delay=0.02,
    )
    job.event("supervised")
    moment = rng.choice(["at once", "some nodes", "some nodes", "exit", "never"])
    if moment == "some nodes":
        wanted = rng.randint(1, count)
        until(lambda: job.output.count(b"node") >= wanted or job.process.poll() is not None, "nodes")
    elif moment == "exit":
        job.release()
        until(lambda: _final_exit(job) or job.process.poll() is not None, "the exit")
    elif moment == "never":
        job.release()
    exit_was_first = _final_exit(job)
    if moment != "never" and job.process.poll() is None:
        # It may just have ended.
        pids = children_of(job.process.pid) if start.is_init else [job.process.pid]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, rng.choice([signal.SIGTERM, signal.SIGINT]))
    job.release()
    ended = job.wait()  # which checks that nothing is left, and the journal's form
    names = [event["event"] for event in job.events()]
    reason = ended.get("reason")
    note = f"seed {seed}, {moment}, {job.events()}"
    if exit_was_first or moment == "never":
        assert reason != "STOPPED_BY_USER", note
    if "stopping" in names:
        assert reason == job.events("stopping")[0]["reason"], note
        assert reason in ("STOPPED_BY_USER", "TIMED_OUT"), note
        assert names.index("stopping") > max(i for i, name in enumerate(names) if name == "started"), note
    elif _final_exit(job):
        assert reason == _final_exit(job)[-1].get("reason"), note
    elif names == ["supervised", "ended"]:
        assert reason == "STOPPED_BY_USER", note


def _final_exit(job: Job) -> list[dict[str, Any]]:
    """The exit that no attempt follows, recorded before anyone asked to stop."""
    events = job.events()
    if any(event["event"] == "stopping" for event in events):
        return []
    return [event for event in events if event["event"] == "exited" and "retry_in" not in event]


def _random_node(rng: random.Random, number: int, count: int) -> str:
    lines = [
        rng.choice(
            [
                "",
                "trap '' TERM",
                "trap '' TERM INT HUP",
                "trap 'exit 0' TERM",
                "trap 'exit 9' TERM",
                "trap : TERM",
                "trap 'setsid sleep 1000 & exit 0' TERM",
            ]
        )
    ]
    # Node 0 is the command itself; each node has children of higher numbers only.
    for child in range(number + 1, count):
        if rng.random() < 1.5 / (child - number):
            launch = f'{rng.choice(["", "setsid ", "nohup ", "setsid nohup "])}sh "$HERE/node{child}"'
            lines.append(rng.choice([f"{launch} &", f"({launch} &)", f"{launch} >/dev/null 2>&1 &"]))
    lines.append(f"echo node{number}")
    if number == 0:
        lines += [WAIT, f"exit {rng.choice([0, 0, 1, 5, 127])}"]
    else:
        lines.append(
            rng.choice([FOREVER, "wait", "exit 0", "exec sleep 1000", "kill -STOP $$", "kill -KILL $$", "sleep 0.1"])
        )
    return "\n".join(lines) + "\n"


class _Lock:
    """A lock that a job is to hold, as a backend gives it; a context manager."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        self._path = path
        self._own = -1

    def __enter__(self) -> _Lock:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in (self.fd, self._own):
            if fd >= 0:
                os.close(fd)

    def hand_on(self) -> None:
        """Leave the lock to whoever inherited it."""
        os.close(self.fd)
        self.fd = -1
        self._own = os.open(self._path, os.O_RDWR)

    def take(self) -> bool:
        """Take the lock back if it is free."""
        try:
            fcntl.flock(self._own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _ignoring(*numbers: int) -> list[str]:
    """What starts a program with these signals ignored, as a caller may (a shell cannot for all of them)."""
    ignore = "for number in map(int, sys.argv[1].split()): signal.signal(number, signal.SIG_IGN)"
    become = f"import os, signal, sys\n{ignore}\nos.execvp(sys.argv[2], sys.argv[2:])"
    return [sys.executable, "-c", become, " ".join(str(int(number)) for number in numbers)]


def _is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_bytes().rsplit(b")", 1)[1].split()[0] == b"T"


def _on_a_full_disk(start: Starter, command: str, *, keep: int = 16384) -> str:
    """A program that starts the runner on a disk of its own, where only the journal has some space left."""
    argv = start.setting.runner.argv(start.new_directory())
    return f"""
import json, os, subprocess, sys, time
disk = sys.argv[1] + "/disk"
ran = sys.argv[1] + "/ran"
os.mkdir(disk)
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=True)
with open(disk + "/journal", "wb") as journal:
    journal.write(bytes({keep}))
open(disk + "/output", "wb").close()
with open(disk + "/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
runner = subprocess.Popen(
    {argv!r} + ["--journal", disk + "/journal", "--output", disk + "/output", "--", {command!r}],
    stderr=subprocess.DEVNULL, env=dict(os.environ, RAN=ran),
)

def children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return file.read()

def read_journal():
    with open(disk + "/journal") as file:
        return file.read()

def wait_for(condition):
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)

def finish():
    assert runner.wait(60) == 0
    print(read_journal().rstrip(chr(0)), end="")

"""
