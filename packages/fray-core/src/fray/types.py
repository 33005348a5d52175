"""The values that cross Fray's interfaces: what a job is given, what it reports, what a task may ask for.

Frozen standard-library dataclasses that check themselves when made, so that a wrong value is refused where it was
written. Positional construction is part of the API. Imports the standard library and `fray.errors` only.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from fray.errors import InvalidTypeError, InvalidValueError

__all__ = [
    "ActorOptions",
    "ActorRef",
    "Attempt",
    "EntryPoint",
    "JobInfo",
    "JobStatus",
    "Lifetime",
    "ObjectRef",
    "Resource",
    "RuntimeEnv",
    "TaskOptions",
    "TerminationReason",
    "TpuRunConfig",
]

EntryPoint = str
"""A shell command, run by `/bin/sh -c`."""

MASK = "***"
"""Stands wherever a secret's value would."""

# Linux takes no single argument or environment string above 128 KiB (MAX_ARG_STRLEN, its NUL included).
_STRING_LIMIT_BYTES = 131_071
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SENSITIVE_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS)$", re.IGNORECASE)
# Dependency specifiers (packaging.python.org, "Dependency specifiers"): the shape, not the grammar of versions and
# markers. No line break is white space here: a requirement becomes a line of a file that takes options too. Compiled
# by its first use: that takes milliseconds.
_GAP = r"[ \t]*"
_VERSION = r"[vV]?[0-9][A-Za-z0-9.!+_-]*"
_VERSION_CLAUSE = rf"(?:==={_GAP}[^\s,;()]+|(?:==|!=){_GAP}{_VERSION}(?:\.\*)?|(?:~=|<=|>=|<|>){_GAP}{_VERSION})"
_VERSIONS = rf"{_VERSION_CLAUSE}(?:{_GAP},{_GAP}{_VERSION_CLAUSE})*{_GAP}"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"  # of a distribution, and of an extra
_REQUIREMENT = (
    rf"{_GAP}{_NAME}{_GAP}"
    rf"(?:\[{_GAP}(?:{_NAME}{_GAP}(?:,{_GAP}{_NAME}{_GAP})*)?\]{_GAP})?"
    rf"(?:@{_GAP}[A-Za-z][A-Za-z0-9+.-]*:\S+(?:[ \t]+(?=;))?"  # a URL, whose own end is white space
    rf"|\({_GAP}{_VERSIONS}\)|{_VERSIONS},?)?"
    rf"{_GAP}(?:;{_GAP}\S[^\r\n\v\f]*)?"
)


