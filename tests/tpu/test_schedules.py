"""Whatever goes wrong, and wherever the client is killed: nothing stays that costs money, nothing is made twice.

Each schedule is drawn from its seed: a request, what becomes of it, which calls go wrong and how, and where the client
dies or is interrupted. `make test` runs a sample.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from fray import errors
from fray.backend.tpu import SliceChoice, SliceGroup, SliceRequest, SliceState, Tier, TpuProvisioner, _removal
from fray.backend.tpu._intents import IntentStore
from fray.backend.tpu._labels import INTENT
from fray.backend.tpu._pursuit import Pursuit
from fray.backend.tpu._removal import Remover, Target
from fray.backend.tpu.testing import Ending, FakeCloud, Fault, Moment, Supply
from tests.tpu.cloud_harness import Killed, Trap, provisioner_of

pytestmark = pytest.mark.usefixtures("disks_that_need_no_flush")

SAMPLE = 20
BATCHES = 10  # so 200 in `make test`
SOAK = int(os.environ.get("FRAY_SOAK", "1"))
DELETE_TIMEOUT = 900.0
ZONES = ("us-central1-a", "us-east5-b", "europe-west4-b")
METHODS = ("CreateQueuedResource", "GetQueuedResource", "DeleteQueuedResource", "GetNode", "*")
# What comes of a request that nothing else befalls.
EXPECTED = {
    Ending.STOCKOUT: errors.StockoutError,
    Ending.QUOTA: errors.QuotaExceededError,
    Ending.RESERVATION: errors.ReservationError,
    Ending.NEVER: errors.ProvisioningTimeoutError,
    Ending.HANGS: errors.ProvisioningTimeoutError,
}


@dataclass
class Schedule:
    request: SliceRequest
    supplies: dict[str, Supply]
    faults: list[Fault] = field(default_factory=list)
    trap_at: int = 0
    trap_after: bool = False
    trap_kills: bool = False
    parallel_calls: int = 1
    deletes: bool = False
    preempts: bool = False
    reconciles_in_trouble: bool = False
    forgets_request_ids: bool = False

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        chance = random.Random(seed)
        tiers = list(Tier)
        zones = chance.sample(ZONES, chance.choice((1, 1, 2, 3)))
        request = SliceRequest(
            "train",
            tuple(SliceChoice(chance.choice(("v5litepod-16", "v5p-8")), zone, chance.choice(tiers)) for zone in zones),
            at_once=chance.random() < 0.4,
            num_slices=chance.choice((1, 1, 2, 3)),
            queue_timeout_seconds=chance.choice((120, 600, 3600)),
            boot_timeout_seconds=chance.choice((300, 900)),
            time_to_live_seconds=chance.choice((600, 7200)),
        )
        supplies = {
            zone: Supply(
                chance.choice((*[Ending.GRANTED] * 5, *Ending)),
                accept_seconds=chance.choice((0, 5, 30)),
                queue_seconds=chance.choice((0, 20, 300)),
                boot_seconds=chance.choice((10, 120)),
                delete_seconds=chance.choice((0, 10, 120)),
                preempted_during_boot=chance.random() < 0.1,
                vanishes=chance.random() < 0.5,
                outlives_its_deadline=chance.random() < 0.2,
            )
            for zone in zones
        }
        faults = [
            Fault(
                method := chance.choice(METHODS),
                # A late effect of a read is none.
                chance.choice(tuple(Moment)) if method in METHODS[::2] else chance.choice((Moment.BEFORE, Moment.SLOW)),
                code=chance.choice((14, 14, 4, 13, 10)),
                times=chance.choice((1, 1, 3, 8)),
                skip=chance.choice((0, 0, 1, 5, 20)),
                delay_seconds=chance.choice((2, 20, 45)),
            )
            for _ in range(chance.choice((0, 0, 1, 2, 4)))
        ]
        if chance.random() < 0.1:
            faults.append(chance.choice((Fault.quota(), Fault.invalid(), Fault.denied(), Fault.rate_limited(times=5))))
        if chance.random() < 0.3:
            # The call that costs money, and where what the caller knows is least.
            unknown = chance.choice((Moment.AFTER, Moment.LATE, Moment.SLOW, Moment.OPERATION))
            faults.insert(0, Fault("CreateQueuedResource", unknown, delay_seconds=chance.choice((2, 20, 45))))
        trapped = chance.random() < 0.6
        return cls(
            request,
            supplies,
            faults,
            trap_at=chance.choice((chance.randint(1, 3), chance.randint(1, 30))) if trapped else 0,
            trap_after=chance.random() < 0.5,
            trap_kills=chance.random() < 0.7,
            parallel_calls=chance.choice((1, 1, 1, 4)),
            deletes=chance.random() < 0.5,
            preempts=chance.random() < 0.2,
            reconciles_in_trouble=chance.random() < 0.5,
            # Google knows a request for the same at least as long as an attempt can be under way.
            forgets_request_ids=chance.random() < 0.3 and all(fault.moment is not Moment.LATE for fault in faults),
        )


def run(cloud: FakeCloud, schedule: Schedule, directory: Path) -> None:
    cloud.reset()
    for zone, supply in schedule.supplies.items():
        cloud.offer(supply, zone=zone)
    bystander = _bystander(cloud, directory)
    cloud.inject(*schedule.faults)
    if schedule.forgets_request_ids:
        cloud.forget_request_ids()
    state, kept = directory / "state", directory / "kept"
    traps = []
    if schedule.trap_at:
        raises = Killed if schedule.trap_kills else KeyboardInterrupt
        traps = [Trap(schedule.trap_at, after=schedule.trap_after, raises=raises, state=state, kept=kept)]
    options = {"parallel_calls": schedule.parallel_calls, "delete_timeout_seconds": DELETE_TIMEOUT}
    client = provisioner_of(cloud, state, *traps, **options)
    end = _use(cloud, client, schedule)
    if end is not End.WELL:
        state = kept if kept.exists() else directory / "nothing"
    client.close()

    # Then, by a client that knows what is on this machine's disk and no more.
    heir = provisioner_of(cloud, state, **options)
    if schedule.reconciles_in_trouble:
        heir.reconcile()
    cloud.heal()
    report = heir.reconcile()
    assert not report.failed
    if end is not End.KILLED_WITH_SLICES:
        # Leases have nothing to do with it; and a call that was under way has had all its time.
        held = [entry.name for entry in cloud.existing()] if end is End.WELL else bystander
        cloud.clock.sleep(300)
        assert [entry.name for entry in cloud.existing()] == held
    request = schedule.request
    cloud.clock.sleep(request.queue_timeout_seconds + request.boot_timeout_seconds + request.time_to_live_seconds + 2)
    plan = heir.plan_gc()
    assert not plan.unreadable
    report = heir.gc(plan)
    assert not report.failed
    assert [entry.name for entry in cloud.existing()] == bystander
    assert heir.plan_gc().doomed == ()
    heir.close()
    made = Counter((entry.name, entry.labels.get(INTENT, "")) for entry in cloud.journal)
    assert set(made.values()) == {1}


def _bystander(cloud: FakeCloud, directory: Path) -> list[str]:
    """Somebody else's slice, made and left: of the same name, in another zone."""
    other = provisioner_of(cloud, directory / "other", owner="john")
    other.create(SliceRequest("train", SliceChoice("v5litepod-16", "us-central2-b"), time_to_live_seconds=600))
    other.wait_ready("train")
    other.close()
    return [entry.name for entry in cloud.existing()]


