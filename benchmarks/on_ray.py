"""What Fray adds to a job, a followed log and a task on Ray, on a Ray that is started on this machine for it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.measuring import Comparison, Settings, Side, clock, compare, interleave, state

if TYPE_CHECKING:
    from fray.backend.ray._local_ray import LocalRay

__all__ = ["ROWS"]

_CLOCK_JOB = "import time\nfor _ in range(40):\n print(time.time(), flush=True)\n time.sleep(0.0537)"
_POLL_SECONDS = 0.05
_TASKS = 5000


def measure_jobs(settings: Settings) -> list[Comparison]:
    """Submit `true`, through Fray and through Ray's own client, and wait until it is known to be over."""
    from ray.job_submission import JobSubmissionClient

    import fray

    with _directory(settings), _local_ray() as ray, fray.connect(f"ray:{ray.dashboard}") as cluster:
        client = JobSubmissionClient(ray.dashboard)

        def through_fray() -> None:
            assert cluster.wait(cluster.create_job("true")).exit_code == 0

        def through_ray() -> None:
            job_id = client.submit_job(entrypoint="true")
            while not client.get_job_status(job_id).is_terminal():
                time.sleep(_POLL_SECONDS)

        sides = [Side("fray", lambda: clock(through_fray)), Side("ray", lambda: clock(through_ray))]
        found = interleave("ray-submit", sides, settings.rounds(15), settings.seed)
    what = "submit → known terminal of `true`"
    return [
        compare("ray-submit", what, found["fray"], "client, polled at 50 ms", found["ray"], kind="difference", bar=0.06)
    ]


def measure_follow(settings: Settings) -> list[Comparison]:
    """Follow a job that prints the time, and look at the clock when a line arrives, and when the log ends."""
    import shlex

    import fray

    ends: list[float] = []
    with _directory(settings), _local_ray() as ray, fray.connect(f"ray:{ray.dashboard}") as cluster:

        def lag() -> float:
            job_id = cluster.create_job(shlex.join(["python3", "-c", _CLOCK_JOB]))
            lags = [time.time() - float(line) for line in cluster.stream_logs(job_id)]
            over = time.time()
            end_time = cluster.wait(job_id, check=True).end_time
            assert end_time is not None
            ends.append(over - end_time)
            return median(lags[1:])  # the first has waited for the job to be seen running

        found = interleave("ray-follow", [Side("lag", lag)], settings.rounds(7), settings.seed)
    return [
        state("ray-follow", "lag of a followed log line on Ray", found["lag"], bar=0.1),
        state("ray-follow", "job's end → end of the followed log", list(ends[1:])),
    ]


def measure_tasks(settings: Settings) -> list[Comparison]:
    """Run trivial tasks, through a job context and through raw `.remote()`."""
    import ray as raw

    from fray.backend.ray.ray_job import RayJobContext

    count = 500 if settings.quick else _TASKS
    with _local_ray() as ray, _variable("RAY_ADDRESS", ray.address):
        context = RayJobContext()

        def trivial() -> None:
            pass

        remote = raw.remote(trivial)
        sides = [
            Side("fray", lambda: clock(lambda: context.get([context.create_task(trivial) for _ in range(count)]))),
            Side("raw", lambda: clock(lambda: raw.get([remote.remote() for _ in range(count)]))),
        ]
        found = interleave("ray-tasks", sides, settings.rounds(11), settings.seed, warmups=2)
        raw.shutdown()
        RayJobContext._own = None
    # At least 0.95 times the speed is at most 1 / 0.95 times the time.
    what = f"{count:,} trivial tasks"
    return [
        compare("ray-tasks", what, found["fray"], "raw .remote()", found["raw"], kind="ratio", bar=round(1 / 0.95, 3))
    ]


ROWS = {"ray-submit": measure_jobs, "ray-follow": measure_follow, "ray-tasks": measure_tasks}


@contextmanager
def _local_ray() -> Iterator[LocalRay]:
    from fray.backend.ray._local_ray import LocalRay

    ray = LocalRay.shared()
    try:
        yield ray
    finally:
        ray.release()


@contextmanager
def _directory(settings: Settings) -> Iterator[None]:
    """Be in an empty directory: what is there is shipped with each job."""
    before, empty = os.getcwd(), settings.scratch / "empty"
    empty.mkdir(exist_ok=True)
    os.chdir(empty)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
