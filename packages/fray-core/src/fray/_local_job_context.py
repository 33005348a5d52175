"""Tier 2 in memory: tasks and actors are threads of this process. What `get_job_context()` gives outside an engine.

Nothing is pickled, so arguments and results are shared, not copied. Threads start when there is something to run and
end when there is not; they are daemons, so a program that ends does not wait for tasks whose results nobody wanted.
"""

from __future__ import annotations

import contextvars
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from fray.errors import InvalidTypeError, InvalidValueError
from fray.job import JobContext, check_call, check_wait
from fray.types import ActorOptions, ActorRef, ObjectRef, TaskOptions

__all__ = ["LocalJobContext"]

current_job_context: contextvars.ContextVar[JobContext | None] = contextvars.ContextVar(
    "current_job_context", default=None
)
"""What `fray.context` reads and sets. Defined here, below it, because a task sets it too."""


class LocalJobContext(JobContext):
    """Runs tasks and actors as threads that share this process's memory.

    Accepted without effect, since threads of one process cannot have them apart: `resources`, `runtime_env`,
    `max_calls` and `lifetime`. A named actor lives as long as its context.

    A task sees a copy of its creator's context variables, in which the job context is this one (also where it was
    created through a wrapper, such as the `TpuContext` of a host: a task does not run on a particular host).

    Args:
        max_workers: How many tasks and actor methods run at a time. One that waits in `get` or `wait` does not count,
            so nested tasks of any depth finish. A `wait` that runs out of time inside a task goes on at its deadline,
            for that moment as one more than this.

    Raises:
        InvalidTypeError: `max_workers` is no integer.
        InvalidValueError: `max_workers` is below 1.
    """

    def __init__(self, max_workers: int = 10) -> None:
        if isinstance(max_workers, bool) or not isinstance(max_workers, int):
            raise InvalidTypeError(f"max_workers must be an integer, got {max_workers!r}")
        if max_workers < 1:
            raise InvalidValueError(f"max_workers must be at least 1, got {max_workers}")
        self._pool = _Pool(max_workers)
        self._names_lock = threading.Lock()
        self._named: dict[str, _Actor] = {}

    def create_task(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: TaskOptions | None = None,
    ) -> LocalObjectRef:
        """See `JobContext.create_task`. `options` have no effect in memory."""
        call = _Call(self, self._pool, fn, args, check_call("fn", fn, args, kwargs))
        call.start()
        return call.ref

    def get(self, ref: Any) -> Any:
        """See `JobContext.get`. What is no reference is returned unchanged."""
        if isinstance(ref, list):
            with _slot_given_up([one for one in ref if isinstance(one, LocalObjectRef) and not one.is_done]):
                return [_resolve(one) for one in ref]
        if not isinstance(ref, LocalObjectRef):
            return ref
        with _slot_given_up([] if ref.is_done else [ref]):
            return _resolve(ref)

    def wait(
        self, refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None
    ) -> tuple[list[Any], list[Any]]:
        """See `JobContext.wait`.

        Raises:
            InvalidTypeError: `refs` is no sequence of references (one alone is written `[ref]`).
            InvalidValueError: A reference is there twice, `num_returns` is below 1 or above their number, or
                `timeout` is negative.
        """
        check_wait(refs, num_returns, timeout, LocalObjectRef)
        if not refs:
            return [], []
        deadline = None if timeout is None else time.monotonic() + min(timeout, threading.TIMEOUT_MAX)
        pending = [ref for ref in refs if not ref.is_done]
        missing = num_returns - (len(refs) - len(pending))
        if missing > 0:
            with _slot_given_up(pending, deadline):
                _await(pending, missing, deadline)
        done = [ref for ref in refs if ref.is_done][:num_returns]
        returned = set(map(id, done))
        return done, [ref for ref in refs if id(ref) not in returned]

    def put(self, obj: Any) -> LocalObjectRef:
        """See `JobContext.put`. The object is shared, not copied."""
        ref = LocalObjectRef()
        ref.settle(obj)
        return ref

    def create_actor(
        self,
        cls: type,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        options: ActorOptions | None = None,
    ) -> LocalActorRef:
        """See `JobContext.create_actor`. What the constructor raises, every method call's reference raises."""
        keywords = check_call("cls", cls, args, kwargs)
        name = options.name if options is not None else None
        actor = _Actor(self, self._pool, cls, args, keywords, partial(self._free_name, name))
        if options is not None and name is not None:
            with self._names_lock:
                existing = self._named.setdefault(name, actor)
            if existing is not actor:
                if options.get_if_exists:
                    return LocalActorRef(existing)
                raise InvalidValueError(
                    f"an actor named {name!r} exists: choose another name, or get it with "
                    f"ActorOptions(name={name!r}, get_if_exists=True)"
                )
        actor.start()
        return LocalActorRef(actor)

    def _free_name(self, name: str | None, actor: _Actor) -> None:
        with self._names_lock:
            if name is not None and self._named.get(name) is actor:
                del self._named[name]


