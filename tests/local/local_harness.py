"""The local backend as the conformance suite, and this folder's own tests, meet it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from fray.backend.local._admission import machine_resources
from fray.supervision import read_journal
from fray.testing import ClusterHarness
from fray.types import Resource, RuntimeEnv


class LocalHarness(ClusterHarness):
    """A store of its own below a temporary directory; the cache of environments is shared by a run's tests."""

    def __init__(self, root: Path, cache: Path) -> None:
        super().__init__()
        self.root = root
        self.spec = f"local:{root}"
        self.options: dict[str, Any] = {"grace_seconds": 4.0, "cache_dir": str(cache)}

    def job_directory(self, job_id: str) -> Path:
        return self.root / "jobs" / job_id

    def supervisors(self, job_id: str) -> tuple[int, int]:
        """The process ids of a job's runner and its guard, once it has said them."""

        def known() -> object:
            return self._outcome(job_id).guard

        self.until(known, "the runner's process id")
        outcome = self._outcome(job_id)
        assert outcome.runner
        assert outcome.guard
        return outcome.runner, outcome.guard

    @contextmanager
    def hold_pending(self) -> Iterator[RuntimeEnv]:
        cores = machine_resources()["CPU"]
        blocker = self.cluster.create_job("sleep 600", RuntimeEnv([], [Resource("CPU", cores)]))
        self.until(lambda: self.cluster.get_job(blocker).status == "RUNNING", "the blocker to run")
        try:
            yield RuntimeEnv([], [Resource("CPU", 1)])
        finally:
            self.cluster.delete_job(blocker)

    def kill_supervision(self, job_id: str) -> None:
        os.kill(self.supervisors(job_id)[0], signal.SIGKILL)

    def observable(self) -> Iterator[tuple[str, bytes]]:
        for path in self.root.rglob("*"):
            if path.is_file():
                yield str(path), path.read_bytes()
        for process in psutil.process_iter():
            try:
                yield f"the arguments of process {process.pid}", "\0".join(process.cmdline()).encode()
            except psutil.Error:
                continue

    def _outcome(self, job_id: str) -> Any:
        return read_journal((self.job_directory(job_id) / "journal").read_bytes())
