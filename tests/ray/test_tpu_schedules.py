"""Whatever befalls it, `run_on_tpu` ends as its budgets say, in the right result or error, and leaves nothing behind.

Each schedule is drawn from its seed: a computation that adds up numbers step by step on all hosts and writes a
checkpoint after each, the budgets, and one fault for each attempt until one is met by none. A model of what was
promised says what must come of it: the end, every attempt, and how each was counted. `make test` runs a sample.

A fault waits for its step, and no host gets past a step without the others, so that a schedule has one outcome; where
it has more (a host's last report is lost with it; two hosts may each be first to fail) the model names all of them.
"""

from __future__ import annotations

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from fray import TpuRunConfig
from fray.backend.ray._tpu_keeper import MARK
from fray.backend.ray.ray_cluster import RayClusterContext
from tests.ray.tpu_harness import DEADLINE_SECONDS, TYPE, TpuHarness, until

pytestmark = [pytest.mark.xdist_group("tpu"), pytest.mark.timeout(900)]

SAMPLE = (77, 106, 113, 136, 255, 272, 354)
SOAK = range(1000, 1000 + int(os.environ.get("FRAY_TPU_SCHEDULES", "100")))
HOSTS = 2  # of a slice
# No step takes a fraction of it; a fault that hangs takes all of it.
STALL_SECONDS = 20.0
# More than it takes to give slices back, which is all that is waited for where this is the limit.
STOCKOUT_SECONDS = 20.0
CALL_SECONDS = 600.0


class Kind(StrEnum):
    """What befalls an attempt."""

    RAISE = "an exception"
    MEMORY_ERROR = "a MemoryError"
    OUT_OF_MEMORY = "killed as for want of memory"
    SEGFAULT = "a segmentation fault"
    EXIT = "sys.exit"
    HANG = "a hang"
    HOST = "a host taken away"
    HOST_AT_START = "a host taken away at the start"
    SLICE = "a slice taken away"
    SLICE_FOR_GOOD = "a slice taken away for good"
    CALLER = "the caller killed"
    CALLER_WAITING = "the caller killed while it waits for a slice"


# Tuples, since a seed makes one schedule, and the order of a set is another in each process.
PREEMPTIONS = (Kind.HOST, Kind.HOST_AT_START, Kind.SLICE, Kind.SLICE_FOR_GOOD, Kind.CALLER_WAITING)
KILLS_CALLER = (Kind.CALLER, Kind.CALLER_WAITING)
LAST = (Kind.SLICE_FOR_GOOD, *KILLS_CALLER)
FAILURES = [kind for kind in Kind if kind not in (*PREEMPTIONS, *LAST)]


class Back(StrEnum):
    """When hosts that were taken away come back."""

    AT_ONCE = "at once"
    NOTICED = "when Ray has noticed"
    SAID = "when the caller says that it waits for them"


@dataclass(frozen=True)
class Fault:
    kind: Kind
    step: int
    victim: int
    back: Back
    signal: signal.Signals