class LocalObjectRef(ObjectRef):
    """What a call gives, or will give: settled once, then the same for ever."""

    __slots__ = ("_callbacks", "_error", "_lock", "_traceback", "_value", "call", "is_done")

    def __init__(self, call: _Call | None = None) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], object]] = []
        self._value: Any = None
        self._error: BaseException | None = None
        self.call = call
        self.is_done = False

    def settle(self, value: Any, error: BaseException | None = None) -> None:
        with self._lock:
            self._value = value
            self._error = error
            self._traceback = error.__traceback__ if error is not None else None
            self.is_done = True
            self.call = None
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def when_done(self, callback: Callable[[], object]) -> bool:
        """Have `callback` called when this is settled; return False, and do nothing, where it is already."""
        with self._lock:
            if not self.is_done:
                self._callbacks.append(callback)
            return not self.is_done

    def forget(self, callback: Callable[[], object]) -> None:
        with self._lock:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

    def value(self) -> Any:
        """Return the settled value, or raise the settled error."""
        if self._error is not None:
            # The traceback of the failure itself, each time: raising would else add to it with every get.
            raise self._error.with_traceback(self._traceback)
        return self._value


class LocalActorRef(ActorRef):
    """A handle on an actor: its methods return references."""

    __slots__ = ("__actor",)

    def __init__(self, actor: _Actor) -> None:
        self.__actor = actor

    def __getattr__(self, name: str) -> Callable[..., LocalObjectRef]:
        # Python's own protocols (copy, pickle) ask for special names before there is an actor to look at.
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        if not callable(getattr(self.__actor.cls, name, None)):
            raise AttributeError(f"the actor's class {self.__actor.cls.__qualname__} has no method {name!r}")
        return partial(self.__actor.call, name)

    def __repr__(self) -> str:
        return f"<actor {self.__actor.cls.__qualname__}>"


