"""The labels that say whose a slice is, what for, and until when: the only place that knows their names and form.

A label's value has at most 63 lower-case letters, digits, hyphens and underscores.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime

from fray.backend.tpu.types import Lease

__all__ = [
    "CHOICE",
    "GROUP",
    "INTENT",
    "LEASE_UNTIL",
    "MANAGED_BY",
    "MANAGED_BY_FRAY",
    "OWNER",
    "PURPOSE",
    "is_ours",
    "label_value",
    "lease_of",
    "lease_value",
    "parse_lease",
]

MANAGED_BY, MANAGED_BY_FRAY = "fray-managed-by", "fray-tpu"
OWNER = "fray-owner"
PURPOSE = "fray-purpose"
LEASE_UNTIL = "fray-lease-until"
# The name that was asked for; the queued resource's own may have the number of a choice behind it.
GROUP = "fray-group"
CHOICE = "fray-choice"
# Which request made it: two that have the same name, one after the other, differ in this.
INTENT = "fray-intent"

_SAFE = re.compile(r"[a-z0-9_-]{1,63}")
_LEASE_FORM = "%Y%m%dt%H%M%Sz"


def label_value(text: str) -> str:
    """Return the label value that stands for a text, another one for every other text.

    One that is no label value as it stands gets a digest behind what is left of it.
    """
    if not text or _SAFE.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return f"{re.sub('[^a-z0-9_-]+', '-', text.lower()).strip('-')[:50]}-{digest}"


def lease_value(until: datetime) -> str:
    """Return the label value of a lease's end, to the second, such as `20260301t120000z`."""
    return until.astimezone(UTC).strftime(_LEASE_FORM)


def parse_lease(value: str) -> datetime | None:
    """Return when a lease ends; None where the value says nothing that can be read."""
    try:
        return datetime.strptime(value, _LEASE_FORM).replace(tzinfo=UTC)
    except ValueError:
        return None


def is_ours(labels: Mapping[str, str]) -> bool:
    """Whether Fray made what has these labels."""
    return labels.get(MANAGED_BY) == MANAGED_BY_FRAY


def lease_of(labels: Mapping[str, str]) -> Lease | None:
    """Return the lease that labels say; None where Fray did not make what has them."""
    if not is_ours(labels):
        return None
    return Lease(labels.get(OWNER, ""), labels.get(PURPOSE, ""), parse_lease(labels.get(LEASE_UNTIL, "")))
