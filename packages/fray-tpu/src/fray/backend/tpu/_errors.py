"""From Google's errors to Fray's: by their code, their details, and, where those do not tell, their words.

Quota and stockout have the same code. What tells them apart is when they come (with the answer to a call, or later, in
the operation or the request that failed) and what they say; the words are always quoted.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    FrayError,
    InvalidAcceleratorError,
    InvalidValueError,
    ProvisioningError,
    ProvisioningTimeoutError,
    QuotaExceededError,
    ReservationError,
    SliceExistsError,
    StockoutError,
)

if TYPE_CHECKING:
    from google.api_core.exceptions import GoogleAPICallError
    from google.rpc.status_pb2 import Status

__all__ = [
    "is_passing_credentials_error",
    "is_transient",
    "retry_after_seconds",
    "translate",
    "translate_credentials",
    "translate_status",
]

_LOG_IN = "run `gcloud auth application-default login`"
_NO_CAPACITY = re.compile(
    r"no more capacity|not enough (resources|capacity)|insufficient capacity|no available|out of capacity|stockout|"
    r"does not have enough resources|currently unavailable",
    re.IGNORECASE,
)
_RATE = re.compile(r"per (minute|second)|\brate ?limit|too many requests|RATE_LIMIT_EXCEEDED", re.IGNORECASE)
_RESERVATION = re.compile(r"reserv(ed|ation)", re.IGNORECASE)
_ACCELERATOR = re.compile(r"accelerator|topology|runtime|software version", re.IGNORECASE)
_ZONE = re.compile(r"\b(zone|location)s?\b(?!/[\w-]+/)", re.IGNORECASE)
_DISABLED = re.compile(r"has not been used in project|is disabled|SERVICE_DISABLED", re.IGNORECASE)
# The name ends there: what is in a project, and is missing, has the project's name before or behind its own.
_NO_PROJECT = re.compile(
    r"(?:(?<!in )(?<!of )(?<!for )\bproject(?: id)?:? *['\"]?(?:projects/)?[\w:.-]*|\bprojects/[\w:.-]+(?![\w:./-]))"
    r"['\"]? *(?:was |is |has been )?(?:not found|does not exist|invalid|deleted)"
    r"|permission denied on resource project|CONSUMER_INVALID",
    re.IGNORECASE,
)
_NO_ZONE = re.compile(
    r"\blocations?/[\w-]+(?![\w/-]).*(?:may not exist|not found|does not exist)|unknown (?:location|zone)",
    re.IGNORECASE,
)
# Credentials that no repetition makes good. That a token could not be fetched just now is none of these: grpc tells
# that as "Getting metadata from plugin failed", whatever the cause was.
_NO_TOKEN = re.compile(
    r"invalid_(?:grant|client|scope|account)|(?:unauthorized|deleted|disabled)_client|access_denied|reauthentication|"
    r"default credentials were not found|do not contain the necessary fields|"
    r"impersonated credentials|iam\.serviceAccounts\.getAccessToken|account has been deleted",
    re.IGNORECASE,
)
_PERMISSION = re.compile(r"[Pp]ermission[s]? '?([a-z]+\.[A-Za-z.]+)'?|'([a-z]+\.[a-zA-Z]+\.[a-zA-Z]+)'")


def is_transient(error: GoogleAPICallError) -> bool:
    """Whether the same call may well succeed a little later."""
    from google.api_core import exceptions

    if _NO_TOKEN.search(str(error)):
        return False
    if isinstance(error, exceptions.ResourceExhausted | exceptions.TooManyRequests):
        return _is_rate_limit(error)
    return isinstance(
        error,
        exceptions.ServiceUnavailable
        | exceptions.DeadlineExceeded
        | exceptions.InternalServerError
        | exceptions.Aborted
        | exceptions.Cancelled
        | exceptions.Unknown
        | exceptions.GatewayTimeout
        | exceptions.BadGateway
        | exceptions.RetryError,
    )


def retry_after_seconds(error: GoogleAPICallError) -> float:
    """Return how long the provider asks to wait before the next attempt; 0 where it does not say."""
    for detail in error.details or ():
        if type(detail).__name__ == "RetryInfo":
            return float(detail.retry_delay.seconds + detail.retry_delay.nanos / 1e9)
    return 0.0


def is_passing_credentials_error(error: Exception) -> bool:
    """Whether a token may well be had a little later: whoever gives them could not be reached, or was too busy."""
    from google.auth.exceptions import GoogleAuthError, TransportError

    if not isinstance(error, GoogleAuthError) or _NO_TOKEN.search(str(error)):
        return False
    return isinstance(error, TransportError) or bool(error.retryable)


def translate_credentials(error: Exception) -> FrayError:
    """Return the error for credentials that are missing or do not work any more, or cannot be used just now."""
    if is_passing_credentials_error(error):
        return ConnectionFailedError(f"Google gives no token for the credentials just now: {error}")
    remedy = _LOG_IN
    if os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
        remedy = f"correct GOOGLE_APPLICATION_CREDENTIALS, or unset it and {_LOG_IN}"
    return AuthenticationError(f"Google's credentials are missing or no longer good ({error}): {remedy}")


def translate(error: GoogleAPICallError, *, what: str, project: str, zone: str) -> FrayError:
    """Return Fray's error for the answer to a call.

    Args:
        error: As Google's client raised it.
        what: What was tried, such as `create train in us-central1-a`.
        project: In which project.
        zone: In which zone; empty where in all.
    """
    from google.api_core import exceptions

    words, text = _words(error), str(error)
    said = f"cannot {what}: Google says: {words}"
    if isinstance(error, exceptions.Unauthenticated) or _NO_TOKEN.search(text):
        return AuthenticationError(f"{said}. The credentials are missing or no longer good: {_LOG_IN}")
    reason = _reason(error)
    permission = _permission(words, error) if isinstance(error, exceptions.PermissionDenied) else None
    if isinstance(error, exceptions.PermissionDenied | exceptions.NotFound | exceptions.BadRequest):
        # The order is from what only one thing can mean to what many can.
        if reason == "SERVICE_DISABLED" or _DISABLED.search(text):
            return ProvisioningError(
                f"{said}. Enable the Cloud TPU API: `gcloud services enable tpu.googleapis.com --project {project}`"
            )
        if reason in ("CONSUMER_INVALID", "USER_PROJECT_DENIED") or _NO_PROJECT.search(text):
            return InvalidValueError(
                f"{said}. Is {project!r} the right project? `gcloud projects list` shows those that you may use; "
                "`gcloud config set project PROJECT` sets the default"
            )
        if permission is None and _is_about_the_zone(words, error):
            return InvalidValueError(
                f"{said}. Is {zone!r} a zone with TPUs? `gcloud compute tpus locations list --project {project}` "
                "shows those that there are"
            )
    if isinstance(error, exceptions.PermissionDenied):
        lacks = f"the permission {permission}" if permission else "a permission"
        doubt = ""
        if _NO_ZONE.search(words):
            doubt = f". Or {zone!r} is no zone: `gcloud compute tpus locations list --project {project}`"
        return AuthenticationError(
            f"{said}. The account lacks {lacks} in project {project}. "
            f"An administrator grants it: `gcloud projects add-iam-policy-binding {project} "
            f"--member=user:YOU --role=roles/tpu.admin`{doubt}"
        )
    if isinstance(error, exceptions.AlreadyExists):
        return SliceExistsError(said)
    if isinstance(error, exceptions.ResourceExhausted | exceptions.TooManyRequests) and not _is_rate_limit(error):
        return _exhausted(said, words, error, zone, late=False)
    # A bad request is InvalidArgument, FailedPrecondition or OutOfRange.
    if isinstance(error, exceptions.BadRequest | exceptions.NotFound):
        return _refused(said, words, zone, project, error)
    if is_transient(error):
        return ConnectionFailedError(f"{said} ({type(error).__name__})")
    return ProvisioningError(f"{said} ({type(error).__name__})")


def translate_status(status: Status, *, what: str, project: str, zone: str) -> FrayError:
    """Return Fray's error for what failed after it had been accepted: an operation, or a queued request."""
    from google.api_core import exceptions

    said = status.message or "no reason given"
    error: GoogleAPICallError = exceptions.from_grpc_status(status.code, said)  # type: ignore[no-untyped-call]
    if isinstance(error, exceptions.ResourceExhausted):
        said = f"cannot {what}: Google says: {_words(error)}"
        return _exhausted(said, _words(error), error, zone, late=True)
    if isinstance(error, exceptions.DeadlineExceeded):
        # The request's own time ran out, which says that there was nothing to grant.
        return ProvisioningTimeoutError(f"cannot {what}: there was no capacity in the time given: {_words(error)}")
    translated = translate(error, what=what, project=project, zone=zone)
    if isinstance(translated, ConnectionFailedError):
        # The connection is well: it brought this answer.
        return ProvisioningError(str(translated))
    return translated


