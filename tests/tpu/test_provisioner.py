"""What a provisioner promises to who pays: slices or the reason, and nothing left."""

from __future__ import annotations

import shutil
import stat
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from google.auth.exceptions import RefreshError, TransportError
from google.cloud import tpu_v2

from fray import errors
from fray.backend.tpu import DataDisk, Progress, SliceChoice, SliceState, Tier, TpuProvisioner, label_value
from fray.backend.tpu._api import Api, StoppedError, at_once
from fray.backend.tpu._intents import IntentStore
from fray.backend.tpu._labels import INTENT, LEASE_UNTIL
from fray.backend.tpu.testing import Ending, FakeCloud, Fault, Moment, Supply, VirtualClock
from tests.tpu.cloud_harness import ZONE, Killed, Trap, provisioner_of, request_of

OTHER_ZONE = "us-east5-b"
HERE, THERE = SliceChoice("v5litepod-16", ZONE), SliceChoice("v5litepod-16", OTHER_ZONE, Tier.SPOT)
HOUR = 3600.0


def names(cloud: FakeCloud) -> list[str]:
    """What exists, without the projects."""
    return ["/".join(entry.name.split("/")[3:]) for entry in cloud.existing()]


def records(state: Path) -> list[str]:
    return sorted(path.name for path in state.rglob("*") if path.is_file())


class Watch(Trap):
    """Calls a function before each call."""

    def __init__(self, look: Any) -> None:
        super().__init__(0)
        self._look = look

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self._look(details.method.rpartition("/")[2], request)
        return continuation(details, request)


# Slices


