"""A container's standard streams, over the connection that the engine makes one of a request."""

from __future__ import annotations

import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from fray.backend.docker._engine import Engine

__all__ = ["Attached"]


class Attached:
    """What a container that is not started yet will read, and where asked for what it will write.

    Args:
        engine: The engine.
        container: Its id.
        output: Whether its output is wanted too.
    """

    def __init__(self, engine: Engine, container: str, *, output: bool = False) -> None:
        self._engine = engine
        params = {"stdin": 1, "stream": 1}
        if output:
            params |= {"stdout": 1, "stderr": 1}
        with engine.errors():
            # Kept: with it docker-py's response would go, and close the socket.
            self._stream: Any = engine.api.attach_socket(container, params=params)
        self._socket: socket.socket = getattr(self._stream, "_sock", self._stream)
        self._socket.settimeout(None)

    def send(self, data: bytes) -> None:
        """Hand on all of it."""
        with self._engine.errors():
            self._socket.sendall(data)

    def receive(self) -> bytes:
        """Return what came next; nothing once the container or the engine closed the stream."""
        try:
            return self._socket.recv(1 << 16)
        except OSError:
            return b""

    def close(self) -> None:
        """Close it; what was sent arrives."""
        with suppress(OSError):  # the other side was first
            self._socket.shutdown(socket.SHUT_RDWR)
        self._release()

    def finish(self) -> None:
        """Say that nothing more is sent, and close."""
        # By TLS only the whole connection can be closed; the reader counts, and does not wait for the end.
        if not hasattr(self._socket, "unwrap"):
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_WR)
        self._release()

    def _release(self) -> None:
        # Each of them holds the connection open.
        response = getattr(self._stream, "_response", None)
        for each in (response and response.raw._fp.fp, self._stream, self._socket):
            if each is not None:
                each.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
