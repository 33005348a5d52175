"""`run_on_tpu` on simulated slices: real Ray nodes, real processes, hosts that are taken away."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError

from fray import Resource, RuntimeEnv, TpuRunConfig
from fray.backend.ray.testing import _marked
from fray.errors import (
    HostFailedError,
    InvalidTypeError,
    InvalidValueError,
    PlatformError,
    PreemptedError,
    StockoutError,
    UnsupportedError,
)
from tests.ray.tpu_harness import (
    DEADLINE_SECONDS,
    TYPE,
    TpuHarness,
    command_of,
    is_running,
    processes_of_runs,
    until,
)

pytestmark = pytest.mark.xdist_group("tpu")


@pytest.fixture(scope="module")
def tpus() -> Iterator[TpuHarness]:
    harness = TpuHarness()
    yield harness
    harness.close()


@pytest.fixture(autouse=True)
def nothing_is_left(tpus: TpuHarness) -> Iterator[None]:
    import ray

    if not ray.is_initialized():
        ray.init(tpus.slices.address, logging_level="WARNING")
    tpus.whole()
    with tpus.leaving_nothing():
        yield


# Every function here is nested, so that it travels by value: the hosts do not have this module.


def test_each_host_of_each_slice_gives_its_result_in_order(tpus: TpuHarness, capfd: pytest.CaptureFixture[str]) -> None:
    def where(ctx: Any) -> tuple[int, ...]:
        import os

        print("hello\nfrom", ctx.slice_id, ctx.host_id)
        print("no newline", end="", flush=True)
        os.write(2, b"raw\n")
        places = (ctx.slice_id, ctx.host_id, ctx.num_slices, ctx.num_hosts, ctx.attempt)
        return (*places, int(os.environ["TPU_WORKER_ID"]), os.getpid())

    results = tpus.cluster.run_on_tpu(where, tpus.config())
    assert [each[:-1] for each in results] == [(s, h, 2, 2, 1, h) for s in range(2) for h in range(2)]
    assert len({each[-1] for each in results}) == 4
    said = capfd.readouterr().out
    for s, h in ((0, 0), (0, 1), (1, 0), (1, 1)):
        own = re.findall(rf"\[slice {s}, host {h}\] (.*)", said)  # Ray may have words of its own before it
        assert sorted(own) == sorted(["hello", f"from {s} {h}", "no newlineraw"])


def test_the_environment_is_set_before_the_function_is_loaded_and_the_users_own_wins(tpus: TpuHarness) -> None:
    class Looks:
        """Sees the environment when it is loaded."""

        def __reduce__(self) -> Any:
            return eval, ("dict(__import__('os').environ)",)

    seen = Looks()

    def environment(ctx: Any) -> Any:
        return seen

    env = RuntimeEnv(
        env={"MEGASCALE_PORT": "77", "LIBTPU_INIT_ARGS": "--mine", "PLAIN": "x"},
        secrets={"TOKEN_OF_MINE": "s3cret-4f1c"},
    )
    loaded = tpus.cluster.run_on_tpu(environment, tpus.config(), env)
    for index, each in enumerate(loaded):
        assert each["TPU_WORKER_ID"] == str(index % 2)
        assert each["MEGASCALE_SLICE_ID"] == str(index // 2)
        assert each["MEGASCALE_NUM_SLICES"] == "2"
        assert re.fullmatch(r"[\d.]+:\d+", each["MEGASCALE_COORDINATOR_ADDRESS"])
        assert each["JAX_PLATFORMS"] == ""
        assert (each["MEGASCALE_PORT"], each["LIBTPU_INIT_ARGS"], each["PLAIN"]) == ("77", "--mine", "x")
        assert each["TOKEN_OF_MINE"] == "s3cret-4f1c"
        assert each["MEGASCALE_COORDINATOR_ADDRESS"].endswith(":77")
    assert len({each["JAX_COORDINATOR_ADDRESS"] for each in loaded}) == 1
    one = tpus.cluster.run_on_tpu(environment, tpus.config(1), RuntimeEnv(env={"JAX_PLATFORMS": "cpu"}))
    assert not [name for name in one[0] if name.startswith("MEGASCALE")]
    assert one[0]["JAX_PLATFORMS"] == "cpu"


def test_a_secret_is_in_no_answer_and_no_file_of_rays(tpus: TpuHarness, tmp_path: Path) -> None:
    import ray
    import requests

    def wait(ctx: Any) -> str:
        import os
        import time

        begun.touch()
        while not looked.exists():
            time.sleep(0.05)
        return os.environ["HIDDEN"][:2]

    begun, looked = tmp_path / "begun", tmp_path / "looked"
    seen: list[str] = []

    def look() -> None:
        try:
            until(begun.exists, "the function")
            for path in ("actors", "tasks", "workers", "runtime_envs", "jobs", "placement_groups"):
                seen.append(requests.get(f"{tpus.slices.dashboard}/api/v0/{path}?detail=true", timeout=120).text)
            seen.extend(map(command_of, processes_of_runs()))
        finally:
            looked.touch()

    looking = threading.Thread(target=look)
    looking.start()
    assert tpus.cluster.run_on_tpu(wait, tpus.config(1), RuntimeEnv(secrets={"HIDDEN": "s3cret-77ab"})) == ["s3"] * 2
    looking.join()
    assert len(seen) >= 8, "six answers, two processes"
    assert not [text for text in seen if "s3cret-77ab" in text]
    found = subprocess.run(["grep", "-rlaF", "s3cret-77ab", str(tpus.slices.folder)], capture_output=True, text=True)
    assert found.stdout == ""
    assert ray.is_initialized()


def test_tasks_and_the_job_context_work_inside(tpus: TpuHarness) -> None:
    def makes_tasks(ctx: Any) -> Any:
        from fray import get_job_context

        assert get_job_context() is ctx
        refs = [ctx.create_task(lambda x: x * 10, (index,)) for index in range(3)]
        inner = ctx.create_task(lambda: (ctx.host_id, ctx.report_step(3)))
        return ctx.get(refs), ctx.get(inner)

    assert tpus.cluster.run_on_tpu(makes_tasks, tpus.config(1)) == [
        ([0, 10, 20], (0, None)),
        ([0, 10, 20], (1, None)),
    ]


def test_what_the_function_raises_comes_out_as_it_is_within_the_budget(
    tpus: TpuHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    count = tmp_path / "attempts"

    def fails(ctx: Any) -> None:
        if ctx.host_id == 1:
            with open(count, "a") as file:
                file.write("x")
            raise ValueError(f"attempt {ctx.attempt}")
        import time

        time.sleep(600)

    with pytest.raises(ValueError, match="attempt 2") as raised:
        tpus.cluster.run_on_tpu(fails, tpus.config(1, failures=1))
    assert type(raised.value) is ValueError
    assert count.read_text() == "xx"
    assert "max_retries_failure=1" in "".join(raised.value.__notes__)
    assert "ValueError: attempt 1" in caplog.text


def test_the_next_attempt_may_succeed(tpus: TpuHarness) -> None:
    def fails_once(ctx: Any) -> int:
        if ctx.attempt == 1 and ctx.slice_id == 1 and ctx.host_id == 0:
            raise OSError("a disk")
        return int(ctx.attempt)

    assert tpus.cluster.run_on_tpu(fails_once, tpus.config(failures=1)) == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("way", "kind", "said"),
    [
        ("import ctypes; ctypes.string_at(0)", HostFailedError, "died"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", HostFailedError, "died"),
        ("import os; os._exit(3)", HostFailedError, "died"),
        ("raise MemoryError('all of it')", MemoryError, "all of it"),
        ("raise SystemExit(4)", SystemExit, "4"),
        ("import ray.exceptions; raise ray.exceptions.GetTimeoutError('mine')", GetTimeoutError, "mine"),
        ("raise type('Odd', (Exception,), {'__reduce__': lambda self: 1 / 0})('x')", HostFailedError, "handed over"),
    ],
)
def test_an_end_of_any_kind_is_a_failure_and_not_a_preemption(
    tpus: TpuHarness, way: str, kind: type[BaseException], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def ends(ctx: Any) -> None:
        if ctx.host_id == 0:
            print("the last line", flush=True)
            exec(way)
        import time

        time.sleep(600)

    with pytest.raises(kind, match=said):
        tpus.cluster.run_on_tpu(ends, tpus.config(1, preemptions=0))
    assert "[slice 0, host 0] the last line\n" in capfd.readouterr().out


def test_a_function_that_hangs_is_ended(tpus: TpuHarness) -> None:
    def hangs(ctx: Any) -> None:
        import signal
        import time

        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ctx.report_step(7)
        time.sleep(600)

    with pytest.raises(HostFailedError, match=r"hangs.*since step 7"):
        tpus.cluster.run_on_tpu(hangs, tpus.config(1, stall_seconds=10.0))  # first it is loaded


def test_a_failure_that_repeats_at_one_step_is_not_tried_for_ever(tpus: TpuHarness) -> None:
    def fails_at_five(ctx: Any) -> None:
        ctx.report_step(5)
        raise RuntimeError("the loss is not a number")

    with pytest.raises(RuntimeError, match="not a number") as raised:
        tpus.cluster.run_on_tpu(fails_at_five, tpus.config(1, failures=100))
    assert "3 times in a row at step 5" in "".join(raised.value.__notes__)


def test_a_function_that_cannot_be_loaded_is_not_tried_again(tpus: TpuHarness, tmp_path: Path) -> None:
    (tmp_path / "only_here.py").write_text("def fn(ctx): pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import only_here  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(PlatformError, match=r"cannot be loaded on the hosts: ModuleNotFoundError.*only_here"):
        tpus.cluster.run_on_tpu(only_here.fn, tpus.config(1, failures=100))


def test_packages_are_there_and_those_that_cannot_be_are_not_tried_again(tpus: TpuHarness, tmp_path: Path) -> None:
    package = tmp_path / "only_in_the_job"
    (package / "src" / "only_in_the_job").mkdir(parents=True)
    (package / "src" / "only_in_the_job" / "__init__.py").write_text("ANSWER = 42\n")
    project = '[project]\nname = "only-in-the-job"\nversion = "1"\n'
    project += '[build-system]\nrequires = ["uv_build"]\nbuild-backend = "uv_build"\n'
    (package / "pyproject.toml").write_text(project)

    def answer(ctx: Any) -> int:
        import only_in_the_job

        return int(only_in_the_job.ANSWER)

    env = RuntimeEnv([f"only-in-the-job @ {package.as_uri()}"])
    assert tpus.cluster.run_on_tpu(answer, tpus.config(1), env) == [42, 42]
    with pytest.raises(PlatformError, match=r"(?s)could not be set up.*no-such-package-4f1c"):
        tpus.cluster.run_on_tpu(answer, tpus.config(1, failures=100), RuntimeEnv(["no-such-package-4f1c"]))


def test_files_of_a_working_directory_are_there(tpus: TpuHarness, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("here")
    (tmp_path / "big.bin").write_text("not")

    def reads(ctx: Any) -> Any:
        import os

        with open("data.txt") as file:
            return file.read(), os.path.exists("big.bin")

    env = RuntimeEnv(working_dir=str(tmp_path), excludes=["big.bin"])
    assert tpus.cluster.run_on_tpu(reads, tpus.config(1), env) == [("here", False)] * 2


def test_a_slice_that_is_taken_away_and_comes_back_is_used_again(
    tpus: TpuHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = tmp_path / "begun"

    def trains(ctx: Any) -> tuple[int, int]:
        import time

        ctx.report_step(ctx.attempt)
        if ctx.attempt == 1:
            begun.touch()
            time.sleep(600)
        return ctx.attempt, ctx.slice_id

    def preempt() -> None:
        until(begun.exists, "the first attempt")
        tpus.slices.take_away(1)
        until(lambda: "waiting for TPU-v4-16-head" in caplog.text, "the progress")
        tpus.slices.bring_back(1)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    assert tpus.cluster.run_on_tpu(trains, tpus.config()) == [(2, 0), (2, 0), (2, 1), (2, 1)]
    preempting.join()
    assert "1/2 slices, waiting for TPU-v4-16-head" in caplog.text
    # Which of its hosts Ray misses first is not for us to say.
    assert "attempt 1 ended at step 1: simulated-1 host" in caplog.text


def test_the_loss_of_a_host_counts_though_the_others_fail_of_it(tpus: TpuHarness, tmp_path: Path) -> None:
    """As JAX does: where one host has gone, the others raise, crash or exit, and sooner than Ray has noticed."""
    begun = tmp_path / "begun"

    def fails_with_the_other(ctx: Any) -> int:
        import os
        import time

        if ctx.attempt > 1:
            return int(ctx.attempt)
        if ctx.slice_id == 0 and ctx.host_id == 1:
            begun.write_text(str(os.getpid()))
            time.sleep(600)
        while not (begun.exists() and begun.read_text()):
            time.sleep(0.01)
        pid = int(begun.read_text())
        while os.path.exists(f"/proc/{pid}"):
            time.sleep(0.01)
        raise RuntimeError("the coordination service is not there")

    def preempt() -> None:
        until(begun.exists, "the first attempt")
        tpus.slices.take_away(0, 1)
        until(lambda: tpus.nodes() == 4, "Ray to notice")
        tpus.slices.bring_back(0, 1)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    assert tpus.cluster.run_on_tpu(fails_with_the_other, tpus.config(failures=0)) == [2, 2, 2, 2]
    preempting.join()


def test_a_host_whose_process_goes_before_its_node_is_lost(tpus: TpuHarness, tmp_path: Path) -> None:
    """A machine that ends kills its processes in any order, and what is left of it may say that all is well."""
    begun, gone = tmp_path / "begun", tmp_path / "gone"

    def fails_with_the_other(ctx: Any) -> int:
        import os
        import time

        if ctx.attempt > 1:
            return int(ctx.attempt)
        if ctx.host_id == 1:
            begun.write_text(str(os.getpid()))
            time.sleep(600)
        while not gone.exists():
            time.sleep(0.01)
        raise RuntimeError("the coordination service is not there")

    def preempt() -> None:
        until(lambda: begun.exists() and begun.read_text(), "the first attempt")
        there = {pid: command_of(pid) for pid in _marked({tpus.slices.hosts[0][1].mark})}
        (raylet,) = [pid for pid, line in there.items() if line.split(" ")[0].endswith("/raylet")]
        (keeper,) = [pid for pid, line in there.items() if "_tpu_keeper" in line]
        os.kill(raylet, signal.SIGSTOP)  # it cannot tell of what happens now
        os.kill(int(begun.read_text()), signal.SIGKILL)
        until(lambda: not Path(f"/proc/{keeper}").exists(), "the keeper to say that nothing is left")
        gone.touch()
        time.sleep(1)  # a moment in which all that could speak for the host's loss is silent
        tpus.slices.take_away(0, 1)
        until(lambda: tpus.nodes() == 4, "Ray to notice")
        tpus.slices.bring_back(0, 1)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    assert tpus.cluster.run_on_tpu(fails_with_the_other, tpus.config(1, failures=0)) == [2, 2]
    preempting.join()


def test_too_many_preemptions_are_told_as_such(tpus: TpuHarness, tmp_path: Path) -> None:
    begun = tmp_path / "begun"

    def waits(ctx: Any) -> None:
        import time

        begun.touch()
        time.sleep(600)

    def preempt() -> None:
        until(begun.exists, "the attempt")
        tpus.slices.take_away(0, 0)

    preempting = threading.Thread(target=preempt)
    preempting.start()
    with pytest.raises(PreemptedError, match=r"preempted too many times: once.*simulated-0 host 0"):
        tpus.cluster.run_on_tpu(waits, tpus.config(preemptions=0))
    preempting.join()


def test_slices_that_do_not_come_in_time_are_told_and_nothing_is_held(tpus: TpuHarness) -> None:
    def never(ctx: Any) -> None:
        raise AssertionError

    with pytest.raises(StockoutError, match=r"2/3 slices, waiting for TPU-v4-16-head.*Nothing is held"):
        tpus.cluster.run_on_tpu(never, tpus.config(3, wait_seconds=1.0))
    with pytest.raises(StockoutError, match=r"0/1 slices.*no host of type v5p-16"):
        tpus.cluster.run_on_tpu(never, TpuRunConfig("v5p-16", wait_seconds=0.0))
    assert tpus.left_behind() == []


def test_a_slice_that_is_not_whole_is_not_taken(tpus: TpuHarness) -> None:
    tpus.slices.take_away(0, 1)
    until(lambda: tpus.nodes() == 4, "Ray to notice")

    def slice_name(ctx: Any) -> str:
        import os

        return os.environ["TPU_NAME"]

    assert tpus.cluster.run_on_tpu(slice_name, tpus.config(1)) == ["simulated-1"] * 2
    until(lambda: not tpus.left_behind(), "Ray to notice that the slice is free")
    with pytest.raises(StockoutError, match=r"1/2 slices.*simulated-0 has 1 of its 2 hosts"):
        tpus.cluster.run_on_tpu(slice_name, tpus.config(2, wait_seconds=0.5))


def test_two_callers_share_the_slices_one_after_the_other(tpus: TpuHarness, tmp_path: Path) -> None:
    inside = tmp_path / "inside"

    def alone(ctx: Any) -> bool:
        import os

        if ctx.slice_id or ctx.host_id:
            return True
        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
        import time

        time.sleep(1)
        os.unlink(inside)
        return True

    done: list[list[bool]] = []
    callers = [
        threading.Thread(target=lambda: done.append(tpus.cluster.run_on_tpu(alone, tpus.config()))) for _ in range(2)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert done == [[True] * 4] * 2


def test_what_the_function_started_ends_with_it(tpus: TpuHarness) -> None:
    def leaves(ctx: Any) -> list[int]:
        import os
        import subprocess

        deaf = "trap '' TERM; sleep 600"
        started = subprocess.Popen(["sh", "-c", deaf], start_new_session=True)
        forked = os.fork()
        if not forked:
            os.setsid()
            import time

            time.sleep(600)
        return [started.pid, forked]

    results = tpus.cluster.run_on_tpu(leaves, tpus.config(1))
    assert not [pid for pids in results for pid in pids if is_running(pid)]


def test_a_host_whose_chips_are_held_is_set_aside(tpus: TpuHarness) -> None:
    lockfile = tpus.slices.hosts[0][1].folder / "libtpu_lockfile"
    with lockfile.open("w+") as held:
        holder = subprocess.Popen(["sleep", "600"], stdin=held)
    try:

        def slice_name(ctx: Any) -> str:
            import os

            return os.environ["TPU_NAME"]

        assert tpus.cluster.run_on_tpu(slice_name, tpus.config(1, failures=0)) == ["simulated-1"] * 2
    finally:
        holder.kill()
        holder.wait()
    # A stale one is nobody's.
    assert lockfile.exists()
    tpus.slices.take_away(1)
    until(lambda: tpus.nodes() == 3, "Ray to notice")
    assert tpus.cluster.run_on_tpu(slice_name, tpus.config(1)) == ["simulated-0"] * 2
    assert not lockfile.exists()


_CALLER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs in the background
from fray import TpuRunConfig
from fray.backend.ray.ray_cluster import RayClusterContext

def waits(ctx):
    import subprocess, time
    subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 600"], start_new_session=True)
    print("inside", flush=True)
    time.sleep(600)

with RayClusterContext(sys.argv[1], grace_seconds=1.0) as cluster:
    try:
        cluster.run_on_tpu(waits, TpuRunConfig("v4-16", 2))
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_caller_that_is_killed_leaves_nothing(tpus: TpuHarness, number: signal.Signals) -> None:
    caller = subprocess.Popen([sys.executable, "-c", _CALLER, tpus.slices.address], stdout=subprocess.PIPE, text=True)
    assert caller.stdout is not None
    try:
        wanted = {f"[slice {s}, host {h}] inside" for s in range(2) for h in range(2)}
        for line in caller.stdout:  # Ray's own words among it
            wanted = {each for each in wanted if each not in line}
            if not wanted:
                break
        assert not wanted, "it ended"
        assert len(processes_of_runs()) >= 8
        caller.send_signal(number)
        rest = caller.stdout.read()
        caller.wait(DEADLINE_SECONDS)
        assert ("interrupted" in rest) == (number == signal.SIGINT)
    finally:
        caller.kill()
        caller.wait()
        caller.stdout.close()
    until(lambda: not processes_of_runs(), "its processes to be gone")


def test_a_job_of_the_cluster_calls_it(tpus: TpuHarness, tmp_path: Path) -> None:
    program = """
    import fray
    from helper import answer

    def fn(ctx):
        print("in the job")
        return answer(ctx.slice_id, ctx.host_id)

    print(fray.connect().run_on_tpu(fn, fray.TpuRunConfig("v4-16", 2)))
    """
    (tmp_path / "train.py").write_text(textwrap.dedent(program))
    (tmp_path / "helper.py").write_text("def answer(*places): return places\n")
    job_id = tpus.cluster.create_job("python train.py", RuntimeEnv(working_dir=str(tmp_path)))
    info = tpus.cluster.wait(job_id, DEADLINE_SECONDS)
    log = tpus.cluster.get_logs(job_id)
    assert info.exit_code == 0, log
    assert "[(0, 0), (0, 1), (1, 0), (1, 1)]" in log
    assert "[slice 1, host 0] in the job\n" in log


def test_jax_computes_on_all_hosts_together(tpus: TpuHarness) -> None:
    def adds_up(ctx: Any) -> Any:
        import jax
        import jax.numpy as jnp
        from jax.experimental import multihost_utils

        rank = ctx.slice_id * ctx.num_hosts + ctx.host_id
        # The coordinator's address is what Fray has set.
        jax.distributed.initialize(num_processes=ctx.num_slices * ctx.num_hosts, process_id=rank)
        gathered = multihost_utils.process_allgather(jnp.array([10**rank]))
        return int(gathered.sum()), jax.process_count(), jax.process_index()

    results = tpus.cluster.run_on_tpu(adds_up, tpus.config(), RuntimeEnv(env={"JAX_PLATFORMS": "cpu"}))
    assert results == [(1111, 4, rank) for rank in range(4)]


def test_training_goes_on_from_its_checkpoint_after_a_slice_was_lost(tmp_path: Path) -> None:
    """The example, run as its README says."""
    there = Path(__file__).parents[2] / "examples" / "tpu_psum"
    example = shutil.copytree(there, tmp_path / "tpu_psum", ignore=shutil.ignore_patterns("outputs", "__pycache__"))
    assert "\npython main.py outputs\n" in (example / "README.md").read_text()
    done = subprocess.run(
        [sys.executable, "main.py", "outputs"],
        cwd=example,
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert [each["rank"] for each in results] == [0, 1, 2, 3]
    assert {each["attempt"] for each in results} == {2}
    assert {each["loss"] for each in results} == {results[0]["loss"]}
    assert results[0]["error"] < 0.02
    lines = (example / "outputs" / "checkpoints" / "history.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    # None was left out; the one that was under way when the slice went may be there twice.
    assert sorted({line["epoch"] for line in history}) == list(range(60))
    assert len(history) <= 61
    again = next(line for line in history if line["attempt"] == 2)
    assert again["epoch"] >= 25
    assert again["loss"] < history[5]["loss"]
    assert (example / "outputs" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_former_names_do_the_same(tpus: TpuHarness) -> None:
    import ray

    from fray.backend.ray import ray_tpu

    def no_arguments() -> str:
        return "ran"

    assert ray_tpu.run_on_pod(no_arguments, TYPE) == ["ran"] * 2
    assert ray_tpu.run_on_pod(ray.remote(no_arguments), TYPE, num_slices=2) == ["ran"] * 4
    assert ray_tpu.get_tpu_config("v4-32").hosts == 4


def test_what_cannot_be_is_refused_before_anything_is_done(tpus: TpuHarness) -> None:
    def never(ctx: Any) -> None:
        raise AssertionError

    run = tpus.cluster.run_on_tpu
    with pytest.raises(InvalidValueError, match=r"there is no TPU type 'v4-33'; the nearest sizes of v4: v4-32, v4-64"):
        run(never, TpuRunConfig("v4-33"))
    with pytest.raises(InvalidValueError, match="num_slices"):
        TpuRunConfig(TYPE, 0)
    with pytest.raises(InvalidValueError, match="max_retries_failure"):
        TpuRunConfig(TYPE, 1, 1, -1)
    with pytest.raises(InvalidValueError, match="wait_seconds"):
        TpuRunConfig(TYPE, wait_seconds=-1.0)
    with pytest.raises(InvalidTypeError, match="function of one argument"):
        run("python train.py", TpuRunConfig(TYPE))  # type: ignore[arg-type]
    for env in (
        RuntimeEnv(container_image="x"),
        RuntimeEnv(extras=["tpu"]),
        RuntimeEnv(minimum_resources=[Resource("TPU", 4)]),
    ):
        with pytest.raises(UnsupportedError):
            run(never, TpuRunConfig(TYPE), env)


def test_a_process_of_another_cluster_is_told_so(tpus: TpuHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpus.cluster._rest, "session", "session_of_another")  # as a client of another cluster has it
    with pytest.raises(UnsupportedError, match="belongs to another Ray cluster"):
        tpus.cluster.run_on_tpu(lambda ctx: None, tpus.config(1))
