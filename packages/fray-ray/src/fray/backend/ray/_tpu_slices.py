"""Acquiring TPU slices of a Ray cluster: all that are asked for, or none.

One placement group holds every host of every slice. Each of its bundles names its host by Ray's own labels (the slice,
the worker's id), so a bundle's index says which host it is; and Ray makes the group as a whole, so two callers that
want the same slices cannot each hold a part of them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fray.errors import StockoutError
from fray.tpu import TpuType

__all__ = ["Host", "Reservation", "SetAside", "acquire", "alive_nodes"]

_SLICE, _WORKER, _POD_TYPE = "ray.io/tpu-slice-name", "ray.io/tpu-worker-id", "ray.io/tpu-pod-type"
# How long Ray has to make a group of hosts that looked free.
_GROUP_SECONDS = 5.0
_REMOVAL_SECONDS = 30.0
_LOOK_SECONDS, _LOOK_SECONDS_AT_MOST = 0.1, 2.0
# Nobody wants to hear of a wait that is over at once.
_SAY_AFTER_SECONDS, _SAY_EVERY_SECONDS = 3.0, 60.0


@dataclass(frozen=True)
class Host:
    """A host of a slice.

    Attributes:
        node_id: Ray's id of its node.
        slice_name: Ray's name of its slice.
        worker_id: Its place in the slice (`TPU_WORKER_ID`).
        address: Its IP address.
        head_resource: What Ray gives worker 0 of a slice, for others that reserve slices by it; empty elsewhere.
    """

    node_id: str
    slice_name: str
    worker_id: int
    address: str
    head_resource: str = ""

    def __str__(self) -> str:
        return f"{self.slice_name} host {self.worker_id} ({self.address})"

    def wanted(self, chips: int, resources: Mapping[str, float]) -> dict[str, float]:
        """Return what is reserved of it: its chips, what the caller asks for beside them, and the slice's head."""
        return {**resources, "TPU": float(chips), **({self.head_resource: 1.0} if self.head_resource else {})}


class SetAside:
    """Slices that are not to be used for a while."""

    def __init__(self) -> None:
        self._until: dict[str, tuple[float, str]] = {}

    def add(self, slice_name: str, seconds: float, why: str) -> None:
        """Set a slice aside."""
        self._until[slice_name] = (time.monotonic() + seconds, why)

    def now(self) -> dict[str, str]:
        """Return those that are set aside at present, and why."""
        return {name: why for name, (until, why) in self._until.items() if time.monotonic() < until}


class Reservation:
    """Slices that are held.

    Attributes:
        hosts: All hosts, slice by slice, in the order of their worker ids; bundle `i` of the group is host `i`.
        group: Ray's placement group.
    """

    def __init__(self, hosts: list[Host], group: Any) -> None:
        self.hosts = hosts
        self.group = group

    def release(self) -> None:
        """Give the slices back, and wait until Ray has taken them."""
        _remove(self.group)

    def lost_hosts(self) -> list[Host]:
        """Return the hosts that are no nodes of the cluster any more."""
        alive = alive_nodes()
        return [host for host in self.hosts if host.node_id not in alive]


def acquire(
    kind: TpuType,
    num_slices: int,
    *,
    resources: Mapping[str, float],
    give_up: float,
    set_aside: SetAside,
    tell: Callable[[str], None],
) -> Reservation:
    """Wait until so many slices are free, and hold them.

    While there are too few, Ray is told of the demand, for an autoscaler to see; nothing is held meanwhile.

    Args:
        kind: Which type.
        num_slices: How many of it.
        resources: What of each host is wanted beside its chips.
        give_up: When to, on the monotonic clock.
        set_aside: Slices that are not to be taken now.
        tell: Called with what is missing, when that has changed.

    Raises:
        StockoutError: They did not come in time; it says what was missing.
    """
    since, pause, said, said_at = time.monotonic(), _LOOK_SECONDS, "", 0.0
    demand: _Demand | None = None
    contended: set[str] = set()
    try:
        while True:
            view = _View.of(kind, resources)
            aside = set_aside.now()
            free = [name for name in view.free if name not in aside and name not in contended]
            contended.clear()
            if len(free) >= num_slices:
                chosen = free[:num_slices]
                if reservation := _reserve(view, chosen, resources):
                    return reservation
                contended.update(chosen[: len(view.free) - num_slices])
            missing = view.describe_missing(len(free), num_slices, aside)
            now = time.monotonic()
            if now > give_up:
                raise StockoutError(
                    f"run_on_tpu did not get its slices in {now - since:.0f} s: {missing}. Nothing is held. Ask for "
                    "fewer, wait longer (TpuRunConfig(wait_seconds=…)), or provision more (`fray tpu up`)"
                )
            if now - since > _SAY_AFTER_SECONDS and (missing != said or now - said_at > _SAY_EVERY_SECONDS):
                tell(missing)
                said, said_at = missing, now
            if len(free) < num_slices:
                demand = demand or _Demand(kind, num_slices - len(free), view.names)
                if demand.is_met():  # there are new ones: look at once
                    demand.withdraw()
                    demand, pause = None, _LOOK_SECONDS
            time.sleep(min(pause * random.uniform(0.5, 1.5), max(0.0, give_up - now) + 0.01))
            pause = min(pause * 1.5, _LOOK_SECONDS_AT_MOST)
    finally:
        if demand is not None:
            demand.withdraw()


