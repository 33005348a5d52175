"""What a provisioner is, whichever of a provider's APIs is behind it.

`fray.backend.tpu.provisioner` has the one for Cloud TPU's queued resources; one for Compute Engine or GKE can take its
place.
"""

from __future__ import annotations

import abc
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from types import TracebackType
from typing import ClassVar, Protocol, Self

from fray.backend.tpu.types import Lease, OnProgress, SliceGroup, SliceRequest
from fray.errors import DeletionFailedError

__all__ = ["Clock", "Doomed", "GcPlan", "GcReport", "Provisioner", "SystemClock"]


class Clock(Protocol):
    """Time, so that a test can have its own."""

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return when that much time has gone by."""
        ...


class SystemClock:
    """The machine's own time."""

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Return when that much time has gone by."""
        time.sleep(seconds)


def moment(seconds: float) -> datetime:
    """Return a clock's time as a date."""
    return datetime.fromtimestamp(seconds, UTC)


@dataclass(frozen=True)
class Doomed:
    """Something that `gc` would delete.

    Attributes:
        name: The group's.
        reason: Why, in a few words, such as `its lease ended 2026-03-01 12:00 UTC`.
        owner: As the label says it.
        zones: Where it is, or may still turn up.
        group: What is there; None for a request on this machine's disk, of which there may be anything or nothing.
        intent: Of that request, its id.
    """

    name: str
    reason: str
    owner: str
    zones: tuple[str, ...]
    group: SliceGroup | None = None
    intent: str = ""


@dataclass(frozen=True)
class GcPlan:
    """What `gc` would do.

    Attributes:
        doomed: What it would delete.
        unreadable: Records of requests on this machine that cannot be read; they are kept.
    """

    doomed: tuple[Doomed, ...]
    unreadable: tuple[str, ...] = ()


@dataclass(frozen=True)
class GcReport:
    """What `gc` did.

    Attributes:
        deleted: What was deleted and seen to be gone.
        spared: What was planned and is not expired any more: its lease was renewed meanwhile, or it is another's now.
        failed: What could not be deleted, with the reason. It is found again by the next `gc`.
    """

    deleted: tuple[Doomed, ...] = ()
    spared: tuple[Doomed, ...] = ()
    failed: tuple[tuple[Doomed, str], ...] = ()


class Provisioner(abc.ABC):
    """Asks for slices, watches them, and deletes them.

    As a context manager it deletes, on leaving, whatever was created through it: after an error and after Ctrl-C too.

    Attributes:
        environment_variables: The `FRAY_…` variables that it reads; `fray doctor` shows them.

    @plugin-dev: register the class under the entry point group `fray.provisioners`.
    """

    environment_variables: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def create(self, request: SliceRequest) -> SliceGroup:
        """Ask for slices; do not wait for them.

        The request is on disk before the provider hears of it: what a client that dies leaves behind is deleted by
        `reconcile`. Whatever is raised, nothing of the request is left.

        Raises:
            SliceExistsError: There is a group of this name.
            AuthenticationError: Credentials are missing, or do not allow it.
            ProvisioningError: It cannot be had; the subclass says why.
            DeletionFailedError: Something failed, and what may be left of the request could not be deleted.
            ConnectionFailedError: The provider cannot be reached.
        """

    @abc.abstractmethod
    def wait_ready(self, name: str, on_progress: OnProgress | None = None) -> SliceGroup:
        """Wait until every host of a group is ready, or delete it.

        Deadlines are those of the request. Of several choices the first that is granted stays, and the others are
        seen to be gone before this returns. Whatever is raised, Ctrl-C included, nothing of the request is left.

        Args:
            name: The group's.
            on_progress: Called with what is waited for, whenever that was looked at.

        Raises:
            SliceNotFoundError: There is no such group; or it was deleted by somebody while it was waited for.
            ProvisioningTimeoutError: It was not granted, or not ready, in time.
            ProvisioningError: No choice could be had; the subclass says why the last one could not.
            DeletionFailedError: Something failed, and what may be left of the request could not be deleted.
            ConnectionFailedError: The provider cannot be reached.
        """

    @abc.abstractmethod
    def list(self, *, all_owners: bool = False) -> list[SliceGroup]:
        """Return the groups that there are, by name: the caller's own, or everybody's.

        Only what Fray made. Slices whose request is gone are groups too.
        """

    @abc.abstractmethod
    def describe(self, name: str, *, all_owners: bool = False) -> SliceGroup:
        """Return one group; of one whose choices are still open, the choice that is furthest.

        Args:
            name: The group's.
            all_owners: Take another owner's group where the caller has none of this name.

        Raises:
            SliceNotFoundError: There is no such group.
        """

    @abc.abstractmethod
    def delete(self, *what: str | SliceGroup) -> None:
        """Delete groups of the caller's, all at the same time, and return when they are seen to be gone.

        Args:
            what: Names, or groups that `list` returned: those need not be looked for.

        Raises:
            SliceNotFoundError: There is no such group.
            DeletionFailedError: It could not be deleted, or is not seen to be gone, within the time that this takes.
        """

    @abc.abstractmethod
    def renew(self, name: str, time_to_live_seconds: float) -> Lease:
        """Make a lease of the caller's run from now for some time; it is never made shorter.

        Args:
            name: The group's.
            time_to_live_seconds: A year at most.

        Raises:
            SliceNotFoundError: The caller has no such group.
            UnsupportedError: Its slices do not exist yet; until then the lease of the request holds.
        """

    @abc.abstractmethod
    def reconcile(self) -> GcReport:
        """Delete what clients of the caller's on this machine asked for and did not live to see ready.

        Leases do not matter here. A request that a living process waits for is left alone.
        """

    @abc.abstractmethod
    def plan_gc(self, *, all_owners: bool = False) -> GcPlan:
        """Return what `gc` would delete: what `reconcile` would, and groups of the caller's whose lease has ended.

        Args:
            all_owners: Other owners' groups too.
        """

    @abc.abstractmethod
    def gc(self, plan: GcPlan) -> GcReport:
        """Delete what was planned, where it still holds: leases are looked at again right before."""

    @abc.abstractmethod
    def close(self) -> None:
        """Let go of connections and locks. Deletes nothing."""

    @abc.abstractmethod
    def delete_created(self) -> None:
        """Delete whatever was created through this object and is not deleted yet."""

    @classmethod
    def doctor(cls) -> Iterable[tuple[bool, str, str]]:
        """Return what `fray doctor` is to show: whether it is well, what was found, the remedy.

        @plugin-dev: credentials, the project, whether the provider answers. No side effect lasts.
        """
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.delete_created()
        except DeletionFailedError as failure:
            if error is None or isinstance(error, Exception):
                raise
            error.add_note(str(failure))  # an interrupt stays one
        finally:
            self.close()
