"""Tasks, actors and objects on a real Ray, from a driver as from a job."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import ray

import fray
from fray.backend.ray.ray_job import RayJobContext
from fray.errors import PlatformError, UnsupportedError
from fray.testing import JobContextConformance
from fray.types import ActorOptions, Lifetime, Resource, RuntimeEnv, TaskOptions
from tests.ray.ray_harness import Head

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture(scope="module")
def job_context(ray_head: Head) -> Iterator[RayJobContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", ray_head.address)
        yield RayJobContext()
    ray.shutdown()
    RayJobContext._own = None


class TestRayJobContext(JobContextConformance):
    """All checks of the public suite; the fixture `job_context` above is for every one of them."""

    deadline_seconds = 90.0

    @pytest.fixture
    def job_context(self, job_context: RayJobContext) -> RayJobContext:
        return job_context


def test_it_is_found_where_ray_is(job_context: RayJobContext, monkeypatch: pytest.MonkeyPatch) -> None:
    assert RayJobContext.detect()
    assert fray.get_job_context() is job_context
    assert RayJobContext() is job_context


def test_it_is_found_in_a_driver_that_others_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    assert not RayJobContext.detect()
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert not RayJobContext.detect(), "that is where jobs are submitted to, and no sign of being in one"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert RayJobContext.detect()


def test_a_function_is_exported_once(job_context: RayJobContext) -> None:
    def fn(number: int) -> int:
        return number

    options = TaskOptions(resources={"CPU": 0.5})
    job_context.get([job_context.create_task(fn, (number,)) for number in range(20)])
    job_context.get([job_context.create_task(fn, (number,), options=options) for number in range(20)])
    made = [made for target, _, made in job_context._functions._made.values() if target is fn]
    assert len(made) == 2, "plain, and with options"


def test_functions_that_are_made_anew_do_not_pile_up(job_context: RayJobContext) -> None:
    for _ in range(700):
        job_context._functions.keep(lambda: None, None, None)
    assert len(job_context._functions._made) <= 512


def test_what_is_called_need_be_no_function(job_context: RayJobContext) -> None:
    import functools

    class Adder:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, start: int) -> None:
            self.start = start

        def __eq__(self, other: object) -> bool:
            return True

        def __call__(self, number: int) -> int:
            return self.start + number

    refs = [
        job_context.create_task(functools.partial(max, 3), (5,)),
        job_context.create_task(Adder(1), (2,)),
        job_context.create_task(Adder(10), (2,)),
        job_context.create_task("a-b".split, ("-",)),
        job_context.create_task(int, ("7",)),
    ]
    assert job_context.get(refs) == [5, 3, 12, ["a", "b"], 7]


def test_resources_are_rays_own(job_context: RayJobContext) -> None:
    def assigned() -> dict[str, float]:
        return dict(ray.get_runtime_context().get_assigned_resources())

    resources = {"CPU": 2, "memory": 100 * 1024**2, "gate": 0.5}
    found = job_context.get(job_context.create_task(assigned, options=TaskOptions(resources=resources)))
    assert {name: found.get(name) for name in ("CPU", "gate")} == {"CPU": 2, "gate": 0.5}
    assert found["memory"] == 100 * 1024**2

    class Holder:
        def assigned(self) -> dict[str, float]:
            return assigned()

    holder = job_context.create_actor(Holder, options=ActorOptions(resources={"gate": 0.25}))
    assert job_context.get(holder.assigned())["gate"] == 0.25


def test_a_tasks_environment_is_its_own(job_context: RayJobContext) -> None:
    env = RuntimeEnv([], [Resource("gate", 0.1)], env={"TASK_VARIABLE": "set"})
    ref = job_context.create_task(os.getenv, ("TASK_VARIABLE",), options=TaskOptions(runtime_env=env))
    assert job_context.get(ref) == "set"
    assert job_context.get(job_context.create_task(os.getenv, ("TASK_VARIABLE",))) is None


@pytest.mark.parametrize(
    "env",
    [
        RuntimeEnv(secrets={"S": "x"}),
        RuntimeEnv(working_dir="/"),
        RuntimeEnv(container_image="x"),
        RuntimeEnv([], [], [Resource("CPU", 1)]),
        RuntimeEnv(extras=["gpu"]),
    ],
)
def test_what_a_task_cannot_have_is_refused(job_context: RayJobContext, env: RuntimeEnv) -> None:
    with pytest.raises(UnsupportedError, match="give it to the job"):
        job_context.create_task(os.getpid, options=TaskOptions(runtime_env=env))


def test_max_calls_gives_each_call_a_process(job_context: RayJobContext) -> None:
    options = TaskOptions(max_calls=1)
    pids = {job_context.get(job_context.create_task(os.getpid, options=options)) for _ in range(3)}
    assert len(pids) == 3


def test_a_task_without_tpu_keeps_jax_off_it(job_context: RayJobContext) -> None:
    def platforms() -> str | None:
        return os.environ.get("JAX_PLATFORMS")

    assert job_context.get(job_context.create_task(platforms)) == "cpu"
    mine = TaskOptions(runtime_env=RuntimeEnv(env={"JAX_PLATFORMS": "tpu,cpu"}))
    assert job_context.get(job_context.create_task(platforms, options=mine)) == "tpu,cpu"

    class Actor:
        def platforms(self) -> str | None:
            return platforms()

    assert job_context.get(job_context.create_actor(Actor).platforms()) == "cpu"


def test_one_with_tpu_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from fray.backend.ray import ray_job

    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for keep, expected in ((True, "cpu"), (False, None), (True, "cpu")):
        ray_job._keep_off_tpu(keep)
        assert os.environ.get("JAX_PLATFORMS") == expected
    ray_job._keep_off_tpu(False)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    for keep in (True, False):
        ray_job._keep_off_tpu(keep)
        assert os.environ["JAX_PLATFORMS"] == "tpu"


def test_rays_traceback_is_the_cause(job_context: RayJobContext) -> None:
    def fail_in_here() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError) as raised:
        job_context.get(job_context.create_task(fail_in_here))
    assert isinstance(raised.value.__cause__, ray.exceptions.RayTaskError)
    assert "fail_in_here" in str(raised.value.__cause__)


def test_an_exit_is_handed_on(job_context: RayJobContext) -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit) as raised:
        job_context.get(job_context.create_task(leave))
    assert raised.value.code == 3


def test_a_killed_worker_is_the_platforms_failure(job_context: RayJobContext) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    @ray.remote(max_retries=0)
    def once() -> None:
        die()

    with pytest.raises(PlatformError, match="WorkerCrashedError"):
        job_context.get(once.remote())

    class Mortal:
        def die(self) -> None:
            die()

    with pytest.raises(PlatformError, match=r"Actor(Died|Unavailable)Error"):
        job_context.get(job_context.create_actor(Mortal).die())


def test_references_nest(job_context: RayJobContext) -> None:
    def open_up(box: dict[str, Any]) -> Any:
        return fray.get_job_context().get(box["inside"])

    box = {"inside": job_context.put({"deeper": job_context.put(42)})}
    inside = job_context.get(job_context.create_task(open_up, (box,)))
    assert job_context.get(inside["deeper"]) == 42


def test_a_detached_actor_outlives_its_driver_and_is_found(job_context: RayJobContext, ray_head: Head) -> None:
    import subprocess
    import sys

    program = """
import fray, sys
from fray.types import ActorOptions, Lifetime
from tests.ray.test_ray_job_context import Tally
ctx = fray.backend.ray.ray_job.RayJobContext()
options = ActorOptions(name="tally", get_if_exists=True, lifetime=Lifetime.DETACHED)
print(ctx.get(ctx.create_actor(Tally, options=options).add()))
"""
    environment = {**os.environ, "RAY_ADDRESS": ray_head.address, "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", "import fray.backend.ray.ray_job\n" + program]
    seen = [
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout.strip()
        for _ in range(2)
    ]
    assert seen == ["1", "2"]
    options = ActorOptions(name="tally", get_if_exists=True, lifetime=Lifetime.DETACHED)
    tally = job_context.create_actor(Tally, options=options)
    assert job_context.get(tally.add()) == 3
    ray.kill(tally._fray_handle)


class Tally:
    """Counts."""

    def __init__(self) -> None:
        self.total = 0

    def add(self) -> int:
        self.total += 1
        return self.total
