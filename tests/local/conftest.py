"""Fixtures of the local backend's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local.local_harness import LocalHarness


@pytest.fixture(scope="session")
def environment_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("environments")


@pytest.fixture
def harness(tmp_path_factory: pytest.TempPathFactory, environment_cache: Path) -> Iterator[LocalHarness]:
    with LocalHarness(tmp_path_factory.mktemp("store"), environment_cache) as harness:
        yield harness
