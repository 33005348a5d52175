"""What `run_on_tpu` adds to the same processes started by hand, on TPU slices that are simulated on this machine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.measuring import Comparison, Settings, Side, clock, compare, interleave

if TYPE_CHECKING:
    from fray.backend.ray.ray_cluster import RayClusterContext
    from fray.backend.ray.testing import SimulatedSlices

__all__ = ["ROWS", "SimulatedPod"]

_TYPE, _SLICES = "v4-16", 2
_MEGASCALE_PORT = 8081
_SETTLE_SECONDS = 20.0


class SimulatedPod:
    """All simulated slices of a cluster, to call a trivial function on each of their hosts.

    Attributes:
        slices: Of which all are used.
        cluster: Fray's client of their cluster, which this process belongs to.
    """

    def __init__(self, slices: SimulatedSlices, cluster: RayClusterContext, tpu_type: str) -> None:
        from fray.backend.ray.ray_tpu import get_tpu_config

        self.slices, self.cluster = slices, cluster
        self.kind = get_tpu_config(tpu_type)
        self.rest()

    @classmethod
    @contextmanager
    def of(cls, tpu_type: str, num_slices: int) -> Iterator[SimulatedPod]:
        """Start the slices and join their cluster; end both."""
        # What the environment says of other clusters is not meant for this one.
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        with patch.dict(
            os.environ, {**others, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}, clear=True
        ):
            import ray

            from fray.backend.ray.ray_cluster import RayClusterContext
            from fray.backend.ray.testing import SimulatedSlices

            with SimulatedSlices(tpu_type, num_slices) as slices, RayClusterContext(slices.address) as cluster:
                ray.init(slices.address, logging_level=logging.WARNING, log_to_driver=False)
                try:
                    yield cls(slices, cluster, tpu_type)
                finally:
                    ray.shutdown()

    def rest(self) -> None:
        """Take the hosts' processes of now for those that they have at rest."""
        self._at_rest = len(self.slices.processes())

    def places(self) -> list[tuple[str | None, str | None]]:
        """Return what the function is to return: slice and worker id, as its environment has them."""
        count = len(self.slices.hosts)
        return [
            (str(slice_id) if count > 1 else None, str(worker_id))
            for slice_id in range(count)
            for worker_id in range(self.kind.hosts)
        ]

    def through_fray(self) -> None:
        """Call it by `run_on_tpu`."""
        from fray import TpuRunConfig

        function = _trivial()
        config = TpuRunConfig(self.kind.name, len(self.slices.hosts), max_retries_preemption=0, max_retries_failure=0)
        assert self.cluster.run_on_tpu(lambda _: function(), config) == self.places()

    def by_hand(self, *, actors: bool = False) -> None:
        """Call it as one would without Fray: a placement group, a process for each host with its own environment."""
        import ray
        from ray.util.placement_group import placement_group_table, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        function = _trivial()
        remote: Any
        if actors:
            remote = ray.remote(type("Host", (), {"call": lambda self: function()}))
        else:
            remote = ray.remote(max_calls=1, max_retries=0)(function)
        group = self.group_by_hand()
        kept: list[Any] = []
        try:
            assert group.wait(60)
            first = placement_group_table(group)["bundles_to_node_id"][0]
            address = next(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == first)
            refs: list[Any] = []
            for index in range(group.bundle_count):
                made = remote.options(
                    num_cpus=0,
                    resources={"TPU": self.kind.chips_per_host},
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
                    runtime_env={"env_vars": self._variables(index, address)},
                ).remote()
                kept.append(made)
                refs.append(made.call.remote() if actors else made)
            assert ray.get(refs) == self.places()
        finally:
            if actors:
                for actor in kept:
                    ray.kill(actor)
            remove_placement_group(group)

    def group_by_hand(self) -> Any:
        """Ask for a group with a bundle for each host, which its labels name."""
        from ray.util.placement_group import placement_group

        hosts = [host for hosts in self.slices.hosts for host in hosts]
        return placement_group(
            [{"TPU": float(self.kind.chips_per_host)} for _ in hosts],
            strategy="STRICT_SPREAD",
            bundle_label_selector=[
                {"ray.io/tpu-slice-name": host.slice_name, "ray.io/tpu-worker-id": str(host.worker_id)}
                for host in hosts
            ],
        )

    def is_free(self) -> bool:
        """Whether Ray says that nobody uses any host."""
        from fray.backend.ray._tpu_slices import _View

        return len(_View.of(self.kind, {}).free) == len(self.slices.hosts)

    def settle(self) -> None:
        """Wait until the hosts are free and what ran on them has ended.

        What stays past a deadline is taken for what Ray keeps.
        """
        give_up = time.monotonic() + _SETTLE_SECONDS
        while not self.is_free() or len(self.slices.processes()) > self._at_rest:
            if time.monotonic() > give_up:
                if not self.is_free():
                    raise TimeoutError(f"the hosts are still in use after {_SETTLE_SECONDS:g} s")
                self._at_rest = len(self.slices.processes())
            time.sleep(0.05)

    def _variables(self, index: int, address: str) -> dict[str, str]:
        slice_id, worker_id = divmod(index, self.kind.hosts)
        # One that no other has, so that no process is used again that has imported something.
        variables = {"TPU_WORKER_ID": str(worker_id), "JAX_PLATFORMS": "", "BENCHMARK_PROCESS": token_hex(8)}
        if len(self.slices.hosts) > 1:
            variables |= {
                "MEGASCALE_COORDINATOR_ADDRESS": f"{address}:{_MEGASCALE_PORT}",
                "MEGASCALE_NUM_SLICES": str(len(self.slices.hosts)),
                "MEGASCALE_PORT": str(_MEGASCALE_PORT),
                "MEGASCALE_SLICE_ID": str(slice_id),
            }
        return variables


