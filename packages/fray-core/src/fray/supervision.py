"""How backends speak with the runner: what it is asked, and what its journal says.

`runner_arguments` makes the runner's command line, `read_journal` turns its events into an `Outcome`, and `describe`
says an end in words, the same on every backend. The runner itself (`fray._runner`) is a program and never imported.

@plugin-dev: any process that writes such a journal can stand in for the runner, and add `pending` events (with a
`message`) while it prepares the job.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fray.types import Attempt, JobInfo, JobStatus, TerminationReason

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "Outcome",
    "RunnerEvent",
    "describe",
    "encode_handover",
    "lost",
    "parse_events",
    "read_journal",
    "runner_arguments",
    "runner_source",
]


@dataclass
class RunnerEvent:
    """One line of a runner's journal; which fields are set depends on the event."""

    event: str
    time: float
    pid: int | None = None
    guard: int | None = None
    attempt: int = 0
    offset: int = 0
    exit_code: int | None = None
    reason: TerminationReason | None = None
    retry_in: float | None = None
    log_size: int | None = None
    dropped_bytes: int = 0
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """Where a job stands by its journal.

    Attributes:
        status: PENDING until the command started, RUNNING until the last of its processes is gone.
        runner: The process id of whoever supervises the job, None before it said so.
        guard: The process id of the runner's guard, None where it has none.
        sessions: The sessions that the command's attempts ran in.
        last_exit: The attempt's end after which no other attempt follows, if the command has come that far.
        log_size: How much output there is in all, in bytes, once the job is over.
    """

    status: JobStatus = JobStatus.PENDING
    start_time: float | None = None
    end_time: float | None = None
    exit_code: int | None = None
    reason: TerminationReason | None = None
    message: str = ""
    attempts: tuple[Attempt, ...] = ()
    runner: int | None = None
    guard: int | None = None
    sessions: tuple[int, ...] = ()
    last_exit: RunnerEvent | None = None
    log_size: int | None = None

    def job_info(
        self,
        job_id: str,
        submission_time: float,
        *,
        entrypoint: str,
        metadata: dict[str, str],
        owner: str,
    ) -> JobInfo:
        """Join what the runner reported with what the backend stored at the submission."""
        return JobInfo(
            job_id,
            self.status,
            submission_time,
            self.start_time,
            self.end_time,
            exit_code=self.exit_code,
            reason=self.reason,
            message=self.message,
            entrypoint=entrypoint,
            metadata=metadata,
            owner=owner,
            attempts=self.attempts,
        )


def runner_source() -> Path:
    """Return the path of the runner's one file, to be run where it is or sent along."""
    return Path(__file__).with_name("_runner.py")


def runner_arguments(
    command: str,
    *,
    journal: str | None = None,
    output: str,
    copy: str | None = None,
    directory: str | None = None,
    permit: str | None = None,
    grace_seconds: float = 10.0,
    timeout_seconds: float | None = None,
    max_retries: int = 0,
    retry_delay_seconds: float | None = None,
    not_before: float | None = None,
    handover: bool | Literal["counted"] = False,
    handover_timeout_seconds: float | None = None,
    outputs: Sequence[str] = (),
    hold: Sequence[int] = (),
    leash: int | None = None,
    detach: bool = False,
) -> list[str]:
    """Return the runner's arguments, to stand behind `python -I -S _runner.py`; its docstring explains each.

    `outputs`, `handover="counted"` and an output without a journal are of fray-docker's runner alone.
    """
    values: dict[str, object] = {
        "--journal": journal,
        "--output": output,
        "--copy": copy,
        "--directory": directory,
        "--permit": permit,
        "--grace": grace_seconds,
        "--timeout": timeout_seconds,
        "--retries": max_retries or None,
        "--retry-delay": retry_delay_seconds,
        "--not-before": None if not_before is None else f"{not_before:.6f}",
        "--handover": "stdin" if handover is True else handover or None,
        "--handover-timeout": handover_timeout_seconds,
        "--outputs": ":".join(outputs) or None,
        "--leash": leash,
        "--detach": "yes" if detach else None,
    }
    arguments = [text for name, value in values.items() if value is not None for text in (name, str(value))]
    for fd in hold:
        arguments += ["--hold", str(fd)]
    return [*arguments, "--", command]


def encode_handover(secrets: dict[str, str]) -> bytes:
    """Return what is sent to a runner's standard input under `--handover stdin`."""
    pairs = b"".join(f"{name}={value}".encode() + b"\0" for name, value in secrets.items())
    return b"%d\n%s" % (len(pairs), pairs)


