"""Conformance suites for whoever writes a backend: inherit one, fill in its fixture, and run pytest.

`ClusterConformance` holds a cluster to the rules of tier 1, `JobContextConformance` a job context to those of tier 2.
Needs the extra: `pip install 'fray-core[testing]'`.
"""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fray.testing.cluster import ClusterConformance, ClusterHarness
    from fray.testing.jobs import JobContextConformance

__all__ = ["ClusterConformance", "ClusterHarness", "JobContextConformance"]

# Before they are imported: a failed check then shows the values that it compared.
pytest.register_assert_rewrite("fray.testing.cluster", "fray.testing.jobs")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    modules = {
        "ClusterConformance": "fray.testing.cluster",
        "ClusterHarness": "fray.testing.cluster",
        "JobContextConformance": "fray.testing.jobs",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name]), name)
