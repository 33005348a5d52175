"""`SubprocessClusterContext`: jobs as process trees on this machine, each under a runner that outlives its client."""

from __future__ import annotations

import getpass
import json
import os
import platform
import secrets
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fray._local_tpu import run_on_local_hosts
from fray.backend.local import _paths
from fray.backend.local._admission import KNOWN_RESOURCES, draw_ticket, machine_resources
from fray.backend.local._environments import EnvironmentPlan, plan_environment
from fray.backend.local._interpreters import Interpreter, command_python, describe_interpreter
from fray.backend.local._leftovers import belongs_to_job
from fray.backend.local._paths import boot_id
from fray.backend.local._prepare import Setup
from fray.backend.local._store import JobRecord, Staged, Store, Supervision, disk_errors_mapped, write_all
from fray.backend.local._watch import sleep_until_gone
from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.detached import reap_launchers, start_detached
from fray.errors import InvalidValueError, PlatformError, SubmissionError, UnsupportedError
from fray.shipping import write_light_part
from fray.supervision import encode_handover, runner_arguments, runner_source
from fray.types import JobInfo, JobStatus, RuntimeEnv, TpuRunConfig

__all__ = ["SubprocessClusterContext"]

_CHUNK_BYTES = 1 << 20
# How often a followed log is looked at while its job runs; the job's end is an event and needs no look.
_FOLLOW_SECONDS = 0.02
# A process id may be somebody else's by now: no sleep on one is longer than this without asking the lock again.
_LONGEST_SLEEP_SECONDS = 2.0
_JOB_VARIABLES = ("FRAY_JOB_ID", "FRAY_OUTPUT_DIR", "FRAY_ATTEMPT", "FRAY_JOB_CONTEXT", "FRAY_CLUSTER")


@dataclass(frozen=True)
class _Details:
    """What goes from the plan to the submission."""

    interpreter: Interpreter | None
    environment: EnvironmentPlan | None


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
        if grace_seconds < 0:
            raise InvalidValueError(f"grace_seconds cannot be negative: {grace_seconds}")
        root = Path(address).expanduser().absolute() if address else _paths.default_root()
        self._has_address = address is not None
        self._python = python or sys.executable
        self._grace_seconds = grace_seconds
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
        interpreter = environment = None
        if env.package_requirements or env.extras:
            interpreter = describe_interpreter(self._python, self._store.paths.root)
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
        return JobPlan(self.name, request, native, details=_Details(interpreter, environment))

    def _submit(self, plan: JobPlan) -> None:
        request, details = plan.request, plan.details
        paths = self._store.paths
        submitted_ns = time.time_ns()
        record = JobRecord(
            request.job_id,
            request.entrypoint,
            submitted_ns,
            _owner(),
            request.fingerprint,
            secrets.token_hex(8),
            boot_id(),
            str(request.directory),
            request.env.masked(),
            request.metadata,
            request.timeout_seconds,
            request.max_retries,
        )
        with self._store.stage(record) as staged:
            environment = self._job_environment(request, details.environment)
            permit = str(paths.job(request.job_id).permit(record.nonce))
            hold = [staged.lock_fd]
            needs_environment = details.environment is not None and not details.environment.is_ready
            ticket = None
            if request.env.minimum_resources:
                ticket = draw_ticket(paths.admission, submitted_ns, request.job_id, request.env.minimum_resources)
                hold.append(ticket.lock_fd)
            prepares = needs_environment or ticket is not None
            runner = self._runner_command(request, staged, permit, hold, detach=True)
            try:
                if prepares:
                    setup = Setup(
                        runner=runner,
                        permit=permit,
                        lock_fd=staged.lock_fd,
                        journal_fd=staged.journal_fd,
                        log_fd=staged.log_fd,
                        setup_log=str(paths.job(request.job_id).directory / "setup.log"),
                        not_before=record.submission_time,
                        environment=details.environment if needs_environment else None,
                        resources={each.name: each.quantity for each in request.env.minimum_resources},
                        ticket=str(ticket.path) if ticket else None,
                        ticket_fd=ticket.lock_fd if ticket else None,
                    )
                    setup.write(staged.paths.setup)
                    staged.setup_fd = os.open(staged.paths.setup, os.O_RDONLY)
                    command = _preparer_command(staged.setup_fd)
                else:
                    command = runner
                handover = start_detached(
                    command,
                    environment=environment,
                    keep_fds=[fd for fd in (*hold, staged.journal_fd, staged.log_fd, staged.setup_fd) if fd >= 0],
                    stderr=staged.trouble_fd,
                )
                try:
                    write_all(handover, encode_handover(request.env.secrets))
                    self._store.accept(staged)
                except BrokenPipeError:
                    said = staged.paths.trouble.read_text(errors="replace").strip()
                    raise SubmissionError(f"the runner of job {request.job_id} did not start: {said}") from None
                finally:
                    os.close(handover)
            except BaseException:
                if ticket:
                    ticket.path.unlink(missing_ok=True)
                raise
            finally:
                if ticket:
                    os.close(ticket.lock_fd)

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
        known = self._store.read(job_id)
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
                if self._sleep_on(known, _FOLLOW_SECONDS) or known.runner is None:
                    known = self._store.read(job_id)

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
        if runner is not None and belongs_to_job(runner, job_id):
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
        with disk_errors_mapped(f"the outputs of job {job_id} cannot be fetched to {destination}"):
            destination.mkdir(parents=True, exist_ok=True)
            for folder, subfolders, files in os.walk(source):
                below = Path(folder).relative_to(source)
                for name in sorted(files) + [name for name in subfolders if Path(folder, name).is_symlink()]:
                    origin, copy = Path(folder, name), destination / below / name
                    if origin.is_symlink() or origin.is_file():
                        _copy(origin, copy)
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

    def _runner_command(
        self, request: JobRequest, staged: Staged, permit: str, hold: list[int], *, detach: bool
    ) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-S",
            str(_compiled_runner(self._store.paths.runners)),
            *runner_arguments(
                request.entrypoint,
                journal=f"fd:{staged.journal_fd}",
                output=f"fd:{staged.log_fd}",
                directory=str(request.directory),
                permit=permit,
                grace_seconds=self._grace_seconds,
                timeout_seconds=request.timeout_seconds,
                max_retries=request.max_retries,
                not_before=staged.record.submission_time,
                handover=True,
                hold=hold,
                detach=detach,
            ),
        ]

    def _job_environment(self, request: JobRequest, environment: EnvironmentPlan | None) -> dict[str, str]:
        """The caller's environment under the job's own; secrets come later, by the handover."""
        paths = self._store.paths
        variables = {name: value for name, value in os.environ.items() if name not in _JOB_VARIABLES}
        variables.setdefault("PYTHONUNBUFFERED", "1")  # a log that can be followed; the job's own env may undo it
        variables.update(request.env.env)
        first = [f"{environment.directory}/bin" if environment else str(_shims(paths.shims, self._python))]
        scripts = Path(self._python).absolute().parent
        if (scripts.parent / "pyvenv.cfg").exists():
            first.append(str(scripts))
        variables["PATH"] = os.pathsep.join([*first, variables.get("PATH") or os.defpath])
        # First, since the job is to see the client's version of Fray, whatever its own environment holds.
        light = _light_part(paths.light)
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [light, variables.get("PYTHONPATH")]))
        variables["FRAY_JOB_ID"] = request.job_id
        variables["FRAY_OUTPUT_DIR"] = str(paths.job(request.job_id).outputs)
        variables["FRAY_JOB_CONTEXT"] = "local"
        variables["FRAY_CLUSTER"] = self.spec
        return variables