def test_slices_come_with_their_hosts_in_worker_order(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    asked = provisioner.create(request_of(num_slices=2, purpose="a first try"))
    assert (asked.state, asked.slices, asked.zone) == (SliceState.QUEUED, (), ZONE)
    group = provisioner.wait_ready("train")
    assert (group.state, [one.name for one in group.slices]) == (SliceState.READY, ["train-0", "train-1"])
    assert [host.worker_id for host in group.hosts] == [0, 1, 2, 3] * 2
    assert all(host.internal_ip and host.external_ip for host in group.hosts)
    assert group.lease is not None
    assert (group.lease.owner, group.lease.purpose) == ("jane", label_value("a first try"))
    assert provisioner.list() == [group]
    assert provisioner.describe("train") == group
    assert records(tmp_path) == []


def test_all_that_is_asked_for_reaches_google(cloud: FakeCloud, tmp_path: Path) -> None:
    sent: list[tpu_v2.CreateQueuedResourceRequest] = []
    watch = Watch(lambda method, request: sent.append(request) if method.startswith("Create") else None)
    provisioner = provisioner_of(cloud, tmp_path, watch)
    provisioner.create(
        request_of(
            "train",
            SliceChoice("v5p-8", ZONE, Tier.RESERVED, reservation="ours"),
            network="net",
            subnetwork="subnet",
            external_ips=False,
            service_account="robot@fray-test.iam.gserviceaccount.com",
            tags=["ssh"],
            labels={"team": "research"},
            data_disks=[DataDisk("data")],
            startup_script="#!/bin/sh\ntrue\n",
            metadata={"key": "value"},
            queue_timeout_seconds=600,
        )
    )
    (request,) = sent
    made = request.queued_resource
    (spec,) = made.tpu.node_spec
    node = spec.node
    assert (spec.node_id, node.accelerator_type, node.runtime_version) == ("train", "v5p-8", "v2-alpha-tpuv5")
    assert (node.network_config.network, node.network_config.subnetwork) == ("net", "subnet")
    assert not node.network_config.enable_external_ips
    assert node.service_account.email == "robot@fray-test.iam.gserviceaccount.com"
    assert (list(node.tags), node.labels["team"]) == (["ssh"], "research")
    assert node.data_disks[0].source_disk == f"projects/fray-test/zones/{ZONE}/disks/data"
    assert dict(node.metadata) == {"key": "value", "startup-script": "#!/bin/sh\ntrue\n"}
    assert made.reservation_name == f"projects/fray-test/locations/{ZONE}/reservations/ours"
    assert "guaranteed" in made
    assert node.scheduling_config.reserved
    assert tpu_v2.QueuedResource.pb(made).queueing_policy.valid_until_duration.seconds == 600


def test_progress_says_what_is_waited_for_and_since_when(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    began = datetime.fromtimestamp(cloud.clock.now(), UTC)
    provisioner.create(request_of())
    told: list[Progress] = []
    provisioner.wait_ready("train", told.append)
    assert told[0].waiting_for == "capacity: v5litepod-16 (on-demand) in us-central1-a"
    assert told[0].deadline == began + timedelta(hours=1)
    assert told[-1].waiting_for.startswith("hosts to be ready")
    assert told[0].since <= told[1].since < told[-1].since


# Never twice


def test_a_request_is_on_disk_before_google_hears_of_it(cloud: FakeCloud, tmp_path: Path) -> None:
    seen: list[list[str]] = []
    watch = Watch(lambda method, request: seen.append(records(tmp_path)) if method.startswith("Create") else None)
    provisioner_of(cloud, tmp_path, watch).create(request_of())
    assert seen == [["train.json", "train.lock"]]


def test_records_are_the_users_own(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner_of(cloud, tmp_path / "state").create(request_of(metadata={"key": "value"}))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").rglob("*")}
    assert modes == {0o700, 0o600}


@pytest.mark.parametrize("remembers", [True, False])
def test_a_create_whose_answer_was_lost_is_not_made_twice(cloud: FakeCloud, tmp_path: Path, remembers: bool) -> None:
    cloud.inject(Fault("CreateQueuedResource", Moment.AFTER, times=2))
    if not remembers:
        cloud.forget_request_ids()
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    assert cloud.calls.count("CreateQueuedResource") == 3
    assert [entry.kind for entry in cloud.journal] == ["queued resource", "node"]


def test_a_taken_name_is_refused_and_its_holder_left_alone(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner_of(cloud, tmp_path / "john", owner="john").create(request_of())
    before = names(cloud)
    jane = provisioner_of(cloud, tmp_path / "jane")
    with pytest.raises(errors.SliceExistsError, match="train exists in us-central1-a: choose another name"):
        jane.create(request_of())
    assert names(cloud) == before
    assert records(tmp_path / "jane") == []


def test_a_name_that_is_being_asked_for_is_refused(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner_of(cloud, tmp_path).create(request_of())
    with pytest.raises(errors.SliceExistsError, match="by a process on this machine"):
        provisioner_of(cloud, tmp_path).create(request_of())


# Choices


def test_the_next_choice_is_asked_for_when_one_fails_and_that_one_is_deleted(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(Ending.STOCKOUT), zone=ZONE)
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of("train", HERE, THERE))
    group = provisioner.wait_ready("train")
    assert (group.zone, group.tier, group.name) == (OTHER_ZONE, Tier.SPOT, "train")
    assert names(cloud) == [
        f"{OTHER_ZONE}/queuedResources/train-alternative-1",
        f"{OTHER_ZONE}/nodes/train-alternative-1",
    ]


def test_a_failed_choice_is_deleted_first_for_it_holds_quota(tmp_path: Path) -> None:
    with FakeCloud(quotas={("v5e", ZONE): 16}) as cloud:
        cloud.offer(Supply(Ending.STOCKOUT), name="train")
        provisioner = provisioner_of(cloud, tmp_path)
        provisioner.create(request_of("train", HERE, SliceChoice("v5litepod-16", ZONE, Tier.SPOT)))
        assert provisioner.wait_ready("train").tier is Tier.SPOT


def test_of_choices_asked_for_at_once_the_first_granted_wins_and_the_others_are_gone(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    cloud.offer(Supply(queue_seconds=900), zone=ZONE)
    cloud.offer(Supply(queue_seconds=60, delete_seconds=100), zone=OTHER_ZONE)
    provisioner = provisioner_of(cloud, tmp_path, parallel_calls=4)
    provisioner.create(request_of("train", HERE, THERE, at_once=True))
    assert len(cloud.existing()) == 2
    assert provisioner.wait_ready("train").zone == OTHER_ZONE
    assert all(name.startswith(OTHER_ZONE) for name in names(cloud))


def test_a_choice_that_waits_leaves_the_next_its_share_of_the_time(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(Ending.NEVER), zone=ZONE)
    provisioner = provisioner_of(cloud, tmp_path)
    began = cloud.clock.now()
    provisioner.create(request_of("train", HERE, THERE, queue_timeout_seconds=2 * HOUR))
    assert provisioner.wait_ready("train").zone == OTHER_ZONE
    assert HOUR <= cloud.clock.now() - began <= HOUR + 300


def test_when_no_choice_can_be_had_each_says_why(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(Ending.STOCKOUT), zone=ZONE)
    cloud.offer(Supply(Ending.QUOTA), zone=OTHER_ZONE)
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of("train", HERE, THERE))
    with pytest.raises(errors.QuotaExceededError) as caught:
        provisioner.wait_ready("train")
    assert "none of the 2 choices" in str(caught.value)
    assert "no more capacity in the zone us-central1-a" in str(caught.value)
    assert "Limit: 8 in zone us-east5-b" in str(caught.value)
    assert names(cloud) == []


# Deadlines, interrupts, outages


@pytest.mark.parametrize(
    ("supply", "words", "at_most"),
    [
        (Supply(Ending.NEVER, outlives_its_deadline=True), "no capacity for v5litepod-16", HOUR),
        (Supply(Ending.NEVER), "there was no capacity in the time given", HOUR),
        (Supply(Ending.HANGS), "was granted, is not ready after 12", 2000),
    ],
)
def test_what_does_not_come_in_time_is_given_up(
    cloud: FakeCloud, tmp_path: Path, supply: Supply, words: str, at_most: float
) -> None:
    cloud.offer(supply)
    provisioner = provisioner_of(cloud, tmp_path)
    began = cloud.clock.now()
    provisioner.create(request_of())
    with pytest.raises(errors.ProvisioningTimeoutError, match=words):
        provisioner.wait_ready("train")
    assert cloud.clock.now() - began <= at_most + 100
    assert names(cloud) == records(tmp_path) == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 5, 12])
def test_an_interrupt_leaves_nothing(cloud: FakeCloud, tmp_path: Path, call: int, after: bool) -> None:
    trap = Trap(call, after=after, raises=KeyboardInterrupt)
    provisioner = provisioner_of(cloud, tmp_path, trap)
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        provisioner.create(request_of())
        provisioner.wait_ready("train")
    assert trap.has_sprung
    assert names(cloud) == records(tmp_path) == []


def test_trouble_in_the_callers_own_progress_leaves_nothing(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(ZeroDivisionError):
        provisioner.wait_ready("train", lambda progress: print(1 / 0))
    assert names(cloud) == []


def test_a_wait_outlives_an_outage(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    cloud.inject(Fault("GetQueuedResource", times=60))
    told: list[Progress] = []
    assert provisioner.wait_ready("train", told.append).state is SliceState.READY
    assert any("currently unavailable" in progress.message for progress in told)


def test_an_unreachable_api_is_given_up_in_minutes(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault("CreateQueuedResource", times=1000))
    began = cloud.clock.now()
    with pytest.raises(errors.ConnectionFailedError, match="currently unavailable"):
        provisioner_of(cloud, tmp_path).create(request_of())
    assert cloud.clock.now() - began <= 300
    assert records(tmp_path) == []
    cloud.inject(Fault(times=1000))
    with pytest.raises(errors.DeletionFailedError, match="may be left"):
        provisioner_of(cloud, tmp_path).create(request_of())
    assert cloud.clock.now() - began <= 600
    cloud.heal()
    assert [one.name for one in provisioner_of(cloud, tmp_path).reconcile().deleted] == ["train"]


def test_the_provider_is_not_asked_again_before_it_wants_to_be(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault.rate_limited("CreateQueuedResource", retry_after_seconds=50))
    began = cloud.clock.now()
    provisioner_of(cloud, tmp_path).create(request_of())
    assert cloud.clock.now() - began >= 50


def test_calls_are_spread_over_time(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path, calls_per_second=2)
    began = cloud.clock.now()
    for _ in range(20):
        provisioner.list()
    assert cloud.clock.now() - began >= 40 / 2 - 3


NO_TOKEN = "Getting metadata from plugin failed with error: HTTPSConnectionPool(host='oauth2.googleapis.com', port=443)"


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GetQueuedResource", message=NO_TOKEN, times=12),
        Fault.rate_limited("GetQueuedResource", times=12, retry_after_seconds=10),
    ],
    ids=["no token just now", "too many calls"],
)
def test_a_wait_outlives_what_passes(cloud: FakeCloud, tmp_path: Path, fault: Fault) -> None:
    """Longer than one call is tried again."""
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    cloud.inject(fault)
    told: list[Progress] = []
    assert provisioner.wait_ready("train", told.append).state is SliceState.READY
    assert told[0].state is SliceState.UNKNOWN
    assert fault.message.rstrip(".") in told[0].message


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (TransportError("oauth2.googleapis.com cannot be reached"), True),
        (RefreshError("busy", retryable=True), True),  # type: ignore[no-untyped-call]
        (RefreshError("invalid_grant: Bad Request"), False),  # type: ignore[no-untyped-call]
    ],
    ids=["unreachable", "busy", "no longer good"],
)
def test_credentials_that_give_no_token_just_now_are_tried_again(
    cloud: FakeCloud, tmp_path: Path, error: Exception, passes: bool
) -> None:
    failures = [error]

    def look(method: str, request: Any) -> None:
        if failures:
            raise failures.pop()

    provisioner = provisioner_of(cloud, tmp_path, Watch(look))
    if passes:
        assert provisioner.list() == []
    else:
        with pytest.raises(errors.AuthenticationError, match="gcloud auth application-default login"):
            provisioner.list()


