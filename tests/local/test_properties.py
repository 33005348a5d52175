"""Bad and odd input, by property: refused before anything happens and in the right kind, or brought over to the byte.

Every run draws the same examples. The local backend is real throughout: what a job is given, a job has read.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet

import fray
from fray import ClusterContext, JobPlan, JobStatus, Resource, RuntimeEnv, UsageError
from tests.local.local_harness import LocalHarness

# The store of all examples is one: a plan leaves nothing in it, and jobs do not see each other.
PROPERTY = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
VALIDATION = settings(PROPERTY, max_examples=150)
ROUND_TRIP = settings(PROPERTY, max_examples=30)

# What shells, environments, paths and files trip over.
TRAPS = [
    *("'", '"', "\\", "`x`", "$HOME", "$(id)", "${x}", "!", "*", "?", "[a]", "~", "{a,b}", "%s", "%n", "&", "|", ";"),
    *("<", ">", "(", ")", "#", "=", "-n", "--", " ", "\t", "\n", "\r", "\r\n", "\x01", "\x1b[31m", "\x7f", "\u2028"),
    *("\ufeff", "\u0301", "\u202e", "\U0001f600", "\u00fc", "end\n", "'\\''", "EOF\n", ""),
]
# Everything that UTF-8 has, but NUL, which no argument and no variable can hold.
text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
tricky = st.lists(st.one_of(st.sampled_from(TRAPS), text), max_size=6).map("".join)
# And what none of that is: lone surrogates, NUL.
any_text = st.one_of(tricky, st.text(st.characters(), max_size=8), st.sampled_from(["\0", "\ud800", "a\0b"]))

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True).filter(lambda name: not name.startswith("FRAY_"))
other_objects = st.one_of(
    st.none(),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.binary(max_size=5),
    st.just([]),
    st.just({}),
    st.just(print),
)
any_object = st.one_of(any_text, other_objects)
hashable_objects = any_object.filter(lambda each: each.__hash__ is not None)


def kind_of(call: Callable[[], object]) -> type[Exception] | None:
    """The Python kind of what a call raises; nothing but the two kinds of bad input may come."""
    try:
        call()
    except UsageError as error:
        refused = error
    else:
        return None
    kinds = [kind for kind in (TypeError, ValueError, NotImplementedError) if isinstance(refused, kind)]
    assert len(kinds) == 1, f"{type(refused).__name__} is not of one kind"
    assert str(refused), "it says why"
    return kinds[0]


# Validation: values


@VALIDATION
@given(st.dictionaries(st.one_of(names, hashable_objects), st.one_of(any_text, any_object), max_size=2))
@example({"A": "a\0b"})
@example({"A": "\ud800"})
@example({"FRAY_X": "1"})
@example({"A\n": "1"})
@example({"A": "x" * 131_070})
def test_variables_are_taken_or_refused(variables: dict[Any, Any]) -> None:
    kind = kind_of(lambda: RuntimeEnv(env=variables))
    assert kind == kind_of(lambda: RuntimeEnv(secrets=variables))
    for_the_shell = all(_is_variable(name, value) for name, value in variables.items())
    if all(isinstance(each, str) for pair in variables.items() for each in pair):
        assert kind is (None if for_the_shell else ValueError)
    else:
        assert kind in (TypeError, ValueError)  # the first wrong pair decides
        assert kind is TypeError or any(isinstance(name, str) for name in variables)


def _is_variable(name: object, value: object) -> bool:
    """Told without Fray's own patterns."""
    if not isinstance(name, str) or not isinstance(value, str) or not name.isascii() or not name.isidentifier():
        return False
    return not name.startswith("FRAY_") and _fits(f"{name}={value}")


