"""How everything here is measured: rounds that alternate between the sides, and what is compared within a round.

A machine's noise comes and goes over seconds. Sides that take turns, in an order drawn anew each round, meet the same
noise; a ratio or a difference within one round is free of most of it, and its median over the rounds of the rest.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["Comparison", "Series", "Settings", "Side", "Unit", "clock", "compare", "interleave", "state"]

Kind = Literal["ratio", "difference", "absolute"]
Unit = Literal["s", "bytes", "exponent", "count"]
Series = list[float | None]

_RESAMPLES = 2000
# What a measured job leaves behind (its guard, a socket) ends within this; it is not to burden the next measurement.
_SETTLE_SECONDS = 0.005


class Settings:
    """What the caller chose, and the scratch directory of this run."""

    def __init__(self, scratch: Path, *, rounds: int | None, quick: bool, peers: bool, seed: int) -> None:
        self.scratch = scratch
        self.quick = quick
        self.peers = peers
        self.seed = seed
        self._rounds = rounds

    def rounds(self, default: int) -> int:
        """How many rounds a row gets whose own default is `default`."""
        if self._rounds is not None:
            return self._rounds
        return min(default, 3) if self.quick else default


@dataclass(frozen=True)
class Side:
    """One contender: `measure` does the thing once and returns what it took.

    Attributes:
        name: As the table calls it.
        measure: Returns seconds (or another amount).
        every: It takes part in each `every`-th round only: for a side that is slow, and needs no precision.
    """

    name: str
    measure: Callable[[], float]
    every: int = 1


@dataclass
class Comparison:
    """One line of the table."""

    row: str
    what: str
    against: str = ""
    kind: Kind = "absolute"
    unit: Unit = "s"
    fray: float | None = None
    other: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bar: float | None = None
    rounds: int = 0
    note: str = ""
    details: dict[str, object] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """Whether the median is within the bar; `unsure` where the interval has the bar inside."""
        if self.value is None:
            return "not measured"
        if self.bar is None:
            return ""
        word = "met" if self.value <= self.bar else "MISSED"
        if self.low is not None and self.high is not None and self.low <= self.bar < self.high:
            word += ", unsure"
        return word

    @property
    def is_missed(self) -> bool:
        """Whether the median is past the bar."""
        return self.value is not None and self.bar is not None and self.value > self.bar


def clock(action: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def interleave(row: str, sides: Sequence[Side], rounds: int, seed: int, warmups: int = 1) -> dict[str, Series]:
    """Measure the sides in turn; return each one's amounts by round, None where it took no part.

    Args:
        row: What is measured, for the progress line and the shuffling.
        sides: The contenders.
        rounds: How many rounds count.
        seed: Makes the order of the sides within the rounds repeatable.
        warmups: How many rounds go before and do not count.
    """
    order = random.Random(f"{seed} {row}")
    found: dict[str, Series] = {side.name: [] for side in sides}
    for number in range(-warmups, rounds):
        _progress(f"{row}: {'warming up' if number < 0 else f'round {number + 1} of {rounds}'}")
        taking_part = [side for side in sides if number < 0 or number % side.every == 0]
        order.shuffle(taking_part)
        amounts: dict[str, float] = {}
        for side in taking_part:
            amounts[side.name] = side.measure()
            time.sleep(_SETTLE_SECONDS)
        if number >= 0:
            for name, series in found.items():
                series.append(amounts.get(name))
    _progress("")
    return found


def compare(
    row: str,
    what: str,
    fray: Series,
    against: str,
    other: Series,
    *,
    kind: Literal["ratio", "difference"],
    bar: float | None = None,
    unit: Unit = "s",
) -> Comparison:
    """Compare two sides round by round: the median of the ratios or differences, and its interval."""
    pairs = [
        (mine, theirs) for mine, theirs in zip(fray, other, strict=True) if mine is not None and theirs is not None
    ]
    values = [mine / theirs if kind == "ratio" else mine - theirs for mine, theirs in pairs]
    low, high = _interval(values)
    return Comparison(
        row,
        what,
        against,
        kind,
        unit,
        statistics.median(mine for mine, _ in pairs),
        statistics.median(theirs for _, theirs in pairs),
        statistics.median(values),
        low,
        high,
        bar,
        len(pairs),
        details={"fray": [mine for mine, _ in pairs], "against": [theirs for _, theirs in pairs]},
    )


def state(row: str, what: str, fray: Series, *, bar: float | None = None, unit: Unit = "s") -> Comparison:
    """State an amount that is compared with nothing but its bar."""
    values = [value for value in fray if value is not None]
    middle = statistics.median(values)
    low, high = _interval(values)
    return Comparison(
        row, what, "", "absolute", unit, middle, None, middle, low, high, bar, len(values), details={"fray": values}
    )


def _interval(values: list[float]) -> tuple[float | None, float | None]:
    """Return the bootstrap 95 % interval of the median."""
    if len(values) < 3:
        return None, None
    draw = random.Random(len(values))
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(_RESAMPLES))
    return medians[int(0.025 * _RESAMPLES)], medians[int(0.975 * _RESAMPLES) - 1]


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
