"""Simulated slices as the tests of `run_on_tpu` meet them, and what must be as before when a test ends."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fray import TpuRunConfig
from fray.backend.ray._tpu_keeper import MARK
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.backend.ray.testing import SimulatedSlices

DEADLINE_SECONDS = 120.0
TYPE = "v4-16"
"""Two hosts a slice."""


def until(is_so: Callable[[], object], what: str, seconds: float = DEADLINE_SECONDS) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, f"not within {seconds} s: {what}"
        time.sleep(0.02)


class TpuHarness:
    """Two simulated slices of two hosts, and a client of their cluster."""

    def __init__(self) -> None:
        self.slices = SimulatedSlices(TYPE, 2)
        try:
            self.cluster = RayClusterContext(self.slices.address, grace_seconds=3.0)
        except BaseException:
            self.slices.close()
            raise

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.close()
        self.slices.close()

    def config(self, num_slices: int = 2, preemptions: int = 5, failures: int = 0, **options: float) -> TpuRunConfig:
        return TpuRunConfig(TYPE, num_slices, preemptions, failures, **options)  # type: ignore[arg-type]

    def whole(self) -> None:
        """Have all slices be there, as they were."""
        for index in range(2):
            self.slices.bring_back(index)
        until(lambda: self.nodes() == 5, "all nodes of the simulated cluster")

    def nodes(self) -> int:
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    def left_behind(self) -> list[str]:
        """What a run has left: processes on the hosts, groups and actors in Ray, locks on the chips that are held."""
        import ray
        from ray.util.placement_group import placement_group_table
        from ray.util.state import list_actors

        of_cluster = set(self.slices.processes())
        found = [f"process {pid}: {_describe(pid)}" for pid in processes_of_runs() if pid in of_cluster]
        found += [f"keeper {pid}: {_describe(pid)}" for pid in of_cluster if "_tpu_keeper" in command_of(pid)]
        actors = list_actors(
            self.slices.dashboard, filters=[("class_name", "=", "HostProcess"), ("state", "!=", "DEAD")], limit=10_000
        )
        found += [f"actor {actor.actor_id}: {actor.state}" for actor in actors]
        groups = placement_group_table() or {}
        found += [f"group {name}: {group['state']}" for name, group in groups.items() if group["state"] != "REMOVED"]
        available, total = ray.available_resources(), ray.cluster_resources()
        found += [f"{name} in use" for name in total if name.startswith("TPU") and available.get(name) != total[name]]
        return found + [str(path) for path in self.slices.folder.glob("*/libtpu_lockfile") if _is_held(path)]

    @contextmanager
    def leaving_nothing(self) -> Iterator[None]:
        yield
        try:
            until(lambda: not self.left_behind(), "nothing left behind", 60.0)
        except AssertionError:
            raise AssertionError(f"left behind: {self.left_behind()}") from None


def _is_held(lockfile: Path) -> bool:
    """Say whether a process holds a lock; a file that one left when it was killed is nobody's."""
    with suppress(FileNotFoundError), lockfile.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def command_of(pid: int) -> str:
    """What a process was started with; empty where it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def _describe(pid: int) -> str:
    try:
        command = command_of(pid)
        names = [each for each in Path(f"/proc/{pid}/environ").read_text().split("\0") if each.startswith("FRAY_")]
    except OSError:
        return "ended"
    return f"{command[:200]} {names}"


def is_running(pid: int) -> bool:
    """Say whether a process has not ended, whether or not anybody has taken note of it yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def processes_of_runs() -> list[int]:
    """All processes of this machine that belong to a run of `run_on_tpu`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError):
                environment = Path("/proc", entry, "environ").read_bytes()
                if f"\0{MARK}=".encode() in b"\0" + environment and is_running(int(entry)):
                    found.append(int(entry))
    return found
