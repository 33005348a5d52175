"""How a staged job gets its supervisor: the command's environment, the process to start, and the handover.

A job that can start at once is put under the runner; one that needs an environment or resources under a preparer,
which becomes the runner. Either is started before the job is accepted and holds the job's lock from then on, so that
no moment exists in which an accepted job has nobody.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fray.backend.local._admission import Ticket, draw_ticket
from fray.backend.local._environments import EnvironmentPlan
from fray.backend.local._paths import StorePaths
from fray.backend.local._prepare import Setup
from fray.backend.local._store import Staged
from fray.detached import program, start_detached
from fray.errors import SubmissionError
from fray.request import JobRequest
from fray.shipping import write_light_part
from fray.state import write_all, write_durably
from fray.supervision import encode_handover, runner_arguments, runner_source

__all__ = ["Launch", "supervised"]

_JOB_VARIABLES = ("FRAY_JOB_ID", "FRAY_OUTPUT_DIR", "FRAY_ATTEMPT", "FRAY_JOB_CONTEXT", "FRAY_CLUSTER")


@dataclass(frozen=True)
class Launch:
    """What a job is started with.

    Attributes:
        request: What was asked for.
        paths: The store's.
        python: The interpreter that is `python` in the job.
        environment: The environment that it needs, made or not.
        spec: How the job reaches its own cluster.
        grace_seconds: Between SIGTERM and SIGKILL.
    """

    request: JobRequest
    paths: StorePaths
    python: str
    environment: EnvironmentPlan | None
    spec: str
    grace_seconds: float

    def variables(self) -> dict[str, str]:
        """The caller's environment under the job's own.

        Secrets come later, by the handover: the supervisor is not to have them in its environment, even where the
        caller had.
        """
        left_out = {*_JOB_VARIABLES, *self.request.env.secrets}
        variables = {name: value for name, value in os.environ.items() if name not in left_out}
        variables.setdefault("PYTHONUNBUFFERED", "1")  # a log that can be followed; the job's own env may undo it
        variables.update(self.request.env.env)
        first = [f"{self.environment.directory}/bin" if self.environment else _shims(self.paths.shims, self.python)]
        scripts = Path(self.python).absolute().parent
        if (scripts.parent / "pyvenv.cfg").exists():
            first.append(str(scripts))
        variables["PATH"] = os.pathsep.join([*first, variables.get("PATH") or os.defpath])
        # First, since the job is to see the client's version of Fray, whatever its own environment holds.
        light = str(write_light_part(self.paths.light))
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [light, variables.get("PYTHONPATH")]))
        variables["FRAY_JOB_ID"] = self.request.job_id
        variables["FRAY_OUTPUT_DIR"] = str(self.paths.job(self.request.job_id).outputs)
        variables["FRAY_JOB_CONTEXT"] = "local"
        variables["FRAY_CLUSTER"] = self.spec
        return variables

    def runner(self, staged: Staged, hold: list[int]) -> list[str]:
        """The runner's command line; its files are handed on open, since their paths change with the acceptance."""
        return [
            sys.executable,
            "-I",
            "-S",
            _compiled_runner(self.paths.runners),
            *runner_arguments(
                self.request.entrypoint,
                journal=f"fd:{staged.journal_fd}",
                output=f"fd:{staged.log_fd}",
                directory=str(self.request.directory),
                permit=self._permit(staged),
                grace_seconds=self.grace_seconds,
                timeout_seconds=self.request.timeout_seconds,
                max_retries=self.request.max_retries,
                not_before=staged.record.submission_time,
                handover=True,
                hold=hold,
                detach=True,
            ),
        ]

    def preparer(self, staged: Staged, runner: list[str], ticket: Ticket | None) -> list[str]:
        """The preparer's command line, what it is to prepare stored beside the job."""
        resources = {each.name: each.quantity for each in self.request.env.minimum_resources}
        unmade = self.environment if self.environment and not self.environment.is_ready else None
        setup = Setup(
            runner=runner,
            permit=self._permit(staged),
            lock_fd=staged.lock_fd,
            journal_fd=staged.journal_fd,
            log_fd=staged.log_fd,
            setup_log=str(self.paths.job(self.request.job_id).setup_log),
            not_before=staged.record.submission_time,
            environment=unmade,
            resources=resources,
            ticket=str(ticket.path) if ticket else None,
            ticket_fd=ticket.lock_fd if ticket else None,
        )
        setup.write(staged.paths.setup)
        staged.setup_fd = os.open(staged.paths.setup, os.O_RDONLY)
        return program("fray.backend.local._prepare", staged.setup_fd)

    def _permit(self, staged: Staged) -> str:
        return str(self.paths.job(self.request.job_id).permit(staged.record.nonce))


