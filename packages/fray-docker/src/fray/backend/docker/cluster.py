"""`DockerClusterContext`: jobs as containers of a docker engine, with Fray's guarantees.

The engine is the only store: every client of it finds every job. A job whose image is there is created and started;
one whose image has to be pulled or built is prepared by a process that outlives the client (`_prepare`), with a holder
in the engine that stands for it meanwhile (`_holder`). In both the command runs under Fray's static runner.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fray.backend.docker._options import ContainerOptions, Mount, read_mounts
from fray.cluster import Capabilities, ClusterContext, JobPlan, JobRequest
from fray.errors import InvalidTypeError, InvalidValueError, JobNotFoundError, UnsupportedError
from fray.request import check_count
from fray.types import JobInfo, JobStatus, check_seconds

if TYPE_CHECKING:
    from fray.backend.docker._record import Container, KnownJob
    from fray.backend.docker.images import ImageBuilder

__all__ = ["DockerClusterContext", "Mount"]

PullPolicy = Literal["missing", "always", "never"]

_READERS = 8
# The runner has its handlers, and a relay has decided, within milliseconds.
_SETTLE_SECONDS = 30.0
_LONGEST_WAIT_SECONDS = 60.0
_KILLED = 137


class DockerClusterContext(ClusterContext):
    """Jobs as containers of a docker engine.

    Args:
        address: The engine, as in `DOCKER_HOST` (`unix:///run/docker.sock`, `tcp://host:2376`), or the name of a
            docker context; where None, as the docker command finds it.
        grace_seconds: How long a job that is stopped has between SIGTERM and SIGKILL.
        base_image: What images are built on; `python:3.X-slim` of this interpreter's version where None.
        dockerfile: The project's own Dockerfile, below the working directory, in place of a generated one.
        target: The stage of it that is built.
        build_args: Arguments for it.
        ca_bundle: A PEM file of certificates that the image trusts too, or `system` for this machine's.
        builder: `buildkit`, `classic`, or `auto` for the better one that is there.
        repository: The name of the images that are built; `fray/` and the directory's where None.
        upload_limit_bytes: How large a working directory may be.
        pull: When an image is pulled: `missing`, `always` or `never`.
        platform: The platform of the images, such as `linux/amd64`; the engine's own where None.
        mounts: What of the engine's machine jobs see: `Mount`, `SOURCE:TARGET[:ro]`, or tables with its fields.
        network: The network that jobs are in: `bridge`, `host`, `none`, or a name; the engine's default where None.
        shm_bytes: The size of `/dev/shm`.
        request_timeout_seconds: How long the engine may take to answer a request.

    Raises:
        InvalidValueError: An option that cannot be.
        ConnectionFailedError: The engine cannot be reached.
        AuthenticationError: It refuses the credentials.
    """

    name = "docker"
    capabilities = Capabilities(
        max_retries=True,
        timeout_seconds=True,
        outputs=True,
        resource_caps=True,
        container_images=True,
        package_requirements=True,
        task_context=True,
    )

    def __init__(
        self,
        address: str | None = None,
        *,
        grace_seconds: float = 10.0,
        base_image: str | None = None,
        dockerfile: str | os.PathLike[str] | None = None,
        target: str | None = None,
        build_args: Mapping[str, str] | None = None,
        ca_bundle: str | os.PathLike[str] | None = None,
        builder: Literal["auto", "buildkit", "classic"] = "auto",
        repository: str | None = None,
        upload_limit_bytes: int = 2 * 1024**3,
        pull: PullPolicy = "missing",
        platform: str | None = None,
        mounts: Iterable[Mount | str | Mapping[str, Any]] = (),
        network: str | None = None,
        shm_bytes: int = 2 * 1024**3,
        request_timeout_seconds: float = 60.0,
    ) -> None:
        from fray.backend.docker._engine import Engine, find_endpoint
        from fray.backend.docker._toolbox import Toolbox

        if pull not in ("missing", "always", "never"):
            raise InvalidValueError(f"pull is 'missing', 'always' or 'never', not {pull!r}")
        if build_args is not None and not isinstance(build_args, Mapping):
            raise InvalidTypeError(f"build_args must map names to values, got {type(build_args).__name__}")
        if builder not in ("auto", "buildkit", "classic"):
            raise InvalidValueError(f"builder is 'auto', 'buildkit' or 'classic', not {builder!r}")
        if platform is not None and not re.fullmatch(r"linux/\w+(/\w+)?", platform):
            raise InvalidValueError(f"platform is such as linux/amd64 or linux/arm64, not {platform!r}")
        if dockerfile is None and (target or build_args):
            raise InvalidValueError("target and build_args are for a Dockerfile of your own: give dockerfile too")
        if dockerfile is not None and (base_image or ca_bundle):
            raise InvalidValueError("base_image and ca_bundle do not go with a Dockerfile of your own: say it there")
        if ca_bundle is not None and ca_bundle != "system" and not os.path.isfile(ca_bundle):
            raise InvalidValueError(f"ca_bundle: there is no file {os.fspath(ca_bundle)!r}")
        self._options = ContainerOptions(
            read_mounts(mounts),
            network,
            check_count("shm_bytes", shm_bytes),
            check_seconds("grace_seconds", grace_seconds),
        )
        self._pull: PullPolicy = pull
        self._platform = platform
        self._base_image = base_image
        self._image_options: dict[str, Any] = {
            "dockerfile": dockerfile,
            "target": target,
            "build_args": dict(build_args or {}),
        }
        self._builder_options: dict[str, Any] = {
            "ca_bundle": ca_bundle,
            "builder": builder,
            "platform": platform,
            "upload_limit_bytes": check_count("upload_limit_bytes", upload_limit_bytes),
        }
        self._repository = repository
        self._engine = Engine(find_endpoint(address), check_seconds("request_timeout_seconds", request_timeout_seconds))
        # What ends is final: it is read once.
        self._ended: dict[str, KnownJob] = {}
        self._toolbox = Toolbox(self._engine)
        self._address = address

    @property
    def spec(self) -> str:
        """`docker:` and the address of the engine, or its context's name; `docker` alone where the environment says."""
        return self.name if self._address is None else f"{self.name}:{self._address}"

    @classmethod
    def doctor(cls) -> Iterable[tuple[bool, str, str]]:
        """Look at the engine, at what can build images there, and at the space it has."""
        from fray.backend.docker._doctor import checks

        return checks()

    def close(self) -> None:
        """Release the client; jobs go on."""
        self._engine.close()

    # The seam

    def _plan(self, request: JobRequest) -> JobPlan:
        from fray.backend.docker._submit import JobImage, make_plan

        env = request.env
        if env.container_image and env.extras and env.working_dir is None:
            raise UnsupportedError("extras with a container_image need a working_dir: it has the lock they are in")
        is_built = bool(
            env.container_image is None or env.working_dir is not None or env.package_requirements or env.extras
        )
        image = JobImage(
            name=env.container_image or "",
            builder=self._image_builder(request) if is_built else None,
            pull=self._pull,
            platform=self._platform,
        )
        return make_plan(request, self._engine, self._toolbox, self._options, image)

    def _submit(self, plan: JobPlan) -> None:
        from fray.backend.docker._submit import submit

        submit(plan, self._engine, self._toolbox)

    def _get(self, job_id: str) -> JobInfo:
        return self._known(job_id).info

    def _fingerprint(self, job_id: str) -> str:
        from fray.backend.docker._start import wait_until_taken_over

        wait_until_taken_over(self._engine, job_id)
        return self._known(job_id).submission.fingerprint

    def _list(self, status: JobStatus | None, limit: int | None) -> list[JobInfo]:
        from fray.backend.docker._record import job_containers

        found: list[JobInfo] = []
        jobs = job_containers(self._engine)
        with ThreadPoolExecutor(_READERS, thread_name_prefix="fray-list") as readers:
            step = len(jobs) if limit is None else max(limit, _READERS)
            for start in range(0, len(jobs) if limit != 0 else 0, step or 1):
                for known in readers.map(lambda pair: self._read(*pair), jobs[start : start + step]):
                    if known is not None and status in (None, known.info.status):
                        found.append(known.info)
                if limit is not None and len(found) >= limit:
                    break
        return found[:limit]

    def _wait(self, job_id: str, deadline: float | None) -> JobInfo:
        from fray.backend.docker._record import LOST_WITH_ITS_CONTAINER
        from fray.supervision import lost

        last: JobInfo | None = None
        code: int | None = None
        while True:
            try:
                known = self._known(job_id)
            except JobNotFoundError:
                # Killed with its container; one that had ended by itself was purged by somebody.
                if last is not None and code == _KILLED:
                    return lost(last, LOST_WITH_ITS_CONTAINER)
                raise
            left = _LONGEST_WAIT_SECONDS if deadline is None else deadline - time.monotonic()
            if known.info.status.is_terminal or left <= 0:
                return known.info
            last = known.info
            code = self._engine.wait_for_end(known.command or known.container, min(left, _LONGEST_WAIT_SECONDS))
            if code is not None:
                # It has ended, or has not begun: the next look tells.
                time.sleep(0.002)

    def _read_logs(self, job_id: str, offset: int, follow: bool) -> Iterator[bytes]:
        from fray.backend.docker._engine import ContainerGoneError
        from fray.backend.docker._logs import read_output

        known = self._known(job_id)
        while follow and known.log is None and not known.info.status.is_terminal:
            self._engine.wait_for_end(known.container, _LONGEST_WAIT_SECONDS)
            known = self._known(job_id)
        if known.log is not None:
            try:
                yield from read_output(self._engine, known.log, offset, follow)
            except ContainerGoneError:
                raise JobNotFoundError(f"job {job_id} was removed while its log was being read") from None

    def _log_size(self, job_id: str) -> int:
        from fray.backend.docker._logs import log_size

        log = self._known(job_id).log
        return log_size(self._engine, log) if log else 0

    def _tail_offset(self, job_id: str, tail: int | None) -> int:
        from fray.backend.docker._logs import tail_offset

        if tail is None:
            return 0

        def look() -> int:
            log = self._known(job_id).log
            return tail_offset(self._engine, log, tail) if log else 0

        return self._retry(look)

    def _stop(self, job_id: str) -> None:
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            known = self._known(job_id)
            if known.info.status.is_terminal:
                return
            if known.is_supervised:
                # A holder decides at once; where it has just handed the job on, there is another to be told.
                self._engine.ask_to_stop(known.command or known.container)
                if known.command is not None:
                    return
                self._engine.wait_for_end(known.container, 1.0)
            if time.monotonic() > deadline:
                raise JobNotFoundError(f"job {job_id} has not begun and does not")
            time.sleep(0.005)

    def _purge(self, job_id: str) -> None:
        from fray.backend.docker._record import JOB_LABEL, command_name
        from fray.backend.docker._start import remove_container

        command = self._engine.inspect_container(command_name(job_id))
        is_own = command is not None and (command["Config"].get("Labels") or {}).get(JOB_LABEL) == job_id
        try:
            known = self._known(job_id)
        except JobNotFoundError:
            # An earlier call may have been cut off between the two.
            if not (command and is_own):
                raise
        else:
            # In this order: what is left without the first is nobody's job.
            remove_container(self._engine, known.container)
            self._ended.pop(known.container, None)
        if command and is_own:
            remove_container(self._engine, command["Id"])

    def _fetch_outputs(self, job_id: str, destination: Path) -> list[Path]:
        from fray.backend.docker._logs import read_start
        from fray.backend.docker._outputs import fetch_outputs

        container = self._known(job_id).command
        started = read_start(self._engine, container) if container else None
        if container is None or started is None or not started.get("outputs"):
            return []
        return fetch_outputs(self._engine, container, started["outputs"], destination)

    # Behind it

    def _known(self, job_id: str) -> KnownJob:
        from fray.backend.docker._record import JOB_LABEL, Container, job_name

        found = self._engine.inspect_container(job_name(job_id))
        if found is not None:
            container = Container.inspected(found)
            if container.labels.get(JOB_LABEL) == job_id and (known := self._read(container)) is not None:
                return known
        raise JobNotFoundError(f"there is no job {job_id} in the engine at {self._engine.endpoint.host}")

    def _read(self, container: Container, command: Container | None = None) -> KnownJob | None:
        from fray.backend.docker._record import read_job

        if container.id in self._ended:
            return self._ended[container.id]
        known = read_job(self._engine, container, command)
        if known is not None and known.info.status.is_terminal:
            self._ended[container.id] = known
        return known

    def _image_builder(self, request: JobRequest) -> ImageBuilder:
        from fray.backend.docker.images import ImageBuilder

        env = request.env
        on_given = env.container_image is not None
        return ImageBuilder(
            None if on_given and env.working_dir is None else request.directory,
            engine=self._engine,
            base_image=env.container_image or self._base_image,
            package_requirements=env.package_requirements,
            extras=env.extras,
            excludes=env.excludes,
            repository=self._repository,
            keep_user=on_given,
            asks_registry=False,  # the base is pulled in the job's PENDING time
            pull=self._pull,
            **({} if on_given else self._image_options),
            **self._builder_options,
        )
