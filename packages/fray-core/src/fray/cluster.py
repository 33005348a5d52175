"""Tier 1: jobs on a cluster, a fat front over a thin backend.

`ClusterContext` validates, names, masks, decodes, waits and retries, once, for every backend. A backend fills in the
seam at the end of the class (`_plan`, `_submit`, `_get`, …) and declares its `Capabilities`. The fifteen rules that
all of them keep are in `docs/contract.md`; `fray.testing` proves them.
"""

from __future__ import annotations

import functools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

from fray.errors import (
    ConnectionFailedError,
    FrayError,
    InvalidValueError,
    JobExistsError,
    JobFailedError,
    JobNotFinishedError,
    JobNotFoundError,
    PlatformError,
    UnsupportedError,
    WaitTimeoutError,
)
from fray.request import (
    Capabilities,
    JobPlan,
    JobRequest,
    check_capabilities,
    check_count,
    check_job_id,
    make_request,
)
from fray.types import JobInfo, JobStatus, RuntimeEnv, TpuRunConfig, check_seconds

__all__ = ["Capabilities", "ClusterContext", "JobPlan", "JobRequest"]

T = TypeVar("T")

_TAIL_BLOCK_BYTES = 64 * 1024
_TAIL_LIMIT_BYTES = 64 * 1024 * 1024
# How long a call that can be repeated is repeated when the engine cannot be reached, and how long a wait without a
# deadline or a followed log sits out an engine that is away.
_CALL_PATIENCE_SECONDS = 5.0
_WAIT_PATIENCE_SECONDS = 300.0


