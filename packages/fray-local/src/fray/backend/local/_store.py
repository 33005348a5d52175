"""The store: how a job is accepted, what is known of it, and how one whose supervisor died is settled.

A job is prepared in `staging` and accepted by one rename into `jobs`. From before that moment on a supervisor holds
the job's lock, which the kernel frees when the last holder is gone, however it died: liveness is a question to the
kernel, not to a process id that may have been given to somebody else. The supervisor writes a journal; a client
writes there only when it holds the lock itself, to record the end of a job whose supervisor died.
"""

from __future__ import annotations

import errno
import fcntl
import heapq
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fray.backend.local._leftovers import kill_leftovers
from fray.backend.local._paths import JobPaths, StorePaths, boot_id
from fray.errors import (
    InvalidValueError,
    JobExistsError,
    JobNotFinishedError,
    JobNotFoundError,
    PlatformError,
    SubmissionError,
)
from fray.state import held, is_locked, taken, write_all
from fray.supervision import Outcome, read_journal
from fray.types import JobInfo, JobStatus, TerminationReason

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = ["JobRecord", "Staged", "Store", "Supervision", "disk_errors_mapped"]

# Room for the events of a job, taken at its acceptance: its end can be recorded on a disk that has become full.
_JOURNAL_BYTES = 4096
_JOURNAL_BYTES_PER_RETRY = 400
_STALE_SECONDS = 600.0


@dataclass(frozen=True)
class JobRecord:
    """What was submitted, as it is kept on disk. No secret's value is in it."""

    job_id: str
    entrypoint: str
    submitted_ns: int
    owner: str
    fingerprint: str
    nonce: str
    boot: str
    directory: str
    env: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None
    max_retries: int = 0

    @property
    def submission_time(self) -> float:
        """Seconds since the epoch, as the journal writes them."""
        return round(self.submitted_ns / 1e9, 6)


@dataclass(frozen=True)
class Supervision:
    """A job's public record, and who looks after it: process ids to wait for, None where nobody has said."""

    info: JobInfo
    runner: int | None
    guard: int | None


@dataclass
class Staged:
    """A job that is not accepted yet: its open files, handed on to its supervisor."""

    record: JobRecord
    directory: Path
    lock_fd: int = -1
    journal_fd: int = -1
    log_fd: int = -1
    trouble_fd: int = -1
    setup_fd: int = -1

    @property
    def paths(self) -> JobPaths:
        """Where its files are until it is accepted."""
        return JobPaths(self.directory)

    def close(self) -> None:
        """Close this process's hold on the files."""
        for name in ("lock_fd", "journal_fd", "log_fd", "trouble_fd", "setup_fd"):
            if (fd := getattr(self, name)) >= 0:
                os.close(fd)
                setattr(self, name, -1)


