"""What `fray doctor` looks at for jobs on Ray. Imports no Ray, and asks no cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from fray.backend.ray._addresses import local_address
from fray.backend.ray._internals import TESTED, is_tested

__all__ = ["checks"]


def checks() -> Iterator[tuple[bool, str, str]]:
    """Yield whether each thing is well, what was found, and the remedy."""
    try:
        installed = version("ray")
    except PackageNotFoundError:
        yield False, "ray: Ray is not installed here", "pip install 'ray[default]'"
        return
    first, last = (".".join(map(str, each)) for each in TESTED)
    yield (
        is_tested(installed),
        f"ray: Ray {installed} is installed; Fray is tested on {first} to {last}",
        f"pip install 'ray[default]>={first},<={last}.99'",
    )
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        if address := os.environ.get(name):
            yield True, f"ray: without an address `-c ray` uses {name}={address}", ""
            return
    if address := local_address():
        yield True, f"ray: without an address `-c ray` uses the Ray on this machine ({address}), if it still runs", ""
    else:
        yield True, "ray: without an address `-c ray` starts a Ray on this machine", ""
