"""Whose fault the end of an attempt is: the slices', the function's, or that of neither.

Told from what Ray says of a host's process, once it is known that no host has gone: a lost host is the cause of all
that the others say.
"""

from __future__ import annotations

from enum import StrEnum

from fray.backend.ray._tpu_host import ChipsHeldError, ExitedError, FunctionError, OpaqueError
from fray.backend.ray._tpu_slices import Host
from fray.errors import HostFailedError, PlatformError, PreemptedError

__all__ = ["AttemptError", "Blame", "has_died", "judge", "preempted"]


class Blame(StrEnum):
    """Whose fault the end of an attempt is."""

    SLICES = "slices"  # a host went away
    HOST = "host"  # another process holds its chips: not this function's fault, nor a preemption
    FUNCTION = "function"
    SETUP = "setup"  # the function could not be brought to run, and another attempt would end the same


class AttemptError(Exception):
    """An attempt has failed.

    Attributes:
        blame: Whose fault it is.
        error: What is to be raised when there is no other attempt.
        hosts: The hosts that it is about.
    """

    def __init__(
        self, blame: Blame, error: BaseException, hosts: list[Host], cause: BaseException | None = None
    ) -> None:
        super().__init__(str(error))
        self.blame = blame
        self.error = error
        self.hosts = hosts
        if cause is not None and cause is not error:
            error.__cause__ = cause


def has_died(error: BaseException) -> bool:
    """Say whether Ray has lost a host's process, of which the function could not speak any more."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def preempted(lost: list[Host], error: BaseException | None = None) -> AttemptError:
    """Return the end of an attempt whose hosts were taken away."""
    said = ", ".join(str(host) for host in lost)
    return AttemptError(Blame.SLICES, PreemptedError(f"{said} went away"), lost, error)


def judge(host: Host, error: BaseException) -> AttemptError:
    """Say what an error is to be taken for, where all hosts are there.

    Args:
        host: Whose process it is about.
        error: What Ray raised for it; or an error of Fray's own, for what was seen from here.
    """
    from ray.exceptions import OutOfMemoryError, RayTaskError, RuntimeEnvSetupError

    if isinstance(error, RuntimeEnvSetupError):
        return AttemptError(Blame.SETUP, PlatformError(f"the hosts could not be set up: {error}"), [host], error)
    if has_died(error):
        how = "ran out of memory" if isinstance(error, OutOfMemoryError) else "died"
        said = f"run_on_tpu: the process on {host} {how}: {_first_lines(error)}"
        return AttemptError(Blame.FUNCTION, HostFailedError(said), [host], error)
    raised: BaseException | None = error
    while isinstance(raised, RayTaskError):
        raised = raised.cause
    if isinstance(raised, ChipsHeldError):
        return AttemptError(Blame.HOST, PlatformError(f"{host}: {raised}"), [host], error)
    if isinstance(raised, FunctionError):
        return AttemptError(Blame.SETUP, PlatformError(str(raised)), [host], error)
    if isinstance(raised, ExitedError):
        return AttemptError(Blame.FUNCTION, SystemExit(*raised.args), [host], error)
    if raised is None or isinstance(raised, OpaqueError):
        said = f"run_on_tpu: what the function raised on {host} cannot be handed over: {raised or error}"
        return AttemptError(Blame.FUNCTION, HostFailedError(said), [host], error)
    return AttemptError(Blame.FUNCTION, raised, [host], error)


def _first_lines(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3])
