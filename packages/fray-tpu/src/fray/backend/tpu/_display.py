"""How `fray tpu` shows slices: as rows, as fields, and as plain values for JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fray.backend.tpu._prices import AS_OF, SOURCE, Cost, cost_per_hour, cost_so_far
from fray.backend.tpu.types import Progress, SliceGroup, SliceRequest, SliceState, Tier
from fray.cli._output import duration_text, is_terminal, print_fields, print_table, say, time_text
from fray.tpu import TpuType, tpu_type

if TYPE_CHECKING:
    from fray.backend.tpu.interface import Doomed, GcReport

__all__ = [
    "WaitDisplay",
    "cost_as_plain",
    "doomed_as_plain",
    "gc_as_plain",
    "group_as_plain",
    "group_cost",
    "group_cost_so_far",
    "print_doomed",
    "print_group",
    "print_groups",
    "print_request",
    "print_types",
    "request_as_plain",
    "type_as_plain",
]


def group_cost(group: SliceGroup) -> Cost:
    """Return what a group costs an hour, once it is ready."""
    return cost_per_hour(group.accelerator_type, group.zone, group.tier, group.num_slices)


def group_cost_so_far(group: SliceGroup) -> Cost:
    """Return what a group has cost until now, at most: Google bills from READY on, a little after the making."""
    per_hour = cost_per_hour(group.accelerator_type, group.zone, group.tier)
    if per_hour.dollars is None:
        return per_hour
    now = time.time()
    return cost_so_far(per_hour, sum(now - one.created.timestamp() for one in group.slices if one.created is not None))


def print_groups(groups: Sequence[SliceGroup], *, with_owner: bool) -> None:
    """Print one line for each group."""
    relative = _on_terminal()
    owner = ["OWNER"] if with_owner else []
    print_table(
        ["NAME", "STATE", "TYPE", "SLICES", "ZONE", "TIER", *owner, "LEASE ENDS", "PER HOUR", "SO FAR", "MESSAGE"],
        [
            (
                group.name,
                str(group.state),
                group.accelerator_type,
                str(group.num_slices),
                group.zone,
                str(group.tier or "unknown"),
                *([group.lease.owner if group.lease else ""] if with_owner else []),
                _lease_end(group, relative=relative),
                str(group_cost(group)),
                str(group_cost_so_far(group)),
                group.message,
            )
            for group in groups
        ],
    )


def print_group(group: SliceGroup) -> None:
    """Print all that is known of a group."""
    per_hour = group_cost(group)
    so_far = group_cost_so_far(group)
    kind = tpu_type(group.accelerator_type)
    lease = group.lease
    hosts = []
    rank = 0
    for one in group.slices:
        for host in one.hosts:
            where = host.internal_ip + (f" ({host.external_ip})" if host.external_ip else "")
            hosts.append((f"Host {rank}", f"{one.name} worker {host.worker_id} at {where}"))
            rank += 1
    print_fields(
        [
            ("Name", group.name),
            ("State", str(group.state)),
            ("Message", group.message),
            ("Type", f"{group.accelerator_type}: {kind.chips} chips on {_count(kind.hosts, 'host')}"),
            ("Slices", str(group.num_slices)),
            ("Zone", group.zone),
            ("Project", group.project),
            ("Tier", str(group.tier or "unknown")),
            ("Runtime", group.runtime_version),
            ("Owner", lease.owner if lease else ""),
            ("Purpose", lease.purpose if lease else ""),
            ("Lease ends", _lease_end(group, relative=False)),
            ("Created", time_text(group.created.timestamp() if group.created else None)),
            ("Per hour", f"{per_hour} ({per_hour.note})"),
            ("So far", str(so_far) + (", at most" if so_far.dollars is not None else "")),
            *((f"Slice {number}", _slice_text(one)) for number, one in enumerate(group.slices)),
            *hosts,
        ]
    )


def group_as_plain(group: SliceGroup) -> dict[str, Any]:
    """Return a group ready for JSON: times are seconds since the epoch."""
    plain: dict[str, Any] = _plain(asdict(group))
    plain["cost_per_hour"] = cost_as_plain(group_cost(group))
    plain["cost_so_far"] = cost_as_plain(group_cost_so_far(group))
    return plain


def cost_as_plain(cost: Cost) -> dict[str, Any]:
    """Return an amount ready for JSON: null where it is not known, and why."""
    return {"dollars": cost.dollars, "note": cost.note}


def print_request(request: SliceRequest) -> None:
    """Print what would be asked for, choice by choice, with its price."""
    print_table(
        ("TYPE", "ZONE", "TIER", "SLICES", "CHIPS", "HOSTS", "RUNTIME", "PER HOUR", "NOTE"),
        [
            (
                choice.accelerator_type,
                choice.zone,
                str(choice.tier),
                str(request.num_slices),
                str(tpu_type(choice.accelerator_type).chips * request.num_slices),
                str(choice.hosts * request.num_slices),
                choice.runtime_version,
                str(cost := cost_per_hour(choice.accelerator_type, choice.zone, choice.tier, request.num_slices)),
                cost.note,
            )
            for choice in request.choices
        ],
    )


def request_as_plain(request: SliceRequest) -> dict[str, Any]:
    """Return a request ready for JSON, each choice with its price."""
    plain: dict[str, Any] = _plain(asdict(request))
    for choice, shown in zip(request.choices, plain["choices"], strict=True):
        cost = cost_per_hour(choice.accelerator_type, choice.zone, choice.tier, request.num_slices)
        shown["cost_per_hour"] = cost_as_plain(cost)
    return plain


def print_types(kinds: Iterable[TpuType], region: str) -> None:
    """Print the catalogue, with what an hour costs on demand."""
    print_table(
        ("TYPE", "GENERATION", "CHIPS", "HOSTS", "CHIPS/HOST", "PER HOUR", "RUNTIME"),
        [
            (
                kind.name,
                kind.generation,
                str(kind.chips),
                str(kind.hosts),
                str(kind.chips_per_host),
                str(cost_per_hour(kind.name, region)),
                kind.runtime_version or "not through this API",
            )
            for kind in kinds
        ],
    )
    if _on_terminal():
        say(f"on demand in {region}, by Google's list prices as of {AS_OF} ({SOURCE})")


def type_as_plain(kind: TpuType, region: str) -> dict[str, Any]:
    """Return a type of the catalogue ready for JSON."""
    return {**asdict(kind), "region": region, "cost_per_hour": cost_as_plain(cost_per_hour(kind.name, region))}


def print_doomed(doomed: Sequence[Doomed], *, with_owner: bool) -> None:
    """Print what `gc` would delete."""
    owner = ["OWNER"] if with_owner else []
    print_table(
        ["NAME", "ZONE", "STATE", *owner, "PER HOUR", "REASON"],
        [
            (
                one.name,
                ", ".join(one.zones),
                str(one.group.state) if one.group else "",
                *([one.owner] if with_owner else []),
                str(group_cost(one.group)) if one.group else "",
                one.reason,
            )
            for one in doomed
        ],
    )


def doomed_as_plain(one: Doomed) -> dict[str, Any]:
    """Return what `gc` would delete ready for JSON."""
    return {
        "name": one.name,
        "reason": one.reason,
        "owner": one.owner,
        "zones": list(one.zones),
        "group": group_as_plain(one.group) if one.group else None,
    }


class WaitDisplay:
    """Says what is waited for, and since when: a spinner on a terminal, else a line for each change."""

    def __init__(self) -> None:
        self._spinner: Any = None
        self._said = ""

    def __enter__(self) -> WaitDisplay:
        if is_terminal(sys.stderr):
            from rich.console import Console

            self._spinner = Console(stderr=True).status("asking")
            self._spinner.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def __call__(self, progress: Progress) -> None:
        """Show where a request stands."""
        text = f"{progress.name} {progress.state}: waiting for {progress.waiting_for}"
        if progress.message:
            text += f" ({progress.message})"
        if self._spinner is not None:
            from rich.text import Text

            waited = duration_text(time.time() - progress.since.timestamp())
            left = duration_text(progress.deadline.timestamp() - time.time())
            self._spinner.update(Text(f"{text}, for {waited}, at most {left} more"))
        elif text != self._said:
            self._said = text
            say(text)

    def stop(self) -> None:
        """Make way for other output."""
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


def gc_as_plain(report: GcReport) -> dict[str, Any]:
    """Return what `gc` did ready for JSON."""
    return {
        "deleted": [one.name for one in report.deleted],
        "spared": [one.name for one in report.spared],
        "failed": [{"name": one.name, "reason": reason} for one, reason in report.failed],
    }


def _slice_text(one: Any) -> str:
    text = f"{one.name} {one.state}"
    return f"{text}: {one.message}" if one.message else text


def _lease_end(group: SliceGroup, *, relative: bool) -> str:
    until = group.lease.until if group.lease else None
    if until is None:
        return "unknown"
    if not relative:
        return time_text(until.timestamp())
    left = (until - datetime.now(UTC)).total_seconds()
    return f"in {duration_text(left)}" if left > 0 else f"{duration_text(-left)} ago"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, datetime):
        return value.timestamp()
    return str(value) if isinstance(value, SliceState | Tier) else value


def _on_terminal() -> bool:
    return is_terminal(sys.stdout)
