"""The error tree: its shape, what Python's own classes its members are, and that they cross process borders."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from fray import errors
from fray.types import Attempt, JobInfo, JobStatus, TerminationReason

# The design's tree: each class, its parent, and the Python class by which code that knows nothing of Fray catches it.
TREE: dict[str, tuple[str, type[Exception] | None]] = {
    "FrayError": ("Exception", None),
    "UsageError": ("FrayError", None),
    "InvalidTypeError": ("UsageError", TypeError),
    "InvalidValueError": ("UsageError", ValueError),
    "BackendNotFoundError": ("UsageError", None),
    "BackendLoadError": ("UsageError", None),
    "BackendConflictError": ("UsageError", None),
    "JobNotFoundError": ("UsageError", LookupError),
    "JobExistsError": ("UsageError", None),
    "JobNotFinishedError": ("UsageError", None),
    "SliceNotFoundError": ("UsageError", LookupError),
    "SliceExistsError": ("UsageError", None),
    "UnsupportedError": ("UsageError", NotImplementedError),
    "JobFailedError": ("FrayError", None),
    "HostFailedError": ("FrayError", None),
    "WaitTimeoutError": ("FrayError", TimeoutError),
    "PlatformError": ("FrayError", None),
    "ConnectionFailedError": ("PlatformError", ConnectionError),
    "AuthenticationError": ("PlatformError", PermissionError),
    "SubmissionError": ("PlatformError", None),
    "ImageBuildError": ("PlatformError", None),
    "ProvisioningError": ("PlatformError", None),
    "QuotaExceededError": ("ProvisioningError", None),
    "StockoutError": ("ProvisioningError", None),
    "InvalidAcceleratorError": ("ProvisioningError", None),
    "ReservationError": ("ProvisioningError", None),
    "PreemptedError": ("ProvisioningError", None),
    "ProvisioningTimeoutError": ("ProvisioningError", TimeoutError),
    "DeletionFailedError": ("ProvisioningError", None),
}

FAILED = JobInfo(
    "job-1",
    JobStatus.FAILED,
    1.0,
    2.0,
    3.0,
    exit_code=3,
    reason=TerminationReason.EXITED,
    message="the command exited with 3",
    entrypoint="exit 3",
    metadata={"git": "abc"},
    owner="me@here",
    attempts=(Attempt(1, 2.0, 3.0, 3, TerminationReason.EXITED),),
)

PLAIN = [name for name in TREE if name != "JobFailedError"]


def test_the_tree_is_the_designs() -> None:
    defined = {
        name: (kind.__bases__[0].__name__, kind.__bases__[1] if len(kind.__bases__) == 2 else None)
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and kind.__module__ == errors.__name__
    }
    assert defined == TREE
    assert max(len(getattr(errors, name).__bases__) for name in TREE) == 2


def test_all_of_it_is_public() -> None:
    assert errors.__all__ == sorted(TREE)


def test_the_modules_drawing_is_the_tree() -> None:
    drawn: dict[str, tuple[str, str | None]] = {}
    above = ["Exception", "FrayError"]
    for indent, name, python in re.findall(r"^((?:│   |    )*)[├└]── (\w+)(?: \((\w+)\))?", errors.__doc__ or "", re.M):
        depth = len(indent) // 4 + 1
        drawn[name] = (above[depth], python or None)
        above[depth + 1 :] = [name]
    tree = {name: (parent, python.__name__ if python else None) for name, (parent, python) in TREE.items()}
    assert drawn == {name: place for name, place in tree.items() if name != "FrayError"}


@pytest.mark.parametrize("name", PLAIN)
def test_an_error_keeps_its_message_across_processes(name: str) -> None:
    error = getattr(errors, name)("job 'x': the engine said \"no\"\nand more")
    for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(twin) is type(error)
        assert str(twin) == str(error) == "job 'x': the engine said \"no\"\nand more"
        assert twin.args == error.args


@pytest.mark.parametrize("name", PLAIN)
def test_a_message_is_all_that_an_operating_system_error_has(name: str) -> None:
    error = getattr(errors, name)("words")
    if isinstance(error, OSError):
        assert (error.errno, error.strerror, error.filename) == (None, None, None)


def test_a_failed_job_brings_its_record_along() -> None:
    error = errors.JobFailedError(FAILED)
    twin = pickle.loads(pickle.dumps(error))
    assert twin.info == FAILED
    assert str(twin) == str(error)


def test_a_failed_job_is_said_in_one_message() -> None:
    assert str(errors.JobFailedError(FAILED)) == (
        "job job-1 ended FAILED (EXITED, exit code 3): the command exited with 3; its output: `fray logs job-1`"
    )
    never_ran = JobInfo("job-2", JobStatus.STOPPED, 1.0, reason=TerminationReason.STOPPED_BY_USER)
    assert str(errors.JobFailedError(never_ran)) == (
        "job job-2 ended STOPPED (STOPPED_BY_USER); its output: `fray logs job-2`"
    )


def test_blame_decides_the_branch() -> None:
    for branch in (errors.UsageError, errors.JobFailedError, errors.WaitTimeoutError, errors.PlatformError):
        others = {errors.UsageError, errors.JobFailedError, errors.WaitTimeoutError, errors.PlatformError} - {branch}
        assert not issubclass(branch, tuple(others))