def _exhausted(said: str, words: str, error: GoogleAPICallError, zone: str, *, late: bool) -> FrayError:
    if _RESERVATION.search(words) and not re.search(r"quota", words, re.IGNORECASE):
        return ReservationError(f"{said}. Ask for fewer slices, or look at what the reservation has left")
    if _NO_CAPACITY.search(words):
        return StockoutError(f"{said}. Another zone or tier may have some now, and {zone} later")
    if late and not re.search(r"quota|limit", words, re.IGNORECASE):
        return StockoutError(f"{said}. Another zone or tier may have some now, and {zone} later")
    quota, limit, region = _quota(words, error)
    return QuotaExceededError(
        f"{said}. Slices that were preempted or failed hold quota until they are deleted: `fray tpu list`. To ask for "
        "more: https://console.cloud.google.com/iam-admin/quotas",
        quota=quota,
        limit=limit,
        region=region or zone or None,
    )


def _refused(said: str, words: str, zone: str, project: str, error: GoogleAPICallError) -> FrayError:
    from google.api_core import exceptions

    if _RESERVATION.search(words):
        return ReservationError(
            f"{said}. `gcloud alpha compute tpus reservations list --zone {zone}` shows those there are"
        )
    if _ACCELERATOR.search(words):
        return InvalidAcceleratorError(
            f"{said}. What {zone} has: `gcloud compute tpus accelerator-types list --zone {zone} --project {project}` "
            f"and `gcloud compute tpus tpu-vm versions list --zone {zone} --project {project}`"
        )
    if isinstance(error, exceptions.InvalidArgument):
        return InvalidValueError(said)
    return ProvisioningError(said)


