"""The conformance suite of tier 2 is itself tested: each promise is broken once, and the check for it must see that."""

from __future__ import annotations

import contextvars
import inspect
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from fray import ActorOptions, JobContext, LocalJobContext, UnsupportedError, clear_job_context
from fray.testing import JobContextConformance
from fray.types import ActorRef, ObjectRef

BROKEN: list[tuple[str, type[LocalJobContext]]] = []


class ImpatientSuite(JobContextConformance):
    deadline_seconds = 1.0


def caught_by(*checks: str) -> Callable[[type[LocalJobContext]], type[LocalJobContext]]:
    def register(broken: type[LocalJobContext]) -> type[LocalJobContext]:
        BROKEN.extend((check, broken) for check in checks)
        return broken

    return register


def with_its_slot(wait: Callable[[], Any]) -> Any:
    """Wait in another thread, so that the calling one keeps its place in the pool."""
    outcome: Future[Any] = Future()

    def settle() -> None:
        try:
            outcome.set_result(wait())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=settle, daemon=True).start()
    return outcome.result()


class Handle(ActorRef):
    """A handle whose method calls go through `call(name, args, kwargs)`."""

    def __init__(self, call: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._call = call

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._call(name, args, kwargs)


# Tasks


@caught_by("test_a_task_gives_its_result", "test_references_among_keyword_arguments_are_resolved")
class DropsKeywordArguments(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        return super().create_task(fn, args, None, options)


@caught_by("test_create_task_does_not_wait_for_the_task")
class RunsTasksAtOnce(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        ref = super().create_task(fn, args, kwargs, options)
        self.wait([ref])
        return ref


@caught_by("test_args_that_are_no_tuple_are_refused")
class TakesAnyIterableAsArguments(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        return super().create_task(fn, tuple(args), kwargs, options)

    def create_actor(self, cls, args=(), kwargs=None, options=None):
        return super().create_actor(cls, tuple(args), kwargs, options)


@caught_by("test_a_target_that_cannot_be_is_refused")
class FindsOutLater(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        return super().create_task(lambda: fn(*args, **(kwargs or {})), (), None, options)


@caught_by("test_task_options_are_accepted")
class RefusesTaskOptions(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        if options is not None:
            raise UnsupportedError("no options here")
        return super().create_task(fn, args, kwargs)


@caught_by("test_a_hundred_tasks_at_once")
class TakesFiftyTasks(LocalJobContext):
    made = 0

    def create_task(self, fn, args=(), kwargs=None, options=None):
        self.made += 1
        if self.made > 50:
            raise RuntimeError("too many tasks")
        return super().create_task(fn, args, kwargs, options)


# get and put


@caught_by("test_get_of_a_list_keeps_its_order", "test_a_hundred_tasks_at_once")
class GivesLastFirst(LocalJobContext):
    def get(self, ref):
        values = super().get(ref)
        return values[::-1] if isinstance(ref, list) else values


@caught_by("test_get_can_be_repeated", "test_each_get_of_a_failed_task_raises")
class GivesOnce(LocalJobContext):
    def __init__(self):
        super().__init__()
        self._given: list[ObjectRef] = []

    def get(self, ref):
        if isinstance(ref, list):
            return [self.get(one) for one in ref]
        if any(one is ref for one in self._given):
            return None
        self._given.append(ref)
        return super().get(ref)


@caught_by("test_put_gives_a_reference_to_the_value")
class PutsNothing(LocalJobContext):
    def put(self, obj):
        return super().put(None)


# References as arguments


@caught_by("test_references_among_positional_arguments_are_resolved", "test_what_failed_in_an_argument_fails_the_task")
class DoesNotResolvePositionalArguments(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        return super().create_task(lambda **keywords: fn(*args, **keywords), (), kwargs, options)


@caught_by("test_references_among_keyword_arguments_are_resolved", "test_what_failed_in_an_argument_fails_the_task")
class DoesNotResolveKeywordArguments(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        return super().create_task(lambda *values: fn(*values, **(kwargs or {})), args, None, options)


@caught_by("test_actors_resolve_references")
class DoesNotResolveConstructorArguments(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        class Unresolved(cls):
            def __init__(self):
                super().__init__(*args, **(kwargs or {}))

        return super().create_actor(Unresolved, (), None, options)


@caught_by("test_tasks_that_wait_for_arguments_are_in_nobody_s_way")
class HoldsASlotForEachWaitingTask(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        def resolve_and_call():
            return fn(*[with_its_slot(lambda arg=arg: self.get(arg)) for arg in args], **(kwargs or {}))

        return super().create_task(resolve_and_call, (), None, options)


@caught_by("test_what_failed_in_an_argument_fails_the_task")
class CallsWithNoneForWhatFailed(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        def value(arg):
            try:
                return self.get(arg)
            except Exception:
                return None

        def resolve_and_call():
            return fn(*map(value, args), **{name: value(arg) for name, arg in (kwargs or {}).items()})

        return super().create_task(resolve_and_call, (), None, options)


# Exceptions


@caught_by(
    "test_exceptions_keep_type_and_message",
    "test_each_get_of_a_failed_task_raises",
    "test_an_actor_survives_a_failing_method",
)
class WrapsExceptions(LocalJobContext):
    def get(self, ref):
        try:
            return super().get(ref)
        except Exception as error:
            raise RuntimeError(f"task failed: {error}") from error


@caught_by("test_exceptions_keep_type_and_message")
class RaisesASubclass(LocalJobContext):
    def get(self, ref):
        try:
            return super().get(ref)
        except Exception as error:
            raise type("TaskError", (type(error),), {})(*error.args) from error


@caught_by("test_exceptions_keep_type_and_message")
class AddsToTheMessage(LocalJobContext):
    def get(self, ref):
        try:
            return super().get(ref)
        except Exception as error:
            raise type(error)(f"in a task: {error}") from error


# Nesting


@caught_by("test_inside_a_task_the_job_context_is_the_one_that_made_it")
class RunsTasksInNoContext(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        def call(*values, **keywords):
            return contextvars.Context().run(fn, *values, **keywords)

        return super().create_task(call, args, kwargs, options)


@caught_by("test_inside_an_actor_the_job_context_is_the_one_that_made_it")
class MakesActorsInNoContext(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        class Lost(cls):
            def __init__(self, *values, **keywords):
                clear_job_context()
                super().__init__(*values, **keywords)

        return super().create_actor(Lost, args, kwargs, options)


@caught_by("test_tasks_nest_deeper_than_there_are_workers")
class KeepsTheSlotInGet(LocalJobContext):
    def get(self, ref):
        return with_its_slot(lambda: super(KeepsTheSlotInGet, self).get(ref))


@caught_by("test_tasks_nest_five_deep")
class HasThreeWorkersForGood(KeepsTheSlotInGet):
    def __init__(self):
        super().__init__(max_workers=3)


@caught_by("test_tasks_that_wait_are_in_nobody_s_way")
class KeepsTheSlotInWait(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        return with_its_slot(lambda: super(KeepsTheSlotInWait, self).wait(refs, num_returns, timeout))


# wait


@caught_by("test_wait_for_nothing_gives_nothing")
class RefusesToWaitForNothing(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        if not refs:
            raise ValueError("nothing to wait for")
        return super().wait(refs, num_returns, timeout)


@caught_by("test_wait_gives_the_caller_s_own_references")
class GivesOtherReferences(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        done, others = super().wait(refs, num_returns, timeout)
        return [self.put(self.get(ref)) for ref in done], others


@caught_by("test_wait_gives_at_most_num_returns")
class GivesAllThatIsDone(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        super().wait(refs, num_returns, timeout)
        return [ref for ref in refs if ref.is_done], [ref for ref in refs if not ref.is_done]


@caught_by("test_wait_keeps_the_order_given")
class GivesLastDoneFirst(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        done, others = super().wait(refs, num_returns, timeout)
        return done[::-1], others


@caught_by("test_wait_gives_at_most_num_returns", "test_wait_ends_at_its_timeout")
class GivesOthersInReverse(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        done, others = super().wait(refs, num_returns, timeout)
        return done, others[::-1]


@caught_by("test_wait_waits_for_num_returns")
class ReturnsWhenTheFirstIsDone(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        super().wait(refs, 1, timeout)
        return super().wait(refs, num_returns, 0)


@caught_by("test_wait_without_a_timeout_waits")
class DoesNotWaitWithoutATimeout(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        return super().wait(refs, num_returns, timeout or 0)


@caught_by("test_wait_ends_at_its_timeout")
class IgnoresTheTimeout(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        return super().wait(refs, num_returns)


@caught_by("test_a_failed_task_is_done")
class RaisesInWait(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        done, others = super().wait(refs, num_returns, timeout)
        self.get(done)
        return done, others


@caught_by("test_wait_refuses_what_cannot_be")
class WaitsForAnything(LocalJobContext):
    def wait(self, refs, num_returns=1, timeout=None):
        refs = list(dict.fromkeys(refs if isinstance(refs, list) else [refs]))
        return super().wait(refs, min(max(num_returns, 1), len(refs)), timeout)


# Actors


@caught_by("test_an_actor_keeps_its_state", "test_get_if_exists_gets_the_actor_that_exists")
class MakesTheActorAnewForEachCall(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        def call(name, values, keywords):
            actor = LocalJobContext.create_actor(self, cls, args, kwargs)
            return getattr(actor, name)(*values, **keywords)

        return Handle(call)


@caught_by("test_calls_on_an_actor_run_in_the_order_made")
class LetsCallsOvertake(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        actor = super().create_actor(cls, args, kwargs, options)

        def call(name, values, keywords):
            return self.create_task(lambda *resolved: self.get(getattr(actor, name)(*resolved)), values, keywords)

        return Handle(call)


@caught_by("test_calls_on_an_actor_do_not_overlap")
class LetsCallsOverlap(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        instance = cls(*args, **(kwargs or {}))
        return Handle(lambda name, values, keywords: self.create_task(getattr(instance, name), values, keywords))


@caught_by("test_asynchronous_methods_run_in_the_order_made_too")
class LeavesCoroutinesUndone(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        instance = cls(*args, **(kwargs or {}))

        def call(name, values, keywords):
            result = getattr(instance, name)(*values, **keywords)
            if inspect.iscoroutine(result):
                result.close()
            return self.put(None if inspect.iscoroutine(result) else result)

        return Handle(call)


@caught_by("test_an_actor_survives_a_failing_method")
class LosesTheStateOfWhatFailed(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        class Mortal(cls):
            def fail(self, message):
                self.__dict__.clear()
                super().fail(message)

        return super().create_actor(Mortal, args, kwargs, options)


@caught_by("test_a_failing_constructor_fails_the_method_calls")
class RaisesWhatTheConstructorRaises(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        actor = super().create_actor(cls, args, kwargs, options)
        self.get(actor.method())
        return actor


@caught_by("test_unnamed_actors_are_independent")
class MakesOneActorOfAClass(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        return super().create_actor(cls, args, kwargs, ActorOptions(name=cls.__name__, get_if_exists=True))


@caught_by("test_fifty_actors_at_once")
class HoldsASlotForEachActor(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        held = threading.Event()
        self.create_task(held.wait, (ImpatientSuite.deadline_seconds * 2,))
        return super().create_actor(cls, args, kwargs, options)


@caught_by("test_actor_options_are_accepted")
class RefusesActorOptions(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        if options is not None and options.resources is not None:
            raise UnsupportedError("no resources here")
        return super().create_actor(cls, args, kwargs, options)


@caught_by(
    "test_a_name_is_given_once",
    "test_get_if_exists_gets_the_actor_that_exists",
    "test_a_task_finds_a_named_actor",
)
class ReplacesNamedActors(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        return super().create_actor(cls, args, kwargs)


@caught_by("test_a_task_finds_a_named_actor")
class KeepsNamesPerThread(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        if options is not None and options.name is not None:
            options = ActorOptions(f"{options.name}-{threading.get_ident()}", options.get_if_exists)
        return super().create_actor(cls, args, kwargs, options)


@caught_by("test_a_handle_can_be_handed_to_a_task")
class RefusesHandlesAsArguments(LocalJobContext):
    def create_task(self, fn, args=(), kwargs=None, options=None):
        if any(isinstance(arg, ActorRef) for arg in args):
            raise TypeError("cannot pickle an actor")
        return super().create_task(fn, args, kwargs, options)


@caught_by("test_a_method_that_does_not_exist_is_refused_at_once")
class TakesAnyMethodName(LocalJobContext):
    def create_actor(self, cls, args=(), kwargs=None, options=None):
        actor = super().create_actor(cls, args, kwargs, options)
        return Handle(lambda name, values, keywords: getattr(actor, name)(*values, **keywords))


def run_check(check: str, job_context: JobContext, tmp_path: Path) -> None:
    method = getattr(ImpatientSuite(), check)
    available = {"job_context": job_context, "tmp_path": tmp_path}
    method(**{name: available[name] for name in inspect.signature(method).parameters})


@pytest.mark.parametrize(
    ("check", "broken"), BROKEN, ids=[f"{broken.__name__}-{check.removeprefix('test_')}" for check, broken in BROKEN]
)
def test_a_broken_promise_is_caught(check: str, broken: type[LocalJobContext], tmp_path: Path) -> None:
    with pytest.raises((Exception, pytest.fail.Exception)):
        run_check(check, broken(), tmp_path)


def test_each_check_catches_something() -> None:
    checks = {name for name in vars(JobContextConformance) if name.startswith("test_")}
    assert checks == {check for check, _ in BROKEN}


def test_the_fixture_must_be_overridden(tmp_path: Path) -> None:
    module = tmp_path / "test_nothing.py"
    module.write_text(
        "from fray.testing import JobContextConformance\n\nclass TestNothing(JobContextConformance):\n    pass\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-k", "test_a_task_gives_its_result", "-p", "no:cacheprovider", str(module)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "TestNothing must override the fixture job_context" in run.stdout
    assert "1 error" in run.stdout