class _Actor:
    """An object, and the calls on it that wait for their turn. Holds no thread: its next call is queued as a task's."""

    def __init__(
        self,
        job_context: JobContext,
        pool: _Pool,
        cls: type,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_broken: Callable[[_Actor], None],
    ) -> None:
        self.cls = cls
        self._job_context = job_context
        self._pool = pool
        self._on_broken = on_broken
        self._instance: Any = None
        self._lock = threading.Lock()
        self._is_busy = True
        construction = _Call(job_context, pool, self._construct, args, kwargs, self._next)
        self._constructed = construction.ref
        self._calls = deque([construction])

    def start(self) -> None:
        """Have the constructor called; every method call comes after it."""
        self._next()

    def call(self, method: str, /, *args: Any, **kwargs: Any) -> LocalObjectRef:
        call = _Call(self._job_context, self._pool, partial(self._invoke, method), args, kwargs, self._next)
        with self._lock:
            self._calls.append(call)
            if self._is_busy:
                return call.ref
            self._is_busy = True
        self._next()
        return call.ref

    def _next(self) -> None:
        with self._lock:
            if not self._calls:
                self._is_busy = False
                return
            call = self._calls.popleft()
        call.start()

    def _construct(self, /, *args: Any, **kwargs: Any) -> None:
        try:
            self._instance = self.cls(*args, **kwargs)
        except BaseException:
            self._on_broken(self)
            raise

    def _invoke(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        self._constructed.value()
        result = getattr(self._instance, method)(*args, **kwargs)
        if not inspect.iscoroutine(result):
            return result
        import asyncio

        return asyncio.run(result)


class _Call:
    """One call of a function, from its making to its result."""

    __slots__ = ("_args", "_context", "_fn", "_kwargs", "_on_end", "_unseen", "is_queued", "is_wanted", "pool", "ref")

    def __init__(
        self,
        job_context: JobContext,
        pool: _Pool,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._context = contextvars.copy_context()
        self._context.run(current_job_context.set, job_context)
        self._fn = fn
        self._args = args
        self._kwargs = kwargs
        self._on_end = on_end
        self._unseen: Iterator[Any] = iter((*args, *kwargs.values()))
        self.pool = pool
        self.is_queued = False
        self.is_wanted = False
        self.ref = LocalObjectRef(self)

    def start(self) -> None:
        """Queue the call once every reference among its arguments is done. Until then it takes no slot, no thread.

        What failed there is queued too: failing at once would nest as deep as the chain of references is long.
        """
        for argument in self._unseen:
            if isinstance(argument, LocalObjectRef) and argument.when_done(self.start):
                return
        self.pool.submit(self)

    def run(self) -> None:
        try:
            value = self._context.run(self._apply)
        except BaseException as error:  # SystemExit too belongs to whoever gets the result, not to this thread
            self.end(None, error)
        else:
            self.end(value)

    def end(self, value: Any, error: BaseException | None = None) -> None:
        self.ref.settle(value, error)
        if self._on_end is not None:
            self._on_end()

    def _apply(self) -> Any:
        args = [_resolve(argument) for argument in self._args]
        return self._fn(*args, **{name: _resolve(argument) for name, argument in self._kwargs.items()})


class _Pool:
    """Slots to run in. Who has one runs; it is handed on when that ends, or waits for a reference."""

    def __init__(self, size: int) -> None:
        self._lock = threading.Lock()
        # Below zero while calls whose wait ran out of time run beyond the bound.
        self._free = size
        self._queue: deque[_Call] = deque()
        # Queued calls that a running one waits for, last first: a tree of tasks is walked depth first, and does not
        # hold a thread for every inner node at once.
        self._wanted: list[_Call] = []
        self._resuming: deque[threading.Lock] = deque()

    def submit(self, call: _Call) -> None:
        with self._lock:
            call.is_queued = True
            self._queue.append(call)
            if self._free <= 0:
                return
            self._free -= 1
            next_call = self._hand_on()
        self._start_thread(next_call)

    def give_up_slot(self, refs: Sequence[LocalObjectRef]) -> None:
        """Let others run while the calling thread waits for `refs`."""
        with self._lock:
            for ref in reversed(refs):
                call = ref.call
                if call is not None and call.pool is self and call.is_queued and not call.is_wanted:
                    call.is_wanted = True
                    self._wanted.append(call)
            next_call = self._hand_on()
        self._start_thread(next_call)

    def take_slot(self, deadline: float | None) -> None:
        """Wait for a slot to go on in; past the deadline go on without."""
        with self._lock:
            if self._free > 0:
                self._free -= 1
                return
            gate = threading.Lock()
            gate.acquire()
            self._resuming.append(gate)
        if not gate.acquire(timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())):
            with self._lock:
                if gate in self._resuming:
                    self._resuming.remove(gate)
                    self._free -= 1

    def _hand_on(self) -> _Call | None:
        """Hand the caller's slot on. A call that is returned is to be run with it. The lock is held."""
        if self._free < 0:
            self._free += 1
            return None
        if self._resuming:
            self._resuming.popleft().release()
            return None
        while self._wanted or self._queue:
            call = self._wanted.pop() if self._wanted else self._queue.popleft()
            if call.is_queued:  # else it was in both, and has been started
                call.is_queued = False
                return call
        self._free += 1
        return None

    def _start_thread(self, call: _Call | None) -> None:
        while call is not None:
            try:
                threading.Thread(target=self._work, args=(call,), name="fray-task", daemon=True).start()
                return
            except RuntimeError as error:  # no more threads to be had: who waits for the call must hear of it
                call.end(None, error)
            with self._lock:
                call = self._hand_on()

    def _work(self, call: _Call | None) -> None:
        _thread.pool = self
        while call is not None:
            call.run()
            with self._lock:
                call = self._hand_on()


class _Thread(threading.local):
    """The calling thread's pool, where it runs a call and so has a slot."""

    pool: _Pool | None = None


_thread = _Thread()


@contextmanager
def _slot_given_up(pending: Sequence[LocalObjectRef], deadline: float | None = None) -> Iterator[None]:
    pool = _thread.pool
    if pool is None or not pending:
        yield
        return
    pool.give_up_slot(pending)
    try:
        yield
    finally:
        pool.take_slot(deadline)


def _resolve(value: Any) -> Any:
    if not isinstance(value, LocalObjectRef):
        return value
    if not value.is_done:
        _await([value], 1, None)
    return value.value()


def _await(refs: Sequence[LocalObjectRef], count: int, deadline: float | None) -> None:
    """Block until `count` of `refs` are done, or for as long as the deadline allows."""
    done = threading.Semaphore(0)
    try:
        for ref in refs:
            if not ref.when_done(done.release):
                done.release()
        for _ in range(count):
            if not done.acquire(timeout=None if deadline is None else max(0.0, deadline - time.monotonic())):
                return
    finally:
        # Also when interrupted: a reference that is polled for hours must not collect callbacks.
        for ref in refs:
            ref.forget(done.release)
