from __future__ import annotations

import threading
from typing import Any

import pytest

from fray import JobContext, LocalClusterContext, RuntimeEnv, TpuContext, TpuRunConfig, _local_tpu, get_job_context
from fray._local_tpu import run_on_local_hosts
from fray.errors import InvalidTypeError, InvalidValueError, UnsupportedError
from fray.types import ActorOptions, Resource

DEADLINE_SECONDS = 60.0


def place(ctx: TpuContext) -> tuple[int, int, int, int, int]:
    return ctx.slice_id, ctx.num_slices, ctx.host_id, ctx.num_hosts, ctx.attempt


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host is waited for as long as a busy machine takes for a short function."""
    monkeypatch.setattr(_local_tpu, "_HEAD_START_SECONDS", DEADLINE_SECONDS)
    monkeypatch.setattr(_local_tpu, "_HEAD_STARTS_SECONDS", 1e6)


@pytest.mark.parametrize(
    ("tpu_type", "hosts"),
    [("v4-8", 1), ("v4-32", 4), ("v4-64", 8), ("v5p-128", 16), ("v5p-256", 32), ("v6e-256", 64), ("v5e-8", 1)],
)
@pytest.mark.usefixtures("one_by_one")
def test_the_function_is_called_once_per_host_in_host_order(tpu_type: str, hosts: int) -> None:
    counter = 0

    def count(ctx: TpuContext) -> int:
        nonlocal counter
        counter += 1
        return counter

    assert run_on_local_hosts(count, TpuRunConfig(tpu_type)) == list(range(1, hosts + 1))


def test_the_cluster_in_memory_runs_it() -> None:
    cluster = LocalClusterContext()
    assert cluster.run_on_tpu(lambda ctx: ctx.host_id, TpuRunConfig("v4-32")) == [0, 1, 2, 3]


def test_results_come_slice_by_slice_in_host_order() -> None:
    assert run_on_local_hosts(place, TpuRunConfig("v4-16", 3)) == [
        (0, 3, 0, 2, 1),
        (0, 3, 1, 2, 1),
        (1, 3, 0, 2, 1),
        (1, 3, 1, 2, 1),
        (2, 3, 0, 2, 1),
        (2, 3, 1, 2, 1),
    ]


def test_results_keep_host_order_whichever_ends_first() -> None:
    ended = [threading.Event() for _ in range(5)]
    ended[4].set()

    def end_in_reverse(ctx: TpuContext) -> int:
        ended[ctx.host_id + 1].wait(DEADLINE_SECONDS)
        ended[ctx.host_id].set()
        return ctx.host_id

    assert run_on_local_hosts(end_in_reverse, TpuRunConfig("v4-32")) == [0, 1, 2, 3]


@pytest.mark.parametrize(("tpu_type", "num_slices"), [("v4-32", 1), ("v4-32", 3), ("v6e-256", 1)])
def test_hosts_that_wait_for_each_other_all_run_at_once(tpu_type: str, num_slices: int) -> None:
    hosts = len(run_on_local_hosts(place, TpuRunConfig(tpu_type, num_slices)))
    barrier = threading.Barrier(hosts)
    arrivals = run_on_local_hosts(lambda ctx: barrier.wait(DEADLINE_SECONDS), TpuRunConfig(tpu_type, num_slices))
    assert sorted(arrivals) == list(range(hosts))


def test_every_slice_of_the_largest_type_is_gathered() -> None:
    barrier = threading.Barrier(1536)
    results = run_on_local_hosts(lambda ctx: (barrier.wait(240), ctx.host_id)[1], TpuRunConfig("v5p-12288"))
    assert results == list(range(1536))


def test_an_exception_is_the_function_s_own() -> None:
    error = ValueError("host 2 has no data")

    def fail(ctx: TpuContext) -> None:
        if ctx.host_id == 2:
            raise error

    with pytest.raises(ValueError, match="host 2 has no data") as raised:
        run_on_local_hosts(fail, TpuRunConfig("v4-32"))
    assert raised.value is error


@pytest.mark.usefixtures("one_by_one")
def test_of_several_exceptions_the_first_is_raised_and_every_host_has_begun() -> None:
    begun: list[int] = []

    def fail(ctx: TpuContext) -> None:
        begun.append(ctx.host_id)
        raise ValueError(f"host {ctx.host_id}")

    with pytest.raises(ValueError, match="host 0"):
        run_on_local_hosts(fail, TpuRunConfig("v4-32"))
    assert begun == [0, 1, 2, 3]


def test_a_failure_is_raised_though_other_hosts_wait_for_the_one_that_failed() -> None:
    release = threading.Event()
    ended = threading.Barrier(4)

    def fail(ctx: TpuContext) -> None:
        if ctx.host_id == 0:
            raise ValueError("host 0")
        release.wait(DEADLINE_SECONDS)
        ended.wait(DEADLINE_SECONDS)

    with pytest.raises(ValueError, match="host 0"):
        run_on_local_hosts(fail, TpuRunConfig("v4-32"))
    release.set()
    ended.wait(DEADLINE_SECONDS)


def test_leaving_a_host_is_raised_too() -> None:
    def leave(ctx: TpuContext) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run_on_local_hosts(leave, TpuRunConfig("v4-8"))


def test_inside_the_job_context_is_the_host_s() -> None:
    before = get_job_context()

    def same(ctx: TpuContext) -> bool:
        return get_job_context() is ctx

    assert run_on_local_hosts(same, TpuRunConfig("v4-32")) == [True] * 4
    assert get_job_context() is before


def test_hosts_share_tasks_and_named_actors() -> None:
    class Counter:
        def __init__(self) -> None:
            self.total = 0

        def add(self, amount: int) -> int:
            self.total += amount
            return self.total

    def count(ctx: TpuContext) -> Any:
        counter = ctx.create_actor(Counter, options=ActorOptions(name="counter", get_if_exists=True))
        return ctx.get(counter.add(ctx.get(ctx.create_task(lambda: 10))))

    for _ in range(2):  # each run has its own
        assert sorted(run_on_local_hosts(count, TpuRunConfig("v4-32"))) == [10, 20, 30, 40]


def test_a_task_of_a_host_finds_a_job_context() -> None:
    def found(ctx: TpuContext) -> bool:
        inner: JobContext = ctx.get(ctx.create_task(get_job_context))
        return inner.get(inner.create_task(get_job_context)) is inner

    assert run_on_local_hosts(found, TpuRunConfig("v4-16")) == [True, True]


# Refusals


def test_what_cannot_be_called_is_refused() -> None:
    wrong: Any = "train.py"
    with pytest.raises(InvalidTypeError, match=r"'train\.py'"):
        run_on_local_hosts(wrong, TpuRunConfig("v4-8"))


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="v4-32"):
        run_on_local_hosts(place, TpuRunConfig("v4-33"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("env", {"A": "1"}),
        ("secrets", {"A": "hidden"}),
        ("package_requirements", ["einops"]),
        ("maximum_resources", [Resource("CPU", 1)]),
        ("working_dir", "."),
        ("container_image", "python:3.12"),
        ("extras", ["tpu"]),
    ],
)
def test_what_threads_cannot_have_apart_is_refused(field: str, value: Any) -> None:
    with pytest.raises(UnsupportedError, match=f"runtime_env.{field}") as raised:
        run_on_local_hosts(place, TpuRunConfig("v4-8"), RuntimeEnv(**{field: value}))
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    "runtime_env", [None, RuntimeEnv(), RuntimeEnv(minimum_resources=[Resource("TPU", 4)], excludes=["*.bin"])]
)
def test_what_needs_nothing_done_is_accepted(runtime_env: RuntimeEnv | None) -> None:
    assert run_on_local_hosts(place, TpuRunConfig("v4-8"), runtime_env) == [(0, 1, 0, 1, 1)]