class JobStatus(StrEnum):
    """Where a job stands. Three of the five are final."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"
    STOPPED = "STOPPED"

    @property
    def is_terminal(self) -> bool:
        """Whether nothing will change the job any more."""
        return self in (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)


class TerminationReason(StrEnum):
    """Why a job that did not succeed ended. Each reason goes with one status."""

    EXITED = "EXITED"
    KILLED = "KILLED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    SETUP_FAILED = "SETUP_FAILED"
    INFEASIBLE = "INFEASIBLE"
    TIMED_OUT = "TIMED_OUT"
    PREEMPTED = "PREEMPTED"
    LOST = "LOST"
    STOPPED_BY_USER = "STOPPED_BY_USER"

    @property
    def status(self) -> JobStatus:
        """The one status that this reason goes with."""
        return JobStatus.STOPPED if self is TerminationReason.STOPPED_BY_USER else JobStatus.FAILED


class Lifetime(StrEnum):
    """How long an actor lives: with its job, or beyond it."""

    EPHEMERAL = "ephemeral"
    DETACHED = "detached"


@dataclass(frozen=True)
class Resource:
    """An amount of something that a job or a task needs.

    Attributes:
        name: `CPU` (cores), `GPU` (devices), `memory` (bytes), `TPU` (chips), or a name that the cluster knows.
        quantity: How much, not negative; fractions are allowed.
    """

    name: str
    quantity: float

    def __post_init__(self) -> None:
        _check_string("resource names", self.name)
        if not self.name.strip():
            raise InvalidValueError("a resource's name cannot be empty")
        _check_quantity(self.name, self.quantity)


@dataclass(frozen=True, repr=False)
class RuntimeEnv:
    """What surrounds a job's command: packages, resources, variables, files.

    Attributes:
        package_requirements: PEP 508 requirements that are importable in the job, and nowhere else.
        minimum_resources: What the job asks for.
        maximum_resources: What the job may use; none means no cap of its own.
        env: Environment variables. A value is masked in Fray's output where its name ends in `KEY`, `TOKEN`,
            `SECRET`, `PASSWORD` or `CREDENTIALS`.
        secrets: Environment variables whose values Fray never shows and never stores.
        working_dir: The directory that the command runs in; None is the caller's.
        excludes: Patterns, as in `.gitignore`, of what is not shipped with `working_dir`.
        container_image: The image that the job runs in.
        extras: Extras of the uv project in `working_dir` whose locked dependencies the job needs.

    Raises:
        InvalidTypeError: A field, or a member of one, is of the wrong type.
        InvalidValueError: A value cannot be: an empty requirement, a minimum above its maximum, a name that no shell
            hands on, a name in both `env` and `secrets`, a `FRAY_*` name (those are Fray's).
    """

    package_requirements: list[str] = field(default_factory=list)
    minimum_resources: list[Resource] = field(default_factory=list)
    maximum_resources: list[Resource] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict, kw_only=True)
    working_dir: str | None = field(default=None, kw_only=True)
    excludes: list[str] = field(default_factory=list, kw_only=True)
    container_image: str | None = field(default=None, kw_only=True)
    extras: list[str] = field(default_factory=list, kw_only=True)

    def __post_init__(self) -> None:
        requirements = _strings("package_requirements", self.package_requirements)
        for requirement in requirements:
            if not requirement.strip():
                raise InvalidValueError("package_requirements cannot contain empty strings")
            if not re.fullmatch(_REQUIREMENT, requirement):
                raise InvalidValueError(
                    f"package_requirements: {requirement!r} is no PEP 508 requirement; write 'name', 'name>=1.2', "
                    "'name[extra]' or 'name @ file:///absolute/path' (options of pip are not requirements)"
                )
        minimum = _resources("minimum_resources", self.minimum_resources)
        maximum = _resources("maximum_resources", self.maximum_resources)
        caps = {resource.name: resource.quantity for resource in maximum}
        for resource in minimum:
            cap = caps.get(resource.name)
            if cap is not None and resource.quantity > cap:
                raise InvalidValueError(
                    f"minimum_resources[{resource.name}]={resource.quantity} exceeds "
                    f"maximum_resources[{resource.name}]={cap}"
                )
        env = _variables("env", self.env)
        secrets = _variables("secrets", self.secrets)
        for name in env.keys() & secrets.keys():
            raise InvalidValueError(f"{name} is in both env and secrets: give it in one of them")
        excludes, extras = _strings("excludes", self.excludes), _strings("extras", self.extras)
        for pattern in excludes:
            if not pattern.strip():
                raise InvalidValueError("excludes cannot contain empty strings")
        for extra in extras:
            if not re.fullmatch(_NAME, extra):
                raise InvalidValueError(f"extras: {extra!r} is not the name of an extra")
        if self.container_image is not None:
            _check_string("container_image", self.container_image)
            if not self.container_image.strip() or self.container_image != "".join(self.container_image.split()):
                raise InvalidValueError(f"container_image: {self.container_image!r} is not an image reference")
        # Copies, so that what the caller does to their lists afterwards does not reach into a frozen value.
        set_field = object.__setattr__
        set_field(self, "package_requirements", requirements)
        set_field(self, "minimum_resources", minimum)
        set_field(self, "maximum_resources", maximum)
        set_field(self, "env", env)
        set_field(self, "secrets", secrets)
        set_field(self, "working_dir", _directory("working_dir", self.working_dir))
        set_field(self, "excludes", excludes)
        set_field(self, "extras", extras)

    def masked(self) -> dict[str, Any]:
        """Return the fields that are set, as plain values, with every value that is not to be shown masked."""
        shown: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if not value:
                continue
            if name == "secrets":
                value = dict.fromkeys(value, MASK)
            elif name == "env":
                value = mask_sensitive(value)
            elif name in ("minimum_resources", "maximum_resources"):
                value = {resource.name: resource.quantity for resource in value}
            shown[name] = value
        return shown

    def __repr__(self) -> str:
        return f"RuntimeEnv({', '.join(f'{name}={value!r}' for name, value in self.masked().items())})"


@dataclass(frozen=True)
class Attempt:
    """One run of a job's command.

    Attributes:
        number: Counted from 1.
        start_time: When the command started, in seconds since the epoch.
        end_time: When the command exited; None while it runs, or where that is unknown.
        exit_code: What the command ended with; 128 + n where signal n killed it.
        reason: Why the attempt failed; None while it runs and where it succeeded.
        log_offset: Where its output begins in the job's log, in bytes.
    """

    number: int
    start_time: float
    end_time: float | None = None
    exit_code: int | None = None
    reason: TerminationReason | None = None
    log_offset: int = 0


@dataclass(frozen=True)
class JobInfo:
    """What is known of a job at one moment. `info["status"]` reads like `info.status`.

    Attributes:
        id: The job's id.
        status: Where it stands.
        submission_time: When it was accepted, in seconds since the epoch.
        start_time: When its command first started; None if it has not, or never did.
        end_time: When it was over, every process of it gone.
        exit_code: What the command ended with; None where it never ran or that is unknown.
        reason: Why it did not succeed; None otherwise.
        message: In words: how it ended, or what it waits for.
        entrypoint: The shell command.
        metadata: What the caller attached to it.
        owner: Who submitted it, as `user@host`.
        attempts: Each run of the command, first to last.
    """

    id: str
    status: JobStatus
    submission_time: float
    start_time: float | None = None
    end_time: float | None = None
    exit_code: int | None = field(default=None, kw_only=True)
    reason: TerminationReason | None = field(default=None, kw_only=True)
    message: str = field(default="", kw_only=True)
    entrypoint: EntryPoint = field(default="", kw_only=True)
    metadata: dict[str, str] = field(default_factory=dict, kw_only=True)
    owner: str = field(default="", kw_only=True)
    attempts: tuple[Attempt, ...] = field(default=(), kw_only=True)

    def __getitem__(self, name: str) -> Any:
        if name not in self.__dataclass_fields__:
            raise KeyError(name)
        return getattr(self, name)

    def keys(self) -> Iterator[str]:
        """Iterate over the names of the fields, so that `dict(info)` works."""
        return iter(self.__dataclass_fields__)


@dataclass(frozen=True)
class TaskOptions:
    """What a task asks for. In memory all of it is accepted and needs nothing done.

    Attributes:
        resources: Resource name to quantity, such as `{"CPU": 4, "memory": 8 * 1024**3}`.
        runtime_env: Packages and variables of the task's own.
        name: Shown where the engine shows tasks.
        max_calls: After how many calls the worker process is replaced; 1 gives each call a fresh one.
    """

    resources: dict[str, float] | None = None
    runtime_env: RuntimeEnv | None = None
    name: str | None = None
    max_calls: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "resources", _resource_map(self.resources))
        if self.max_calls is not None:
            _check_count("max_calls", self.max_calls, least=1)


@dataclass(frozen=True)
class ActorOptions:
    """What an actor asks for.

    Attributes:
        name: One actor of a name exists at a time.
        get_if_exists: With `name`: get the actor of that name if there is one, rather than fail.
        resources: Resource name to quantity.
        lifetime: Whether the actor ends with its job.
    """

    name: str | None = None
    get_if_exists: bool = False
    resources: dict[str, float] | None = None
    lifetime: Lifetime = Lifetime.EPHEMERAL

    def __post_init__(self) -> None:
        if self.get_if_exists and self.name is None:
            raise InvalidValueError("get_if_exists needs a name: it says which actor is meant")
        object.__setattr__(self, "resources", _resource_map(self.resources))
        try:
            object.__setattr__(self, "lifetime", Lifetime(self.lifetime))
        except ValueError:
            raise InvalidValueError(f"lifetime is 'ephemeral' or 'detached', not {self.lifetime!r}") from None


@dataclass(frozen=True)
class TpuRunConfig:
    """Which TPU slices `run_on_tpu` gathers, and how often it starts again.

    Attributes:
        tpu_type: A type of the catalogue in `fray.tpu`, such as `v4-32`.
        num_slices: How many slices of it.
        max_retries_preemption: How many times a preemption is made good.
        max_retries_failure: How many times a failure of the function is.
        wait_seconds: How long all slices may take to come, each time that they are gathered.
        stall_seconds: After so long without a new step (`ctx.report_step`) the function is taken to hang, which is a
            failure; None trusts it.
    """

    tpu_type: str
    num_slices: int = 1
    max_retries_preemption: int = 10000
    max_retries_failure: int = 10
    wait_seconds: float = field(default=24 * 3600.0, kw_only=True)
    stall_seconds: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        _check_string("tpu_type", self.tpu_type)
        _check_count("num_slices", self.num_slices, least=1)
        _check_count("max_retries_preemption", self.max_retries_preemption, least=0)
        _check_count("max_retries_failure", self.max_retries_failure, least=0)
        check_seconds("wait_seconds", self.wait_seconds)
        if self.stall_seconds is not None:
            check_seconds("stall_seconds", self.stall_seconds)


class ObjectRef:
    """A value that a task will give, or has given. Made by a `JobContext`, read by its `get`."""

    __slots__ = ()


class ActorRef:
    """A handle on an actor: `handle.method(*args)` calls it there and returns an `ObjectRef`."""

    __slots__ = ()


def mask_sensitive(env: Mapping[str, str]) -> dict[str, str]:
    """Return `env` with the values masked whose names say that they are not to be shown."""
    return {name: MASK if _SENSITIVE_NAME.search(name) else value for name, value in env.items()}


def check_seconds(what: str, value: object) -> float:
    """Return a number of seconds, or refuse what is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidTypeError(f"{what} must be a number of seconds, got {type(value).__name__}: {value!r}")
    if value != value or value in (float("inf"), float("-inf")):
        raise InvalidValueError(f"{what} must be finite, got {value}; None means without limit")
    if value < 0:
        raise InvalidValueError(f"{what} cannot be negative: {value}")
    return value


def check_text(what: str, value: str) -> None:
    """Refuse what the operating system cannot take as an argument: not UTF-8, with a NUL, above 128 KiB."""
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidValueError(f"{what} cannot be encoded as UTF-8: {error.reason} at {error.start}") from None
    if "\0" in value:
        raise InvalidValueError(f"{what} cannot contain a NUL character")
    if size > _STRING_LIMIT_BYTES:
        raise InvalidValueError(
            f"{what} is {size} bytes long; the operating system takes {_STRING_LIMIT_BYTES}: put it in a file"
        )


def _check_string(what: str, value: object) -> None:
    if not isinstance(value, str):
        raise InvalidTypeError(f"{what} must be strings, got {type(value).__name__}: {value!r}")
    check_text(what, value)


def _strings(what: str, values: object) -> list[str]:
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise InvalidTypeError(f"{what} must be a list of strings, got {type(values).__name__}: {values!r}")
    members = list(values)
    for member in members:
        _check_string(what, member)
    return members


def _variables(what: str, variables: object) -> dict[str, str]:
    if not isinstance(variables, Mapping):
        raise InvalidTypeError(f"{what} must map names to values, got {type(variables).__name__}")
    for name, value in variables.items():
        if not isinstance(name, str):
            raise InvalidTypeError(f"{what} keys must be strings, got {type(name).__name__}: {name!r}")
        if not isinstance(value, str):
            # A secret's value is not shown, whatever its type.
            shown = f": {value!r}" if what == "env" else f" for {name}"
            raise InvalidTypeError(f"{what} values must be strings, got {type(value).__name__}{shown}")
        if not _ENV_NAME.fullmatch(name):
            raise InvalidValueError(f"{what}: {name!r} is not a variable name that a shell hands on ([A-Za-z0-9_])")
        if name.startswith("FRAY_"):
            raise InvalidValueError(f"{what}: {name} is refused, since the FRAY_* names are Fray's own")
        check_text(f"{what}[{name}]", f"{name}={value}")
    return dict(variables)


def _resources(what: str, resources: object) -> list[Resource]:
    if isinstance(resources, (str, bytes, Mapping)) or not isinstance(resources, Iterable):
        raise InvalidTypeError(f"{what} must be a list of Resource, got {type(resources).__name__}: {resources!r}")
    members = list(resources)
    names: set[str] = set()
    for resource in members:
        if not isinstance(resource, Resource):
            raise InvalidTypeError(f"{what} must be a list of Resource, got {type(resource).__name__}: {resource!r}")
        if resource.name in names:
            raise InvalidValueError(f"{what} names {resource.name} twice")
        names.add(resource.name)
    return members


def _resource_map(resources: object) -> dict[str, float] | None:
    if resources is None:
        return None
    if isinstance(resources, Sequence) and not isinstance(resources, (str, bytes)):
        return {resource.name: resource.quantity for resource in _resources("resources", resources)}
    if not isinstance(resources, Mapping):
        raise InvalidTypeError(f"resources must map names to quantities, got {type(resources).__name__}")
    for name, quantity in resources.items():
        _check_string("resource names", name)
        _check_quantity(name, quantity)
    return dict(resources)


def _check_quantity(name: str, quantity: object) -> None:
    if isinstance(quantity, bool) or not isinstance(quantity, (int, float)):
        raise InvalidTypeError(
            f"Resource quantities must be numbers, got {type(quantity).__name__}: {name}={quantity!r}"
        )
    if not math.isfinite(quantity):
        raise InvalidValueError(f"Resource quantities must be finite: {name}={quantity}")
    if quantity < 0:
        raise InvalidValueError(f"Resource quantities cannot be negative: {name}={quantity}")


def _check_count(what: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidTypeError(f"{what} must be an integer, got {type(value).__name__}: {value!r}")
    if value < least:
        raise InvalidValueError(f"{what} must be at least {least}, got {value}")


def _directory(what: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)):
        raise InvalidTypeError(f"{what} must be a path, got {type(value).__name__}: {value!r}")
    path = os.fspath(value)
    if not isinstance(path, str):
        raise InvalidTypeError(f"{what} must be a path of text, got {type(path).__name__}: {path!r}")
    if not path or "\0" in path:
        raise InvalidValueError(f"{what}: {path!r} is not a path")
    return path
