"""A whole run of `run_on_tpu`: slices, attempts, and what is made good how often."""

from __future__ import annotations

import logging
import random
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fray.backend.ray._tpu_attempt import Attempt, HostEnvironment
from fray.backend.ray._tpu_blame import AttemptError, Blame
from fray.backend.ray._tpu_slices import SetAside, acquire
from fray.errors import PreemptedError
from fray.tpu import TpuType
from fray.types import TpuRunConfig

__all__ = ["Pace", "Retries", "run"]

logger = logging.getLogger("fray.tpu")

# So many failures in a row at the same step are no accident.
_FAILURES_AT_ONE_STEP = 3


@dataclass(frozen=True)
class Pace:
    """How long is waited before another attempt.

    Attributes:
        first_seconds: Before the second attempt; each time in a row it doubles,
        longest_seconds: up to this. What is waited is between half of it and all of it, by chance.
        set_aside_seconds: How long a slice is left alone whose chips somebody holds.
        grace_seconds: What the function's processes have between SIGTERM and SIGKILL.
    """

    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    set_aside_seconds: float = 60.0
    grace_seconds: float = 10.0


class Retries:
    """Decides after each failed attempt whether there is another, and when.

    Preemptions and failures are counted apart. An attempt that got further than all before it starts the back-off anew.
    """

    def __init__(self, config: TpuRunConfig, pace: Pace) -> None:
        self._config, self._pace = config, pace
        self.preemptions = 0
        self.failures = 0
        self._in_a_row = 0
        self._best = -1
        self._failed_at: list[int] = []

    def next(self, failed: AttemptError, step: int) -> tuple[float, str]:
        """Return how many seconds to wait before the next attempt, and why there is one.

        Args:
            failed: How the attempt ended.
            step: The highest that it reported, -1 where none.

        Raises:
            BaseException: What is to be told to the caller: there is no other attempt.
        """
        if step > self._best:
            self._best, self._in_a_row, self._failed_at = step, 0, []
        if failed.blame is Blame.SETUP:
            raise failed.error
        if failed.blame is Blame.FUNCTION:
            self._count_failure(failed, step)
            why = f"failure {self.failures} of {self._config.max_retries_failure} that are made good"
        elif failed.blame is Blame.SLICES:
            self.preemptions += 1
            if self.preemptions > self._config.max_retries_preemption:
                times = "once" if self.preemptions == 1 else f"{self.preemptions} times"
                raise PreemptedError(
                    f"run_on_tpu was preempted too many times: {times}, the last time because {failed.error} "
                    f"(TpuRunConfig.max_retries_preemption={self._config.max_retries_preemption})"
                ) from failed.error
            why = f"preemption {self.preemptions} of {self._config.max_retries_preemption} that are made good"
        else:
            why = "on other slices, if there are any"
        pause = min(self._pace.longest_seconds, self._pace.first_seconds * 2.0 ** min(self._in_a_row, 30))
        self._in_a_row += 1
        return pause * random.uniform(0.5, 1.0), why

    def _count_failure(self, failed: AttemptError, step: int) -> None:
        self.failures += 1
        if step >= 0:
            self._failed_at = [each for each in self._failed_at if each == step] + [step]
            if len(self._failed_at) >= _FAILURES_AT_ONE_STEP:
                failed.error.add_note(
                    f"run_on_tpu: failed {len(self._failed_at)} times in a row at step {step}, without getting any "
                    "further, so it is not tried again"
                )
                raise failed.error
        if self.failures > self._config.max_retries_failure:
            failed.error.add_note(
                f"run_on_tpu: failed {self.failures} times "
                f"(TpuRunConfig.max_retries_failure={self._config.max_retries_failure})"
            )
            raise failed.error


def run(
    function: Any,
    kind: TpuType,
    config: TpuRunConfig,
    environment: HostEnvironment,
    *,
    setup_seconds: float,
    pace: Pace,
    tell: Callable[[str], None] = logger.warning,
) -> list[Any]:
    """Run a function on all hosts of the slices, again and again as the budgets allow.

    Args:
        function: A reference to what the function was pickled to.
        kind: The type of the slices.
        config: How many, and the budgets.
        environment: What the hosts' processes are given.
        setup_seconds: How long the hosts may take from when they are held until the function can begin.
        pace: The pauses.
        tell: Called with what a user wants to know while it waits.

    Returns:
        What the function returned, slice by slice, in the order of the hosts.
    """
    run_id, set_aside, retries = secrets.token_hex(8), SetAside(), Retries(config, pace)
    number = 0
    while True:
        reservation = acquire(
            kind,
            config.num_slices,
            resources=environment.resources,
            give_up=time.monotonic() + config.wait_seconds,
            set_aside=set_aside,
            tell=lambda missing: tell(f"run_on_tpu: {missing}"),
        )
        number += 1
        attempt = Attempt(
            reservation,
            function,
            environment,
            run_id=run_id,
            number=number,
            num_slices=config.num_slices,
            chips_per_host=kind.chips_per_host,
            grace_seconds=pace.grace_seconds,
            stall_seconds=config.stall_seconds,
            setup_seconds=setup_seconds,
        )
        try:
            return attempt.run()
        except AttemptError as error:
            failed = error
        finally:
            reservation.release()
            for host in attempt.held:
                set_aside.add(host.slice_name, pace.set_aside_seconds, f"host {host.worker_id} holds its chips still")
        if failed.blame is Blame.HOST:
            for host in failed.hosts:
                set_aside.add(host.slice_name, pace.set_aside_seconds, str(failed.error))
        seconds, why = retries.next(failed, attempt.step)
        at = f" at step {attempt.step}" if attempt.step >= 0 else ""
        said = f"{type(failed.error).__name__}: {failed}" if failed.blame is Blame.FUNCTION else str(failed)
        tell(f"run_on_tpu: attempt {number} ended{at}: {said}; the next in {seconds:.1f} s ({why})")
        time.sleep(seconds)
