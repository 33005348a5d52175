"""The caller's end of the connections to the keepers of all hosts: prints what the hosts print, tells what they say."""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from fray.backend.ray._tpu_frames import HELLO, OUTPUT, FrameReader, frame

__all__ = ["CLOSED", "Switchboard"]

CLOSED = b"-"
"""Told when a host's connection has ended."""

_BLOCK = 1 << 18
# A line that is longer is printed in parts.
_LONGEST_LINE = 1 << 16


class Switchboard:
    """Waits for the keepers, and speaks with those that have called.

    Attributes:
        address: Where they are to call: address and port.
        token: By which they make themselves known.

    Args:
        host: The address of this machine that the hosts reach.
        prefixes: What is printed before each line of a host, one a host.
        tell: Called with each host's index, what came, and its content; from another thread.
    """

    def __init__(self, host: str, prefixes: Sequence[str], tell: Callable[[int, bytes, dict[str, Any]], None]) -> None:
        self.token = secrets.token_hex(16)
        self._tell = tell
        self._prefixes = prefixes
        self._listener = socket.create_server((host, 0), backlog=1024)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._hosts: dict[int, _Host] = {}
        self._thread = threading.Thread(target=self._run, name="fray-tpu-switchboard", daemon=True)
        self._thread.start()

    def send(self, index: int, kind: bytes, content: dict[str, Any] | None = None) -> bool:
        """Send to a host; return whether it is connected."""
        with self._lock:
            host = self._hosts.get(index)
        if host is None:
            return False
        try:
            host.connection.sendall(frame(kind, content))
        except OSError:
            return False
        return True

    def connected(self) -> set[int]:
        """Return the hosts that are connected."""
        with self._lock:
            return set(self._hosts)

    def close(self) -> None:
        """Hang up on all; what a host has not ended by itself it ends then."""
        self._wake.close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._end()
                    return
                if key.fileobj is self._listener:
                    with suppress(OSError):
                        connection, _ = self._listener.accept()
                        self._selector.register(connection, selectors.EVENT_READ, _Host(connection))
                else:
                    self._receive(key.data)

    def _receive(self, host: _Host) -> None:
        try:
            data = host.connection.recv(_BLOCK)
            frames = host.reader.feed(data)
        except (OSError, ValueError):
            data, frames = b"", []
        for kind, content in frames:
            if kind == OUTPUT and host.index is not None:
                self._print(host, content)
                continue
            said = json.loads(content)
            if kind == HELLO:
                if not secrets.compare_digest(str(said.pop("token", "")), self.token):
                    data = b""
                    break
                host.index = int(said.pop("index"))
                with self._lock:
                    self._hosts[host.index] = host
            if host.index is None:
                data = b""  # a stranger
                break
            self._tell(host.index, kind, said)
        if not data:
            self._hang_up(host)
            if host.index is not None:
                self._tell(host.index, CLOSED, {})

    def _print(self, host: _Host, data: bytes) -> None:
        *lines, host.line = (host.line + data).split(b"\n")
        while len(host.line) > _LONGEST_LINE:
            lines.append(host.line[:_LONGEST_LINE])
            host.line = host.line[_LONGEST_LINE:]
        self._write(host, lines)

    def _write(self, host: _Host, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        assert host.index is not None
        prefix = self._prefixes[host.index]
        text = "".join(f"{prefix}{line.decode(errors='replace')}\n" for line in lines)
        # Where there is nobody to read it any more, the run goes on.
        with suppress(OSError, ValueError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def _hang_up(self, host: _Host) -> None:
        with suppress(KeyError, ValueError):
            self._selector.unregister(host.connection)
        host.connection.close()
        if host.index is not None:
            with self._lock:
                self._hosts.pop(host.index, None)
            if host.line:
                self._write(host, [host.line])
                host.line = b""

    def _end(self) -> None:
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Host):
                self._hang_up(key.data)
        self._selector.close()
        self._listener.close()
        self._woken.close()


class _Host:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.reader = FrameReader()
        self.index: int | None = None
        self.line = b""
