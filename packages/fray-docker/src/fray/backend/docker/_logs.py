"""The log of a job's container, read from the engine: exact bytes from any offset, live, and the runner's events.

The engine gives a log from its start or its last lines, and knows no offsets. But each event of the runner says how
much output lies before it, and the runner sees to it that any two thousand lines hold one (`_frames`). So a reader asks
for so many last lines, finds out where it is, and asks for more where that is too late.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import chain
from typing import Any

from docker.errors import APIError
from fray.backend.docker._engine import ContainerGoneError, Engine
from fray.backend.docker._frames import FrameDecoder, LogStream

__all__ = ["log_size", "read_events", "read_output", "read_start", "tail_offset"]

# More than what the runner writes between two events.
_FRAMES = 2048
_GROWTH = 8
_ALL_FRAMES = 2**31 - 1
_TAIL_LIMIT_BYTES = 64 * 1024 * 1024
# A followed log that is silent for so long is asked for anew: the engine may have gone without a word.
_SILENCE_SECONDS = 60.0

Item = bytes | dict[str, Any]


def read_output(engine: Engine, container: str, offset: int, follow: bool) -> Iterator[bytes]:
    """Yield a container's output from a byte on: to the present end, or with `follow` to the runner's last word.

    Raises:
        ConnectionFailedError: The engine went away; what was yielded counts.
        ContainerGoneError: There is no such container, or not any more, and the log was not read to its end.
    """
    while True:
        is_running = follow and engine.is_running(container)
        try:
            with closing(_from(engine, container, offset, is_running)) as items:
                for item in items:
                    if isinstance(item, bytes):
                        offset += len(item)
                        yield item
                    elif item.get("event") == "ended" and follow:
                        return
        except _SilentError:
            continue
        if not is_running:
            return


def read_events(engine: Engine, container: str) -> list[dict[str, Any]]:
    """Return events that tell where the job stands: all, or the last ones from one that sums up the others."""
    for frames in (1, 32, _FRAMES, None):
        events = [item for item in _items(engine, container, frames) if isinstance(item, dict) and "event" in item]
        if not events or frames is None:
            continue
        for number, event in reversed(list(enumerate(events))):
            attempts = event.get("attempts")
            if attempts is None and event["event"] in ("pending", "released", "ended"):
                return events[number:]  # of a holder, which has none
            if event["event"] == "supervised" or (attempts is not None and (not attempts or attempts[0][0] == 1)):
                return events[number:]
    return events


def read_start(engine: Engine, container: str) -> dict[str, Any] | None:
    """Return the runner's first event; None where it has said nothing yet."""
    with closing(_items(engine, container, None)) as items:
        for item in items:
            if isinstance(item, dict) and item.get("event") == "supervised":
                return item
    return None


def log_size(engine: Engine, container: str) -> int:
    """Return how many bytes of output there are now."""
    for frames in (1, _FRAMES, None):
        size: int = 0
        is_known = frames is None
        for item in _items(engine, container, frames):
            if isinstance(item, bytes):
                size += len(item)
            elif "offset" in item or "log_size" in item:
                size, is_known = int(item.get("log_size") or item.get("offset") or 0), True
        if is_known:
            break
    return size


def tail_offset(engine: Engine, container: str, lines: int) -> int:
    """Return where the last `lines` lines of output begin; no more than the last 64 MiB are looked at."""
    if lines == 0:
        return log_size(engine, container)
    frames: int | None = max(_FRAMES, min(2 * lines, _FRAMES * _GROWTH))
    while True:
        # Place and content by one reading: the log may be growing.
        items = list(_items(engine, container, frames))
        start, _ = (0, None) if frames is None else _locate(iter(items))
        output = b"".join(item for item in items if isinstance(item, bytes))
        at, found = len(output) - output.endswith(b"\n"), 0
        while found < lines and (at := output.rfind(b"\n", 0, at)) >= 0:
            found += 1
        if start is not None and (found == lines or start <= 0 or len(output) >= _TAIL_LIMIT_BYTES):
            return max(0, start + (at + 1 if found == lines else 0))
        frames = frames * _GROWTH if frames and start is not None else None


def _from(engine: Engine, container: str, offset: int, follow: bool) -> Generator[Item]:
    """Yield events, and the output from `offset` on."""
    frames = None if offset == 0 else _FRAMES
    while True:
        with closing(_items(engine, container, frames, follow)) as items:
            start, passed = (0, []) if frames is None else _locate(items)
            if start is not None and (start <= offset or frames is None):
                yield from _beyond(offset - start, chain(passed, items))
                return
        frames = frames * _GROWTH if frames and start else None


def _locate(items: Iterator[Item]) -> tuple[int | None, list[Item]]:
    """Read up to the first event; return the offset at which `items` began, and what has been read."""
    passed: list[Item] = []
    for item in items:
        passed.append(item)
        if isinstance(item, dict) and "offset" in item:
            return item["offset"] - sum(len(each) for each in passed if isinstance(each, bytes)), passed
    return None, passed


def _beyond(count: int, items: Iterator[Item]) -> Iterator[Item]:
    """Pass over the first bytes of output."""
    for item in items:
        if isinstance(item, bytes) and count:
            skipped, count = min(count, len(item)), max(0, count - len(item))
            item = item[skipped:]
            if not item:
                continue
        yield item


class _SilentError(Exception):
    """Nothing came for a while from a log that is followed."""


def _items(engine: Engine, container: str, frames: int | None, follow: bool = False) -> Generator[Item]:
    """Yield the log's last frames, or all, as the engine sends them."""
    stream, decoder = LogStream(), FrameDecoder()
    for data in _raw(engine, container, frames, follow):
        yield from decoder.feed(stream.feed(data))


def _raw(engine: Engine, container: str, frames: int | None, follow: bool) -> Iterator[bytes]:
    import urllib3

    # Without `follow` all lines are asked for by a number: then the engine stops where the log ends now. "all" goes on
    # as long as the job writes faster than this reads.
    everything = "all" if follow else _ALL_FRAMES
    params = {"stdout": 1, "stderr": 1, "follow": int(follow), "tail": everything if frames is None else frames}
    silence_seconds = _SILENCE_SECONDS if follow else engine.timeout_seconds
    with engine.errors():
        try:
            with engine.stream(f"/containers/{container}/logs", params, silence_seconds) as pieces:
                yield from pieces
        except APIError as error:
            if error.status_code in (404, 409):  # 409: it is being removed
                raise ContainerGoneError(container) from error
            if (error.status_code or 0) < 500:
                raise
            raise ConnectionError(error) from error  # as when it stops, or removes the container: worth another try
        except urllib3.exceptions.ReadTimeoutError as error:
            if not follow:
                raise
            raise _SilentError from error