class End(Enum):
    """How a client ended."""

    WELL = "well"
    KILLED_WAITING = "killed before its slices were ready"
    KILLED_WITH_SLICES = "killed after that"


def _use(cloud: FakeCloud, client: TpuProvisioner, schedule: Schedule) -> End:
    """Do what a caller does; return how it ended."""
    request = schedule.request
    others = len(cloud.existing())
    began = cloud.clock.now()
    group: SliceGroup | None = None
    trouble: BaseException | None = None
    try:
        client.create(request)
        group = client.wait_ready(request.name)
    except Killed:
        return End.KILLED_WAITING
    except (errors.FrayError, KeyboardInterrupt) as error:
        trouble = error
    took = cloud.clock.now() - began
    # One call with all its attempts, and what it finds out, may be under way when the time is over.
    limit = request.queue_timeout_seconds + request.boot_timeout_seconds + 200
    if group is not None:
        assert took <= limit
        assert group.state is SliceState.READY
        assert len(group.slices) == request.num_slices
        assert all(len(one.hosts) == choice_hosts(request, group) for one in group.slices)
        assert len([entry for entry in cloud.billed() if "us-central2-b" not in entry.name]) == request.num_slices
    else:
        assert took <= limit + (len(request.choices) + 1) * (DELETE_TIMEOUT + 100)
        may_be_left = isinstance(trouble, errors.DeletionFailedError) or "may be left" in str(
            getattr(trouble, "__notes__", "")
        )
        if not may_be_left:
            assert len(cloud.existing()) == others, trouble
    if not schedule.faults and not schedule.trap_at and len(request.choices) == 1:
        _check_outcome(schedule, trouble)
    try:
        if group is not None and schedule.preempts:
            cloud.preempt(group.slices[0].name)
        if group is not None and schedule.deletes:
            client.delete(group.name)
            assert len(cloud.existing()) == others
    except Killed:
        return End.KILLED_WITH_SLICES
    except (errors.FrayError, KeyboardInterrupt):
        pass  # what it did is looked at by the heir
    return End.WELL


