"""What was measured, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from benchmarks.measuring import Comparison, Unit
from benchmarks.peers import peer_versions

__all__ = ["as_document", "machine_facts", "print_table", "save"]

_HEADINGS = ("row", "what", "Fray", "against", "", "ratio or difference [95 %]", "bar", "verdict")


def machine_facts() -> dict[str, object]:
    """Return what the numbers depend on and a reader may want to know. Nothing here names the machine."""
    facts: dict[str, object] = {
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }
    if hasattr(os, "sysconf"):
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts


def as_document(
    comparisons: Sequence[Comparison],
    machine: Mapping[str, object],
    settings: Mapping[str, object],
    took: Mapping[str, float],
) -> dict[str, object]:
    """Return all of it as what JSON can hold."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "took_seconds": dict(took),
        "versions": {"fray-core": version("fray-core"), "uv": version("uv"), **peer_versions()},
        "machine": dict(machine),
        "settings": dict(settings),
        "comparisons": [{**asdict(each), "verdict": each.verdict} for each in comparisons],
    }


def save(document: Mapping[str, object], path: Path) -> None:
    """Write the JSON in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(document, indent=1) + "\n")
    os.replace(temporary, path)


def print_table(comparisons: Sequence[Comparison], machine: Mapping[str, object]) -> None:
    """Print what was measured: in colour on a terminal, else plain."""
    print(
        f"{machine['cpus']} CPUs, {machine['system']} {machine['kernel']}, Python {machine['python']}, "
        f"load average {machine['load_average']} at the start\n"
    )
    rows = [_cells(each) for each in comparisons]
    if sys.stdout.isatty():
        _print_rich(rows)
    else:
        _print_plain(rows)
    notes = [f"{each.row}: {each.note}" for each in comparisons if each.note]
    if notes:
        print("\n" + "\n".join(notes))


def _print_plain(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in [_HEADINGS, *rows]) for column in range(len(_HEADINGS))]
    for row in [_HEADINGS, tuple("-" * width for width in widths), *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_rich(rows: Sequence[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        _print_plain(rows)
        return
    table = Table(box=None, pad_edge=False)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        colour = {"met": "green", "MIS": "red", "not": "yellow"}.get(row[-1][:3], "")
        table.add_row(*row[:-1], f"[{colour}]{row[-1]}[/]" if colour else row[-1])
    Console().print(table)


def _cells(each: Comparison) -> tuple[str, ...]:
    unit: Unit | str = "ratio" if each.kind == "ratio" else each.unit
    result = ""
    if each.value is not None:
        result = _amount(each.value, unit, signed=each.kind == "difference")
        if each.low is not None and each.high is not None:
            result += f" [{_bare_amount(each.low, unit)}, {_bare_amount(each.high, unit)}]"
    return (
        each.row,
        each.what,
        _amount(each.fray, each.unit),
        each.against,
        _amount(each.other, each.unit),
        result,
        "" if each.bar is None else f"≤ {_amount(each.bar, unit)}",
        each.verdict,
    )


def _amount(value: float | None, unit: str, *, signed: bool = False) -> str:
    if value is None:
        return ""
    word = {"s": " ms", "bytes": " MiB", "ratio": " \N{MULTIPLICATION SIGN}"}.get(unit, "")
    return ("+" if signed and value > 0 else "") + _bare_amount(value, unit) + word


def _bare_amount(value: float, unit: str) -> str:
    match unit:
        case "s":
            return f"{1e3 * value:,.1f}"
        case "bytes":
            return f"{value / (1 << 20):.1f}"
        case "count":
            return f"{value:.0f}"
        case _:
            return f"{value:.2f}"
