"""Every error that a user of Fray can meet, sorted by who is to blame.

```
FrayError
├── UsageError                      the caller's: change the call
│   ├── InvalidTypeError (TypeError)
│   ├── InvalidValueError (ValueError)
│   ├── BackendNotFoundError        no such backend or cluster name
│   ├── BackendLoadError            a backend is installed and cannot be imported
│   ├── BackendConflictError        two distributions claim one name
│   ├── JobNotFoundError (LookupError)
│   ├── JobExistsError
│   ├── JobNotFinishedError         purge of a running job
│   ├── SliceNotFoundError (LookupError)
│   ├── SliceExistsError
│   └── UnsupportedError (NotImplementedError)
├── JobFailedError                  the job's: read its logs
├── HostFailedError                 the function's that run_on_tpu ran: it crashed or hung
├── WaitTimeoutError (TimeoutError) nobody's: the caller stopped waiting, the job goes on
└── PlatformError                   the engine's: retry, or mend the engine
    ├── ConnectionFailedError (ConnectionError)
    ├── AuthenticationError (PermissionError)
    ├── SubmissionError
    ├── ImageBuildError
    └── ProvisioningError
        ├── QuotaExceededError
        ├── StockoutError
        ├── InvalidAcceleratorError
        ├── ReservationError
        ├── PreemptedError
        ├── ProvisioningTimeoutError (TimeoutError)
        └── DeletionFailedError     may still be billed: look
```

A message says what failed, on what, why (quoting the engine's own words) and what to do next. Imports nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from fray.types import JobInfo

__all__ = [
    "AuthenticationError",
    "BackendConflictError",
    "BackendLoadError",
    "BackendNotFoundError",
    "ConnectionFailedError",
    "DeletionFailedError",
    "FrayError",
    "HostFailedError",
    "ImageBuildError",
    "InvalidAcceleratorError",
    "InvalidTypeError",
    "InvalidValueError",
    "JobExistsError",
    "JobFailedError",
    "JobNotFinishedError",
    "JobNotFoundError",
    "PlatformError",
    "PreemptedError",
    "ProvisioningError",
    "ProvisioningTimeoutError",
    "QuotaExceededError",
    "ReservationError",
    "SliceExistsError",
    "SliceNotFoundError",
    "StockoutError",
    "SubmissionError",
    "UnsupportedError",
    "UsageError",
    "WaitTimeoutError",
]


class FrayError(Exception):
    """Base of every error that Fray raises on purpose."""


class UsageError(FrayError):
    """The call cannot be right as it stands. Nothing was done."""


class InvalidTypeError(UsageError, TypeError):
    """An argument is of the wrong type."""


class InvalidValueError(UsageError, ValueError):
    """An argument is of the right type and has a value that cannot be."""


class BackendNotFoundError(UsageError):
    """No installed backend and no configured cluster has this name."""


class BackendLoadError(UsageError):
    """A backend's distribution is installed and its module cannot be imported."""


class BackendConflictError(UsageError):
    """Two installed distributions register the same name."""


class JobNotFoundError(UsageError, LookupError):
    """The cluster knows no job of this id."""


class JobExistsError(UsageError):
    """The cluster already has a job of this id."""


class JobNotFinishedError(UsageError):
    """Only a finished job can be purged."""


class SliceNotFoundError(UsageError, LookupError):
    """There are no slices of this name."""


class SliceExistsError(UsageError):
    """There are slices of this name already."""


class UnsupportedError(UsageError, NotImplementedError):
    """This backend does not have the option, the resource or the combination that was asked for."""


class JobFailedError(FrayError):
    """A job that was waited for with `check=True` did not succeed.

    Attributes:
        info: The job's final record.
    """

    def __init__(self, info: JobInfo) -> None:
        self.info = info
        code = "" if info.exit_code is None else f", exit code {info.exit_code}"
        why = f": {info.message}" if info.message else ""
        super().__init__(
            f"job {info.id} ended {info.status} ({info.reason}{code}){why}; its output: `fray logs {info.id}`"
        )

    def __reduce__(self) -> tuple[type[JobFailedError], tuple[JobInfo]]:
        return (type(self), (self.info,))


class HostFailedError(FrayError):
    """A host's process died or hung under `run_on_tpu`, without an exception of the function's own."""


class WaitTimeoutError(FrayError, TimeoutError):
    """The wait was over before the job was. The job goes on."""


class PlatformError(FrayError):
    """The engine (or the machine below it) failed, not the call and not the job."""


class ConnectionFailedError(PlatformError, ConnectionError):
    """The engine cannot be reached."""


class AuthenticationError(PlatformError, PermissionError):
    """The engine refuses the caller's credentials."""


class SubmissionError(PlatformError):
    """The engine did not accept the job."""


class ImageBuildError(PlatformError):
    """A container image could not be built."""


class ProvisioningError(PlatformError):
    """Machines could not be had, or kept."""


class QuotaExceededError(ProvisioningError):
    """The project's quota does not allow the request.

    Attributes:
        quota: Which, as the provider names it; None where it did not say.
        limit: How much is allowed; None where it did not say.
        region: Where; None where it did not say.
    """

    def __init__(
        self, message: str = "", *, quota: str | None = None, limit: float | None = None, region: str | None = None
    ) -> None:
        super().__init__(message)
        self.quota = quota
        self.limit = limit
        self.region = region


class StockoutError(ProvisioningError):
    """The provider has no capacity for the request now."""


class InvalidAcceleratorError(ProvisioningError):
    """The provider does not know the accelerator type or runtime version there."""


class ReservationError(ProvisioningError):
    """The reservation cannot hold the request."""


class PreemptedError(ProvisioningError):
    """The provider took the machines back more often than the caller allows."""


class ProvisioningTimeoutError(ProvisioningError, TimeoutError):
    """Machines did not come, or were not ready, in the time that was given them. They were given up."""


class DeletionFailedError(ProvisioningError):
    """Machines could not be deleted, or are not seen to be gone. They may still be billed."""