def alive_nodes() -> dict[str, dict[str, Any]]:
    """Return the nodes of the cluster that are alive, by their ids."""
    import ray

    return {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


class _View:
    """The slices of a type as they stand.

    Attributes:
        slices: Complete ones: name → hosts in the order of their worker ids.
        free: The names of those whose hosts nobody uses.
        names: Of all of which at least a host is there.
    """

    def __init__(self, kind: TpuType) -> None:
        self._kind = kind
        self.slices: dict[str, list[Host]] = {}
        self.free: list[str] = []
        self.names: list[str] = []
        self._incomplete: dict[str, int] = {}
        self._head = f"TPU-{kind.name}-head"

    @classmethod
    def of(cls, kind: TpuType, resources: Mapping[str, float]) -> _View:
        from fray.backend.ray._internals import available_resources

        view = cls(kind)
        found: dict[str, dict[int, Host]] = {}
        twice: list[Host] = []
        for node_id, node in alive_nodes().items():
            labels = node["Labels"]
            name, worker = labels.get(_SLICE), labels.get(_WORKER)
            if name and worker is not None and labels.get(_POD_TYPE) in pod_types(kind):
                heads = [each for each in node["Resources"] if each.startswith("TPU-") and each.endswith("-head")]
                host = Host(node_id, name, int(worker), node["NodeManagerAddress"], heads[0] if heads else "")
                if host.worker_id in found.setdefault(name, {}):
                    twice.append(host)
                found[name][host.worker_id] = host
        for host in twice:
            # One that has just come back, and Ray believes in the former still: which is which will soon be seen.
            found[host.slice_name].pop(host.worker_id, None)
        view.names = sorted(found)
        available = available_resources() if found else {}
        for name in view.names:
            hosts = [found[name][worker] for worker in range(kind.hosts) if worker in found[name]]
            if len(hosts) < kind.hosts:
                view._incomplete[name] = len(hosts)
                continue
            view.slices[name] = hosts
            if all(
                available.get(host.node_id, {}).get(each, 0.0) >= quantity
                for host in hosts
                for each, quantity in host.wanted(kind.chips_per_host, resources).items()
            ):
                view.free.append(name)
        return view

    def describe_missing(self, usable: int, wanted: int, aside: Mapping[str, str]) -> str:
        said = f"{usable}/{wanted} slices, waiting for {self._head}"
        reasons = []
        if busy := [name for name in self.slices if name not in self.free]:
            reasons.append(f"{_listed(busy)} in use")
        for name, count in self._incomplete.items():
            reasons.append(f"{name} has {count} of its {self._kind.hosts} hosts")
        reasons += [f"{name} set aside: {why}" for name, why in aside.items()]
        if not self.names:
            reasons.append(f"the cluster has no host of type {self._kind.name}")
        return f"{said} ({'; '.join(reasons)})" if reasons else said


def pod_types(kind: TpuType) -> set[str]:
    """Return the names by which Ray's label may call a type."""
    size = kind.name.partition("-")[2]
    return {kind.name, f"{kind.generation}-{size}"}


class _Demand:
    """A group that waits for slices which are not there: what an autoscaler goes by."""

    def __init__(self, kind: TpuType, count: int, known: list[str]) -> None:
        from ray.util.placement_group import placement_group

        # Not the heads of slices that are there already, and cannot be had as a whole.
        not_known: dict[str, Any] = {}
        if known:
            not_known["bundle_label_selector"] = [{_SLICE: f"!in({','.join(known)})"}] * count
        bundles = [{f"TPU-{kind.name}-head": 1.0} for _ in range(count)]
        self._group = placement_group(bundles, strategy="STRICT_SPREAD", **not_known)

    def is_met(self) -> bool:
        return bool(self._group.wait(0))

    def withdraw(self) -> None:
        _remove(self._group)


def _reserve(view: _View, names: list[str], resources: Mapping[str, float]) -> Reservation | None:
    from ray.util.placement_group import placement_group

    hosts = [host for name in names for host in view.slices[name]]
    bundles, selectors = [], []
    for host in hosts:
        bundles.append(host.wanted(view._kind.chips_per_host, resources))
        selectors.append({_SLICE: host.slice_name, _WORKER: str(host.worker_id)})
    group = placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=selectors)
    try:
        if group.wait(_GROUP_SECONDS):
            return Reservation(hosts, group)
    except BaseException:
        _remove(group)
        raise
    _remove(group)
    return None


def _remove(group: Any) -> None:
    """Remove a placement group, and wait until it is gone."""
    from ray.util.placement_group import placement_group_table, remove_placement_group

    remove_placement_group(group)
    give_up = time.monotonic() + _REMOVAL_SECONDS
    while time.monotonic() < give_up:
        with suppress(Exception):  # the head may just be away
            if placement_group_table(group).get("state") in ("REMOVED", None):
                return
        time.sleep(0.01)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
