"""Errands: what can only be done on a node of the cluster, done there by a short job of Fray's own.

Ray's HTTP API can neither drop a job that waits nor remove a file. An errand is a job like any other, runs beside the
user's, and is told from them by its metadata; the next client that lists jobs drops its record.
"""

from __future__ import annotations

import secrets
import shlex
import time
from contextlib import suppress

from fray.backend.ray._internals import JOB_NAMESPACE, SUPERVISOR_NAMESPACE, job_key, package_key, supervisor_name
from fray.backend.ray._record import ERRAND_KEY, KnownJob
from fray.backend.ray._rest import RayRest
from fray.errors import FrayError, JobNotFoundError, PlatformError
from ray.job_submission import JobDetails

__all__ = ["drop_ghost", "drop_pending", "is_hidden", "remove_files", "seconds_until_deletable", "sweep"]

_WAIT_SECONDS = 60.0
_MONITOR_SECONDS = 2.5
_GHOST_ENTRYPOINT = "Entrypoint not found."

# Runs on the head. The record says STOPPED before the actor dies, so that Ray's own monitor finds nothing to report; a
# supervisor that starts in between finds a job that is over, and the job's entrypoint that it is deleted.
_DROP_PENDING = """
import json, time, ray
ray.init(address="auto", namespace={namespace!r}, log_to_driver=False, configure_logging=False)
from ray._private.worker import global_worker
kv = global_worker.gcs_client
found = kv.internal_kv_get({key!r}, namespace={job_namespace!r})
record = json.loads(found) if found else {{}}
if record.get("status") == "PENDING":
    record.update(status="STOPPED", message="stopped on request", end_time=int(time.time() * 1000))
    kv.internal_kv_put({key!r}, json.dumps(record).encode(), True, namespace={job_namespace!r})
    for name in {names!r}:
        kv.internal_kv_del(name, False, namespace=None)
    try:
        ray.kill(ray.get_actor({supervisor!r}))
    except ValueError:
        pass
"""


def drop_pending(rest: RayRest, job: KnownJob) -> None:
    """Have a job that waits end as stopped, and what waits to run it leave the queue. Does not wait for that."""
    assert job.submission is not None
    names = [package_key(job.submission.secrets)] if job.submission.secrets else []
    program = _DROP_PENDING.format(
        namespace=SUPERVISOR_NAMESPACE,
        key=job_key(job.info.id),
        job_namespace=JOB_NAMESPACE,
        names=names,  # not the mark that stops it: it may be on its way already
        supervisor=supervisor_name(job.info.id),
    )
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
    return ERRAND_KEY in (details.metadata or {}) or details.entrypoint == _GHOST_ENTRYPOINT


def sweep(rest: RayRest, jobs: list[JobDetails]) -> None:
    """Drop the records of errands that are done, and of jobs that have been purged."""
    for details in jobs:
        if is_hidden(details) and details.status.is_terminal() and not seconds_until_deletable(details):
            with suppress(FrayError):  # whoever lists jobs next does it
                rest.delete(str(details.submission_id))


def drop_ghost(rest: RayRest, job_id: str) -> bool:
    """Drop what Ray's monitor wrote of a job that has been purged; say whether there was that."""
    with suppress(JobNotFoundError):
        if rest.job(job_id).entrypoint == _GHOST_ENTRYPOINT:
            rest.delete(job_id)
            return True
    return False


def seconds_until_deletable(details: JobDetails) -> float:
    """Return how long to wait before the record of a finished job is deleted.

    Ray's monitor of a job looks every second. One that finds no record of a job that it watches writes one, of a job
    that failed, with an entrypoint that was not found.
    """
    ended = (details.end_time or 0) / 1000
    return min(max(0.0, ended + _MONITOR_SECONDS - time.time()), _MONITOR_SECONDS)


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