@dataclass(frozen=True)
class Schedule:
    """One computation and what befalls it: fault `i` in attempt `i + 1`."""

    seed: int
    num_slices: int
    steps: int
    failures: int
    preemptions: int
    reports: bool
    """Whether the computation says which step it is at."""
    echoes: bool
    """Whether hosts raise an error when another's process has gone, as JAX does, instead of waiting for ever."""
    litters: bool
    """Whether each host starts a process that no SIGTERM ends."""
    faults: list[Fault] = field(default_factory=list)

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        chance = random.Random(seed)
        num_slices, steps = chance.choice((1, 2, 2)), chance.randint(2, 5)
        last: list[Kind] = []
        if chance.random() < 0.3:
            last = [chance.choice([kind for kind in LAST if num_slices == 2 or kind is Kind.CALLER])]
        kinds = FAILURES + [Kind.HOST, Kind.HOST_AT_START, Kind.SLICE] * 2
        if last == [Kind.SLICE_FOR_GOOD]:  # other hosts would not be back in time
            kinds = FAILURES
        # The same again and again, at times: what repeats at one step is dealt with differently.
        repeats = chance.random() < 0.2
        drawn = [chance.choice(kinds) for _ in range(chance.choice((0, 1, 2, 2, 3, 3, 4)) or (not last))]
        faults, done = [], 0
        for number, kind in enumerate(drawn + last):
            stays = kind is Kind.HOST_AT_START or chance.random() < (0.9 if repeats and number else 0.3)
            done = done if stays else chance.randint(done, steps)
            back = chance.choice(list(Back) if num_slices == 2 else [Back.AT_ONCE, Back.NOTICED])
            number_sent = chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            faults.append(Fault(kind, done, chance.randrange(num_slices * HOSTS), back, number_sent))
        return cls(
            seed,
            num_slices,
            steps,
            failures=chance.choice((0, 1, 2, 3, 5)),
            preemptions=chance.choice((0, 1, 2, 3, 5)),
            reports=chance.random() < 0.85,
            echoes=chance.random() < 0.3,
            litters=chance.random() < 0.3,
            faults=faults,
        )

    @property
    def num_hosts(self) -> int:
        return self.num_slices * HOSTS

    @property
    def kills_caller(self) -> bool:
        return any(fault.kind in KILLS_CALLER for fault in self.faults)

    @property
    def config(self) -> TpuRunConfig:
        kinds = {fault.kind for fault in self.faults}
        return TpuRunConfig(
            TYPE,
            self.num_slices,
            self.preemptions,
            self.failures,
            wait_seconds=STOCKOUT_SECONDS if Kind.SLICE_FOR_GOOD in kinds else CALL_SECONDS,
            stall_seconds=STALL_SECONDS if Kind.HANG in kinds else None,
        )

    def value(self, step: int, index: int) -> int:
        """What a host adds at a step."""
        return (self.seed * 31 + step * 7 + index * 3) % 101

    @property
    def total(self) -> int:
        return sum(self.value(step, index) for step in range(1, self.steps + 1) for index in range(self.num_hosts))


# The computation. It is nested, so that it travels by value: the hosts do not have this module.