def _is_about_the_zone(words: str, error: GoogleAPICallError) -> bool:
    """Whether it is the zone that is not there, and not something in it.

    A permission that is lacking is told in the same words; it has to have been looked for before.
    """
    from google.api_core import exceptions

    if isinstance(error, exceptions.PermissionDenied):
        return bool(_NO_ZONE.search(words))
    if _ACCELERATOR.search(words) or _RESERVATION.search(words):
        return False
    return bool((_ZONE if isinstance(error, exceptions.NotFound) else _NO_ZONE).search(words))


def _permission(words: str, error: GoogleAPICallError) -> str | None:
    """Return which permission is lacking, as far as the answer says so."""
    if named := _metadata(error).get("permission"):
        return str(named)
    found = _PERMISSION.search(words)
    return (found[1] or found[2]) if found else None


def _quota(words: str, error: GoogleAPICallError) -> tuple[str | None, float | None, str | None]:
    """Return which quota, its limit, and where, as far as the answer says so."""
    metadata = _metadata(error)
    name = metadata.get("quota_limit") or metadata.get("quota_metric")
    limit = metadata.get("quota_limit_value")
    region = metadata.get("quota_location") or metadata.get("region")
    if not name and (found := re.search(r"[Qq]uota (?:limit |metric )?'([^']+)'", words)):
        name = found[1]
    if not limit and (found := re.search(r"[Ll]imit:? ([\d.]+)", words)):
        limit = found[1].rstrip(".")
    if not region and (found := re.search(r"in (?:region|zone|location) ([a-z]+-[a-z]+\d+(?:-[a-z])?)", words)):
        region = found[1]
    return name, float(limit) if limit else None, region


def _is_rate_limit(error: GoogleAPICallError) -> bool:
    """Whether calls came too fast: that has the code of a quota, and passes by itself."""
    return _reason(error) == "RATE_LIMIT_EXCEEDED" or bool(_RATE.search(_words(error)))


def _words(error: GoogleAPICallError) -> str:
    return str(error.message or error).strip().rstrip(".")


def _reason(error: GoogleAPICallError) -> str:
    return str(error.reason or "")


def _metadata(error: GoogleAPICallError) -> dict[str, Any]:
    return dict(error.metadata or {}) if error.reason else {}
