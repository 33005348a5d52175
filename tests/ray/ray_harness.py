"""The Ray backend as the conformance suite, and this folder's own tests, meet it."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import psutil

from fray.testing import ClusterHarness
from fray.types import Resource, RuntimeEnv


class Head(Protocol):
    """A Ray cluster's head, as tests need to know it."""

    address: str
    dashboard: str
    session_dir: Path


# What Ray tells of jobs, their actors and their environments to anybody who asks over HTTP.
_QUESTIONS = (
    "/api/jobs/",
    "/api/v0/jobs?detail=true&limit=10000",
    "/api/v0/actors?detail=true&limit=10000",
    "/api/v0/tasks?detail=true&limit=10000",
    "/api/v0/workers?detail=true&limit=10000",
    "/api/v0/runtime_envs?detail=true&limit=10000",
    "/api/v0/cluster_events",
    "/logical/actors",
    "/nodes?view=summary",
)


class RayHarness(ClusterHarness):
    """Serves a test with a cluster that others use too; requests go through a proxy that can be cut off."""

    ships_working_dir = True
    deadline_seconds = 90.0

    def __init__(self, head: Head, **options: Any) -> None:
        super().__init__()
        self.head = head
        self.proxy = Proxy(int(head.dashboard.rpartition(":")[2]))
        self.spec = f"ray:http://127.0.0.1:{self.proxy.port}"
        self.options = {"grace_seconds": 4.0, **options}

    @contextmanager
    def hold_pending(self) -> Iterator[RuntimeEnv]:
        holder = f"holder-{uuid4().hex}"
        rest = self.cluster._rest  # type: ignore[attr-defined]
        rest.submit(
            entrypoint="exec sleep 600",
            submission_id=holder,
            metadata={"fray_errand": "hold"},
            entrypoint_resources={"gate": 1},
        )
        self.until(lambda: rest.job(holder).status == "RUNNING", "the gate to be held")
        try:
            yield RuntimeEnv([], [Resource("gate", 1)])
        finally:
            rest.stop(holder)

    def entrypoint_of(self, job_id: str) -> psutil.Process:
        """The process that Ray runs as the job's entrypoint."""
        return self._process(job_id, "fray_entrypoint")

    def runner_of(self, job_id: str) -> psutil.Process:
        """The job's runner: the lower of the two, its guard being the other."""
        guard = self._process(job_id, "_runner.py")
        children = [child for child in guard.children() if "_runner.py" in " ".join(child.cmdline())]
        return children[0] if children else guard

    def supervisor_of(self, job_id: str) -> psutil.Process:
        """Ray's own process above the entrypoint."""
        parent = self.entrypoint_of(job_id).parent()
        assert parent is not None
        return parent

    def kill_supervision(self, job_id: str) -> None:
        os.kill(self.entrypoint_of(job_id).pid, signal.SIGKILL)

    def observable(self) -> Iterator[tuple[str, bytes]]:
        for question in _QUESTIONS:
            try:
                with urllib.request.urlopen(self.head.dashboard + question, timeout=120) as answer:
                    yield question, answer.read()
            except urllib.error.HTTPError as error:  # under load some of them fail at times
                yield question, error.read()
        for folder, _, names in os.walk(self.head.session_dir):
            for path in (Path(folder, name) for name in names):
                with suppress(OSError):
                    if path.is_file():
                        yield str(path), path.read_bytes()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                yield f"the arguments of process {process.pid}", "\0".join(process.cmdline()).encode()

    @contextmanager
    def interrupt_engine(self) -> Iterator[None]:
        with self.proxy.cut_off():
            yield

    def __exit__(self, *error: Any) -> None:
        # The next test has the same cluster, and looks at lists: nothing of this one is to change in them any more.
        left = [info.id for info in self.cluster.list_jobs() if not info.status.is_terminal]
        for job_id in left:
            self.cluster.delete_job(job_id)
        for job_id in left:
            self.end(job_id)
        super().__exit__(*error)
        self.proxy.close()

    def _process(self, job_id: str, program: str) -> psutil.Process:
        found: list[psutil.Process] = []

        def look() -> bool:
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    if program in " ".join(process.cmdline()[:6]) and _job_of(process) == job_id:
                        found.append(process)
                        return True
            return False

        self.until(look, f"{program} of {job_id}")
        return found[0]


class Proxy:
    """Hands connections on to a port of this machine, until it is told to cut them off."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._is_cut = self._is_closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)
        self._thread.start()

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Break every connection, and refuse new ones while the context is open."""
        self._is_cut = True
        with self._lock:
            for each in self._pairs:
                with suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)
        yield
        self._is_cut = False

    def close(self) -> None:
        self._is_closed = True
        self._thread.join(10)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector, self._listener:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._is_closed:
                for key, _ in selector.select(0.05):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        assert isinstance(key.fileobj, socket.socket)
                        self._hand_on(selector, key.fileobj)
            for each in list(self._pairs):
                each.close()

    def _accept(self, selector: selectors.BaseSelector) -> None:
        here, _ = self._listener.accept()
        if self._is_cut:
            here.close()
            return
        try:
            there = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            here.close()
            return
        with self._lock:
            self._pairs |= {here: there, there: here}
        for each in (here, there):
            selector.register(each, selectors.EVENT_READ)

    def _hand_on(self, selector: selectors.BaseSelector, source: socket.socket) -> None:
        target = self._pairs.get(source)
        if target is None:
            return
        try:
            data = source.recv(1 << 16)
            if data:
                target.sendall(data)
                return
        except OSError:
            pass
        with self._lock:
            for each in (source, target):
                self._pairs.pop(each, None)
        for each in (source, target):
            with suppress(KeyError, ValueError):
                selector.unregister(each)
            each.close()


def _job_of(process: psutil.Process) -> str | None:
    environment = process.environ()
    if "FRAY_JOB_ID" in environment:
        return environment["FRAY_JOB_ID"]
    config = environment.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return json.loads(config)["metadata"].get("job_submission_id") if config else None
