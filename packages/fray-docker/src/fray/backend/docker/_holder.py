"""What stands for a job in the engine while it is being prepared, and the hand on it.

The holder is a container with the runner in it, as a relay: it writes to its log what comes over its standard input,
and it alone decides whether the job is handed on to its command or was stopped before. Whoever prepares the job keeps
the connection to it open. When that breaks, or there is no sign of life for a minute, the relay reports the job LOST:
no other client has to notice.
"""

from __future__ import annotations

import json
import threading
import time
from types import TracebackType
from typing import Any, Self

from fray.backend.docker._attach import Attached
from fray.backend.docker._engine import Engine
from fray.backend.docker._frames import RS, FrameDecoder, LogStream, encode_event, encode_output
from fray.backend.docker._logs import read_events
from fray.types import TerminationReason

__all__ = ["Holder"]

_BEAT_SECONDS = 10.0
_LONGEST_MESSAGE = 12_000
# Messages that follow upon each other faster are left out.
_MESSAGE_SECONDS = 0.2


class Holder:
    """The connection to a holder, which is started by it.

    Args:
        engine: The engine.
        container: The holder's id; it must not run yet.
        not_before: The submission time, in seconds since the epoch.
    """

    def __init__(self, engine: Engine, container: str, not_before: float) -> None:
        self._engine = engine
        self._container = container
        self._not_before = not_before
        self._lock = threading.Lock()
        self._said = ("", 0.0)
        self._decision = ""
        self.is_over = threading.Event()
        """Set once the holder has decided, or is gone: what is being prepared is to be given up, unless released."""
        self._stream = Attached(engine, container, output=True)
        try:
            with engine.errors():
                engine.api.start(container)
        except BaseException:
            self._stream.close()
            raise
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name="fray-holder", daemon=True).start()

    def say(self, message: str) -> None:
        """Tell what the job waits for."""
        text, at = self._said
        now = time.monotonic()
        if message != text and now - at >= _MESSAGE_SECONDS:
            self._said = (message, now)
            self._send(encode_event("pending", time=self._now(), message=_cut(message)))

    def wait_until_known(self) -> None:
        """Return once what was said first is in the engine's log, from which all others know the job."""
        while not read_events(self._engine, self._container):
            time.sleep(0.002)

    def write(self, output: bytes) -> None:
        """Keep output of the set-up, which is the job's log if that fails."""
        if output:
            self._send(encode_output(output))

    def end(self, reason: TerminationReason, message: str) -> None:
        """End the job; return when that is decided."""
        self._send(encode_event("ended", time=self._now(), reason=str(reason), message=_cut(message)))
        self.is_over.wait()

    def release(self) -> bool:
        """Hand the job on to its command; return whether nobody stopped it before."""
        self._send(encode_event("released", time=self._now()))
        self.is_over.wait()
        return self._decision == "released"

    def close(self) -> None:
        """Leave; a job that is not decided on is lost."""
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _send(self, lines: bytes) -> None:
        with self._lock:
            if not self.is_over.is_set():
                self._stream.send(lines)

    def _now(self) -> float:
        return round(max(time.time(), self._not_before), 6)

    def _listen(self) -> None:
        stream, decoder = LogStream(), FrameDecoder()
        while data := self._stream.receive():
            for item in decoder.feed(stream.feed(data)):
                event: Any = item if isinstance(item, dict) else {}
                if event.get("event") in ("released", "ended"):
                    self._decision = event["event"]
                    self.is_over.set()
        self.is_over.set()

    def _beat(self) -> None:
        while not self.is_over.wait(_BEAT_SECONDS):
            try:
                self._send(RS + b"\n")
            except Exception:
                return  # the connection is gone, which the one that listens finds out too


def _cut(message: str) -> str:
    """Leave out the middle of a long message: an event is one line of the engine's log. The output has all of it."""
    while len(json.dumps(message)) > _LONGEST_MESSAGE:
        message = f"{message[: len(message) // 3]} … {message[-len(message) // 3 :]}"
    return message
