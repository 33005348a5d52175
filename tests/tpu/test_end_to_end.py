"""The whole way: slices that are asked for, join Ray, run a function, are taken away, come again, and are deleted."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray

from fray import TpuRunConfig
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.backend.ray.testing import SimulatedSlices
from fray.backend.tpu import RayJoin, SliceChoice, SliceState, TpuProvisioner, startup_script
from fray.backend.tpu.testing import FakeCloud, ImpatientClock, Machine, Supply
from fray.backend.tpu.testing._machines import _marked
from tests.ray.tpu_harness import processes_of_runs
from tests.tpu.cloud_harness import request_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="hosts as processes need Linux"),
    pytest.mark.xdist_group("tpu"),
    pytest.mark.timeout(900),  # on a busy machine Ray takes minutes to start
]

DEADLINE_SECONDS = 300.0
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "tpu_slice"
NAME, TYPE, HOSTS = "train", "v4-16", 2
CHOICE = SliceChoice(TYPE, "us-central2-b")
STEPS, TAKEN_AT_STEP = 12, 5
# Short enough that the first look at whether the slice is in use, an eighth of it after the start, renews it.
LEASE_SECONDS = 48.0
DEADLINES = {"queue_timeout_seconds": 20.0, "boot_timeout_seconds": 20.0, "time_to_live_seconds": 1.0}


def until(is_so: Callable[[], Any], what: str) -> Any:
    give_up = time.monotonic() + DEADLINE_SECONDS
    while not (found := is_so()):
        assert time.monotonic() < give_up, f"not within {DEADLINE_SECONDS:g} s: {what}"
        time.sleep(0.05)
    return found


def processes_of(machines: list[Machine]) -> list[int]:
    return [pid for each in machines for pid in _marked(f"FRAY_TPU_STAND_IN_HOST={each.mark}".encode())]


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedSlices]:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with SimulatedSlices(TYPE, 0) as head:
        ray.init(head.address, log_to_driver=False, logging_level="WARNING")
        yield head
        ray.shutdown()


def test_a_run_outlives_the_loss_of_its_slice_and_nothing_is_left(
    head: SimulatedSlices, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()

    def train(ctx: Any) -> dict[str, Any]:
        """Sum numbers up, a checkpoint a step; the first attempt gets no further than `TAKEN_AT_STEP`."""
        import json
        import os
        import time

        path = checkpoints / f"{ctx.host_id}.json"
        saved = json.loads(path.read_text()) if path.exists() else {"step": -1, "total": 0, "attempts": []}
        for step in range(saved["step"] + 1, STEPS):
            attempts = [*saved["attempts"], ctx.attempt]
            saved = {"step": step, "total": saved["total"] + step * HOSTS + ctx.host_id, "attempts": attempts}
            path.with_suffix(".part").write_text(json.dumps(saved))
            os.replace(path.with_suffix(".part"), path)
            ctx.report_step(step)
            while ctx.attempt == 1 and step == TAKEN_AT_STEP:
                time.sleep(0.05)
        return saved

    def steps() -> list[int]:
        return [json.loads(path.read_text())["step"] for path in checkpoints.glob("*.json")]

    def said(what: str) -> list[int]:
        return [index for index, message in enumerate(caplog.messages) if what in message]

    python = ".".join(map(str, sys.version_info[:2]))
    script = startup_script(TYPE, RayJoin(head.address, ray.__version__, python), lease_seconds=LEASE_SECONDS)
    request = request_of(NAME, CHOICE, startup_script=script, **DEADLINES)
    caplog.set_level(logging.WARNING, "fray.tpu")
    with (
        FakeCloud(ImpatientClock()) as cloud,
        TpuProvisioner(
            cloud.project,
            endpoint=cloud.address,
            clock=ImpatientClock(),
            owner="jane",
            state_directory=tmp_path / "state",
        ) as jane,
        RayClusterContext(head.address, grace_seconds=3.0) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        cloud.offer(Supply(accept_seconds=0.0, queue_seconds=0.2, boot_seconds=0.3, delete_seconds=0.2))
        machines = cloud.run_startup_scripts(
            tmp_path / "hosts", notice_seconds=10, environment={"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}
        )
        config = TpuRunConfig(TYPE, max_retries_failure=0, wait_seconds=2 * DEADLINE_SECONDS)
        running = pool.submit(cluster.run_on_tpu, train, config)

        until(lambda: said("0/1 slices, waiting for TPU-v4-16-head"), "the run waits for a slice")
        jane.create(request)
        first_lease = jane.wait_ready(NAME).lease
        assert machines.wait_for(NAME, HOSTS)
        first = machines.of(NAME)
        try:
            until(lambda: running.done() or steps() == [TAKEN_AT_STEP] * HOSTS, "the training's checkpoints")
        except AssertionError as error:
            error.add_note("\n".join(machine.log for machine in first))
            raise
        assert not running.done(), running.exception()
        # What runs on the slice keeps its lease from ending; nobody else renews it.
        until(lambda: "in use: the lease now ends" in first[0].log, "a renewal by worker 0")
        assert jane.describe(NAME).lease.until > first_lease.until

        cloud.preempt(NAME)
        assert jane.describe(NAME).state is SliceState.PREEMPTED
        assert machines.wait_for(NAME, 0, DEADLINE_SECONDS)
        for machine in first:
            assert f"leaving: worker {machine.worker_id} of {NAME} is being preempted" in machine.log
        assert processes_of(first) == []
        until(lambda: said("attempt 1 ended at step 5"), "the end of the first attempt")
        until(lambda: [at for at in said("0/1 slices") if at > said("attempt 1 ended")[0]], "the run waits again")
        assert not running.done()
        jane.delete(NAME)
        assert cloud.billed() == cloud.existing() == []

        jane.create(request)
        jane.wait_ready(NAME)
        assert machines.wait_for(NAME, HOSTS)
        second = machines.of(NAME)
        results = running.result(DEADLINE_SECONDS)
        ends = {"attempts": [1] * (TAKEN_AT_STEP + 1) + [2] * (STEPS - TAKEN_AT_STEP - 1), "step": STEPS - 1}
        assert [{key: each[key] for key in ends} for each in results] == [ends] * HOSTS
        assert sum(each["total"] for each in results) == sum(range(STEPS * HOSTS))

        jane.delete(NAME)
        assert machines.wait_for(NAME, 0)
        assert cloud.billed() == cloud.existing() == []
        assert [entry.states[-1][1] for entry in cloud.journal if entry.kind == "node"] == ["DELETING"] * 2
        assert processes_of([*first, *second]) == processes_of_runs() == []
        assert not [machine for machine in [*first, *second] if machine.ray_directory.exists()]


def test_the_example_needs_no_account(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "FRAY_", "TPU_"))}
    done = subprocess.run(
        [sys.executable, "main.py", "--fake"],
        cwd=EXAMPLE,
        env=environment | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * DEADLINE_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    results = [json.loads(line) for line in lines if line.startswith("{")]
    assert [each["rank"] for each in results] == [0, 1]
    assert all(each["attempt"] > 1 and each["from_step"] > 0 for each in results)
    for line in ("Google: takes train back", "fleet: train is PREEMPTED", "568820, as it has to be", "billed now: []"):
        assert line in lines
    assert [line for line in lines if line.startswith("the journal:")] == [
        "the journal: train CREATING READY PREEMPTED DELETING gone",
        "the journal: train CREATING READY DELETING gone",
    ]
    # What killed processes of Python's multiprocessing, which Ray's agents use, leave is not the example's.
    assert [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")] == []
