"""The local backend keeps the fifteen rules."""

from __future__ import annotations

from fray.testing import ClusterConformance


class TestLocalConformance(ClusterConformance):
    """All checks of the public suite; the fixture `harness` is in conftest.py."""
