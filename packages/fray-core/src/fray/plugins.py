"""Discovery: backends, job contexts and provisioners are found by their entry points, and no other way.

Nothing is loaded until it is asked for: listing reads the metadata of installed distributions only. One broken plugin
is named, and breaks only itself; a name that two distributions claim is an error that names both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from fray.cluster import ClusterContext
from fray.errors import (
    BackendConflictError,
    BackendLoadError,
    BackendNotFoundError,
    FrayError,
    InvalidValueError,
    UnsupportedError,
)
from fray.job import JobContext

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = [
    "Plugin",
    "connect",
    "detect_job_contexts",
    "list_plugins",
    "load_backend",
    "load_job_context",
    "load_provisioner",
    "register_backend",
]

BACKENDS = "fray.backends"
JOB_CONTEXTS = "fray.job_contexts"
PROVISIONERS = "fray.provisioners"
COMMANDS = "fray.commands"

_FIRST_PARTY = {
    (BACKENDS, "local"): "fray-local",
    (BACKENDS, "docker"): "fray-docker",
    (BACKENDS, "ray"): "fray-ray",
    (JOB_CONTEXTS, "ray"): "fray-ray",
    (PROVISIONERS, "gcp-tpu"): "fray-tpu",
    (COMMANDS, "build"): "fray-docker",
    (COMMANDS, "tpu"): "fray-tpu",
}
_KINDS = {BACKENDS: "backend", JOB_CONTEXTS: "job context", PROVISIONERS: "provisioner", COMMANDS: "command"}

_registered: dict[str, type[ClusterContext]] = {}


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, by its metadata alone.

    Attributes:
        name: What it is asked for by.
        target: The object that it loads, `module:attribute`.
        distribution: Which distribution brings it; several where they claim the same name.
        version: That distribution's version.
    """

    name: str
    target: str
    distribution: str
    version: str


def connect(spec: str | None = None, **options: Any) -> ClusterContext:
    """Connect to a cluster.

    Args:
        spec: A backend's name (`"local"`), a name and an address (`"ray:http://head:8265"`), or a cluster named in
            `[tool.fray.clusters]` of the nearest `pyproject.toml` or `fray.toml`. Where None: `$FRAY_CLUSTER`, else
            the configured default, else `local`.
        options: The backend's own.

    Raises:
        BackendNotFoundError: No backend and no configured cluster has this name.
        BackendLoadError: The backend is installed and cannot be imported.
        BackendConflictError: Two distributions claim the name.
        InvalidValueError: The backend has no such option.
        UnsupportedError: Without a spec, in a job that cannot reach its own cluster.
        ConnectionFailedError: The cluster cannot be reached.
    """
    name, address, configured = resolve(spec)
    options = {**configured, **options}
    if "address" in options:
        if address is not None:
            raise InvalidValueError(f"the address is given twice: {address!r} and {options['address']!r}")
        address = options.pop("address")
    backend = load_backend(name)
    _check_options(name, backend, options)
    return backend.connect(address, **options)