def lost(last: JobInfo, message: str) -> JobInfo:
    """Return the end of a job of which the engine knows nothing any more, by what was last known of it."""
    return replace(
        last,
        status=JobStatus.FAILED,
        end_time=max(time.time(), last.start_time or last.submission_time),
        exit_code=None,
        reason=TerminationReason.LOST,
        message=message,
    )


def parse_events(journal: bytes) -> list[RunnerEvent]:
    """Return the whole events of a journal; a torn last line and preallocated space are passed over.

    Raises:
        ValueError: A whole line is no event.
    """
    text = journal.split(b"\0", 1)[0]
    return [_event_adapter().validate_json(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read_journal(journal: bytes) -> Outcome:
    """Return where a job stands by its runner's journal.

    Raises:
        ValueError: The journal has been damaged.
    """
    status, message = JobStatus.PENDING, ""
    start_time: float | None = None
    attempts: list[Attempt] = []
    runner = guard = None
    sessions: list[int] = []
    last_exit: RunnerEvent | None = None
    for event in parse_events(journal):
        match event.event:
            case "supervised":
                runner, guard = event.pid, event.guard
            case "pending":
                message = event.message
            case "started":
                status, message = JobStatus.RUNNING, ""
                start_time = event.time if start_time is None else start_time
                attempts.append(Attempt(event.attempt, event.time, log_offset=event.offset))
                if event.pid is not None:
                    sessions.append(event.pid)
            case "stopping":
                message = "stopping"
            case "exited":
                begun = attempts.pop() if attempts else Attempt(event.attempt, event.time)
                attempts.append(
                    Attempt(begun.number, begun.start_time, event.time, event.exit_code, event.reason, begun.log_offset)
                )
                if event.retry_in is None:
                    last_exit = event
                    message = "stopping"
                else:
                    message = f"{describe(event)}; attempt {event.attempt + 1} starts after {event.retry_in:g} s"
            case "ended":
                if attempts and attempts[-1].end_time is None and event.exit_code is not None:
                    # The attempt's own end could not be written, on a full disk.
                    last = attempts.pop()
                    ended = (event.time, event.exit_code, event.reason, last.log_offset)
                    attempts.append(Attempt(last.number, last.start_time, *ended))
                return Outcome(
                    event.reason.status if event.reason else JobStatus.SUCCEEDED,
                    start_time,
                    event.time,
                    event.exit_code,
                    event.reason,
                    describe(event),
                    tuple(attempts),
                    runner,
                    guard,
                    tuple(sessions),
                    last_exit,
                    event.log_size,
                )
            case _:
                pass  # a newer runner says more than this reader knows
    return Outcome(
        status,
        start_time,
        message=message,
        attempts=tuple(attempts),
        runner=runner,
        guard=guard,
        sessions=tuple(sessions),
        last_exit=last_exit,
    )


def describe(end: RunnerEvent) -> str:
    """Say in words how an attempt or a job ended; nothing where there is nothing to say."""
    said = []
    if end.reason:
        said.append(_reason_in_words(end.reason, end.exit_code))
    if end.message:
        said.append(end.message)
    if end.dropped_bytes:
        said.append(f"the log lacks {end.dropped_bytes} bytes of output that could not be written (disk full?)")
    return ": ".join(said[:2]) + "".join(f"; {more}" for more in said[2:])


def _reason_in_words(reason: TerminationReason, exit_code: int | None) -> str:
    match reason:
        case TerminationReason.EXITED:
            note = ""
            if exit_code == 127:
                note = " (the shell's word for: no such command)"
            elif exit_code == 126:
                note = " (the shell's word for: not an executable)"
            elif exit_code is not None and exit_code > 128 and (name := _signal_name(exit_code - 128)):
                note = f" (the shell's word for: killed by {name})"
            return f"the command exited with {exit_code}{note}"
        case TerminationReason.KILLED:
            return f"the command was killed by {_signal_name((exit_code or 128) - 128) or 'a signal'}"
        case TerminationReason.OUT_OF_MEMORY:
            return "the kernel killed the command for lack of memory"
        case TerminationReason.SETUP_FAILED:
            return "the job could not be set up"
        case TerminationReason.INFEASIBLE:
            return "the job asks for more than there is"
        case TerminationReason.TIMED_OUT:
            return "the job did not finish within its time limit"
        case TerminationReason.PREEMPTED:
            return "the machine was taken away"
        case TerminationReason.LOST:
            return "the job's supervision was lost"
        case TerminationReason.STOPPED_BY_USER:
            return "stopped on request"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return ""


@cache
def _event_adapter() -> TypeAdapter[RunnerEvent]:
    from pydantic import TypeAdapter

    return TypeAdapter(RunnerEvent)
