"""One request, from the asking to all hosts being ready, or to nothing being left of it.

The choices are asked for at once or one after the other. What fails, or does not come in its time, is deleted and seen
to be gone before the next is asked for; what was granted first stays.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fray.backend.tpu import _labels
from fray.backend.tpu._api import CALL_DEADLINE_SECONDS, Api, at_once
from fray.backend.tpu._errors import translate_status
from fray.backend.tpu._intents import Candidate, Claim, Intent, IntentState, IntentStore
from fray.backend.tpu._messages import group_of, labels_of, queued_resource_of
from fray.backend.tpu._removal import SETTLE_SECONDS, Remover, Target
from fray.backend.tpu._states import queued_resource_state
from fray.backend.tpu.interface import Clock, moment
from fray.backend.tpu.types import Lease, OnProgress, Progress, SliceChoice, SliceGroup, SliceRequest, SliceState
from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    DeletionFailedError,
    FrayError,
    PlatformError,
    PreemptedError,
    ProvisioningError,
    ProvisioningTimeoutError,
    QuotaExceededError,
    SliceExistsError,
    SliceNotFoundError,
    UsageError,
)

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import Node, QueuedResource

__all__ = ["Pursuit"]

_FIRST_DELAY_SECONDS = 2.0
_LONGEST_DELAY_SECONDS = 15.0
# No other choice can be better off: the account, the project, the name, the connection are the same for all.
_FATAL = (AuthenticationError, UsageError, ConnectionFailedError)


@dataclass(eq=False)
class _Course:
    """What was seen of one choice so far.

    Attributes:
        candidate: Which.
        was_seen: Whether it was there once.
        nodes_seen: Those of its nodes that were there once.
        granted_at: Since when it has capacity; None as long as it has none.
        group: As it was when last looked at.
        message: What was said then.
    """

    candidate: Candidate
    was_seen: bool = False
    nodes_seen: set[str] = field(default_factory=set)
    granted_at: float | None = None
    group: SliceGroup | None = None
    message: str = ""
    state: SliceState = SliceState.QUEUED


class Pursuit:
    """Pursues one request.

    Args:
        intent: Its record.
        request: What is asked for.
        api, clock, remover, store: What to do it with.
        claim: The lock that says that somebody looks after it.
        workers: How many calls are made at once.
    """

    def __init__(
        self,
        intent: Intent,
        request: SliceRequest,
        *,
        api: Api,
        clock: Clock,
        remover: Remover,
        store: IntentStore,
        claim: Claim,
        workers: int,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.intent = intent
        self._request = request
        self._api = api
        self._clock = clock
        self._remover = remover
        self._store = store
        self._claim: Claim | None = claim
        self._workers = workers
        self._jitter = jitter
        self._lock = threading.Lock()
        self._courses: list[_Course] = []
        self._errors: list[tuple[SliceChoice, FrayError]] = []
        self._waits_since = clock.now()
        for candidate in intent.candidates:
            if candidate.asked_at is not None and not candidate.is_gone:
                self._courses.append(_Course(candidate))  # another process asked

    @property
    def name(self) -> str:
        """The group's."""
        return self.intent.name

    def start(self) -> SliceGroup:
        """Ask for it, recorded before: for all choices, or for the first that is not refused at once."""
        if self._request.at_once:
            for candidate in self.intent.candidates:
                candidate.deadline = self.intent.queue_deadline
            refusals = at_once(self._ask, self.intent.candidates, self._workers)
            for candidate, error in zip(self.intent.candidates, refusals, strict=True):
                if error is None:
                    self._courses.append(_Course(candidate))
                else:
                    self._take_note(candidate, error)
                    self._drop([_Course(candidate)])
        if not self._courses:
            self._ask_for_the_next()
        index = self._courses[0].candidate.index
        choice = self._request.choices[index]
        return SliceGroup(
            name=self.name,
            project=self.intent.project,
            zone=choice.zone,
            accelerator_type=choice.accelerator_type,
            tier=choice.tier,
            num_slices=self._request.num_slices,
            state=SliceState.QUEUED,
            lease=Lease(
                _labels.label_value(self.intent.owner),
                _labels.label_value(self._request.purpose),
                moment(int(self._lease_until)),
            ),
            created=moment(self.intent.created),
            queued_resource=self._courses[0].candidate.full_name,
            labels={**self._request.labels, _labels.GROUP: self.name, _labels.INTENT: self.intent.id},
            runtime_version=choice.runtime_version,
        )

    def finish(self, on_progress: OnProgress | None) -> SliceGroup:
        """Wait until every host is ready; return the group, after which it is its lease that counts."""
        delay = _FIRST_DELAY_SECONDS
        while True:
            self._check_that_it_is_wanted()
            if not self._courses:
                self._ask_for_the_next()
                delay = _FIRST_DELAY_SECONDS
            before = [course.state for course in self._courses]
            outcomes = at_once(self._look, self._courses, self._workers)
            for course, error in zip(list(self._courses), outcomes, strict=True):
                if error is None:
                    error = self._overdue(course)
                if error is not None:
                    self._take_note(course.candidate, error)
                    self._drop([course])
            granted = [course for course in self._courses if course.group is not None]
            if granted:
                self._drop([course for course in self._courses if course is not granted[0]])
                group = granted[0].group
                if group is not None and group.state is SliceState.READY:
                    # Where that fails the slices are given up: with a record that says that they are being asked for,
                    # they would be deleted one day while somebody uses them.
                    self._store.remove(self.name)
                    self.release()
                    return group
            if not self._courses:
                continue
            if before != [course.state for course in self._courses]:
                self._waits_since = self._clock.now()
                delay = _FIRST_DELAY_SECONDS
            deadline = self._report(on_progress)
            wait = delay * (0.75 + 0.5 * self._jitter())
            self._api.pause(min(wait, max(0.05, deadline - self._clock.now())))
            delay = min(1.5 * delay, _LONGEST_DELAY_SECONDS)

    def give_up(self, error: BaseException) -> None:
        """Delete whatever there may be of the request.

        Raises:
            DeletionFailedError: Not all of it is seen to be gone; the record stays, for `gc`. After an error that is
                no `Exception` (an interrupt) it is a note on that one instead.
        """
        self.intent.state = IntentState.GIVEN_UP
        self.intent.reason = f"{type(error).__name__}: {error}".removesuffix(": ")[:500]
        try:
            with suppress(PlatformError):  # the record before it says as much: a client that is gone
                self._store.save(self.intent)
            asked = [one for one in self.intent.candidates if one.asked_at is not None and not one.is_gone]
            # Where Google could not be reached for minutes it is not tried for as long again.
            patience = SETTLE_SECONDS if isinstance(error, ConnectionFailedError) else None
            reasons = self._remover.remove([Target.of_candidate(self.intent, one) for one in asked], patience)
            failed = [reason for reason in reasons if reason is not None]
            if not failed:
                with suppress(PlatformError):  # there is nothing of it any more, which whoever finds it will see
                    self._store.remove(self.name)
        except BaseException as interrupt:
            interrupt.add_note(
                f"{self.name} may be left and billed: its deletion was interrupted. {self._store.remedy} deletes it"
            )
            raise
        finally:
            self.release()
        if failed:
            message = (
                f"{self.name} may be left and billed ({'; '.join(failed)}). {self._store.remedy} tries again on this "
                f"machine; it was given up because: {error}"
            )
            if isinstance(error, Exception):
                raise DeletionFailedError(message) from error
            error.add_note(message)

    def release(self) -> None:
        """Let others look after it."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @property
    def _lease_until(self) -> float:
        return self.intent.deadline + self._request.time_to_live_seconds

    def _ask_for_the_next(self) -> None:
        """Ask for the next choice that is not refused; raise why there is none."""
        now = self._clock.now()
        for candidate in self.intent.candidates:
            if candidate.asked_at is not None or candidate.is_gone:
                continue
            if now >= self.intent.queue_deadline:
                break
            later = sum(1 for one in self.intent.candidates if one.asked_at is None and one is not candidate)
            candidate.deadline = now + (self.intent.queue_deadline - now) / (1 + later)
            error = self._ask(candidate)
            if error is None:
                self._courses.append(_Course(candidate))
                self._waits_since = self._clock.now()
                return
            self._take_note(candidate, error)
            self._drop([_Course(candidate)])
            now = self._clock.now()
        raise self._no_choice()

    def _ask(self, candidate: Candidate) -> FrayError | None:
        """Ask for one choice; return why it was refused."""
        now = self._clock.now()
        deadline = candidate.deadline if candidate.deadline is not None else self.intent.queue_deadline
        resource = queued_resource_of(
            self._request,
            candidate.index,
            project=self.intent.project,
            intent=self.intent.id,
            owner=self.intent.owner,
            lease_until=moment(self._lease_until),
            valid_seconds=deadline - now,
        )
        attempts = 0

        def on_attempt() -> None:
            # Before each attempt, the very first included: what Google may know of is on disk.
            nonlocal attempts
            attempts += 1
            with self._lock:
                candidate.asked_at = self._clock.now()
                self._store.save(self.intent)
            # After the record, which whoever cancels reads after that: one of the two sees the other.
            self._check_that_it_is_wanted()

        error: FrayError | None = None
        try:
            candidate.operation = self._api.create_queued_resource(
                candidate.zone,
                candidate.id,
                resource,
                request_id=candidate.request_id,
                deadline=min(deadline, now + CALL_DEADLINE_SECONDS),
                on_attempt=on_attempt,
            )
            # An earlier attempt may still be under way, though Google should know it for the same request.
            candidate.is_settled = attempts == 1
        except SliceExistsError as refusal:
            error = self._exists(candidate, refusal, attempts)
        except FrayError as refusal:
            error = refusal
            if attempts <= 1 and not isinstance(refusal, ConnectionFailedError):
                # The first answer there was says no: there is nothing.
                candidate.is_settled = candidate.is_gone = True
        with self._lock:
            self._store.save(self.intent)
        return error

    def _check_that_it_is_wanted(self) -> None:
        if self._store.is_cancelled(self.name, self.intent.id):
            raise SliceNotFoundError(
                f"{self.name} was deleted by another process on this machine while it was waited for"
            )

    def _exists(self, candidate: Candidate, refusal: SliceExistsError, attempts: int) -> FrayError | None:
        """Tell an earlier attempt's effect, whose answer was lost, from somebody else's slice of the name."""
        if attempts > 1:
            resource = self._api.get_queued_resource(candidate.full_name)
            if resource is not None and labels_of(resource).get(_labels.INTENT) == self.intent.id:
                return None
        candidate.is_settled = candidate.is_gone = True
        return SliceExistsError(
            f"{candidate.id} exists in {candidate.zone}: choose another name, or delete it first; {refusal}"
        )

    def _look(self, course: _Course) -> FrayError | None:
        """See how far one choice is; return why nothing will come of it."""
        candidate = course.candidate
        try:
            resource = self._api.get_queued_resource(candidate.full_name, self._look_deadline())
            if resource is None:
                return self._not_there(course)
            if labels_of(resource).get(_labels.INTENT) != self.intent.id:
                return self._vanished(course)
            course.was_seen = True
            return self._judge(course, resource)
        except ConnectionFailedError as error:
            # The request is well, as far as anybody knows: a wait outlives an outage, within its deadlines.
            course.state, course.message = SliceState.UNKNOWN, str(error)
            return None

    def _judge(self, course: _Course, resource: QueuedResource) -> FrayError | None:
        from google.cloud.tpu_v2 import QueuedResource

        raw = QueuedResource.pb(resource).state
        is_active = queued_resource_state(raw.state) is SliceState.READY
        nodes = self._nodes(course) if is_active else {}
        found = group_of(resource, list(nodes.values()))
        course.state, course.message, course.group = found.state, found.message, None
        choice = self._choice(course)
        if is_active:
            course.granted_at = course.granted_at or self._clock.now()
            missing = set(course.candidate.node_names) - nodes.keys()
            if missing and not missing & course.nodes_seen:
                # Granted a moment ago: not there yet, as far as anybody knows.
                course.state, course.message = SliceState.PROVISIONING, "the slices are granted and not listed yet"
                return None
        if found.state is SliceState.PREEMPTED:
            why = found.message or "no reason given"
            return PreemptedError(f"{choice} was granted and taken back before it was ready. Google says: {why}")
        if found.state is SliceState.DELETING:
            return self._vanished(course)
        if found.state is SliceState.FAILED:
            if queued_resource_state(raw.state) is not SliceState.FAILED:
                return self._vanished(course)  # suspended, by a user
            return translate_status(
                raw.failed_data.error, what=f"get {choice}", project=self.intent.project, zone=choice.zone
            )
        if is_active:
            course.group = found
        elif found.state is SliceState.PROVISIONING:
            course.granted_at = course.granted_at or self._clock.now()
        elif found.state is SliceState.QUEUED:
            course.granted_at = None
        return None

    def _not_there(self, course: _Course) -> FrayError | None:
        if course.was_seen:
            return self._vanished(course)
        choice = self._choice(course)
        if course.candidate.operation:
            done, error = self._api.operation_error(
                course.candidate.operation, what=f"get {choice}", zone=course.candidate.zone
            )
            if error is not None:
                return error
            if done:
                return self._vanished(course)
        course.state, course.message = SliceState.UNKNOWN, "asked for, and not listed yet"
        return None

    def _vanished(self, course: _Course) -> FrayError:
        return SliceNotFoundError(
            f"{course.candidate.id} in {course.candidate.zone} was deleted by somebody while it was waited for"
        )

    def _nodes(self, course: _Course) -> dict[str, Node]:
        nodes = self._api.get_nodes(course.candidate.node_names, self._workers, self._look_deadline())
        course.nodes_seen |= nodes.keys()
        return nodes

    def _overdue(self, course: _Course) -> FrayError | None:
        if course.group is not None and course.state is SliceState.READY:
            return None
        if self._clock.now() < self._deadline(course):
            return None
        choice = self._choice(course)
        said = f"; last seen {course.state}{f': {course.message}' if course.message else ''}"
        if course.granted_at is None:
            waited = self._clock.now() - (course.candidate.asked_at or self.intent.created)
            more = "" if len(self._request.choices) > 1 else "give several choices, or "
            return ProvisioningTimeoutError(
                f"no capacity for {choice} within {waited:.0f} s{said}. Another zone or tier may have some: {more}"
                "a longer queue timeout"
            )
        waited = self._clock.now() - course.granted_at
        return ProvisioningTimeoutError(
            f"{choice} was granted, is not ready after {waited:.0f} s{said}, and is deleted. It may need a longer boot "
            "timeout"
        )

    def _deadline(self, course: _Course) -> float:
        if course.granted_at is not None:
            return min(course.granted_at + self._request.boot_timeout_seconds, self.intent.deadline)
        deadline = course.candidate.deadline
        return self.intent.queue_deadline if deadline is None else deadline

    def _look_deadline(self) -> float:
        return self._clock.now() + CALL_DEADLINE_SECONDS / 4

    def _drop(self, courses: list[_Course]) -> None:
        """Delete choices that are not wanted any more, and see them gone."""
        candidates = [course.candidate for course in courses if not course.candidate.is_gone]
        self._courses = [course for course in self._courses if course not in courses]
        if not candidates:
            return
        reasons = self._remover.remove([Target.of_candidate(self.intent, one) for one in candidates])
        for candidate, reason in zip(candidates, reasons, strict=True):
            candidate.is_gone = reason is None
        self._store.save(self.intent)
        if failed := [reason for reason in reasons if reason is not None]:
            raise ProvisioningError(
                f"{self.name} was given up: a choice that is not wanted any more could not be deleted: "
                f"{'; '.join(failed)}"
            )

    def _take_note(self, candidate: Candidate, error: FrayError) -> None:
        """Keep why a choice came to nothing; raise it where no other can be better off."""
        if isinstance(error, _FATAL):
            raise error
        self._errors.append((self._request.choices[candidate.index], error))

    def _no_choice(self) -> FrayError:
        if not self._errors:
            return ProvisioningTimeoutError(f"there was no time left to ask for {self.name}")
        if len(self._errors) == 1 and len(self._request.choices) == 1:
            return self._errors[0][1]
        last = self._errors[-1][1]
        told = "; ".join(f"{choice}: {error}" for choice, error in self._errors)
        left = [each for each in self.intent.candidates if each.asked_at is None and not each.is_gone]
        if untried := ", ".join(str(self._request.choices[each.index]) for each in left):
            told += f"; not asked for, for there was no time left: {untried}"
        said = f"none of the {len(self._request.choices)} choices for {self.name} could be had: {told}"
        if isinstance(last, QuotaExceededError):
            error: FrayError = QuotaExceededError(said, quota=last.quota, limit=last.limit, region=last.region)
        else:
            error = (type(last) if isinstance(last, ProvisioningError) else ProvisioningError)(said)
        error.__cause__ = last
        return error

    def _report(self, on_progress: OnProgress | None) -> float:
        """Tell what is waited for; return when that has to be over."""
        deadline = min(self._deadline(course) for course in self._courses)
        if on_progress is not None:
            furthest = self._courses[0] if len(self._courses) == 1 else self._furthest()
            choices = " or ".join(str(self._choice(course)) for course in self._courses)
            what = "hosts to be ready" if furthest.granted_at is not None else "capacity"
            on_progress(
                Progress(
                    self.name,
                    furthest.state,
                    f"{what}: {choices}",
                    moment(self._waits_since),
                    moment(self._deadline(furthest)),
                    furthest.message,
                )
            )
        return deadline

    def _furthest(self) -> _Course:
        return next((course for course in self._courses if course.granted_at is not None), self._courses[0])

    def _choice(self, course: _Course) -> SliceChoice:
        return self._request.choices[course.candidate.index]