def resolve(spec: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """Return the backend's name, the address and the configured options that a spec stands for."""
    from fray.config import find_config

    if spec is not None and not isinstance(spec, str):
        raise InvalidValueError(
            f"a cluster's spec is a string, such as 'local' or 'ray:http://head:8265', not {spec!r}"
        )
    # A spec with a colon can be no configured name: no file is looked for.
    spec = spec or os.environ.get("FRAY_CLUSTER")
    if spec is None and (job_id := os.environ.get("FRAY_JOB_ID")):
        raise UnsupportedError(
            f"the cluster of this job ({job_id}) cannot be reached from inside it: its backend sets no FRAY_CLUSTER. "
            "Name another cluster, as in connect('local')"
        )
    if spec is None or ":" not in spec:
        config = find_config()
        spec = spec or config.default or "local"
        if named := config.clusters.get(spec):
            return named.backend, named.address, named.options
        if ":" not in spec:
            _check_name(spec, tuple(config.clusters))
    name, _, address = spec.partition(":")
    return name, address or None, {}


def register_backend(name: str, backend: type[ClusterContext]) -> None:
    """Make a class known under a name in this process only, before any installed one. For tests."""
    _registered[name] = backend


def list_plugins(group: str = BACKENDS) -> list[Plugin]:
    """Return the installed plugins of a group, in name order. Reads metadata, imports nothing."""
    return [
        Plugin(
            name,
            entries[0].value,
            " and ".join(_distribution_of(entry) for entry in entries),
            entries[0].dist.version if entries[0].dist else "",
        )
        for name, entries in sorted(_entry_points(group).items())
    ]


def load_backend(name: str) -> type[ClusterContext]:
    """Return the class of the backend of this name; see `connect` for the errors."""
    if name in _registered:
        return _registered[name]
    return _load(BACKENDS, name, ClusterContext)


def load_job_context(name: str) -> type[JobContext]:
    """Return the class of the job context of this name; see `connect` for the errors."""
    return _load(JOB_CONTEXTS, name, JobContext)


def load_provisioner(name: str) -> type[Any]:
    """Return the class of the provisioner of this name; see `connect` for the errors."""
    return _load(PROVISIONERS, name, object)


def detect_job_contexts() -> Iterator[type[JobContext]]:
    """Iterate over the installed job contexts that can be loaded, in name order; a broken one hides no other."""
    for name in sorted(_entry_points(JOB_CONTEXTS)):
        try:
            yield load_job_context(name)
        except FrayError:
            continue  # named by `fray doctor`; a plugin that nobody asked for must not break a job


def _load(group: str, name: str, base: type[Any]) -> type[Any]:
    entries = _entry_points(group).get(name)
    if not entries:
        raise _not_found(group, name, ())
    if len(entries) > 1:
        claimants = " and ".join(_distribution_of(entry) for entry in entries)
        raise BackendConflictError(f"the {_KINDS[group]} {name!r} is claimed by {claimants}: uninstall one of them")
    entry = entries[0]
    try:
        loaded = entry.load()
    except Exception as error:
        raise BackendLoadError(
            f"the {_KINDS[group]} {name!r} of {_distribution_of(entry)} cannot be loaded "
            f"({entry.value}): {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, base)):
        raise BackendLoadError(
            f"the {_KINDS[group]} {name!r} of {_distribution_of(entry)} is {loaded!r}, no {base.__name__}"
        )
    return loaded


def _check_name(name: str, configured: tuple[str, ...]) -> None:
    if name not in _registered and name not in _entry_points(BACKENDS):
        raise _not_found(BACKENDS, name, configured)


def _not_found(group: str, name: str, configured: tuple[str, ...]) -> BackendNotFoundError:
    kind = _KINDS[group]
    if distribution := _FIRST_PARTY.get((group, name)):
        return BackendNotFoundError(f"the {kind} {name!r} is not installed here: pip install {distribution}")
    from difflib import get_close_matches

    known = {*_entry_points(group), *configured, *(first for kind_, first in _FIRST_PARTY if kind_ == group)}
    if group == BACKENDS:
        known.update(_registered)
    near = get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(sorted(known))}"
    what = "backend and no configured cluster" if group == BACKENDS else kind
    return BackendNotFoundError(f"no {what} is named {name!r}; {hint}")


def _check_options(name: str, backend: type[ClusterContext], options: dict[str, Any]) -> None:
    import inspect

    # A connect() that takes any option hands them to the constructor, as the default does: its parameters count.
    parameters = inspect.signature(backend.connect).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        parameters = inspect.signature(backend).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = sorted(option for option in parameters if option != "address")
    for option in options:
        if option not in known:
            has = f"its options: {', '.join(known)}" if known else "it has none"
            raise InvalidValueError(f"the backend {name!r} has no option {option!r}; {has}")


@cache
def _entry_points(group: str) -> dict[str, list[EntryPoint]]:
    """The group's entry points by name: several under one name where distributions conflict."""
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=group):
        found.setdefault(entry.name, []).append(entry)
    return found


def _distribution_of(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown distribution"
