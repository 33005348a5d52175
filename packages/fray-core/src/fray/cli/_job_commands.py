"""The commands about jobs that exist: `list`, `describe`, `logs`, `wait`, `fetch`, `delete`, `purge`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer

from fray.cli._errors import error_as_plain, exit_code_of_error, exit_code_of_job
from fray.cli._follow import log_chunks
from fray.cli._options import Shared, connect, takes
from fray.cli._output import (
    duration_text,
    end_text,
    is_terminal,
    job_as_plain,
    print_fields,
    print_json,
    print_lines,
    print_table,
    say,
    time_text,
    write_out,
)
from fray.cli._progress import Progress, watch
from fray.cli._quantities import parse_duration
from fray.errors import FrayError, InvalidValueError, JobNotFoundError
from fray.types import JobInfo, JobStatus

__all__ = ["delete", "describe", "fetch", "list_jobs", "logs", "purge", "wait"]

JobId = Annotated[str, typer.Argument(metavar="ID", help="The job's id.", show_default=False)]


@takes()
def list_jobs(
    shared: Shared,
    status: Annotated[
        str | None, typer.Option("--status", "-s", metavar="STATUS", help=f"Only jobs that are {', '.join(JobStatus)}.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", "-n", metavar="N", min=1, help="At most so many.")] = 50,
) -> None:
    """List jobs, the newest first."""
    wanted = None if status is None else JobStatus(status.upper()) if status.upper() in list(JobStatus) else None
    if status is not None and wanted is None:
        raise InvalidValueError(f"--status is one of {', '.join(JobStatus)}, not {status!r}")
    with connect(shared) as cluster:
        jobs = cluster.list_jobs(status=wanted, limit=limit)
    if shared.as_json:
        print_json([job_as_plain(info) for info in jobs])
        return
    on_terminal = is_terminal(sys.stdout)
    if not jobs and on_terminal:
        say("there are no jobs here" if status is None else f"no job here is {wanted}")
        return
    print_table(
        ("ID", "STATUS", "EXIT", "SUBMITTED", "DURATION", "COMMAND"),
        [
            (
                info.id,
                str(info.status),
                "" if info.exit_code is None else str(info.exit_code),
                time_text(info.submission_time, relative=on_terminal),
                _duration(info),
                info.entrypoint,
            )
            for info in jobs
        ],
    )
    if on_terminal and len(jobs) == limit:
        say(f"the newest {limit}; --limit shows more")


@takes()
def describe(shared: Shared, job_id: JobId) -> None:
    """Show all that is known of a job."""
    with connect(shared) as cluster:
        info = cluster.get_job(job_id)
    if shared.as_json:
        print_json(job_as_plain(info))
        return
    print_fields(
        [
            ("Id", info.id),
            ("Status", str(info.status)),
            ("Reason", str(info.reason or "")),
            ("Exit code", "" if info.exit_code is None else str(info.exit_code)),
            ("Message", info.message),
            ("Command", info.entrypoint),
            ("Owner", info.owner),
            ("Submitted", time_text(info.submission_time)),
            ("Started", time_text(info.start_time)),
            ("Ended", time_text(info.end_time)),
            ("Duration", _duration(info)),
            ("Metadata", "\n".join(f"{key}={value}" for key, value in info.metadata.items())),
            *((f"Attempt {number}", text) for number, text in _attempts(info)),
        ]
    )


@takes()
def logs(
    shared: Shared,
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="Begin with the last N lines.")
    ] = None,
) -> None:
    """Print a job's output, byte for byte.

    Leaving with Ctrl-C does nothing to the job.
    """
    with connect(shared) as cluster:
        chunks = log_chunks(cluster, job_id, tail=tail, follow=follow)
        if shared.as_json:
            print_json({"job_id": job_id, "logs": b"".join(chunks).decode(errors="replace")})
            return
        for chunk in chunks:
            write_out(chunk)


@takes()
def wait(
    shared: Shared,
    job_id: JobId,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="How long to wait: 90, 90s, 15m, 2h.")
    ] = None,
) -> int:
    """Wait for a job's end, exit with its exit code.

    The exit code is 124 where the time is over first. Leaving with Ctrl-C does nothing to the job.
    """
    seconds = None if timeout is None else parse_duration("--timeout", timeout)
    with connect(shared) as cluster, Progress() as progress:
        cluster.get_job(job_id)
        over = watch(cluster, job_id, progress)
        try:
            info = cluster.wait(job_id, seconds)
        finally:
            over.set()
        progress.say(end_text(info))
    if shared.as_json:
        print_json(job_as_plain(info))
    return exit_code_of_job(info)


@takes()
def fetch(
    shared: Shared,
    job_id: JobId,
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="The directory to copy them to.")] = Path(),
) -> None:
    """Copy a job's outputs and print their paths.

    The outputs are what the job wrote to $FRAY_OUTPUT_DIR.
    """
    with connect(shared) as cluster:
        files = [str(path) for path in cluster.fetch_outputs(job_id, destination)]
    if shared.as_json:
        print_json({"job_id": job_id, "files": files})
    else:
        print_lines(files)


@takes()
def delete(
    shared: Shared,
    job_ids: Annotated[list[str], typer.Argument(metavar="ID", help="The jobs' ids.", show_default=False)],
) -> int:
    """Ask jobs to stop, and print their ids.

    It does not wait for their end. Their records stay, and a finished job is left alone.
    """
    with connect(shared) as cluster:
        return _for_each(shared, job_ids, cluster.delete_job)


@takes()
def purge(
    shared: Shared,
    job_ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="The jobs' ids.", show_default=False)
    ] = None,
    older_than: Annotated[
        str | None,
        typer.Option("--older-than", metavar="DURATION", help="All jobs that ended longer ago: 12h, 30d."),
    ] = None,
) -> int:
    """Remove every trace of finished jobs.

    The ids of those that were removed are printed.
    """
    if bool(job_ids) == (older_than is not None):
        raise InvalidValueError("say what to purge: ids of finished jobs, or --older-than DURATION (one of the two)")
    with connect(shared) as cluster:
        if older_than is None:
            return _for_each(shared, job_ids or [], cluster.purge_job)
        latest = time.time() - parse_duration("--older-than", older_than)
        ended = [info for info in cluster.list_jobs() if info.status.is_terminal]
        chosen = [info.id for info in ended if (info.end_time or info.submission_time) <= latest]
        return _for_each(shared, chosen, cluster.purge_job, may_be_gone=True)


def _for_each(shared: Shared, job_ids: Iterable[str], act: Callable[[str], None], *, may_be_gone: bool = False) -> int:
    """Act on each job, whatever happens with the others; the first error decides the exit code."""
    done: list[str] = []
    errors: list[dict[str, str]] = []
    exit_code = 0
    for job_id in job_ids:
        try:
            act(job_id)
        except FrayError as error:
            if may_be_gone and isinstance(error, JobNotFoundError):
                continue  # somebody else purged it after it was listed
            say(f"error: {error}")
            errors.append({"job_id": job_id, **error_as_plain(error)})
            exit_code = exit_code or exit_code_of_error(error)
            continue
        done.append(job_id)
        if not shared.as_json:
            print_lines([job_id])
    if shared.as_json:
        print_json({"job_ids": done, "errors": errors})
    return exit_code


def _duration(info: JobInfo) -> str:
    if info.start_time is None:
        return ""
    return duration_text((info.end_time or time.time()) - info.start_time)


def _attempts(info: JobInfo) -> Iterable[tuple[int, str]]:
    for attempt in info.attempts:
        said = [f"started {time_text(attempt.start_time)}"]
        if attempt.end_time is not None:
            said.append(f"ran {duration_text(attempt.end_time - attempt.start_time)}")
        if attempt.exit_code is not None:
            said.append(f"exit code {attempt.exit_code}")
        if attempt.reason is not None:
            said.append(str(attempt.reason))
        said.append(f"its output begins at byte {attempt.log_offset}")
        yield attempt.number, ", ".join(said)
