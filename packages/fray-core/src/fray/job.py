"""Tier 2: tasks, actors and objects inside one job.

`JobContext` is what `fray.get_job_context()` returns: threads of this process (`LocalJobContext`), or Ray's workers.
The same program runs on each. `TpuContext` is the one that a function run by `run_on_tpu` is given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from fray.errors import InvalidTypeError, InvalidValueError
from fray.types import ActorOptions, TaskOptions

__all__ = ["JobContext", "TpuContext"]


class JobContext(ABC):
    """Runs functions and objects elsewhere, and hands out references to what they give.

    @plugin-dev: register a subclass under the entry point group `fray.job_contexts`. It is made without arguments.
    """

    @classmethod
    def detect(cls) -> bool:
        """Say whether this process already runs inside the engine that this context speaks to.

        @plugin-dev: cheap: look at `sys.modules` and `os.environ`, import no engine.
        """
        return False

    @abstractmethod
    def create_task(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: TaskOptions | None = None,
    ) -> Any:
        """Start `fn(*args, **kwargs)` and return a reference to its result at once.

        References among the arguments are resolved before the call; what failed there fails this task.

        Raises:
            InvalidTypeError: `fn` cannot be called, `args` is no tuple, or `kwargs` no mapping.
        """

    @abstractmethod
    def get(self, ref: Any) -> Any:
        """Wait for a reference's value, or for the values of a list of references, in order.

        Raises:
            Exception: What the task raised, of the same type and with the same message.
        """

    @abstractmethod
    def wait(
        self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """Wait until `num_returns` of `refs` are done, or for `timeout` seconds.

        Returns:
            The references that are done (at most `num_returns`) and the others, each in the order given.
        """

    @abstractmethod
    def put(self, obj: Any) -> Any:
        """Store a value and return a reference to it."""

    @abstractmethod
    def create_actor(
        self,
        cls: type,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: ActorOptions | None = None,
    ) -> Any:
        """Make `cls(*args, **kwargs)` elsewhere and return a handle, whose methods return references.

        Calls on one handle run one after the other, in the order made, those of asynchronous methods too, whose
        references give what they return. A method that raises fails its reference, not the actor.

        Raises:
            InvalidTypeError: `cls` is no class, `args` is no tuple, or `kwargs` no mapping.
            InvalidValueError: An actor of `options.name` exists, without `get_if_exists`.
        """


class TpuContext(JobContext):
    """What a function run by `run_on_tpu` is given: where it runs, and the means to make tasks there.

    Attributes:
        slice_id: Which slice, from 0.
        num_slices: How many slices take part.
        host_id: Which host of the slice, from 0 (`TPU_WORKER_ID`).
        num_hosts: How many hosts a slice has.
        attempt: Which start of the whole this is, from 1.
    """

    def __init__(
        self,
        job_context: JobContext,
        *,
        slice_id: int,
        num_slices: int,
        host_id: int,
        num_hosts: int,
        attempt: int = 1,
    ) -> None:
        self._job_context = job_context
        self.slice_id = slice_id
        self.num_slices = num_slices
        self.host_id = host_id
        self.num_hosts = num_hosts
        self.attempt = attempt
        self.step = -1

    def report_step(self, step: int) -> None:
        """Say how far the computation has come; a failure that repeats at one step is not retried for ever."""
        self.step = max(self.step, step)

    def create_task(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: TaskOptions | None = None,
    ) -> Any:
        """See `JobContext.create_task`."""
        return self._job_context.create_task(fn, args, kwargs, options)

    def get(self, ref: Any) -> Any:
        """See `JobContext.get`."""
        return self._job_context.get(ref)

    def wait(
        self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """See `JobContext.wait`."""
        return self._job_context.wait(refs, num_returns, timeout)

    def put(self, obj: Any) -> Any:
        """See `JobContext.put`."""
        return self._job_context.put(obj)

    def create_actor(
        self,
        cls: type,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: ActorOptions | None = None,
    ) -> Any:
        """See `JobContext.create_actor`."""
        return self._job_context.create_actor(cls, args, kwargs, options)


def check_call(what: str, target: object, args: object, kwargs: object) -> dict[str, Any]:
    """Refuse a task's or an actor's arguments that cannot be right, and return `kwargs` as a dictionary."""
    wanted = isinstance(target, type) if what == "cls" else callable(target)
    if not wanted:
        raise InvalidTypeError(f"{what} must be {'a class' if what == 'cls' else 'callable'}, got {target!r}")
    if not isinstance(args, tuple):
        raise InvalidTypeError(f"args must be a tuple, got {type(args).__name__}: write args=(x,) for one argument")
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise InvalidTypeError(f"kwargs must be a mapping, got {type(kwargs).__name__}")
    return dict(kwargs)


def check_wait(
    refs: object,
    num_returns: object,
    timeout: float | None,
    ref_type: type,
    identity: Callable[[Any], Hashable] = id,
) -> None:
    """Refuse what `wait` cannot be asked for.

    Args:
        refs: What is to be a list of references.
        num_returns: How many of them to wait for.
        timeout: Seconds, or None.
        ref_type: What the context's references are.
        identity: Tells one reference from another.
    """
    if isinstance(refs, (str, bytes)) or not isinstance(refs, Sequence):
        raise InvalidTypeError(f"wait takes a list of references, got {refs!r}: write wait([ref]) for one")
    for ref in refs:
        if not isinstance(ref, ref_type):
            raise InvalidTypeError(f"wait takes references that this context made, got {ref!r}")
    if len(set(map(identity, refs))) < len(refs):
        raise InvalidValueError("wait takes each reference once, and one of these is there twice")
    if isinstance(num_returns, bool) or not isinstance(num_returns, int):
        raise InvalidTypeError(f"num_returns must be an integer, got {num_returns!r}")
    if num_returns < 1 or num_returns > max(1, len(refs)):
        raise InvalidValueError(f"num_returns must be from 1 to the number of references ({len(refs)}): {num_returns}")
    if timeout is not None and not timeout >= 0:
        raise InvalidValueError(f"timeout cannot be negative, got {timeout}")
