"""Creating and starting a job's containers, such that a client that is killed on the way leaves nobody's job behind.

A container's name is the job's id: of clients that race for it one wins. Until its runner has taken the job over
(`_record`) it stands for no job; one that a killed client left in that state is removed by the next that wants its
name.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

from docker.errors import APIError, ImageNotFound, NotFound
from fray.backend.docker._engine import Engine
from fray.backend.docker._record import JOB_LABEL, Container, job_name, read_job
from fray.backend.docker._toolbox import Toolbox, is_missing_runner
from fray.errors import JobExistsError, JobNotFoundError, PlatformError, SubmissionError

__all__ = [
    "ImageGoneError",
    "LackingError",
    "create_container",
    "remove_container",
    "removed_unless_done",
    "start_container",
    "wait_until_taken_over",
]

# A client that has not started its job after so long is not going to.
_STALE_SECONDS = 60.0
_FILLINGS = 3
_DEVICES = re.compile(r"could not select device driver|nvidia-container-cli|CDI device", re.IGNORECASE)


class ImageGoneError(Exception):
    """The image that a container was to be made from is not there any more."""


class LackingError(Exception):
    """The engine's machine does not have a device that the job asks for."""


def create_container(engine: Engine, name: str, native: Mapping[str, Any], platform: str | None = None) -> str:
    """Create a container and return its id.

    Raises:
        JobExistsError: The name is taken by a job.
        ImageGoneError: Its image is not there.
        SubmissionError: The engine does not take the request.
    """
    while True:
        with engine.errors():
            try:
                created: str = engine.api.create_container_from_config(dict(native), name, platform)["Id"]
                return created
            except ImageNotFound as error:
                raise ImageGoneError(native["Image"]) from error
            except APIError as error:
                if error.status_code == 404 and "No such image" in str(error.explanation):
                    raise ImageGoneError(native["Image"]) from error
                if error.status_code != 409:
                    raise SubmissionError(
                        f"the engine at {engine.endpoint.host} does not take the job: {error.explanation}"
                    ) from error
        _make_way(engine, name)


def start_container(engine: Engine, container: str) -> None:
    """Start a container; where the volume with its runner is empty, fill it first.

    Raises:
        LackingError: It lacks a device.
        SubmissionError: It cannot be started for another reason.
    """
    for filling in range(_FILLINGS):
        with engine.errors():
            try:
                engine.api.start(container)
                return
            except APIError as error:
                if _DEVICES.search(str(error.explanation)):
                    raise LackingError(
                        f"the engine's machine does not have the GPUs that are asked for: {error.explanation}"
                    ) from error
                if not is_missing_runner(error) or filling == _FILLINGS - 1:
                    raise SubmissionError(
                        f"the engine at {engine.endpoint.host} cannot start the job: {error.explanation}"
                    ) from error
        Toolbox(engine).fill_volume()


def remove_container(engine: Engine, container: str) -> None:
    """Remove a container with all that is its own, whatever it does; nothing where there is none."""
    with engine.errors(), suppress(NotFound):
        try:
            engine.api.remove_container(container, v=True, force=True)
        except APIError as error:
            if error.status_code != 409:  # somebody else is removing it
                raise


@contextmanager
def removed_unless_done(engine: Engine, container: str) -> Iterator[Callable[[], None]]:
    """Remove a container at the end of the block, unless what it gives was called by then."""
    is_done = False

    def done() -> None:
        nonlocal is_done
        is_done = True

    try:
        yield done
    finally:
        if not is_done:
            with suppress(PlatformError):  # what is left behind is nobody's job, and whatever went wrong says more
                remove_container(engine, container)


def _make_way(engine: Engine, name: str) -> None:
    """Remove what a killed client left under a name, or raise `JobExistsError`."""
    found = engine.inspect_container(name)
    if found is None:
        return
    container = Container.inspected(found)
    taken = JobExistsError(
        f"job {container.labels.get(JOB_LABEL, name)} exists in the engine at {engine.endpoint.host}: choose another "
        "job_id, or adopt it"
    )
    _check_is_frays(container, name)
    if not container.is_over and not _is_stale(engine, container):
        raise taken
    if read_job(engine, container) is not None:
        raise taken
    remove_container(engine, container.id)


def _check_is_frays(container: Container, name: str) -> None:
    if container.labels.get(JOB_LABEL) is None:
        raise JobExistsError(f"a container that is none of Fray's has the name {name}: remove it, or choose another id")


def wait_until_taken_over(engine: Engine, job_id: str) -> None:
    """Wait for the client that is submitting a job under an id to finish; what one left that was killed is removed.

    Raises:
        JobNotFoundError: Its submission came to nothing.
    """
    while True:
        found = engine.inspect_container(job_name(job_id))
        if found is None:
            raise JobNotFoundError(f"there is no job {job_id} in the engine at {engine.endpoint.host}")
        container = Container.inspected(found)
        _check_is_frays(container, job_name(job_id))
        if read_job(engine, container) is not None:
            return
        if container.is_over or _is_stale(engine, container):
            remove_container(engine, container.id)
        time.sleep(0.05)


def _is_stale(engine: Engine, container: Container) -> bool:
    """Whether a container waits to be started for longer than any client takes, by the engine's clock."""
    if container.state != "created":
        return False
    with engine.errors():
        now = engine.api.info()["SystemTime"]
    return _seconds(now) - _seconds(container.created) > _STALE_SECONDS


def _seconds(at: str) -> float:
    """Seconds since the epoch of the engine's RFC 3339, in whatever zone, without the fraction."""
    return datetime.fromisoformat(re.sub(r"\.\d+", "", at)).timestamp()
