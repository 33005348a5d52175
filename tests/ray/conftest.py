"""One Ray head for all tests of this folder, gone with all its processes at their end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from fray.backend.ray._internals import PlainKv
from fray.backend.ray._local_ray import HEAD_PORTS, NODE_PORTS, port_options, start_on_free_ports
from fray.errors import PlatformError
from fray.ports import free_ports

START_SECONDS = 120.0


class RayHead:
    """A head of its own, in a folder of its own, found by nobody who is not told its address."""

    def __init__(self, *, ports: list[int] | None = None, token: str | None = None, quick: bool = False) -> None:
        # A short path: Ray's sockets lie below it, and the kernel allows them a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="fr-", dir="/tmp"))
        self._token = token
        self._quick = quick
        self._started: list[subprocess.Popen[bytes]] = []
        self._process: psutil.Process | None = None
        self._known: set[psutil.Process] = set()
        self.log = self.folder / "start.log"
        try:
            if ports:
                self._start_head(ports)
            else:
                start_on_free_ports(len(HEAD_PORTS), self._start_head)
        except BaseException:
            self.stop()
            raise

    def _start_head(self, ports: list[int]) -> None:
        self.ports = ports
        self.address = f"127.0.0.1:{ports[0]}"
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        command += port_options(HEAD_PORTS, ports)
        command += [f"--temp-dir={self.folder}"]
        command += ["--num-cpus=4", '--resources={"gate": 1}']
        if self._quick:  # to notice the death of a node
            command += ['--system-config={"health_check_period_ms": 300, "health_check_failure_threshold": 3}']
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("FRAY_", "RAY_"))}
        environment |= {"RAY_AUTH_MODE": "token" if self._token else "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        if self._token:
            environment["RAY_AUTH_TOKEN"] = self._token
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        self._environment = environment
        self._process = self._start(command)
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    @property
    def session_dir(self) -> Path:
        return (self.folder / "session_latest").resolve()

    def processes(self) -> list[psutil.Process]:
        """All that belong to it: what descends from its first process, and what says by its arguments that it does."""
        found: set[psutil.Process] = set()
        if self._process is not None:
            found.add(self._process)
            with suppress(psutil.Error):
                found.update(self._process.children(recursive=True))
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(self.folder) in " ".join(process.cmdline()) or self._known & set(process.parents()):
                    found.add(process)
        self._known |= found
        return [process for process in self._known if process.is_running() and process.status() != "zombie"]

    def add_node(self, resources: str) -> psutil.Process:
        """Start another node of the cluster; return the process that all of it descends from."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={self.address}", "--block"]
        command += ["--disable-usage-stats", "--node-ip-address=127.0.0.1", "--num-cpus=1", f"--resources={resources}"]
        command += [*port_options(NODE_PORTS, free_ports(len(NODE_PORTS))), f"--temp-dir={self.folder}"]
        node = self._start(command)
        self._known.add(node)
        return node

    def kill_node(self, node: psutil.Process) -> None:
        """End a node as a power cut would."""
        for process in [node, *node.children(recursive=True)]:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)

    def kill(self) -> None:
        """End it as a power cut would."""
        give_up = time.monotonic() + 30
        while left := self.processes():
            for process in left:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
            assert time.monotonic() < give_up, f"cannot be killed: {left}"
            time.sleep(0.05)
        for process in self._started:
            process.wait(30)

    def stop(self) -> None:
        """End it and remove its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self, command: list[str]) -> psutil.Process:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=self._environment, cwd="/", stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        return psutil.Process(process.pid)

    def _wait_until_ready(self) -> None:
        import urllib.request

        give_up = time.monotonic() + START_SECONDS
        while True:
            assert self._process is not None
            if not self._process.is_running() or self._process.status() == "zombie":
                raise PlatformError(self.log.read_text())
            with suppress(OSError):
                with closing(PlainKv(self.address, self._token)) as kv:
                    is_up = kv.get(b"dashboard", b"dashboard") == self.dashboard.removeprefix("http://").encode()
                if is_up:
                    headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
                    with urllib.request.urlopen(
                        urllib.request.Request(f"{self.dashboard}/api/jobs/", headers=headers), timeout=5
                    ):
                        return
            assert time.monotonic() < give_up, f"no Ray within {START_SECONDS} s: {self.log.read_text()}"
            time.sleep(0.1)


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    head = RayHead()
    yield head
    head.stop()


@pytest.fixture(autouse=True)
def no_cluster_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
