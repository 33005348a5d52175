"""The keeper of a TPU host: a small process beside the worker that runs the function, and longer there than that.

It hands on what the worker and its children print, to the last byte, also of one that crashes; tells the caller that
the host is there; and when the worker has ended, or the caller has gone, ends whatever the function left behind and
says that it is gone. Of the standard library alone, and of Linux.
"""

from __future__ import annotations

import json
import os
import select
import selectors
import signal
import socket
import time
from contextlib import suppress
from typing import Any

from fray.backend.ray._tpu_frames import END, GO, GONE, HELLO, KILL, OUTPUT, PING, PONG, STEP, FrameReader, frame
from fray.detached import leave_caller

__all__ = ["MARK", "main", "marked_processes"]

MARK = "FRAY_TPU_RUN"
"""In the environment of the worker, and so of all that the function starts: which run and host they belong to."""

_BLOCK = 1 << 16
# How long it is waited for processes that were killed, before they are reported as staying.
_PATIENCE_SECONDS = 20.0
# A caller from which nothing has been acknowledged for so long is gone.
_CALLER_TIMEOUT_MS = 60_000


def marked_processes(mark: str) -> list[int]:
    """Return the live processes of this machine that belong to a run: those whose environment says so."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                if wanted not in file.read().split(b"\0"):
                    continue
            with open(f"/proc/{entry}/stat", "rb") as file:
                if file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X"):
                    continue
        except OSError:
            continue  # it has ended, or is somebody else's
        found.append(int(entry))
    return found


def main(output: int, control: int, go: int) -> None:
    """Keep one host.

    Args:
        output: What the worker and its children print comes from this descriptor.
        control: What the worker has to say of its progress, a line of JSON each.
        go: To this the word to begin is passed on.
    """
    leave_caller()
    with open(0, "rb") as stdin:
        told = json.loads(stdin.read())
    try:
        with socket.create_connection((told["address"], told["port"]), 30.0) as caller:
            caller.settimeout(None)
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _CALLER_TIMEOUT_MS)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 20)
            caller.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
            _Keeper(caller, told, output, control, go).run()
    except OSError:
        _end_all(told["mark"], told["grace"])


class _Keeper:
    def __init__(self, caller: socket.socket, told: dict[str, Any], output: int, control: int, go: int) -> None:
        self._caller, self._output, self._control, self._go = caller, output, control, go
        self._mark, self._grace = told["mark"], told["grace"]
        self._worker, self._raylet = told["worker"], told["raylet"]
        self._frames, self._lines = FrameReader(), b""
        self._selector = selectors.DefaultSelector()
        self._send(HELLO, told["hello"])

    def run(self) -> None:
        """Keep the host until its worker has ended and nothing is left of it."""
        worker = os.pidfd_open(self._worker)
        self._selector.register(worker, selectors.EVENT_READ, "worker")
        for descriptor, name in ((self._output, "output"), (self._control, "control")):
            self._selector.register(descriptor, selectors.EVENT_READ, name)
        self._selector.register(self._caller, selectors.EVENT_READ, "caller")
        kill_at: float | None = None
        while True:
            timeout = None if kill_at is None else max(0.0, kill_at - time.monotonic())
            ready = {key.data for key, _ in self._selector.select(timeout)}
            for name in ("output", "control"):
                if name in ready:
                    self._read(name)
            if "caller" in ready:
                for kind, content in self._received():
                    if kind == GO:
                        os.write(self._go, content + b"\n")
                    elif kind == PING:
                        self._send(PONG, {"raylet": self._has_raylet()})
                    elif kind == KILL:
                        self._signal(signal.SIGTERM)
                        kill_at = time.monotonic() + self._grace
                    elif kind == END:
                        # The result has been received: the worker ends by itself, in its own time, or in this.
                        kill_at = time.monotonic() + self._grace
            if "worker" in ready:
                break
            if kill_at is not None and time.monotonic() >= kill_at:
                self._signal(signal.SIGKILL)
                kill_at = None
        left = _end_all(self._mark, self._grace)
        self._drain()
        self._send(GONE, {"left": left, "raylet": self._has_raylet()})

    def _has_raylet(self) -> bool:
        """Whether this is a node of Ray's cluster still."""
        return os.path.exists(f"/proc/{self._raylet}")

    def _send(self, kind: bytes, content: bytes | dict[str, Any]) -> None:
        self._caller.sendall(frame(kind, content))

    def _received(self) -> list[tuple[bytes, bytes]]:
        data = self._caller.recv(_BLOCK)
        if not data:
            raise ConnectionError("the caller has gone")
        return self._frames.feed(data)

    def _signal(self, number: signal.Signals) -> None:
        for pid in marked_processes(self._mark):
            with suppress(OSError):  # it has ended, or may not be touched
                os.kill(pid, number)

    def _read(self, name: str) -> bool:
        descriptor = self._output if name == "output" else self._control
        data = os.read(descriptor, _BLOCK)
        if not data:
            self._selector.unregister(descriptor)
            return False
        if name == "output":
            self._send(OUTPUT, data)
            return True
        *lines, self._lines = (self._lines + data).split(b"\n")
        if lines:
            self._send(STEP, lines[-1])
        return True

    def _drain(self) -> None:
        """Hand on what was written before the end; a process that stays may hold the pipe open."""
        registered = {key.data for key in self._selector.get_map().values()}
        for name, descriptor in (("output", self._output), ("control", self._control)):
            while name in registered and select.select([descriptor], [], [], 0)[0] and self._read(name):
                pass


def _end_all(mark: str, grace: float) -> list[int]:
    """End what bears the mark: asked to at first, then killed; return what stays nevertheless."""
    number, since = signal.SIGTERM, time.monotonic()
    asked: set[int] = set()
    while left := marked_processes(mark):
        now = time.monotonic()
        if now - since > grace:
            number = signal.SIGKILL
        if now - since > grace + _PATIENCE_SECONDS:
            return left
        for pid in left:
            if number == signal.SIGTERM and pid in asked:
                continue
            asked.add(pid)
            with suppress(OSError):  # it has ended, or may not be touched
                os.kill(pid, number)
        time.sleep(0.02)
    return []
