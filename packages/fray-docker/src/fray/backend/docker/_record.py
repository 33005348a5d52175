"""What the engine knows of a job, read as Fray's: containers with labels, and what the runner wrote to their logs.

A job whose image is there is one container. A job that has to be prepared is two: a *holder*, which stands for the job
until its image is ready (and says what it waits for, and why it failed), and beside it the one that runs the command.
Both keep their names to the end, so that no reader finds the job missing or double.

A container counts once its runner has taken the job over: what a client left behind that was killed before is nobody's
job, is not shown, and is removed by whoever needs its name.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import TYPE_CHECKING, Any

from fray.backend.docker._engine import ContainerGoneError, Engine
from fray.backend.docker._logs import read_events
from fray.supervision import Outcome, read_journal
from fray.types import JobInfo, JobStatus, TerminationReason

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "JOB_LABEL",
    "ROLE_LABEL",
    "SUBMISSION_LABEL",
    "Container",
    "KnownJob",
    "Submission",
    "command_name",
    "job_containers",
    "job_name",
    "read_job",
]

JOB_LABEL = "fray.job"
ROLE_LABEL = "fray.role"
SUBMISSION_LABEL = "fray.submission"

LOST_WITH_ITS_CONTAINER = "the job's container was removed from the engine, and not by Fray"


@dataclass(frozen=True)
class Submission:
    """What Fray stores with a job when it is submitted, in a label. Holds no secret.

    Attributes:
        submitted_ns: When the client submitted it, by its clock.
        prepares: Whether the job has a holder, and the command a container of its own.
        hands_over: Whether the job counts only once its runner has what it is sent, the secrets.
    """

    submitted_ns: int
    entrypoint: str
    owner: str
    fingerprint: str
    metadata: dict[str, str] = field(default_factory=dict)
    prepares: bool = False
    hands_over: bool = False

    @property
    def submission_time(self) -> float:
        """In seconds since the epoch."""
        return self.submitted_ns / 1e9

    def labels(self, job_id: str) -> dict[str, str]:
        """Return the labels of the container that stands for the job."""
        role = "holder" if self.prepares else "job"
        return {JOB_LABEL: job_id, ROLE_LABEL: role, SUBMISSION_LABEL: json.dumps(asdict(self))}


@dataclass(frozen=True)
class Container:
    """A container as the engine tells of it, in a list or by itself."""

    id: str
    labels: dict[str, str]
    state: str
    created: str = ""
    finished: str = ""
    exit_code: int | None = None

    @classmethod
    def inspected(cls, found: dict[str, Any]) -> Container:
        """Read the answer to an inspection."""
        state = found["State"]
        labels = found["Config"].get("Labels") or {}
        return cls(found["Id"], labels, state["Status"], found["Created"], state["FinishedAt"], state["ExitCode"])

    @classmethod
    def listed(cls, found: dict[str, Any]) -> Container:
        """Read an entry of the list of containers."""
        return cls(found["Id"], found.get("Labels") or {}, found["State"])

    @property
    def is_over(self) -> bool:
        """Whether its processes are gone, and will not come back."""
        return self.state in ("exited", "dead", "removing")


@dataclass(frozen=True)
class KnownJob:
    """A job as it stands.

    Attributes:
        info: As Fray tells it.
        submission: What was stored.
        container: The id of the container that stands for it.
        command: The id of the container that runs its command; None before there is one, or where there never was.
        log: The id of the container whose log is the job's; None where it has none yet, or has an empty one.
        is_supervised: Whether the runner of that container, or of the holder, hears what it is asked.
    """

    info: JobInfo
    submission: Submission
    container: str
    command: str | None
    log: str | None
    is_supervised: bool


def job_name(job_id: str) -> str:
    """Return the name of the container that stands for a job."""
    return f"fray.{job_id}"


def command_name(job_id: str) -> str:
    """Return the name of the container that runs the command of a job that was prepared."""
    return f"fray.{job_id}.run"


def read_job(engine: Engine, container: Container, command: Container | None = None) -> KnownJob | None:
    """Return the job that a container stands for; None where nobody's: its submission was never finished.

    Args:
        engine: The engine.
        container: The one that stands for the job.
        command: The one that runs its command, if it is known; else it is looked for.
    """
    try:
        submission = _adapter().validate_json(container.labels[SUBMISSION_LABEL])
    except (KeyError, ValueError):
        return None
    job_id = container.labels[JOB_LABEL]
    events = _events(engine, container)
    if events is None or any(event.get("abandoned") for event in events):
        return None

    def known(outcome: Outcome, command: str | None, log: str | None, is_supervised: bool) -> KnownJob:
        info = _info(job_id, submission, outcome)
        return KnownJob(info, submission, container.id, command, log, is_supervised)

    if not submission.prepares:
        if submission.hands_over and not container.is_over and not any(_is_begun(event) for event in events):
            return None
        return known(_outcome(engine, container, events), container.id, container.id, bool(events))
    if not events and not container.is_over:
        return None
    if not any(event["event"] == "released" for event in events):
        outcome = _outcome(engine, container, events)
        failed = outcome.reason is TerminationReason.SETUP_FAILED
        return known(outcome, None, container.id if failed else None, True)
    if command is None:
        inspected = engine.inspect_container(command_name(job_id))
        command = Container.inspected(inspected) if inspected else None
    if command is None and engine.inspect_container(container.id) is None:
        return None  # purged between the looks
    if command is None:
        return known(_lost(submission.submission_time, LOST_WITH_ITS_CONTAINER), None, None, False)
    events = _events(engine, command) or []
    return known(_outcome(engine, command, events), command.id, command.id, bool(events))


def _is_begun(event: dict[str, Any]) -> bool:
    """Whether an event comes after the handover."""
    return str(event["event"]) != "supervised"


def job_containers(engine: Engine) -> list[tuple[Container, Container | None]]:
    """Return what stands for a job, with what runs its command where that is another; the newest job first."""
    with engine.errors():
        listed = engine.api.containers(all=True, filters={"label": JOB_LABEL})
    standing, running = [], {}
    for found in listed:
        container = Container.listed(found)
        job_id = container.labels[JOB_LABEL]
        # By their names too: what is made from an image of a job's container inherits its labels.
        if f"/{job_name(job_id)}" in found["Names"]:
            standing.append(container)
        elif f"/{command_name(job_id)}" in found["Names"]:
            running[job_id] = container
    standing.sort(key=_submitted_ns, reverse=True)
    return [(container, running.get(container.labels[JOB_LABEL])) for container in standing]


def _submitted_ns(container: Container) -> int:
    try:
        return int(json.loads(container.labels[SUBMISSION_LABEL])["submitted_ns"])
    except (ValueError, KeyError, TypeError):
        return 0


def _events(engine: Engine, container: Container) -> list[dict[str, Any]] | None:
    """What the runner wrote; None where it was never started."""
    if container.state == "created":
        return None
    try:
        return read_events(engine, container.id)
    except ContainerGoneError:
        return None


def _outcome(engine: Engine, container: Container, events: list[dict[str, Any]]) -> Outcome:
    outcome = read_journal(_journal(events))
    if outcome.status.is_terminal:
        return outcome
    if not container.is_over:
        if container.state == "paused":
            return replace(outcome, message="paused in the engine")
        if outcome.status is JobStatus.PENDING and not outcome.message:
            return replace(outcome, message="starting")
        return outcome
    if not container.finished:
        inspected = engine.inspect_container(container.id)
        if inspected is None:
            return _lost(outcome.start_time or 0.0, LOST_WITH_ITS_CONTAINER)
        container = Container.inspected(inspected)
        # The runner's last word may have come between the two looks.
        outcome = read_journal(_journal(read_events(engine, container.id)))
        if outcome.status.is_terminal:
            return outcome
    message = (
        f"the job's supervision was lost: its container ended (exit code {container.exit_code}) without the runner's "
        "report; it was killed, or the engine was"
    )
    lost = _lost(max(_epoch(container.finished), outcome.start_time or 0.0), message)
    return replace(lost, start_time=outcome.start_time, attempts=outcome.attempts)


def _lost(end_time: float, message: str) -> Outcome:
    return Outcome(JobStatus.FAILED, end_time=end_time, reason=TerminationReason.LOST, message=message)


def _journal(events: list[dict[str, Any]]) -> bytes:
    """Return events as a journal, the one that sums up others replaced by those."""
    lines = []
    for number, event in enumerate(events):
        if number == 0 and event.get("attempts") is not None:
            lines += _summed_up(event)
        if event["event"] != "mark":
            lines.append({name: value for name, value in event.items() if name != "attempts"})
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def _summed_up(event: dict[str, Any]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for number, started, ended, exit_code, reason, offset in event["attempts"]:
        lines.append({"event": "started", "time": started, "attempt": number, "offset": offset})
        if ended is not None:
            exited = {"event": "exited", "time": ended, "attempt": number, "exit_code": exit_code, "reason": reason}
            lines.append(exited)
    if event.get("stopping"):
        lines.append({"event": "stopping", "time": event["time"]})
    return lines


def _info(job_id: str, submission: Submission, outcome: Outcome) -> JobInfo:
    submitted = submission.submission_time
    if outcome.end_time is not None and outcome.end_time < submitted:
        outcome = replace(outcome, end_time=submitted)
    return outcome.job_info(
        job_id,
        submitted,
        entrypoint=submission.entrypoint,
        metadata=submission.metadata,
        owner=submission.owner,
    )


def _epoch(time: str) -> float:
    """Seconds since the epoch of the engine's RFC 3339, whose nanoseconds Python does not take."""
    text, _, fraction = time.removesuffix("Z").partition(".")
    try:
        return datetime.fromisoformat(f"{text}+00:00").timestamp() + float(f"0.{fraction or 0}")
    except ValueError:
        return 0.0


@cache
def _adapter() -> TypeAdapter[Submission]:
    from pydantic import TypeAdapter

    return TypeAdapter(Submission)
