"""Which job context the running code belongs to: `get_job_context()` and what sets it.

What is set, is set in the current context in the sense of `contextvars`: an asyncio task inherits it, Fray's own tasks
and actor methods have theirs, and two threads do not disturb each other. A thread that you start yourself begins with
nothing set; hand it the context, or start it with `contextvars.copy_context().run`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fray._local_job_context import LocalJobContext, current_job_context
from fray.job import JobContext

__all__ = ["clear_job_context", "get_job_context", "set_job_context", "use_job_context"]

# One context a class and process, however it is found. Reentrant: a context's constructor may ask for a context.
_lock = threading.RLock()
_made: dict[type[JobContext], JobContext] = {}
_named: dict[str, type[JobContext]] = {"local": LocalJobContext}  # the core's own: no metadata need be read for it
_installed: tuple[type[JobContext], ...] | None = None


def get_job_context() -> JobContext:
    """Return the job context of the running code.

    The first of these: the one set in the current context (inside a task or an actor: the one that it was created
    from); the one that the environment variable `FRAY_JOB_CONTEXT` names; an installed one that finds its engine
    around this process; threads of this process. But for the first, each is made once and shared by the whole process.

    Raises:
        UsageError: `FRAY_JOB_CONTEXT` names a job context that is not installed or cannot be loaded.
    """
    current = current_job_context.get()
    if current is not None:
        return current
    name = os.environ.get("FRAY_JOB_CONTEXT")
    with _lock:
        if name:
            return _instance(_class_named(name))
        try:
            return _instance(_detected_class())
        except Exception:  # a plugin that nobody asked for must not break the code that asks for any
            return _instance(LocalJobContext)


def set_job_context(ctx: JobContext) -> None:
    """Make `ctx` what `get_job_context()` returns in the current context, until it is set again or cleared."""
    current_job_context.set(ctx)


def clear_job_context() -> None:
    """Have `get_job_context()` look beyond the current context again."""
    current_job_context.set(None)


@contextmanager
def use_job_context(ctx: JobContext) -> Iterator[JobContext]:
    """Make `ctx` what `get_job_context()` returns inside a `with` block; then what it was before."""
    token = current_job_context.set(ctx)
    try:
        yield ctx
    finally:
        current_job_context.reset(token)


def _instance(cls: type[JobContext]) -> JobContext:
    if cls not in _made:
        _made[cls] = cls()
    return _made[cls]


def _class_named(name: str) -> type[JobContext]:
    if name not in _named:
        from fray.plugins import load_job_context

        _named[name] = load_job_context(name)
    return _named[name]


def _detected_class() -> type[JobContext]:
    # Which are installed is found out once, whether their engine is there every time: it may be started later.
    global _installed
    if _installed is None:
        from fray.plugins import detect_job_contexts

        _installed = tuple(detect_job_contexts())
    for cls in _installed:
        try:
            if cls.detect():
                return cls
        except Exception:  # a plugin that nobody asked for must not break the code that asks for any
            continue
    return LocalJobContext
