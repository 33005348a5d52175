"""What a job is asked for: checked once, for every backend, before anything is done.

`make_request` turns the arguments of `create_job` into a `JobRequest`, or refuses them; a backend turns that into a
`JobPlan`. `Capabilities` say what a backend may refuse.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from fray.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from fray.types import RuntimeEnv, check_seconds, check_text

__all__ = [
    "Capabilities",
    "JobPlan",
    "JobRequest",
    "check_capabilities",
    "check_count",
    "check_job_id",
    "current_owner",
    "make_request",
]

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")

_id_lock = threading.Lock()
_last_id = 0


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beyond the contract's core. What it cannot is refused, never ignored.

    @plugin-dev: nothing else may be missing. A class default, narrowed per instance by what the engine turns out to
    have.

    Attributes:
        max_retries: Failing commands are run again.
        timeout_seconds: A time limit.
        outputs: `$FRAY_OUTPUT_DIR` can be fetched.
        nested_jobs: `fray.connect()` inside a job reaches the same cluster.
        resource_caps: `maximum_resources` are enforced.
        container_images: `container_image`.
        package_requirements: `package_requirements` and `extras`.
        task_context: `get_job_context()` in a job.
        tpu: `run_on_tpu`.
    """

    max_retries: bool = False
    timeout_seconds: bool = False
    outputs: bool = False
    nested_jobs: bool = False
    resource_caps: bool = False
    container_images: bool = False
    package_requirements: bool = False
    task_context: bool = False
    tpu: bool = False


@dataclass(frozen=True)
class JobRequest:
    """What the caller asked for, checked.

    Attributes:
        job_id: The id that the job will have.
        entrypoint: The shell command.
        env: What surrounds it; its representation masks what is not to be shown.
        directory: The absolute working directory on the client.
        metadata: What the caller attaches.
        timeout_seconds: The time limit of all attempts together, None for none.
        max_retries: How many more attempts a failing command gets.
    """

    job_id: str
    entrypoint: str
    env: RuntimeEnv
    directory: Path
    metadata: dict[str, str] = field(default_factory=dict)
    timeout_seconds: float | None = None
    max_retries: int = 0

    @property
    def fingerprint(self) -> str:
        """What makes two requests the same job: not metadata, secrets' values or the directory's content."""
        import hashlib
        import json

        env = {each.name: getattr(self.env, each.name) for each in fields(self.env)}
        env["secrets"] = sorted(self.env.secrets)
        for name in ("minimum_resources", "maximum_resources"):
            env[name] = {resource.name: float(resource.quantity) for resource in env[name]}
        same = [self.entrypoint, env, self.max_retries, self.timeout_seconds and float(self.timeout_seconds)]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class JobPlan:
    """What a backend will ask of its engine for a job. Printing it has no side effect and shows no secret.

    Attributes:
        backend: The backend's name.
        request: What was asked for.
        native: The engine's own request, as plain values, masked.
        upload_bytes: What would be shipped; None where nothing is.
        image: The image that the job would run in; None where it runs in none.
        details: What the backend itself needs to go from here to the submission; not shown.
    """

    backend: str
    request: JobRequest
    native: dict[str, Any] = field(default_factory=dict)
    upload_bytes: int | None = None
    image: str | None = None
    details: Any = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values, masked, ready for JSON."""
        request = self.request
        return {
            "backend": self.backend,
            "job_id": request.job_id,
            "entrypoint": request.entrypoint,
            "env": request.env.masked(),
            "directory": str(request.directory),
            "metadata": request.metadata,
            "timeout_seconds": request.timeout_seconds,
            "max_retries": request.max_retries,
            "upload_bytes": self.upload_bytes,
            "image": self.image,
            "native": self.native,
        }

    def __str__(self) -> str:
        import json

        return json.dumps(self.as_dict(), indent=2, default=str)


def make_request(
    entrypoint: object,
    env: object,
    *,
    job_id: object,
    if_exists: object,
    metadata: object,
    timeout_seconds: object,
    max_retries: object,
) -> JobRequest:
    """Check the arguments of `create_job`; see there.

    Raises:
        InvalidTypeError: One is of the wrong type.
        InvalidValueError: One has a value that cannot be.
    """
    if if_exists not in ("error", "adopt"):
        raise InvalidValueError(f"if_exists is 'error' or 'adopt', not {if_exists!r}")
    if if_exists == "adopt" and job_id is None:
        raise InvalidValueError("if_exists='adopt' needs a job_id: it says which job is meant")
    command = _check_entrypoint(entrypoint)
    if env is None:
        env = RuntimeEnv()
    elif not isinstance(env, RuntimeEnv):
        raise InvalidTypeError(f"env must be a fray.RuntimeEnv, got {type(env).__name__}")
    if timeout_seconds is not None and not check_seconds("timeout_seconds", timeout_seconds):
        raise InvalidValueError(f"timeout_seconds must be above 0, got {timeout_seconds}")
    return JobRequest(
        _make_up_id() if job_id is None else check_job_id(job_id),
        command,
        env,
        _working_directory(env),
        _check_metadata(metadata),
        None if timeout_seconds is None else check_seconds("timeout_seconds", timeout_seconds),
        check_count("max_retries", max_retries),
    )


def check_capabilities(backend: str, has: Capabilities, request: JobRequest) -> None:
    """Refuse what a backend does not have, with `UnsupportedError`."""
    env = request.env
    needed = {
        "max_retries": (has.max_retries, request.max_retries > 0),
        "timeout_seconds": (has.timeout_seconds, request.timeout_seconds is not None),
        "maximum_resources": (has.resource_caps, bool(env.maximum_resources)),
        "container_image": (has.container_images, env.container_image is not None),
        "package_requirements": (has.package_requirements, bool(env.package_requirements)),
        "extras": (has.package_requirements, bool(env.extras)),
    }
    for option, (there, asked_for) in needed.items():
        if asked_for and not there:
            raise UnsupportedError(f"the backend {backend!r} does not have {option}: leave it out")


def check_job_id(job_id: object) -> str:
    """Return a job id, or refuse what is none."""
    if not isinstance(job_id, str):
        raise InvalidTypeError(f"a job id is a string, got {type(job_id).__name__}: {job_id!r}")
    if not _JOB_ID.fullmatch(job_id):
        raise InvalidValueError(
            f"{job_id!r} is no job id: 1 to 63 of the characters A-Z a-z 0-9 _ -, the first a letter or a digit"
        )
    return job_id


def check_count(what: str, value: object) -> int:
    """Return a number of things, or refuse what is none."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{what} must be an integer, got {type(value).__name__}: {value!r}")
    if value < 0:
        raise InvalidValueError(f"{what} cannot be negative: {value}")
    return value


