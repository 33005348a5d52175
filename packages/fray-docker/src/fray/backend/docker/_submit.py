"""How a job gets into the engine: at once where its image is there, else by a holder and a process that prepares it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

from fray.backend.docker._attach import Attached
from fray.backend.docker._containers import (
    HANDOVER_SECONDS,
    command_container,
    holder_container,
    infeasible,
    limits,
    masked,
    with_image,
)
from fray.backend.docker._engine import Engine
from fray.backend.docker._holder import Holder
from fray.backend.docker._logs import read_events
from fray.backend.docker._options import ContainerOptions
from fray.backend.docker._prepare import READY, Preparation
from fray.backend.docker._record import Submission, job_name
from fray.backend.docker._settings import index_settings
from fray.backend.docker._start import (
    ImageGoneError,
    LackingError,
    create_container,
    removed_unless_done,
    start_container,
)
from fray.backend.docker._toolbox import Toolbox
from fray.cluster import JobPlan, JobRequest
from fray.detached import program, reap_launchers, start_detached
from fray.errors import InvalidValueError, SubmissionError, UnsupportedError
from fray.request import current_owner
from fray.supervision import encode_handover
from fray.types import TerminationReason

if TYPE_CHECKING:
    from fray.backend.docker.images import ImageBuilder, ImagePlan

__all__ = ["JobImage", "make_plan", "submit"]


@dataclass(frozen=True)
class JobImage:
    """Which image a job runs in.

    Attributes:
        name: The one that was named; empty where none was.
        builder: What builds the job's own, on top of the named one if there is one; None where that is run as it is.
        pull: When a named one is pulled.
        platform: Its platform; None for the engine's own.
    """

    name: str
    builder: ImageBuilder | None
    pull: Literal["missing", "always", "never"]
    platform: str | None


@dataclass(frozen=True)
class _Details:
    """What goes from the plan to the submission.

    Attributes:
        present: The image by its inspection; None where it has to be pulled or built.
        lacking: What the machine will never have; empty where it has all.
        native: Makes the request for the command's container.
    """

    image: JobImage
    present: dict[str, Any] | None
    lacking: str
    submission: Callable[[bool], Submission]
    native: Callable[[Submission], dict[str, Any]]


def make_plan(
    request: JobRequest, engine: Engine, toolbox: Toolbox, options: ContainerOptions, image: JobImage
) -> JobPlan:
    """Plan a job; nothing is done in the engine."""
    env = request.env
    limits(env.minimum_resources, env.maximum_resources)
    asked = [*env.minimum_resources, *env.maximum_resources]
    if asked:
        _check_limits(engine, {each.name for each in asked if each.quantity})
    _check_network(engine, options.network)
    build: ImagePlan | None = None
    name = image.builder.tag() if image.builder else image.name
    present = engine.inspect_image(name)
    if image.builder is not None:
        # What is there need not be planned, which asks uv and looks for a docker command.
        build = image.builder.plan() if present is None else None
        name = build.tag if build else name
    elif present is None and image.pull == "never":
        raise InvalidValueError(
            f"container_image: the engine at {engine.endpoint.host} has no {name!r}, and pull is 'never': pull it, "
            "or leave that to Fray (pull='missing')"
        )
    elif image.pull == "always":
        present = None

    submitted_ns = time.time_ns()

    def submission(prepares: bool) -> Submission:
        return Submission(
            submitted_ns,
            request.entrypoint,
            current_owner(),
            request.fingerprint,
            request.metadata,
            prepares,
            hands_over=bool(env.secrets) and not prepares,
        )

    def native(of: Submission) -> dict[str, Any]:
        return command_container(request, of, options, toolbox, name, engine.info.get("NCPU") if asked else None)

    container = native(submission(present is None))
    shown = {
        "name": job_name(request.job_id),
        "container": masked(container if present is None else with_image(container, name, present)),
        "prepares": "" if present is not None else ("build" if build else "pull"),
        **({"platform": image.platform} if image.platform else {}),
        **({"dockerfile": build.dockerfile, "builder": build.builder} if build else {}),
    }
    details = _Details(
        image,
        present,
        infeasible(env.minimum_resources, engine.info) if asked else "",
        submission,
        native,
    )
    upload = build.context_bytes if build else None
    return JobPlan("docker", request, shown, upload, name, details)


def submit(plan: JobPlan, engine: Engine, toolbox: Toolbox) -> None:
    """Have the engine accept the job that was planned."""
    details: _Details = plan.details
    request = plan.request
    if details.lacking:
        _submit_infeasible(request.job_id, details, details.lacking, engine, toolbox)
        return
    toolbox.ensure_volume()
    if details.present is not None:
        try:
            _submit_at_once(request, details, engine)
            return
        except LackingError as error:
            _submit_infeasible(request.job_id, details, str(error), engine, toolbox)
            return
        except ImageGoneError:
            pass  # removed since it was looked for
    _submit_prepared(request, details, engine, toolbox)


def _submit_at_once(request: JobRequest, details: _Details, engine: Engine) -> None:
    native = details.native(details.submission(False))
    assert details.present is not None
    container = create_container(
        engine, job_name(request.job_id), with_image(native, native["Image"], details.present), details.image.platform
    )
    with removed_unless_done(engine, container) as done:
        if not request.env.secrets:
            start_container(engine, container)
            done()
            return
        with Attached(engine, container) as stdin:
            start_container(engine, container)
            stdin.send(encode_handover(request.env.secrets))
            stdin.finish()
        _wait_until_begun(engine, container, request.job_id)
        done()


def _wait_until_begun(engine: Engine, container: str, job_id: str) -> None:
    """Return once the runner has what it was sent, and so the job counts."""
    give_up, pause = time.monotonic() + HANDOVER_SECONDS, 0.001
    while True:
        events = read_events(engine, container)
        if any(event.get("abandoned") for event in events) or time.monotonic() > give_up:
            raise SubmissionError(f"job {job_id} did not get its secrets: the connection to its container was lost")
        if any(event["event"] != "supervised" for event in events):
            return
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _submit_infeasible(job_id: str, details: _Details, message: str, engine: Engine, toolbox: Toolbox) -> None:
    submission = details.submission(True)
    container = _create_holder(job_id, submission, engine, toolbox)
    with removed_unless_done(engine, container) as done:
        with Holder(engine, container, submission.submission_time) as holder:
            holder.end(TerminationReason.INFEASIBLE, message)
            holder.wait_until_known()
        done()


def _submit_prepared(request: JobRequest, details: _Details, engine: Engine, toolbox: Toolbox) -> None:
    submission = details.submission(True)
    with tempfile.TemporaryFile(prefix="fray-context-") as context:
        builder = details.image.builder
        # By its descriptor, so that the file is gone with the last process that has it, however that ends.
        build = builder.freeze(f"/dev/fd/{context.fileno()}").as_dict() if builder else None
        holder = _create_holder(request.job_id, submission, engine, toolbox)
        with removed_unless_done(engine, holder) as done:
            preparation = Preparation(
                endpoint=engine.endpoint,
                timeout_seconds=engine.timeout_seconds,
                job_id=request.job_id,
                holder=holder,
                not_before=submission.submission_time,
                native=details.native(submission),
                image=None if builder else details.image.name,
                build=build,
                platform=details.image.platform,
                handover=encode_handover(request.env.secrets),
                settings=index_settings() if builder else {},
            )
            _start_preparing(preparation, context, request)
            done()


def _start_preparing(preparation: Preparation, context: IO[bytes], request: JobRequest) -> None:
    """Start the process, and return once it has the holder in hand, and with that the job is accepted."""
    environment = {name: value for name, value in os.environ.items() if name not in request.env.secrets}
    said, said_end = os.pipe()
    with open(said, "rb") as words:
        try:
            handover = start_detached(
                program("fray.backend.docker._prepare"),
                environment=environment,
                keep_fds=[context.fileno()],
                stderr=said_end,
            )
        finally:
            os.close(said_end)
        with open(handover, "wb") as stdin:
            try:
                stdin.write(preparation.encode())
                stdin.flush()
            except BrokenPipeError:
                pass  # what it says tells why
        answer = words.read(len(READY))
        reap_launchers()  # it left its starter behind before it spoke
        if answer != READY:
            trouble = (answer + words.read()).decode(errors="replace").strip()
            raise SubmissionError(f"the process that prepares job {preparation.job_id} did not start: {trouble}")


def _create_holder(job_id: str, submission: Submission, engine: Engine, toolbox: Toolbox) -> str:
    native = holder_container(job_id, submission, toolbox)
    while True:
        toolbox.ensure_image()
        try:
            return create_container(engine, job_name(job_id), native)
        except ImageGoneError:
            continue  # pruned in between


def _check_network(engine: Engine, network: str | None) -> None:
    if network is None or network in ("bridge", "default", "host", "none") or network.startswith("container:"):
        return
    with engine.errors():
        known = [each["Name"] for each in engine.api.networks(names=[network])]
    if network not in known:
        raise InvalidValueError(
            f"network: the engine at {engine.endpoint.host} has no {network!r} (`docker network ls` shows them)"
        )


def _check_limits(engine: Engine, kinds: set[str]) -> None:
    """Refuse a limit that the engine's kernel does not enforce, which the engine itself would drop with a warning."""
    enforced = {"memory": engine.info.get("MemoryLimit"), "CPU": engine.info.get("CpuCfsQuota")}
    for kind in kinds:
        if enforced.get(kind) is False:
            raise UnsupportedError(f"the engine at {engine.endpoint.host} cannot limit {kind}: its kernel does not")
