"""From the request to the last process: slices whose hosts really boot, and really join a Ray cluster."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from fray import errors
from fray.backend.tpu import RayJoin, SliceChoice, SliceState, SystemClock, TpuProvisioner, startup_script
from fray.backend.tpu.testing import Ending, FakeCloud, Machines, Supply
from fray.backend.tpu.testing._machines import _marked, topology_of
from tests.ray.conftest import RayHead
from tests.tpu.cloud_harness import ZONE, request_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="hosts as processes need Linux"),
    pytest.mark.xdist_group("ray"),
]

DEADLINE_SECONDS = 240
QUICK = Supply(accept_seconds=0.0, queue_seconds=0.2, boot_seconds=0.3, delete_seconds=0.2)
TWO_HOSTS = SliceChoice("v4-16", ZONE)


class NowClock(SystemClock):
    """Looks often: what is waited for here takes moments."""

    def sleep(self, seconds: float) -> None:
        super().sleep(min(seconds, 0.1))


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    with FakeCloud(SystemClock()) as cloud:
        cloud.offer(QUICK)
        yield cloud


def provisioner(cloud: FakeCloud, state: Path) -> TpuProvisioner:
    return TpuProvisioner(cloud.project, endpoint=cloud.address, clock=NowClock(), owner="jane", state_directory=state)


def until(is_so: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not (found := is_so()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def processes_of(machines: Machines, node: str) -> list[int]:
    marks = [f"FRAY_TPU_STAND_IN_HOST={machine.mark}".encode() for machine in machines.of(node)]
    return [pid for mark in marks for pid in _marked(mark)]


def test_a_host_runs_its_script_and_ends_with_all_that_it_started(cloud: FakeCloud, tmp_path: Path) -> None:
    machines = cloud.run_startup_scripts(tmp_path / "hosts", environment={"GREETING": "hello"})
    script = '#!/bin/bash\necho "$GREETING from $GCE_METADATA_HOST"\nsetsid sleep 1000 &\necho done\nsleep 1000\n'
    with provisioner(cloud, tmp_path / "state") as jane:
        jane.create(request_of("train", TWO_HOSTS, startup_script=script))
        jane.wait_ready("train")
        assert machines.wait_for("train", 2)
        for machine in machines.of("train"):
            until(lambda machine=machine: "done" in machine.log, "the script's output")
            assert machine.log.startswith(f"hello from {machine.services.address}")
        marks = [f"FRAY_TPU_STAND_IN_HOST={machine.mark}".encode() for machine in machines.of("train")]
        until(lambda: all(len(_marked(mark)) >= 3 for mark in marks), "the script, and what it starts")
    assert machines.wait_for("train", 0)
    assert [pid for mark in marks for pid in _marked(mark)] == []


def test_a_request_is_its_clients_until_that_is_killed(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(Ending.NEVER, delete_seconds=0.2))
    program = (
        "from fray.backend.tpu import *\n"
        f"client = TpuProvisioner({cloud.project!r}, endpoint={cloud.address!r}, owner='jane', "
        f"state_directory={str(tmp_path)!r})\n"
        f"client.create(SliceRequest('train', SliceChoice('v4-16', {ZONE!r})))\n"
        "client.wait_ready('train', lambda progress: print('waits', flush=True))\n"
    )
    client = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert client.stdout is not None
    try:
        assert client.stdout.readline() == "waits\n"
        jane = provisioner(cloud, tmp_path)
        assert jane.reconcile().deleted == ()
        assert len(cloud.existing()) == 1
    finally:
        client.kill()
        client.wait()
        client.stdout.close()
    assert [one.name for one in jane.reconcile().deleted] == ["train"]
    assert cloud.existing() == []
    jane.close()


def test_processes_do_not_live_in_virtual_time(tmp_path: Path) -> None:
    with FakeCloud() as cloud, pytest.raises(errors.UnsupportedError, match="virtual time"):
        cloud.run_startup_scripts(tmp_path)


def test_an_endpoint_is_spoken_to_without_credentials(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FRAY_TPU_ENDPOINT", cloud.address)
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", cloud.project)
    assert TpuProvisioner(owner="jane", state_directory=tmp_path).list() == []


@pytest.mark.parametrize(("kind", "shape"), [("v5litepod-16", "4x4"), ("v4-8", "2x2x1"), ("v5p-256", "4x4x8")])
def test_a_slice_has_its_shape(kind: str, shape: str) -> None:
    assert topology_of(kind) == shape


@pytest.mark.timeout(900)  # on a busy machine Ray takes minutes to start, and to notice that a host is gone
def test_slices_join_ray_are_taken_back_leave_it_and_are_deleted(cloud: FakeCloud, tmp_path: Path) -> None:
    head = RayHead(quick=True)
    try:
        machines = cloud.run_startup_scripts(tmp_path / "hosts", notice_seconds=20)
        python = ".".join(map(str, sys.version_info[:2]))
        script = startup_script("v4-16", RayJoin(head.address, ray.__version__, python), lease_seconds=3600)
        with provisioner(cloud, tmp_path / "state") as jane:
            jane.create(request_of("train", TWO_HOSTS, startup_script=script))
            jane.wait_ready("train")
            try:
                hosts = until(lambda: two_alive(tpu_hosts(head)), "two hosts in the Ray cluster")
            except AssertionError as error:
                error.add_note("\n".join(machine.log for machine in machines.of("train")))
                raise
            assert [host["resources_total"]["TPU"] for host in hosts] == [4, 4]
            assert sum(host["resources_total"].get("TPU-v4-16-head", 0) for host in hosts) == 1
            assert all(host["resources_total"]["train"] == 1 for host in hosts)

            cloud.preempt("train")
            assert jane.describe("train").state is SliceState.PREEMPTED
            until(lambda: {host["state"] for host in tpu_hosts(head)} == {"DEAD"}, "both hosts out of the Ray cluster")
            jane.delete("train")
        assert machines.wait_for("train", 0)
        assert cloud.billed() == cloud.existing() == []
    finally:
        head.stop()


def tpu_hosts(head: RayHead) -> list[dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"{head.dashboard}/api/v0/nodes?detail=true", timeout=30) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
    except OSError:
        return []  # too busy to answer
    return [node for node in found if node["resources_total"].get("TPU")]


def two_alive(hosts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    alive = [host for host in hosts if host["state"] == "ALIVE"]
    return alive if len(alive) == 2 else []