def choice_hosts(request: SliceRequest, group: SliceGroup) -> int:
    return next(choice.hosts for choice in request.choices if choice.zone == group.zone)


def _check_outcome(schedule: Schedule, trouble: BaseException | None) -> None:
    request = schedule.request
    supply = schedule.supplies[request.choices[0].zone]
    waits = supply.accept_seconds + supply.queue_seconds
    if supply.ending is not Ending.NEVER and abs(waits - request.queue_timeout_seconds) < 60:
        return  # either is right
    if waits > request.queue_timeout_seconds:
        expected: type[BaseException] | None = errors.ProvisioningTimeoutError
    elif supply.ending is Ending.GRANTED:
        expected = errors.PreemptedError if supply.preempted_during_boot else None
    elif supply.ending is Ending.HANGS and supply.preempted_during_boot:
        expected = errors.ProvisioningTimeoutError
    else:
        expected = EXPECTED[supply.ending]
    assert (type(trouble) if trouble is not None else None) is expected, trouble


@pytest.mark.parametrize("batch", range(BATCHES))
def test_nothing_leaks_whatever_happens(batch: int, cloud: FakeCloud, tmp_path: Path) -> None:
    for seed in range(batch * SAMPLE, (batch + 1) * SAMPLE):
        _run_seed(cloud, seed, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("batch", range(2 * SOAK))
def test_nothing_leaks_whatever_happens_at_length(batch: int, cloud: FakeCloud, tmp_path: Path) -> None:
    for seed in range(1000 + batch * 50, 1000 + (batch + 1) * 50):
        _run_seed(cloud, seed, tmp_path)


def _run_seed(cloud: FakeCloud, seed: int, tmp_path: Path) -> None:
    schedule = Schedule.draw(seed)
    try:
        run(cloud, schedule, tmp_path / str(seed))
    except BaseException as error:
        error.add_note(f"seed {seed}: {schedule}")
        raise


# A schedule that no mistake fails proves nothing: deliberate mistakes, each of which some schedule has to catch.

_remove = Remover._delete_what_is_left


def _forget(self: Pursuit, error: BaseException) -> None:
    self.release()


def _drop_and_forget(self: Pursuit, courses: list[Any]) -> None:
    self._courses = [course for course in self._courses if course not in courses]


def _do_not_look(self: Remover, targets: Sequence[Target], seconds: float | None = None) -> list[str | None]:
    for target in targets:
        self._delete_what_is_left(target, _removal._Deletion(), self._clock.now() + 100)
    return [None] * len(targets)


def _ignore_labels(self: Remover, target: Target, *arguments: Any) -> str | None:
    return _remove(self, replace(target, intent="another"), *arguments)


MISTAKES: dict[str, tuple[Any, str, Any, int]] = {
    "nothing is recorded": (IntentStore, "save", lambda self, intent: None, 40),
    "what is given up is not deleted": (Pursuit, "give_up", _forget, 80),
    "a deletion is not looked after": (Remover, "remove", _do_not_look, 40),
    "its own slices are taken for another's": (Remover, "_delete_what_is_left", _ignore_labels, 40),
    "leases never end": (TpuProvisioner, "_expired", lambda self, group: "", 40),
    "everything is the caller's": (TpuProvisioner, "_is_mine", lambda self, group: True, 40),
    "choices that lost stay": (Pursuit, "_drop", _drop_and_forget, 400),
    "not found is gone, at once": (_removal, "SETTLE_SECONDS", 0, 300),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_schedules_catch(mistake: str, cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, wrong, seeds = MISTAKES[mistake]
    monkeypatch.setattr(place, name, wrong)
    for seed in range(seeds):
        try:
            run(cloud, Schedule.draw(seed), tmp_path / str(seed))
        except (AssertionError, errors.FrayError):
            return
    pytest.fail(f"no schedule of {seeds} fails although {mistake}")
