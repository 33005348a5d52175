from __future__ import annotations

import pytest

from fray.errors import InvalidValueError
from fray.tpu import TpuType, tpu_type, tpu_types


@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [
        ("v2-8", 4, 1),
        ("v2-32", 16, 4),
        ("v3-8", 4, 1),
        ("v3-2048", 1024, 256),
        ("v4-8", 4, 1),
        ("v4-16", 8, 2),
        ("v4-32", 16, 4),
        ("v4-64", 32, 8),
        ("v4-384", 192, 48),
        ("v4-4096", 2048, 512),
        ("v5litepod-1", 1, 1),
        ("v5litepod-4", 4, 1),
        ("v5litepod-8", 8, 1),
        ("v5litepod-16", 16, 4),
        ("v5litepod-256", 256, 64),
        ("v5p-8", 4, 1),
        ("v5p-128", 64, 16),
        ("v5p-256", 128, 32),
        ("v5p-12288", 6144, 1536),
        ("v6e-1", 1, 1),
        ("v6e-4", 4, 1),
        ("v6e-8", 8, 1),
        ("v6e-16", 16, 4),
        ("v6e-256", 256, 64),
        ("tpu7x-8", 4, 1),
        ("tpu7x-16", 8, 2),
    ],
)
def test_chips_and_hosts_of_a_type(name: str, chips: int, hosts: int) -> None:
    found = tpu_type(name)
    assert (found.name, found.chips, found.hosts) == (name, chips, hosts)


def test_a_type_says_all_that_a_provisioner_asks() -> None:
    assert tpu_type("v5litepod-16") == TpuType(
        name="v5litepod-16",
        generation="v5e",
        chips=16,
        hosts=4,
        chips_per_host=4,
        runtime_version="v2-alpha-tpuv5-lite",
    )


@pytest.mark.parametrize(("spelling", "name"), [("v5e-16", "v5litepod-16"), ("v7x-16", "tpu7x-16")])
def test_a_generation_s_own_name_is_a_spelling_of_the_prefix(spelling: str, name: str) -> None:
    assert tpu_type(spelling) == tpu_type(name)


def test_only_what_the_cloud_tpu_api_makes_has_a_runtime_version() -> None:
    assert {found.generation for found in tpu_types() if found.runtime_version is None} == {"v7x"}


def test_the_chips_of_every_type_are_spread_over_its_hosts() -> None:
    for found in tpu_types():
        assert found.hosts * found.chips_per_host == found.chips
        assert found.hosts == 1 or found.chips_per_host == 4
        assert tpu_type(found.name) is found
    assert len({found.name for found in tpu_types()}) == len(tpu_types())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v4-33", "v4-32, v4-64"),
        ("v5litepod-12", "v5litepod-8, v5litepod-16"),
        ("v6e-2", "v6e-1, v6e-4"),
        ("v5p-99999", "v5p-12288"),
        ("v5-litepod-16", "v5litepod-16"),
        ("v4_32", "v4-32"),
        ("tpuv4-8", "v4-8"),
        ("v4-032", "v4-16, v4-64"),
        ("", "v5litepod-"),
        ("A100", "tpu7x-"),
    ],
)
def test_an_unknown_type_is_refused_with_near_misses(name: str, near: str) -> None:
    with pytest.raises(InvalidValueError, match="there is no TPU type") as raised:
        tpu_type(name)
    assert repr(name) in str(raised.value)
    assert near in str(raised.value)
