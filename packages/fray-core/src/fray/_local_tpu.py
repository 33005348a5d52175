"""`run_on_tpu` without TPUs: the hosts of every slice are threads of this process.

For tests of what the hosts of a slice do together, on a machine that has none.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

from fray._local_job_context import LocalJobContext, current_job_context
from fray.errors import InvalidTypeError, UnsupportedError
from fray.job import TpuContext
from fray.tpu import tpu_type
from fray.types import RuntimeEnv, TpuRunConfig

__all__ = ["run_on_local_hosts"]

# How long a host that has begun may go on alone before the next begins. Enough for a short function to end, so that
# hosts which share a counter find it in host order; little enough that hosts which wait for each other soon all run.
_HEAD_START_SECONDS = 0.02
# What the head starts of a large run may add up to.
_HEAD_STARTS_SECONDS = 2.0

# `minimum_resources` and `excludes` are not here: memory shared needs nothing asked for and ships nothing.
_NOT_FOR_THREADS = (
    "package_requirements",
    "maximum_resources",
    "env",
    "secrets",
    "working_dir",
    "container_image",
    "extras",
)


def run_on_local_hosts(
    fn: Callable[..., Any], config: TpuRunConfig, runtime_env: RuntimeEnv | None = None
) -> list[Any]:
    """Call `fn(ctx)` once for every host of every slice, each in a thread, begun in host order.

    `fn` is shared, not copied, and so is what it closes over. Inside it `get_job_context()` is its `TpuContext`; tasks
    and named actors are those of one `LocalJobContext`, made for this run. Nothing is preempted and nothing started
    again: the retry budgets and the `MEGASCALE_*` variables are for slices that exist.

    Returns:
        The results, slice by slice, in host order.

    Raises:
        Exception: What the first host to raise raised, as soon as every host has begun. Hosts that run on then are
            left to end by themselves: they may be waiting for the one that failed, and a thread cannot be stopped.
        InvalidTypeError: `fn` cannot be called.
        InvalidValueError: There is no such TPU type.
        UnsupportedError: `runtime_env` asks for what threads of this process cannot have apart.
    """
    if not callable(fn):
        raise InvalidTypeError(f"run_on_tpu takes a function of one argument (its TpuContext), got {fn!r}")
    _check_runtime_env(runtime_env)
    hosts_per_slice = tpu_type(config.tpu_type).hosts
    job_context = LocalJobContext()
    run = _Run(config.num_slices * hosts_per_slice)
    head_start = min(_HEAD_START_SECONDS, _HEAD_STARTS_SECONDS / run.num_hosts)
    for index in range(run.num_hosts):
        slice_id, host_id = divmod(index, hosts_per_slice)
        context = TpuContext(
            job_context,
            slice_id=slice_id,
            num_slices=config.num_slices,
            host_id=host_id,
            num_hosts=hosts_per_slice,
        )
        run.start_host(index, fn, context).join(head_start)
    return run.results()


class _Run:
    """What the hosts of one run have come to."""

    def __init__(self, num_hosts: int) -> None:
        self.num_hosts = num_hosts
        self._results: list[Any] = [None] * num_hosts
        self._num_ended = 0
        self._first_error: BaseException | None = None
        self._changed = threading.Condition()

    def start_host(self, index: int, fn: Callable[..., Any], context: TpuContext) -> threading.Thread:
        """Start one host, and return its thread once it is about to call the function."""
        begun = threading.Event()
        variables = contextvars.copy_context()
        variables.run(current_job_context.set, context)

        def call() -> None:
            begun.set()
            try:
                self._end(index, variables.run(fn, context))
            except BaseException as error:  # a host's SystemExit too is for the caller to hear of
                self._end(index, None, error)

        name = f"fray-slice-{context.slice_id}-host-{context.host_id}"
        thread = threading.Thread(target=call, name=name, daemon=True)
        thread.start()
        begun.wait()
        return thread

    def results(self) -> list[Any]:
        """Wait until every host has returned, or one has raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_ended == self.num_hosts or self._first_error is not None)
            if self._first_error is not None:
                raise self._first_error
            return self._results

    def _end(self, index: int, result: Any, error: BaseException | None = None) -> None:
        with self._changed:
            self._results[index] = result
            self._num_ended += 1
            self._first_error = self._first_error or error
            self._changed.notify_all()


def _check_runtime_env(runtime_env: RuntimeEnv | None) -> None:
    for name in _NOT_FOR_THREADS:
        if getattr(runtime_env, name, None):
            raise UnsupportedError(
                f"run_on_tpu cannot apply runtime_env.{name} here: its hosts are threads of this process, and share "
                "its environment, packages and directory; set these before the process starts, or run on a Ray cluster"
            )
