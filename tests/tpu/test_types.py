"""What a request refuses before anything is asked for, and what labels say."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fray import errors
from fray.backend.tpu import DataDisk, SliceChoice, SliceRequest, Tier, label_value
from fray.backend.tpu._labels import _SAFE, lease_value, parse_lease
from fray.backend.tpu._owner import default_owner
from fray.plugins import load_provisioner

CHOICE = SliceChoice("v5litepod-16", "us-central1-a")


def test_a_type_is_spelled_as_the_api_does() -> None:
    choice = SliceChoice("v5e-16", "us-central1-a", Tier.SPOT)
    assert (choice.accelerator_type, choice.runtime_version) == ("v5litepod-16", "v2-alpha-tpuv5-lite")
    assert (str(choice), choice.hosts) == ("v5litepod-16 (spot) in us-central1-a", 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("v5litepod-17", "us-central1-a"), "nearest sizes of v5e: v5litepod-16, v5litepod-32"),
        (("v5litepod-16", "US"), "zone: 'US' is no zone"),
        (("v5litepod-16", "us-central1-a", "cheap"), "tier: 'cheap' is none of spot, on-demand, reserved"),
        (("v5litepod-16", "us-central1-a", "spot", "ours"), "a reservation is for tier 'reserved', not 'spot'"),
        (("tpu7x-8", "us-central1-a"), "tpu7x-8 does not come through the Cloud TPU API"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(errors.InvalidValueError, match=words):
        SliceChoice(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Train"}, "name: 'Train' is no name"),
        ({"name": "a" * 41}, "40 at most"),
        ({"name": "train-"}, "no hyphen at the end"),
        ({"choices": ()}, "name at least one"),
        ({"choices": (CHOICE, CHOICE)}, "the same choice is in there twice"),
        ({"num_slices": 0}, "num_slices: 0 is not between"),
        ({"queue_timeout_seconds": 0}, "queue_timeout_seconds: 0 is not between"),
        ({"boot_timeout_seconds": float("nan")}, "boot_timeout_seconds: nan"),
        ({"labels": {"Team": "x"}}, "labels: Team='x' is no label"),
        ({"labels": {"fray-owner": "x"}}, "fray-owner is one of Fray's own"),
        ({"metadata": {"startup-script": "x"}}, "has a field of its own: startup_script"),
        ({"data_disks": DataDisk("data", read_only=False)}, "can be attached to one host only"),
    ],
)
def test_a_request_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.InvalidValueError, match=words):
        SliceRequest(**{"name": "train", "choices": CHOICE, **change})


@pytest.mark.parametrize(
    "change", [{"name": 1}, {"choices": "v5e"}, {"num_slices": True}, {"labels": {"a": 1}}, {"tags": "ssh"}]
)
def test_a_field_of_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidTypeError):
        SliceRequest(**{"name": "train", "choices": CHOICE, **change})


def test_a_frozen_request_does_not_change_with_what_it_was_made_of() -> None:
    labels = {"team": "research"}
    request = SliceRequest("train", [CHOICE], labels=labels)  # type: ignore[arg-type]
    labels["team"] = "sales"
    assert (request.labels, request.choices) == ({"team": "research"}, (CHOICE,))


@given(st.text(), st.text())
def test_another_text_is_another_label(one: str, other: str) -> None:
    assert label_value(one) == "" or _SAFE.fullmatch(label_value(one))
    assert (label_value(one) == label_value(other)) == (one == other)


@given(
    st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2100, 1, 1)).map(
        lambda when: when.replace(tzinfo=UTC)
    )
)
def test_a_lease_is_read_as_it_was_written(when: datetime) -> None:
    assert parse_lease(lease_value(when)) == when.replace(microsecond=0)


def test_the_owner_is_the_same_wherever_gclouds_account_is(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FRAY_TPU_OWNER", "CLOUDSDK_CORE_ACCOUNT", "CLOUDSDK_ACTIVE_CONFIG_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    assert "@" in default_owner()
    (tmp_path / "configurations").mkdir()
    (tmp_path / "configurations" / "config_work").write_text("[core]\naccount = jane@example.com\n")
    (tmp_path / "active_config").write_text("work")
    assert default_owner() == "jane@example.com"
    monkeypatch.setenv("FRAY_TPU_OWNER", "the team")
    assert default_owner() == "the team"


def test_the_provisioner_is_found_by_its_name() -> None:
    assert load_provisioner("gcp-tpu").__name__ == "TpuProvisioner"