@cache
def current_owner() -> str:
    """Return whom a job that is submitted here belongs to, as `user@host`."""
    import getpass
    import os
    import platform

    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # no such entry in the user database: a container's bare number
        user = str(os.getuid())
    return f"{user}@{platform.node()}"


def _make_up_id() -> str:
    global _last_id
    with _id_lock:
        _last_id = max(time.time_ns(), _last_id + 1)
        return f"fray-{_last_id}"


def _check_entrypoint(entrypoint: object) -> str:
    if not isinstance(entrypoint, str):
        if callable(entrypoint):
            raise InvalidTypeError(
                "create_job takes a shell command, not a function: put the function in a script, say my_job.py, "
                "that gets its tasks from fray.get_job_context(), and submit 'python my_job.py'"
            )
        raise InvalidTypeError(
            f"entrypoint must be a string, got {type(entrypoint).__name__}: {entrypoint!r}; "
            "shlex.join makes one of a list"
        )
    check_text("entrypoint", entrypoint)
    if not entrypoint.strip():
        raise InvalidValueError("entrypoint is empty: give a shell command, such as 'python train.py'")
    return entrypoint


def _working_directory(env: RuntimeEnv) -> Path:
    try:
        directory = Path(env.working_dir or ".").absolute()
    except FileNotFoundError:
        raise InvalidValueError("the current directory has been removed: name a working_dir") from None
    if env.working_dir is not None and not directory.is_dir():
        raise InvalidValueError(f"working_dir: {str(directory)!r} is not a directory")
    return directory


def _check_metadata(metadata: object) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise InvalidTypeError(f"metadata must map strings to strings, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise InvalidTypeError(f"metadata must map strings to strings, got {key!r}: {value!r}")
        check_text("metadata keys", key)
        check_text(f"metadata[{key}]", value)
    return dict(metadata)
