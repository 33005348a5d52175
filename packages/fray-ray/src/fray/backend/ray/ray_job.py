"""`RayJobContext`: tasks, actors and objects of the Ray cluster that this process belongs to.

References are Ray's own, so they nest, travel and can be handed to Ray's functions. What is added to raw Ray costs
next to nothing: a function is exported once, and on its worker it runs with this context as `get_job_context()`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import os
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, Self

from fray.backend.ray._runtime_env import build_ray_runtime_env, split_resources
from fray.context import use_job_context
from fray.errors import InvalidValueError, PlatformError, UnsupportedError
from fray.job import JobContext, check_call, check_wait
from fray.types import ActorOptions, ActorRef, Lifetime, RuntimeEnv, TaskOptions

__all__ = ["RayActorRef", "RayJobContext"]

DETACHED_NAMESPACE = "fray"
"""Named actors that outlive their job are found here by others; those that do not, in their job's own namespace."""

# How many functions are remembered as exported: enough for a program's own, and no leak for one that makes new ones.
_REMEMBERED = 512
_NOT_FOR_TASKS = ("maximum_resources", "secrets", "working_dir", "excludes", "container_image", "extras")
_JAX_PLATFORMS = "JAX_PLATFORMS"


class RayJobContext(JobContext):
    """Runs tasks and actors on Ray's workers. There is one a process; inside a task it is that worker's.

    A function is pickled when it is first used, and its closure with it: what it captures is seen as it was then. An
    exception comes out as it was raised, with Ray's own, which has the worker's traceback, as its cause; where the
    worker, its node or Ray fails, a `PlatformError` does. `max_calls=1` gives each call a process of its own.

    A task or an actor without `TPU` among its resources gets `JAX_PLATFORMS=cpu` unless that is set: it would take a
    TPU away from those that need it.

    Raises:
        PlatformError: No Ray runs here.
    """

    _lock = threading.RLock()
    _own: RayJobContext | None = None
    _functions: _Remembered
    _classes: _Remembered

    def __new__(cls) -> Self:
        """Return the one of this process."""
        with cls._lock:
            if cls._own is None:
                _connect()
                made = super().__new__(cls)
                made._functions, made._classes = _Remembered(), _Remembered()
                cls._own = made
            return cls._own  # type: ignore[return-value]

    def __reduce__(self) -> tuple[type[RayJobContext], tuple[()]]:
        return (RayJobContext, ())

    @classmethod
    def detect(cls) -> bool:
        """Say whether this process is one of a Ray cluster's: a worker, or the driver of a job."""
        ray = sys.modules.get("ray")
        if ray is not None and getattr(ray, "is_initialized", bool)():
            return True
        return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ

    def create_task(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: TaskOptions | None = None,
    ) -> Any:
        """See `JobContext.create_task`.

        Raises:
            UnsupportedError: `options.runtime_env` asks for what a task cannot have of its own.
        """
        arguments = check_call("fn", fn, args, kwargs)
        remote = self._functions.get(fn, options)
        if remote is None:
            remote = _remote_function(fn, options or TaskOptions())
            self._functions.keep(fn, options, remote)
        return remote.remote(*args, **arguments)

    def get(self, ref: Any) -> Any:
        """See `JobContext.get`. What is no reference is its own value."""
        import ray
        from ray.exceptions import RayError

        try:
            if isinstance(ref, ray.ObjectRef):
                return ray.get(ref)
            if not isinstance(ref, list):
                return ref
            if all(isinstance(each, ray.ObjectRef) for each in ref):
                return ray.get(ref)
        except RayError as error:
            _raise_original(error)
        return [self.get(each) for each in ref]

    def wait(
        self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """See `JobContext.wait`."""
        import ray

        check_wait(refs, num_returns, timeout, ray.ObjectRef, hash)
        if not refs:
            return [], []
        ready = set(ray.wait(list(refs), num_returns=num_returns, timeout=timeout, fetch_local=False)[0])
        if num_returns < len(refs):
            # Ray gives any that are done; the first of them are meant.
            ready.update(ray.wait(list(refs), num_returns=len(refs), timeout=0, fetch_local=False)[0])
        done = [ref for ref in refs if ref in ready][:num_returns]
        chosen = set(done)
        return done, [ref for ref in refs if ref not in chosen]

    def put(self, obj: Any) -> Any:
        """See `JobContext.put`."""
        import ray

        return ray.put(obj)

    def create_actor(
        self,
        cls: type,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: ActorOptions | None = None,
    ) -> Any:
        """See `JobContext.create_actor`.

        An actor ends with its job, or when nothing refers to it any more; a `detached` one lives on, and is found by
        other jobs that create an actor of its name with `get_if_exists` and `detached`.
        """
        arguments = check_call("cls", cls, args, kwargs)
        options = options or ActorOptions()
        remote = self._classes.get(cls, None)
        if remote is None:
            remote = _remote_class(cls)
            self._classes.keep(cls, None, remote)
        asked = _actor_options(options)
        try:
            handle = remote.options(**asked).remote("TPU" in (options.resources or {}), *args, **arguments)
        except ValueError as error:
            if options.name is None or options.name not in str(error):
                raise
            raise InvalidValueError(
                f"there is an actor named {options.name!r} already: choose another name, or get_if_exists"
            ) from error
        return RayActorRef(handle, _methods_of(cls), cls.__qualname__)


class RayActorRef(ActorRef):
    """A handle on an actor; it can be handed to tasks and actors."""

    __slots__ = ("_fray_handle", "_fray_label", "_fray_methods")

    def __init__(self, handle: Any, methods: frozenset[str], label: str) -> None:
        self._fray_handle = handle
        self._fray_methods = methods
        self._fray_label = label

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_fray_") or name not in self._fray_methods:
            raise AttributeError(f"{self!r} has no method {name!r}")
        method: Callable[..., Any] = getattr(self._fray_handle, name).remote
        return method

    def __reduce__(self) -> tuple[type[RayActorRef], tuple[Any, ...]]:
        return (RayActorRef, (self._fray_handle, self._fray_methods, self._fray_label))

    def __repr__(self) -> str:
        return f"<actor {self._fray_label}>"


class _Remembered:
    """What has been made of functions or classes, the last used ones, by identity: not all can be compared."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: OrderedDict[tuple[int, int], tuple[Any, Any, Any]] = OrderedDict()

    def get(self, target: Any, options: Any) -> Any:
        with self._lock:
            key = (id(target), id(options))
            found = self._made.get(key)
            if found is None:
                return None
            self._made.move_to_end(key)
            return found[2]

    def keep(self, target: Any, options: Any, made: Any) -> None:
        with self._lock:
            # With what it was made of, which so keeps its identity.
            self._made[id(target), id(options)] = (target, options, made)
            if len(self._made) > _REMEMBERED:
                self._made.popitem(last=False)


class _Exited(Exception):
    """Stands for a `SystemExit`, which would end the worker."""


def _connect() -> None:
    import ray

    if ray.is_initialized():
        return
    try:
        with warnings.catch_warnings():
            # Until Ray 2.55 it told each driver of what will change for GPUs.
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(address="auto", logging_level=logging.WARNING)
    except ConnectionError as error:
        raise PlatformError(
            f"there is no Ray to run tasks on: {error}; run this as a job of a Ray cluster (`fray run -c ray`), or "
            "start one on this machine (`ray start --head`)"
        ) from error


def _remote_function(fn: Callable[..., Any], options: TaskOptions) -> Any:
    import ray

    asked, has_tpu = _task_options(options)

    def task(*args: Any, **kwargs: Any) -> Any:
        with _on_worker(has_tpu):
            return fn(*args, **kwargs)

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        value = getattr(fn, name, None)
        if isinstance(value, str):
            setattr(task, name, value)  # what Ray shows it by
    # Only here, and not among the options of a call, does Ray take max_calls.
    made = ray.remote(task) if options.max_calls is None else ray.remote(max_calls=options.max_calls)(task)
    return made.options(**asked) if asked else made


def _task_options(options: TaskOptions) -> tuple[dict[str, Any], bool]:
    resources = dict(options.resources or {})
    asked: dict[str, Any] = {}
    if options.runtime_env is not None:
        _check_runtime_env(options.runtime_env)
        for each in options.runtime_env.minimum_resources:
            resources.setdefault(each.name, each.quantity)
        if runtime_env := build_ray_runtime_env(options.runtime_env):
            asked["runtime_env"] = runtime_env
    if options.name is not None:
        asked["name"] = options.name
    return asked | _resource_options(resources), bool(resources.get("TPU"))


def _check_runtime_env(env: RuntimeEnv) -> None:
    for name in _NOT_FOR_TASKS:
        if getattr(env, name):
            raise UnsupportedError(f"a task cannot have runtime_env.{name} of its own: give it to the job")


def _resource_options(resources: Mapping[str, float]) -> dict[str, Any]:
    arguments, others = split_resources(dict(resources))
    return {**arguments, **({"resources": others} if others else {})}


def _remote_class(cls: type) -> Any:
    import ray

    def construct(self: Any, has_tpu: bool, /, *args: Any, **kwargs: Any) -> None:
        self.fray_has_tpu, self.fray_object, self.fray_failure = has_tpu, None, None
        try:
            with _on_worker(has_tpu):
                self.fray_object = cls(*args, **kwargs)
        except BaseException as error:
            self.fray_failure = error  # an actor that dies in its constructor tells nobody why

    members: dict[str, Any] = {"__init__": construct, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    for name in _methods_of(cls):
        members[name] = _remote_method(name)
    return ray.remote(type(cls.__name__, (), members))


def _remote_method(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fray_failure is not None:
            raise self.fray_failure
        with _on_worker(self.fray_has_tpu):
            result = getattr(self.fray_object, name)(*args, **kwargs)
            # Not by Ray's own asynchronous actors: those begin calls in any order.
            return asyncio.run(result) if inspect.iscoroutine(result) else result

    method.__name__ = method.__qualname__ = name
    return method


def _actor_options(options: ActorOptions) -> dict[str, Any]:
    asked = _resource_options(options.resources or {})
    if options.name is not None:
        asked |= {"name": options.name, "get_if_exists": options.get_if_exists}
    if options.lifetime is Lifetime.DETACHED:
        asked |= {"lifetime": "detached", "namespace": DETACHED_NAMESPACE}
    return asked


@functools.cache
def _methods_of(cls: type) -> frozenset[str]:
    return frozenset(name for name in dir(cls) if not name.startswith("__") and callable(getattr(cls, name)))


@contextmanager
def _on_worker(has_tpu: bool) -> Iterator[None]:
    """Run what a task or an actor's method does, as its own context says."""
    _keep_off_tpu(not has_tpu)
    try:
        with use_job_context(RayJobContext()):
            yield
    except SystemExit as error:
        raise _Exited(error.code) from error


_jax_was_kept_off = False


def _keep_off_tpu(keep: bool) -> None:
    """Keep JAX on the CPU, unless the user said where it is to be; a worker may serve both kinds of tasks in turn."""
    global _jax_was_kept_off
    if keep and _JAX_PLATFORMS not in os.environ:
        os.environ[_JAX_PLATFORMS] = "cpu"
        _jax_was_kept_off = True
    elif not keep and _jax_was_kept_off:
        os.environ.pop(_JAX_PLATFORMS, None)
        _jax_was_kept_off = False


def _raise_original(error: Exception) -> NoReturn:
    """Raise what the task raised, with Ray's error as its cause; or a `PlatformError` where Ray itself failed."""
    from ray.exceptions import RayError, RayTaskError

    cause: Any = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, _Exited):
        raise SystemExit(*cause.args) from error
    if isinstance(cause, RayError) or cause is error:
        said = str(cause).strip().splitlines()
        raise PlatformError(
            f"Ray could not run a task or an actor to its end: {type(cause).__name__}: {' '.join(said[:3])}"
        ) from error
    raise cause from error
