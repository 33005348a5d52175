"""What a job's packages cost: an environment that is there, and one that is made."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import fray
from benchmarks.jobs import connected, run_job
from benchmarks.measuring import Comparison, Series, Settings, Side, clock, compare, interleave
from benchmarks.peers import uv, uv_environment

__all__ = ["ROWS"]

_PACKAGE = "six"
_ENV = fray.RuntimeEnv(package_requirements=[_PACKAGE])


def measure_reused(settings: Settings) -> list[Comparison]:
    """Run jobs whose environment is there already, against jobs that need none."""
    what = f"job with {_PACKAGE}, environment there"
    root = settings.scratch / "reused"
    with connected(root, cache_dir=root / "environments") as cluster:
        if problem := _cannot_install(cluster):
            return [Comparison("environment-reused", what, "same job without", note=problem)]
        sides = [
            Side("fray", lambda: clock(lambda: run_job(cluster, _ENV))),
            Side("same job without", lambda: clock(lambda: run_job(cluster))),
        ]
        found = interleave("environment-reused", sides, settings.rounds(30), settings.seed, warmups=2)
    plain = found["same job without"]
    return [compare("environment-reused", what, found["fray"], "same job without", plain, kind="difference", bar=0.030)]


def measure_made(settings: Settings) -> list[Comparison]:
    """Run jobs whose environment is made first, against making one by hand, uv's own cache warm for both."""
    row = "environment-made"
    what = f"environment with {_PACKAGE} made: what it adds to a job"
    root = settings.scratch / "made"
    numbers = itertools.count()
    with connected(root, cache_dir=root / "environments") as plain:
        if problem := _cannot_install(plain):
            return [Comparison(row, what, "uv by hand", note=problem)]

        def job_with_new_environment() -> float:
            cache = root / f"environments-{next(numbers)}"
            with fray.connect(f"local:{root}", cache_dir=cache) as cluster:
                seconds = clock(lambda: run_job(cluster, _ENV))
            shutil.rmtree(cache)
            return seconds

        def by_hand() -> float:
            place = root / f"by-hand-{next(numbers)}"
            seconds = clock(lambda: _make_by_hand(place))
            shutil.rmtree(place)
            return seconds

        sides = [
            Side("fray", job_with_new_environment),
            Side("without", lambda: clock(lambda: run_job(plain))),
            Side("by hand", by_hand),
        ]
        found = interleave(row, sides, settings.rounds(15), settings.seed)
    added: Series = [
        None if whole is None or without is None else whole - without
        for whole, without in zip(found["fray"], found["without"], strict=True)
    ]
    by = "uv venv + uv pip install"
    return [
        compare(row, what, added, by, found["by hand"], kind="ratio", bar=1.2),
        compare(row, "the same, the whole job", found["fray"], by, found["by hand"], kind="ratio"),
    ]


def _cannot_install(cluster: fray.ClusterContext) -> str:
    """Prepare the environment; return why that cannot be done, if so."""
    job_id = cluster.create_job("true", _ENV)
    info = cluster.wait(job_id)
    if info.status is fray.JobStatus.SUCCEEDED:
        return ""
    return f"{_PACKAGE} cannot be installed here: {info.message}"


def _make_by_hand(place: Path) -> None:
    make = [uv(), "venv", "--quiet", "--no-project", "--python", sys.executable, str(place)]
    fill = [uv(), "pip", "install", "--quiet", "--python", str(place / "bin" / "python"), _PACKAGE]
    for command in (make, fill):
        subprocess.run(command, env=uv_environment(), check=True, stdin=subprocess.DEVNULL)


ROWS = {"environment-reused": measure_reused, "environment-made": measure_made}
