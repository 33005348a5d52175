from __future__ import annotations

import contextvars
import random
import subprocess
import sys
import threading
import traceback
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from fray import ActorOptions, LocalJobContext, TpuContext, get_job_context, use_job_context
from fray.errors import InvalidTypeError, InvalidValueError
from fray.testing import JobContextConformance

DEADLINE_SECONDS = 60.0


class TestLocalJobContext(JobContextConformance):
    @pytest.fixture
    def job_context(self) -> LocalJobContext:
        return LocalJobContext()


class TestLocalJobContextOfManyWorkers(JobContextConformance):
    @pytest.fixture
    def job_context(self) -> LocalJobContext:
        return LocalJobContext(max_workers=1000)


@pytest.fixture
def new_threads() -> Callable[[], list[threading.Thread]]:
    """Give a function that returns the threads which were not there when the test began."""
    before = set(threading.enumerate())
    return lambda: [thread for thread in threading.enumerate() if thread not in before]


def settled(job_context: LocalJobContext, ref: Any) -> Any:
    done, _ = job_context.wait([ref], timeout=DEADLINE_SECONDS)
    assert done, "hangs"
    return job_context.get(ref)


def descend(depth: int) -> int:
    job_context = get_job_context()
    return 0 if depth == 0 else 1 + job_context.get(job_context.create_task(descend, (depth - 1,)))


class Actor:
    def __init__(self, error: Exception | None = None) -> None:
        if error is not None:
            raise error
        self.attribute = 1

    def thread(self) -> threading.Thread:
        return threading.current_thread()


# What is shared


def test_get_of_what_is_no_reference_gives_it_back() -> None:
    job_context = LocalJobContext()
    assert job_context.get(42) == 42
    assert job_context.get([1, job_context.put(2)]) == [1, 2]
    assert job_context.get((1, 2)) == (1, 2)


def test_nothing_is_copied() -> None:
    job_context = LocalJobContext()
    value = threading.Lock()
    assert job_context.get(job_context.put(value)) is value
    assert settled(job_context, job_context.create_task(lambda same: same, (value,))) is value


# How much runs


@pytest.mark.parametrize("max_workers", [1, 2, 10])
def test_recursion_of_any_depth_finishes(max_workers: int) -> None:
    job_context = LocalJobContext(max_workers)
    assert settled(job_context, job_context.create_task(descend, (50,))) == 50


@pytest.mark.parametrize("max_workers", [1, 2, 10])
def test_a_tree_of_tasks_holds_few_threads(max_workers: int, new_threads: Callable[[], list[threading.Thread]]) -> None:
    job_context = LocalJobContext(max_workers)
    peak = 0

    def count(number: int) -> int:
        nonlocal peak
        peak = max(peak, len(new_threads()))
        if number < 2:
            return number
        return sum(job_context.get([job_context.create_task(count, (number - step,)) for step in (1, 2)]))

    assert settled(job_context, job_context.create_task(count, (13,))) == 233
    # 753 tasks, of which 376 wait for others. Depth first, each worker has a branch of waiting ones.
    assert peak < 150


@pytest.mark.parametrize("max_workers", [1, 3])
def test_no_more_run_than_max_workers(max_workers: int) -> None:
    job_context = LocalJobContext(max_workers)
    lock = threading.Lock()
    running, peak = 0, 0

    def task(depth: int) -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        children = [job_context.create_task(task, (depth - 1,)) for _ in range(3 if depth else 0)]
        with lock:
            running -= 1
        job_context.get(children)
        with lock:
            running += 1
            peak = max(peak, running)
            running -= 1

    for ref in [job_context.create_task(task, (3,)) for _ in range(3)]:
        settled(job_context, ref)
    assert peak <= max_workers


def test_as_many_run_as_max_workers() -> None:
    job_context = LocalJobContext(max_workers=5)
    barrier = threading.Barrier(5)
    for ref in [job_context.create_task(barrier.wait, (DEADLINE_SECONDS,)) for _ in range(10)]:
        settled(job_context, ref)