def measure_run(settings: Settings) -> list[Comparison]:
    """Call a trivial function on each of four hosts, by `run_on_tpu` and by hand."""
    with SimulatedPod.of(_TYPE, _SLICES) as pod:

        def side(name: str, action: Callable[[], None]) -> Side:
            def measure() -> float:
                pod.settle()  # by hand nobody waits for the end of what was started
                return clock(action)

            return Side(name, measure)

        sides = [
            side("fray", pod.through_fray),
            side("tasks", pod.by_hand),
            side("actors", lambda: pod.by_hand(actors=True)),
        ]
        found = interleave("run-on-tpu", sides, settings.rounds(9), settings.seed)
    what = f"`run_on_tpu` of a trivial function, {_SLICES} simulated slices of {_TYPE}"
    tasks = compare(
        "run-on-tpu", what, found["fray"], "tasks on a placement group", found["tasks"], kind="ratio", bar=1.2
    )
    actors = compare("run-on-tpu", what, found["fray"], "the same by actors", found["actors"], kind="ratio")
    tasks.note = (
        "four processes are started on one machine, which is most of the time on either side. By hand: a STRICT_SPREAD "
        "group whose bundles name the hosts by label, a fresh process for each with TPU_WORKER_ID and the MEGASCALE "
        "variables in its runtime_env, get, remove. It does not look for free slices, nor have the hosts begin "
        "together, nor bring their output here, nor wait until their processes and the group are gone; Fray's time has "
        "all that. What is still ending after the one side is waited for, outside of the time, before the other"
    )
    return [tasks, actors]


ROWS = {"run-on-tpu": measure_run}


def _trivial() -> Callable[[], tuple[str | None, str | None]]:
    """Return the function, which is pickled by value: the hosts have no `benchmarks` to import it from."""

    def place() -> tuple[str | None, str | None]:
        return os.environ.get("MEGASCALE_SLICE_ID"), os.environ.get("TPU_WORKER_ID")

    return place
