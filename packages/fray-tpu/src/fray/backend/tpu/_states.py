"""From Google's states to Fray's: one mapping for nodes, one for queued resources.

A state that these tables do not have, because Google added it, is UNKNOWN: it is waited on, within the deadline.
"""

from __future__ import annotations

from collections.abc import Iterable

from fray.backend.tpu.types import SliceState

__all__ = ["LEAST_FIRST", "group_state", "node_state", "queued_resource_state"]

# By the names in `google.cloud.tpu_v2.Node.State`.
NODE_STATES = {
    "STATE_UNSPECIFIED": SliceState.UNKNOWN,
    "CREATING": SliceState.PROVISIONING,
    "READY": SliceState.READY,
    "RESTARTING": SliceState.REPAIRING,
    "REIMAGING": SliceState.REPAIRING,
    "DELETING": SliceState.DELETING,
    "REPAIRING": SliceState.REPAIRING,
    "STOPPED": SliceState.STOPPED,
    "STOPPING": SliceState.STOPPED,
    "STARTING": SliceState.PROVISIONING,
    "PREEMPTED": SliceState.PREEMPTED,
    # "due to maintenance or has reached the end of its life cycle (for preemptible nodes)"
    "TERMINATED": SliceState.PREEMPTED,
    "HIDING": SliceState.STOPPED,
    "HIDDEN": SliceState.STOPPED,
    "UNHIDING": SliceState.REPAIRING,
    "UNKNOWN": SliceState.UNKNOWN,
}

# By the names in `google.cloud.tpu_v2.QueuedResourceState.State`.
QUEUED_RESOURCE_STATES = {
    "STATE_UNSPECIFIED": SliceState.UNKNOWN,
    "CREATING": SliceState.QUEUED,
    "ACCEPTED": SliceState.QUEUED,
    "WAITING_FOR_RESOURCES": SliceState.QUEUED,
    "PROVISIONING": SliceState.PROVISIONING,
    "ACTIVE": SliceState.READY,
    "FAILED": SliceState.FAILED,
    "DELETING": SliceState.DELETING,
    # Google took the slices back, or somebody deleted them: `group_state` tells which.
    "SUSPENDING": SliceState.PREEMPTED,
    "SUSPENDED": SliceState.PREEMPTED,
}

# A group is as far as the first of these that one of its slices is.
LEAST_FIRST = (
    SliceState.DELETING,
    SliceState.FAILED,
    SliceState.PREEMPTED,
    SliceState.STOPPED,
    SliceState.UNKNOWN,
    SliceState.QUEUED,
    SliceState.PROVISIONING,
    SliceState.REPAIRING,
    SliceState.READY,
)


def node_state(number: int) -> SliceState:
    """Return what a node's state, by its number in the API, means."""
    from google.cloud.tpu_v2 import Node

    try:
        return NODE_STATES.get(Node.State(number).name, SliceState.UNKNOWN)
    except ValueError:
        return SliceState.UNKNOWN


def queued_resource_state(number: int, *, by_user: bool = False) -> SliceState:
    """Return what a queued resource's state, by its number in the API, means.

    Args:
        number: The state.
        by_user: Whether a user, not Google, brought it into this state.
    """
    from google.cloud.tpu_v2 import QueuedResourceState

    try:
        state = QUEUED_RESOURCE_STATES.get(QueuedResourceState.State(number).name, SliceState.UNKNOWN)
    except ValueError:
        return SliceState.UNKNOWN
    # What somebody deleted was not taken back by Google.
    return SliceState.FAILED if by_user and state is SliceState.PREEMPTED else state


def group_state(states: Iterable[SliceState]) -> SliceState:
    """Return the state of a group whose slices are in these."""
    return min(states, key=LEAST_FIRST.index, default=SliceState.UNKNOWN)
