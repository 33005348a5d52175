"""What runs on each host of a slice: the Ray actor around the function that `run_on_tpu` was given.

Nothing of the user's is imported until all hosts are there and the environment is what the function is to see. It
belongs to Fray's light part, since the hosts have only that.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fray.backend.ray._tpu_keeper import MARK
from fray.context import use_job_context
from fray.detached import program, start_detached
from fray.job import JobContext, TpuContext

__all__ = [
    "LOCKFILE_VARIABLE",
    "Assignment",
    "ChipsHeldError",
    "ExitedError",
    "FunctionError",
    "HostProcess",
    "OpaqueError",
    "RayTpuContext",
]

LOCKFILE_VARIABLE = "FRAY_LIBTPU_LOCKFILE"
"""Names another lock file than libtpu's own, where hosts are only simulated."""

_LOCKFILE = "/tmp/libtpu_lockfile"
_DEVICES = ("/dev/accel", "/dev/vfio/")
# Where JAX's coordination service and libtpu's MegaScale listen, unless something else does there.
_JAX_PORT, _MEGASCALE_PORT = 8476, 8081


class ChipsHeldError(Exception):
    """Another process holds the host's chips."""


class FunctionError(Exception):
    """The function cannot be made on this host, so that no other attempt can do better there."""


class OpaqueError(Exception):
    """Stands for an exception of the function's that cannot be handed over; its traceback as text."""


class ExitedError(Exception):
    """Stands for the function's `SystemExit`, which would end the worker before it has said so."""


@dataclass(frozen=True)
class Assignment:
    """What one host is to do.

    Attributes:
        caller: Where its keeper connects to: address and port.
        token: By which the caller knows it.
        index: Its place among all hosts, slice by slice.
        mark: What the environment of all its processes holds.
        slice_id: Of `TpuContext`, as are the next four.
        num_slices: See there.
        host_id: See there.
        num_hosts: See there.
        attempt: See there.
        grace_seconds: Between asking its processes to end, and ending them.
        secrets: Variables of the function's environment that no one else is to see.
    """

    caller: tuple[str, int]
    token: str
    index: int
    mark: str
    slice_id: int
    num_slices: int
    host_id: int
    num_hosts: int
    attempt: int
    grace_seconds: float
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)


class RayTpuContext(TpuContext):
    """`TpuContext` on a host of a Ray cluster."""

    def __init__(self, job_context: JobContext, control: int, **places: int) -> None:
        super().__init__(job_context, **places)
        self._control: int | None = control

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_control": None}  # in another process it leads nowhere

    def report_step(self, step: int) -> None:
        """See `TpuContext.report_step`."""
        before = self.step
        super().report_step(step)
        if self.step > before and self._control is not None:
            os.write(self._control, json.dumps({"step": self.step}).encode() + b"\n")


class HostProcess:
    """The actor around one call of the function on one host."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment

    def call(self, function: bytes) -> Any:
        """Call the function, once all other hosts are ready too, and return what it returns."""
        return _call(self._assignment, function)


def _call(assignment: Assignment, function: bytes) -> Any:
    control, go = _start_keeper(assignment)
    check_chips_are_free()
    os.environ.update(assignment.secrets)
    with open(go, "rb") as told:
        line = told.readline()
    if not line:
        raise ConnectionError("the caller has gone")
    word = json.loads(line)
    os.environ.update(word["environment"])
    for name, value in word["defaults"].items():
        os.environ.setdefault(name, value)
    import ray.cloudpickle
    from fray.backend.ray.ray_job import RayJobContext

    try:
        fn = ray.cloudpickle.loads(function)
    except Exception as error:
        raise FunctionError(
            f"the function of run_on_tpu cannot be loaded on the hosts: {type(error).__name__}: {error}; what it "
            "imports must be there: in the job's directory, or among package_requirements"
        ) from error
    context = RayTpuContext(
        RayJobContext(),
        control,
        slice_id=assignment.slice_id,
        num_slices=assignment.num_slices,
        host_id=assignment.host_id,
        num_hosts=assignment.num_hosts,
        attempt=assignment.attempt,
    )
    try:
        with use_job_context(context):
            return fn(context)
    except SystemExit as error:
        raise ExitedError(error.code) from error
    except Exception as error:
        _check_travels(error)
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # the function may have closed it
                stream.flush()


def _check_travels(error: Exception) -> None:
    """Replace an exception that cannot be pickled, or made again from that: Ray's worker would die of it."""
    import ray.cloudpickle

    try:
        ray.cloudpickle.loads(ray.cloudpickle.dumps(error))  # type: ignore[no-untyped-call]
    except Exception:
        import traceback

        raise OpaqueError("".join(traceback.format_exception(error)).strip()) from None


def free_port(wanted: int) -> int:
    """Return this port, or another one where something listens on it already."""
    for port in (wanted, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    raise OSError("this host has no free port")


def check_chips_are_free() -> None:
    """Refuse a host whose chips another process holds; remove libtpu's lock file where nobody does.

    Raises:
        ChipsHeldError: Which processes hold them.
    """
    lockfile = os.environ.get(LOCKFILE_VARIABLE, _LOCKFILE)
    holders = _holders((lockfile,) if LOCKFILE_VARIABLE in os.environ else (lockfile, *_DEVICES))
    if holders:
        raise ChipsHeldError(f"process {', '.join(map(str, holders))} of {socket.gethostname()} holds its chips")
    with suppress(FileNotFoundError), open(lockfile, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ChipsHeldError(f"{lockfile} of {socket.gethostname()} is locked") from None
        os.unlink(lockfile)


def _holders(paths: tuple[str, ...]) -> list[int]:
    """Return the other processes that have one of these files open; a path may be the beginning of several."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal() or int(entry) == os.getpid():
            continue
        with suppress(OSError):  # it has ended, or is somebody else's
            for descriptor in os.listdir(f"/proc/{entry}/fd"):
                with suppress(OSError):
                    if os.readlink(f"/proc/{entry}/fd/{descriptor}").startswith(paths):
                        found.append(int(entry))
                        break
    return sorted(found)


def _start_keeper(assignment: Assignment) -> tuple[int, int]:
    """Start the keeper and give it what this process prints; return where to report to it, and where it reports."""
    output, printed = os.pipe()
    control, reported = os.pipe()
    go, said = os.pipe()
    told = {
        "address": assignment.caller[0],
        "port": assignment.caller[1],
        "mark": assignment.mark,
        "grace": assignment.grace_seconds,
        "worker": os.getpid(),
        "raylet": os.getppid(),
        "hello": {
            "token": assignment.token,
            "index": assignment.index,
            "jax_port": free_port(_JAX_PORT),
            "megascale_port": free_port(_MEGASCALE_PORT),
        },
    }
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    keeper = program("fray.backend.ray._tpu_keeper", output, control, said)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with open(
        start_detached(keeper, environment=environment, keep_fds=(output, control, said), stderr=nowhere), "wb"
    ) as stdin:
        stdin.write(json.dumps(told).encode())
    for descriptor in (output, control, said, nowhere):
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    os.close(printed)
    # Ray's own streams may lead elsewhere than to these descriptors.
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, errors="backslashreplace", closefd=False) for number in (1, 2))
    return reported, go
