"""A job's output, read over HTTP at any offset, and followed.

The runner keeps it in files of one size below the log folder of the job's node, from which Ray's log service gives
whole files: to read on from an offset costs one of them at most, however long the log is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

from fray.backend.ray._record import KnownJob
from fray.backend.ray._rest import HttpError, RayRest
from fray.errors import ConnectionFailedError, PlatformError

__all__ = ["log_size", "read_log"]

_SEGMENT_BYTES = 1 << 22  # the runner's
# How often the node looks for more output of a file that is followed.
_FOLLOW_SECONDS = 0.02
# How often a job is asked for while nothing is heard of it: at first, and at most.
_FIRST_LOOK_SECONDS, _LAST_LOOK_SECONDS = 0.05, 0.5
# A connection on which nothing came for so long is made anew: it may have been forgotten on the way.
_LONGEST_SILENCE_SECONDS = 60.0


def read_log(rest: RayRest, look: Callable[[], KnownJob], offset: int, follow: bool) -> Iterator[bytes]:
    """Yield a job's output from an offset on: to its present end, or with `follow` to the end of the job.

    Args:
        rest: The cluster.
        look: Returns the job as it stands.
        offset: Where to begin.
        follow: Whether to wait for what comes.

    Raises:
        ConnectionFailedError: The cluster went away; begin again where it ended.
        PlatformError: The node that has the log is gone.
    """
    job = look()
    if job.submission is None:
        yield rest.ray_log(job.info.id)[offset:]
        return
    pause = _FIRST_LOOK_SECONDS
    while not job.outcome.attempts and not job.info.status.is_terminal:
        if not follow:
            return
        time.sleep(pause)
        pause = min(pause * 1.1, _LAST_LOOK_SECONDS)
        job = look()
    if not job.outcome.attempts:
        # Nothing ran: what there is to read is why.
        said = (job.details.message or "").encode() if job.info.reason == "SETUP_FAILED" else b""
        yield said[offset:]
        return
    try:
        while follow and not job.info.status.is_terminal:
            for chunk in _follow_segment(rest, look, job, offset):
                offset += len(chunk)
                yield chunk
            job = look()
        for chunk in _read_segments(rest, job, offset, quiet=follow):
            offset += len(chunk)
            yield chunk
    except _NoLogService:
        yield from _read_rays_own(rest, look, offset, follow)


def log_size(rest: RayRest, job: KnownJob) -> int:
    """Return how much output there is now, reading no more than its last file."""
    if job.submission is None:
        return len(rest.ray_log(job.info.id))
    if job.outcome.log_size is not None:
        return job.outcome.log_size
    if not job.outcome.attempts:
        return len((job.details.message or "").encode()) if job.info.reason == "SETUP_FAILED" else 0
    names = rest.list_files(job.details.driver_node_id or "", f"{job.folder}/log/*")
    if not names:
        return 0
    number = int(names[-1].rpartition("/")[2])
    return number * _SEGMENT_BYTES + sum(map(len, _segment(rest, job, number)))


def _read_segments(rest: RayRest, job: KnownJob, offset: int, *, quiet: bool) -> Iterator[bytes]:
    """Yield what is there now; `quiet` about a log that went away with its node."""
    end = job.outcome.log_size
    while end is None or offset < end:
        number, skip = divmod(offset, _SEGMENT_BYTES)
        try:
            for chunk in _segment(rest, job, number):
                part, skip = chunk[skip:], max(0, skip - len(chunk))
                if part:
                    offset += len(part)
                    yield part
        except HttpError as error:
            _check_service(error)
            if "not found" in error.text and (end is None or rest.has_node(job.details.driver_node_id or "")):
                return  # the next file begins with the next byte
            if quiet and job.info.status.is_terminal:
                return
            raise PlatformError(
                f"the log of job {job.info.id} cannot be read: it is on node {job.details.driver_node_id}, "
                f"which is gone or does not answer ({error})"
            ) from error
        if offset < (number + 1) * _SEGMENT_BYTES:
            return


def _read_rays_own(rest: RayRest, look: Callable[[], KnownJob], offset: int, follow: bool) -> Iterator[bytes]:
    """Yield what Ray's own log of the job has from an offset on, asking for all of it each time."""
    while True:
        job = look()
        part = rest.ray_log(job.info.id)[offset:]
        offset += len(part)
        yield part
        if not follow or job.info.status.is_terminal:
            return
        time.sleep(_LAST_LOOK_SECONDS)


def _follow_segment(rest: RayRest, look: Callable[[], KnownJob], job: KnownJob, offset: int) -> Iterator[bytes]:
    """Yield what is added to the file that has an offset, until it is full, or the job is over, or all is silent."""
    number, skip = divmod(offset, _SEGMENT_BYTES)
    with closing(_Follower(rest, job, number)) as follower:
        heard = looked = time.monotonic()
        pause = _FIRST_LOOK_SECONDS
        while offset < (number + 1) * _SEGMENT_BYTES:
            chunk, now = follower.next(pause), time.monotonic()
            if chunk:
                part, skip, heard = chunk[skip:], max(0, skip - len(chunk)), now
                offset += len(part)
                yield part
            if chunk is None or now - looked > _LAST_LOOK_SECONDS:
                if look().info.status.is_terminal or now - heard > _LONGEST_SILENCE_SECONDS:
                    return
                looked, pause = now, min(pause * 1.2, _LAST_LOOK_SECONDS)
                yield b""


class _Follower:
    """Reads a file that grows, in a thread: whoever waits for its next bytes can look at the job in between."""

    def __init__(self, rest: RayRest, job: KnownJob, number: int) -> None:
        self._chunks: queue.Queue[bytes | BaseException] = queue.Queue(64)
        self._is_closed = False
        node = job.details.driver_node_id or ""
        try:
            self._stream = rest.follow_file(node, _segment_name(job, number), _FOLLOW_SECONDS)
        except HttpError as error:
            _check_service(error)
            # The node is gone, which Ray is to find out; or this is the moment between one file and the next.
            raise ConnectionFailedError(str(error)) from error
        threading.Thread(target=self._read, name="fray-log", daemon=True).start()

    def next(self, seconds: float) -> bytes | None:
        """Return the next bytes, None where there are none within the time."""
        try:
            chunk = self._chunks.get(timeout=seconds)
        except queue.Empty:
            return None
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    def close(self) -> None:
        """End the stream, and with it the thread."""
        self._is_closed = True
        self._stream.close()
        while not self._chunks.empty():
            self._chunks.get_nowait()  # the thread may be waiting for room

    def _read(self) -> None:
        try:
            for chunk in self._stream:
                self._chunks.put(chunk)
                if self._is_closed:
                    return
            self._chunks.put(ConnectionFailedError("the connection to the log was closed"))
        except BaseException as error:
            self._chunks.put(error)


class _NoLogService(Exception):
    """This version of Ray does not give files from a node's log folder."""


def _check_service(error: HttpError) -> None:
    if error.status in (404, 405, 501):
        raise _NoLogService from error


def _segment(rest: RayRest, job: KnownJob, number: int) -> Iterator[bytes]:
    return rest.read_file(job.details.driver_node_id or "", _segment_name(job, number))


def _segment_name(job: KnownJob, number: int) -> str:
    return f"{job.folder}/log/{number:08d}"