class Store:
    """The jobs of one machine and user, below one directory."""

    def __init__(self, root: Path) -> None:
        if os.pathsep in str(root):
            raise InvalidValueError(f"the state directory {str(root)!r} has a {os.pathsep!r} in it, which splits PATH")
        self.paths = StorePaths(root)
        # A directory that cannot be written to can still be read from: who submits will hear of it.
        with suppress(OSError):
            self.paths.make()
        if not self.paths.jobs.is_dir():
            raise PlatformError(f"the state directory {str(root)!r} cannot be made: choose another, local:/PATH")
        self._sweep()

    # Acceptance

    @contextmanager
    def stage(self, record: JobRecord) -> Iterator[Staged]:
        """Make a job's directory, locked and not accepted yet; what was not accepted is removed at the end.

        Raises:
            JobExistsError: The id is taken.
            SubmissionError: The disk is full, or cannot be written to.
        """
        if self.paths.job(record.job_id).directory.exists():
            raise self._exists(record.job_id)
        staged = Staged(record, self.paths.staging / record.nonce)
        try:
            with disk_errors_mapped(f"job {record.job_id} cannot be accepted in {self.paths.root}"):
                if not self.paths.staging.is_dir():
                    self.paths.make()  # somebody cleared the store under a living client
                self._write(staged)
                yield staged
        finally:
            staged.close()
            if staged.directory.exists():
                shutil.rmtree(staged.directory, ignore_errors=True)

    def accept(self, staged: Staged) -> None:
        """Accept a job durably: it is there for good, or it never was.

        Raises:
            JobExistsError: Another client was first with this id.
        """
        # The record is written only now: the supervisor, started before, takes longer to be there than the disk does.
        record, paths = staged.record, staged.paths
        paths.outputs.mkdir(mode=0o700)
        descriptor = os.open(paths.record, os.O_CREAT | os.O_WRONLY, 0o600)
        try:
            write_all(descriptor, json.dumps(asdict(record)).encode())
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        index = self.paths.index / _index_name(record)
        os.close(os.open(index, os.O_CREAT | os.O_WRONLY, 0o600))
        try:
            os.rename(staged.directory, self.paths.job(record.job_id).directory)
        except OSError as error:
            index.unlink(missing_ok=True)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise self._exists(record.job_id) from None
            raise
        _sync_directory(self.paths.jobs)

    # Reading

    def record(self, job_id: str) -> JobRecord:
        """Return what was submitted.

        Raises:
            JobNotFoundError: There is no job of this id.
            ValueError: Its record has been damaged.
        """
        path = self.paths.job(job_id).record
        try:
            stat = path.stat()
            record = _read_record(path, stat.st_ino, stat.st_mtime_ns)
        except (FileNotFoundError, NotADirectoryError):
            if self.paths.job(job_id).directory.is_dir():
                raise ValueError("its record is missing") from None
            raise JobNotFoundError(f"there is no job {job_id!r} in {self.paths.root}") from None
        if record.job_id != job_id:
            raise ValueError(f"its record is that of {record.job_id!r}")
        return record

    def read(self, job_id: str) -> Supervision:
        """Return what is known of a job, settled first if its supervisor died.

        Raises:
            JobNotFoundError: There is no job of this id.
        """
        paths = self.paths.job(job_id)
        try:
            record = self.record(job_id)
        except ValueError as error:
            return _damaged(paths, error)
        try:
            outcome = read_journal(paths.journal.read_bytes())
            if not outcome.status.is_terminal and not is_locked(paths.lock):
                outcome = self._settle(paths, record)
        except FileNotFoundError as error:
            if not paths.directory.is_dir():
                raise JobNotFoundError(f"job {job_id!r} has just been purged") from None
            return _damaged(paths, error, record)
        except ValueError as error:
            return _damaged(paths, error, record)
        info = outcome.job_info(
            job_id,
            record.submission_time,
            entrypoint=record.entrypoint,
            metadata=record.metadata,
            owner=record.owner,
        )
        return Supervision(info, outcome.runner, outcome.guard)

    def list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        """Return the jobs, the newest first, reading no more of them than are asked for."""
        found: list[JobInfo] = []
        try:
            names = os.listdir(self.paths.index)
        except FileNotFoundError:
            return []  # somebody cleared the store under a living client
        for name in _newest_first(names, limit):
            if limit is not None and len(found) >= limit:
                break
            stamp, _, job_id = name.partition(".")
            try:
                info = self.read(job_id).info
            except JobNotFoundError:
                self._forget(name, stamp)
                continue
            # An entry may be left of a submission that was killed, under an id that has been used again since.
            if abs(info.submission_time * 1e9 - int(stamp)) > 1000 and info.entrypoint:
                continue
            if status is None or info.status is status:
                found.append(info)
        return found

    # Ending

    def ask_to_stop(self, job_id: str) -> None:
        """Take the job's permit away; its supervisor looks for it when it starts and whenever it is signalled."""
        record = self.record(job_id)
        with disk_errors_mapped(f"job {job_id} cannot be asked to stop"):
            self.paths.job(job_id).permit(record.nonce).unlink(missing_ok=True)

    def remove(self, job_id: str) -> None:
        """Remove a finished job from sight by one rename, then from the disk.

        Raises:
            JobNotFoundError: Another client was first.
            JobNotFinishedError: Another client was first, and has used the id again.
        """
        directory = self.paths.job(job_id).directory
        trash = self.paths.trash / secrets.token_hex(8)
        with disk_errors_mapped(f"job {job_id} cannot be purged"):
            with held(self.paths.root / "purge.lock"):
                if not self.read(job_id).info.status.is_terminal:
                    raise JobNotFinishedError(f"job {job_id!r} has been purged, and is now another that is not over")
                os.rename(directory, trash)
                os.utime(trash)  # a sweep takes what is old for what somebody left behind
            for name in os.listdir(self.paths.index):
                if name.partition(".")[2] == job_id:
                    (self.paths.index / name).unlink(missing_ok=True)
            shutil.rmtree(trash, ignore_errors=True)  # what is left of it, a later sweep takes

    # Behind it

    def _write(self, staged: Staged) -> None:
        paths, record = staged.paths, staged.record
        staged.directory.mkdir(mode=0o700)
        staged.lock_fd = os.open(paths.lock, os.O_CREAT | os.O_RDWR, 0o600)
        fcntl.flock(staged.lock_fd, fcntl.LOCK_EX)
        os.close(os.open(paths.permit(record.nonce), os.O_CREAT | os.O_WRONLY, 0o600))
        staged.log_fd = os.open(paths.log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        staged.trouble_fd = os.open(paths.trouble, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        staged.journal_fd = os.open(paths.journal, os.O_CREAT | os.O_RDWR, 0o600)
        size = _JOURNAL_BYTES + _JOURNAL_BYTES_PER_RETRY * min(record.max_retries, 100)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(staged.journal_fd, 0, size)

    def _settle(self, paths: JobPaths, record: JobRecord) -> Outcome:
        """Kill what a dead supervisor left, then record the end: the job's own if it had come to one, else LOST."""
        with taken(paths.lock) as free:
            journal = paths.journal.read_bytes()
            outcome = read_journal(journal)
            if not free or outcome.status.is_terminal:
                return outcome
            if record.boot == boot_id():
                kill_leftovers(record.job_id, str(paths.outputs), outcome.sessions)
            reason: TerminationReason | None = TerminationReason.LOST
            exit_code, message = None, _why_lost(paths, outcome, record)
            if outcome.last_exit:
                reason, exit_code, message = outcome.last_exit.reason, outcome.last_exit.exit_code, ""
            elif not paths.permit(record.nonce).exists():
                reason, message = TerminationReason.STOPPED_BY_USER, ""
            latest = max([record.submission_time, *(attempt.start_time for attempt in outcome.attempts)])
            event = {
                "event": "ended",
                "time": round(max(time.time(), latest), 6),
                "reason": reason,
                "exit_code": exit_code,
                "message": message,
            }
            line = json.dumps({key: value for key, value in event.items() if value is not None}).encode() + b"\n"
            end = journal.split(b"\0", 1)[0].rfind(b"\n") + 1
            # What cannot be recorded (a read-only disk) is reported all the same, and recorded by a later call.
            with suppress(OSError):
                descriptor = os.open(paths.journal, os.O_WRONLY)
                try:
                    os.pwrite(descriptor, line, end)
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            return read_journal(journal[:end] + line)

    def _sweep(self) -> None:
        """Remove what killed clients left half-made or half-removed."""
        oldest = time.time() - _STALE_SECONDS
        for parent in (self.paths.staging, self.paths.trash):
            with suppress(OSError):
                for entry in os.scandir(parent):
                    if entry.stat().st_mtime < oldest and not is_locked(Path(entry.path) / "lock"):
                        shutil.rmtree(entry.path, ignore_errors=True)

    def _forget(self, name: str, stamp: str) -> None:
        if stamp.isdigit() and time.time() - int(stamp) / 1e9 > _STALE_SECONDS:
            with suppress(OSError):
                (self.paths.index / name).unlink()

    def _exists(self, job_id: str) -> JobExistsError:
        return JobExistsError(
            f"job {job_id!r} exists in {self.paths.root}: choose another job_id, purge that one, or adopt it "
            "(if_exists='adopt')"
        )


@contextmanager
def disk_errors_mapped(what: str) -> Iterator[None]:
    """Turn the operating system's refusals into Fray's errors, saying what failed and what helps."""
    try:
        yield
    except OSError as error:
        if isinstance(error, PlatformError):
            raise
        remedy = {
            errno.ENOSPC: "free some space, or `fray purge --older-than 7d`",
            errno.EDQUOT: "free some space, or `fray purge --older-than 7d`",
            errno.EROFS: "the file system is read-only: choose another state directory, local:/PATH",
            errno.EACCES: "it belongs to somebody else: choose another state directory, local:/PATH",
        }.get(error.errno or 0, "see the operating system's words")
        raise SubmissionError(f"{what}: {error.strerror or error}: {remedy}") from error


def _newest_first(names: list[str], limit: int | None) -> Iterator[str]:
    """Yield the index's names, the newest first, sorting no more of them than are likely to be asked for."""
    if limit is None or 4 * limit > len(names):
        yield from sorted(names, reverse=True)
        return
    newest = heapq.nlargest(limit, names)
    yield from newest
    seen = set(newest)
    yield from sorted((name for name in names if name not in seen), reverse=True)


def _index_name(record: JobRecord) -> str:
    return f"{record.submitted_ns:020d}.{record.job_id}"


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_lost(paths: JobPaths, outcome: Outcome, record: JobRecord) -> str:
    if record.boot != boot_id():
        return "the machine restarted while the job was running"
    who = f"its runner (process {outcome.runner})" if outcome.runner else "its runner"
    why = f"{who} died without recording an end; what was left of the job has been killed"
    with suppress(OSError):
        if said := paths.trouble.read_text(errors="replace").strip():
            why += f"; its last words: {said.splitlines()[-1]}"
    return why


def _damaged(paths: JobPaths, error: Exception, record: JobRecord | None = None) -> Supervision:
    """What can be said of a job whose files somebody changed: it breaks no list, and waits for nobody."""
    running = is_locked(paths.lock)
    changed = 0.0
    with suppress(OSError):
        changed = paths.directory.stat().st_mtime
    submitted = record.submission_time if record else changed
    why = str(error).splitlines()[0]
    return Supervision(
        JobInfo(
            paths.directory.name,
            JobStatus.RUNNING if running else JobStatus.FAILED,
            submitted,
            end_time=None if running else max(changed, submitted),
            reason=None if running else TerminationReason.LOST,
            message=f"its files in {paths.directory} have been damaged: {why}; fray purge removes it",
            entrypoint=record.entrypoint if record else "",
            metadata=record.metadata if record else {},
            owner=record.owner if record else "",
        ),
        None,
        None,
    )


@lru_cache(maxsize=4096)
def _read_record(path: Path, inode: int, changed_ns: int) -> JobRecord:
    """Read a record, once for as long as its file stays as it is: a client that waits asks often."""
    # Not validate_json: it refuses the paths that are no UTF-8.
    return _record_adapter().validate_python(json.loads(path.read_bytes()))


@cache
def _record_adapter() -> TypeAdapter[JobRecord]:
    from pydantic import TypeAdapter

    return TypeAdapter(JobRecord)