def test_tasks_begin_in_the_order_made() -> None:
    job_context = LocalJobContext(max_workers=1)
    begun: list[int] = []
    for ref in [job_context.create_task(begun.append, (number,)) for number in range(100)]:
        settled(job_context, ref)
    assert begun == list(range(100))


def test_a_wait_inside_a_task_goes_on_at_its_deadline_with_every_worker_taken() -> None:
    job_context = LocalJobContext(max_workers=1)

    def task() -> Any:
        release = threading.Event()
        child = job_context.create_task(release.wait, (DEADLINE_SECONDS,))
        assert job_context.wait([child], timeout=0.01) == ([], [child])
        release.set()
        return job_context.get(child)

    assert settled(job_context, job_context.create_task(task)) is True
    assert settled(job_context, job_context.create_task(descend, (5,))) == 5


def test_after_such_a_deadline_no_more_run_than_max_workers_again() -> None:
    job_context = LocalJobContext(max_workers=1)
    lock = threading.Lock()
    running, peak = 0, 0

    def occupy() -> None:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        threading.Event().wait(0.02)
        with lock:
            running -= 1

    def task() -> None:
        release = threading.Event()
        held = job_context.create_task(release.wait, (DEADLINE_SECONDS,))
        others = [job_context.create_task(occupy) for _ in range(4)]
        assert job_context.wait([held], timeout=0.01) == ([], [held])
        release.set()
        job_context.get([held, *others])

    settled(job_context, job_context.create_task(task))
    for ref in [job_context.create_task(occupy) for _ in range(4)]:
        settled(job_context, ref)
    assert peak == 1


def test_polling_leaves_nothing_behind() -> None:
    job_context = LocalJobContext()
    release = threading.Event()
    ref = job_context.create_task(release.wait, (DEADLINE_SECONDS,))
    tracemalloc.start()
    try:
        job_context.wait([ref], timeout=0)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(2000):
            job_context.wait([ref], timeout=0)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        release.set()
    assert after - before < 100_000


def test_a_task_that_polls_lets_others_run() -> None:
    job_context = LocalJobContext(max_workers=1)

    def task() -> Any:
        child = job_context.create_task(descend, (3,))
        while not job_context.wait([child], timeout=0)[0]:
            pass
        return job_context.get(child)

    assert settled(job_context, job_context.create_task(task)) == 3


@pytest.mark.parametrize("seed", range(12))
def test_a_random_graph_of_tasks_computes_what_calls_would(seed: int) -> None:
    rng = random.Random(seed)
    job_context = LocalJobContext(rng.choice([1, 2, 5]))
    refs: list[Any] = []
    values: list[int] = []

    def node(how: str, *inputs: Any) -> int:
        inner = get_job_context()
        if how == "get":
            inputs = tuple(inner.get(inputs[0]))
        elif how == "wait" and inputs[0]:
            done, others = inner.wait(inputs[0], num_returns=len(inputs[0]), timeout=rng.choice([None, 60.0]))
            assert (done, others) == (inputs[0], [])
            inputs = tuple(inner.get(done))
        elif how == "wait":
            inputs = ()
        elif how == "child":
            return inner.get(inner.create_task(node, ("args", *inputs)))
        return 1 + sum(inputs)

    actor = job_context.create_actor(type("Actor", (), {"node": staticmethod(node)}))
    for _ in range(150):
        chosen = rng.sample(range(len(refs)), rng.randint(0, min(4, len(refs))))
        values.append(1 + sum(values[index] for index in chosen))
        inputs = [refs[index] for index in chosen]
        how = rng.choice(["args", "get", "wait", "child"])
        args = (how, *inputs) if how in ("args", "child") else (how, inputs)
        refs.append(actor.node(*args) if rng.random() < 0.2 else job_context.create_task(node, args))
    done, _ = job_context.wait(refs, num_returns=len(refs), timeout=DEADLINE_SECONDS)
    assert len(done) == len(refs)
    assert job_context.get(refs) == values


# Threads


