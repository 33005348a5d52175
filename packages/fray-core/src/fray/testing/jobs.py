"""The conformance suite of tier 2: what every `JobContext` promises to tasks and actors.

Inherit it, and say which context to test:

```python
class TestMyJobContext(JobContextConformance):
    @pytest.fixture
    def job_context(self):
        return MyJobContext()
```

No check relies on shared memory: tasks may run in other processes of the same machine, which then import `fray.testing`
too. They are held back, and let go, by a file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from fray.context import get_job_context
from fray.job import JobContext
from fray.types import ActorOptions, Lifetime, RuntimeEnv, TaskOptions

__all__ = ["JobContextConformance"]

# More than the workers of a default LocalJobContext: a pool whose threads are held by waiting tasks then stands still.
_DEEPER_THAN_WORKERS = 12
# Long enough for any worker to come up and be wrongly taken for free.
_A_MOMENT_SECONDS = 0.3
_NOT_AN_INT = "invalid literal for int() with base 10: 'twelve'"


class JobContextConformance:
    """One check a promise. Override the fixture `job_context`.

    @plugin-dev: inside a task the context must be the very object that a closure around the task captured: one that
    is pickled has to become its process's own when it is unpickled.

    Attributes:
        deadline_seconds: When what does not end is taken to hang.
    """

    deadline_seconds: float = 60.0

    @pytest.fixture
    def job_context(self) -> Any:
        """Give the context under test. Each check makes its own names, so that one context may serve them all."""
        raise NotImplementedError(f"{type(self).__name__} must override the fixture job_context")

    # Tasks

    def test_a_task_gives_its_result(self, job_context: JobContext) -> None:
        """`get` gives what the function returned, called with the arguments given."""
        assert self.value_of(job_context, job_context.create_task(_arguments, (1, "two"), {"three": 3})) == (
            (1, "two"),
            {"three": 3},
        )
        assert self.value_of(job_context, job_context.create_task(_arguments)) == ((), {})
        assert self.value_of(job_context, job_context.create_task(lambda: None)) is None

    def test_create_task_does_not_wait_for_the_task(self, job_context: JobContext, tmp_path: Path) -> None:
        """A reference comes back at once."""
        with self.gate(tmp_path) as gate:
            ref = job_context.create_task(_pass_gate, (gate, "through"))
            gate.open()
            assert self.value_of(job_context, ref) == "through"

    def test_args_that_are_no_tuple_are_refused(self, job_context: JobContext) -> None:
        """The message shows how one argument is written."""
        wrong: Any = "abc"
        with pytest.raises(TypeError, match=r"args=\(x,\)"):
            job_context.create_task(_arguments, wrong)
        with pytest.raises(TypeError, match=r"args=\(x,\)"):
            job_context.create_actor(_Counter, wrong)

    def test_a_target_that_cannot_be_is_refused(self, job_context: JobContext) -> None:
        """So are keyword arguments that are no mapping."""
        wrong: Any = 42
        with pytest.raises(TypeError):
            job_context.create_task(wrong)
        with pytest.raises(TypeError):
            job_context.create_actor(wrong)
        with pytest.raises(TypeError):
            job_context.create_task(_arguments, (), wrong)

    def test_task_options_are_accepted(self, job_context: JobContext) -> None:
        """Resources, a runtime environment, a name, and a fresh process for each call."""
        options = TaskOptions(
            resources={"CPU": 1, "memory": 1024**2},
            runtime_env=RuntimeEnv(env={"CONFORMANCE": "1"}),
            name="conformance",
            max_calls=1,
        )
        assert self.value_of(job_context, job_context.create_task(_double, (4,), options=options)) == 8

    def test_a_hundred_tasks_at_once(self, job_context: JobContext) -> None:
        """All are made before any is asked for."""
        refs = [job_context.create_task(_double, (number,)) for number in range(100)]
        assert self.values_of(job_context, refs) == [2 * number for number in range(100)]

    # get and put

    def test_get_of_a_list_keeps_its_order(self, job_context: JobContext, tmp_path: Path) -> None:
        """Whichever task ends first."""
        with self.gate(tmp_path) as gate:
            last = job_context.create_task(_pass_gate, (gate, "last"))
            others = [job_context.create_task(_double, (number,)) for number in (1, 2)]
            self.values_of(job_context, others)
            gate.open()
            assert self.values_of(job_context, [last, *others]) == ["last", 2, 4]
        assert job_context.get([]) == []

    def test_get_can_be_repeated(self, job_context: JobContext) -> None:
        """It gives the same value each time."""
        ref = job_context.create_task(_double, (21,))
        assert [self.value_of(job_context, ref) for _ in range(3)] == [42, 42, 42]
        assert job_context.get([ref, ref]) == [42, 42]

    def test_put_gives_a_reference_to_the_value(self, job_context: JobContext) -> None:
        """Also to a value that is a list, or None."""
        for value in ({"key": [1, 2, 3]}, [1, 2], None):
            assert self.value_of(job_context, job_context.put(value)) == value

    # References as arguments

    def test_references_among_positional_arguments_are_resolved(self, job_context: JobContext) -> None:
        """Those of stored values and of tasks."""
        args = (job_context.put(1), job_context.create_task(_double, (1,)), 3)
        assert self.value_of(job_context, job_context.create_task(_arguments, args)) == ((1, 2, 3), {})

    def test_references_among_keyword_arguments_are_resolved(self, job_context: JobContext) -> None:
        """Those of stored values and of tasks."""
        kwargs = {"a": job_context.put(1), "b": job_context.create_task(_double, (1,)), "c": 3}
        assert self.value_of(job_context, job_context.create_task(_arguments, (), kwargs)) == (
            (),
            {"a": 1, "b": 2, "c": 3},
        )

    def test_actors_resolve_references(self, job_context: JobContext) -> None:
        """In their constructor's arguments and in their methods'; and what a method gives can be passed on."""
        counter = job_context.create_actor(_Counter, (job_context.put(10),), {"step": job_context.put(5)})
        first = counter.add(job_context.put(1), times=job_context.put(2))
        assert self.value_of(job_context, job_context.create_task(_double, (first,))) == 40

    def test_tasks_that_wait_for_arguments_are_in_nobody_s_way(self, job_context: JobContext, tmp_path: Path) -> None:
        """However many there are, a task that has all that it needs runs."""
        with self.gate(tmp_path) as gate:
            late = job_context.create_task(_pass_gate, (gate, 1))
            dependents = [job_context.create_task(_double, (late,)) for _ in range(_DEEPER_THAN_WORKERS)]
            assert self.value_of(job_context, job_context.create_task(_double, (5,))) == 10
            gate.open()
            assert self.values_of(job_context, dependents) == [2] * _DEEPER_THAN_WORKERS

    def test_what_failed_in_an_argument_fails_the_task(self, job_context: JobContext, tmp_path: Path) -> None:
        """With the same exception, and without a call of its function."""
        witness = tmp_path / "called"
        failed = job_context.create_task(_fail, ("no data",))
        for args, kwargs in [((witness, failed), {}), ((witness,), {"value": failed})]:
            ref = job_context.create_task(_leave_witness, args, kwargs)
            self.check_raises(job_context, ref, _DomainError, "no data")
        assert not witness.exists()

    # Exceptions

    def test_exceptions_keep_type_and_message(self, job_context: JobContext) -> None:
        """Python's own and the program's."""
        self.check_raises(job_context, job_context.create_task(int, ("twelve",)), ValueError, _NOT_AN_INT)
        self.check_raises(job_context, job_context.create_task(_fail, ("lost it",)), _DomainError, "lost it")

    def test_each_get_of_a_failed_task_raises(self, job_context: JobContext) -> None:
        """Alone, or as one of a list."""
        failed = job_context.create_task(_fail, ("again",))
        for _ in range(2):
            self.check_raises(job_context, failed, _DomainError, "again")
        fine = job_context.create_task(_double, (1,))
        with pytest.raises(_DomainError, match="again"):
            self.values_of(job_context, [fine, failed])

    # Nesting

    def test_inside_a_task_the_job_context_is_the_one_that_made_it(self, job_context: JobContext) -> None:
        """The very object that a closure captured."""
        assert self.value_of(job_context, job_context.create_task(lambda: get_job_context() is job_context))

    def test_inside_an_actor_the_job_context_is_the_one_that_made_it(self, job_context: JobContext) -> None:
        """In its constructor as in its methods."""

        class Nested:
            def __init__(self) -> None:
                self.inside_constructor = get_job_context() is job_context

            def contexts(self) -> tuple[bool, bool]:
                return self.inside_constructor, get_job_context() is job_context

        assert self.value_of(job_context, job_context.create_actor(Nested).contexts()) == (True, True)

    def test_tasks_nest_five_deep(self, job_context: JobContext) -> None:
        """Each makes the next through `get_job_context()`, and gets it."""
        assert self.value_of(job_context, job_context.create_task(_descend, (5,))) == 5

    def test_tasks_nest_deeper_than_there_are_workers(self, job_context: JobContext) -> None:
        """A task that waits in `get` is in nobody's way."""
        ref = job_context.create_task(_descend, (_DEEPER_THAN_WORKERS,))
        assert self.value_of(job_context, ref) == _DEEPER_THAN_WORKERS

    def test_tasks_that_wait_are_in_nobody_s_way(self, job_context: JobContext) -> None:
        """A task that waits in `wait` neither."""
        ref = job_context.create_task(_descend, (_DEEPER_THAN_WORKERS,), {"by_wait": True})
        assert self.value_of(job_context, ref) == _DEEPER_THAN_WORKERS

    # wait

    def test_wait_for_nothing_gives_nothing(self, job_context: JobContext) -> None:
        """With a timeout and without."""
        assert job_context.wait([]) == ([], [])
        assert job_context.wait([], timeout=0) == ([], [])

    def test_wait_gives_the_caller_s_own_references(self, job_context: JobContext, tmp_path: Path) -> None:
        """The one that is done, and the one that is not."""
        with self.gate(tmp_path) as gate:
            held = job_context.create_task(_pass_gate, (gate, 1))
            free = job_context.create_task(_double, (1,))
            done, others = job_context.wait([held, free], timeout=self.deadline_seconds)
            assert len(done) == len(others) == 1
            assert done[0] is free
            assert others[0] is held

    def test_wait_gives_at_most_num_returns(self, job_context: JobContext) -> None:
        """Though more are done; the first of them, and the others in order."""
        refs = [job_context.create_task(_double, (number,)) for number in range(5)]
        self.values_of(job_context, refs)
        done, others = job_context.wait(refs, num_returns=2, timeout=self.deadline_seconds)
        assert (_indices(done, refs), _indices(others, refs)) == ([0, 1], [2, 3, 4])

    def test_wait_keeps_the_order_given(self, job_context: JobContext, tmp_path: Path) -> None:
        """Whichever ends first."""
        with self.gate(tmp_path) as gate:
            late = job_context.create_task(_pass_gate, (gate, 1))
            early = job_context.create_task(_double, (1,))
            self.value_of(job_context, early)
            gate.open()
            self.value_of(job_context, late)
            done, others = job_context.wait([late, early], num_returns=2, timeout=self.deadline_seconds)
            assert (_indices(done, [late, early]), others) == ([0, 1], [])

    def test_wait_waits_for_num_returns(self, job_context: JobContext) -> None:
        """Not for the first to end."""
        refs = [
            job_context.create_task(_double, (1,)),
            job_context.create_task(_take_a_moment),
            job_context.create_task(_take_a_moment),
        ]
        self.value_of(job_context, refs[0])
        done, others = job_context.wait(refs, num_returns=3, timeout=self.deadline_seconds)
        assert (_indices(done, refs), others) == ([0, 1, 2], [])

    def test_wait_without_a_timeout_waits(self, job_context: JobContext) -> None:
        """Until one is done."""
        ref = job_context.create_task(_take_a_moment)
        done, others = job_context.wait([ref])
        assert (_indices(done, [ref]), others) == ([0], [])

    def test_wait_ends_at_its_timeout(self, job_context: JobContext, tmp_path: Path) -> None:
        """With what is done by then, be it nothing."""
        with self.gate(tmp_path) as gate:
            held = [job_context.create_task(_pass_gate, (gate, number)) for number in range(2)]
            start = time.monotonic()
            done, others = job_context.wait(held, timeout=_A_MOMENT_SECONDS)
            assert (done, _indices(others, held)) == ([], [0, 1])
            free = job_context.put(1)
            done, others = job_context.wait([*held, free], num_returns=2, timeout=_A_MOMENT_SECONDS)
            assert (_indices(done, [free]), _indices(others, held)) == ([0], [0, 1])
            done, others = job_context.wait(held, timeout=0)
            assert (done, _indices(others, held)) == ([], [0, 1])
            assert time.monotonic() - start < self.deadline_seconds

    def test_a_failed_task_is_done(self, job_context: JobContext) -> None:
        """`wait` returns it and raises nothing."""
        failed = job_context.create_task(_fail, ("done for",))
        done, others = job_context.wait([failed], timeout=self.deadline_seconds)
        assert (_indices(done, [failed]), others) == ([0], [])

    def test_wait_refuses_what_cannot_be(self, job_context: JobContext) -> None:
        """A number of references that there are not, one reference twice, a reference outside a list."""
        refs = [job_context.put(1), job_context.put(2)]
        for num_returns in (0, -1, 3):
            with pytest.raises(ValueError):
                job_context.wait(refs, num_returns=num_returns)
        with pytest.raises(ValueError):
            job_context.wait([refs[0], refs[0]])
        with pytest.raises(TypeError):
            job_context.wait(refs[0])

    # Actors

    def test_an_actor_keeps_its_state(self, job_context: JobContext) -> None:
        """Made and called with positional and keyword arguments."""
        counter = job_context.create_actor(_Counter, (10,), {"step": 5})
        assert self.value_of(job_context, counter.add(1)) == 15
        assert self.value_of(job_context, counter.add(2, times=3)) == 45
        assert self.value_of(job_context, counter.total()) == 45

    def test_calls_on_an_actor_run_in_the_order_made(self, job_context: JobContext, tmp_path: Path) -> None:
        """Also where one has to wait for its argument."""
        with self.gate(tmp_path) as gate:
            recorder = job_context.create_actor(_Recorder)
            recorder.record(job_context.create_task(_pass_gate, (gate, "first")))
            for number in range(100):
                recorder.record(number)
            recorded = recorder.recorded()
            gate.open()
            assert self.value_of(job_context, recorded) == ["first", *range(100)]

    def test_calls_on_an_actor_do_not_overlap(self, job_context: JobContext, tmp_path: Path) -> None:
        """The second begins when the first has ended."""
        with self.gate(tmp_path) as gate:
            recorder = job_context.create_actor(_Recorder)
            first = recorder.record_at_gate(gate)
            second = recorder.recorded()
            assert job_context.wait([second], timeout=_A_MOMENT_SECONDS)[0] == []
            gate.open()
            assert self.values_of(job_context, [first, second]) == [None, ["passed"]]

    def test_asynchronous_methods_run_in_the_order_made_too(self, job_context: JobContext) -> None:
        """Each from its beginning to its end; the reference gives what it returned."""
        recorder = job_context.create_actor(_Recorder)
        refs = [recorder.record_slowly(number) for number in range(5)]
        assert self.values_of(job_context, refs) == list(range(5))
        expected = [step for number in range(5) for step in (("begins", number), ("ends", number))]
        assert self.value_of(job_context, recorder.recorded()) == expected

    def test_an_actor_survives_a_failing_method(self, job_context: JobContext) -> None:
        """The exception keeps type and message, the actor its state."""
        counter = job_context.create_actor(_Counter, (1,))
        self.check_raises(job_context, counter.fail("out of order"), _DomainError, "out of order")
        assert self.value_of(job_context, counter.add(1)) == 2

    def test_a_failing_constructor_fails_the_method_calls(self, job_context: JobContext) -> None:
        """`create_actor` raises nothing; each method call gives the constructor's exception."""
        broken = job_context.create_actor(_Broken, ("no such device",))
        self.check_raises(job_context, broken.method(), _DomainError, "no such device")
        self.check_raises(job_context, broken.method(), _DomainError, "no such device")

    def test_unnamed_actors_are_independent(self, job_context: JobContext) -> None:
        """Two of one class share nothing."""
        one, other = job_context.create_actor(_Counter), job_context.create_actor(_Counter)
        self.value_of(job_context, one.add(7))
        assert self.value_of(job_context, other.total()) == 0

    def test_fifty_actors_at_once(self, job_context: JobContext) -> None:
        """All are made before any is asked for."""
        counters = [job_context.create_actor(_Counter, (number,)) for number in range(50)]
        totals = [counter.add(1) for counter in counters]
        assert self.values_of(job_context, totals) == [number + 1 for number in range(50)]

    def test_actor_options_are_accepted(self, job_context: JobContext) -> None:
        """Resources and a lifetime."""
        options = ActorOptions(name=_new_name(), resources={"CPU": 0}, lifetime=Lifetime.DETACHED)
        assert self.value_of(job_context, job_context.create_actor(_Counter, options=options).add(1)) == 1

    def test_a_name_is_given_once(self, job_context: JobContext) -> None:
        """A second actor of the name is refused, and the first keeps its state."""
        name = _new_name()
        counter = job_context.create_actor(_Counter, (5,), options=ActorOptions(name=name))
        assert self.value_of(job_context, counter.total()) == 5
        with pytest.raises(ValueError, match=name):
            job_context.create_actor(_Counter, options=ActorOptions(name=name))
        assert self.value_of(job_context, counter.total()) == 5

    def test_get_if_exists_gets_the_actor_that_exists(self, job_context: JobContext) -> None:
        """And makes it where it does not."""
        options = ActorOptions(name=_new_name(), get_if_exists=True)
        counter = job_context.create_actor(_Counter, (5,), options=options)
        assert self.value_of(job_context, counter.add(1)) == 6
        again = job_context.create_actor(_Counter, (100,), options=options)
        assert self.value_of(job_context, again.add(1)) == 7
        assert self.value_of(job_context, counter.total()) == 7

    def test_a_task_finds_a_named_actor(self, job_context: JobContext) -> None:
        """Through its own job context."""
        name = _new_name()
        counter = job_context.create_actor(_Counter, (5,), options=ActorOptions(name=name))
        assert self.value_of(job_context, job_context.create_task(_add_to_named, (name, 3))) == 8
        assert self.value_of(job_context, counter.total()) == 8

    def test_a_handle_can_be_handed_to_a_task(self, job_context: JobContext) -> None:
        """Which calls the same actor."""
        counter = job_context.create_actor(_Counter)
        refs = [job_context.create_task(_add_through_handle, (counter,)) for _ in range(5)]
        assert sorted(self.values_of(job_context, refs)) == [1, 2, 3, 4, 5]

    def test_a_method_that_does_not_exist_is_refused_at_once(self, job_context: JobContext) -> None:
        """By the handle, not by the reference."""
        counter = job_context.create_actor(_Counter)
        with pytest.raises(AttributeError, match="subtract"):
            counter.subtract  # noqa: B018 - asking for it is what fails

    # What the checks have in common, of use to a backend's own as well.

    @contextmanager
    def gate(self, directory: Path) -> Iterator[_Gate]:
        """Give what holds tasks back until it is opened, and opens at the end whatever the check came to."""
        gate = _Gate(directory / f"gate-{uuid4().hex}", self.deadline_seconds)
        try:
            yield gate
        finally:
            gate.open()

    def value_of(self, job_context: JobContext, ref: Any) -> Any:
        """Return a reference's value, or fail the check where there is none by the deadline."""
        return self.values_of(job_context, [ref])[0]

    def values_of(self, job_context: JobContext, refs: list[Any]) -> list[Any]:
        """Return the values of a list of references, or fail the check where one is missing at the deadline."""
        # One by one, for their states alone: what `wait` does with several has checks of its own.
        for ref in refs:
            done, _ = job_context.wait([ref], timeout=self.deadline_seconds)
            assert done, f"not done within {self.deadline_seconds} s: a deadlock, or too slow"
        values: list[Any] = job_context.get(refs)
        return values

    def check_raises(self, job_context: JobContext, ref: Any, error_type: type[Exception], message: str) -> None:
        """Check that `get` raises exactly `error_type`, no subclass and no wrapper, with this very message."""
        done, _ = job_context.wait([ref], timeout=self.deadline_seconds)
        assert done, f"not done within {self.deadline_seconds} s"
        with pytest.raises(error_type) as raised:
            job_context.get(ref)
        assert type(raised.value) is error_type
        assert str(raised.value) == message


