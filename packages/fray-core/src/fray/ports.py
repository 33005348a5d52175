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

_lock = threading.Lock()
_turn: Iterator[int] | None = None


def _begin_anew() -> None:
    global _lock, _turn
    _lock, _turn = threading.Lock(), None


os.register_at_fork(after_in_child=_begin_anew)


def free_ports(count: int) -> list[int]:
    """Return so many TCP ports, all between 20000 and 31999, at which nothing listens.

    They come in turn, in an order that no other process has: nobody in this one is given what another was, who may not
    have taken it yet, until all have been had.

    Raises:
        PlatformError: There are not as many.
    """
    found: list[int] = []
    tried = 0
    while len(found) < count:
        if tried == len(_PORTS):
            raise PlatformError(
                f"this machine has no {count} free ports between {_PORTS.start} and {_PORTS.stop - 1}: end what "
                "listens there (`ss -ltnp` shows it)"
            )
        tried += 1
        port = _next()
        if port not in found and is_free(port):
            found.append(port)
    return found


def is_free(port: int) -> bool:
    """Return whether nothing listens at a TCP port, at whatever IPv4 address of this machine."""
    # Not every system takes the one for a part of the other.
    return all(_can_be_had(address, port) for address in ("127.0.0.1", ""))


def _next() -> int:
    global _turn
    with _lock:
        if _turn is None:
            # Not the program's own `random`, which may be seeded alike in many.
            _turn = itertools.cycle(random.Random().sample(_PORTS, len(_PORTS)))
        return next(_turn)


def _can_be_had(address: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what ended connections left is in nobody's way
        try:
            probe.bind((address, port))
        except OSError:
            return False
        return True