def test_a_clock_that_is_set_back_delays_no_call(cloud: FakeCloud, tmp_path: Path) -> None:
    clock = VirtualClock()
    provisioner = TpuProvisioner(cloud.project, client=cloud.client(), clock=clock, owner="jane")
    provisioner.list()
    now = clock._now = clock.now() - HOUR
    provisioner.list()
    assert clock.now() - now < 60


def test_interrupts_reach_what_works_at_once_within_what_works_at_once() -> None:
    clock = VirtualClock()
    api = Api("p", lambda: None, clock)  # type: ignore[arg-type,return-value]
    waits, ended = threading.Barrier(2), threading.Event()

    def inner(number: int) -> None:
        if number == 0:
            waits.wait(60)
        try:
            while True:
                api.pause(1)
        except StoppedError:
            ended.set()
            raise

    def outer(number: int) -> None:
        if number:
            at_once(inner, [0, 1], 2)
        waits.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        at_once(outer, [0, 1], 2)
    assert ended.is_set()


@pytest.mark.parametrize("number", [98, 1])
def test_a_state_that_google_adds_is_waited_on(cloud: FakeCloud, tmp_path: Path, number: int) -> None:
    waiting = int(tpu_v2.QueuedResourceState.State.WAITING_FOR_RESOURCES)
    cloud.offer(Supply(states={waiting: number}))
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    told: list[Progress] = []
    assert provisioner.wait_ready("train", told.append).state is SliceState.READY
    if number == 98:
        assert any("state 98" in progress.message for progress in told if progress.state is SliceState.UNKNOWN)


