"""`RayClusterContext`: jobs on a Ray cluster, through its Jobs API, with Fray's guarantees.

A job is one of Ray's, with an entrypoint of Fray's around the command (`_entrypoint`): it shows up in Ray's dashboard,
and all that is to be known of it is in Ray's own record. Submitting needs HTTP alone and starts no Ray runtime here.
"""

from __future__ import annotations

import logging
import os
import secrets
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fray.backend.ray._addresses import Headers, find_dashboard, headers_of
from fray.backend.ray._runtime_env import Installer, build_ray_runtime_env, split_resources
from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.errors import (
    ConnectionFailedError,
    InvalidTypeError,
    InvalidValueError,
    JobExistsError,
    JobNotFoundError,
    PlatformError,
    SubmissionError,
    UnsupportedError,
)
from fray.request import current_owner
from fray.types import JobInfo, JobStatus, RuntimeEnv, TpuRunConfig, check_seconds

if TYPE_CHECKING:
    from fray.backend.ray._local_ray import LocalRay
    from fray.backend.ray._packages import Package
    from fray.backend.ray._record import KnownJob
    from fray.backend.ray._rest import RayRest

__all__ = ["RayClusterContext"]

UPLOAD_LIMIT_BYTES = 100 * 1024 * 1024
"""What Ray's Jobs API takes at once."""

_KNOWN_RESOURCES = ("CPU", "GPU", "memory", "TPU")
# Ray puts what `py_modules` names first on the path. Isolated, so that no file of the user's stands in for a module.
_ENTRYPOINT = 'exec python3 -I -S "${PYTHONPATH%%:*}/fray_entrypoint.py" '
# Ray sends SIGKILL so long after the runner should have been done.
_STOP_MARGIN_SECONDS = 20
# A record without a supervisor that is older than this was left behind by a submission that was cut off.
_ORPHAN_SECONDS = 20.0
_SETTLE_SECONDS = 30.0
# How long a job is looked for whose submission got no answer.
_LOOK_SECONDS = 3.0


