"""What Google refuses, as the user reads it: typed, in Google's words, with the command that mends it."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.cloud import tpu_v2

from fray import errors
from fray.backend.tpu import SliceChoice, SliceState, TpuProvisioner
from fray.backend.tpu._errors import is_transient, translate
from fray.backend.tpu._states import LEAST_FIRST, NODE_STATES, QUEUED_RESOURCE_STATES, group_state, node_state
from fray.backend.tpu.testing import Ending, FakeCloud, Fault, Supply
from tests.tpu.cloud_harness import provisioner_of, request_of

REFUSALS: list[tuple[Fault, type[errors.FrayError], list[str]]] = [
    (
        Fault.quota("TPUV5sLitepodPerProjectPerZone", 16, "us-central1-a"),
        errors.QuotaExceededError,
        ["Quota limit 'TPUV5sLitepodPerProjectPerZone' has been exceeded. Limit: 16", "`fray tpu list`"],
    ),
    (
        Fault.denied("tpu.queuedResources.create"),
        errors.AuthenticationError,
        ["lacks the permission tpu.queuedResources.create", "gcloud projects add-iam-policy-binding fray-test"],
    ),
    (Fault.unauthenticated(), errors.AuthenticationError, ["`gcloud auth application-default login`"]),
    (
        Fault(message="Getting metadata from plugin failed with error: ('invalid_grant: Bad Request',)"),
        errors.AuthenticationError,
        ["invalid_grant", "`gcloud auth application-default login`"],
    ),
    (
        Fault.api_disabled("fray-test"),
        errors.ProvisioningError,
        ["`gcloud services enable tpu.googleapis.com --project fray-test`"],
    ),
    (
        Fault.invalid("Accelerator type 'v5litepod-16' is not available in us-central1-a"),
        errors.InvalidAcceleratorError,
        ["gcloud compute tpus accelerator-types list --zone us-central1-a"],
    ),
    (
        Fault.invalid("Runtime version 'v2-alpha' was not found"),
        errors.InvalidAcceleratorError,
        ["gcloud compute tpus tpu-vm versions list --zone us-central1-a"],
    ),
    (Fault.invalid("Reservation 'ours' was not found"), errors.ReservationError, ["Reservation 'ours'"]),
    (Fault.invalid("The name is too long"), errors.InvalidValueError, ["The name is too long"]),
    (
        Fault("CreateQueuedResource", code=8, message="There is no more capacity in the zone us-central1-a"),
        errors.StockoutError,
        ["no more capacity in the zone us-central1-a", "Another zone or tier"],
    ),
    (Fault("CreateQueuedResource", code=12, message="Not here"), errors.ProvisioningError, ["Not here"]),
]


@pytest.mark.parametrize(("fault", "kind", "words"), REFUSALS, ids=lambda value: getattr(value, "message", "")[:30])
def test_a_refusal_is_typed_and_says_what_to_do(
    cloud: FakeCloud, tmp_path: Path, fault: Fault, kind: type[errors.FrayError], words: list[str]
) -> None:
    cloud.inject(fault)
    with pytest.raises(kind) as caught:
        provisioner_of(cloud, tmp_path).create(request_of())
    assert type(caught.value) is kind
    assert [word for word in ["Google says: ", *words] if word not in str(caught.value)] == []
    # None of these is tried twice, and nothing is left.
    assert cloud.calls == ["CreateQueuedResource"]
    assert list(tmp_path.rglob("*.json")) == []


def test_a_quota_is_told_apart(cloud: FakeCloud, tmp_path: Path) -> None:
    cloud.inject(Fault.quota("TPUV5sLitepodPerProjectPerZone", 16, "us-central1-a"))
    with pytest.raises(errors.QuotaExceededError) as caught:
        provisioner_of(cloud, tmp_path).create(request_of())
    error = caught.value
    assert (error.quota, error.limit, error.region) == ("TPUV5sLitepodPerProjectPerZone", 16, "us-central1-a")


@pytest.mark.parametrize(
    ("ending", "kind"),
    [
        (Ending.STOCKOUT, errors.StockoutError),
        (Ending.QUOTA, errors.QuotaExceededError),
        (Ending.RESERVATION, errors.ReservationError),
    ],
)
def test_what_fails_later_is_typed_too(
    cloud: FakeCloud, tmp_path: Path, ending: Ending, kind: type[errors.FrayError]
) -> None:
    cloud.offer(Supply(ending))
    provisioner = provisioner_of(cloud, tmp_path)
    provisioner.create(request_of())
    with pytest.raises(kind, match="Google says: "):
        provisioner.wait_ready("train")
    assert cloud.existing() == []


def test_a_wrong_zone_names_the_command_that_lists_zones(cloud: FakeCloud, tmp_path: Path) -> None:
    nowhere = request_of("train", SliceChoice("v5litepod-16", "us-nowhere1-a"))
    with pytest.raises(errors.InvalidValueError, match="gcloud compute tpus locations list --project fray-test"):
        provisioner_of(cloud, tmp_path).create(nowhere)
    with pytest.raises(errors.InvalidValueError, match="Is 'us-nowhere1-a' a zone with TPUs"):
        provisioner_of(cloud, tmp_path, zones="us-nowhere1-a").list()


def test_a_wrong_project_names_the_command_that_lists_projects(cloud: FakeCloud, tmp_path: Path) -> None:
    provisioner = TpuProvisioner("no-such", client=cloud.client(), clock=cloud.clock, state_directory=tmp_path)
    for call in (provisioner.list, lambda: provisioner.create(request_of())):
        with pytest.raises(errors.InvalidValueError, match=r"Is 'no-such' the right project.*`gcloud projects list`"):
            call()


def test_missing_credentials_name_the_command_that_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRAY_TPU_ENDPOINT", raising=False)
    monkeypatch.delenv("GOOGLE_CLOUD_PROJECT", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none"))
    with pytest.raises(errors.AuthenticationError, match="gcloud auth application-default login"):
        TpuProvisioner("ours", state_directory=tmp_path, owner="jane").list()
    with pytest.raises(errors.AuthenticationError, match="gcloud auth application-default login"):
        TpuProvisioner(state_directory=tmp_path, owner="jane").list()


@pytest.mark.parametrize(
    ("code", "words", "kind", "remedy"),
    [
        (
            5,
            "Reservation 'projects/p/locations/z1-a/reservations/r1' not found",
            errors.ReservationError,
            "reservations",
        ),
        (
            3,
            "Runtime version 'projects/p/locations/z1-a/x' was not found",
            errors.InvalidAcceleratorError,
            "versions list",
        ),
        (
            3,
            "subnetwork projects/p/regions/z1/subnetworks/s does not exist",
            errors.InvalidValueError,
            "does not exist",
        ),
        (7, "Permission denied on 'locations/z1-a' (or it may not exist).", errors.InvalidValueError, "locations list"),
        (
            7,
            "Permission 'tpu.nodes.get' denied on 'projects/p/locations/z1-a' (or it may not exist).",
            errors.AuthenticationError,
            "the permission tpu.nodes.get in project p. An administrator grants it",
        ),
        (3, "Project 'p' not found or deleted", errors.InvalidValueError, "projects list"),
        (3, "project not found: p", errors.InvalidValueError, "projects list"),
        (7, "Permission denied on resource project p.", errors.InvalidValueError, "projects list"),
        (5, "The resource 'projects/p' was not found", errors.InvalidValueError, "projects list"),
        (3, "Reservation r1 in project p not found", errors.ReservationError, "reservations"),
        (5, "Accelerator type v9-8 in projects/p/locations/z1-a not found", errors.InvalidAcceleratorError, "versions"),
        (5, "The resource 'projects/p/zones/z1-a/disks/data' was not found", errors.ProvisioningError, "disks/data"),
        (8, "Exceeded the separate limit of TPU chips", errors.QuotaExceededError, "quotas"),
        (14, "Unable to acquire impersonated credentials", errors.AuthenticationError, "login"),
        (7, "Permission 'iam.serviceAccounts.actAs' denied", errors.AuthenticationError, "permission iam.service"),
    ],
)
def test_what_a_message_is_about_is_not_what_it_names_on_the_way(
    code: int, words: str, kind: type[errors.FrayError], remedy: str
) -> None:
    from google.api_core import exceptions

    error = exceptions.from_grpc_status(code, words)
    translated = translate(error, what="create train", project="p", zone="z1-a")
    assert type(translated) is kind
    assert remedy in str(translated)
    assert ("Is 'p' the right project?" in str(translated)) == (remedy == "projects list")


def test_a_quota_that_no_choice_is_within_is_still_told(cloud: FakeCloud, tmp_path: Path) -> None:
    for zone in ("us-central1-a", "us-east5-b"):
        cloud.inject(Fault.quota("TPUS_PER_ZONE", 16, zone))
    choices = (SliceChoice("v5litepod-16", "us-central1-a"), SliceChoice("v5litepod-16", "us-east5-b"))
    with pytest.raises(errors.QuotaExceededError) as caught:
        provisioner_of(cloud, tmp_path).create(request_of("train", *choices))
    error = caught.value
    assert (error.quota, error.limit, error.region) == ("TPUS_PER_ZONE", 16, "us-east5-b")


def test_every_error_of_googles_is_mapped() -> None:
    from google.api_core import exceptions

    for code in range(1, 17):
        error = exceptions.from_grpc_status(code, "words")
        translated = translate(error, what="create train", project="p", zone="us-central1-a")
        assert isinstance(translated, errors.FrayError)
        assert str(translated).startswith("cannot create train: Google says: words")
        if isinstance(translated, errors.ConnectionFailedError):
            assert is_transient(error)


def test_every_state_of_googles_is_mapped() -> None:
    assert {state.name for state in tpu_v2.Node.State} == NODE_STATES.keys()
    assert {state.name for state in tpu_v2.QueuedResourceState.State} == QUEUED_RESOURCE_STATES.keys()
    assert set(LEAST_FIRST) == set(SliceState)
    assert node_state(99) is SliceState.UNKNOWN
    assert group_state([SliceState.READY, SliceState.REPAIRING]) is SliceState.REPAIRING
    assert group_state([]) is SliceState.UNKNOWN
