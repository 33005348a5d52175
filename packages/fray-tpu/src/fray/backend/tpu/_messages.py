"""Between Fray's values and the Cloud TPU API's messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fray.backend.tpu import _labels
from fray.backend.tpu._states import group_state, node_state, queued_resource_state
from fray.backend.tpu.types import Host, Lease, Slice, SliceChoice, SliceGroup, SliceRequest, SliceState, Tier

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import AttachedDisk, Node, QueuedResource
    from google.protobuf.timestamp_pb2 import Timestamp

__all__ = ["group_of", "group_of_nodes", "labels_of", "node_ids", "queued_resource_id", "queued_resource_of"]


def queued_resource_id(name: str, index: int) -> str:
    """Return the id of what is asked for by the choice of this index: the first has the group's own name."""
    return name if index == 0 else f"{name}-alternative-{index}"


def node_ids(resource_id: str, num_slices: int) -> tuple[str, ...]:
    """Return the ids of the nodes that a queued resource makes."""
    if num_slices == 1:
        return (resource_id,)
    return tuple(f"{resource_id}-{number}" for number in range(num_slices))


def queued_resource_of(
    request: SliceRequest,
    index: int,
    *,
    project: str,
    intent: str,
    owner: str,
    lease_until: datetime,
    valid_seconds: float,
) -> QueuedResource:
    """Return what Google is asked for by one choice of a request.

    Args:
        request: What is asked for.
        index: Of the choice.
        project: Who pays.
        intent: Which request this is, told apart from earlier ones of the same name.
        owner: Who asks.
        lease_until: When the lease ends.
        valid_seconds: After which Google gives the request up by itself.
    """
    from google.cloud import tpu_v2
    from google.protobuf.duration_pb2 import Duration

    choice = request.choices[index]
    parent = f"projects/{project}/locations/{choice.zone}"
    metadata = dict(request.metadata)
    if request.startup_script is not None:
        metadata["startup-script"] = request.startup_script
    node = tpu_v2.Node(
        description=request.purpose[:512],
        accelerator_type=choice.accelerator_type,
        runtime_version=choice.runtime_version,
        network_config=tpu_v2.NetworkConfig(
            network=request.network or "",
            subnetwork=request.subnetwork or "",
            enable_external_ips=request.external_ips,
        ),
        # Spot is said once, by the tier of the whole request.
        scheduling_config=tpu_v2.SchedulingConfig(reserved=choice.tier is Tier.RESERVED),
        labels={
            **request.labels,
            _labels.MANAGED_BY: _labels.MANAGED_BY_FRAY,
            _labels.OWNER: _labels.label_value(owner),
            _labels.PURPOSE: _labels.label_value(request.purpose),
            _labels.LEASE_UNTIL: _labels.lease_value(lease_until),
            _labels.GROUP: request.name,
            _labels.CHOICE: str(index),
            _labels.INTENT: intent,
        },
        metadata=metadata,
        tags=list(request.tags),
        data_disks=[_disk(disk.source, disk.read_only, project, choice.zone) for disk in request.data_disks],
    )
    if request.service_account is not None:
        node.service_account = tpu_v2.ServiceAccount(
            email=request.service_account, scope=["https://www.googleapis.com/auth/cloud-platform"]
        )
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, node=node)
    resource_id = queued_resource_id(request.name, index)
    if request.num_slices == 1:
        spec.node_id = resource_id
    else:
        spec.multislice_params = tpu_v2.QueuedResource.Tpu.NodeSpec.MultisliceParams(
            node_count=request.num_slices, node_id_prefix=resource_id
        )
    resource = tpu_v2.QueuedResource(
        tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]),
        queueing_policy=tpu_v2.QueuedResource.QueueingPolicy(
            valid_until_duration=Duration(seconds=max(1, math.ceil(valid_seconds)))
        ),
    )
    if choice.tier is Tier.SPOT:
        resource.spot = tpu_v2.QueuedResource.Spot()
    elif choice.tier is Tier.RESERVED:
        resource.guaranteed = tpu_v2.QueuedResource.Guaranteed()
        if choice.reservation is not None:
            resource.reservation_name = _reservation(choice, project)
    return resource


def labels_of(resource: QueuedResource) -> dict[str, str]:
    """Return the labels that a queued resource's nodes have, or will have: it has none of its own."""
    return {key: value for spec in resource.tpu.node_spec for key, value in spec.node.labels.items()}


