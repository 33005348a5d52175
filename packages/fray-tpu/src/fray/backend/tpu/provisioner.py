"""Slices through the queued resources of the Cloud TPU v2 API: the provisioner named `gcp-tpu`.

A request is a record on this machine's disk (`_intents`), pursued until it is ready or nothing of it is left
(`_pursuit`, `_removal`); from then on it is its labels (`_labels`) that say whose it is, to every machine.
"""

from __future__ import annotations

import builtins
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fray.backend.tpu import _labels
from fray.backend.tpu._api import Api, at_once, connect, project_of_environment
from fray.backend.tpu._intents import Claim, Intent, IntentStore, default_directory
from fray.backend.tpu._inventory import Inventory, node_names_of
from fray.backend.tpu._owner import default_owner
from fray.backend.tpu._pursuit import Pursuit
from fray.backend.tpu._removal import Remover, Target
from fray.backend.tpu._requests import Requests
from fray.backend.tpu._states import LEAST_FIRST
from fray.backend.tpu.interface import Clock, Doomed, GcPlan, GcReport, Provisioner, SystemClock, moment
from fray.backend.tpu.types import LONGEST_SECONDS, Lease, OnProgress, SliceGroup, SliceRequest, SliceState
from fray.errors import (
    DeletionFailedError,
    FrayError,
    InvalidTypeError,
    InvalidValueError,
    PlatformError,
    ProvisioningError,
    SliceExistsError,
    SliceNotFoundError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import TpuClient

__all__ = ["TpuProvisioner"]


class TpuProvisioner(Provisioner):
    """Asks Google for TPU slices, watches them, and deletes them.

    Nothing is called before a method is, and no credentials are looked for. One object is for one thread at a time.

    Args:
        project: Who pays; by default the project that the environment or gcloud's configuration names.
        zones: Where `list`, `describe`, `delete` and `gc` look; by default everywhere.
        owner: Whose the slices are; by default `$FRAY_TPU_OWNER`, else gcloud's account, else user and machine.
        client: Google's client, made by the caller.
        endpoint: `host:port` of a stand-in for Google's API (see `fray.backend.tpu.testing`), which is spoken to
            without encryption and credentials; by default `$FRAY_TPU_ENDPOINT`.
        clock: What time is told by.
        state_directory: Where requests are recorded; by default the user's state directory.
        command_options: What messages put behind a `fray tpu …` that finds the same slices and records.
        delete_timeout_seconds: How long a deletion may take until it is seen to be done.
        parallel_calls: How many calls are made at the same time, where they can be.
        calls_per_second: How many are made in a second, over time.
    """

    environment_variables = frozenset(
        {"FRAY_TPU_OWNER", "FRAY_TPU_ENDPOINT", "FRAY_TPU_SSH", "FRAY_TPU_FAKE_DIRECTORY"}
    )

    def __init__(
        self,
        project: str | None = None,
        zones: Sequence[str] | str | None = None,
        *,
        owner: str | None = None,
        client: TpuClient | None = None,
        endpoint: str | None = None,
        clock: Clock | None = None,
        state_directory: Path | str | None = None,
        command_options: str | None = None,
        delete_timeout_seconds: float = 600.0,
        parallel_calls: int = 8,
        calls_per_second: float = 10.0,
    ) -> None:
        if isinstance(zones, str):
            zones = [zones]
        if zones is not None and not zones:
            raise InvalidValueError("zones: name at least one, or give None to look everywhere")
        if parallel_calls < 1 or calls_per_second <= 0 or delete_timeout_seconds <= 0:
            raise InvalidValueError(
                "parallel_calls, calls_per_second and delete_timeout_seconds are greater than 0, not "
                f"{parallel_calls}, {calls_per_second} and {delete_timeout_seconds}"
            )
        self._given_project = project
        self._zones = tuple(zones or ("-",))
        self._given_owner = owner
        self._client = client
        self._endpoint = endpoint or os.environ.get("FRAY_TPU_ENDPOINT") or None
        self._clock = clock or SystemClock()
        self._state_directory = Path(state_directory) if state_directory is not None else None
        self._command_options = command_options
        self._delete_timeout_seconds = delete_timeout_seconds
        self._workers = parallel_calls
        self._calls_per_second = calls_per_second
        # What was created through this object and is not deleted, by request: its pursuit until it is ready, then the
        # group. Of one name there may be several, in different zones.
        self._created: dict[str, Pursuit | SliceGroup] = {}

    @cached_property
    def project(self) -> str:
        """Who pays."""
        if self._given_project:
            return self._given_project
        if (named := os.environ.get("GOOGLE_CLOUD_PROJECT")) or self._endpoint is not None:
            return named or "fray"
        return project_of_environment()

    @cached_property
    def owner(self) -> str:
        """Whose the slices are."""
        return self._given_owner or default_owner()

    @classmethod
    def doctor(cls) -> Iterator[tuple[bool, str, str]]:  # noqa: D102
        from fray.backend.tpu._doctor import checks

        return checks()

    def create(self, request: SliceRequest) -> SliceGroup:  # noqa: D102
        if not isinstance(request, SliceRequest):
            raise InvalidTypeError(f"request: {request!r} is no SliceRequest")
        claim = self._store.claim(request.name)
        if claim is None:
            raise SliceExistsError(f"{request.name} is being asked for, or deleted, by a process on this machine")
        try:
            if (left := self._store.load(request.name)) is not None:
                raise SliceExistsError(self._left_behind(left))
            intent = Intent.of(request, self.project, self.owner, self._clock.now())
            pursuit = self._pursuit(intent, request, claim)
        except BaseException:
            claim.release()
            raise
        self._created[intent.id] = pursuit
        with self._or_nothing(pursuit):
            return pursuit.start()

    def wait_ready(self, name: str, on_progress: OnProgress | None = None) -> SliceGroup:  # noqa: D102
        pursuit = self._pursued(name)
        if pursuit is None:
            taken_up = self._requests.take_up(name)
            if taken_up is None:
                group = self.describe(name)
                if group.state is SliceState.READY:
                    return group
                raise ProvisioningError(
                    f"{name} is {group.state}{f' ({group.message})' if group.message else ''} and nobody asks for it "
                    f"any more: delete it ({self._command(f'down {name}') or '`delete`'}) and create it again"
                )
            intent, claim = taken_up
            assert intent.request is not None
            pursuit = self._created[intent.id] = self._pursuit(intent, intent.request, claim)
        with self._or_nothing(pursuit):
            group = pursuit.finish(on_progress)
        self._created[pursuit.intent.id] = group
        return group

    def list(self, *, all_owners: bool = False) -> builtins.list[SliceGroup]:  # noqa: D102
        return [group for group in self._inventory.groups() if all_owners or self._is_mine(group)]

    def describe(self, name: str, *, all_owners: bool = False) -> SliceGroup:  # noqa: D102
        named = [group for group in self._inventory.groups() if group.name == name]
        found = [group for group in named if all_owners or self._is_mine(group)]
        if not found:
            raise self._not_found(name, named)
        return max(found, key=lambda group: (self._is_mine(group), LEAST_FIRST.index(group.state)))

    def delete(self, *what: str | SliceGroup) -> None:  # noqa: D102
        names = {one for one in what if isinstance(one, str)}
        groups = [one for one in what if not isinstance(one, str)]
        for group in groups:
            if not self._is_mine(group):
                whose = f"{group.lease.owner}'s" if group.lease else "not Fray's"
                raise InvalidValueError(
                    f"{group.name} in {group.zone} is {whose}, and not {self.owner}'s: {self._gc_of_all} shows others' "
                    "slices whose lease has ended"
                )
        # Of a name there may be a request in flight, and slices in another zone too.
        requests, unreadable = self._requests_for(names, groups)
        if names:
            named = [group for group in self._inventory.groups() if group.name in names]
            groups += [group for group in named if self._is_mine(group) and group not in groups]
            for name in sorted(names - {group.name for group in groups} - unreadable.keys()):
                self._check_request(name, requests.get(name), named, of_several=len(names) > 1)
        own = [request for request in requests.values() if self._requests.is_mine(request)]
        failed = [
            f"what else may have been asked for under the name {name}, since {error}"
            for name, error in sorted(unreadable.items())
            if name in names
        ]
        for request in own:
            failed += self._give_up(request)
        handled = {request.id for request in own}
        left = [group for group in groups if group.labels.get(_labels.INTENT) not in handled]
        # On disk first: who begins to delete and dies has said that it is not wanted any more.
        recorded = [self._requests.record_deletion(group) for group in left]
        reasons = self._remover.remove([Target.of_group(group) for group in left])
        for group, is_recorded, reason in zip(left, recorded, reasons, strict=True):
            if reason is None:
                self._created.pop(group.labels.get(_labels.INTENT, ""), None)
                if is_recorded:
                    self._requests.forget_deletion(group)
            else:
                failed.append(reason)
        if failed:
            raise DeletionFailedError(
                f"may be left and billed: {'; '.join(failed)}. {self._remedy} tries again on this machine"
            )

    def renew(self, name: str, time_to_live_seconds: float) -> Lease:  # noqa: D102
        if not 0 < time_to_live_seconds <= LONGEST_SECONDS:
            raise InvalidValueError(f"time_to_live_seconds: {time_to_live_seconds} is not between 0 and a year")
        group = self.describe(name)
        if group.lease is None or not group.slices:
            raise UnsupportedError(
                f"{name} is {group.state} and has no slices yet: a queued request has no labels of its own, so its "
                f"lease stays as it is, until {group.lease.until if group.lease else 'nobody knows when'}"
            )
        until = moment(int(self._clock.now())) + timedelta(seconds=int(time_to_live_seconds))
        if group.lease.until is not None and group.lease.until >= until:
            return group.lease

        def renew_one(full_name: str) -> None:
            node = self._api.get_node(full_name)
            if node is None:
                raise SliceNotFoundError(f"{full_name} was deleted while its lease was renewed")
            # Read right before: others' changes of other labels stay.
            self._api.set_labels(node, {**node.labels, _labels.LEASE_UNTIL: _labels.lease_value(until)})

        there = {one.name for one in group.slices}
        at_once(renew_one, [one for one in node_names_of(group) if one.rpartition("/")[2] in there], self._workers)
        return Lease(group.lease.owner, group.lease.purpose, until)

    def reconcile(self) -> GcReport:  # noqa: D102
        doomed, unreadable = self._requests.abandoned(all_owners=False)
        return self.gc(GcPlan(tuple(doomed), tuple(unreadable)))

    def plan_gc(self, *, all_owners: bool = False) -> GcPlan:  # noqa: D102
        doomed, unreadable = self._requests.abandoned(all_owners=all_owners)
        intents = {one.intent for one in doomed}
        for group in self.list(all_owners=all_owners):
            if group.labels.get(_labels.INTENT) not in intents and (reason := self._expired(group)):
                owner = group.lease.owner if group.lease else ""
                doomed.append(Doomed(group.name, reason, owner, (group.zone,), group))
        return GcPlan(tuple(doomed), tuple(unreadable))

    def gc(self, plan: GcPlan) -> GcReport:  # noqa: D102
        deleted: builtins.list[Doomed] = []
        spared: builtins.list[Doomed] = []
        failed: builtins.list[tuple[Doomed, str]] = []

        def remove(one: Doomed) -> str | None:
            """Return why it is not gone; the empty string where it is to be spared."""
            try:
                return self._requests.remove_abandoned(one) if one.group is None else self._remove_expired(one.group)
            except FrayError as error:
                return str(error)

        outcomes = at_once(remove, plan.doomed, self._workers)
        for one, outcome in zip(plan.doomed, outcomes, strict=True):
            if outcome is None:
                deleted.append(one)
            elif not outcome:
                spared.append(one)
            else:
                failed.append((one, outcome))
        return GcReport(tuple(deleted), tuple(spared), tuple(failed))

    def delete_created(self) -> None:  # noqa: D102
        failed: builtins.list[str] = []
        for one in builtins.list(self._created.values()):
            if isinstance(one, Pursuit):
                failed += self._give_up(one.intent)
        try:
            if groups := [one for one in self._created.values() if isinstance(one, SliceGroup)]:
                self.delete(*groups)
        except FrayError as error:
            failed.append(str(error))
        if failed:
            raise DeletionFailedError("; ".join(failed))

    def close(self) -> None:  # noqa: D102
        for one in self._created.values():
            if isinstance(one, Pursuit):
                one.release()
        self._created.clear()
        if self._client is None and "_api" in self.__dict__:  # to make one, credentials would be looked for
            self._api.close()

    # The parts

    @cached_property
    def _api(self) -> Api:
        client = self._client
        make: Callable[[], TpuClient] = (lambda: connect(self._endpoint)) if client is None else (lambda: client)
        return Api(self.project, make, self._clock, calls_per_second=self._calls_per_second)

    @cached_property
    def _store(self) -> IntentStore:
        return IntentStore(self._state_directory or default_directory(), self.project, self._remedy)

    @cached_property
    def _requests(self) -> Requests:
        return Requests(self._store, self._remover, self._clock, self.owner, self._zones)

    def _command(self, command: str) -> str | None:
        """Return a `fray tpu …` that finds what this object does; None where none can."""
        if self._command_options is not None:
            return f"`fray tpu {command}{self._command_options}`"
        if self._state_directory is not None:
            return None
        owner = f"FRAY_TPU_OWNER={shlex.quote(self._given_owner)} " if self._given_owner else ""
        project = f" --project {shlex.quote(self._given_project)}" if self._given_project else ""
        return f"`{owner}fray tpu {command}{project}`"

    @property
    def _gc_of_all(self) -> str:
        return self._command("gc --all-owners") or "`plan_gc(all_owners=True)`"

    @property
    def _remedy(self) -> str:
        return self._command("gc --yes") or "`reconcile`, of a provisioner with the same owner and state_directory,"

    @cached_property
    def _inventory(self) -> Inventory:
        return Inventory(self._api, self._zones, self._workers)

    @cached_property
    def _remover(self) -> Remover:
        return Remover(self._api, self._clock, self._delete_timeout_seconds, self._workers)

    def _pursuit(self, intent: Intent, request: SliceRequest, claim: Claim) -> Pursuit:
        return Pursuit(
            intent,
            request,
            api=self._api,
            clock=self._clock,
            remover=self._remover,
            store=self._store,
            claim=claim,
            workers=self._workers,
        )

    @contextmanager
    def _or_nothing(self, pursuit: Pursuit) -> Iterator[None]:
        """Whatever is raised, nothing of the request is left."""
        try:
            yield
        except BaseException as error:
            self._created.pop(pursuit.intent.id, None)
            pursuit.give_up(error)
            raise

    # Requests

    def _pursued(self, name: str) -> Pursuit | None:
        """Return what this object is after under a name: there is one at most, for its lock is held."""
        return next((one for one in self._created.values() if isinstance(one, Pursuit) and one.name == name), None)

    def _requests_for(
        self, names: set[str], groups: Sequence[SliceGroup]
    ) -> tuple[dict[str, Intent], dict[str, PlatformError]]:
        """Return the requests of these names, and of these groups, by name; and why some cannot be read."""
        found: dict[str, Intent] = {}
        unreadable: dict[str, PlatformError] = {}
        intents = {group.labels.get(_labels.INTENT) for group in groups}
        for name in sorted(names | {group.name for group in groups}):
            pursuit = self._pursued(name)
            try:
                request = self._requests.find(name) if pursuit is None else pursuit.intent
            except PlatformError as error:  # what there is, is billed, whatever the disk says
                unreadable[name] = error
                continue
            if request is not None and (name in names or request.id in intents):
                found[name] = request
        return found, unreadable

    def _check_request(
        self, name: str, request: Intent | None, named: Sequence[SliceGroup], *, of_several: bool
    ) -> None:
        """Refuse a name under which there is nothing of the caller's."""
        if request is None:
            missing = self._not_found(name, [group for group in named if group.name == name])
            raise SliceNotFoundError(f"{missing}. Nothing was deleted") if of_several else missing
        if not self._requests.is_mine(request):
            raise InvalidValueError(
                f"the request for {name} on this machine is {request.owner}'s, and not {self.owner}'s: "
                f"{self._gc_of_all} shows it when nobody waits for it any more"
            )

    def _give_up(self, request: Intent) -> builtins.list[str]:
        """Delete what there may be of a request that is not ready; return what could not be deleted."""
        pursuit = self._created.get(request.id)
        if not isinstance(pursuit, Pursuit):
            return self._requests.cancel(request)
        del self._created[request.id]
        try:
            pursuit.give_up(ProvisioningError("it was not wanted any more"))
        except FrayError as error:
            return [str(error)]
        return []

    # Leases

    def _is_mine(self, group: SliceGroup) -> bool:
        return group.lease is not None and group.lease.owner == _labels.label_value(self.owner)

    def _expired(self, group: SliceGroup) -> str:
        """Return since when a group's lease is over, in words; nothing where it is not, or cannot be read."""
        until = group.lease.until if group.lease is not None else None
        if until is None or until >= moment(self._clock.now()):
            return ""
        return f"its lease ended {until:%Y-%m-%d %H:%M} UTC"

    def _remove_expired(self, planned: SliceGroup) -> str | None:
        group = self._inventory.refresh(planned)
        if group is None:
            return None
        if group.labels.get(_labels.INTENT) != planned.labels.get(_labels.INTENT) or not self._expired(group):
            return ""
        (reason,) = self._remover.remove([Target.of_group(group)])
        return reason

    def _left_behind(self, request: Intent) -> str:
        said = f"a request for {request.name} was left behind by a client that is gone"
        if not self._requests.is_mine(request):
            return f"{said}. It is {request.owner}'s: choose another name"
        takes_up = self._command(f"wait {request.name}") or "`wait_ready`"
        waits = f"{takes_up} takes it up; " if self._requests.is_wanted(request) else ""
        return f"{said}: {waits}{self._remedy} deletes what there may be of it"

    def _not_found(self, name: str, others: Sequence[SliceGroup] = ()) -> SliceNotFoundError:
        where = "any zone" if self._zones == ("-",) else ", ".join(self._zones)
        owners = sorted({group.lease.owner for group in others if group.lease is not None})
        hint = f"{self._command('list') or '`list`'} shows what there is"
        if owners:
            hint = f"{', '.join(owners)} has: {self._command('list --all-owners') or '`list(all_owners=True)`'}"
        return SliceNotFoundError(
            f"{self.owner} has no slices named {name!r} in {where} of project {self.project}: {hint}"
        )