def test_a_slice_that_is_taken_back_while_it_boots_is_said_to_be(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(preempted_during_boot=True))
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(errors.PreemptedError, match="taken back before it was ready"):
        provisioner.wait_ready("train")
    assert names(cloud) == []


@pytest.mark.parametrize("where", ["here", "elsewhere"])
def test_what_somebody_deletes_is_not_asked_for_again(cloud: FakeCloud, tmp_path: Path, where: str) -> None:
    cloud.offer(Supply(queue_seconds=600))
    waiting = provisioner_of(cloud, tmp_path / "here")
    waiting.create(request_of("train", HERE, THERE))

    def look(progress: Progress) -> None:
        if cloud.calls.count("DeleteQueuedResource") == 0:
            provisioner_of(cloud, tmp_path / where).delete("train")

    with pytest.raises(errors.SliceNotFoundError, match=r"was deleted by .* while it was waited for"):
        waiting.wait_ready("train", look)
    assert names(cloud) == records(tmp_path) == []


@pytest.mark.parametrize("call", range(1, 12))
def test_a_request_that_is_deleted_at_any_call_leaves_nothing(cloud: FakeCloud, tmp_path: Path, call: int) -> None:
    cloud.offer(Supply(Ending.STOCKOUT), zone=ZONE)
    left = [call]

    def look(method: str, request: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            with suppress(errors.SliceNotFoundError):
                provisioner_of(cloud, tmp_path).delete("train")

    with pytest.raises(errors.SliceNotFoundError), provisioner_of(cloud, tmp_path, Watch(look)) as waiting:  # noqa: PT012
        waiting.create(request_of("train", HERE, THERE))
        waiting.wait_ready("train")
    assert left[0] <= 0
    assert names(cloud) == records(tmp_path) == []


# Deletion


def test_deletion_outlives_a_refusal(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    refusal = "Request had invalid authentication credentials"
    cloud.inject(Fault("DeleteQueuedResource", code=16, message=refusal, times=2))
    provisioner.delete("train")
    assert names(cloud) == []


@pytest.mark.parametrize("how", ["damaged record", "no directory"])
def test_a_state_directory_that_cannot_be_used_keeps_nothing_alive(cloud: FakeCloud, tmp_path: Path, how: str) -> None:
    state = tmp_path / "state"
    with provisioner_of(cloud, state) as provisioner:
        provisioner.create(request_of())
        provisioner.wait_ready("train")
        if how == "damaged record":
            (state / cloud.project / "train.json").write_text("{")
        else:
            shutil.rmtree(state)
            state.write_text("a file")
    assert names(cloud) == []


def test_what_is_deleted_by_name_is_gone_though_its_record_is_damaged_and_that_is_said(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    (tmp_path / cloud.project / "train.json").write_text("{")
    with pytest.raises(errors.DeletionFailedError, match=r"train\.json.* is damaged"):
        provisioner.delete("train")
    assert names(cloud) == []


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_state_directory_that_is_gone_keeps_neither_requests_nor_slices_alive(
    cloud: FakeCloud, tmp_path: Path, interrupted: bool
) -> None:
    state = tmp_path / "state"
    kind: type[BaseException] = KeyboardInterrupt if interrupted else errors.PlatformError
    with pytest.raises(kind), provisioner_of(cloud, state) as provisioner:  # noqa: PT012
        provisioner.create(request_of("ready"))
        provisioner.wait_ready("ready")
        provisioner.create(request_of("asked"))
        shutil.rmtree(state)
        state.write_text("a file")
        if interrupted:
            raise KeyboardInterrupt
        provisioner.wait_ready("asked")
    assert names(cloud) == []


def test_what_is_deleted_by_name_is_gone_though_nothing_can_be_written(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking = provisioner_of(cloud, tmp_path)
    asking.create(request_of())

    def refuse(*_: Any) -> None:
        raise errors.PlatformError("the disk is full")

    for method in ("claim", "cancel", "save"):
        monkeypatch.setattr(IntentStore, method, refuse)
    with pytest.raises(errors.DeletionFailedError, match="the disk is full"):
        provisioner_of(cloud, tmp_path).delete("train")
    assert names(cloud) == []


def test_leases_are_collected_though_the_state_directory_cannot_be_used(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path / "state")
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    cloud.clock.sleep(HOUR * 24)
    (tmp_path / "file").write_text("")
    collecting = provisioner_of(cloud, tmp_path / "file")
    plan = collecting.plan_gc()
    assert "file" in plan.unreadable[0]
    collecting.gc(plan)
    assert names(cloud) == []


@pytest.mark.parametrize("then", ["nothing", "another's request"])
def test_what_becomes_ready_while_it_is_deleted_is_deleted(cloud: FakeCloud, tmp_path: Path, then: str) -> None:
    waiting, bob = provisioner_of(cloud, tmp_path), provisioner_of(cloud, tmp_path, owner="bob")
    waiting.create(request_of())
    listed: list[str] = []

    def look(method: str, request: Any) -> None:
        if method == "ListQueuedResources" and not listed:
            listed.append(method)
            waiting.wait_ready("train")
            if then != "nothing":
                bob.create(request_of("train", THERE))

    provisioner_of(cloud, tmp_path, Watch(look)).delete("train")
    assert listed
    left = [] if then == "nothing" else [f"{OTHER_ZONE}/queuedResources/train"]
    assert names(cloud) == left


def test_one_damaged_record_does_not_keep_others_alive(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    (tmp_path / cloud.project / "other.json").write_text("{")
    with pytest.raises(errors.DeletionFailedError, match=r"other\.json"):
        provisioner.delete("train", "other")
    assert names(cloud) == []


def test_an_interrupt_stays_one_where_a_record_cannot_be_removed(
    cloud: FakeCloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise errors.PlatformError("read-only")

    def interrupt(_: Progress) -> None:
        monkeypatch.setattr(IntentStore, "remove", refuse)
        raise KeyboardInterrupt

    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(KeyboardInterrupt) as caught:
        provisioner.wait_ready("train", interrupt)
    assert names(cloud) == []
    assert getattr(caught.value, "__notes__", []) == []


def test_what_was_never_used_is_closed_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
    with TpuProvisioner(state_directory=tmp_path, owner="jane"):
        pass


def test_leaving_the_block_deletes_what_was_created_in_it(cloud: FakeCloud, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), provisioner_of(cloud, tmp_path) as provisioner:  # noqa: PT012
        provisioner.create(request_of("one"))
        provisioner.wait_ready("one")
        provisioner.create(request_of("two"))
        raise KeyboardInterrupt
    assert names(cloud) == records(tmp_path) == []


def test_a_deletion_whose_operation_fails_is_begun_again(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.wait_ready("train")
    cloud.inject(Fault("DeleteQueuedResource", Moment.OPERATION, code=13, message="Internal error.", times=2))
    provisioner.delete("train")
    assert names(cloud) == []


def test_what_cannot_be_deleted_is_said_and_found_again(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    group = provisioner.wait_ready("train")
    cloud.inject(Fault("DeleteQueuedResource", times=100_000))
    with pytest.raises(
        errors.DeletionFailedError, match=r"may be left and billed: .*currently unavailable.*`reconcile`"
    ):
        provisioner.delete(group)
    cloud.heal()
    (doomed,) = provisioner.plan_gc().doomed
    assert (doomed.name, doomed.reason) == ("train", "given up: deleted")
    assert provisioner.gc(provisioner.plan_gc()).deleted == (doomed,)
    assert names(cloud) == records(tmp_path) == []


def test_an_error_that_leaves_something_behind_says_both(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.offer(Supply(Ending.STOCKOUT))
    cloud.inject(Fault("DeleteQueuedResource", times=100_000))
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(
        errors.DeletionFailedError, match=r"train may be left and billed.*it was given up because"
    ) as caught:
        provisioner.wait_ready("train")
    assert isinstance(caught.value.__cause__, errors.ProvisioningError)
    cloud.heal()
    assert [one.name for one in provisioner_of(cloud, tmp_path).reconcile().deleted] == ["train"]
    assert names(cloud) == []


def test_an_interrupt_that_leaves_something_behind_stays_an_interrupt(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault("DeleteQueuedResource", times=100_000))
    provisioner = provisioner_of(cloud, tmp_path, Trap(3, raises=KeyboardInterrupt))
    provisioner.create(request_of())
    with pytest.raises(KeyboardInterrupt) as caught:
        provisioner.wait_ready("train")
    assert "train may be left and billed" in caught.value.__notes__[0]
    assert records(tmp_path) == ["train.json"]


def test_of_two_groups_of_a_name_only_the_given_one_is_deleted(cloud: FakeCloud, tmp_path: Path) -> None:
    jane = provisioner_of(cloud, tmp_path)
    jane.create(request_of("train", THERE))
    ready = jane.wait_ready("train")
    jane.create(request_of("train", HERE))
    jane.delete(ready)
    assert names(cloud) == [f"{ZONE}/queuedResources/train"]
    assert jane.wait_ready("train").zone == ZONE


def test_deleting_what_is_not_there_is_an_error(cloud: FakeCloud, tmp_path: Path) -> None:
    with pytest.raises(errors.SliceNotFoundError, match="jane has no slices named 'train' in any zone"):
        provisioner_of(cloud, tmp_path).delete("train")


def test_anothers_slices_are_not_deleted_by_name(cloud: FakeCloud, tmp_path: Path) -> None:
    john = provisioner_of(cloud, tmp_path / "john", owner="john")
    john.create(request_of())
    group = john.wait_ready("train")
    jane = provisioner_of(cloud, tmp_path / "jane")
    assert jane.list() == []
    assert jane.list(all_owners=True) == [group]
    with pytest.raises(errors.SliceNotFoundError):
        jane.delete("train")
    with pytest.raises(errors.InvalidValueError, match="is john's, and not jane's"):
        jane.delete(group)


# Clients that die


def killed(cloud: FakeCloud, tmp_path: Path, call: int, *, after: bool = False) -> Path:
    """Leave what a client leaves that was killed at a call; return its state directory."""
    trap = Trap(call, after=after, state=tmp_path / "state", kept=tmp_path / "kept")
    provisioner = provisioner_of(cloud, tmp_path / "state", trap)
    with pytest.raises(Killed):  # noqa: PT012
        provisioner.create(request_of())
        provisioner.wait_ready("train")
    return tmp_path / "kept"


@pytest.mark.parametrize(("call", "after"), [(1, False), (1, True), (2, False), (9, False)])
def test_what_a_dead_client_asked_for_is_deleted_by_the_next(
    cloud: FakeCloud, tmp_path: Path, call: int, after: bool
) -> None:
    state = killed(cloud, tmp_path, call, after=after)
    report = provisioner_of(cloud, state).reconcile()
    assert [(one.name, one.reason) for one in report.deleted] == [("train", "asked for, and nobody waits for it")]
    assert names(cloud) == records(state) == []


def test_a_late_grant_of_a_dead_clients_request_is_deleted(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault("CreateQueuedResource", Moment.LATE, delay_seconds=50))
    state = killed(cloud, tmp_path, 2)
    assert names(cloud) == []
    provisioner_of(cloud, state).reconcile()
    assert len(cloud.journal) == 1
    cloud.clock.sleep(HOUR)
    assert names(cloud) == []


def test_a_request_that_a_living_client_waits_for_is_left_alone(cloud: FakeCloud, tmp_path: Path) -> None:
    waiting = provisioner_of(cloud, tmp_path)
    waiting.create(request_of())
    other = provisioner_of(cloud, tmp_path)
    assert other.plan_gc().doomed == ()
    assert other.reconcile().deleted == ()
    assert waiting.wait_ready("train").state is SliceState.READY


def test_another_process_may_take_up_the_wait(cloud: FakeCloud, tmp_path: Path) -> None:
    first = provisioner_of(cloud, tmp_path)
    first.create(request_of("train", HERE, THERE))
    first.close()
    cloud.offer(Supply(Ending.STOCKOUT), zone=ZONE)
    second = provisioner_of(cloud, tmp_path)
    assert second.wait_ready("train").state is SliceState.READY
    assert second.wait_ready("train").state is SliceState.READY  # nothing to wait for any more
    assert records(tmp_path) == []


def test_a_damaged_record_is_shown_and_kept(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.close()
    (path,) = tmp_path.rglob("*.json")
    path.write_text("{")
    plan = provisioner_of(cloud, tmp_path).plan_gc()
    assert plan.doomed == ()
    assert "is damaged or of a later version" in plan.unreadable[0]
    assert path.read_text() == "{"


def test_what_cannot_be_recorded_is_not_asked_for(cloud: FakeCloud, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(errors.PlatformError, match="Nothing is asked for without a record"):
        provisioner_of(cloud, tmp_path / "state").create(request_of())
    assert cloud.calls == []


# Leases


def ready(cloud: FakeCloud, tmp_path: Path, name: str = "train", owner: str = "jane", **options: Any) -> None:
    provisioner = provisioner_of(cloud, tmp_path / owner, owner=owner)
    provisioner.create(request_of(name, **options))
    provisioner.wait_ready(name)
    provisioner.close()


def test_only_ended_leases_of_the_caller_are_collected(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path, "short", time_to_live_seconds=600)
    ready(cloud, tmp_path, "long", time_to_live_seconds=20 * HOUR)
    ready(cloud, tmp_path, "johns", owner="john", time_to_live_seconds=600)
    cloud.clock.sleep(3 * HOUR)
    jane = provisioner_of(cloud, tmp_path / "another machine")
    plan = jane.plan_gc()
    assert [one.name for one in plan.doomed] == ["short"]
    assert plan.doomed[0].reason.startswith("its lease ended 2027-01-15")
    assert [one.name for one in jane.gc(plan).deleted] == ["short"]
    assert [group.name for group in jane.list(all_owners=True)] == ["johns", "long"]
    assert [(one.name, one.owner) for one in jane.plan_gc(all_owners=True).doomed] == [("johns", "john")]


def test_a_lease_that_is_renewed_meanwhile_is_spared(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path, time_to_live_seconds=600)
    cloud.clock.sleep(3 * HOUR)
    jane = provisioner_of(cloud, tmp_path)
    plan = jane.plan_gc()
    lease = jane.renew("train", HOUR)
    assert lease.until == datetime.fromtimestamp(int(cloud.clock.now()), UTC) + timedelta(hours=1)
    assert [one.name for one in jane.gc(plan).spared] == ["train"]
    assert jane.renew("train", 60) == lease  # never shorter
    assert jane.describe("train").lease == lease


def test_of_a_group_the_lease_that_ends_last_counts(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path, num_slices=3, time_to_live_seconds=600)
    cloud.clock.sleep(3 * HOUR)
    node = cloud.client().get_node(name=f"projects/fray-test/locations/{ZONE}/nodes/train-1")
    later = {**node.labels, LEASE_UNTIL: "20280101t000000z", "team": "research"}
    mask = {"paths": ["labels"]}
    cloud.client().update_node(node=tpu_v2.Node(name=node.name, labels=later), update_mask=mask)
    jane = provisioner_of(cloud, tmp_path)
    assert jane.plan_gc().doomed == ()
    jane.renew("train", 4000 * HOUR)
    assert {one.labels.get("team") for one in jane.list()} <= {None, "research"}
    assert cloud.client().get_node(name=node.name).labels["team"] == "research"


@pytest.mark.parametrize("label", ["", "tomorrow"])
def test_a_lease_that_cannot_be_read_is_not_taken_for_ended(cloud: FakeCloud, tmp_path: Path, label: str) -> None:
    ready(cloud, tmp_path, time_to_live_seconds=600)
    node = cloud.client().get_node(name=f"projects/fray-test/locations/{ZONE}/nodes/train")
    labels = {**node.labels, LEASE_UNTIL: label}
    cloud.client().update_node(node=tpu_v2.Node(name=node.name, labels=labels), update_mask={"paths": ["labels"]})
    cloud.clock.sleep(100 * HOUR)
    jane = provisioner_of(cloud, tmp_path)
    assert jane.plan_gc(all_owners=True).doomed == ()
    assert jane.describe("train").lease is not None


def test_a_queued_requests_lease_cannot_be_renewed(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(errors.UnsupportedError, match="a queued request has no labels of its own"):
        provisioner.renew("train", HOUR)


def unlabelled(cloud: FakeCloud, **labels: str) -> None:
    parent = f"projects/fray-test/locations/{ZONE}"
    node = tpu_v2.Node(accelerator_type="v5litepod-16", runtime_version="v2-alpha-tpuv5-lite", labels=labels)
    spec = tpu_v2.QueuedResource.Tpu.NodeSpec(parent=parent, node_id="theirs", node=node)
    made = tpu_v2.QueuedResource(tpu=tpu_v2.QueuedResource.Tpu(node_spec=[spec]))
    cloud.client().create_queued_resource(parent=parent, queued_resource_id="theirs", queued_resource=made)


def test_anothers_slices_are_neither_waited_for_nor_renewed(cloud: FakeCloud, tmp_path: Path) -> None:
    alice, bob = (provisioner_of(cloud, tmp_path / owner, owner=owner) for owner in ("alice", "bob"))
    alice.create(request_of())
    alice.wait_ready("train")
    before = alice.describe("train").lease
    for call in (bob.describe, bob.wait_ready, lambda name: bob.renew(name, HOUR * 24 * 300)):
        with pytest.raises(errors.SliceNotFoundError, match=r"bob has no slices named 'train'.*alice has"):
            call("train")
    assert bob.describe("train", all_owners=True).lease == before
    with pytest.raises(errors.InvalidValueError, match="a year"):
        alice.renew("train", 1e12)


def test_anothers_requests_on_this_machine_are_left_alone(cloud: FakeCloud, tmp_path: Path) -> None:
    """Two people may share a user, as on a machine of a service account's."""
    alice, bob = (provisioner_of(cloud, tmp_path, owner=owner) for owner in ("alice", "bob"))
    alice.create(request_of())
    alice.close()
    assert bob.plan_gc().doomed == ()
    assert bob.reconcile().deleted == ()
    with pytest.raises(errors.InvalidValueError, match="alice's, and not bob's"):
        bob.delete("train")
    assert names(cloud) == [f"{ZONE}/queuedResources/train"]
    (doomed,) = bob.plan_gc(all_owners=True).doomed
    assert doomed.owner == "alice"
    bob.gc(bob.plan_gc(all_owners=True))
    assert names(cloud) == records(tmp_path) == []


def test_anothers_request_is_not_taken_up_and_does_not_protect_own_slices(cloud: FakeCloud, tmp_path: Path) -> None:
    alice, bob = (provisioner_of(cloud, tmp_path, owner=owner) for owner in ("alice", "bob"))
    bob.create(request_of("train", THERE))
    bob.wait_ready("train")
    alice.create(request_of("train", HERE))
    bob.delete("train")
    assert names(cloud) == [f"{ZONE}/queuedResources/train"]
    alice.close()
    with pytest.raises(errors.SliceNotFoundError, match="alice has"):
        bob.wait_ready("train")
    with pytest.raises(errors.SliceExistsError, match="alice's: choose another name"):
        bob.create(request_of("train", THERE))
    assert names(cloud) == [f"{ZONE}/queuedResources/train"]


def test_a_request_that_was_deleted_before_anybody_waited_cannot_be_waited_for(
    cloud: FakeCloud, tmp_path: Path
) -> None:
    asking = provisioner_of(cloud, tmp_path)
    asking.create(request_of())
    provisioner_of(cloud, tmp_path).delete("train")
    asking.close()
    with pytest.raises(errors.SliceNotFoundError):
        provisioner_of(cloud, tmp_path).wait_ready("train")
    with pytest.raises(errors.SliceExistsError, match=r"gone: `reconcile`.* deletes"):
        provisioner_of(cloud, tmp_path).create(request_of())
    provisioner_of(cloud, tmp_path).reconcile()
    assert names(cloud) == records(tmp_path) == []


def test_requests_in_other_zones_are_left_alone(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.close()
    elsewhere = provisioner_of(cloud, tmp_path, zones=OTHER_ZONE)
    assert elsewhere.plan_gc().doomed == ()
    with pytest.raises(errors.SliceNotFoundError):
        elsewhere.delete("train")
    assert names(cloud) == [f"{ZONE}/queuedResources/train"]
    provisioner_of(cloud, tmp_path, zones=ZONE).reconcile()
    assert names(cloud) == []


def test_a_request_that_waits_for_somebody_is_not_asked_for_again(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    provisioner.close()
    with pytest.raises(errors.SliceExistsError, match=r"`wait_ready` takes it up; `reconcile`"):
        provisioner_of(cloud, tmp_path).create(request_of())


def test_what_fray_did_not_make_is_never_seen(cloud: FakeCloud, tmp_path: Path) -> None:
    unlabelled(cloud, **{LEASE_UNTIL: "20200101t000000z", "fray-owner": "jane"})
    cloud.clock.sleep(HOUR)
    jane = provisioner_of(cloud, tmp_path)
    assert jane.list(all_owners=True) == []
    assert jane.plan_gc(all_owners=True).doomed == ()


def test_slices_whose_request_is_gone_are_found_and_collected(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path, num_slices=2, time_to_live_seconds=600)
    # As when only the request was deleted, by somebody else, without force.
    (name,) = [entry.name for entry in cloud.existing() if entry.kind == "queued resource"]
    with cloud.world.lock:
        cloud.world._resources.pop(name).entry.gone = cloud.clock.now()
    jane = provisioner_of(cloud, tmp_path)
    (group,) = jane.list()
    assert (group.queued_resource, len(group.slices)) == ("", 2)
    cloud.clock.sleep(5 * HOUR)
    jane.gc(jane.plan_gc())
    assert cloud.billed() == []


# What there is


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_slice_that_was_taken_back_is_shown_so(cloud: FakeCloud, tmp_path: Path, vanishes: bool) -> None:
    ready(cloud, tmp_path, num_slices=2)
    cloud.preempt("train-1", vanishes=vanishes)
    jane = provisioner_of(cloud, tmp_path)
    group = jane.describe("train")
    assert group.state is SliceState.PREEMPTED
    assert group.state.is_lost
    with pytest.raises(errors.ProvisioningError, match="train is PREEMPTED"):
        jane.wait_ready("train")
    jane.delete("train")
    assert names(cloud) == []


def test_a_list_has_all_pages(tmp_path: Path) -> None:
    with FakeCloud(page_size=3) as cloud:
        jane = provisioner_of(cloud, tmp_path)
        for number in range(8):
            jane.create(request_of(f"train-{number}"))
        for number in range(8):
            jane.wait_ready(f"train-{number}")
        assert len(jane.list()) == 8
        assert all(len(group.slices) == 1 for group in jane.list())


def test_a_refused_list_is_no_empty_list(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault.denied("tpu.nodes.list", "ListNodes"))
    with pytest.raises(errors.AuthenticationError, match=r"lacks the permission tpu\.nodes\.list"):
        provisioner_of(cloud, tmp_path).list()


def test_one_zone_or_all(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path)
    assert len(provisioner_of(cloud, tmp_path, zones=[OTHER_ZONE, ZONE], parallel_calls=2).list()) == 1
    assert provisioner_of(cloud, tmp_path, zones=OTHER_ZONE).list() == []


def test_intents_are_told_apart(cloud: FakeCloud, tmp_path: Path) -> None:
    ready(cloud, tmp_path)
    jane = provisioner_of(cloud, tmp_path)
    first = jane.describe("train").labels[INTENT]
    jane.delete("train")
    ready(cloud, tmp_path)
    assert jane.describe("train").labels[INTENT] != first