def group_of(resource: QueuedResource, nodes: Sequence[Node]) -> SliceGroup:
    """Return the group that a queued resource and its nodes are."""
    from google.cloud.tpu_v2 import QueuedResource, QueuedResourceState

    raw = QueuedResource.pb(resource)  # proto-plus warns of numbers that it does not know
    project, zone, resource_id = _parts(resource.name)
    spec = resource.tpu.node_spec[0] if resource.tpu.node_spec else QueuedResource.Tpu.NodeSpec()
    num_slices = spec.multislice_params.node_count or 1
    slices = _slices(nodes)
    by_user = raw.state.state_initiator == QueuedResourceState.StateInitiator.USER
    state = queued_resource_state(raw.state.state, by_user=by_user)
    message = raw.state.failed_data.error.message
    if state is SliceState.UNKNOWN:
        message = message or f"Google says state {raw.state.state}, which this version of Fray does not know"
    if state is SliceState.READY:
        state = group_state(one.state for one in slices)
        message = "; ".join(f"{one.name}: {one.message}" for one in slices if one.message)
        if (missing := num_slices - len(slices)) > 0:
            # "Not found" counts as taken back: a node's state need not ever say PREEMPTED.
            state = SliceState.PREEMPTED
            message = f"{missing} of {num_slices} slices are not there (any more)"
    labels = dict(nodes[0].labels) if nodes else labels_of(resource)
    return SliceGroup(
        name=labels.get(_labels.GROUP, resource_id),
        project=project,
        zone=zone,
        accelerator_type=spec.node.accelerator_type,
        tier=_tier(raw.HasField("spot"), raw.HasField("guaranteed"), spec.node),
        num_slices=num_slices,
        state=state,
        slices=slices,
        lease=_latest_lease([labels_of(resource), *(dict(node.labels) for node in nodes)]),
        created=_moment(raw.create_time),
        message=message,
        queued_resource=resource.name,
        labels=labels,
        runtime_version=spec.node.runtime_version,
    )


def group_of_nodes(nodes: Sequence[Node]) -> SliceGroup:
    """Return the group that nodes are whose queued resource is gone."""
    project, zone, node_id = _parts(nodes[0].name)
    slices = _slices(nodes)
    labels = dict(nodes[0].labels)
    return SliceGroup(
        name=labels.get(_labels.GROUP, node_id),
        project=project,
        zone=zone,
        accelerator_type=slices[0].accelerator_type,
        tier=_tier(False, False, nodes[0]),
        num_slices=len(slices),
        state=group_state(one.state for one in slices),
        slices=slices,
        lease=_latest_lease(dict(node.labels) for node in nodes),
        created=slices[0].created,
        message="the queued resource that made it is gone",
        labels=labels,
        runtime_version=nodes[0].runtime_version,
    )


def _slices(nodes: Sequence[Node]) -> tuple[Slice, ...]:
    from google.cloud.tpu_v2 import Node

    def place(node: Node) -> tuple[int, str]:
        number = node.name.rpartition("-")[2]
        return (int(number) if number.isdecimal() else 0, node.name)

    found = []
    for node in sorted(nodes, key=place):
        raw = Node.pb(node)
        _, zone, node_id = _parts(node.name)
        endpoints = enumerate(raw.network_endpoints)
        hosts = tuple(Host(number, one.ip_address, one.access_config.external_ip or None) for number, one in endpoints)
        state = node_state(raw.state)
        message = node.health_description
        if state is SliceState.UNKNOWN:
            message = message or f"Google says state {raw.state}, which says nothing"
        found.append(Slice(node_id, zone, node.accelerator_type, state, hosts, message, _moment(raw.create_time)))
    return tuple(found)


def _latest_lease(labels: Iterable[Mapping[str, str]]) -> Lease | None:
    """Of the slices of a group each may have been renewed by its own host: the last to end counts."""
    leases = [lease for each in labels if (lease := _labels.lease_of(each)) is not None]
    if not leases:
        return None
    ends = [lease.until for lease in leases if lease.until is not None]
    # One that cannot be read is not taken for one that has ended.
    return replace(leases[0], until=max(ends) if len(ends) == len(leases) else None)


def _tier(spot: bool, guaranteed: bool, node: Node) -> Tier:
    if spot or node.scheduling_config.spot or node.scheduling_config.preemptible:
        return Tier.SPOT
    return Tier.RESERVED if guaranteed or node.scheduling_config.reserved else Tier.ON_DEMAND


def _disk(source: str, read_only: bool, project: str, zone: str) -> AttachedDisk:
    from google.cloud.tpu_v2 import AttachedDisk

    mode = AttachedDisk.DiskMode.READ_ONLY if read_only else AttachedDisk.DiskMode.READ_WRITE
    if "/" not in source:
        source = f"projects/{project}/zones/{zone}/disks/{source}"
    return AttachedDisk(source_disk=source, mode=mode)


def _reservation(choice: SliceChoice, project: str) -> str:
    name = choice.reservation or ""
    return name if "/" in name else f"projects/{project}/locations/{choice.zone}/reservations/{name}"


def _parts(full_name: str) -> tuple[str, str, str]:
    """Return project, zone and id of `projects/P/locations/Z/…/ID`."""
    parts = full_name.split("/")
    return parts[1], parts[3], parts[5]


def _moment(timestamp: Timestamp) -> datetime | None:
    return timestamp.ToDatetime(UTC) if timestamp.seconds else None
