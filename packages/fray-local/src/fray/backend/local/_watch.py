"""Sleep until a process is gone: by the kernel's own event where it has one, else by looking now and then."""

from __future__ import annotations

import os
import select
import sys
import time

__all__ = ["sleep_until_gone"]

_POLL_SECONDS = 0.02


def sleep_until_gone(pid: int, seconds: float) -> bool:
    """Return True as soon as process `pid` is gone, False after `seconds`. Any process may be watched."""
    if hasattr(os, "pidfd_open"):  # Linux
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        except OSError:
            return _poll(pid, seconds)  # a kernel before 5.3, or a sandbox that forbids it
        try:
            waiter = select.poll()
            waiter.register(descriptor, select.POLLIN)
            return bool(waiter.poll(max(0.0, seconds) * 1000))
        finally:
            os.close(descriptor)
    if sys.platform == "darwin":
        queue = select.kqueue()
        try:
            event = select.kevent(
                pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD | select.KQ_EV_ONESHOT, select.KQ_NOTE_EXIT
            )
            return bool(queue.control([event], 1, max(0.0, seconds)))
        except ProcessLookupError:
            return True
        finally:
            queue.close()
    return _poll(pid, seconds)


def _poll(pid: int, seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, _POLL_SECONDS
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(pause * 1.5, 1.0)
