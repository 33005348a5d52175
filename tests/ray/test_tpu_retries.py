"""What `run_on_tpu` makes good, and how often: the policy alone, and the words on the wire."""

from __future__ import annotations

import random

import pytest

from fray import TpuRunConfig
from fray.backend.ray._tpu_blame import AttemptError, Blame
from fray.backend.ray._tpu_frames import GO, OUTPUT, FrameReader, frame
from fray.backend.ray._tpu_run import Pace, Retries
from fray.backend.ray.testing import SimulatedSlices, _topology
from fray.errors import InvalidValueError, PreemptedError
from fray.tpu import tpu_types

PACE = Pace(first_seconds=1.0, longest_seconds=8.0)


def failure(error: BaseException | None = None) -> AttemptError:
    return AttemptError(Blame.FUNCTION, error or ValueError("no"), [])


def preemption() -> AttemptError:
    return AttemptError(Blame.SLICES, PreemptedError("slice-a host 1 went away"), [])


def test_failures_and_preemptions_have_budgets_of_their_own() -> None:
    retries = Retries(TpuRunConfig("v4-8", 1, 2, 1), PACE)
    retries.next(preemption(), -1)
    retries.next(failure(), -1)
    retries.next(preemption(), -1)
    with pytest.raises(PreemptedError, match="too many times: 3 times, the last time because slice-a host 1 went away"):
        retries.next(preemption(), -1)
    with pytest.raises(ValueError, match="no") as raised:
        retries.next(failure(), -1)
    assert "failed 2 times" in raised.value.__notes__[0]


def test_the_pause_doubles_up_to_a_limit_and_begins_anew_after_progress() -> None:
    retries = Retries(TpuRunConfig("v4-8"), PACE)
    pauses = [retries.next(preemption(), -1)[0] for _ in range(6)]
    for pause, longest in zip(pauses, (1, 2, 4, 8, 8, 8), strict=True):
        assert longest / 2 <= pause <= longest
    assert retries.next(preemption(), 5)[0] <= 1.0  # it came to step 5
    assert retries.next(preemption(), 5)[0] > 0.9  # and no further


def test_pauses_differ_by_chance() -> None:
    assert len({Retries(TpuRunConfig("v4-8"), PACE).next(preemption(), -1)[0] for _ in range(20)}) > 10


def test_three_failures_in_a_row_at_one_step_are_the_last() -> None:
    retries = Retries(TpuRunConfig("v4-8", 1, 100, 100), PACE)
    retries.next(failure(), 7)
    retries.next(preemption(), 7)
    retries.next(failure(), 6)  # somewhere else
    retries.next(failure(), 7)
    retries.next(failure(), 7)
    with pytest.raises(ValueError) as raised:
        retries.next(failure(), 7)
    assert "3 times in a row at step 7" in raised.value.__notes__[0]


def test_failures_before_any_step_have_the_whole_budget() -> None:
    retries = Retries(TpuRunConfig("v4-8", 1, 0, 50), PACE)
    for _ in range(50):
        retries.next(failure(), -1)
    with pytest.raises(ValueError):
        retries.next(failure(), -1)


def test_what_cannot_be_set_up_and_a_held_host_count_for_nothing() -> None:
    retries = Retries(TpuRunConfig("v4-8", 1, 0, 0), PACE)
    for _ in range(20):
        retries.next(AttemptError(Blame.HOST, RuntimeError("held"), []), -1)
    with pytest.raises(OSError, match="no such package"):
        retries.next(AttemptError(Blame.SETUP, OSError("no such package"), []), -1)


@pytest.mark.parametrize("seed", range(20))
def test_frames_come_whole_however_they_are_cut(seed: int) -> None:
    chance = random.Random(seed)
    sent = [(OUTPUT, chance.randbytes(chance.choice((0, 1, 70_000)))) for _ in range(10)] + [(GO, b'{"a": 1}')]
    data = b"".join(frame(kind, content) for kind, content in sent[:-1]) + frame(GO, {"a": 1})
    reader, received = FrameReader(), []
    while data:
        count = chance.choice((1, 3, 5, 4096, 100_000))
        received += reader.feed(data[:count])
        data = data[count:]
    assert received == sent


def test_what_is_no_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="frame"):
        FrameReader().feed(b"GET / HTTP/1.1\r\n\r\n")


def test_a_simulated_topology_has_the_chips_of_its_type() -> None:
    for kind in tpu_types():
        chips = 1
        for side in _topology(kind).split("x"):
            chips *= int(side)
        assert chips == kind.chips


def test_simulated_slices_refuse_what_cannot_be_before_anything_is_started() -> None:
    with pytest.raises(InvalidValueError, match="there is no TPU type"):
        SimulatedSlices("v4-17")
    with pytest.raises(InvalidValueError, match="num_slices"):
        SimulatedSlices("v4-8", -1)
