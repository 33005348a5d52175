"""What Ray knows of a job, read as Fray's: Ray's record, what Fray put into its metadata, the runner's journal."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fray.backend.ray._entrypoint import JOURNAL_KEY, SUBMISSION_KEY
from fray.supervision import Outcome, read_journal
from fray.types import JobInfo, JobStatus, TerminationReason
from ray.job_submission import JobDetails, JobErrorType
from ray.job_submission import JobStatus as RayStatus

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["ERRAND_KEY", "KnownJob", "Submission", "read_job"]

ERRAND_KEY = "fray_errand"
"""A job with this key in its metadata is none of the user's."""


@dataclass(frozen=True)
class Submission:
    """What Fray stores with a job when it is submitted; the entrypoint program reads some of it. Holds no secret.

    Attributes:
        nonce: Tells this job from others that had its id.
        submitted_ns: When the client submitted it, by its clock; orders jobs that Ray accepted in one millisecond.
        runner: Options for the runner.
        resources: What the job asks for, by kind.
        exact: Variables with a `$`, which Ray would take for a reference to another.
        plain: Whether the head's store may be spoken to by the quick way.
        stop: The name in the head's store that says that the job is not to start.
        secrets: The name in the head's store under which its secrets are until it takes them.
    """

    nonce: str
    submitted_ns: int
    entrypoint: str
    owner: str
    fingerprint: str
    runner: list[str]
    plain: bool
    stop: str
    secrets: str | None = None
    resources: dict[str, float] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return it as it stands in the metadata."""
        return _adapter().dump_json(self).decode()


@dataclass(frozen=True)
class KnownJob:
    """A job as it stands.

    Attributes:
        details: Ray's record.
        submission: What Fray stored; None for a job that was submitted to Ray by other means.
        outcome: What its runner reported.
        info: All of it, as Fray tells it.
    """

    details: JobDetails
    submission: Submission | None
    outcome: Outcome
    info: JobInfo

    @property
    def is_over_for_ray(self) -> bool:
        """Whether Ray has written down an end too."""
        return bool(self.details.status.is_terminal())

    @property
    def folder(self) -> str:
        """Where its files are, below its node's log folder."""
        assert self.submission is not None
        return f"fray/{self.details.submission_id}.{self.submission.nonce}"


_STATUS = {
    RayStatus.PENDING: JobStatus.PENDING,
    RayStatus.RUNNING: JobStatus.RUNNING,
    RayStatus.STOPPED: JobStatus.STOPPED,
    RayStatus.SUCCEEDED: JobStatus.SUCCEEDED,
    RayStatus.FAILED: JobStatus.FAILED,
}
# What an error of Ray's says of a job of which its runner reported no end.
_REASONS: dict[str | None, TerminationReason] = {
    JobErrorType.RUNTIME_ENV_SETUP_FAILURE.value: TerminationReason.SETUP_FAILED,
    JobErrorType.JOB_SUPERVISOR_ACTOR_START_FAILURE.value: TerminationReason.SETUP_FAILED,
    JobErrorType.JOB_ENTRYPOINT_COMMAND_START_ERROR.value: TerminationReason.SETUP_FAILED,
    JobErrorType.JOB_SUPERVISOR_ACTOR_START_TIMEOUT.value: TerminationReason.INFEASIBLE,
    JobErrorType.JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE.value: TerminationReason.INFEASIBLE,
}


def read_job(details: JobDetails) -> KnownJob:
    """Return what Ray's record says of a job. Where what Fray stored in it has been damaged, it is told as Ray does."""
    metadata = dict(details.metadata or {})
    stored, journal = metadata.pop(SUBMISSION_KEY, None), metadata.pop(JOURNAL_KEY, "")
    if stored is None:
        return KnownJob(details, None, Outcome(), _foreign_info(details, metadata))
    try:
        submission, outcome = _adapter().validate_json(stored), read_journal(journal.encode())
    except ValueError as error:
        info = _foreign_info(details, metadata)
        return KnownJob(details, None, Outcome(), replace(info, message=f"its record has been damaged: {error}"))
    if not outcome.status.is_terminal and details.status.is_terminal():
        outcome = _settled(outcome, details)
    elif outcome.status is JobStatus.PENDING:
        message = "starting" if details.status is RayStatus.RUNNING else "waiting for Ray to start it"
        outcome = Outcome(message=outcome.message or message)
    info = outcome.job_info(
        str(details.submission_id),
        (details.start_time or 0) / 1000,
        entrypoint=submission.entrypoint,
        metadata=metadata,
        owner=submission.owner,
    )
    return KnownJob(details, submission, outcome, info)


def _settled(outcome: Outcome, details: JobDetails) -> Outcome:
    """The end of a job whose runner reported none, by what Ray says of it."""
    ended = (details.end_time or 0) / 1000
    if details.status is RayStatus.STOPPED:
        status, reason, message = JobStatus.STOPPED, TerminationReason.STOPPED_BY_USER, "stopped on request"
    else:
        status, message = JobStatus.FAILED, _first_lines(details.message)
        reason = _REASONS.get(details.error_type, TerminationReason.LOST)
        if reason is TerminationReason.LOST:
            message = f"the job's supervision was lost: {message}"
    return Outcome(
        status,
        outcome.start_time,
        max(ended, outcome.start_time or 0.0, (details.start_time or 0) / 1000),
        None,
        reason,
        message,
        outcome.attempts,
    )


def _foreign_info(details: JobDetails, metadata: dict[str, str]) -> JobInfo:
    """A job that was submitted by other means than Fray, as far as Ray tells."""
    status, code, reason = _STATUS[details.status], details.driver_exit_code, None
    if status is JobStatus.STOPPED:
        reason = TerminationReason.STOPPED_BY_USER
    elif status is JobStatus.FAILED:
        reason = _REASONS.get(details.error_type, TerminationReason.LOST)
        if details.error_type == JobErrorType.JOB_ENTRYPOINT_COMMAND_ERROR.value:
            reason = TerminationReason.KILLED if (code or 0) < 0 else TerminationReason.EXITED
    return JobInfo(
        str(details.submission_id),
        status,
        (details.start_time or 0) / 1000,
        None,
        (details.end_time or 0) / 1000 if status.is_terminal else None,
        exit_code=128 - code if code is not None and code < 0 else code,
        reason=reason,
        message=_first_lines(details.message),
        entrypoint=details.entrypoint,
        metadata=metadata,
    )


def _first_lines(message: str | None, most: int = 2000) -> str:
    text = (message or "").strip()
    return text if len(text) <= most else f"{text[:most]}…"


@cache
def _adapter() -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(Submission)
