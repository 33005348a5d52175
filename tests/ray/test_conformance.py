"""The Ray backend keeps the fifteen rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fray.testing import ClusterConformance
from tests.ray.ray_harness import Head, RayHarness

pytestmark = pytest.mark.xdist_group("ray")


class TestRayConformance(ClusterConformance):
    """All checks of the public suite, on one cluster."""

    @pytest.fixture
    def harness(self, ray_head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHarness]:
        monkeypatch.chdir(tmp_path)  # what a job is shipped where it says nothing else
        with RayHarness(ray_head) as harness:
            yield harness
