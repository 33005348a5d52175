"""`SubprocessClusterContext`: jobs as process trees on this machine, each under a runner that outlives its client."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fray._local_tpu import run_on_local_hosts
from fray.backend.local import _paths
from fray.backend.local._admission import KNOWN_RESOURCES, machine_resources
from fray.backend.local._interpreters import command_python, describe_interpreter
from fray.backend.local._launch import Launch, supervised
from fray.backend.local._leftovers import belongs_to_job
from fray.backend.local._paths import boot_id
from fray.backend.local._planning import plan_environment
from fray.backend.local._store import JobRecord, Store, Supervision
from fray.backend.local._watch import sleep_until_gone
from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.detached import reap_launchers
from fray.errors import InvalidValueError, PlatformError, UnsupportedError
from fray.request import current_owner
from fray.state import replacing
from fray.types import JobInfo, JobStatus, RuntimeEnv, TpuRunConfig, check_seconds

__all__ = ["SubprocessClusterContext"]

_CHUNK_BYTES = 1 << 20
# How often a followed log is looked at while its job runs; the job's end is an event and needs no look.
_FOLLOW_SECONDS = 0.02
# A process id may be somebody else's by now: no sleep on one is longer than this without asking the lock again.
_LONGEST_SLEEP_SECONDS = 2.0


class SubprocessClusterContext(ClusterContext):
    """Jobs as local subprocesses.

    Args:
        address: The directory that holds the jobs; a private one of this user and machine where None.
        python: The interpreter that is `python` and `python3` in the jobs; this process's where None.
        grace_seconds: How long a job that is stopped has between SIGTERM and SIGKILL.
        cache_dir: Where prepared environments are kept; the user's cache directory where None.

    Raises:
        InvalidValueError: `python` is not there or no Python; the directory's path has a `:` in it.
        PlatformError: The directory cannot be made.
    """

    name = "local"
    capabilities = Capabilities(
        max_retries=True,
        timeout_seconds=True,
        outputs=True,
        nested_jobs=True,
        package_requirements=True,
        task_context=True,
        tpu=True,
    )

    def __init__(
        self,
        address: str | os.PathLike[str] | None = None,
        *,
        python: str | None = None,
        grace_seconds: float = 10.0,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        root = Path(address).expanduser().absolute() if address else _paths.default_root()
        # Fixed now, whatever PATH and the current directory are when a job is submitted.
        self._python = os.path.abspath(shutil.which(python) or python) if python else sys.executable
        self._grace_seconds = check_seconds("grace_seconds", grace_seconds)
        self._cache = Path(cache_dir).expanduser().absolute() if cache_dir else _paths.default_cache()
        self._store = Store(root)

    @property
    def spec(self) -> str:
        """`local:` and the directory that holds the jobs."""
        return f"{self.name}:{self._store.paths.root}"

    @classmethod
    def command_options(cls) -> dict[str, Any]:
        """The `fray` command's jobs use the user's Python, not the one that the command is installed in."""
        return {"python": command_python()}

    @classmethod
    def doctor(cls) -> Iterable[tuple[bool, str, str]]:
        """Check the default state directory, the cache, the free space, uv and the jobs' Python."""
        from fray.backend.local._doctor import checks

        return checks()

    def close(self) -> None:
        """Release the client. Jobs go on."""
        reap_launchers()

    def run_on_tpu(
        self, fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None = None
    ) -> list[Any]:
        """Call `fn(ctx)` once per host in threads of this process; see `ClusterContext.run_on_tpu`."""
        return run_on_local_hosts(fn, config, runtime_env)

    # The seam

    def _plan(self, request: JobRequest) -> JobPlan:
        env = request.env
        has = machine_resources() if env.minimum_resources else {}
        for resource in env.minimum_resources:
            if resource.name not in has:
                known = ", ".join(name for name in KNOWN_RESOURCES if name in has)
                raise UnsupportedError(f"a local job cannot ask for {resource.name!r}; this machine can count: {known}")
        environment = None
        if env.package_requirements or env.extras:
            interpreter = describe_interpreter(self._python, self._store.paths.interpreters)
            environment = plan_environment(
                interpreter,
                self._cache,
                requirements=env.package_requirements,
                extras=env.extras,
                variables={**os.environ, **env.env},
                project=request.directory,
            )
        elif self._python != sys.executable and not shutil.which(self._python):
            raise InvalidValueError(f"python: {self._python!r} is not there, or cannot be executed")
        native: dict[str, Any] = {
            "command": ["/bin/sh", "-c", "--", request.entrypoint],
            "directory": str(request.directory),
            "python": str(environment.python_path) if environment else self._python,
            "state": str(self._store.paths.job(request.job_id).directory),
            "grace_seconds": self._grace_seconds,
        }
        if environment:
            native["environment"] = {"directory": environment.directory, "prepared": environment.is_ready}
        if env.minimum_resources:
            native["resources"] = {resource.name: resource.quantity for resource in env.minimum_resources}
        return JobPlan(self.name, request, native, details=environment)

    def _submit(self, plan: JobPlan) -> None:
        request = plan.request
        record = JobRecord(
            request.job_id,
            request.entrypoint,
            time.time_ns(),
            current_owner(),
            request.fingerprint,
            secrets.token_hex(8),
            boot_id(),
            str(request.directory),
            request.env.masked(),
            request.metadata,
            request.timeout_seconds,
            request.max_retries,
        )
        launch = Launch(request, self._store.paths, self._python, plan.details, self.spec, self._grace_seconds)
        with self._store.stage(record) as staged, supervised(launch, staged):
            self._store.accept(staged)

    def _get(self, job_id: str) -> JobInfo:
        return self._store.read(job_id).info

    def _fingerprint(self, job_id: str) -> str:
        try:
            return self._store.record(job_id).fingerprint
        except ValueError as error:
            raise PlatformError(f"job {job_id} has been damaged: {error}") from error

    def _list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        return self._store.list(status, limit)

    def _wait(self, job_id: str, deadline: float | None) -> JobInfo:
        while True:
            known = self._store.read(job_id)
            left = float("inf") if deadline is None else deadline - time.monotonic()
            if known.info.status.is_terminal or left <= 0:
                return known.info
            self._sleep_on(known, min(left, _LONGEST_SLEEP_SECONDS))

    def _read_logs(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        known, asked_at = self._store.read(job_id), time.monotonic()
        try:
            log = self._store.paths.job(job_id).log.open("rb")
        except FileNotFoundError:
            return  # the job's directory has been damaged: there is no output left
        with log:
            log.seek(offset)
            while True:
                while chunk := log.read(_CHUNK_BYTES):
                    yield chunk
                if not follow or known.info.status.is_terminal:
                    return
                # Whether the job is over is asked before the next read, so that its last words are not missed.
                is_gone = self._sleep_on(known, _FOLLOW_SECONDS) or known.runner is None
                if is_gone or time.monotonic() - asked_at > _LONGEST_SLEEP_SECONDS:
                    known, asked_at = self._store.read(job_id), time.monotonic()

    def _log_size(self, job_id: str) -> int:
        self._store.read(job_id)
        try:
            return self._store.paths.job(job_id).log.stat().st_size
        except FileNotFoundError:
            return 0

    def _stop(self, job_id: str) -> None:
        if self._store.read(job_id).info.status.is_terminal:
            return
        try:
            self._store.ask_to_stop(job_id)
        except ValueError as error:
            raise PlatformError(f"job {job_id} has been damaged and cannot be stopped: {error}") from error
        # Read again: a supervisor that has not said who it is yet will see by itself that its permit is gone.
        runner = self._store.read(job_id).runner
        if runner is not None and belongs_to_job(runner, job_id, str(self._store.paths.job(job_id).outputs)):
            try:
                os.kill(runner, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it ended by itself
            except PermissionError as error:
                raise PlatformError(f"job {job_id} runs as another user: {error}") from error

    def _purge(self, job_id: str) -> None:
        self._store.remove(job_id)

    def _fetch_outputs(self, job_id: str, destination: Path) -> list[Path]:
        self._store.read(job_id)
        source = self._store.paths.job(job_id).outputs
        fetched: list[Path] = []
        destination.mkdir(parents=True, exist_ok=True)
        for folder, subfolders, files in os.walk(source):
            below = Path(folder).relative_to(source)
            for name in sorted(files) + [name for name in subfolders if Path(folder, name).is_symlink()]:
                origin, copy = Path(folder, name), destination / below / name
                if (origin.is_symlink() or origin.is_file()) and _copy(origin, copy):
                    fetched.append(copy)
            for name in subfolders:
                if not Path(folder, name).is_symlink():
                    (destination / below / name).mkdir(parents=True, exist_ok=True)
        return sorted(fetched)

    # Behind it

    def _sleep_on(self, known: Supervision, seconds: float) -> bool:
        """Sleep until the job's supervisor is gone, at most `seconds`; say whether it is."""
        if known.runner is None:  # accepted a moment ago
            time.sleep(min(seconds, 0.002))
            return False
        if not sleep_until_gone(known.runner, 0):
            return sleep_until_gone(known.runner, seconds)
        # The runner is gone and has recorded no end: its guard, which holds the lock, is cleaning up.
        if known.guard is not None and not sleep_until_gone(known.guard, seconds):
            return False
        time.sleep(min(seconds, 0.001))  # the kernel wakes waiters a moment before it frees the lock
        return True


def _copy(origin: Path, copy: Path) -> bool:
    """Copy a file or a link, replacing what is there in one step; False where a running job has just removed it."""
    try:
        with replacing(copy) as new:
            shutil.copy2(origin, new, follow_symlinks=False)
        return True
    except FileNotFoundError:
        if os.path.lexists(origin):
            raise
        return False