class ClusterContext(ABC):
    """A place that runs jobs. Made by `fray.connect`; a context manager that releases the client at its end.

    @plugin-dev: subclass it, set `name` and `capabilities`, fill in the seam, register the class under the entry
    point group `fray.backends`. `docs/writing-a-backend.md` walks through it.
    """

    name: str = ""
    capabilities: Capabilities = Capabilities()

    @classmethod
    def connect(cls, address: str | None = None, **options: Any) -> Self:
        """Make an instance for what stands behind the colon of a spec, and the options of `fray.connect`.

        @plugin-dev: the default hands both to the constructor, the address under the name `address`.
        """
        if address is not None:
            options["address"] = address
        return cls(**options)

    @classmethod
    def command_options(cls) -> dict[str, Any]:
        """Return the options that the `fray` command connects with where its user gave none."""
        return {}

    @classmethod
    def doctor(cls) -> Iterable[tuple[bool, str, str]]:
        """Return what `fray doctor` is to show of this backend: whether it is well, what was found, the remedy.

        @plugin-dev: look at what no connection shows, such as a program that has to be there. No side effect lasts.
        """
        return []

    @property
    def spec(self) -> str:
        """The spec with which `fray.connect` reaches this cluster from another process."""
        return self.name

    # Jobs

    def create_job(
        self,
        entrypoint: str,
        env: RuntimeEnv | None = None,
        *,
        job_id: str | None = None,
        if_exists: Literal["error", "adopt"] = "error",
        metadata: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        max_retries: int = 0,
    ) -> str:
        """Submit a shell command and return its job's id as soon as the job is durably accepted.

        Args:
            entrypoint: Run by `/bin/sh -c` in the working directory.
            env: Packages, variables, resources, files.
            job_id: 1 to 63 characters of `[A-Za-z0-9_-]`, the first a letter or digit; made up where None.
            if_exists: With `adopt`, a job of this id and the same request is taken for this one, in any state.
            metadata: Strings to keep with the job.
            timeout_seconds: The time limit of all attempts, from the first command's start.
            max_retries: How many more attempts a failing command gets; 126, 127 and a failed set-up are final.

        Raises:
            InvalidTypeError: An argument is of the wrong type, a function for an entrypoint above all.
            InvalidValueError: An argument has a value that cannot be.
            UnsupportedError: This backend does not have what was asked for.
            JobExistsError: The id is taken.
            PlatformError: The engine did not take the job.
        """
        while True:
            plan = self.plan_job(
                entrypoint,
                env,
                job_id=job_id,
                if_exists=if_exists,
                metadata=metadata,
                timeout_seconds=timeout_seconds,
                max_retries=max_retries,
            )
            request = plan.request
            try:
                self._submit(plan)
            except JobExistsError:
                if job_id is None:
                    continue  # another process made up the same id in the same nanosecond
                if if_exists == "adopt":
                    try:
                        known = self._retry(functools.partial(self._fingerprint, job_id))
                    except JobNotFoundError:
                        continue  # it has just been purged
                    if known == request.fingerprint:
                        return job_id
                    raise JobExistsError(
                        f"job {job_id} exists on {self.spec} and is another: its entrypoint, environment, retries or "
                        "time limit differ; choose another job_id"
                    ) from None
                raise
            return request.job_id

    def plan_job(
        self,
        entrypoint: str,
        env: RuntimeEnv | None = None,
        *,
        job_id: str | None = None,
        if_exists: Literal["error", "adopt"] = "error",
        metadata: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        max_retries: int = 0,
    ) -> JobPlan:
        """Return what `create_job` would ask of the engine, and refuse what it would refuse. Nothing is done."""
        request = make_request(
            entrypoint,
            env,
            job_id=job_id,
            if_exists=if_exists,
            metadata=metadata,
            timeout_seconds=timeout_seconds,
            max_retries=max_retries,
        )
        self._check_capabilities(request)
        return self._plan(request)

    def list_jobs(self, *, status: JobStatus | None = None, limit: int | None = None) -> list[JobInfo]:
        """Return the cluster's jobs, the newest first.

        Args:
            status: Only jobs that stand there.
            limit: At most so many.
        """
        if status is not None:
            try:
                status = JobStatus(status)
            except ValueError:
                raise InvalidValueError(f"status is one of {', '.join(JobStatus)}, not {status!r}") from None
        if limit is not None:
            check_count("limit", limit)
        return self._retry(lambda: self._list(status, limit))

    def get_job(self, job_id: str) -> JobInfo:
        """Return what is known of a job now.

        Raises:
            JobNotFoundError: There is none of this id.
        """
        check_job_id(job_id)
        return self._retry(lambda: self._get(job_id))

    def wait(self, job_id: str, timeout: float | None = None, *, check: bool = False) -> JobInfo:
        """Wait until a job is over, all its processes gone, and return its final record.

        Args:
            job_id: Which job.
            timeout: Seconds to wait; None waits for ever.
            check: Whether a job that did not succeed is an error.

        Raises:
            WaitTimeoutError: The time was over first; the job goes on.
            JobFailedError: With `check`, the job did not succeed.
            JobNotFoundError: There is none of this id.
        """
        check_job_id(job_id)
        if timeout is not None:
            check_seconds("timeout", timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        patience = _WAIT_PATIENCE_SECONDS if deadline is None else max(0.0, deadline - time.monotonic())
        info = self._retry(lambda: self._wait(job_id, deadline), patience)
        if not info.status.is_terminal:
            why = f" ({info.message})" if info.message else ""
            raise WaitTimeoutError(
                f"job {job_id} is {info.status}{why} after {timeout:g} s; it goes on, wait for it again"
            )
        if check and info.status is not JobStatus.SUCCEEDED:
            raise JobFailedError(info)
        return info

    def delete_job(self, job_id: str) -> None:
        """Ask a job to stop, and return at once; its record stays, and ends STOPPED. A finished job is left alone.

        The whole process tree gets SIGTERM and, after the grace period, SIGKILL. A PENDING job never runs its
        command.

        Raises:
            JobNotFoundError: There is none of this id.
        """
        check_job_id(job_id)
        self._retry(lambda: self._stop(job_id))

    def purge_job(self, job_id: str) -> None:
        """Remove every trace of a finished job: its record, its log, its outputs.

        Raises:
            JobNotFinishedError: It is not over yet.
            JobNotFoundError: There is none of this id.
        """
        info = self.get_job(job_id)
        if not info.status.is_terminal:
            raise JobNotFinishedError(f"job {job_id} is {info.status}: delete it, wait for its end, then purge it")
        self._retry(lambda: self._purge(job_id))

    # Logs and outputs

    def read_logs(self, job_id: str, offset: int = 0) -> bytes:
        """Return the job's output so far, stdout and stderr as one stream, from byte `offset` on, unaltered."""
        check_job_id(job_id)
        check_count("offset", offset)
        return self._retry(lambda: b"".join(self._read_logs(job_id, offset, False)))

    def get_logs(self, job_id: str, *, tail: int | None = None) -> str:
        """Return the job's output so far as text: all of it, or the last `tail` lines.

        Undecodable bytes are replaced. A tail looks at no more than the last 64 MiB.
        """
        check_job_id(job_id)
        if tail is not None:
            check_count("tail", tail)
        output = self.read_logs(job_id, self._tail_offset(job_id, tail))
        if tail is not None:  # it may have grown since its end was looked for
            lines = output.removesuffix(b"\n").split(b"\n")
            if len(lines) > tail:
                output = output[sum(len(line) + 1 for line in lines[: len(lines) - tail]) :]
        return output.decode(errors="replace")

    def stream_logs(self, job_id: str, *, tail: int | None = None, follow: bool = True) -> Iterator[str]:
        """Iterate over the lines of the job's output, without their newlines, as they come.

        Args:
            job_id: Which job.
            tail: Begin so many lines before the present end; None begins at the start.
            follow: Whether to go on until the job is over; else the iterator ends at the present end.

        Raises:
            JobNotFoundError: There is none of this id (raised by this call, not by the first line).
        """
        check_job_id(job_id)
        if tail is not None:
            check_count("tail", tail)
        self.get_job(job_id)
        return self._lines(job_id, self._tail_offset(job_id, tail), follow)

    def fetch_outputs(self, job_id: str, destination: str | os.PathLike[str]) -> list[Path]:
        """Copy what the job wrote to `$FRAY_OUTPUT_DIR` below `destination`, and return the files' new paths.

        What is there under the same name is replaced. A job that still runs is fetched from as it stands.

        Raises:
            UnsupportedError: This backend has no outputs.
            InvalidValueError: `destination` exists and is no directory.
            PlatformError: It cannot be written to.
        """
        check_job_id(job_id)
        if not self.capabilities.outputs:
            raise UnsupportedError(f"the backend {self.name!r} has no outputs to fetch")
        target = Path(destination)
        if target.exists() and not target.is_dir():
            raise InvalidValueError(f"the destination {str(target)!r} is no directory")
        try:
            return self._retry(lambda: self._fetch_outputs(job_id, target))
        except FrayError:
            raise
        except OSError as error:
            raise PlatformError(
                f"the outputs of job {job_id} cannot be fetched to {str(target)!r}: {error.strerror or error}: "
                "fetch them to another directory"
            ) from error

    def run_on_tpu(
        self, fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None = None
    ) -> list[Any]:
        """Call `fn(ctx)` once on every host of every slice; return the results slice by slice, in host order.

        Raises:
            UnsupportedError: This backend has no TPUs.
        """
        raise UnsupportedError(
            f"the backend {self.name!r} has no TPUs: connect to a Ray cluster (pip install fray-ray)"
        )

    # The client

    def close(self) -> None:
        """Release the client. Jobs go on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # The seam: what a backend fills in. Ids are valid, options are allowed by the capabilities.

    @abstractmethod
    def _plan(self, request: JobRequest) -> JobPlan:
        """Turn a request into the engine's own, or raise `UnsupportedError`. No side effect.

        @plugin-dev: refuse here what the backend cannot honour; what needs nothing done is satisfied.
        """

    @abstractmethod
    def _submit(self, plan: JobPlan) -> None:
        """Have the engine accept the job durably, all or nothing, whenever this process is killed.

        @plugin-dev: raise `JobExistsError` for a taken id, of which clients may race for.
        """

    @abstractmethod
    def _get(self, job_id: str) -> JobInfo:
        """Return the job, or raise `JobNotFoundError`.

        @plugin-dev: a job whose supervision died is to be settled here, as FAILED/LOST.
        """

    @abstractmethod
    def _fingerprint(self, job_id: str) -> str:
        """Return the fingerprint that the job was submitted with."""

    @abstractmethod
    def _list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        """Return the jobs, the newest first."""

    @abstractmethod
    def _read_logs(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        """Yield the log's bytes from `offset`: to the present end, or with `follow` until the job is over.

        @plugin-dev: with `follow` an empty chunk may be yielded, and nothing may come after the end of a job that is
        over. Raise `ConnectionFailedError` when the engine goes away: the front comes back with a new offset.
        """

    @abstractmethod
    def _log_size(self, job_id: str) -> int:
        """Return how many bytes `_read_logs` would give now, without reading them."""

    @abstractmethod
    def _stop(self, job_id: str) -> None:
        """Record that the job is to stop, and make it so; return without waiting. Nothing for a finished job."""

    @abstractmethod
    def _purge(self, job_id: str) -> None:
        """Remove every trace of a finished job."""

    def _wait(self, job_id: str, deadline: float | None) -> JobInfo:
        """Return the job once it is over, or as it stands at `deadline` (of `time.monotonic`).

        @plugin-dev: override it where the engine pushes; this polls, at first every 20 ms, later as often as keeps the
        lag below a twentieth of the wait, at last every second.
        """
        began = time.monotonic()
        while True:
            info, now = self._get(job_id), time.monotonic()
            left = None if deadline is None else deadline - now
            if info.status.is_terminal or (left is not None and left <= 0):
                return info
            pause = min(max(0.02, (now - began) / 20), 1.0)
            time.sleep(pause if left is None else min(pause, left))

    def _fetch_outputs(self, job_id: str, destination: Path) -> list[Path]:
        """Copy the outputs. @plugin-dev: needed with the capability `outputs`; an `OSError` is the destination's."""
        raise NotImplementedError

    # Behind the front

    def _check_capabilities(self, request: JobRequest) -> None:
        check_capabilities(self.name, self.capabilities, request)

    def _lines(self, job_id: str, offset: int, follow: bool) -> Iterator[str]:
        pending: list[bytes] = []
        for chunk in self._chunks(job_id, offset, follow):
            *whole, rest = chunk.split(b"\n")
            for line in whole:
                pending.append(line)
                yield b"".join(pending).decode(errors="replace")
                pending.clear()
            if rest:
                pending.append(rest)
        if pending:
            yield b"".join(pending).decode(errors="replace")

    def _chunks(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        """Read the log on across an engine that goes away and comes back."""
        pause, gone_since = 0.1, None
        while True:
            try:
                for chunk in self._read_logs(job_id, offset, follow):
                    pause, gone_since = 0.1, None
                    offset += len(chunk)
                    if chunk:
                        yield chunk
                return
            except ConnectionFailedError:
                gone_since = gone_since or time.monotonic()
                if time.monotonic() - gone_since > (_WAIT_PATIENCE_SECONDS if follow else _CALL_PATIENCE_SECONDS):
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 5.0)

    def _tail_offset(self, job_id: str, tail: int | None) -> int:
        """Return where the last `tail` lines begin, reading from the end no more than it takes."""
        if tail is None:
            return 0
        size = self._retry(lambda: self._log_size(job_id))
        start, newlines, at_end = size, 0, True
        while tail > 0 and start > 0 and size - start < _TAIL_LIMIT_BYTES:
            begin = max(0, start - _TAIL_BLOCK_BYTES)
            block = self._read_range(job_id, begin, start - begin)
            position = len(block)
            if at_end and block.endswith(b"\n"):
                position -= 1  # the newline that ends the last line begins no other
            at_end = False
            while (position := block.rfind(b"\n", 0, position)) >= 0:
                newlines += 1
                if newlines == tail:
                    return begin + position + 1
            start = begin
        return start

    def _read_range(self, job_id: str, offset: int, size: int) -> bytes:
        def read() -> bytes:
            content = b""
            for chunk in self._read_logs(job_id, offset, False):
                content += chunk
                if len(content) >= size:
                    break
            return content[:size]

        return self._retry(read)

    def _retry(self, call: Callable[[], T], patience: float = _CALL_PATIENCE_SECONDS) -> T:
        """Repeat a call that may be repeated while the engine cannot be reached."""
        pause, give_up = 0.1, time.monotonic() + patience
        while True:
            try:
                return call()
            except ConnectionFailedError:
                if time.monotonic() + pause > give_up:
                    raise
                time.sleep(pause)
                pause = min(pause * 2, 5.0)