def computation(schedule: Schedule, folder: Path) -> Callable[[Any], Any]:
    steps, reports, echoes, litters = schedule.steps, schedule.reports, schedule.echoes, schedule.litters
    faults = [(str(fault.kind.name), fault.step, fault.victim) for fault in schedule.faults]
    values = [[schedule.value(step, index) for index in range(schedule.num_hosts)] for step in range(steps + 1)]
    where, patience = str(folder), CALL_SECONDS

    def compute(ctx: Any) -> tuple[int, int]:
        import ctypes
        import fcntl
        import json
        import os
        import signal
        import subprocess
        import sys
        import time

        def put(name: str, text: str) -> None:
            path = os.path.join(where, name)
            with open(f"{path}.{os.getpid()}.part", "w") as file:
                file.write(text)
            os.replace(file.name, path)

        def read(name: str) -> str | None:
            try:
                with open(os.path.join(where, name)) as file:
                    return file.read()
            except FileNotFoundError:
                return None

        def life_of(pid: int) -> str:
            """What tells a process from a later one of the same id; empty where it has ended."""
            try:
                with open(f"/proc/{pid}/stat") as file:
                    fields = file.read().rpartition(")")[2].split()
            except OSError:
                return ""
            return "" if fields[0] in "ZX" else fields[19]

        def lives(line: str) -> bool:
            pid, life = line.split()
            return life_of(int(pid)) == life

        attempt, me, count = ctx.attempt, ctx.slice_id * ctx.num_hosts + ctx.host_id, ctx.num_slices * ctx.num_hosts

        def wait_for(name: str) -> str:
            give_up = time.monotonic() + patience
            while (text := read(name)) is None:
                if time.monotonic() > give_up:
                    raise TimeoutError(name)
                if echoes and any(
                    begun is not None and not lives(begun.splitlines()[0])
                    for begun in (read(f"begun-{attempt}-{index}") for index in range(count))
                ):
                    raise RuntimeError("another host has gone")
                time.sleep(0.01)
            return text

        kind, at, victim = faults[attempt - 1] if attempt <= len(faults) else ("", -1, -1)
        # As libtpu does: held until the process ends, and the file stays where that is no orderly end.
        lock = os.open(os.environ["FRAY_LIBTPU_LOCKFILE"], os.O_CREAT | os.O_RDWR)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(where):
            if name.startswith("begun-") and not name.endswith(".part") and int(name.split("-")[1]) < attempt:
                for line in (read(name) or "").splitlines():
                    if lives(line):
                        put(f"violation-{attempt}-{me}", f"process {line} of {name} is there still")
        processes = [os.getpid()]
        if litters:
            deaf = "trap '' TERM; sleep 600"
            processes.append(subprocess.Popen(["sh", "-c", deaf], start_new_session=True).pid)
        put(f"begun-{attempt}-{me}", "".join(f"{pid} {life_of(pid)}\n" for pid in processes))
        if kind == "HOST_AT_START":
            time.sleep(patience)
        for index in range(count):
            wait_for(f"begun-{attempt}-{index}")
        checkpoint = json.loads(read("checkpoint") or '{"step": 0, "total": 0}')
        done, total = checkpoint["step"], checkpoint["total"]
        if attempt > 1 and done != faults[attempt - 2][1]:
            put(f"violation-{attempt}-{me}", f"begins after step {done}")

        def reached(step: int) -> None:
            if reports:
                ctx.report_step(step)
            if (step, me) != (at, victim):
                return
            put(f"ready-{attempt}", f"{os.environ['TPU_NAME']} {os.environ['TPU_WORKER_ID']}")
            if kind == "RAISE":
                raise ValueError(f"fault of attempt {attempt}")
            if kind == "MEMORY_ERROR":
                raise MemoryError(f"fault of attempt {attempt}")
            if kind == "OUT_OF_MEMORY":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "SEGFAULT":
                ctypes.string_at(0)
            if kind == "EXIT":
                sys.exit(f"fault of attempt {attempt}")
            if kind == "HANG":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(patience)

        reached(done)
        for step in range(done + 1, steps + 1):
            put(f"part-{attempt}-{step}-{me}", str(values[step][me]))
            parts = [int(wait_for(f"part-{attempt}-{step}-{index}")) for index in range(count)]
            total += sum(parts)
            if me == 0:
                put("checkpoint", json.dumps({"step": step, "total": total}))
                put(f"written-{attempt}-{step}", "")
            wait_for(f"written-{attempt}-{step}")
            reached(step)
        return total, attempt

    return compute


# What must come of it


@dataclass
class Expected:
    """What a schedule must come to.

    Attributes:
        end: In a word.
        errors: The types and a part of what is said, of which one must be; none where it succeeds.
        notes: A part of what is noted beside the error.
        attempts: How many are made.
        told: Of each attempt that is made good: its number, the steps that it may be said to have ended at, why there
            is another.
        met: The faults that are met.
    """

    end: str = "result"
    errors: list[tuple[str, str]] = field(default_factory=list)
    notes: str = ""
    attempts: int = 0
    told: list[tuple[int, set[int], str]] = field(default_factory=list)
    met: list[Kind] = field(default_factory=list)


