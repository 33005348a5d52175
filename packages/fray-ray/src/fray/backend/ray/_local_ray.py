"""A Ray on this machine, for those who name no cluster: started once a process, and ended with who started it.

It runs under Fray's runner, on a leash: however this process ends, none of Ray's is left behind.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from fray.backend.ray._addresses import local_address
from fray.backend.ray._internals import PlainKv
from fray.errors import PlatformError
from fray.ports import free_ports, is_free
from fray.supervision import RunnerEvent, parse_events, runner_arguments, runner_source

__all__ = ["HEAD_PORTS", "NODE_PORTS", "LocalRay", "port_options", "start_on_free_ports"]

# All that its agents listen at: a raylet that is not told ends when they have not said so within 15 s (Ray 2.60,
# hard-coded), which on a busy machine is too short.
NODE_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port", *NODE_PORTS)

_START_SECONDS = 120.0
_GRACE_SECONDS = 8.0
_STARTS = 3

_Started = TypeVar("_Started")

_lock = threading.Lock()
_running: LocalRay | None = None


class LocalRay:
    """A handle on the local Ray.

    Attributes:
        address: Its head's.
        dashboard: Its dashboard's, `http://…`.
    """

    def __init__(self, address: str, dashboard: str, process: _Process | None) -> None:
        self.address = address
        self.dashboard = dashboard
        self._process = process

    @classmethod
    def shared(cls) -> LocalRay:
        """Return the Ray that runs on this machine, and start one where there is none.

        Raises:
            PlatformError: It does not start.
        """
        global _running
        with _lock:
            if _running is not None:
                return cls(_running.address, _running.dashboard, None)
            if (address := local_address()) and (dashboard := _dashboard_at(address)):
                return cls(address, dashboard, None)
            process = start_on_free_ports(len(HEAD_PORTS), _Process)
            _running = cls(process.address, process.dashboard, process)
            return _running

    @property
    def is_own(self) -> bool:
        """Whether this handle is the one that started it."""
        return self._process is not None

    def release(self) -> None:
        """End the local Ray, if this handle is the one that started it."""
        global _running
        with _lock:
            if self._process is not None:
                self._process.stop()
                self._process = None
                _running = None


class _Process:
    """`ray start --head` under the runner."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.address = f"127.0.0.1:{ports[0]}"
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        self._folder = Path(tempfile.mkdtemp(prefix="fray-ray-"))
        self._journal = self._folder / "journal"
        command = (
            f"exec {sys.executable} -m ray.scripts.scripts start --head --block --disable-usage-stats "
            f"--node-ip-address=127.0.0.1 --include-dashboard=true --dashboard-host=127.0.0.1 "
            f"{' '.join(port_options(HEAD_PORTS, ports))}"
        )
        leash, self._leash_end = os.pipe()
        os.set_inheritable(leash, True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FRAY_")}
        # In its jobs `python` is this one.
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        arguments = runner_arguments(
            command,
            journal=str(self._journal),
            output=str(self._folder / "log"),
            grace_seconds=_GRACE_SECONDS,
            leash=leash,
            detach=True,
        )
        try:
            subprocess.run(
                [sys.executable, "-I", "-S", str(runner_source()), *arguments],
                env=environment,
                pass_fds=[leash],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                check=True,
                start_new_session=True,
            )
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(leash)

    def stop(self) -> None:
        """End it, and wait until it has."""
        supervised = [event for event in self._events() if event.event == "supervised"]
        if supervised and supervised[0].pid is not None and not self._has_ended():
            with suppress(ProcessLookupError):  # it ended by itself
                os.kill(supervised[0].pid, signal.SIGTERM)
            give_up = time.monotonic() + 2 * _GRACE_SECONDS
            while not self._has_ended() and time.monotonic() < give_up:
                time.sleep(0.05)
        os.close(self._leash_end)
        import shutil

        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while True:
            if self._has_ended() or time.monotonic() > give_up:
                try:
                    said = (self._folder / "log").read_text(errors="replace").strip()[-2000:]
                except OSError:
                    said = ""
                raise PlatformError(f"a local Ray does not start: {said or 'it says nothing'}")
            if _dashboard_at(self.address) == self.dashboard:  # another's Ray may be at that address
                return
            time.sleep(0.1)

    def _events(self) -> list[RunnerEvent]:
        try:
            return parse_events(self._journal.read_bytes())
        except OSError:
            return []

    def _has_ended(self) -> bool:
        return any(event.event == "ended" for event in self._events())


def _dashboard_at(address: str) -> str | None:
    """Return the dashboard of the Ray whose head is at an address, once it can be connected to."""
    kv = PlainKv(address)
    try:
        found = kv.get(b"dashboard", b"dashboard")
        if not found:
            return None
        host, _, port = found.decode().rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), 1.0).close()
        return f"http://{found.decode()}"
    except (OSError, ValueError):
        return None
    finally:
        kv.close()


def port_options(names: Sequence[str], ports: Sequence[int]) -> list[str]:
    """Return the options by which `ray start` is given ports."""
    return [f"--{name}={port}" for name, port in zip(names, ports, strict=True)]


def start_on_free_ports(count: int, start: Callable[[list[int]], _Started]) -> _Started:
    """Start a Ray on free ports, and again on others where somebody took one before Ray did.

    That is known of the ports without which Ray does not start: the head's and the dashboard's.

    Args:
        count: How many ports it takes.
        start: Starts it. Where it raises, nothing of what it started is left.

    Raises:
        PlatformError: It does not start.
    """
    for _ in range(_STARTS - 1):
        ports = free_ports(count)
        try:
            return start(ports)
        except PlatformError:
            if all(map(is_free, ports)):
                raise
    return start(free_ports(count))
