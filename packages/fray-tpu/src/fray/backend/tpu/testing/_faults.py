"""What goes wrong, on purpose: with a call (a `Fault`), or with what it asked for (a `Supply`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

__all__ = ["Ending", "Fault", "Moment", "Supply"]

# Of `google.rpc.Code`.
_INVALID_ARGUMENT = 3
_DEADLINE_EXCEEDED = 4
_PERMISSION_DENIED = 7
_RESOURCE_EXHAUSTED = 8
_UNAVAILABLE = 14
_UNAUTHENTICATED = 16


class Moment(StrEnum):
    """When a call goes wrong."""

    BEFORE = "before"
    """Nothing comes of it."""
    AFTER = "after"
    """It takes effect, and its answer is lost."""
    LATE = "late"
    """It fails for the caller, and takes effect some time later."""
    SLOW = "slow"
    """It is answered late; where the caller does not wait that long, it takes effect and the answer is lost."""
    OPERATION = "operation"
    """It is accepted, and then the operation fails: a creation leaves nothing, a deletion leaves all there was."""


@dataclass(frozen=True)
class Fault:
    """A fault of the next calls of one method.

    Attributes:
        method: Such as `CreateQueuedResource`; `*` is any.
        moment: When it happens.
        code: Of `google.rpc.Code`.
        message: What the answer says.
        reason: Of an `ErrorInfo` in the answer; none where empty.
        metadata: Of that `ErrorInfo`.
        retry_after_seconds: Of a `RetryInfo` in the answer; none where 0.
        delay_seconds: How late, or how slow.
        times: How many calls it befalls.
        skip: How many calls are left alone before.
        zone: Only calls that name this zone; empty is any.
    """

    method: str = "*"
    moment: Moment = Moment.BEFORE
    code: int = _UNAVAILABLE
    message: str = "The service is currently unavailable."
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    retry_after_seconds: float = 0.0
    delay_seconds: float = 0.0
    times: int = 1
    skip: int = 0
    zone: str = ""

    @classmethod
    def quota(
        cls, quota: str = "TPUV5sLitepodPerProjectPerZone", limit: int = 16, zone: str = "us-central1-a"
    ) -> Fault:
        """Return the answer to a request that the quota does not allow."""
        return cls(
            "CreateQueuedResource",
            code=_RESOURCE_EXHAUSTED,
            message=f"Quota limit '{quota}' has been exceeded. Limit: {limit} in zone {zone}.",
            reason="QUOTA_EXCEEDED",
            metadata={"quota_limit": quota, "quota_limit_value": str(limit), "quota_location": zone},
        )

    @classmethod
    def denied(
        cls,
        permission: str = "tpu.queuedResources.create",
        method: str = "CreateQueuedResource",
        zone: str = "us-central1-a",
    ) -> Fault:
        """Return the answer to an account without a permission."""
        return cls(
            method,
            code=_PERMISSION_DENIED,
            message=f"Permission '{permission}' denied on 'projects/fray-test/locations/{zone}' (or it may not exist).",
            reason="IAM_PERMISSION_DENIED",
            metadata={"permission": permission},
            times=1_000_000,
        )

    @classmethod
    def unauthenticated(cls) -> Fault:
        """Return the answer to credentials that are no longer good."""
        message = "Request had invalid authentication credentials. Expected OAuth 2 access token."
        return cls(code=_UNAUTHENTICATED, message=message, times=1_000_000)

    @classmethod
    def api_disabled(cls, project: str = "PROJECT") -> Fault:
        """Return the answer in a project that does not have the Cloud TPU API."""
        return cls(
            code=_PERMISSION_DENIED,
            message=f"Cloud TPU API has not been used in project {project} before or it is disabled. Enable it by "
            "visiting the console then retry.",
            reason="SERVICE_DISABLED",
            metadata={"service": "tpu.googleapis.com", "consumer": f"projects/{project}"},
            times=1_000_000,
        )

    @classmethod
    def rate_limited(cls, method: str = "*", times: int = 1, retry_after_seconds: float = 0.0) -> Fault:
        """Return the answer to calls that come too fast."""
        return cls(
            method,
            code=_RESOURCE_EXHAUSTED,
            message="Quota exceeded for quota metric 'Requests' and limit 'Requests per minute' of service "
            "'tpu.googleapis.com'.",
            reason="RATE_LIMIT_EXCEEDED",
            retry_after_seconds=retry_after_seconds,
            times=times,
        )

    @classmethod
    def invalid(cls, message: str = "The requested accelerator type is not available in this zone.") -> Fault:
        """Return the answer to a request that cannot be met as it stands."""
        return cls("CreateQueuedResource", code=_INVALID_ARGUMENT, message=message)


class Ending(StrEnum):
    """What becomes of a request that was accepted."""

    GRANTED = "granted"
    STOCKOUT = "stockout"
    """Fails when its turn comes: no more capacity."""
    QUOTA = "quota"
    """Fails when its turn comes: over the quota."""
    RESERVATION = "reservation"
    """Fails when its turn comes: the reservation is too small."""
    NEVER = "never"
    """Waits, until its own time is over."""
    HANGS = "hangs"
    """Is granted, and its slices never become ready."""


@dataclass(frozen=True)
class Supply:
    """What becomes of requests, and when.

    Attributes:
        ending: What becomes of it.
        accept_seconds: Until it is in the queue.
        queue_seconds: In the queue.
        boot_seconds: From the grant until its slices are ready.
        delete_seconds: That a deletion takes.
        preempt_after_seconds: After being ready; never where None.
        preempted_during_boot: It is taken back halfway through booting.
        vanishes: A preempted slice is gone, and not shown as PREEMPTED.
        outlives_its_deadline: Google grants it even after the time that the request set itself.
        states: Numbers of states that are shown, in place of those that there are, on the way to being ready.
    """

    ending: Ending = Ending.GRANTED
    accept_seconds: float = 5.0
    queue_seconds: float = 30.0
    boot_seconds: float = 60.0
    delete_seconds: float = 20.0
    preempt_after_seconds: float | None = None
    preempted_during_boot: bool = False
    vanishes: bool = False
    outlives_its_deadline: bool = False
    states: Mapping[int, int] = field(default_factory=dict)