def expect(schedule: Schedule) -> Expected:
    """Say what was promised: failures and preemptions have budgets of their own; what repeats at one step ends it."""
    expected = Expected()
    failures = preemptions = done = 0
    failed_at: list[int] = []
    for number, fault in enumerate(schedule.faults, 1):
        expected.attempts = number
        expected.met.append(fault.kind)
        step = fault.step if schedule.reports else -1
        if fault.kind is Kind.CALLER:
            return _killed(expected, fault)
        if fault.kind in PREEMPTIONS:
            preemptions += 1
            if preemptions > schedule.preemptions:
                if fault.kind in LAST:  # what would have come after it does not
                    expected.met[-1] = Kind.SLICE
                times = "once" if preemptions == 1 else f"{preemptions} times"
                expected.end = "preempted too often"
                expected.errors = [("PreemptedError", f"preempted too many times: {times}, the last time because")]
                return expected
            # Its last report may be lost with a host, and where that was all of the slice, all reports.
            steps = {-1} if fault.kind is Kind.HOST_AT_START else {-1, *range(done, step + 1)}
            why = f"preemption {preemptions} of {schedule.preemptions} that are made good"
            expected.told.append((number, steps, why))
            if fault.kind is Kind.CALLER_WAITING:
                return _killed(expected, fault)
            if fault.kind is Kind.SLICE_FOR_GOOD:
                expected.end, expected.errors = (
                    "stockout",
                    [("StockoutError", "1/2 slices, waiting for TPU-v4-16-head")],
                )
                return expected
        else:
            failures += 1
            errors = _errors_of(schedule, fault, number)
            failed_at = [each for each in failed_at if each == step] + [step]
            if schedule.reports and len(failed_at) == 3:
                expected.end, expected.errors = "no progress", errors
                expected.notes = f"failed 3 times in a row at step {step}, without getting any further"
                return expected
            if failures > schedule.failures:
                expected.end, expected.errors = "failed too often", errors
                expected.notes = f"failed {failures} times (TpuRunConfig.max_retries_failure={schedule.failures})"
                return expected
            expected.told.append((number, {step}, f"failure {failures} of {schedule.failures} that are made good"))
        if fault.step > done:
            # A new best one forgets the failures before it, also where it was a preemption that ended it.
            failed_at = [each for each in failed_at if each == step]
            done = fault.step
    expected.attempts += 1
    return expected


def _killed(expected: Expected, fault: Fault) -> Expected:
    expected.end = "caller killed"
    if fault.signal is signal.SIGINT:
        expected.errors = [("KeyboardInterrupt", "")]
    elif fault.signal is signal.SIGTERM:  # Ray makes an exception of it
        expected.errors = [("SystemExit", ""), ("none", "")]
    else:
        expected.errors = [("none", "")]
    return expected


def _errors_of(schedule: Schedule, fault: Fault, number: int) -> list[tuple[str, str]]:
    said = f"fault of attempt {number}"
    if fault.kind in (Kind.OUT_OF_MEMORY, Kind.SEGFAULT):
        # Those who notice may be quicker to fail than Ray is to say what they have noticed.
        echo = [("RuntimeError", "another host has gone")] if schedule.echoes else []
        return [("HostFailedError", "died: "), *echo]
    if fault.kind is Kind.HANG:
        since = f"step {fault.step}" if schedule.reports else "its start, with no step reported"
        return [("HostFailedError", f"run_on_tpu hangs: {STALL_SECONDS:g} s without a new step, since {since}")]
    names = {Kind.RAISE: "ValueError", Kind.MEMORY_ERROR: "MemoryError", Kind.EXIT: "SystemExit"}
    return [(names[fault.kind], said)]


# The call


def call(cluster: RayClusterContext, schedule: Schedule, folder: Path) -> None:
    """Make the call, and write into the folder what is told meanwhile, and what comes of it."""
    teller = _Teller(folder / "told")
    logger = logging.getLogger("fray.tpu")
    logger.addHandler(teller)
    try:
        outcome: dict[str, Any] = {"results": cluster.run_on_tpu(computation(schedule, folder), schedule.config)}
    except BaseException as error:
        notes = getattr(error, "__notes__", [])
        outcome = {"error": [type(error).__name__, str(error)], "notes": " ".join(notes)}
    finally:
        logger.removeHandler(teller)
    (folder / "outcome").write_text(json.dumps(outcome))


class _Teller(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(record.getMessage()) + "\n")


