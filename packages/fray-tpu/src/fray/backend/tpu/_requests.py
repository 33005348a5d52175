"""The requests on this machine's disk that nobody pursues here: another process does, or did and is gone.

The disk may fail when something is to be deleted. Then what is known is deleted all the same, and the rest is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from fray.backend.tpu._intents import Candidate, Claim, Intent, IntentState, IntentStore
from fray.backend.tpu._labels import label_value
from fray.backend.tpu._removal import Remover, Target
from fray.backend.tpu.interface import Clock, Doomed
from fray.backend.tpu.types import SliceGroup
from fray.errors import PlatformError, SliceExistsError

__all__ = ["Requests"]


class Requests:
    """The records of an owner's requests, and everybody's.

    Args:
        store: The records.
        remover: Deletes what they speak of.
        clock: What time is told by.
        owner: Whose requests are meant.
        zones: Requests for other zones only are left alone; `-` is everywhere.
    """

    def __init__(self, store: IntentStore, remover: Remover, clock: Clock, owner: str, zones: Sequence[str]) -> None:
        self._store = store
        self._remover = remover
        self._clock = clock
        self._owner = owner
        self._zones = zones

    def find(self, name: str) -> Intent | None:
        """Return the request of this name that is not ready, or is being deleted; None where there is none."""
        intent = self._store.load(name)
        return intent if intent is not None and self._is_looked_at(intent) else None

    def is_mine(self, intent: Intent) -> bool:
        """Whether it is the owner's."""
        return label_value(intent.owner) == label_value(self._owner)

    def take_up(self, name: str) -> tuple[Intent, Claim] | None:
        """Take over a request that another process left in the queue; None where there is no such request."""
        claim = self._store.claim(name)
        if claim is None:
            raise SliceExistsError(f"{name} is waited for, or deleted, by another process on this machine")
        try:
            intent = self._store.load(name)
            if intent is not None and self.is_mine(intent) and self.is_wanted(intent):
                return intent, claim
        except BaseException:
            claim.release()
            raise
        claim.release()
        return None

    def is_wanted(self, intent: Intent) -> bool:
        """Whether somebody could still wait for it."""
        is_asked = intent.state is IntentState.ASKED and intent.request is not None
        return is_asked and not self._store.is_cancelled(intent.name, intent.id)

    def abandoned(self, *, all_owners: bool) -> tuple[list[Doomed], list[str]]:
        """Return the requests that nobody looks after, and why others cannot be read."""
        doomed: list[Doomed] = []
        unreadable: list[str] = []
        try:
            names = self._store.names()
        except PlatformError as error:
            return [], [str(error)]
        for name in names:
            try:
                intent = self._unclaimed(name)
            except PlatformError as error:
                unreadable.append(str(error))
                continue
            if intent is not None and self._is_looked_at(intent) and (all_owners or self.is_mine(intent)):
                reason = f"given up: {intent.reason}" if intent.reason else "asked for, and nobody waits for it"
                doomed.append(Doomed(name, reason, label_value(intent.owner), intent.zones, None, intent=intent.id))
        return doomed, unreadable

    def remove_abandoned(self, one: Doomed) -> str | None:
        """Delete what there may be of a request; return why that failed, nothing where it is not abandoned any more."""
        claim = self._store.claim(one.name)
        if claim is None:
            return ""
        try:
            intent = self._store.load(one.name)
            if intent is None or intent.id != one.intent:
                return ""
            return self._remove_claimed(intent, one.reason)
        finally:
            claim.release()

    def cancel(self, intent: Intent) -> list[str]:
        """Delete what there may be of a request, whoever pursues it; return what could not be done.

        Args:
            intent: As it was read before what there is was listed.
        """
        try:
            claim = self._store.claim(intent.name)
        except PlatformError as error:
            return [*self._remove_all_of(intent), str(error)]
        try:
            if claim is None:
                return self._cancel_pursued(intent)
            current = self._store.load(intent.name)
            if current is None or current.id != intent.id:
                return self._remove_all_of(intent)  # it was ready, or given up, a moment ago
            failed = self._remove_claimed(current, "deleted")
            return [failed] if failed else []
        except PlatformError as error:
            return [*self._remove_all_of(intent), str(error)]
        finally:
            if claim is not None:
                claim.release()

    def record_deletion(self, group: SliceGroup) -> bool:
        """Record that a group is to be deleted, so that it is found should this process die; return whether it was."""
        with suppress(PlatformError):  # its lease ends anyway, which is another way to find it
            claim = self._store.claim(group.name)
            if claim is None:
                return False  # a group of this name in another zone is asked for: its record is not overwritten
            try:
                if self._store.load(group.name) is None:
                    self._store.save(self._deletion_of(group))
                    return True
            finally:
                claim.release()
        return False

    def forget_deletion(self, group: SliceGroup) -> None:
        """Forget what was recorded, now that it is gone."""
        with suppress(PlatformError):
            self._store.remove(group.name)

    def _unclaimed(self, name: str) -> Intent | None:
        claim = self._store.claim(name)
        if claim is None:
            return None
        try:
            return self._store.load(name)
        finally:
            claim.release()

    def _is_looked_at(self, intent: Intent) -> bool:
        zones = {candidate.zone for candidate in intent.candidates}
        return "-" in self._zones or not zones or not zones.isdisjoint(self._zones)

    def _remove_claimed(self, intent: Intent, reason: str) -> str | None:
        intent.state, intent.reason = IntentState.GIVEN_UP, intent.reason or reason
        with suppress(PlatformError):  # the record as it is says enough
            self._store.save(intent)
        if failed := self._remove(intent, [each for each in intent.candidates if each.asked_at is not None]):
            return "; ".join(failed)
        with suppress(PlatformError):  # there is nothing of it any more, which whoever finds it will see
            self._store.remove(intent.name)
        return None

    def _cancel_pursued(self, intent: Intent) -> list[str]:
        """Delete what another process asked for, and see to it that it does not ask for more."""
        troubles = []
        try:
            self._store.cancel(intent.name, intent.id)
        except PlatformError as error:
            troubles.append(f"the process that waits for {intent.name} may ask again: {error}")
        # Read after that: what it asks for from now on, it does not ask for.
        current = self._store.load(intent.name)
        if current is None or current.id != intent.id:
            return troubles + self._remove_all_of(intent)
        return troubles + self._remove(current, [each for each in current.candidates if each.asked_at is not None])

    def _remove_all_of(self, intent: Intent) -> list[str]:
        """Delete whatever a request may have made, where its record does not tell how far it is."""
        return self._remove(intent, intent.candidates)

    def _remove(self, intent: Intent, candidates: Sequence[Candidate]) -> list[str]:
        targets = [Target.of_candidate(intent, each) for each in candidates if not each.is_gone]
        return [reason for reason in self._remover.remove(targets) if reason is not None]

    def _deletion_of(self, group: SliceGroup) -> Intent:
        target = Target.of_group(group)
        candidate = Candidate(
            full_name=target.full_name,
            zone=group.zone,
            node_names=target.node_names,
            asked_at=self._clock.now(),
            is_settled=True,
        )
        return Intent(
            id=target.intent,
            name=group.name,
            project=group.project,
            owner=self._owner,
            state=IntentState.GIVEN_UP,
            created=self._clock.now(),
            candidates=[candidate],
            reason="deleted",
        )
