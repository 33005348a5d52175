"""`fray run`, `fray submit`, `fray plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fray.cli._errors import EXIT_DETACHED, error_as_plain, exit_code_of_error, exit_code_of_job
from fray.cli._follow import Follower
from fray.cli._options import Shared, connect, takes
from fray.cli._output import end_text, job_as_plain, print_fields, print_json, print_lines
from fray.cli._progress import Progress
from fray.cli._submission import Submission, submission
from fray.cluster import ClusterContext, JobPlan
from fray.errors import FrayError, InvalidValueError, PlatformError, UnsupportedError

__all__ = ["plan", "run", "submit"]


@takes(submission)
def run(
    shared: Shared,
    what: Submission,
    fetch: Annotated[
        Path | None,
        typer.Option("--fetch", metavar="DIR", help="Fetch the job's outputs there at its end, failed or not."),
    ] = None,
) -> int:
    """Run a job here and now.

    Submits it, follows its output and exits with its exit code. Ctrl-C asks the job to stop and shows how it ends; a
    second one returns at once and leaves it to stop by itself.
    """
    with connect(shared, python=what.python, submits=True) as cluster, Progress() as progress:
        if fetch is not None:
            _check_fetch(cluster, fetch)

        def create() -> str:
            job_id = cluster.create_job(**what.arguments())
            progress.say(f"submitted {job_id}")
            return job_id

        follower = Follower(cluster, create, progress, to_stderr=shared.as_json)
        try:
            info = follower.follow()
        except (PlatformError, OSError):
            if follower.job_id is not None:
                progress.say(f"{follower.job_id} goes on; follow it again: {_reattach(shared, follower.job_id)}")
            raise
        if info is None:
            return _detach(shared, cluster, follower, progress)
        progress.say(end_text(info))
        document, exit_code = job_as_plain(info), exit_code_of_job(info)
        if fetch is not None:
            try:
                fetched = cluster.fetch_outputs(info.id, fetch)
            except FrayError as error:
                # The job's own failure says more than this one.
                progress.say(f"error: the outputs could not be fetched: {error}")
                document["fetched"] = {"error": error_as_plain(error)}
                exit_code = exit_code or exit_code_of_error(error)
            else:
                progress.say(f"fetched {len(fetched)} file{'' if len(fetched) == 1 else 's'} to {fetch}")
                document["fetched"] = [str(path) for path in fetched]
        if shared.as_json:
            print_json(document)
        return exit_code


@takes(submission)
def submit(shared: Shared, what: Submission) -> None:
    """Submit a job and print its id."""
    with connect(shared, python=what.python, submits=True) as cluster:
        job_id = cluster.create_job(**what.arguments())
    if shared.as_json:
        print_json({"job_id": job_id})
    else:
        print_lines([job_id])


@takes(submission)
def plan(shared: Shared, what: Submission) -> None:
    """Show what would be asked of the cluster, and do nothing."""
    with connect(shared, python=what.python, submits=True) as cluster:
        planned = cluster.plan_job(**what.arguments())
    if shared.as_json:
        print_json(planned.as_dict())
    else:
        print_fields(_plan_fields(planned, what))


def _check_fetch(cluster: ClusterContext, destination: Path) -> None:
    """Refuse before the job what would be refused after it."""
    if not cluster.capabilities.outputs:
        raise UnsupportedError(f"the backend {cluster.name!r} has no outputs to fetch: leave --fetch out")
    if destination.exists() and not destination.is_dir():
        raise InvalidValueError(f"--fetch: {str(destination)!r} is there and is no directory: name another place")


def _reattach(shared: Shared, job_id: str) -> str:
    return shared.command_line("logs", "-f", job_id)


def _detach(shared: Shared, cluster: ClusterContext, follower: Follower, progress: Progress) -> int:
    job_id = follower.job_id
    if job_id is None:
        progress.say(
            "interrupted while the job was being submitted: whether it was accepted says "
            f"`{shared.command_line('list')}`"
        )
        return EXIT_DETACHED
    state = "has been asked to stop" if follower.is_asked_to_stop else "goes on"
    progress.say(f"left {job_id}, which {state}; follow it again: {_reattach(shared, job_id)}")
    if shared.as_json:
        print_json(job_as_plain(cluster.get_job(job_id)))
    return EXIT_DETACHED


def _plan_fields(planned: JobPlan, what: Submission) -> list[tuple[str, str]]:
    shown = planned.as_dict()
    fields = [("Backend", planned.backend), ("Command", planned.request.entrypoint)]
    if what.job_id is not None:
        fields.append(("Job id", planned.request.job_id))
    fields.append(("Directory", str(planned.request.directory)))
    for name, value in shown["env"].items():
        if isinstance(value, dict):
            text = "\n".join(f"{key}={each}" for key, each in value.items())
        else:
            text = "\n".join(value) if isinstance(value, list) else str(value)
        fields.append((name.replace("_", " ").capitalize(), text))
    if planned.request.metadata:
        fields.append(("Metadata", "\n".join(f"{key}={value}" for key, value in planned.request.metadata.items())))
    if planned.request.timeout_seconds is not None:
        fields.append(("Time limit", f"{planned.request.timeout_seconds:g} s"))
    if planned.request.max_retries:
        fields.append(("Retries", str(planned.request.max_retries)))
    if planned.image is not None:
        fields.append(("Image", planned.image))
    if planned.upload_bytes is not None:
        fields.append(("Upload", f"{planned.upload_bytes:,} bytes"))
    if planned.native:
        fields.append(("Request", json.dumps(planned.native, indent=2, default=str)))
    return fields
