"""The Docker backend keeps the fifteen rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fray.backend.docker._engine import Engine
from fray.testing import ClusterConformance

from .docker_harness import DockerHarness
from .registry import Registry

pytestmark = pytest.mark.xdist_group("docker")


class TestDockerConformance(ClusterConformance):
    """All checks of the public suite, on one engine."""

    @pytest.fixture
    def harness(
        self, engine: Engine, base_image: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[DockerHarness]:
        monkeypatch.chdir(tmp_path)  # what a job is shipped where it says nothing else
        with DockerHarness(engine, base_image, registry) as harness:
            yield harness
