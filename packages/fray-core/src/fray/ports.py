"""Free ports of this machine, for services that have to be told where to listen.

A port that is found free may be somebody else's a moment later: who starts a service on it has to be ready to start it
again on another.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator

from fray.errors import PlatformError

__all__ = ["free_ports", "is_free"]

# Above those that Ray gives to its workers (10002 to 19999), and below those that the kernel gives to whoever asks for
# any: a service that is started again finds its own still free.
_PORTS = range(20_000, 32_000)

_choosing = threading.Lock()


def _shuffle() -> None:
    global _choices
    _choices = itertools.cycle(random.sample(_PORTS, len(_PORTS)))


# In turn, so that nobody in this process is given what another was, who may not have taken it yet.
_choices: Iterator[int]
_shuffle()
os.register_at_fork(after_in_child=_shuffle)


def free_ports(count: int) -> list[int]:
    """Return so many TCP ports, all between 20000 and 31999, at which nothing listens.

    Raises:
        PlatformError: There are not as many.
    """
    found: list[int] = []
    for _ in _PORTS:
        if len(found) == count:
            return found
        with _choosing:
            port = next(_choices)
        if is_free(port):
            found.append(port)
    raise PlatformError(f"this machine has no {count} free ports between {_PORTS.start} and {_PORTS.stop - 1}")


def is_free(port: int) -> bool:
    """Return whether nothing listens at a TCP port, at whatever address of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended connections left is in nobody's way
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
