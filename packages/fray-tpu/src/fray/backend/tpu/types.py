"""The values that provisioning takes and gives: what is asked for, and what there is.

A *group* is what one request gets: one or more slices of one type in one zone, which come and go together (Google's
queued resource). A *slice* is one TPU of the group (Google's node); a *host* is one of its machines.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import TypeVar

from fray.errors import InvalidTypeError, InvalidValueError
from fray.tpu import tpu_type

__all__ = [
    "DataDisk",
    "Host",
    "Lease",
    "OnProgress",
    "Progress",
    "Slice",
    "SliceChoice",
    "SliceGroup",
    "SliceRequest",
    "SliceState",
    "Tier",
]

_Member = TypeVar("_Member")

# A name becomes a node's (63 characters at most, like the label), and may get `-alternative-9-999` behind it.
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_ZONE = re.compile(r"[a-z]+(-[a-z]+)+\d+-[a-z]")
# A year: of a deadline, and of a lease.
LONGEST_SECONDS = 366 * 24 * 3600
_LABEL = re.compile(r"[\w-]{0,63}")
_LABEL_KEY = re.compile(r"[^\W\d_][\w-]{0,62}")
_MOST_CHOICES = 9
_METADATA_OF_ITS_OWN = {"startup-script": "startup_script"}


class Tier(StrEnum):
    """How capacity is paid for, and whether it can be taken back."""

    SPOT = "spot"
    ON_DEMAND = "on-demand"
    RESERVED = "reserved"


class SliceState(StrEnum):
    """What a slice, or a group of slices, is doing.

    A group is as far as the least of its slices. A state that Google adds later is UNKNOWN, which is waited on like
    any other that is no end.
    """

    QUEUED = "QUEUED"
    """Waits for capacity. Costs nothing."""
    PROVISIONING = "PROVISIONING"
    """Has capacity, and is being made or booted."""
    READY = "READY"
    REPAIRING = "REPAIRING"
    """Restarts, or is being repaired, and comes back by itself."""
    STOPPED = "STOPPED"
    """Was stopped by somebody, and can be started again."""
    PREEMPTED = "PREEMPTED"
    """Was taken back. It holds quota until it is deleted."""
    FAILED = "FAILED"
    """Never came. It holds quota until it is deleted."""
    DELETING = "DELETING"
    UNKNOWN = "UNKNOWN"

    @property
    def is_lost(self) -> bool:
        """Whether it can never be READY (again)."""
        return self in (SliceState.PREEMPTED, SliceState.FAILED, SliceState.DELETING)


@dataclass(frozen=True)
class SliceChoice:
    """One way in which a request may be met.

    Attributes:
        accelerator_type: Such as `v5litepod-16`.
        zone: Such as `us-central1-a`.
        tier: Spot, on demand or reserved.
        reservation: Of a reserved slice: the reservation's name, or `projects/…/reservations/NAME` of another project.
        runtime_version: What the hosts boot; by default what the catalogue names for the type.

    Raises:
        InvalidTypeError: A field is of the wrong type.
        InvalidValueError: There is no such type, it does not come through the Cloud TPU API, or the tier and the
            reservation do not fit together.
    """

    accelerator_type: str
    zone: str
    tier: Tier = Tier.ON_DEMAND
    reservation: str | None = None
    runtime_version: str = ""

    def __post_init__(self) -> None:
        _check_string("accelerator_type", self.accelerator_type)
        _check_string("zone", self.zone)
        _check_string("runtime_version", self.runtime_version)
        found = tpu_type(self.accelerator_type)
        if not _ZONE.fullmatch(self.zone):
            raise InvalidValueError(f"zone: {self.zone!r} is no zone; write it as in us-central1-a")
        try:
            tier = Tier(self.tier)
        except ValueError:
            raise InvalidValueError(f"tier: {self.tier!r} is none of {', '.join(Tier)}") from None
        if self.reservation is not None:
            _check_string("reservation", self.reservation)
            if not self.reservation:
                raise InvalidValueError("reservation: a reservation needs a name")
            if tier is not Tier.RESERVED:
                raise InvalidValueError(f"a reservation is for tier 'reserved', not {str(tier)!r}")
        runtime_version = self.runtime_version or found.runtime_version
        if not runtime_version:
            raise InvalidValueError(
                f"accelerator_type: {found.name} does not come through the Cloud TPU API; Google offers it through "
                "GKE and Compute Engine"
            )
        # As the API spells it: v5e-16 is v5litepod-16.
        object.__setattr__(self, "accelerator_type", found.name)
        object.__setattr__(self, "tier", tier)
        object.__setattr__(self, "runtime_version", runtime_version)

    @property
    def hosts(self) -> int:
        """Machines in one slice."""
        return tpu_type(self.accelerator_type).hosts

    def __str__(self) -> str:
        return f"{self.accelerator_type} ({self.tier}) in {self.zone}"


@dataclass(frozen=True)
class DataDisk:
    """A disk that exists, attached to the hosts.

    Attributes:
        source: `projects/PROJECT/zones/ZONE/disks/NAME`, or the name alone for one in the slice's own zone.
        read_only: What several hosts must have it as.
    """

    source: str
    read_only: bool = True

    def __post_init__(self) -> None:
        _check_string("source", self.source)
        if not self.source:
            raise InvalidValueError("source: a disk needs a name")


@dataclass(frozen=True)
class SliceRequest:
    """What is asked for.

    Attributes:
        name: Of the group: lower-case letters, digits and hyphens, at most 40. The same name is the same group: a
            second one is refused as long as the first is there.
        choices: What is acceptable, best first; one alone needs no tuple.
        at_once: Ask for all choices at the same time: the first that is granted wins, the others are cancelled.
            Otherwise one after the other, each for its share of the time that is left in the queue.
        num_slices: How many slices, which come together (multislice).
        purpose: What for, in a few words; a label on everything.
        network, subnetwork: By default those of the project.
        external_ips: Whether hosts get addresses that the internet can reach. Without, they need Cloud NAT to install
            anything.
        service_account: The account that the hosts act as; by default Compute Engine's.
        tags: Network tags, which firewall rules may name.
        labels: More labels; those that begin with `fray-` are Fray's.
        data_disks: Attached to every host.
        startup_script: What each host runs, as root, whenever it boots. Whoever may read the slice may read it: no
            secrets in it.
        metadata: More metadata of the hosts. No secrets here either.
        queue_timeout_seconds: How long to wait for capacity, over all choices. Google is told too: a request that its
            client forgot expires.
        boot_timeout_seconds: How long a granted slice may take until all its hosts are ready. The request as a whole
            takes at most both together, and then the time that its deletion takes.
        time_to_live_seconds: How long the lease runs from when the slices should be ready at the latest. After it,
            `gc` deletes them unless the lease was renewed.

    Raises:
        InvalidTypeError: A field, or a member of one, is of the wrong type.
        InvalidValueError: A value cannot be.
    """

    name: str
    choices: tuple[SliceChoice, ...]
    at_once: bool = field(default=False, kw_only=True)
    num_slices: int = field(default=1, kw_only=True)
    purpose: str = field(default="", kw_only=True)
    network: str | None = field(default=None, kw_only=True)
    subnetwork: str | None = field(default=None, kw_only=True)
    external_ips: bool = field(default=True, kw_only=True)
    service_account: str | None = field(default=None, kw_only=True)
    tags: tuple[str, ...] = field(default=(), kw_only=True)
    labels: dict[str, str] = field(default_factory=dict, kw_only=True)
    data_disks: tuple[DataDisk, ...] = field(default=(), kw_only=True)
    startup_script: str | None = field(default=None, kw_only=True)
    metadata: dict[str, str] = field(default_factory=dict, kw_only=True)
    queue_timeout_seconds: float = field(default=3600.0, kw_only=True)
    boot_timeout_seconds: float = field(default=1200.0, kw_only=True)
    time_to_live_seconds: float = field(default=4 * 3600.0, kw_only=True)

    def __post_init__(self) -> None:
        _check_string("name", self.name)
        if not _NAME.fullmatch(self.name):
            raise InvalidValueError(
                f"name: {self.name!r} is no name for slices: begin with a lower-case letter, then lower-case letters, "
                "digits and hyphens, 40 at most, no hyphen at the end"
            )
        choices = _members("choices", self.choices, SliceChoice)
        if not choices:
            raise InvalidValueError("choices: name at least one acceptable type and zone")
        if len(choices) > _MOST_CHOICES:
            raise InvalidValueError(f"choices: {len(choices)} are more than the {_MOST_CHOICES} there can be")
        if len(set(choices)) != len(choices):
            raise InvalidValueError("choices: the same choice is in there twice")
        if not isinstance(self.num_slices, int) or isinstance(self.num_slices, bool):
            raise InvalidTypeError(f"num_slices: {self.num_slices!r} is no int")
        if not 1 <= self.num_slices <= 1000:
            raise InvalidValueError(f"num_slices: {self.num_slices} is not between 1 and 1000")
        for what in ("queue_timeout_seconds", "boot_timeout_seconds", "time_to_live_seconds"):
            value = getattr(self, what)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InvalidTypeError(f"{what}: {value!r} is no number")
            if not 0 < value <= LONGEST_SECONDS:
                raise InvalidValueError(f"{what}: {value} is not between 0 and a year")
        labels = _strings("labels", self.labels)
        for key, text in labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL.fullmatch(text) or (key + text).lower() != key + text:
                raise InvalidValueError(
                    f"labels: {key}={text!r} is no label: lower-case letters, digits, _ and -, a letter first, 63 at "
                    "most on each side"
                )
            if key.startswith("fray-"):
                raise InvalidValueError(f"labels: {key} is one of Fray's own; choose another")
        metadata = _strings("metadata", self.metadata)
        for key in metadata:
            if own := _METADATA_OF_ITS_OWN.get(key):
                raise InvalidValueError(f"metadata: {key} has a field of its own: {own}")
        tags = _members("tags", self.tags, str)
        disks = _members("data_disks", self.data_disks, DataDisk)
        if self.num_slices * max(choice.hosts for choice in choices) > 1 and not all(disk.read_only for disk in disks):
            raise InvalidValueError("data_disks: a disk that is not read_only can be attached to one host only")
        _check_string("purpose", self.purpose)
        for what in ("network", "subnetwork", "service_account", "startup_script"):
            if (value := getattr(self, what)) is not None:
                _check_string(what, value)
                if not value:
                    raise InvalidValueError(f"{what}: it is empty; None means the default")
        # Copies, so that what the caller does to theirs afterwards does not reach into a frozen value.
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "tags", tags)
        object.__setattr__(self, "data_disks", disks)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "metadata", metadata)


@dataclass(frozen=True)
class Host:
    """One machine of a slice.

    Attributes:
        worker_id: Its place in the slice, from 0 (`TPU_WORKER_ID`).
        internal_ip: In the slice's network.
        external_ip: Where the internet reaches it; None where it cannot.
    """

    worker_id: int
    internal_ip: str
    external_ip: str | None = None


@dataclass(frozen=True)
class Slice:
    """One TPU of a group.

    Attributes:
        name: The node's id.
        zone: Where it is.
        accelerator_type: What it is.
        state: What it does.
        hosts: Its machines, by worker id; none before they have addresses.
        message: What Google says about its health.
        created: When it was made.
    """

    name: str
    zone: str
    accelerator_type: str
    state: SliceState
    hosts: tuple[Host, ...] = ()
    message: str = ""
    created: datetime | None = None


@dataclass(frozen=True)
class Lease:
    """Who has a group, what for, and until when.

    Attributes:
        owner: As the label says it (see `fray.backend.tpu.label_value`).
        purpose: As the label says it.
        until: After this, `gc` may delete the group. None where the label is missing or cannot be read: `gc` keeps
            its hands off.
    """

    owner: str
    purpose: str
    until: datetime | None


@dataclass(frozen=True)
class SliceGroup:
    """What one request got, or waits for.

    Attributes:
        name: As it was asked for.
        project: Who pays.
        zone: Where it is.
        accelerator_type: What each slice is.
        tier: How it is paid for; None where nothing says it.
        num_slices: How many were asked for.
        state: As far as the least of its slices is.
        slices: Those that exist, in order; none before they are granted.
        lease: Who has it, until when; None where it is not Fray's.
        created: When it was asked for.
        message: Why it is in this state, in Google's own words where there are any.
        queued_resource: Its full name in the Cloud TPU API; empty for a slice whose request is gone.
        labels: Of its slices, Fray's own included.
        runtime_version: What the hosts boot.
    """

    name: str
    project: str
    zone: str
    accelerator_type: str
    tier: Tier | None
    num_slices: int
    state: SliceState
    slices: tuple[Slice, ...] = ()
    lease: Lease | None = None
    created: datetime | None = None
    message: str = ""
    queued_resource: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    runtime_version: str = ""

    @property
    def hosts(self) -> tuple[Host, ...]:
        """All machines: slice by slice, in worker order."""
        return tuple(host for one in self.slices for host in one.hosts)


@dataclass(frozen=True)
class Progress:
    """What a wait waits for.

    Attributes:
        name: The group's.
        state: What it does now.
        waiting_for: In a few words, such as `capacity for v5litepod-16 (spot) in us-central1-a`.
        since: When it began to wait for that.
        deadline: Until when it waits for that.
        message: What Google says about it.
    """

    name: str
    state: SliceState
    waiting_for: str
    since: datetime
    deadline: datetime
    message: str = ""


OnProgress = Callable[[Progress], None]


def _check_string(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidTypeError(f"{what}: {value!r} is no str")


def _members(what: str, values: object, kind: type[_Member]) -> tuple[_Member, ...]:
    if isinstance(values, kind) and not isinstance(values, str):
        return (values,)  # one alone
    if not isinstance(values, list | tuple):
        raise InvalidTypeError(f"{what}: {values!r} is no list or tuple")
    for member in values:
        if not isinstance(member, kind):
            raise InvalidTypeError(f"{what}: {member!r} is no {kind.__name__}")
    return tuple(values)


def _strings(what: str, values: object) -> dict[str, str]:
    if not isinstance(values, dict):
        raise InvalidTypeError(f"{what}: {values!r} is no dict")
    for key, value in values.items():
        _check_string(what, key)
        _check_string(f"{what}[{key}]", value)
    return dict(values)