class RayClusterContext(ClusterContext):
    """Jobs on a Ray cluster.

    Args:
        address: The cluster: its dashboard (`http://head:8265`), its head (`head:6379`), or `auto` for the one that
            runs on this machine. Where neither this nor `dashboard_address` nor `RAY_API_SERVER_ADDRESS` nor
            `RAY_ADDRESS` is there, a Ray is started on this machine, shared by all of this process that ask for one,
            and ended by `close()` of the instance that started it.
        dashboard_address: The dashboard, where `address` is the head's.
        grace_seconds: How long a job that is stopped has between SIGTERM and SIGKILL.
        headers: Sent with each request, or a function that is asked for them each time.
        cookies: Sent with each request.
        verify: Whether to check the server's certificate, or the path of the CA to check it by.
        token_file: Read for each request, if the cluster asks for a token; see the documentation for other places.
        request_timeout_seconds: How long the cluster may take to answer a request.
        setup_timeout_seconds: How long a job's packages may take to install.
        installer: Which of Ray's plugins installs `package_requirements`: `uv`, or `pip`.
        autoscaled_resources: Custom resources that no node has yet and an autoscaler can bring.
        tpu_environment: Variables that `run_on_tpu` sets on each host unless the user has, such as `LIBTPU_INIT_ARGS`.

    Raises:
        InvalidValueError: An address or an option that cannot be.
        ConnectionFailedError: The cluster cannot be reached.
        AuthenticationError: It refuses the credentials.
    """

    name = "ray"
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
        address: str | None = None,
        dashboard_address: str | None = None,
        *,
        grace_seconds: float = 10.0,
        headers: Headers | None = None,
        cookies: Mapping[str, str] | None = None,
        verify: bool | str = True,
        token_file: str | os.PathLike[str] | None = None,
        request_timeout_seconds: float = 30.0,
        setup_timeout_seconds: float = 1800.0,
        installer: Installer = "uv",
        autoscaled_resources: Sequence[str] = (),
        tpu_environment: Mapping[str, str] | None = None,
    ) -> None:
        if installer not in ("uv", "pip"):
            raise InvalidValueError(f"installer is 'uv' or 'pip', not {installer!r}")
        if isinstance(autoscaled_resources, str):
            raise InvalidTypeError("autoscaled_resources must be a list of names")
        if isinstance(verify, str) and not os.path.exists(verify):
            raise InvalidValueError(f"verify: there is no CA at {verify!r}")
        self._address = address
        self._grace_seconds = check_seconds("grace_seconds", grace_seconds)
        self._setup_timeout_seconds = check_seconds("setup_timeout_seconds", setup_timeout_seconds)
        self._installer: Installer = installer
        self._autoscaled = tuple(autoscaled_resources)
        # Checked as what it is: variables of an environment.
        self._tpu_environment = dict(RuntimeEnv(env=dict(tpu_environment or {})).env)
        self._local: LocalRay | None = None
        # What is being waited for, as it stood: a head that is started anew knows nothing of it.
        self._awaited: dict[str, JobInfo] = {}
        dashboard = find_dashboard(address, dashboard_address)
        timeout = check_seconds("request_timeout_seconds", request_timeout_seconds)
        ask_headers = headers_of(headers, token_file)
        if dashboard is None:
            from fray.backend.ray._local_ray import LocalRay

            self._local = LocalRay.shared()
            dashboard = self._local.dashboard
        self._rest = _connect(dashboard, headers=ask_headers, cookies=cookies, verify=verify, timeout_seconds=timeout)

    @property
    def spec(self) -> str:
        """`ray:` and the address of the dashboard."""
        return f"{self.name}:{self._rest.address}"

    @classmethod
    def doctor(cls) -> Iterable[tuple[bool, str, str]]:
        """Check the version of Ray, and say which cluster is meant where none is named."""
        from fray.backend.ray._doctor import checks

        return checks()

    def close(self) -> None:
        """Release the client; jobs go on, unless this instance started the local Ray that they run on.

        Those are ended with it; where there are any, a `RuntimeWarning` says so.
        """
        if self._local is not None:
            local, self._local = self._local, None
            try:
                if local.is_own and (running := self._unfinished()):
                    import warnings

                    warnings.warn(
                        f"the local Ray that was started here ends, and with it {', '.join(running)}: to have jobs go "
                        "on, start a Ray that stays (`ray start --head`), or keep this client open",
                        RuntimeWarning,
                        stacklevel=2,
                    )
            finally:
                local.release()
        self._rest.close()

    def run_on_tpu(
        self, fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None = None
    ) -> list[Any]:
        """Call `fn(ctx)` once on every host of every slice; return the results slice by slice, in host order.

        All slices are held before any host begins, and all hosts begin together, each in a process of its own that
        ends after the call. What a host prints is printed here, behind `[slice 0, host 1] `. See the page "TPU pods" of
        the documentation for what is started again, and how often.

        Args:
            fn: Pickled with its closure, once.
            config: Which slices, how many, and the budgets.
            runtime_env: `env`, `secrets`, `package_requirements` and `working_dir` (with `excludes`) for the function's
                processes; `minimum_resources` of each host beside its chips.

        Raises:
            Exception: What `fn` raised, past the budget of failures, or where it can be seen that it will again.
            HostFailedError: A host's process crashed or hung, so often.
            PreemptedError: Slices were taken away more often than is made good.
            StockoutError: They did not come within `config.wait_seconds`; nothing is held.
            PlatformError: The function cannot be brought to run on the hosts, or Ray cannot be joined.
            UsageError: What cannot be, before anything is done.
        """
        from fray.backend.ray import ray_tpu
        from fray.backend.ray._packages import fray_package, make_package
        from fray.snapshot import collect, write_zip

        ray_tpu.check_run(fn, config, runtime_env)
        self._join()
        native: dict[str, Any] = {
            "py_modules": [fray_package().uri],
            "config": {"setup_timeout_seconds": int(self._setup_timeout_seconds)},
        }
        self._upload(fray_package())
        if runtime_env is not None and runtime_env.working_dir is not None:
            files = collect(Path(runtime_env.working_dir), runtime_env.excludes)
            package = make_package(write_zip(files, UPLOAD_LIMIT_BYTES))
            self._upload(package)
            native["working_dir"] = package.uri
        return ray_tpu.run_on_tpu(
            fn,
            config,
            runtime_env,
            defaults=self._tpu_environment,
            setup_seconds=self._setup_timeout_seconds,
            grace_seconds=self._grace_seconds,
            native=native,
        )

    # The seam

    def _plan(self, request: JobRequest) -> JobPlan:
        from fray.backend.ray._entrypoint import JOURNAL_KEY, SUBMISSION_KEY
        from fray.backend.ray._packages import fray_package, make_package
        from fray.backend.ray._record import ERRAND_KEY
        from fray.snapshot import collect, write_zip

        env = request.env
        for key in (SUBMISSION_KEY, JOURNAL_KEY, ERRAND_KEY):
            if key in request.metadata:
                raise InvalidValueError(f"metadata: {key!r} is Fray's own")
        resources = {each.name: each.quantity for each in env.minimum_resources if each.quantity}
        self._check_resources(resources)
        arguments, others = split_resources(resources)
        package = make_package(write_zip(collect(request.directory, env.excludes), UPLOAD_LIMIT_BYTES))
        runtime_env = self._runtime_env(request)
        runtime_env["working_dir"] = package.uri
        runtime_env["py_modules"] = [fray_package().uri]
        native: dict[str, Any] = {
            "submission_id": request.job_id,
            "entrypoint": _ENTRYPOINT + shlex.quote(request.entrypoint),
            "runtime_env": runtime_env,
            "metadata": dict(request.metadata),
            **{f"entrypoint_{name}": quantity for name, quantity in arguments.items()},
        }
        if others:
            native["entrypoint_resources"] = others
        shown = {**native, "runtime_env": {**runtime_env, "env_vars": env.masked().get("env", {})}}
        return JobPlan(self.name, request, shown, len(package.content), details=(native, package))

    def _submit(self, plan: JobPlan) -> None:
        from fray.backend.ray._entrypoint import SUBMISSION_KEY
        from fray.backend.ray._internals import is_tested
        from fray.backend.ray._packages import fray_package
        from fray.backend.ray._record import Submission
        from fray.supervision import encode_handover

        native, package = plan.details
        request: JobRequest = plan.request
        hidden = request.env.secrets
        submission = Submission(
            nonce=secrets.token_hex(8),
            submitted_ns=time.time_ns(),
            entrypoint=request.entrypoint,
            owner=current_owner(),
            fingerprint=request.fingerprint,
            runner=_runner_options(request, self._grace_seconds),
            resources={each.name: each.quantity for each in request.env.minimum_resources if each.quantity},
            exact={name: value for name, value in request.env.env.items() if "$" in value},
            plain=is_tested(self._rest.ray_version),
            stop=f"fray-stop-{secrets.token_hex(24)}",
            secrets=f"fray-secrets-{secrets.token_hex(24)}" if hidden else None,
        )
        for each in (package, fray_package()):
            self._upload(each)
        if submission.secrets:
            self._rest.put(submission.secrets, encode_handover(hidden).split(b"\n", 1)[1])
        metadata = {**native["metadata"], SUBMISSION_KEY: submission.as_json()}
        try:
            self._post({**native, "metadata": metadata}, submission)
        except BaseException:
            if submission.secrets:
                self._discard(submission.secrets)
            raise

    def _get(self, job_id: str) -> JobInfo:
        job = self._known(job_id)
        info = self._pending_info(job) if job.info.status is JobStatus.PENDING else job.info
        if info.status.is_terminal:
            self._awaited.pop(job_id, None)
        else:
            self._awaited[job_id] = info
        return info

    def _wait(self, job_id: str, deadline: float | None) -> JobInfo:
        try:
            info = super()._wait(job_id, deadline)
        except JobNotFoundError:
            last = self._awaited.pop(job_id, None)
            if last is None or not self._rest.has_restarted():
                raise
            from fray.supervision import lost

            return lost(last, "the head of the Ray cluster was started anew, and has forgotten its jobs")
        self._awaited.pop(job_id, None)
        return info

    def _fingerprint(self, job_id: str) -> str:
        submission = self._known(job_id).submission
        return submission.fingerprint if submission else ""

    def _list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        from fray.backend.ray._errands import is_hidden, sweep
        from fray.backend.ray._record import read_job

        found = self._rest.jobs()
        sweep(self._rest, found)
        jobs = [read_job(details) for details in found if not is_hidden(details)]
        jobs.sort(
            key=lambda job: (job.info.submission_time, job.submission.submitted_ns if job.submission else 0),
            reverse=True,
        )
        infos = [job.info for job in jobs if status is None or job.info.status is status]
        return infos[:limit]

    def _read_logs(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        from fray.backend.ray._logs import read_log

        try:
            yield from read_log(self._rest, lambda: self._known(job_id), offset, follow)
        except JobNotFoundError:
            # A log that is followed ends with its head; that the job is lost is for `wait` to tell.
            if not (follow and self._rest.has_restarted()):
                raise

    def _log_size(self, job_id: str) -> int:
        from fray.backend.ray._logs import log_size

        return log_size(self._rest, self._known(job_id))

    def _stop(self, job_id: str) -> None:
        from fray.backend.ray._errands import drop_pending

        job = self._known(job_id)
        if job.info.status.is_terminal or job.is_over_for_ray:
            return
        if job.submission is None:
            self._rest.stop(job_id)
            return
        # First the mark, then Ray's own request: a job that did not see the one is there to hear the other.
        if job.info.status is JobStatus.PENDING:
            self._rest.put(job.submission.stop, b"stop")
        self._rest.stop(job_id)
        # One that waits for nothing but its turn starts in a moment, finds the mark, and ends.
        if job.submission.resources or _installs_packages(job):
            job = self._known(job_id)
            if job.details.status == "PENDING":
                drop_pending(self._rest, job)

    def _purge(self, job_id: str) -> None:
        from fray.backend.ray._errands import remove_files, seconds_until_deletable

        deadline, pause = time.monotonic() + _SETTLE_SECONDS, 0.02
        while not (job := self._known(job_id)).is_over_for_ray:
            # The runner has reported the end, and Ray is about to notice.
            if time.monotonic() > deadline:
                raise PlatformError(
                    f"job {job_id} is over, and Ray still calls it {job.details.status}: purge it later"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        node = job.details.driver_node_id
        if job.submission is not None and node and self._rest.has_node(node):
            remove_files(self._rest, job)
        time.sleep(seconds_until_deletable(job.details))
        self._rest.delete(job_id)

    def _fetch_outputs(self, job_id: str, destination: Path) -> list[Path]:
        from fray.backend.ray._outputs import fetch_outputs

        return fetch_outputs(self._rest, self._known(job_id), destination)

    # Behind it

    def _join(self) -> None:
        """Have this process belong to the cluster, as its driver; refuse one that belongs to another."""
        import ray

        if not ray.is_initialized():
            try:
                ray.init(address=self._head_address(), logging_level=logging.WARNING)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConnectionFailedError(
                    f"this process cannot join the Ray cluster of {self.spec}: {error}; run_on_tpu is for processes on "
                    "its machines, such as its jobs: submit one that calls it (`fray run -c ray -- python train.py`)"
                ) from error
        from fray.backend.ray._internals import current_session

        session = current_session()
        if session != self._rest.session:
            raise UnsupportedError(
                f"this process belongs to another Ray cluster (session {session}) than {self.spec} (session "
                f"{self._rest.session}): run_on_tpu is called from a process that belongs to none, or to that one"
            )

    def _head_address(self) -> str:
        if self._local is not None:
            return self._local.address
        if self._address is not None and not self._address.startswith(("http://", "https://")):
            return self._address
        return "auto"

    def _unfinished(self) -> list[str]:
        with suppress(PlatformError):
            return [info.id for info in self._list(None, None) if not info.status.is_terminal]
        return []

    def _known(self, job_id: str) -> KnownJob:
        from fray.backend.ray._errands import is_hidden
        from fray.backend.ray._record import read_job

        details = self._rest.job(job_id)
        if is_hidden(details):
            raise JobNotFoundError(f"there is no job {job_id} on {self.spec}")
        return read_job(details)

    def _runtime_env(self, request: JobRequest) -> dict[str, Any]:
        env = request.env
        if env.extras:
            from fray.backend.ray.ray_deps import build_runtime_env_for_packages

            built = build_runtime_env_for_packages(
                extra=env.extras,
                pip_packages=env.package_requirements,
                env_vars=env.env,
                project=request.directory,
                installer=self._installer,
            )
        else:
            built = build_ray_runtime_env(env, installer=self._installer)
        # Ray's own three seconds would cut short the grace that the runner gives.
        stop_wait = str(int(self._grace_seconds) + _STOP_MARGIN_SECONDS)
        built["env_vars"] = {"RAY_JOB_STOP_WAIT_TIME_S": stop_wait, **built.get("env_vars", {})}
        built["config"] = {"setup_timeout_seconds": int(self._setup_timeout_seconds)}
        return built

    def _check_resources(self, resources: dict[str, float]) -> None:
        """Refuse kinds of resources that the cluster does not know."""
        unknown = [name for name in resources if name not in _KNOWN_RESOURCES and name not in self._autoscaled]
        if not unknown:
            return
        known = {name for node in self._rest.resources()[1] for name in node}
        for name in unknown:
            if name not in known:
                custom = sorted(each for each in known - {*_KNOWN_RESOURCES} if not each.startswith("node:"))
                raise UnsupportedError(
                    f"no node of {self.spec} has the resource {name!r}; there are: "
                    f"{', '.join([*_KNOWN_RESOURCES, *custom])}; one that an autoscaler can bring is named by the "
                    "option autoscaled_resources"
                )

    def _upload(self, package: Package) -> None:
        if not self._rest.has(package.name):
            self._rest.put(package.name, package.content)

    def _post(self, native: dict[str, Any], submission: Any) -> None:
        from fray.backend.ray._errands import drop_ghost
        from fray.backend.ray._rest import HttpError

        job_id = native["submission_id"]
        try:
            self._rest.submit(**native)
        except HttpError as error:
            if "already exists" in error.text:
                if drop_ghost(self._rest, job_id):
                    self._post(native, submission)
                    return
                raise JobExistsError(f"job {job_id} exists on {self.spec}: choose another job_id") from None
            raise SubmissionError(f"job {job_id} was not accepted: {error}") from error
        except ConnectionFailedError as error:
            # Whether it was accepted is to be seen by what is there, now or in a moment.
            give_up = time.monotonic() + _LOOK_SECONDS
            while True:
                try:
                    job = self._retry(lambda: self._known(job_id))
                    break
                except JobNotFoundError:
                    if time.monotonic() > give_up:
                        with suppress(PlatformError):  # should it be accepted after all, it is not to run
                            self._rest.put(submission.stop, b"stop")
                        raise SubmissionError(f"job {job_id} was not accepted: {error}") from error
                time.sleep(0.2)
            if job.submission is None or job.submission.nonce != submission.nonce:
                raise JobExistsError(f"job {job_id} exists on {self.spec}: choose another job_id") from None

    def _discard(self, name: str) -> None:
        with suppress(PlatformError):  # it went with the cluster, or lies in its memory under a name that nobody knows
            self._rest.has(name)  # asking for it has Ray remove it after some minutes

    def _pending_info(self, job: KnownJob) -> JobInfo:
        """Say what a job waits for; settle one whose submission was cut off."""
        from dataclasses import replace

        from fray.backend.ray._internals import supervisor_name
        from fray.types import TerminationReason

        if job.details.status != "PENDING":
            return job.info
        age = time.time() - job.info.submission_time
        if age > _ORPHAN_SECONDS and not self._rest.has_actor(supervisor_name(job.info.id)):
            job = self._known(job.info.id)  # it may have come to something meanwhile
            if job.details.status != "PENDING":
                return job.info
            return replace(
                job.info,
                status=JobStatus.FAILED,
                end_time=job.info.submission_time,
                reason=TerminationReason.LOST,
                message="its submission was cut off before Ray had anybody to run it",
            )
        return replace(job.info, message=self._why_pending(job))

    def _why_pending(self, job: KnownJob) -> str:
        asked = job.submission.resources if job.submission else {}
        installs = "its packages to be installed" if _installs_packages(job) else ""
        if not asked:
            return f"waiting for {installs or 'Ray to start it'}"
        usage, nodes = self._rest.resources()
        said = []
        for name, quantity in asked.items():
            used, total = usage.get(name, [0.0, 0.0])
            most = max([node.get(name, 0.0) for node in nodes], default=0.0)
            if most < quantity:
                said.append(f"{quantity:g} {name}: no node has so much (the largest has {most:g})")
            elif total - used < quantity:
                said.append(f"{quantity:g} {name} ({used:g} of {total:g} in use)")
        return f"waiting for {', '.join(said) or installs or 'Ray to start it'}"


def _installs_packages(job: KnownJob) -> bool:
    env = job.details.runtime_env or {}
    return bool(env.get("uv") or env.get("pip"))


def _connect(dashboard: str, **options: Any) -> RayRest:
    from fray.backend.ray._rest import RayRest

    return RayRest(dashboard, **options)


def _runner_options(request: JobRequest, grace_seconds: float) -> list[str]:
    """What the runner is told by the client; the entrypoint adds what is known on the node alone."""
    options = ["--grace", str(grace_seconds)]
    if request.timeout_seconds is not None:
        options += ["--timeout", str(request.timeout_seconds)]
    if request.max_retries:
        options += ["--retries", str(request.max_retries)]
    return options