def _fits(text: str) -> bool:
    """Whether the operating system takes a text as an argument."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        return False
    return b"\0" not in encoded and len(encoded) < 128 * 1024


@VALIDATION
@given(tricky, tricky, st.sampled_from(["A B", "1A", "", "FRAY_X", "A=", "A\n", "\u00fc"]))
def test_a_refused_secret_is_in_no_message(before: str, after: str, name: str) -> None:
    secret = f"{before}s3cret-4f1c{after}"
    for wrong in ({name: secret}, {"A": secret.encode()}, {"A": f"{secret}\0"}, {"A": f"\ud800{secret}"}):
        with pytest.raises(UsageError) as refused:
            RuntimeEnv(secrets=wrong)  # type: ignore[arg-type]
        assert "s3cret-4f1c" not in f"{refused.value} {refused.value!r} {refused.value.__cause__}"


@VALIDATION
@given(any_object, st.one_of(other_objects, st.floats(), st.integers(), st.just("1")))
def test_a_resource_is_taken_or_refused(name: Any, quantity: Any) -> None:
    kind = kind_of(lambda: Resource(name, quantity))
    if kind is None:
        assert isinstance(name, str)
        assert name.strip()
        assert quantity >= 0
        assert quantity < float("inf")
        assert Resource(name, quantity) == Resource(name, quantity)
    if not isinstance(name, str):
        assert kind is TypeError
    elif isinstance(quantity, bool) or not isinstance(quantity, (int, float)):
        assert kind is not None


@VALIDATION
@given(st.dictionaries(st.sampled_from(["CPU", "GPU", "memory"]), st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_a_minimum_above_its_maximum_is_refused(amounts: dict[str, tuple[int, int]]) -> None:
    least = [Resource(name, low) for name, (low, _) in amounts.items()]
    most = [Resource(name, high) for name, (_, high) in amounts.items()]
    expected = ValueError if any(low > high for low, high in amounts.values()) else None
    assert kind_of(lambda: RuntimeEnv([], least, most)) is expected


@VALIDATION
@given(st.fixed_dictionaries({}, optional=dict.fromkeys(("working_dir", "container_image"), any_object)))
def test_paths_and_images_are_taken_or_refused(fields: dict[str, Any]) -> None:
    kind = kind_of(lambda: RuntimeEnv(**fields))
    if kind is None:
        assert all(value is None or isinstance(value, str) for value in fields.values())
    if all(value is None or isinstance(value, str) for value in fields.values()):
        assert kind in (None, ValueError)


@VALIDATION
@given(st.sampled_from(["package_requirements", "excludes", "extras"]), st.one_of(st.lists(any_object), any_object))
def test_lists_of_strings_are_taken_or_refused(field: str, members: Any) -> None:
    kind = kind_of(lambda: RuntimeEnv(**{field: members}))
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        assert kind is not None
    if not isinstance(members, list):
        assert kind is TypeError
    if kind is None:
        assert getattr(RuntimeEnv(**{field: members}), field) == members


# Validation: requests


@pytest.fixture
def untouched(harness: LocalHarness) -> Iterator[ClusterContext]:
    """A cluster of whose store not a file may change."""
    cluster = harness.cluster
    before = _listing(harness.root)
    yield cluster
    assert _listing(harness.root) == before


def _listing(root: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*"))


def _plan(cluster: ClusterContext, **arguments: Any) -> JobPlan | None:
    plans: list[JobPlan] = []
    kind = kind_of(lambda: plans.append(cluster.plan_job(**{"entrypoint": "true", **arguments})))
    if kind is not None:
        # What a plan refuses, a submission refuses the same way.
        assert kind_of(lambda: cluster.create_job(**{"entrypoint": "true", **arguments})) is kind
    return plans[0] if plans else None


@VALIDATION
@given(job_id=st.one_of(st.from_regex(r"[A-Za-z0-9_-]{1,70}\n?", fullmatch=True), any_object))
@example(job_id="a" * 63)
@example(job_id="a" * 64)
@example(job_id="..")
@example(job_id="\u0661")
def test_a_job_id_is_taken_or_refused(untouched: ClusterContext, job_id: Any) -> None:
    plan = _plan(untouched, job_id=job_id)
    letters = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")
    if job_id is None:
        assert plan is not None
        return
    right = isinstance(job_id, str) and 1 <= len(job_id) <= 63 and set(job_id) <= {*letters, "_", "-"}
    assert (plan is not None) == (right and job_id[0] in letters)
    if plan:
        assert plan.request.job_id == job_id
    calls = [untouched.get_job, untouched.wait, untouched.delete_job, untouched.read_logs, untouched.purge_job]
    for call in calls:
        with pytest.raises(fray.JobNotFoundError if plan else (TypeError, ValueError)):
            call(job_id)


@VALIDATION
@given(entrypoint=any_object)
@example(entrypoint="x" * 131_071)
@example(entrypoint="x" * 131_072)
@example(entrypoint="\u00fc" * 65_536)
@example(entrypoint=["echo", "hi"])
def test_an_entrypoint_is_taken_whole_or_refused(untouched: ClusterContext, entrypoint: Any) -> None:
    plan = _plan(untouched, entrypoint=entrypoint)
    right = isinstance(entrypoint, str) and bool(entrypoint.strip()) and _fits(entrypoint)
    assert (plan is not None) == right
    if plan is None:
        return
    assert plan.request.entrypoint == entrypoint
    assert plan.native["command"] == ["/bin/sh", "-c", "--", entrypoint]
    assert json.loads(str(plan))["entrypoint"] == entrypoint


@VALIDATION
@given(metadata=st.one_of(any_object, st.dictionaries(any_text, any_object, max_size=3)))
def test_metadata_is_taken_or_refused(untouched: ClusterContext, metadata: Any) -> None:
    plan = _plan(untouched, metadata=metadata)
    if plan is not None:
        assert plan.request.metadata == (metadata or {})
        assert json.loads(str(plan))["metadata"] == (metadata or {})


@VALIDATION
@given(
    timeout_seconds=st.one_of(other_objects, st.floats(), st.just("1")),
    max_retries=st.one_of(st.integers(), other_objects, st.just("1")),
    if_exists=st.one_of(st.sampled_from(["error", "adopt"]), any_object),
)
def test_limits_are_taken_or_refused(untouched: ClusterContext, **options: Any) -> None:
    plan = _plan(untouched, job_id="limits", **options)
    seconds, retries = options["timeout_seconds"], options["max_retries"]
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    right = seconds is None or (is_number and 0 < seconds < float("inf"))
    right = right and isinstance(retries, int) and not isinstance(retries, bool) and retries >= 0
    assert (plan is not None) == (right and options["if_exists"] in ("error", "adopt"))


@VALIDATION
@given(directory=tricky)
def test_a_directory_that_is_not_there_is_refused(untouched: ClusterContext, directory: str) -> None:
    assume("\0" not in directory)
    plan = _plan(untouched, env=RuntimeEnv(working_dir=f"/nowhere-4f1c/{directory}"))
    assert plan is None


@VALIDATION
@given(kind=tricky, quantity=st.integers(0, 10))
def test_a_resource_is_known_or_refused(untouched: ClusterContext, kind: str, quantity: int) -> None:
    assume(kind.strip() and kind not in ("CPU", "memory", "GPU"))
    assert _plan(untouched, env=RuntimeEnv([], [Resource(kind, quantity)])) is None
    assert _plan(untouched, env=RuntimeEnv([], [], [Resource(kind, quantity)])) is None


# Requirements: Fray's pattern against the reference implementation of the specification

gap = st.text(" \t", max_size=2)
name = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
# The forms of PEP 440's appendix B.
version = st.from_regex(
    r"v?([1-9]!)?[0-9]{1,4}(\.[0-9]{1,3}){0,3}([-_.]?(a|b|c|rc|alpha|beta|pre|preview)[-_.]?[0-9]?)?"
    r"(-[0-9]|[-_.]?(post|rev|r)[-_.]?[0-9]?)?([-_.]?dev[-_.]?[0-9]?)?",
    fullmatch=True,
)
local_version = st.from_regex(r"[0-9](\.[0-9]){0,2}\+[a-z0-9]{1,4}([-_.][a-z0-9]{1,4})?", fullmatch=True)
release = st.from_regex(r"[0-9]{1,3}(\.[0-9]{1,3}){0,3}", fullmatch=True)
clause = st.one_of(
    st.tuples(st.sampled_from(["==", "!=", "<=", ">=", "<", ">"]), gap, version).map("".join),
    st.tuples(st.sampled_from(["==", "!="]), gap, local_version).map("".join),
    st.tuples(st.sampled_from(["==", "!="]), gap, release, st.just(".*")).map("".join),
    st.tuples(st.just("~="), gap, st.from_regex(r"[0-9]\.[0-9]{1,2}(\.[0-9])?(rc1|\.post2)?", fullmatch=True)).map(
        "".join
    ),
    st.tuples(st.just("==="), gap, st.from_regex(r"[A-Za-z0-9.+!_*-]{1,10}", fullmatch=True)).map("".join),
)
clauses = st.lists(st.tuples(gap, clause, gap).map("".join), min_size=1, max_size=3).map(",".join)
extras = st.lists(st.tuples(gap, name, gap).map("".join), max_size=3).map(lambda members: f"[{','.join(members)}]")
url = st.sampled_from(
    [
        "file:///some/where/x-1.0-py3-none-any.whl",
        "https://example.org/x-1.0.tar.gz#sha256=0123",
        "git+https://example.org/x.git@v1.0#subdirectory=a",
        "git+ssh://git@example.org/x.git;y",
        "file:///with%20space",
    ]
)
marker = st.sampled_from(
    [
        "python_version < '3.13'",
        'sys_platform == "linux" and (python_version>="3.8" or extra == \'x\')',
        "platform_machine in 'x86_64 aarch64'",
        "os_name not in 'nt'",
        "'3.8' <= python_version",
    ]
)
requirement = st.builds(
    lambda before, name, extras, rest, marker: before + name + extras + rest + marker,
    gap,
    name,
    st.one_of(st.just(""), st.tuples(gap, extras).map("".join)),
    st.one_of(
        gap,
        st.tuples(gap, clauses).map("".join),
        st.tuples(gap, clauses.map(lambda inner: f"({inner})"), gap).map("".join),
        st.tuples(gap, st.just("@"), gap, url, st.just(" ")).map("".join),
    ),
    st.one_of(st.just(""), st.tuples(st.just(";"), gap, marker, gap).map("".join)),
)


def _is_requirement(text: str) -> bool:
    try:
        Requirement(text)
    except InvalidRequirement:
        return False
    return True


@settings(PROPERTY, max_examples=300)
@given(requirement)
def test_what_the_grammar_makes_is_accepted(requirement: str) -> None:
    assume(_is_requirement(requirement))  # some versions that the pattern above makes are none
    assert RuntimeEnv([requirement]).package_requirements == [requirement]


def test_what_the_grammar_makes_is_mostly_what_the_reference_takes() -> None:
    seen: list[bool] = []

    @settings(PROPERTY, max_examples=200)
    @given(requirement)
    def look(requirement: str) -> None:
        seen.append(_is_requirement(requirement))

    look()
    assert sum(seen) > 0.8 * len(seen)


@settings(PROPERTY, max_examples=300)
@given(
    requirement,
    st.integers(0, 60),
    st.sampled_from([*"[](),;@=<>~! \n\r\v-_.#'\"$/\\", "--", " x", "\u00fc", "\u2028"]),
)
@example("numpy", 5, "\n")
@example("numpy;", 6, "\n--index-url=https://example.org")
@example("numpy; python_version > '3'", 60, "\r-e .")
def test_what_is_accepted_is_a_requirement(whole: str, place: int, stray: str) -> None:
    changed = whole[:place] + stray + whole[place:]
    assume(changed.strip())
    if kind_of(lambda: RuntimeEnv([changed])) is None:
        assert len(changed.splitlines()) == 1 or "\u2028" in changed, "it is one line of a requirements file"
        assert _is_requirement(changed.partition(";")[0]) or not _has_plain_versions(changed), changed


def _has_plain_versions(text: str) -> bool:
    """Whether the versions are ones; what is none, and the grammar of markers, is left to the installer."""
    specifiers = text.partition(";")[0].strip().lstrip("([")
    for place, character in enumerate(specifiers):
        if character in "=<>~!(":
            try:
                SpecifierSet(specifiers[place:].strip().strip("()"))
            except InvalidSpecifier:
                return False
            return True
    return True


@VALIDATION
@given(any_text)
def test_any_text_is_a_requirement_or_refused(text: str) -> None:
    if kind_of(lambda: RuntimeEnv([text])) is None:
        assert _is_requirement(text.partition(";")[0]) or not _has_plain_versions(text)
    elif _is_requirement(text):
        assert "@" in text or "_" in text, "a path for a URL, or a name that ends in an underscore"


# Round trips


def _run(harness: LocalHarness, entrypoint: str, env: RuntimeEnv | None = None, **options: Any) -> bytes:
    info = harness.run(entrypoint, env, **options)
    log = harness.cluster.read_logs(info.id)
    assert info.status is JobStatus.SUCCEEDED, (info, log)
    assert info.entrypoint == entrypoint
    return log


@ROUND_TRIP
@given(st.lists(tricky, min_size=1, max_size=5))
@example([*TRAPS])
@example(["".join(TRAPS)])
def test_arguments_reach_the_command(harness: LocalHarness, arguments: list[str]) -> None:
    log = _run(harness, f"printf '%s\\0' {shlex.join(arguments)}")
    assert log == b"".join(argument.encode() + b"\0" for argument in arguments)


@ROUND_TRIP
@given(st.dictionaries(names, tricky, max_size=3), st.dictionaries(names, tricky, max_size=3))
@example({"PLAIN": "".join(TRAPS)}, {"HIDDEN": "".join(TRAPS)})
@example({"A": ""}, {"B": "\n"})
def test_variables_and_secrets_reach_the_command(
    harness: LocalHarness, variables: dict[str, str], secrets: dict[str, str]
) -> None:
    taken = {"PATH", "PWD", "OLDPWD", "SHLVL", "_", "IFS", "PS1", "PS2", "PS4", "OPTIND", "PPID", "PYTHONPATH", "UID"}
    assume(not (taken | variables.keys()) & secrets.keys() and not taken & variables.keys())
    everything = {**variables, **secrets}
    command = "".join(f"printf '%s\\0' \"${name}\"\n" for name in everything) + "true"
    log = _run(harness, command, RuntimeEnv(env=variables, secrets=secrets))
    assert log == b"".join(value.encode() + b"\0" for value in everything.values())


@ROUND_TRIP
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=30), tricky)
@example('it\'s a "dir"\n with $traps `x` \\ ', "")
@example("-n", "x")
@example(" ", "x")
def test_a_command_runs_in_a_directory_of_any_name(
    harness: LocalHarness, tmp_path: Path, name: str, content: str
) -> None:
    assume(name not in (".", "..") and len(name.encode()) < 200)
    directory = tmp_path / name
    directory.mkdir(exist_ok=True)
    (directory / "file").write_bytes(content.encode())
    log = _run(
        harness, "cat file; printf '\\0%s' \"$(cd . && pwd -P; echo x)\"", RuntimeEnv(working_dir=str(directory))
    )
    assert log == content.encode() + b"\0" + os.fsencode(directory.resolve()) + b"\nx"


@ROUND_TRIP
@given(st.dictionaries(tricky, tricky, max_size=4))
@example({"": "", "\n": "\n", "key": "".join(TRAPS)})
def test_metadata_comes_back(harness: LocalHarness, metadata: dict[str, str]) -> None:
    job_id = harness.cluster.create_job("true", metadata=metadata)
    assert harness.end(job_id).metadata == metadata
    assert harness.connect().get_job(job_id).metadata == metadata


@ROUND_TRIP
@given(st.binary(max_size=200))
def test_output_comes_back(harness: LocalHarness, content: bytes) -> None:
    octal = "".join(f"\\{byte:03o}" for byte in content)
    assert _run(harness, f"printf '{octal}'") == content
