"""The conformance suite of tier 1: the fifteen rules of the contract, as tests that any backend can run.

A backend's author fills in a `ClusterHarness`, subclasses `ClusterConformance` with a fixture `harness` that gives
one, and runs pytest. Each check cites its rule (`docs/contract.md`); a failing one says which rule is broken. Nothing
is skipped: where a capability is missing, the check becomes the one that the option is refused.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import pytest

import fray
from fray.cluster import ClusterContext
from fray.errors import (
    InvalidTypeError,
    InvalidValueError,
    JobExistsError,
    JobFailedError,
    JobNotFinishedError,
    JobNotFoundError,
    PlatformError,
    UnsupportedError,
    WaitTimeoutError,
)
from fray.types import JobInfo, JobStatus, Resource, RuntimeEnv, TerminationReason

__all__ = ["ClusterConformance", "ClusterHarness", "cites"]

# What a fresh process may take before it comes to its program, in which there are deadlines of their own.
_START_SECONDS = 30.0

Check = TypeVar("Check", bound=Callable[..., None])
T = TypeVar("T")


def cites(rule: int) -> Callable[[Check], Check]:
    """Mark a check with the rule of the contract that it proves; its failures name the rule."""

    def mark(check: Check) -> Check:
        @functools.wraps(check)
        def checked(*args: Any, **kwargs: Any) -> None:
            try:
                check(*args, **kwargs)
            except (Exception, pytest.fail.Exception) as error:  # what pytest.raises raises is no Exception
                error.add_note(f"This breaks rule {rule} of the contract.")
                raise

        checked.rule = rule  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return mark


class ClusterHarness(ABC):
    """What the suite must be told of a backend. A context manager that closes what it opened.

    @plugin-dev: one harness serves one test; give each a cluster of its own, or one whose other jobs do not matter.

    Attributes:
        spec: How `fray.connect` reaches the cluster, from a fresh process too.
        options: Options for `fray.connect`; a `grace_seconds` of a few seconds keeps the suite fast.
        has_python: Whether a job finds a `python` of 3.11 or newer; else only a shell is relied on. Rule 15 is put to
            the test by one in which Fray is not installed.
        ships_working_dir: Whether jobs get a snapshot of the working directory; else they run in place.
        requirement: A small distribution that can be installed there, and the module that it brings.
        deadline_seconds: How long the suite waits for anything before it is a failure.
    """

    spec: str
    options: dict[str, Any] = {}  # noqa: RUF012 - a default that a subclass replaces
    has_python: bool = True
    ships_working_dir: bool = False
    requirement: tuple[str, str] = ("six", "six")
    deadline_seconds: float = 60.0

    def __init__(self) -> None:
        self._clusters: list[ClusterContext] = []

    def connect(self) -> ClusterContext:
        """Return a client of its own for this cluster."""
        cluster = fray.connect(self.spec, **self.options)
        self._clusters.append(cluster)
        return cluster

    @functools.cached_property
    def cluster(self) -> ClusterContext:
        """The client that most checks use."""
        return self.connect()

    @abstractmethod
    def hold_pending(self) -> AbstractContextManager[RuntimeEnv]:
        """Give a `RuntimeEnv` with which a job stays PENDING as long as the context is open."""

    @abstractmethod
    def kill_supervision(self, job_id: str) -> None:
        """Kill what supervises a running job, as the kernel would when memory is short: at once, unasked."""

    @abstractmethod
    def observable(self) -> Iterator[tuple[str, bytes]]:
        """Yield all that others can see or that outlives a job, as (where, content): files, arguments, answers."""

    def interrupt_engine(self) -> AbstractContextManager[None]:
        """Have the engine go away while the context is open; nothing where there is no engine."""
        return nullcontext()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for cluster in self._clusters:
            for info in cluster.list_jobs():
                if not info.status.is_terminal:
                    cluster.delete_job(info.id)
            cluster.close()

    # What checks are written with

    def run(self, entrypoint: str, env: RuntimeEnv | None = None, **options: Any) -> JobInfo:
        """Submit a job and wait for its end."""
        return self.end(self.cluster.create_job(entrypoint, env, **options))

    def end(self, job_id: str, cluster: ClusterContext | None = None) -> JobInfo:
        """Wait for a job's end."""
        return (cluster or self.cluster).wait(job_id, self.deadline_seconds)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds."""
        deadline, pause = time.monotonic() + self.deadline_seconds, 0.005
        while not condition():
            assert time.monotonic() < deadline, f"not within {self.deadline_seconds} s: {what}"
            time.sleep(pause)
            pause = min(pause * 1.5, 0.2)

    def until_logged(self, job_id: str, text: bytes) -> None:
        """Wait until a job's log holds `text`."""
        self.until(lambda: text in self.cluster.read_logs(job_id), f"{text!r} in the log of {job_id}")

    def together(self, calls: Iterable[Callable[[], T]], what: str) -> list[Future[T]]:
        """Make calls at the same time, each in a thread of its own; return their outcomes when all are there."""
        outcomes: list[Future[T]] = []
        threads: list[threading.Thread] = []
        for call in calls:
            outcome: Future[T] = Future()
            outcomes.append(outcome)
            # A daemon, so that a call that never returns is a failure and does not hold up the rest of the suite.
            threads.append(threading.Thread(target=_settle, args=(outcome, call), daemon=True))
        for thread in threads:
            thread.start()
        late = wait_for_futures(outcomes, self.deadline_seconds).not_done
        assert not late, f"not within {self.deadline_seconds} s: {what}"
        return outcomes

    def soon(self, call: Callable[[], T], what: str) -> T:
        """Return what a call returns that may never do so."""
        return self.together([call], what)[0].result()

    def lines(self, job_id: str, **options: Any) -> list[str]:
        """Return all that `stream_logs` yields, which must come to an end."""
        return self.soon(lambda: list(self.cluster.stream_logs(job_id, **options)), f"the end of the log of {job_id}")

    def in_fresh_process(self, program: str, *, variables: dict[str, str] | None = None, kill: bool = False) -> str:
        """Run a program in a fresh client, with `cluster` connected; `kill` has it end by SIGKILL."""
        lines = [
            "import os, signal, sys, fray",
            f"cluster = fray.connect({self.spec!r}, **{self.options!r})",
            program,
            "sys.stdout.flush()",
            "os.kill(os.getpid(), signal.SIGKILL)" if kill else "",
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(variables or {})}
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=self.deadline_seconds + _START_SECONDS,
        )
        assert done.returncode == (-9 if kill else 0), done.stderr
        return done.stdout.strip()

    def later(self) -> None:
        """Let some time of the cluster's own pass: a short job comes and goes."""
        assert self.run("sleep 0.4").status is JobStatus.SUCCEEDED


