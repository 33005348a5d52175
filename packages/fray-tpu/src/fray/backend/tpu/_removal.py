"""Deleting, and looking until it is gone."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fray.backend.tpu import _labels
from fray.backend.tpu._api import CALL_TIMEOUT_SECONDS, Api, at_once
from fray.backend.tpu._intents import Candidate, Intent
from fray.backend.tpu._inventory import node_names_of
from fray.backend.tpu._messages import labels_of
from fray.backend.tpu._states import node_state, queued_resource_state
from fray.backend.tpu.interface import Clock
from fray.backend.tpu.types import SliceGroup, SliceState
from fray.errors import AuthenticationError, FrayError

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import Node, QueuedResource

__all__ = ["SETTLE_SECONDS", "Remover", "Target"]

# How long after an attempt without an answer a create may still take effect: the attempt's own time, and as much again
# for one that is on its way. Until then "not found" is not "gone".
SETTLE_SECONDS = 3 * CALL_TIMEOUT_SECONDS
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 15.0
# What is billed is worth another try: a permission takes a moment to be known everywhere.
_MOST_REFUSALS = 3


@dataclass(frozen=True)
class Target:
    """What is to be gone.

    Attributes:
        full_name: Of the queued resource; empty where only nodes are left.
        node_names: Of the nodes.
        intent: What has another in its label is somebody else's, of the same name.
        settled_at: Until then it may still turn up.
    """

    full_name: str
    node_names: tuple[str, ...]
    intent: str
    settled_at: float = 0.0

    @classmethod
    def of_candidate(cls, intent: Intent, candidate: Candidate) -> Target:
        """Return what may be there of one choice."""
        settled_at = 0.0 if candidate.is_settled else (candidate.asked_at or 0.0) + SETTLE_SECONDS
        return cls(candidate.full_name, candidate.node_names, intent.id, settled_at)

    @classmethod
    def of_group(cls, group: SliceGroup) -> Target:
        """Return what there is of a group."""
        return cls(group.queued_resource, node_names_of(group), group.labels.get(_labels.INTENT, ""))

    @property
    def name(self) -> str:
        """For messages."""
        full_name = self.full_name or self.node_names[0]
        return f"{full_name.rpartition('/')[2]} in {full_name.split('/')[3]}"


class Remover:
    """Deletes with force, and returns when what was deleted is seen to be gone.

    Args:
        api: The calls.
        clock: What time is told by.
        timeout_seconds: After which it is given up, and said.
        workers: How many are deleted at once.
    """

    def __init__(self, api: Api, clock: Clock, timeout_seconds: float, workers: int) -> None:
        self._api = api
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._workers = workers

    def remove(self, targets: Sequence[Target], timeout_seconds: float | None = None) -> list[str | None]:
        """Remove all of them, at the same time; return for each why it is not seen to be gone, None where it is."""
        seconds = self._timeout_seconds if timeout_seconds is None else min(timeout_seconds, self._timeout_seconds)
        return at_once(lambda target: self._remove(target, seconds), targets, self._workers)

    def _remove(self, target: Target, timeout_seconds: float) -> str | None:
        deadline = max(self._clock.now() + timeout_seconds, target.settled_at + _LONGEST_DELAY_SECONDS)
        delay = _FIRST_DELAY_SECONDS
        deletion = _Deletion()
        trouble, refusals = "", 0
        while True:
            looked_at = self._clock.now()  # before: the looking itself may take longer than the rest of that time
            try:
                left = self._delete_what_is_left(target, deletion, deadline)
                refusals = 0
                if left is None and looked_at >= target.settled_at:
                    return None
                trouble = left or "a request without an answer may still take effect"
            except AuthenticationError as error:
                refusals += 1
                if refusals >= _MOST_REFUSALS:
                    return str(error)
                trouble = str(error)
            except FrayError as error:
                trouble = str(error)
            if self._clock.now() + delay > deadline:
                return f"{target.name}: {trouble}, after {timeout_seconds:.0f} s of trying"
            self._api.pause(delay)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    def _delete_what_is_left(self, target: Target, deletion: _Deletion, deadline: float) -> str | None:
        """See to it that what is there is being deleted; return what is there, None where there is nothing."""
        resource = self._api.get_queued_resource(target.full_name, deadline) if target.full_name else None
        if resource is not None and labels_of(resource).get(_labels.INTENT) == target.intent:
            self._delete_resource(target, resource, deletion, deadline)
            return f"the queued resource is still {_state(resource)}"
        # Another's resource of the name means that ours is gone. Its nodes should be too; they are what costs money.
        nodes = self._api.get_nodes(target.node_names, self._workers, deadline)
        ours = [node for node in nodes.values() if node.labels.get(_labels.INTENT) == target.intent]
        for node in ours:
            if node_state(_number(node)) is not SliceState.DELETING:
                self._api.delete_node(node.name, deadline)
        return f"{len(ours)} of its nodes are still there" if ours else None

    def _delete_resource(self, target: Target, resource: QueuedResource, deletion: _Deletion, deadline: float) -> None:
        if _state(resource) is SliceState.DELETING:
            return
        if deletion.operation:
            # It was accepted, and yet nothing is being deleted: not begun, or failed.
            done, error = self._api.operation_error(
                deletion.operation, what=f"delete {target.name}", zone=target.full_name.split("/")[3]
            )
            if not done:
                return
            # Known by its id, a failed deletion would be answered as it was the first time.
            deletion.request_id, deletion.operation = str(uuid.uuid4()), ""
            if error is not None:
                raise error
        deletion.operation = (
            self._api.delete_queued_resource(target.full_name, request_id=deletion.request_id, deadline=deadline) or ""
        )


class _Deletion:
    """One deletion as Google knows it."""

    def __init__(self) -> None:
        self.request_id = str(uuid.uuid4())
        self.operation = ""


def _state(resource: QueuedResource) -> SliceState:
    from google.cloud.tpu_v2 import QueuedResource

    return queued_resource_state(QueuedResource.pb(resource).state.state)


def _number(node: Node) -> int:
    from google.cloud.tpu_v2 import Node

    return int(Node.pb(node).state)
