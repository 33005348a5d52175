"""Time for tests: that goes by when somebody sleeps and not otherwise, or by itself and with short sleeps."""

from __future__ import annotations

import threading
import time

__all__ = ["ImpatientClock", "VirtualClock"]

_LONGEST_SLEEP_SECONDS = 0.2


class VirtualClock:
    """A clock for tests: a wait of hours is over at once.

    Several threads may sleep at the same time; who began at the same moment wakes at the same moment.

    Args:
        start: The time at first, in seconds since 1970.
    """

    def __init__(self, start: float = 1_800_000_000.0) -> None:
        self._now = start
        self._lock = threading.Lock()

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        with self._lock:
            return self._now

    def sleep(self, seconds: float) -> None:
        """Let time go by."""
        with self._lock:
            target = self._now + max(0.0, seconds)
        with self._lock:
            self._now = max(self._now, target)


class ImpatientClock:
    """The machine's own time, with short sleeps: what a stand-in does is done in seconds, not in minutes."""

    def now(self) -> float:
        """Return the time in seconds since 1970."""
        return time.time()

    def sleep(self, seconds: float) -> None:
        """Return soon."""
        time.sleep(min(seconds, _LONGEST_SLEEP_SECONDS))