def _settle(outcome: Future[T], call: Callable[[], T]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)


# Gives a sign of life every 0.05 s, deaf to SIGTERM and to the loss of its output: what must not outlive its job.
_DEAF_CHILD = (
    "trap '' TERM PIPE; while :; do echo tick; "
    '[ -z "$FRAY_OUTPUT_DIR" ] || echo >> "$FRAY_OUTPUT_DIR/beat"; sleep 0.05; done'
)

# Some time passes, in steps: a single sleep would be ended by the signal that the whole tree gets.
_LINGER = "i=0; while [ $i -lt 10 ]; do sleep 0.05; i=$((i+1)); done"


class ClusterConformance:
    """The suite: subclass it where a fixture `harness` gives the `ClusterHarness` of the backend under test."""

    # 1: acceptance

    @cites(1)
    def test_an_accepted_job_has_the_id_that_was_returned(self, harness: ClusterHarness) -> None:
        made_up, given = harness.cluster.create_job("true"), harness.cluster.create_job("true", job_id="Given_id-1")
        assert type(made_up) is str
        assert made_up.startswith("fray-")
        assert given == "Given_id-1"
        assert {made_up, given} <= {info.id for info in harness.cluster.list_jobs()}
        assert harness.end(given).entrypoint == "true"

    @cites(1)
    def test_an_accepted_job_is_seen_by_others_at_once(self, harness: ClusterHarness) -> None:
        other = harness.connect()
        for _ in range(5):
            job_id = harness.cluster.create_job("true")
            assert other.get_job(job_id).id == job_id
            assert job_id in [info.id for info in other.list_jobs()]

    @cites(1)
    def test_what_the_caller_changes_after_submitting_changes_nothing(self, harness: ClusterHarness) -> None:
        variables = {"GREETING": "as submitted"}
        with harness.hold_pending() as held:
            env = replace(held, env=variables)
            job_id = harness.cluster.create_job('echo "$GREETING"', env)
            variables["GREETING"] = env.env["GREETING"] = "changed"
        assert harness.end(job_id).status is JobStatus.SUCCEEDED
        assert harness.cluster.get_logs(job_id) == "as submitted\n"

    @cites(1)
    def test_a_failed_set_up_is_the_jobs_failure(self, harness: ClusterHarness) -> None:
        env = RuntimeEnv(["no-such-distribution-4f1c"])
        if not harness.cluster.capabilities.package_requirements:
            self._refused(harness, env=env)
            return
        info = harness.run("echo ran-4f1c", env)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
        assert (info.exit_code, info.start_time, info.attempts) == (None, None, ())
        assert "no-such-distribution-4f1c" in harness.cluster.get_logs(info.id), "the tool's own words are in the log"
        assert "ran-4f1c" not in harness.cluster.get_logs(info.id)

    @cites(1)
    def test_planning_has_no_effect(self, harness: ClusterHarness) -> None:
        before = [info.id for info in harness.cluster.list_jobs()]
        plan = harness.cluster.plan_job("echo planned", job_id="planned")
        assert json.loads(str(plan))["entrypoint"] == "echo planned"
        assert [info.id for info in harness.cluster.list_jobs()] == before

    # 2: what a command does is the job's outcome

    @cites(2)
    @pytest.mark.parametrize("code", [0, 1, 3, 126, 127, 255])
    def test_the_exit_code_is_the_commands(self, harness: ClusterHarness, code: int) -> None:
        info = harness.run(f"exit {code}")
        assert info.exit_code == code
        assert info.status is (JobStatus.FAILED if code else JobStatus.SUCCEEDED)
        assert info.reason is (TerminationReason.EXITED if code else None)
        assert [attempt.exit_code for attempt in info.attempts] == [code]

    @cites(2)
    def test_a_missing_command_is_a_failed_job(self, harness: ClusterHarness) -> None:
        info = harness.run("no-such-command-4f1c --flag")
        assert (info.status, info.exit_code) == (JobStatus.FAILED, 127)
        assert b"no-such-command-4f1c" in harness.cluster.read_logs(info.id)

    @cites(2)
    @pytest.mark.parametrize(("name", "number"), [("KILL", 9), ("SEGV", 11), ("TERM", 15)])
    def test_a_signal_is_told_from_an_exit(self, harness: ClusterHarness, name: str, number: int) -> None:
        info = harness.run(f"kill -{name} $$")
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.KILLED)
        assert info.exit_code == 128 + number
        assert f"SIG{name}" in info.message

    @cites(2)
    @pytest.mark.parametrize(
        ("command", "output"),
        [
            ("echo 'a  b' \"c'd\" e\\ f", "a  b c'd e f\n"),
            ("echo one; echo two && echo three || echo four", "one\ntwo\nthree\n"),
            ("x=5\necho $((x * 2))\n", "10\n"),
            ("printf '%s|' '$HOME' \"`echo tick`\" '%d' '*'", "$HOME|tick|%d|*|"),
            ("# a comment\necho \u00fcml\u00e4ut \U0001f600", "\u00fcml\u00e4ut \U0001f600\n"),
            ("cat <<'END'\n  $not expanded\nEND\n", "  $not expanded\n"),
            ("-n 2>/dev/null || echo dash", "dash\n"),
        ],
    )
    def test_the_command_reaches_the_shell_unchanged(self, harness: ClusterHarness, command: str, output: str) -> None:
        info = harness.run(command)
        assert info.exit_code == 0, info
        assert harness.cluster.get_logs(info.id) == output
        assert info.entrypoint == command

    # 3: the end is final

    @cites(3)
    def test_nothing_changes_a_finished_job(self, harness: ClusterHarness) -> None:
        for command in ("true", "exit 4"):
            info = harness.run(command)
            harness.cluster.delete_job(info.id)
            harness.later()
            assert harness.cluster.get_job(info.id) == info
            assert harness.connect().get_job(info.id) == info
            assert info in harness.cluster.list_jobs()

    @cites(3)
    def test_times_are_in_order_and_real(self, harness: ClusterHarness) -> None:
        began = time.time()
        info = harness.run("sleep 0.3")
        assert info.start_time is not None
        assert info.end_time is not None
        assert info.submission_time <= info.start_time <= info.end_time
        assert abs(info.submission_time - began) < 60, "seconds since the epoch"
        assert info.end_time - info.start_time >= 0.25, "from the command's start to its end"
        attempt = info.attempts[0]
        assert attempt.end_time is not None
        assert info.start_time == attempt.start_time <= attempt.end_time <= info.end_time

    @cites(3)
    def test_a_job_is_not_over_before_its_processes_are(self, harness: ClusterHarness) -> None:
        left_behind = f"trap '{_LINGER}; echo cleaned up; exit' TERM; echo > up; while :; do sleep 0.05; done"
        up = "while ! [ -s up ]; do sleep 0.02; done"
        command = f"cd $(mktemp -d); sh -c {shlex.quote(left_behind)} & {up}; exit 5"
        info = harness.run(command)
        assert (info.exit_code, info.reason) == (5, TerminationReason.EXITED), "the command's exit decides"
        log = harness.cluster.read_logs(info.id)
        assert b"cleaned up" in log, "what is left of the tree gets SIGTERM"
        harness.later()
        assert harness.cluster.read_logs(info.id) == log

    # 4: stopping

    @cites(4)
    def test_a_deleted_job_is_stopped_and_keeps_its_record(self, harness: ClusterHarness) -> None:
        job_id = harness.cluster.create_job(
            "trap 'echo got TERM; exit 0' TERM; echo ready; while :; do sleep 0.05; done"
        )
        harness.until_logged(job_id, b"ready")
        harness.cluster.delete_job(job_id)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.STOPPED, TerminationReason.STOPPED_BY_USER)
        assert b"got TERM" in harness.cluster.read_logs(job_id)
        assert harness.cluster.get_job(job_id) == info

    @cites(4)
    def test_the_whole_tree_dies_with_its_job(self, harness: ClusterHarness, tmp_path: Path) -> None:
        child = shlex.quote(_DEAF_CHILD)
        job_id = harness.cluster.create_job(f"setsid sh -c {child} & (sh -c {child} &) ; echo ready; sleep 600")
        harness.until_logged(job_id, b"tick")
        harness.cluster.delete_job(job_id)
        assert harness.cluster.get_job(job_id).status is JobStatus.RUNNING, "delete_job returns while the job is dying"
        assert harness.end(job_id).status is JobStatus.STOPPED
        signs = self._signs_of_life(harness, job_id, tmp_path)
        harness.later()
        assert self._signs_of_life(harness, job_id, tmp_path) == signs, "a process of the job is still writing"

    @cites(4)
    def test_the_shells_death_does_not_cut_the_others_grace_short(self, harness: ClusterHarness) -> None:
        slow = f"trap '{_LINGER}; echo saved; exit' TERM; echo ready; while :; do sleep 0.05; done"
        job_id = harness.cluster.create_job(f"sh -c {shlex.quote(slow)} & wait")
        harness.until_logged(job_id, b"ready")
        harness.cluster.delete_job(job_id)
        assert harness.end(job_id).status is JobStatus.STOPPED
        assert b"saved" in harness.cluster.read_logs(job_id)

    @cites(4)
    def test_a_deleted_pending_job_never_runs(self, harness: ClusterHarness) -> None:
        with harness.hold_pending() as held:
            job_id = harness.cluster.create_job("echo ran", held)
            assert harness.cluster.get_job(job_id).status is JobStatus.PENDING
            harness.cluster.delete_job(job_id)
        info = harness.end(job_id)
        harness.later()
        assert (info.status, info.reason) == (JobStatus.STOPPED, TerminationReason.STOPPED_BY_USER)
        assert (info.start_time, info.exit_code, info.attempts) == (None, None, ())
        assert harness.cluster.read_logs(job_id) == b""

    @cites(4)
    def test_a_job_deleted_at_once_is_stopped(self, harness: ClusterHarness) -> None:
        for _ in range(5):
            job_id = harness.cluster.create_job("sleep 600")
            harness.cluster.delete_job(job_id)
            harness.cluster.delete_job(job_id)
            assert harness.end(job_id).status is JobStatus.STOPPED

    @cites(4)
    def test_an_unknown_job_is_not_found(self, harness: ClusterHarness, tmp_path: Path) -> None:
        cluster = harness.cluster
        calls: list[Callable[[], object]] = [
            lambda: cluster.delete_job("nobody"),
            lambda: cluster.get_job("nobody"),
            lambda: cluster.wait("nobody", 1),
            lambda: cluster.read_logs("nobody"),
            lambda: cluster.get_logs("nobody", tail=5),
            lambda: cluster.stream_logs("nobody"),
            lambda: cluster.purge_job("nobody"),
        ]
        if cluster.capabilities.outputs:
            calls.append(lambda: cluster.fetch_outputs("nobody", tmp_path))
        for call in calls:
            with pytest.raises(JobNotFoundError, match="nobody"):
                call()

    # 5: logs

    @cites(5)
    def test_the_log_is_the_exact_output(self, harness: ClusterHarness) -> None:
        octal = "".join(f"\\{value:03o}" for value in range(256))
        info = harness.run(f"printf '{octal}'; printf '\\r\\n\\n\\000end'")
        assert harness.cluster.read_logs(info.id) == bytes(range(256)) + b"\r\n\n\0end"
        assert harness.cluster.read_logs(info.id, 250) == bytes(range(250, 256)) + b"\r\n\n\0end"

    @cites(5)
    def test_stdout_and_stderr_are_one_stream_in_order(self, harness: ClusterHarness) -> None:
        command = "i=0; while [ $i -lt 200 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done"
        info = harness.run(command)
        expected = "".join(f"out {i}\nerr {i}\n" for i in range(200))
        assert harness.cluster.get_logs(info.id) == expected

    @cites(5)
    def test_reopening_stderr_loses_nothing(self, harness: ClusterHarness) -> None:
        info = harness.run("echo first; echo second > /dev/stderr; echo third > /dev/stdout; echo fourth")
        assert harness.cluster.get_logs(info.id) == "first\nsecond\nthird\nfourth\n"

    @cites(5)
    def test_lines_are_whole_and_the_last_needs_no_newline(self, harness: ClusterHarness) -> None:
        info = harness.run("printf 'a\\n\\nb\\377c\\r\\nlast'")
        assert harness.lines(info.id) == ["a", "", "b\ufffdc\r", "last"]
        assert harness.lines(info.id, tail=2) == ["b\ufffdc\r", "last"]
        assert harness.lines(info.id, tail=0) == []
        assert harness.cluster.get_logs(info.id, tail=1) == "last"
        assert harness.lines(info.id, tail=99, follow=False) == ["a", "", "b\ufffdc\r", "last"]

    @cites(5)
    def test_a_followed_log_comes_live_and_to_its_last_byte(self, harness: ClusterHarness) -> None:
        command = f"trap '{_LINGER}; printf bye; exit' TERM; echo ready; while :; do sleep 0.05; done"
        job_id = harness.cluster.create_job(command)
        lines = harness.cluster.stream_logs(job_id)
        assert harness.soon(lambda: next(lines, None), "a line of a job that runs") == "ready"
        assert harness.cluster.get_job(job_id).status is JobStatus.RUNNING, "the line came while the job ran"
        harness.cluster.delete_job(job_id)
        rest = harness.soon(lambda: list(lines), "the end of the log")
        assert rest[-1:] == ["bye"]  # some shells say first that what they waited for was terminated
        assert harness.cluster.get_job(job_id).status.is_terminal, "the log ends when the job does"

    @cites(5)
    def test_a_followed_log_survives_its_engine(self, harness: ClusterHarness) -> None:
        command = "i=0; while [ $i -lt 100 ]; do echo line $i; sleep 0.02; i=$((i+1)); done"
        lines = harness.cluster.stream_logs(harness.cluster.create_job(command))
        seen = [harness.soon(lambda: next(lines, None), "a line of a job that runs")]
        with harness.interrupt_engine():
            pass
        seen += harness.soon(lambda: list(lines), "the end of the log")
        assert seen == [f"line {i}" for i in range(100)]

    @cites(5)
    def test_a_very_long_line_is_one_line(self, harness: ClusterHarness) -> None:
        info = harness.run("head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end")
        lines = harness.lines(info.id)
        assert [len(line) for line in lines] == [3_000_000, 3]
        assert harness.cluster.get_logs(info.id, tail=1) == "end\n"

    @cites(5)
    def test_a_large_log_is_whole(self, harness: ClusterHarness) -> None:
        info = harness.run("i=0; while [ $i -lt 3000 ]; do printf '%0999d\\n' $i; i=$((i+1)); done")
        log = harness.cluster.read_logs(info.id)
        assert log == b"".join(b"%0999d\n" % i for i in range(3000))

    # 6: waiting

    @cites(6)
    def test_a_wait_ends_with_the_job_or_with_its_own_time(self, harness: ClusterHarness) -> None:
        job_id = harness.cluster.create_job("trap 'exit' TERM; echo ready; while :; do sleep 0.05; done")
        for timeout in (0, 0.2):
            with pytest.raises(WaitTimeoutError, match=job_id):
                harness.soon(functools.partial(harness.cluster.wait, job_id, timeout), "the end of a wait")
        harness.until_logged(job_id, b"ready")
        assert harness.cluster.get_job(job_id).status is JobStatus.RUNNING, "it goes on"
        harness.cluster.delete_job(job_id)
        assert harness.end(job_id).status is JobStatus.STOPPED
        assert harness.cluster.wait(job_id, 0).status is JobStatus.STOPPED, "over already"

    @cites(6)
    def test_a_wait_returns_the_final_record(self, harness: ClusterHarness) -> None:
        job_id = harness.cluster.create_job("echo working; sleep 0.2; exit 6")
        info = harness.end(job_id)
        assert info.status is JobStatus.FAILED
        assert info.end_time is not None
        with pytest.raises(JobFailedError, match=job_id) as failed:
            harness.cluster.wait(job_id, check=True)
        assert failed.value.info == info
        assert harness.cluster.wait(harness.cluster.create_job("true"), check=True).status is JobStatus.SUCCEEDED

    @cites(6)
    def test_many_wait_for_one(self, harness: ClusterHarness) -> None:
        job_id = harness.cluster.create_job("sleep 0.3; exit 7")
        clients = [harness.cluster, harness.connect(), harness.connect()]
        waits = harness.together(
            [functools.partial(harness.end, job_id, client) for client in clients], f"the end of all waits for {job_id}"
        )
        assert [wait.result().exit_code for wait in waits] == [7, 7, 7]

    # 7: jobs outlive clients

    @cites(7)
    def test_a_job_outlives_the_client_that_made_it(self, harness: ClusterHarness) -> None:
        program = "print(cluster.create_job('sleep 2; echo survived; exit 8'))"
        job_id = harness.in_fresh_process(program, kill=True)
        assert harness.end(job_id).exit_code == 8
        assert harness.cluster.get_logs(job_id) == "survived\n"

    @cites(7)
    def test_any_process_can_do_all_to_a_job(self, harness: ClusterHarness) -> None:
        job_id = harness.cluster.create_job("echo hello; sleep 600")
        harness.until_logged(job_id, b"hello")
        program = f"""
job_id = {job_id!r}
assert job_id in [info.id for info in cluster.list_jobs()]
assert cluster.get_logs(job_id) == "hello\\n"
assert cluster.get_job(job_id).status == "RUNNING"
cluster.delete_job(job_id)
print(cluster.wait(job_id, {harness.deadline_seconds}).status)
cluster.purge_job(job_id)
"""
        assert harness.in_fresh_process(program) == "STOPPED"
        with pytest.raises(JobNotFoundError):
            harness.cluster.get_job(job_id)

    @cites(7)
    def test_jobs_are_listed_newest_first(self, harness: ClusterHarness) -> None:
        ids = [harness.cluster.create_job("true" if number % 2 else "false") for number in range(4)]
        for job_id in ids:
            harness.end(job_id)
        listed = [info.id for info in harness.connect().list_jobs() if info.id in ids]
        assert listed == ids[::-1]
        assert [info.id for info in harness.cluster.list_jobs(limit=1)] == ids[-1:]
        failed = [info.id for info in harness.cluster.list_jobs(status=JobStatus.FAILED) if info.id in ids]
        assert failed == [ids[2], ids[0]]
        assert [info.id for info in harness.cluster.list_jobs(status=JobStatus.FAILED, limit=1)] == [ids[2]]
        assert harness.cluster.list_jobs(limit=0) == []

    @cites(7)
    def test_what_the_caller_attached_stays_with_the_job(self, harness: ClusterHarness) -> None:
        metadata = {"git": "abc123", "note": 'quotes " and\nnewlines \u00fc'}
        job_id = harness.cluster.create_job("true", metadata=metadata)
        info = harness.connect().get_job(job_id)
        assert info.metadata == metadata
        assert info.owner
        assert info["id"] == job_id
        assert harness.end(job_id)["status"] == "SUCCEEDED"

    @cites(7)
    def test_a_purged_job_leaves_nothing(self, harness: ClusterHarness) -> None:
        marker = f"marker-{uuid4().hex}"
        job_id = harness.cluster.create_job(f"echo {marker}; sleep 600", job_id="to-purge")
        with pytest.raises(JobNotFinishedError, match="to-purge"):
            harness.cluster.purge_job(job_id)
        harness.until_logged(job_id, marker.encode())
        harness.cluster.delete_job(job_id)
        harness.end(job_id)
        harness.cluster.purge_job(job_id)
        with pytest.raises(JobNotFoundError):
            harness.cluster.get_job(job_id)
        assert job_id not in [info.id for info in harness.cluster.list_jobs()]
        assert not [where for where, content in harness.observable() if marker.encode() in content]
        assert harness.run("true", job_id=job_id).status is JobStatus.SUCCEEDED, "the id is free again"

    # 8: lost jobs

    @cites(8)
    def test_a_job_whose_supervision_dies_is_lost(self, harness: ClusterHarness, tmp_path: Path) -> None:
        child = shlex.quote(_DEAF_CHILD)
        job_id = harness.cluster.create_job(f"setsid sh -c {child} & sh -c {child}")
        harness.until_logged(job_id, b"tick")
        harness.kill_supervision(job_id)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
        assert info.message
        assert info.end_time is not None
        signs = self._signs_of_life(harness, job_id, tmp_path)
        harness.later()
        assert self._signs_of_life(harness, job_id, tmp_path) == signs, "its processes run on unseen"
        assert harness.connect().get_job(job_id) == info

    # 9: one job for one id

    @cites(9)
    def test_an_id_is_used_once(self, harness: ClusterHarness) -> None:
        harness.cluster.create_job("exit 1", job_id="once")
        for _ in range(2):
            with pytest.raises(JobExistsError, match="once"):
                harness.connect().create_job("exit 1", job_id="once")
            harness.end("once")
        assert len([info for info in harness.cluster.list_jobs() if info.id == "once"]) == 1

    @cites(9)
    def test_the_same_request_is_adopted_in_any_state(self, harness: ClusterHarness) -> None:
        def submit(command: str = "echo ran; sleep 0.2", secret: str = "one", **options: Any) -> str:
            env = RuntimeEnv(env={"A": "1"}, secrets={"S": secret})
            return harness.connect().create_job(command, env, job_id="adopted", if_exists="adopt", **options)

        assert submit() == "adopted"
        assert submit(secret="two", metadata={"differs": "yes"}) == "adopted"
        harness.end("adopted")
        assert submit() == "adopted"
        assert harness.cluster.get_logs("adopted") == "ran\n", "it ran once"
        with pytest.raises(JobExistsError, match="adopted"):
            submit("echo another")
        with pytest.raises(InvalidValueError, match="job_id"):
            harness.cluster.create_job("true", if_exists="adopt")

    @cites(9)
    def test_of_racing_clients_one_wins(self, harness: ClusterHarness) -> None:
        clients = [harness.connect() for _ in range(4)]
        barrier = threading.Barrier(len(clients))

        def race(client: ClusterContext, job_id: str) -> str:
            barrier.wait()
            return client.create_job("echo ran", job_id=job_id)

        for turn in range(3):
            job_id = f"race-{turn}"
            entries = [functools.partial(race, client, job_id) for client in clients]
            errors = [outcome.exception() for outcome in harness.together(entries, "the end of a race")]
            assert sorted(type(error).__name__ for error in errors) == 3 * ["JobExistsError"] + ["NoneType"]
            assert harness.end(job_id).status is JobStatus.SUCCEEDED
            assert harness.cluster.get_logs(job_id) == "ran\n"
            assert len([info for info in harness.cluster.list_jobs() if info.id == job_id]) == 1

    # 10: the job's environment

    @cites(10)
    def test_a_job_sees_its_variables(self, harness: ClusterHarness) -> None:
        trap = "a 'b' \"c\" $HOME `x` \\ %s\nsecond line \u00fc"
        env = RuntimeEnv(env={"PLAIN": trap, "EMPTY": ""}, secrets={"HIDDEN": trap})
        info = harness.run('printf "%s|" "$PLAIN" "$HIDDEN" "${EMPTY-unset}" "$FRAY_JOB_ID" "$FRAY_ATTEMPT"', env)
        assert harness.cluster.get_logs(info.id) == f"{trap}|{trap}||{info.id}|1|"

    @cites(10)
    def test_a_job_sees_frays_own_variables(self, harness: ClusterHarness) -> None:
        has = harness.cluster.capabilities
        names = {
            "FRAY_OUTPUT_DIR": has.outputs,
            "FRAY_JOB_CONTEXT": has.task_context,
            "FRAY_CLUSTER": has.nested_jobs,
        }
        info = harness.run("env | grep ^FRAY_ | cut -d= -f1 | sort")
        seen = harness.cluster.get_logs(info.id).split()
        assert {"FRAY_ATTEMPT", "FRAY_JOB_ID", *(name for name, there in names.items() if there)} <= set(seen)

    @cites(10)
    def test_an_enclosing_jobs_variables_are_replaced(self, harness: ClusterHarness) -> None:
        names = ("FRAY_JOB_ID", "FRAY_ATTEMPT", "FRAY_OUTPUT_DIR", "FRAY_JOB_CONTEXT", "FRAY_CLUSTER")
        outer: dict[str, str] = dict.fromkeys(names, "/outer")
        program = "print(cluster.create_job('env | grep ^FRAY_'))"
        job_id = harness.in_fresh_process(program, variables=outer)
        harness.end(job_id)
        log = harness.cluster.get_logs(job_id)
        assert f"FRAY_JOB_ID={job_id}\n" in log
        assert "FRAY_ATTEMPT=1\n" in log
        assert "outer" not in log

    @cites(10)
    def test_frays_own_names_are_refused(self, harness: ClusterHarness) -> None:
        for wrong in ({"env": {"FRAY_JOB_ID": "x"}}, {"secrets": {"FRAY_NEW": "x"}}):
            with pytest.raises(InvalidValueError, match="FRAY_"):
                harness.cluster.create_job("true", RuntimeEnv(**wrong))  # type: ignore[arg-type]
        with pytest.raises(InvalidValueError, match="TWICE"):
            RuntimeEnv(env={"TWICE": "1"}, secrets={"TWICE": "2"})

    @cites(10)
    def test_a_job_reaches_its_cluster_or_is_told_why_not(self, harness: ClusterHarness) -> None:
        if not harness.has_python:
            return
        program = (
            "import fray, os\n"
            "with fray.connect() as cluster: print('me:', cluster.get_job(os.environ['FRAY_JOB_ID']).status)"
        )
        info = harness.run(f"python -c {shlex.quote(program)}")
        log = harness.cluster.get_logs(info.id)
        if harness.cluster.capabilities.nested_jobs:
            assert log == "me: RUNNING\n"
        else:
            assert info.status is JobStatus.FAILED
            assert "fray.errors." in log, "connect() says why it cannot"

    @cites(10)
    def test_a_nested_job_outlives_the_job_that_made_it(self, harness: ClusterHarness) -> None:
        if not (harness.has_python and harness.cluster.capabilities.nested_jobs):
            return
        program = "import fray; print(fray.connect().create_job('sleep 2; echo nested; exit 9'))"
        outer = harness.run(f"python -c {shlex.quote(program)}")
        assert outer.status is JobStatus.SUCCEEDED, harness.cluster.get_logs(outer.id)
        nested = harness.cluster.get_logs(outer.id).strip()
        assert harness.end(nested).exit_code == 9
        assert harness.cluster.get_logs(nested) == "nested\n"

    # 11: secrets

    @cites(11)
    def test_a_secret_is_seen_by_the_job_alone(self, harness: ClusterHarness) -> None:
        secret = f"s3cret-{os.getpid()}-{time.time_ns()}"
        env = RuntimeEnv(secrets={"PASSPHRASE": secret}, env={"API_TOKEN": f"token-{secret}"})
        cluster = harness.cluster
        command = 'test -n "$PASSPHRASE" && echo ${#PASSPHRASE}; echo ready; sleep 600'
        shown = [repr(env), str(env), str(cluster.plan_job(command, env)), repr(cluster.plan_job(command, env))]
        job_id = cluster.create_job(command, env, job_id="with-secret")
        harness.until_logged(job_id, b"ready")
        assert cluster.get_logs(job_id) == f"{len(secret)}\nready\n"
        self._search(harness, secret.encode(), "while the job runs", but_not=f"token-{secret}".encode())
        with pytest.raises(JobExistsError) as exists:
            cluster.create_job(command, env, job_id=job_id)
        shown += [str(exists.value), repr(exists.value), repr(cluster.list_jobs()), repr(cluster.get_job(job_id))]
        cluster.delete_job(job_id)
        shown.append(repr(harness.end(job_id)))
        self._search(harness, secret.encode(), "after its end", but_not=f"token-{secret}".encode())
        assert not [text for text in shown if secret in text]
        assert "PASSPHRASE" in shown[0], "the names are shown"
        with pytest.raises(InvalidTypeError) as refused:
            RuntimeEnv(secrets={"PASSPHRASE": secret.encode()})  # type: ignore[dict-item]
        assert secret not in str(refused.value)

    @cites(11)
    def test_a_failing_job_tells_no_secret(self, harness: ClusterHarness) -> None:
        secret = f"s3cret-{os.getpid()}-{time.time_ns()}"
        info = harness.run("exit 3", RuntimeEnv(secrets={"PASSPHRASE": secret}))
        assert secret not in repr(info) + str(JobFailedError(info))
        self._search(harness, secret.encode(), "after a failure")

    # 12: packages

    @cites(12)
    def test_packages_are_importable_in_their_job_alone(self, harness: ClusterHarness) -> None:
        requirement, module = harness.requirement
        env = RuntimeEnv([requirement])
        if not (harness.cluster.capabilities.package_requirements and harness.has_python):
            self._refused(harness, env=env)
            return
        show = f"import {module}; print({module}.__file__)"
        command = f"python -c {shlex.quote(show)}"
        first, second = harness.run(command, env), harness.run(command, env)
        assert first.status is second.status is JobStatus.SUCCEEDED, harness.cluster.get_logs(first.id)
        assert harness.cluster.get_logs(first.id) == harness.cluster.get_logs(second.id), "prepared once, and reused"
        hunt = f"import importlib.util as u; print(u.find_spec({module!r}))"
        without = harness.run(f"python -c {shlex.quote(hunt)}")
        assert harness.cluster.get_logs(first.id).strip() not in harness.cluster.get_logs(without.id)

    # 13: the working directory

    @cites(13)
    def test_the_command_runs_in_the_working_directory(self, harness: ClusterHarness, tmp_path: Path) -> None:
        directory = tmp_path / 'it\'s a "dir"\nwith traps'
        (directory / "sub").mkdir(parents=True)
        (directory / "sub" / "file.txt").write_text("content\n")
        info = harness.run("cat sub/file.txt", RuntimeEnv(working_dir=str(directory), excludes=["*.bin"]))
        assert harness.cluster.get_logs(info.id) == "content\n"
        with pytest.raises(InvalidValueError, match="not a directory"):
            harness.cluster.create_job("true", RuntimeEnv(working_dir=str(tmp_path / "missing")))

    @cites(13)
    def test_the_directorys_content_is_what_the_rule_says(self, harness: ClusterHarness, tmp_path: Path) -> None:
        files = ["kept.py", "out.log", "build/x", ".git/config", ".venv/pyvenv.cfg", "extra.bin", "wanted.log"]
        for name in files:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("x")
        (tmp_path / ".gitignore").write_text("*.log\nbuild/\n")
        (tmp_path / ".frayignore").write_text("!wanted.log\n")
        with harness.hold_pending() as held:
            env = replace(held, working_dir=str(tmp_path), excludes=["*.bin"])
            job_id = harness.cluster.create_job("find . -type f | sort", env)
            (tmp_path / "late.py").write_text("x")
        harness.end(job_id)
        seen = set(harness.cluster.get_logs(job_id).split())
        if harness.ships_working_dir:
            assert "./kept.py" in seen
            assert "./wanted.log" in seen
            assert not seen & {"./out.log", "./build/x", "./.git/config", "./.venv/pyvenv.cfg", "./extra.bin"}
            assert "./late.py" not in seen, "the snapshot is taken before create_job returns"
        else:
            assert {f"./{name}" for name in files} <= seen, "in place, all of it"
            assert "./late.py" in seen, "and live"

    # 14: honoured or refused

    @cites(14)
    def test_retries_are_the_jobs_own(self, harness: ClusterHarness) -> None:
        if not harness.cluster.capabilities.max_retries:
            self._refused(harness, max_retries=1)
            return
        info = harness.run("echo attempt $FRAY_ATTEMPT; [ $FRAY_ATTEMPT -eq 2 ]", max_retries=3)
        assert info.status is JobStatus.SUCCEEDED
        assert [(attempt.number, attempt.exit_code) for attempt in info.attempts] == [(1, 1), (2, 0)]
        assert info.attempts[0].reason is TerminationReason.EXITED
        assert info.attempts[1].start_time > (info.attempts[0].end_time or 0)
        log = harness.cluster.read_logs(info.id)
        assert log[info.attempts[1].log_offset :] == b"attempt 2\n"
        assert harness.run("exit 1", max_retries=1).exit_code == 1

    @cites(14)
    @pytest.mark.parametrize("command", ["no-such-command-4f1c", "exit 126"])
    def test_what_cannot_succeed_is_not_retried(self, harness: ClusterHarness, command: str) -> None:
        if not harness.cluster.capabilities.max_retries:
            self._refused(harness, max_retries=2)
            return
        assert len(harness.run(command, max_retries=2).attempts) == 1

    @cites(14)
    def test_a_time_limit_ends_the_job(self, harness: ClusterHarness) -> None:
        if not harness.cluster.capabilities.timeout_seconds:
            self._refused(harness, timeout_seconds=5)
            return
        job_id = harness.in_fresh_process("print(cluster.create_job('sleep 600', timeout_seconds=0.3))", kill=True)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.TIMED_OUT)
        assert len(info.attempts) == 1

    @cites(14)
    def test_outputs_come_back(self, harness: ClusterHarness, tmp_path: Path) -> None:
        if not harness.cluster.capabilities.outputs:
            with pytest.raises(UnsupportedError):
                harness.cluster.fetch_outputs(harness.cluster.create_job("true"), tmp_path)
            return
        command = (
            'cd "$FRAY_OUTPUT_DIR" && mkdir -p deep/er && printf "\\000\\377" > deep/er/a.bin && echo hi > "b c.txt"'
        )
        info = harness.run(command)
        assert info.exit_code == 0, harness.cluster.get_logs(info.id)
        destination = tmp_path / "not yet there"
        fetched = harness.cluster.fetch_outputs(info.id, destination)
        assert sorted(fetched) == [destination / "b c.txt", destination / "deep" / "er" / "a.bin"]
        assert (destination / "deep" / "er" / "a.bin").read_bytes() == b"\0\xff"
        assert harness.cluster.fetch_outputs(harness.run("true").id, tmp_path / "none") == []
        (tmp_path / "taken" / "b c.txt" / "full").mkdir(parents=True)
        with pytest.raises(PlatformError, match="another directory"):
            harness.cluster.fetch_outputs(info.id, tmp_path / "taken")

    @cites(14)
    def test_options_are_honoured_or_refused(self, harness: ClusterHarness) -> None:
        has = harness.cluster.capabilities
        if not has.container_images:
            self._refused(harness, env=RuntimeEnv(container_image="python:3.12"))
        if not has.resource_caps:
            self._refused(harness, env=RuntimeEnv([], [], [Resource("CPU", 1)]))
        if not has.package_requirements:
            self._refused(harness, env=RuntimeEnv(extras=["gpu"]))
        if not has.tpu:
            with pytest.raises(UnsupportedError):
                harness.cluster.run_on_tpu(lambda ctx: None, fray.TpuRunConfig("v4-8"))

    @cites(14)
    def test_an_unknown_resource_is_refused(self, harness: ClusterHarness) -> None:
        self._refused(harness, env=RuntimeEnv([], [Resource("unobtainium-4f1c", 1)]))

    @cites(14)
    def test_a_pending_job_says_what_it_waits_for(self, harness: ClusterHarness) -> None:
        with harness.hold_pending() as held:
            job_id = harness.cluster.create_job("echo ran", held)
            harness.until(lambda: harness.cluster.get_job(job_id).message, "a message")
            assert harness.cluster.get_job(job_id).status is JobStatus.PENDING
        assert harness.end(job_id).status is JobStatus.SUCCEEDED

    @cites(14)
    @pytest.mark.parametrize(
        ("kind", "arguments"),
        [
            (TypeError, {"entrypoint": print}),
            (TypeError, {"entrypoint": ["echo", "hi"]}),
            (ValueError, {"entrypoint": "  \n"}),
            (ValueError, {"entrypoint": "echo \0"}),
            (ValueError, {"job_id": "a/b"}),
            (ValueError, {"job_id": ""}),
            (ValueError, {"job_id": "x" * 64}),
            (ValueError, {"job_id": "ends-with-newline\n"}),
            (TypeError, {"env": {"A": "1"}}),
            (ValueError, {"timeout_seconds": 0}),
            (ValueError, {"timeout_seconds": float("nan")}),
            (TypeError, {"max_retries": 1.5}),
            (ValueError, {"max_retries": -1}),
            (TypeError, {"metadata": {"a": 1}}),
            (ValueError, {"if_exists": "replace"}),
        ],
    )
    def test_bad_input_is_refused_before_anything_happens(
        self, harness: ClusterHarness, kind: type[Exception], arguments: dict[str, Any]
    ) -> None:
        before = harness.cluster.list_jobs()
        for call in (harness.cluster.create_job, harness.cluster.plan_job):
            with pytest.raises(kind) as refused:
                call(**{"entrypoint": "true", **arguments})
            assert isinstance(refused.value, fray.UsageError)
        assert harness.cluster.list_jobs() == before

    # 15: Fray in the job

    @cites(15)
    def test_a_job_has_its_context(self, harness: ClusterHarness) -> None:
        if not (harness.has_python and harness.cluster.capabilities.task_context):
            return
        program = (
            "from fray import get_job_context\n"
            "from importlib.metadata import version\n"
            "context = get_job_context()\n"
            "refs = [context.create_task(lambda x: x * x, (number,)) for number in range(5)]\n"
            "print(version('fray-core'), context.get(refs))"
        )
        for env in (None, RuntimeEnv([harness.requirement[0]])):
            if env and not harness.cluster.capabilities.package_requirements:
                continue
            info = harness.run(f"python -c {shlex.quote(program)}", env)
            from importlib.metadata import version

            expected = f"{version('fray-core')} [0, 1, 4, 9, 16]\n"
            assert harness.cluster.get_logs(info.id) == expected

    # Behind the checks

    def _signs_of_life(self, harness: ClusterHarness, job_id: str, directory: Path) -> tuple[int, int]:
        """How often a `_DEAF_CHILD` has been heard of: in the log, and where there are outputs in a file of its own."""
        beats = directory / "beat"
        if harness.cluster.capabilities.outputs:
            harness.cluster.fetch_outputs(job_id, directory)
        return len(harness.cluster.read_logs(job_id)), beats.stat().st_size if beats.exists() else 0

    def _refused(self, harness: ClusterHarness, *, env: RuntimeEnv | None = None, **options: Any) -> None:
        before = harness.cluster.list_jobs()
        for call in (harness.cluster.plan_job, harness.cluster.create_job):
            with pytest.raises(UnsupportedError):
                call("true", env, **options)
        assert harness.cluster.list_jobs() == before, "refused before anything happens"

    def _search(self, harness: ClusterHarness, secret: bytes, when: str, *, but_not: bytes | None = None) -> None:
        for where, content in harness.observable():
            if but_not:
                content = content.replace(but_not, b"")
            assert secret not in content, f"the secret is in {where}, {when}"