@contextmanager
def supervised(launch: Launch, staged: Staged) -> Iterator[None]:
    """Have a supervisor stand by while the job is accepted in the block; at its end the supervisor goes ahead.

    It does nothing for a job that was not accepted: without the job's permit in its place it leaves.
    """
    environment, resources = launch.environment, launch.request.env.minimum_resources
    with _queued(launch, staged) as ticket:
        hold = [staged.lock_fd, *([ticket.lock_fd] if ticket else [])]
        command = launch.runner(staged, hold)
        if resources or (environment and not environment.is_ready):
            command = launch.preparer(staged, command, ticket)
        keep = [*hold, staged.journal_fd, staged.log_fd, *([staged.setup_fd] if staged.setup_fd >= 0 else [])]
        handover = start_detached(command, environment=launch.variables(), keep_fds=keep, stderr=staged.trouble_fd)
        try:
            write_all(handover, encode_handover(launch.request.env.secrets))
            yield
        except BrokenPipeError:
            said = staged.paths.trouble.read_text(errors="replace").strip()
            raise SubmissionError(f"the runner of job {launch.request.job_id} did not start: {said}") from None
        finally:
            os.close(handover)


@contextmanager
def _queued(launch: Launch, staged: Staged) -> Iterator[Ticket | None]:
    """Queue the job up for its resources; a job that is not accepted leaves the queue."""
    request = launch.request
    if not request.env.minimum_resources:
        yield None
        return
    resources = request.env.minimum_resources
    ticket = draw_ticket(launch.paths.admission, staged.record.submitted_ns, request.job_id, resources)
    try:
        yield ticket
    except BaseException:
        ticket.path.unlink(missing_ok=True)
        raise
    finally:
        os.close(ticket.lock_fd)


def _compiled_runner(directory: Path) -> str:
    """Return the runner compiled for this Python: compiling it anew for each job would double its start."""
    source = runner_source()
    stat = source.stat()
    target = directory / f"{sys.implementation.cache_tag}-{stat.st_mtime_ns}-{stat.st_size}.pyc"
    if not target.exists():
        import py_compile

        staging = directory / f".{secrets.token_hex(8)}"
        try:
            py_compile.compile(str(source), str(staging), doraise=True)
            write_durably(staging, staging.read_bytes())
            os.rename(staging, target)
        except OSError:
            staging.unlink(missing_ok=True)
            return str(source)
    return str(target)


def _shims(directory: Path, python: str) -> str:
    """Return a directory whose `python` and `python3` are `python`.

    Scripts, not links: through a link a virtual environment's Python would not find its environment.
    """
    script = f'#!/bin/sh\nexec {shlex.quote(os.path.abspath(python))} "$@"\n'
    place = directory / hashlib.sha256(script.encode(errors="surrogateescape")).hexdigest()[:16]
    if place.is_dir():
        return str(place)
    staging = directory / f".{secrets.token_hex(8)}"
    staging.mkdir(mode=0o700)
    for name in ("python", "python3"):
        write_durably(staging / name, script.encode(errors="surrogateescape"), 0o700)
    try:
        os.rename(staging, place)
    except OSError:
        shutil.rmtree(staging)
        if not place.is_dir():
            raise
    return str(place)
