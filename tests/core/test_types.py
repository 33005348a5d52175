"""The values that cross Fray's interfaces: what they refuse and in which words, what they show, what they keep."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from fray import types
from fray.errors import InvalidTypeError, InvalidValueError
from fray.types import (
    ActorOptions,
    Attempt,
    EntryPoint,
    JobInfo,
    JobStatus,
    Lifetime,
    Resource,
    RuntimeEnv,
    TaskOptions,
    TerminationReason,
    TpuRunConfig,
)

SECRET = "hunter2-4f1c"


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"env": {"A": 3}}, "env values must be strings, got int: 3"),
        ({"env": {"A": None}}, "env values must be strings, got NoneType: None"),
        ({"env": {"A": b"x"}}, "env values must be strings, got bytes: b'x'"),
        ({"env": {3: "a"}}, "env keys must be strings, got int: 3"),
        ({"secrets": {3: "a"}}, "secrets keys must be strings, got int: 3"),
        ({"env": ["A=1"]}, "env must map names to values, got list"),
        ({"package_requirements": [3]}, "package_requirements must be strings, got int: 3"),
        ({"package_requirements": ["numpy", None]}, "package_requirements must be strings, got NoneType: None"),
        ({"package_requirements": "numpy"}, "package_requirements must be a list of strings, got str: 'numpy'"),
        ({"excludes": "*.bin"}, "excludes must be a list of strings, got str: '*.bin'"),
        ({"extras": [1]}, "extras must be strings, got int: 1"),
        ({"minimum_resources": {"CPU": 1}}, "minimum_resources must be a list of Resource, got dict: {'CPU': 1}"),
        ({"minimum_resources": [("CPU", 1)]}, "minimum_resources must be a list of Resource, got tuple: ('CPU', 1)"),
        ({"working_dir": 3}, "working_dir must be a path, got int: 3"),
        ({"working_dir": b"/x"}, "working_dir must be a path, got bytes: b'/x'"),
        ({"container_image": 3}, "container_image must be strings, got int: 3"),
    ],
)
def test_a_wrong_type_is_refused_in_these_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as refused:
        RuntimeEnv(**arguments)
    assert type(refused.value) is InvalidTypeError
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"package_requirements": [""]}, "package_requirements cannot contain empty strings"),
        ({"package_requirements": ["numpy", " \n"]}, "package_requirements cannot contain empty strings"),
        ({"excludes": [""]}, "excludes cannot contain empty strings"),
        (
            {"minimum_resources": [Resource("CPU", 8)], "maximum_resources": [Resource("CPU", 4)]},
            "minimum_resources[CPU]=8 exceeds maximum_resources[CPU]=4",
        ),
        ({"minimum_resources": [Resource("CPU", 1)] * 2}, "minimum_resources names CPU twice"),
        ({"env": {"A B": "x"}}, "env: 'A B' is not a variable name that a shell hands on ([A-Za-z0-9_])"),
        ({"env": {"1A": "x"}}, "env: '1A' is not a variable name that a shell hands on ([A-Za-z0-9_])"),
        ({"env": {"": "x"}}, "env: '' is not a variable name that a shell hands on ([A-Za-z0-9_])"),
        ({"env": {"A\n": "x"}}, "env: 'A\\n' is not a variable name that a shell hands on ([A-Za-z0-9_])"),
        ({"env": {"FRAY_JOB_ID": "x"}}, "env: FRAY_JOB_ID is refused, since the FRAY_* names are Fray's own"),
        ({"secrets": {"FRAY_X": "x"}}, "secrets: FRAY_X is refused, since the FRAY_* names are Fray's own"),
        ({"env": {"A": "1"}, "secrets": {"A": "2"}}, "A is in both env and secrets: give it in one of them"),
        ({"env": {"A": "x\0"}}, "env[A] cannot contain a NUL character"),
        ({"env": {"A": "\ud800"}}, "env[A] cannot be encoded as UTF-8: surrogates not allowed at 2"),
        ({"working_dir": ""}, "working_dir: '' is not a path"),
        ({"working_dir": "a\0b"}, "working_dir: 'a\\x00b' is not a path"),
        ({"extras": ["-x"]}, "extras: '-x' is not the name of an extra"),
        ({"container_image": " "}, "container_image: ' ' is not an image reference"),
        ({"container_image": "python:3.12 --rm"}, "container_image: 'python:3.12 --rm' is not an image reference"),
    ],
)
def test_a_wrong_value_is_refused_in_these_words(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        RuntimeEnv(**arguments)
    assert type(refused.value) is InvalidValueError
    assert str(refused.value) == message


@pytest.mark.parametrize("requirement", ["-e .", "--index-url https://x", "numpy scipy", "./local", "numpy>=", "a;"])
def test_what_is_no_requirement_is_refused_and_the_way_shown(requirement: str) -> None:
    with pytest.raises(InvalidValueError, match="is no PEP 508 requirement; write 'name', ") as refused:
        RuntimeEnv([requirement])
    assert repr(requirement) in str(refused.value)


@pytest.mark.parametrize(
    ("name", "quantity", "kind", "message"),
    [
        ("memory", -1024, InvalidValueError, "Resource quantities cannot be negative: memory=-1024"),
        ("CPU", -0.5, InvalidValueError, "Resource quantities cannot be negative: CPU=-0.5"),
        ("CPU", float("nan"), InvalidValueError, "Resource quantities must be finite: CPU=nan"),
        ("CPU", float("inf"), InvalidValueError, "Resource quantities must be finite: CPU=inf"),
        ("CPU", "8", InvalidTypeError, "Resource quantities must be numbers, got str: CPU='8'"),
        ("CPU", True, InvalidTypeError, "Resource quantities must be numbers, got bool: CPU=True"),
        (" ", 1, InvalidValueError, "a resource's name cannot be empty"),
        (3, 1, InvalidTypeError, "resource names must be strings, got int: 3"),
    ],
)
def test_a_resource_that_cannot_be_is_refused(name: Any, quantity: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refused:
        Resource(name, quantity)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: TaskOptions({"CPU": -1}), ValueError, "Resource quantities cannot be negative: CPU=-1"),
        (lambda: ActorOptions(resources={"CPU": -1}), ValueError, "Resource quantities cannot be negative: CPU=-1"),
        (lambda: TaskOptions({"CPU": "1"}), TypeError, "Resource quantities must be numbers, got str: CPU='1'"),
        (lambda: TaskOptions({1: 1}), TypeError, "resource names must be strings, got int: 1"),
        (lambda: TaskOptions(4), TypeError, "resources must map names to quantities, got int"),
        (lambda: TaskOptions(max_calls=0), ValueError, "max_calls must be at least 1, got 0"),
        (lambda: TaskOptions(max_calls=1.5), TypeError, "max_calls must be an integer, got float: 1.5"),
        (
            lambda: ActorOptions(lifetime="for ever"),
            ValueError,
            "lifetime is 'ephemeral' or 'detached', not 'for ever'",
        ),
        (lambda: TpuRunConfig(4), TypeError, "tpu_type must be strings, got int: 4"),
        (lambda: TpuRunConfig("v4-8", 0), ValueError, "num_slices must be at least 1, got 0"),
        (lambda: TpuRunConfig("v4-8", True), TypeError, "num_slices must be an integer, got bool: True"),
        (lambda: TpuRunConfig("v4-8", 1, -1), ValueError, "max_retries_preemption must be at least 0, got -1"),
        (lambda: TpuRunConfig("v4-8", 1, 0, -1), ValueError, "max_retries_failure must be at least 0, got -1"),
    ],
)
def test_an_option_that_cannot_be_is_refused(make: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as refused:
        make()
    assert isinstance(refused.value, (InvalidTypeError, InvalidValueError))
    assert str(refused.value) == message


def test_what_the_operating_system_takes_is_taken_and_no_more() -> None:
    longest = "x" * (131_071 - len("NAME="))
    assert RuntimeEnv(env={"NAME": longest}).env["NAME"] == longest
    with pytest.raises(InvalidValueError, match="is 131072 bytes long; the operating system takes 131071"):
        RuntimeEnv(env={"NAME": longest + "x"})
    with pytest.raises(InvalidValueError, match="is 131072 bytes long"):
        RuntimeEnv(secrets={"NAME": longest[:-3] + "\U0001f600"})  # four bytes, one character


def test_a_refused_secret_is_not_shown() -> None:
    for wrong in (
        {"A": SECRET.encode()},
        {"A": [SECRET]},
        {"A": f"{SECRET}\0"},
        {"A": f"{SECRET}\ud800"},
        {"A B": SECRET},
    ):
        with pytest.raises((TypeError, ValueError)) as refused:
            RuntimeEnv(secrets=wrong)  # type: ignore[arg-type]
        assert SECRET not in str(refused.value)
        assert SECRET not in repr(refused.value)
        assert "A" in str(refused.value)


# What is shown


@pytest.mark.parametrize(
    "name", ["WANDB_API_KEY", "HF_TOKEN", "MY_SECRET", "DB_PASSWORD", "GOOGLE_CREDENTIALS", "apikey", "Token"]
)
def test_a_telling_name_masks_its_value(name: str) -> None:
    env = RuntimeEnv(env={name: SECRET})
    assert SECRET not in repr(env) + str(env) + f"{env}"
    assert env.masked() == {"env": {name: "***"}}
    assert env.env == {name: SECRET}, "the job itself gets it"


@pytest.mark.parametrize("name", ["KEY_FILE", "TOKENIZERS_PARALLELISM", "MODE", "PASSWORD_LENGTH"])
def test_any_other_name_shows_its_value(name: str) -> None:
    assert RuntimeEnv(env={name: "shown"}).masked() == {"env": {name: "shown"}}


def test_a_secret_shows_its_name_only() -> None:
    env = RuntimeEnv(secrets={"PLAIN": SECRET})
    assert repr(env) == "RuntimeEnv(secrets={'PLAIN': '***'})"
    assert SECRET not in str(env)
    assert SECRET not in repr(TaskOptions(runtime_env=env))
    assert SECRET not in repr([env]) + repr({"env": env})


def test_only_what_is_set_is_shown() -> None:
    assert repr(RuntimeEnv()) == "RuntimeEnv()"
    assert RuntimeEnv().masked() == {}
    full = RuntimeEnv(
        ["numpy>=2"],
        [Resource("CPU", 1)],
        [Resource("CPU", 2)],
        {"A": "1"},
        secrets={"S": SECRET},
        working_dir="/src",
        excludes=["*.bin"],
        container_image="python:3.12",
        extras=["gpu"],
    )
    assert full.masked() == {
        "package_requirements": ["numpy>=2"],
        "minimum_resources": {"CPU": 1},
        "maximum_resources": {"CPU": 2},
        "env": {"A": "1"},
        "secrets": {"S": "***"},
        "working_dir": "/src",
        "excludes": ["*.bin"],
        "container_image": "python:3.12",
        "extras": ["gpu"],
    }
    assert list(full.masked()) == [field.name for field in dataclasses.fields(RuntimeEnv)]


# Jobs


def test_a_record_reads_like_a_dictionary() -> None:
    job = JobInfo("job-1", JobStatus.SUCCEEDED, 1.0, 2.0, 3.0, exit_code=0, metadata={"a": "b"})
    assert job["id"] == job.id == "job-1"
    assert job["status"] is job.status
    assert "SUCCEEDED" in job["status"]
    assert job["status"] == "SUCCEEDED"
    assert f"{job['status']}" == "SUCCEEDED"
    assert job["metadata"]["a"] == "b"
    assert list(job.keys()) == [field.name for field in dataclasses.fields(JobInfo)]
    assert dict(job) == {name: getattr(job, name) for name in job.keys()}  # noqa: SIM118 - it is no mapping
    assert JobInfo(**job) == job  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["nothing", "keys", "__class__", "", 0])
def test_what_is_no_field_is_no_key(name: Any) -> None:
    with pytest.raises(KeyError) as missing:
        JobInfo("job-1", JobStatus.PENDING, 1.0)[name]
    assert missing.value.args == (name,)


def test_each_reason_has_its_one_status() -> None:
    assert {reason: reason.status for reason in TerminationReason} == {
        **dict.fromkeys(TerminationReason, JobStatus.FAILED),
        TerminationReason.STOPPED_BY_USER: JobStatus.STOPPED,
    }
    assert list(TerminationReason) == [
        *("EXITED", "KILLED", "OUT_OF_MEMORY", "SETUP_FAILED", "INFEASIBLE", "TIMED_OUT", "PREEMPTED", "LOST"),
        "STOPPED_BY_USER",
    ]
    assert all(reason.status.is_terminal for reason in TerminationReason)


def test_three_of_five_states_are_final() -> None:
    assert list(JobStatus) == ["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
    assert [status for status in JobStatus if status.is_terminal] == ["SUCCEEDED", "FAILED", "STOPPED"]


# Construction


def test_positional_construction_is_part_of_the_api() -> None:
    assert Resource("CPU", 8) == Resource(name="CPU", quantity=8)
    assert RuntimeEnv(["numpy"]).package_requirements == ["numpy"]
    env = RuntimeEnv(["numpy"], [Resource("CPU", 1)], [Resource("CPU", 2)], {"A": "1"})
    assert (env.minimum_resources, env.maximum_resources, env.env) == (
        [Resource("CPU", 1)],
        [Resource("CPU", 2)],
        {"A": "1"},
    )
    config = TpuRunConfig("v4-32", 2)
    assert (config.tpu_type, config.num_slices) == ("v4-32", 2)
    assert (config.max_retries_preemption, config.max_retries_failure) == (10000, 10)
    info = JobInfo("job-1", JobStatus.RUNNING, 1.0, 2.0, None)
    assert (info.submission_time, info.start_time, info.end_time) == (1.0, 2.0, None)
    task = TaskOptions({"CPU": 1}, RuntimeEnv(), "name", 1)
    assert (task.resources, task.runtime_env, task.name, task.max_calls) == ({"CPU": 1}, RuntimeEnv(), "name", 1)
    actor = ActorOptions("counter", True, {"CPU": 1}, Lifetime.DETACHED)
    assert (actor.name, actor.get_if_exists, actor.resources, actor.lifetime) == (
        *("counter", True, {"CPU": 1}),
        Lifetime.DETACHED,
    )
    assert EntryPoint is str


def test_the_rest_is_given_by_name() -> None:
    with pytest.raises(TypeError):
        RuntimeEnv([], [], [], {}, {"S": "x"})  # type: ignore[misc]
    with pytest.raises(TypeError):
        JobInfo("job-1", JobStatus.RUNNING, 1.0, 2.0, None, 0)  # type: ignore[misc]


def test_the_defaults_are_nothing() -> None:
    env = RuntimeEnv()
    assert [getattr(env, field.name) for field in dataclasses.fields(env)] == [
        *([], [], [], {}),
        *({}, None, [], None, []),
    ]
    assert TaskOptions() == TaskOptions(None, None, None, None)
    assert ActorOptions() == ActorOptions(None, False, None, Lifetime.EPHEMERAL)
    assert RuntimeEnv().env is not RuntimeEnv().env


def test_a_sequence_or_a_path_will_do() -> None:
    env = RuntimeEnv(("numpy",), (Resource("CPU", 1),), working_dir=Path("/src"), excludes=iter(["*.bin"]))  # type: ignore[arg-type]
    assert env == RuntimeEnv(["numpy"], [Resource("CPU", 1)], working_dir="/src", excludes=["*.bin"])
    assert type(env.package_requirements) is list
    assert type(env.working_dir) is str
    assert TaskOptions([Resource("CPU", 2)]).resources == {"CPU": 2}  # type: ignore[arg-type]
    assert ActorOptions(lifetime="detached").lifetime is Lifetime.DETACHED  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "requirement",
    [
        "numpy",
        "numpy>=1.2,<3",
        "numpy (>=1.2)",
        "numpy[all, test] ~= 1.2",
        "numpy==1.*",
        "numpy===1.2-custom",
        "numpy; python_version < '3.13'",
        "numpy @ file:///some/where",
        "numpy[x]@https://example.com/numpy-1.0.whl#sha256=00 ; sys_platform == 'linux'",
    ],
)
def test_a_requirement_is_kept_as_it_was_given(requirement: str) -> None:
    assert RuntimeEnv([requirement]).package_requirements == [requirement]


# Frozen


VALUES: list[Any] = [
    Resource("CPU", 1),
    RuntimeEnv(["numpy"], [Resource("CPU", 1)], env={"A": "1"}, secrets={"S": "2"}),
    Attempt(1, 2.0),
    JobInfo("job-1", JobStatus.FAILED, 1.0, reason=TerminationReason.LOST, attempts=(Attempt(1, 2.0),)),
    TaskOptions({"CPU": 1}, RuntimeEnv(env={"A": "1"})),
    ActorOptions("name", resources={"CPU": 1}, lifetime=Lifetime.DETACHED),
    TpuRunConfig("v4-8"),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_frozen(value: Any) -> None:
    for field in dataclasses.fields(value):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field.name, None)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_can_be_copied_and_sent(value: Any) -> None:
    for twin in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), copy.copy(value), dataclasses.replace(value)):
        assert twin == value
        assert type(twin) is type(value)


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_fully_typed(value: Any) -> None:
    hints = get_type_hints(type(value))
    assert {field.name for field in dataclasses.fields(value)} <= hints.keys()


def test_the_callers_lists_stay_the_callers() -> None:
    requirements, resources, env, secrets = ["numpy"], [Resource("CPU", 1)], {"A": "1"}, {"S": "2"}
    excludes, extras = ["*.bin"], ["gpu"]
    made = RuntimeEnv(requirements, resources, env=env, secrets=secrets, excludes=excludes, extras=extras)
    twin = copy.deepcopy(made)
    for changed in (requirements, resources, env, secrets, excludes, extras):
        changed.clear()  # type: ignore[attr-defined]
    assert made == twin
    options = {"CPU": 1.0}
    task = TaskOptions(options)
    options.clear()
    assert task.resources == {"CPU": 1.0}


def test_replacing_a_field_checks_it_again() -> None:
    with pytest.raises(InvalidValueError, match="FRAY_"):
        dataclasses.replace(RuntimeEnv(), env={"FRAY_X": "1"})


def test_all_public_names_are_there() -> None:
    assert types.__all__ == sorted(types.__all__)
    assert {name for name in types.__all__ if not hasattr(types, name)} == set()
