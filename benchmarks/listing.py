"""What a list costs when thousands of jobs have finished."""

from __future__ import annotations

import json
import math
import os

import fray
from benchmarks.jobs import connected
from benchmarks.measuring import Comparison, Series, Settings, Side, clock, interleave, state
from fray.backend.local._paths import StorePaths

__all__ = ["ROWS"]

_NEWEST = 50
_APART_NS = 1_000_000


def measure_list(settings: Settings) -> list[Comparison]:
    """List stores of three sizes: the newest jobs of the largest, and all jobs of each."""
    sizes = (100, 300, 1000) if settings.quick else (1000, 3000, 10_000)
    sides = []
    clusters: list[fray.ClusterContext] = []
    for size in sizes:
        root = settings.scratch / f"list-{size}"
        with connected(root) as cluster:
            _replicate(StorePaths(root), size)
            assert len(cluster.list_jobs()) == size
            clusters.append(cluster)
        sides.append(Side(str(size), lambda cluster=cluster: clock(cluster.list_jobs)))  # type: ignore[misc]
    newest = [Side("newest", lambda: clock(lambda: clusters[-1].list_jobs(limit=_NEWEST)))]
    short = interleave("list, newest", newest, settings.rounds(31), settings.seed)
    whole = interleave("list, all", sides, settings.rounds(5), settings.seed)
    return [
        state(
            "list",
            f"the newest {_NEWEST} of {sizes[-1]:,} finished jobs",
            short["newest"],
            bar=None if settings.quick else 0.030,
        ),
        *(state("list", f"all of {size:,} finished jobs", whole[str(size)]) for size in sizes),
        state(
            "list",
            f"exponent of the growth, {sizes[0]:,} to {sizes[-1]:,}",
            _exponents(sizes, [whole[str(size)] for size in sizes]),
            bar=None if settings.quick else 1.1,
            unit="exponent",
        ),
    ]


def _replicate(paths: StorePaths, size: int) -> None:
    """Fill a store that has one finished job up to `size`, with copies of that one that are ever older."""
    (original,) = paths.jobs.iterdir()
    finished = paths.job(original.name)
    record = json.loads(finished.record.read_bytes())
    journal = finished.journal.read_bytes()
    read = (finished.record, finished.journal)
    unread = [each for each in original.iterdir() if each.is_file() and each not in read]
    for number in range(1, size):
        submitted_ns = record["submitted_ns"] - number * _APART_NS
        copy = {**record, "job_id": f"copy-{number}", "submitted_ns": submitted_ns, "nonce": f"{number:016x}"}
        job = paths.job(copy["job_id"])
        job.directory.mkdir()
        job.outputs.mkdir()
        job.record.write_bytes(json.dumps(copy).encode())
        job.journal.write_bytes(journal)
        for each in unread:  # no list opens them: links are as good as copies, and made sooner
            is_permit = each == finished.permit(record["nonce"])
            os.link(each, job.permit(copy["nonce"]) if is_permit else job.directory / each.name)
        (paths.index / f"{submitted_ns:020d}.{copy['job_id']}").touch()


def _exponents(sizes: tuple[int, ...], times: list[Series]) -> Series:
    """Return, for each round, the slope of the line through its times on logarithmic axes: 1 is linear."""
    logs = [math.log(size) for size in sizes]
    middle = sum(logs) / len(logs)
    found: Series = []
    for values in zip(*times, strict=True):
        heights = [math.log(value) for value in values if value is not None]
        slope = sum((x - middle) * y for x, y in zip(logs, heights, strict=True)) / sum((x - middle) ** 2 for x in logs)
        found.append(slope)
    return found


ROWS = {"list": measure_list}
