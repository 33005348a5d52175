"""What slices cost, and what is not known."""

from __future__ import annotations

from datetime import date

import pytest

from fray.backend.tpu import _prices
from fray.backend.tpu._prices import cost_per_hour, cost_so_far, dollars
from fray.backend.tpu.types import Tier
from fray.errors import InvalidValueError
from fray.tpu import tpu_types


@pytest.mark.parametrize(
    ("type_name", "zone", "slices", "expected"),
    [
        ("v5litepod-16", "us-central1-a", 1, 19.2),
        ("v5e-16", "us-west4-a", 2, 38.4),
        ("v5p-8", "us-east5-a", 1, 16.8),
        ("v6e-256", "us-east5-b", 1, 691.2),
        ("v4-32", "us-central2-b", 1, 51.52),
        ("v2-8", "us-central1-b", 1, 4.5),
        ("v2-32", "us-central1-a", 1, 24.0),
        ("v3-8", "us-central1-a", 1, 8.0),
        ("v3-32", "europe-west4-a", 1, 32.0),
        ("v5litepod-1", "us-central1", 1, 1.2),
    ],
)
def test_the_list_price_is_by_the_chip(type_name: str, zone: str, slices: int, expected: float) -> None:
    cost = cost_per_hour(type_name, zone, Tier.ON_DEMAND, slices)
    assert cost.dollars == pytest.approx(expected)
    assert _prices.AS_OF in cost.note


def test_the_price_of_a_chip_has_all_its_digits() -> None:
    assert "$1.32132 a chip and hour in europe-north1" in cost_per_hour("v5e-1", "europe-north1-a").note
    assert "$1.20 a chip" in cost_per_hour("v5e-1", "us-central1-a").note


@pytest.mark.parametrize(
    ("type_name", "zone", "tier", "why"),
    [
        ("v5litepod-16", "us-central1-a", Tier.SPOT, "spot prices change"),
        ("v5litepod-16", "us-central1-a", Tier.RESERVED, "contract"),
        ("v5litepod-16", "us-central1-a", None, "nothing says"),
        ("v5litepod-16", "mars-north1-a", Tier.ON_DEMAND, "mars-north1"),
        ("v3-32", "us-central1-a", Tier.ON_DEMAND, "v3 in us-central1"),
        ("tpu7x-8", "us-central1-a", Tier.ON_DEMAND, "v7x"),
    ],
)
def test_an_unknown_price_is_said_to_be(type_name: str, zone: str, tier: Tier | None, why: str) -> None:
    cost = cost_per_hour(type_name, zone, tier)
    assert cost.dollars is None
    assert str(cost) == "unknown"
    assert why in cost.note
    assert cost_so_far(cost, 3600).dollars is None


def test_a_spot_slice_says_what_it_would_be_on_demand() -> None:
    assert "$19.20" in cost_per_hour("v5litepod-16", "us-central1-a", Tier.SPOT).note


def test_what_was_spent_is_in_proportion() -> None:
    per_hour = cost_per_hour("v5litepod-16", "us-central1-a")
    assert cost_so_far(per_hour, 900).dollars == pytest.approx(4.8)
    assert cost_so_far(per_hour, -5).dollars == 0


def test_every_type_has_an_answer_and_no_generation_is_misspelt() -> None:
    for kind in tpu_types():
        assert cost_per_hour(kind.name, "us-central1-a").note
    assert {name.split()[0] for name in _prices._ON_DEMAND} <= {kind.generation for kind in tpu_types()}
    assert all(0.5 < price < 10 for row in _prices._ON_DEMAND.values() for price in row.values())


def test_the_table_has_a_date_and_a_source() -> None:
    assert date.fromisoformat(_prices.AS_OF) > date(2026, 1, 1)
    assert _prices.SOURCE.startswith("https://")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="v5litepod-16"):
        cost_per_hour("v5litepod-17", "us-central1-a")


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "$0.00"),
        (1.2, "$1.20"),
        (1.32132, "$1.32"),
        (25804.8, "$25,804.80"),
        (0.0042, "$0.0042"),
    ],
)
def test_amounts_are_readable(amount: float, text: str) -> None:
    assert dollars(amount) == text