class _DomainError(Exception):
    """An exception that only the program under test knows."""


class _Counter:
    def __init__(self, start: int = 0, step: int = 1) -> None:
        self._total = start
        self._step = step

    def add(self, amount: int, times: int = 1) -> int:
        self._total += amount * times * self._step
        return self._total

    def total(self) -> int:
        return self._total

    def fail(self, message: str) -> None:
        raise _DomainError(message)


class _Recorder:
    def __init__(self) -> None:
        self._recorded: list[Any] = []

    def record(self, value: Any) -> None:
        self._recorded.append(value)

    def record_at_gate(self, gate: _Gate) -> None:
        self._recorded.append(_pass_gate(gate, "passed"))

    async def record_slowly(self, value: Any) -> Any:
        import asyncio

        self._recorded.append(("begins", value))
        await asyncio.sleep(0.01)
        self._recorded.append(("ends", value))
        return value

    def recorded(self) -> list[Any]:
        return list(self._recorded)


class _Broken:
    def __init__(self, message: str) -> None:
        raise _DomainError(message)

    def method(self) -> None:
        """Never called."""


def _arguments(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _double(number: int) -> int:
    return 2 * number


def _fail(message: str) -> None:
    raise _DomainError(message)


def _leave_witness(witness: Path, value: object) -> None:
    witness.touch()


def _take_a_moment() -> None:
    time.sleep(_A_MOMENT_SECONDS)


def _descend(depth: int, by_wait: bool = False) -> int:
    if depth == 0:
        return 0
    job_context = get_job_context()
    ref = job_context.create_task(_descend, (depth - 1,), {"by_wait": by_wait})
    if by_wait:
        job_context.wait([ref])
    return 1 + int(job_context.get(ref))


def _add_to_named(name: str, amount: int) -> int:
    job_context = get_job_context()
    counter = job_context.create_actor(_Counter, options=ActorOptions(name=name, get_if_exists=True))
    return int(job_context.get(counter.add(amount)))


def _add_through_handle(counter: Any) -> int:
    return int(get_job_context().get(counter.add(1)))


@dataclass(frozen=True)
class _Gate:
    """A file that holds tasks back until it exists."""

    path: Path
    limit_seconds: float

    def open(self) -> None:
        self.path.touch()

    def wait(self) -> None:
        end = time.monotonic() + self.limit_seconds
        while not self.path.exists():
            if time.monotonic() > end:
                raise TimeoutError(f"the gate stayed closed for {self.limit_seconds} s")
            time.sleep(0.005)


def _pass_gate(gate: _Gate, value: Any) -> Any:
    gate.wait()
    return value


def _new_name() -> str:
    return f"conformance-{uuid4().hex}"


def _indices(some: list[Any], refs: list[Any]) -> list[int]:
    """Return where each of `some` is in `refs`, by identity."""
    return [next(index for index, ref in enumerate(refs) if ref is one) for one in some]
