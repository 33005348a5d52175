"""A slice that is asked for, joins Ray, trains, is taken away in the middle, asked for again, and deleted.

`python main.py --fake` needs no account and no TPU: a stand-in for Google, whose machines are processes here, and a Ray
cluster on this machine. Without `--fake` the same is done with Google's: see README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ray
from train import expected, train

import fray
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.backend.ray.testing import SimulatedSlices
from fray.backend.tpu import (
    Progress,
    RayJoin,
    SliceChoice,
    SliceRequest,
    SliceState,
    Tier,
    TpuProvisioner,
    startup_script,
)
from fray.backend.tpu.testing import FakeCloud, ImpatientClock, Supply
from fray.tpu import tpu_type

NAME, TYPE, ZONE = "train", "v4-16", "us-central2-b"
LEASE_SECONDS = 3600
PREEMPTED_AT_STEP = 10


def main(arguments: argparse.Namespace) -> None:
    """Run the whole."""
    if not arguments.fake:
        with TpuProvisioner(arguments.project) as provisioner:
            use(provisioner, arguments.join_ray, arguments.checkpoints, look_seconds=30)
        return
    with tempfile.TemporaryDirectory() as folder, google_and_ray_of_this_machine(Path(folder)) as (cloud, head):
        checkpoints = Path(folder) / "checkpoints"
        checkpoints.mkdir()
        threading.Thread(target=preempt, args=(cloud, checkpoints / "host-0.json"), daemon=True).start()
        state = Path(folder) / "state"
        with TpuProvisioner(
            cloud.project, endpoint=cloud.address, clock=ImpatientClock(), owner="me", state_directory=state
        ) as provisioner:
            use(provisioner, head, str(checkpoints), look_seconds=0.5)
        for entry in cloud.journal:
            if entry.kind == "node":
                print(
                    "the journal:",
                    entry.name.rpartition("/")[2],
                    *(state for _, state in entry.states),
                    "gone" if entry.gone else "there",
                )
        print("billed now:", [entry.name for entry in cloud.billed()])


class NotNeededError(Exception):
    """The training has ended before its slice came."""


def use(provisioner: TpuProvisioner, head: str, checkpoints: str, look_seconds: float) -> None:
    """Train on a slice, of which there is one for as long as that takes."""
    python = ".".join(map(str, sys.version_info[:2]))
    request = SliceRequest(
        NAME,
        (SliceChoice(TYPE, ZONE, Tier.SPOT),),
        purpose="example",
        startup_script=startup_script(TYPE, RayJoin(head, ray.__version__, python), lease_seconds=LEASE_SECONDS),
        time_to_live_seconds=LEASE_SECONDS,
    )
    is_over = threading.Event()
    fleet = threading.Thread(target=keep, args=(provisioner, request, is_over, look_seconds))
    fleet.start()
    try:
        with RayClusterContext(head) as cluster:
            results = cluster.run_on_tpu(
                partial(train, checkpoints=checkpoints),
                # A fleet that cannot get a slice says so; nobody waits here for ever.
                fray.TpuRunConfig(TYPE, wait_seconds=3 * 3600),
                fray.RuntimeEnv(working_dir=str(Path(__file__).parent)),
            )
    finally:
        ray.shutdown()
        is_over.set()
        fleet.join()
    for result in results:
        print(json.dumps(result))
    found, wanted = sum(result["total"] for result in results), expected(tpu_type(TYPE).hosts)
    print(f"{found}, as it has to be" if found == wanted else f"{found} is wrong: it has to be {wanted}")


def keep(provisioner: TpuProvisioner, request: SliceRequest, is_over: threading.Event, look_seconds: float) -> None:
    """Have a slice, and ask for another when it was taken away, until it is needed no more."""

    def look(progress: Progress) -> None:
        if is_over.is_set():
            raise NotNeededError  # whatever ends `wait_ready` early, what there is of the request is deleted

    while not is_over.is_set():
        say("asks for a slice")
        provisioner.create(request)
        try:
            group = provisioner.wait_ready(request.name, look)
        except NotNeededError:
            return
        say(f"{group.name} is {group.state} in {group.zone}, with {len(group.hosts)} hosts")
        while not is_over.wait(look_seconds):
            if (state := provisioner.describe(request.name).state) in (SliceState.PREEMPTED, SliceState.FAILED):
                say(f"{group.name} is {state}")
                break
        provisioner.delete(request.name)
        say(f"{group.name} is deleted")


def say(message: str) -> None:
    """Tell what becomes of the fleet."""
    print(f"fleet: {message}", flush=True)


@contextmanager
def google_and_ray_of_this_machine(folder: Path) -> Iterator[tuple[FakeCloud, str]]:
    """Start what `--fake` stands for; all of it ends with this."""
    with SimulatedSlices(TYPE, 0) as cluster, FakeCloud(ImpatientClock()) as cloud:
        cloud.offer(Supply(accept_seconds=0.1, queue_seconds=0.5, boot_seconds=1.0, delete_seconds=0.5))
        cloud.run_startup_scripts(folder / "hosts", notice_seconds=5)
        yield cloud, cluster.address


def preempt(cloud: FakeCloud, checkpoint: Path) -> None:
    """Take the slice away in the middle."""
    pause = threading.Event()
    while not checkpoint.exists() or json.loads(checkpoint.read_text())["step"] < PREEMPTED_AT_STEP:
        pause.wait(0.05)
    print(f"Google: takes {NAME} back", flush=True)
    cloud.preempt(NAME)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true", help="a stand-in for Google, on this machine")
    parser.add_argument("--project", help="who pays")
    parser.add_argument("--join-ray", metavar="HOST:PORT", help="the head, as the hosts reach it")
    parser.add_argument("--checkpoints", metavar="FOLDER", help="that all hosts share")
    given = parser.parse_args()
    if not given.fake and not (given.join_ray and given.checkpoints):
        parser.error("give --fake, or --join-ray and --checkpoints")
    main(given)