def check_they_end(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


def test_an_idle_context_has_no_threads(new_threads: Callable[[], list[threading.Thread]]) -> None:
    job_context = LocalJobContext()
    job_context.get([job_context.create_task(descend, (3,)) for _ in range(20)])
    actors = [job_context.create_actor(Actor) for _ in range(20)]
    threads = {job_context.get(actor.thread()) for actor in actors}
    assert threading.current_thread() not in threads
    check_they_end(new_threads())


def test_tasks_that_wait_for_arguments_have_no_threads(new_threads: Callable[[], list[threading.Thread]]) -> None:
    job_context = LocalJobContext(max_workers=2000)
    release = threading.Event()
    gate = job_context.create_task(release.wait, (DEADLINE_SECONDS,))
    refs = [job_context.create_task(lambda passed: passed, (gate,)) for _ in range(1000)]
    assert len(new_threads()) == 1
    release.set()
    assert job_context.get(refs) == [True] * 1000
    check_they_end(new_threads())


def test_a_program_ends_without_waiting_for_its_tasks() -> None:
    program = (
        "import threading, fray\n"
        "job_context = fray.LocalJobContext()\n"
        "begun = threading.Event()\n"
        "job_context.create_task(lambda: (begun.set(), threading.Event().wait()))\n"
        "begun.wait()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_task_that_gets_no_thread_fails() -> None:
    job_context = LocalJobContext()
    usual = threading.stack_size(2**50)  # more than any machine has
    try:
        ref = job_context.create_task(lambda: 1)
        actor = job_context.create_actor(Actor)
        calls = [actor.thread(), actor.thread()]
    finally:
        threading.stack_size(usual)
    for failed in (ref, *calls):
        with pytest.raises(RuntimeError, match="thread"):
            job_context.get(failed)
    assert settled(job_context, job_context.create_task(descend, (20,))) == 20


# Long chains


@pytest.mark.parametrize("fails", [False, True])
def test_a_chain_of_references_may_be_long(fails: bool) -> None:
    job_context = LocalJobContext()
    release = threading.Event()

    def first() -> int:
        release.wait(DEADLINE_SECONDS)
        if fails:
            raise ValueError("at the beginning")
        return 0

    ref = job_context.create_task(first)
    for _ in range(5000):
        ref = job_context.create_task(lambda number: number + 1, (ref,))
    release.set()
    if fails:
        with pytest.raises(ValueError, match="at the beginning"):
            settled(job_context, ref)
    else:
        assert settled(job_context, ref) == 5000


# Exceptions


def test_the_traceback_shows_the_task_and_does_not_grow() -> None:
    job_context = LocalJobContext()

    def fail_here() -> None:
        raise ValueError("once")

    ref = job_context.create_task(fail_here)
    lengths = set()
    for _ in range(5):
        with pytest.raises(ValueError, match="once") as raised:
            job_context.get(ref)
        frames = traceback.extract_tb(raised.value.__traceback__)
        lengths.add(len(frames))
        assert "fail_here" in [frame.name for frame in frames]
    assert len(lengths) == 1


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_is_no_exception_is_raised_by_get_too(error: BaseException) -> None:
    job_context = LocalJobContext(max_workers=1)

    def leave() -> None:
        raise error

    ref = job_context.create_task(leave)
    with pytest.raises(type(error)) as raised:
        job_context.get(ref)
    assert raised.value is error
    assert settled(job_context, job_context.create_task(descend, (2,))) == 2


def test_get_of_a_list_raises_without_waiting_for_what_comes_after() -> None:
    job_context = LocalJobContext()
    release = threading.Event()
    failed = job_context.create_task(int, ("x",))
    held = job_context.create_task(release.wait, (DEADLINE_SECONDS,))
    with pytest.raises(ValueError, match="invalid literal"):
        job_context.get([failed, held])
    assert job_context.wait([held], timeout=0) == ([], [held])
    release.set()


# The context inside


def test_each_task_finds_its_own_context() -> None:
    contexts = [LocalJobContext() for _ in range(3)]
    refs = [job_context.create_task(get_job_context) for job_context in contexts]
    for job_context, ref in zip(contexts, refs, strict=True):
        assert job_context.get(ref) is job_context
        # Any context can read what another made.
        assert contexts[0].get(ref) is job_context


def test_a_task_made_through_a_wrapper_finds_the_context_itself() -> None:
    job_context = LocalJobContext()
    host = TpuContext(job_context, slice_id=0, num_slices=1, host_id=0, num_hosts=1)
    with use_job_context(host):
        assert host.get(host.create_task(get_job_context)) is job_context


def test_a_task_has_a_copy_of_its_creator_s_context_variables() -> None:
    job_context = LocalJobContext()
    variable = contextvars.ContextVar("variable", default="unset")

    def read_and_set() -> str:
        value = variable.get()
        variable.set("changed in a task")
        return value

    variable.set("set by the creator")
    ref = job_context.create_task(read_and_set)
    variable.set("set too late")
    assert job_context.get(ref) == "set by the creator"
    assert variable.get() == "set too late"


# Actors


def test_a_name_is_free_again_when_the_constructor_failed() -> None:
    job_context = LocalJobContext()
    broken = job_context.create_actor(Actor, (ValueError("no"),), options=ActorOptions(name="actor"))
    with pytest.raises(ValueError, match="no"):
        job_context.get(broken.thread())
    actor = job_context.create_actor(Actor, options=ActorOptions(name="actor"))
    assert job_context.get(actor.thread()) is not threading.current_thread()


def test_names_belong_to_a_context() -> None:
    options = ActorOptions(name="actor")
    LocalJobContext().create_actor(Actor, options=options)
    LocalJobContext().create_actor(Actor, options=options)


def test_racing_get_if_exists_make_one_actor() -> None:
    job_context = LocalJobContext()
    made: list[int] = []

    class Counted:
        def __init__(self) -> None:
            made.append(1)

        def ping(self) -> str:
            return "pong"

    barrier = threading.Barrier(20)

    def race() -> Any:
        barrier.wait(DEADLINE_SECONDS)
        actor = job_context.create_actor(Counted, options=ActorOptions(name="one", get_if_exists=True))
        return job_context.get(actor.ping())

    racers = LocalJobContext(max_workers=20)
    assert racers.get([racers.create_task(race) for _ in range(20)]) == ["pong"] * 20
    assert made == [1]


def test_a_handle_has_methods_only() -> None:
    actor = LocalJobContext().create_actor(Actor)
    assert "Actor" in repr(actor)
    for name in ("attribute", "missing", "__len__"):
        assert not hasattr(actor, name)


# Refusals


@pytest.mark.parametrize(("max_workers", "error"), [(0, InvalidValueError), (-1, InvalidValueError)])
def test_max_workers_is_at_least_one(max_workers: int, error: type[Exception]) -> None:
    with pytest.raises(error, match="max_workers"):
        LocalJobContext(max_workers)


@pytest.mark.parametrize("max_workers", [None, "3", 2.5, True])
def test_max_workers_is_an_integer(max_workers: Any) -> None:
    with pytest.raises(InvalidTypeError, match="max_workers"):
        LocalJobContext(max_workers)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"refs": "ab"}, InvalidTypeError, r"wait\(\[ref\]\)"),
        ({"refs": [1]}, InvalidTypeError, "references that this context made"),
        ({"num_returns": "1"}, InvalidTypeError, "num_returns must be an integer"),
        ({"num_returns": True}, InvalidTypeError, "num_returns must be an integer"),
        ({"timeout": -1}, InvalidValueError, "timeout cannot be negative"),
        ({"timeout": float("nan")}, InvalidValueError, "timeout cannot be negative"),
    ],
)
def test_wait_says_what_it_does_not_take(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    job_context = LocalJobContext()
    with pytest.raises(error, match=message):
        job_context.wait(**{"refs": [job_context.put(1)], **arguments})


def test_wait_takes_an_endless_timeout() -> None:
    job_context = LocalJobContext()
    ref = job_context.create_task(descend, (1,))
    assert job_context.wait((ref,), timeout=float("inf")) == ([ref], [])
