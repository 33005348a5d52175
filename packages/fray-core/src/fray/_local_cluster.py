"""The in-memory cluster: no jobs (a job is a shell command, and needs a process), and TPU hosts that are threads.

Here rather than in `fray.backend.in_memory`, which re-exports it: `import fray` may not import `fray.backend` before
its own search path is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.errors import JobNotFoundError, UnsupportedError
from fray.types import JobInfo, JobStatus, RuntimeEnv, TpuRunConfig

__all__ = ["LocalClusterContext"]


class LocalClusterContext(ClusterContext):
    """A cluster of this one process, without jobs."""

    name = "in-memory"
    capabilities = Capabilities(task_context=True, tpu=True)

    def run_on_tpu(
        self, fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None = None
    ) -> list[Any]:
        """Call `fn(ctx)` once per host, in threads that start in host order; see `ClusterContext.run_on_tpu`."""
        from fray._local_tpu import run_on_local_hosts  # not worth its time to those who never ask for it

        return run_on_local_hosts(fn, config, runtime_env)

    def _plan(self, request: JobRequest) -> JobPlan:
        raise UnsupportedError(
            "In-memory backend doesn't support create_job with string entrypoints: use the local backend "
            '(pip install fray-local), as in fray.connect("local").create_job("python my_job.py"); tasks and actors '
            "need no job: fray.get_job_context()"
        )

    def _check_capabilities(self, request: JobRequest) -> None:
        """Let `_plan` refuse every job, with the words that help."""

    def _submit(self, plan: JobPlan) -> None:
        raise AssertionError("no plan is ever made")

    def _list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        return []

    def _no_job(self, job_id: str) -> NoReturn:
        raise JobNotFoundError(f"there is no job {job_id!r}: the in-memory backend has no jobs")

    def _get(self, job_id: str) -> JobInfo:
        self._no_job(job_id)

    def _fingerprint(self, job_id: str) -> str:
        self._no_job(job_id)

    def _read_logs(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        self._no_job(job_id)

    def _log_size(self, job_id: str) -> int:
        self._no_job(job_id)

    def _stop(self, job_id: str) -> None:
        self._no_job(job_id)

    def _purge(self, job_id: str) -> None:
        self._no_job(job_id)