def _preparer_command(setup: int) -> list[str]:
    """The preparer sees the client's own modules, and nothing of the job's environment reaches into it."""
    paths = json.dumps([each for each in sys.path if each])
    program = f"import sys; sys.path[:] = {paths}; from fray.backend.local._prepare import main; main({setup})"
    return [sys.executable, "-I", "-c", program]


@cache
def _light_part(directory: Path) -> str:
    return str(write_light_part(directory))


@cache
def _compiled_runner(directory: Path) -> Path:
    """Return the runner compiled for this Python: compiling it anew for each job would double its start."""
    source = runner_source()
    stat = source.stat()
    target = directory / f"{sys.implementation.cache_tag}-{stat.st_mtime_ns}-{stat.st_size}.pyc"
    if not target.exists():
        import py_compile

        try:
            # Into a name of its own and renamed by py_compile: a killed client leaves no half of it.
            py_compile.compile(str(source), str(target), doraise=True)
        except OSError:
            return source
    return target


@cache
def _shims(directory: Path, python: str) -> Path:
    """Return a directory whose `python` and `python3` are `python`.

    Scripts, not links: through a link a virtual environment's Python would not find its environment.
    """
    script = f'#!/bin/sh\nexec {shlex.quote(os.path.abspath(python))} "$@"\n'
    import hashlib

    place = directory / hashlib.sha256(script.encode()).hexdigest()[:16]
    if place.is_dir():
        return place
    staging = directory / f".{secrets.token_hex(8)}"
    staging.mkdir(mode=0o700)
    for name in ("python", "python3"):
        (staging / name).write_text(script)
        (staging / name).chmod(0o700)
    try:
        os.rename(staging, place)
    except OSError:
        shutil.rmtree(staging)
        if not place.is_dir():
            raise
    return place


def _copy(origin: Path, copy: Path) -> None:
    """Copy a file or a link, replacing what is there in one step."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{secrets.token_hex(8)}.part")
    try:
        shutil.copy2(origin, temporary, follow_symlinks=False)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _owner() -> str:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such entry in the user database: a container's bare number
        user = str(os.getuid())
    return f"{user}@{platform.node()}"
