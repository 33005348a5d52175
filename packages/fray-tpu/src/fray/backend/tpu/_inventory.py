"""What there is: Fray's groups among all that a project has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fray.backend.tpu import _labels
from fray.backend.tpu._api import Api, at_once
from fray.backend.tpu._messages import group_of, group_of_nodes, labels_of, node_ids
from fray.backend.tpu.types import SliceGroup

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import Node, QueuedResource

__all__ = ["Inventory", "node_names_of"]


class Inventory:
    """Looks at zones, and at single groups.

    Args:
        api: The calls.
        zones: Where to look; `-` is everywhere.
        workers: How many zones are looked at at once.
    """

    def __init__(self, api: Api, zones: Sequence[str], workers: int) -> None:
        self._api = api
        self._zones = zones
        self._workers = workers

    def groups(self) -> list[SliceGroup]:
        """Return every group that Fray made, by name and zone."""
        found = [group for part in at_once(self._groups_in, self._zones, self._workers) for group in part]
        return sorted(found, key=lambda group: (group.name, group.zone, group.queued_resource))

    def refresh(self, group: SliceGroup) -> SliceGroup | None:
        """Look at a group again; None where nothing of it is left."""
        resource = self._api.get_queued_resource(group.queued_resource) if group.queued_resource else None
        nodes = list(self._api.get_nodes(node_names_of(group), self._workers).values())
        intent = group.labels.get(_labels.INTENT)
        if resource is not None and labels_of(resource).get(_labels.INTENT) == intent:
            return group_of(resource, nodes)
        nodes = [node for node in nodes if node.labels.get(_labels.INTENT) == intent]
        return group_of_nodes(nodes) if nodes else None

    def _groups_in(self, zone: str) -> list[SliceGroup]:
        # In this order: a request that is granted in between has its nodes in the second answer.
        resources = self._api.list_queued_resources(zone)
        return _join(resources, self._api.list_nodes(zone))


def node_names_of(group: SliceGroup) -> tuple[str, ...]:
    """Return the full names of the nodes that a group has, or would have."""
    ids = {one.name for one in group.slices}
    if group.queued_resource:
        ids.update(node_ids(group.queued_resource.rpartition("/")[2], group.num_slices))
    return tuple(f"projects/{group.project}/locations/{group.zone}/nodes/{node}" for node in sorted(ids))


def _join(resources: Sequence[QueuedResource], nodes: Sequence[Node]) -> list[SliceGroup]:
    """Return the groups that queued resources and nodes make up, nodes without a resource included."""
    # By the label, not by `Node.queued_resource`: what has Fray's label is Fray's, and nothing else is.
    of_intent: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        labels = node.labels
        if _labels.is_ours(labels):
            of_intent.setdefault((labels.get(_labels.INTENT, ""), labels.get(_labels.CHOICE, "")), []).append(node)
    groups = []
    for resource in resources:
        labels = labels_of(resource)
        if _labels.is_ours(labels):
            key = labels.get(_labels.INTENT, ""), labels.get(_labels.CHOICE, "")
            groups.append(group_of(resource, of_intent.pop(key, [])))
    return groups + [group_of_nodes(orphans) for orphans in of_intent.values()]