def told(folder: Path) -> list[str]:
    path = folder / "told"
    return (
        [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )


_CALLER = """
import signal
import sys
from pathlib import Path
from fray.backend.ray.ray_cluster import RayClusterContext
from tests.ray.test_tpu_schedules import Schedule, call

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
address, seed, folder = sys.argv[1:]
with RayClusterContext(address, grace_seconds=3.0) as cluster:
    call(cluster, Schedule.draw(int(seed)), Path(folder))
"""


# What befalls it


class Injector(threading.Thread):
    """Has happen what no host can do to itself, one fault after the other, when each host is where it is to be.

    Args:
        tpus: The slices.
        schedule: Its faults.
        folder: The call's files.
        caller: The process that makes the call, where it is one of its own.
    """

    def __init__(
        self, tpus: TpuHarness, schedule: Schedule, folder: Path, caller: subprocess.Popen[bytes] | None
    ) -> None:
        super().__init__(name="injector", daemon=True)
        self._tpus, self._schedule, self._folder, self._caller = tpus, schedule, folder, caller
        self._is_over = threading.Event()
        self._trouble: BaseException | None = None

    def run(self) -> None:
        try:
            for number, fault in enumerate(self._schedule.faults, 1):
                if self._is_over.is_set():
                    return
                if fault.kind is Kind.CALLER:
                    if self._wait(lambda name=f"ready-{number}": (self._folder / name).exists(), "the moment"):  # type: ignore[misc]
                        self._kill_caller(fault)
                elif fault.kind in PREEMPTIONS:
                    self._preempt(number, fault)
        except BaseException as error:
            self._trouble = error

    def finish(self) -> None:
        """Wait for its end, now that the call has ended."""
        self._is_over.set()
        self.join()
        if self._trouble is not None:
            raise self._trouble

    def _wait(self, is_so: Callable[[], object], what: str) -> bool:
        """Wait for something, or until the call is over; return whether it is so."""
        so = False

        def is_so_or_over() -> bool:
            nonlocal so
            so = bool(is_so())
            return so or self._is_over.is_set()

        until(is_so_or_over, what, CALL_SECONDS)
        return so

    def _preempt(self, number: int, fault: Fault) -> None:
        ready = self._folder / f"ready-{number}"
        if fault.kind is Kind.HOST_AT_START:
            found: list[tuple[int, int]] = []

            def is_starting() -> bool:
                found[:] = self._hosts_of(number, fault.victim)
                return bool(found)

            if not self._wait(is_starting, "the attempt's first process"):
                return
            slice_index, worker_id = found[0]
        elif self._wait(ready.exists, "the moment"):
            name, worker = ready.read_text().split()
            slice_index, worker_id = int(name.rpartition("-")[2]), int(worker)
        else:
            return
        hosts = range(HOSTS) if fault.kind not in (Kind.HOST, Kind.HOST_AT_START) else [worker_id]
        before = self._nodes()
        self._tpus.slices.take_away(slice_index, worker_id if len(hosts) == 1 else None)
        gone = {before[f"simulated-{slice_index}", str(each)] for each in hosts}
        if fault.back is not Back.AT_ONCE or fault.kind in LAST:
            until(lambda: not gone & set(self._nodes().values()), "Ray to notice", DEADLINE_SECONDS)
        if fault.kind is Kind.SLICE_FOR_GOOD:
            return
        if fault.kind is Kind.CALLER_WAITING:
            if self._wait(lambda: self._is_waiting_after(number), "the caller to wait"):
                self._kill_caller(fault)
            return
        if fault.back is Back.SAID:
            self._wait(lambda: self._is_waiting_after(number), "the caller to wait")
        self._tpus.slices.bring_back(slice_index)
        wanted = {(f"simulated-{slice_index}", str(each)) for each in hosts}
        until(
            lambda: wanted <= self._nodes().keys() and not gone & set(hosts_of_ray()),
            "Ray to know the hosts that are back",
            DEADLINE_SECONDS,
        )

    def _kill_caller(self, fault: Fault) -> None:
        assert self._caller is not None
        self._caller.send_signal(fault.signal)

    def _is_waiting_after(self, number: int) -> bool:
        lines = told(self._folder)
        ends = [at for at, line in enumerate(lines) if line.startswith(f"run_on_tpu: attempt {number} ended")]
        return bool(ends) and any("waiting for TPU-v4-16-head" in line for line in lines[ends[0] :])

    def _hosts_of(self, number: int, victim: int) -> list[tuple[int, int]]:
        """Return slice and worker id of the host on which an attempt's process is; none where there is none yet."""
        pattern = re.compile(rb"(?:^|\0)%s=\w+-%d-\w+-%d(?:\0|$)" % (MARK.encode(), number, victim))
        for pid in self._tpus.slices.processes():
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
            if pattern.search(environment):
                found = re.search(rb"FRAY_SIMULATED_HOST=\S*/s(\d+)h(\d+)\0", environment + b"\0")
                return [(int(found[1]), int(found[2]))] if found else []
        return []

    def _nodes(self) -> dict[tuple[str, str], str]:
        return {place: node for node, place in hosts_of_ray().items()}


def hosts_of_ray() -> dict[str, tuple[str, str]]:
    """The ids of the nodes that Ray takes for alive, with their slices and worker ids."""
    import ray

    label = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id"
    alive = [node for node in ray.nodes() if node["Alive"] and label[0] in node["Labels"]]
    return {node["NodeID"]: (node["Labels"][label[0]], node["Labels"][label[1]]) for node in alive}


# The tests


@pytest.fixture(scope="module")
def tpus() -> Iterator[TpuHarness]:
    harness = TpuHarness()
    yield harness
    harness.close()


@pytest.mark.parametrize("seed", SAMPLE)
def test_a_run_ends_as_promised_whatever_befalls_it(tpus: TpuHarness, tmp_path: Path, seed: int) -> None:
    run_schedule(tpus, Schedule.draw(seed), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", SOAK)
def test_a_run_ends_as_promised_whatever_befalls_it_at_length(tpus: TpuHarness, tmp_path: Path, seed: int) -> None:
    run_schedule(tpus, Schedule.draw(seed), tmp_path)


def test_the_sample_meets_every_fault_and_every_end() -> None:
    expected = [expect(Schedule.draw(seed)) for seed in SAMPLE]
    assert {kind for each in expected for kind in each.met} == set(Kind)
    ends = {expect(Schedule.draw(seed)).end for seed in range(1000)}
    assert {each.end for each in expected} == ends


def test_a_step_that_is_reported_as_the_attempt_ends_counts(
    tpus: TpuHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As where a host that is asked to end writes a checkpoint."""
    begun = tmp_path / "begun"

    def saves_when_asked_to_end(ctx: Any) -> None:
        import signal
        import sys
        import time

        def save(*_: Any) -> None:
            ctx.report_step(9)
            sys.exit()

        if ctx.host_id == 0:
            signal.signal(signal.SIGTERM, save)
            begun.touch()
            time.sleep(600)
        while ctx.attempt == 1 and not begun.exists():
            time.sleep(0.01)
        if ctx.attempt == 1:
            raise ValueError("the first")
        raise KeyError("the second")

    _join(tpus)
    with tpus.leaving_nothing(), pytest.raises(KeyError, match="the second"):
        tpus.cluster.run_on_tpu(saves_when_asked_to_end, tpus.config(1, failures=1))
    assert "attempt 1 ended at step 9: ValueError: the first" in caplog.text


def test_a_host_that_is_brought_back_at_once_is_there_then(tpus: TpuHarness) -> None:
    """Though Ray believes at first that it never went."""
    _join(tpus)
    before = hosts_of_ray()
    tpus.slices.take_away(0, 1)
    tpus.slices.bring_back(0, 1)
    assert [place for node, place in hosts_of_ray().items() if node not in before] == [("simulated-0", "1")]


def run_schedule(tpus: TpuHarness, schedule: Schedule, folder: Path) -> None:
    _join(tpus)
    expected = expect(schedule)
    began = time.monotonic()
    try:
        with tpus.leaving_nothing():
            if schedule.kills_caller:
                _call_elsewhere(tpus, schedule, folder)
            else:
                with _faults(tpus, schedule, folder, None):
                    call(tpus.cluster, schedule, folder)
            assert _differences(schedule, expected, folder) == []
    except BaseException as error:
        error.add_note(f"seed {schedule.seed}: {schedule}")
        error.add_note("\n".join(told(folder)))
        raise
    if report := os.environ.get("FRAY_TPU_SCHEDULES_REPORT"):
        line = {**asdict(expected), "told": [], "seed": schedule.seed, "seconds": time.monotonic() - began}
        with open(report, "a") as file:
            file.write(json.dumps(line) + "\n")


def _join(tpus: TpuHarness) -> None:
    import ray

    if not ray.is_initialized():
        ray.init(tpus.slices.address, logging_level="WARNING")
    tpus.whole()


def _call_elsewhere(tpus: TpuHarness, schedule: Schedule, folder: Path) -> None:
    command = [sys.executable, "-c", _CALLER, tpus.slices.address, str(schedule.seed), str(folder)]
    with (folder / "output").open("wb") as output:
        caller = subprocess.Popen(command, stdout=output, stderr=output, cwd=Path(__file__).parents[2])
    try:
        with _faults(tpus, schedule, folder, caller):
            caller.wait(CALL_SECONDS)
    except BaseException as error:
        error.add_note((folder / "output").read_text(errors="replace")[-4000:])
        raise
    finally:
        caller.kill()
        caller.wait()


@contextmanager
def _faults(
    tpus: TpuHarness, schedule: Schedule, folder: Path, caller: subprocess.Popen[bytes] | None
) -> Iterator[None]:
    injector = Injector(tpus, schedule, folder, caller)
    injector.start()
    try:
        yield
    finally:
        injector.finish()


def _differences(schedule: Schedule, expected: Expected, folder: Path) -> list[str]:
    """Compare what has come of a schedule with what had to."""
    found = [f"{path.name}: {path.read_text()}" for path in folder.glob("violation-*")]
    outcome = json.loads((folder / "outcome").read_text()) if (folder / "outcome").exists() else {"error": ["none", ""]}
    results = [[schedule.total, expected.attempts]] * schedule.num_hosts
    if not expected.errors and outcome.get("results") != results:
        found.append(f"{results} had to come of it: {outcome}")
    if expected.errors:
        name, said = outcome.get("error", ("a result", ""))
        if not any(name == wanted and part in said for wanted, part in expected.errors):
            found.append(f"one of {expected.errors} had to come of it: {outcome}")
        if expected.notes not in outcome.get("notes", ""):
            found.append(f"it had to be noted that it {expected.notes}: {outcome}")
    begun = Counter(int(path.name.split("-")[1]) for path in folder.glob("begun-*") if path.suffix != ".part")
    for number in range(1, expected.attempts + 1):
        at_start = number <= len(schedule.faults) and schedule.faults[number - 1].kind is Kind.HOST_AT_START
        if begun[number] != schedule.num_hosts and not at_start:
            found.append(f"attempt {number} began on {begun[number]} of {schedule.num_hosts} hosts")
    if max(begun, default=0) > expected.attempts:
        found.append(f"{max(begun)} attempts were made where {expected.attempts} had to be")
    pattern = re.compile(
        r"run_on_tpu: attempt (\d+) ended(?: at step (\d+))?: .*; the next in [\d.]+ s \((.*)\)", re.DOTALL
    )
    said = [match for line in told(folder) if (match := pattern.fullmatch(line))]
    seen = [(int(match[1]), int(match[2] or -1), match[3]) for match in said]
    fits = len(seen) == len(expected.told) and all(
        number == wanted and step in steps and why == reason
        for (number, step, why), (wanted, steps, reason) in zip(seen, expected.told, strict=True)
    )
    if not fits:
        found.append(f"attempts had to end as {expected.told}, and ended as {seen}")
    return found
