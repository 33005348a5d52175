"""Errands: what can only be done on a node of the cluster, done there by a short job of Fray's own.

Ray's HTTP API can neither drop a job that waits nor remove a file. An errand is a job like any other, runs beside the
user's, and is told from them by its metadata; the next client that lists jobs drops its record.
"""

from __future__ import annotations

import secrets
import shlex
import time
from contextlib import suppress

from fray.backend.ray._internals import GHOST_ENTRYPOINT, MONITOR_SECONDS, drop_pending_program
from fray.backend.ray._record import ERRAND_KEY, KnownJob
from fray.backend.ray._rest import RayRest
from fray.errors import FrayError, JobNotFoundError, PlatformError
from ray.job_submission import JobDetails

__all__ = ["drop_ghost", "drop_pending", "is_hidden", "remove_files", "seconds_until_deletable", "sweep"]

_WAIT_SECONDS = 60.0


def drop_pending(rest: RayRest, job: KnownJob) -> None:
    """Have a job that waits end as stopped, and what waits to run it leave the queue. Does not wait for that."""
    assert job.submission is not None
    program = drop_pending_program(job.info.id, job.submission.secrets)
    _send(rest, f"drop {job.info.id}", f"exec python3 -c {shlex.quote(program)}", None)


def remove_files(rest: RayRest, job: KnownJob) -> None:
    """Remove what a finished job left on its node, and wait until that is done.

    Raises:
        PlatformError: It could not be done.
    """
    assert job.submission is not None
    job_id = job.info.id
    names = [job.folder, f"job-driver-{job_id}.log", f"jobs/supervisor-{job_id}.log"]
    command = f'cd "$(dirname "$(readlink /proc/$$/fd/1)")" && rm -rf -- {shlex.join(names)}'
    errand = _send(rest, f"remove {job_id}", command, job.details.driver_node_id)
    deadline, pause = time.monotonic() + _WAIT_SECONDS, 0.05
    while True:
        details = rest.job(errand)
        if details.status.is_terminal():
            break
        if time.monotonic() > deadline:
            raise PlatformError(f"the files of job {job_id} are not removed yet: purge it again later")
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)
    if details.status != "SUCCEEDED":
        raise PlatformError(f"the files of job {job_id} cannot be removed from its node: {details.message}")


def is_hidden(details: JobDetails) -> bool:
    """Say whether a record is of no job of the user's: of an errand, or of one that has been purged."""
    return ERRAND_KEY in (details.metadata or {}) or details.entrypoint == GHOST_ENTRYPOINT


def sweep(rest: RayRest, jobs: list[JobDetails]) -> None:
    """Drop the records of errands that are done, and of jobs that have been purged."""
    for details in jobs:
        if is_hidden(details) and details.status.is_terminal() and not seconds_until_deletable(details):
            with suppress(FrayError):  # whoever lists jobs next does it
                rest.delete(str(details.submission_id))


def drop_ghost(rest: RayRest, job_id: str) -> bool:
    """Drop what Ray's monitor wrote of a job that has been purged; say whether there was that."""
    with suppress(JobNotFoundError):
        if rest.job(job_id).entrypoint == GHOST_ENTRYPOINT:
            rest.delete(job_id)
            return True
    return False


def seconds_until_deletable(details: JobDetails) -> float:
    """Return how long to wait before the record of a finished job is deleted.

    Ray's monitor of a job looks every second. One that finds no record of a job that it watches writes one, of a job
    that failed, with an entrypoint that was not found.
    """
    ended = (details.end_time or 0) / 1000
    return min(max(0.0, ended + MONITOR_SECONDS - time.time()), MONITOR_SECONDS)


def _send(rest: RayRest, what: str, command: str, node_id: str | None) -> str:
    errand = f"fray-errand-{secrets.token_hex(8)}"
    # Its own logs are nobody's concern either.
    tidy = f'cd "$(dirname "$(readlink /proc/$$/fd/1)")" && rm -f job-driver-{errand}.log jobs/supervisor-{errand}.log'
    where = {"entrypoint_label_selector": {"ray.io/node-id": node_id}} if node_id else {}
    rest.submit(
        entrypoint=f"( {command} ); code=$?; ( {tidy} ); exit $code",
        submission_id=errand,
        metadata={ERRAND_KEY: what},
        **where,
    )
    return errand
