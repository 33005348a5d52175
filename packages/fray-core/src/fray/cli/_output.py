"""What the command prints: bytes, lines, tables, JSON. Nothing that comes from a job is read as markup.

Writes go to the descriptors, unbuffered: a thread that is left behind at the exit can then hold no lock of a buffer.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from typing import Any, TextIO

from fray.types import JobInfo

__all__ = [
    "OutputClosedError",
    "Row",
    "discard_output",
    "duration_text",
    "end_text",
    "is_terminal",
    "job_as_plain",
    "one_line",
    "print_fields",
    "print_json",
    "print_lines",
    "print_table",
    "say",
    "time_text",
    "without_password",
    "write_error",
    "write_out",
]

Row = Sequence[str]

_STATUS_STYLES = {"PENDING": "yellow", "RUNNING": "cyan", "SUCCEEDED": "green", "FAILED": "red", "STOPPED": "magenta"}


class OutputClosedError(Exception):
    """Nobody reads standard output any more, as under `fray logs ID | head`."""


def is_terminal(stream: TextIO) -> bool:
    """Whether a person looks at this stream, on something that can do more than print."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def write_out(content: bytes) -> None:
    """Write to standard output, at once.

    Raises:
        OutputClosedError: Its reader has gone.
    """
    try:
        _write(1, content)
    except BrokenPipeError:
        raise OutputClosedError from None


def write_error(content: bytes) -> None:
    """Write to standard error, at once; a reader who has gone is not missed."""
    with suppress(BrokenPipeError):  # what is said about the work is no part of it
        _write(2, content)


def discard_output() -> None:
    """Let whatever is written to standard output from now on go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def say(message: str) -> None:
    """Tell the user something on standard error, behind `fray: `; further lines are indented."""
    first, *more = _printable(message).splitlines() or [""]
    write_error("\n  ".join([f"fray: {first}", *more]).encode(errors="backslashreplace") + b"\n")


def print_lines(lines: Iterable[str]) -> None:
    """Print lines on standard output."""
    write_out("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))


def print_json(value: Any) -> None:
    """Print a JSON document on standard output."""
    import json

    print_lines([json.dumps(value, indent=2, default=str)])


def print_table(header: Row, rows: Iterable[Row]) -> None:
    """Print a table: drawn for the terminal's width, or as aligned lines that nothing is cut from.

    The latter in a pipe, and where the terminal is too narrow for all but the last column.
    """
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    fixed = sum(widths[:-1]) + 2 * (len(widths) - 1) + len(header[-1])
    if is_terminal(sys.stdout) and fixed <= _terminal_width():
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in header[:-1]:
            table.add_column(title, no_wrap=True)
        # Only a column that may wrap gives way, and its texts are cut instead: an id that is cut is good for nothing.
        table.add_column(header[-1])
        for row in rows:
            cells = [Text(cell, _STATUS_STYLES.get(cell, "")) for cell in row]
            cells[-1].no_wrap, cells[-1].overflow = True, "ellipsis"
            table.add_row(*cells)
        _print_rich(table)
        return
    print_lines(
        "  ".join((cell or "-").ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one to a line; the further lines of a value are indented below its first."""
    fields = list(fields)
    width = max(len(name) for name, _ in fields) + 2
    shown = [(name, _printable(value).splitlines() or [""]) for name, value in fields]
    if is_terminal(sys.stdout):
        from rich.text import Text

        text = Text()
        for name, lines in shown:
            text.append(f"{name + ':':<{width}}", style="bold")
            text.append(f"\n{'':<{width}}".join(lines) + "\n", style=_STATUS_STYLES.get(lines[0], ""))
        text.rstrip()
        _print_rich(text)
        return
    print_lines(f"{name + ':':<{width}}" + f"\n{'':<{width}}".join(lines) for name, lines in shown)


def job_as_plain(info: JobInfo) -> dict[str, Any]:
    """Return a job's record ready for JSON."""
    return asdict(info)


def end_text(info: JobInfo) -> str:
    """Say in one line how a job ended, or where it stands."""
    why = [str(info.reason)] if info.reason else []
    if info.exit_code is not None:
        why.append(f"exit code {info.exit_code}")
    end = f"{info.id} {info.status}"
    if why:
        end += f" ({', '.join(why)})"
    if info.end_time is not None:
        end += f" after {duration_text(info.end_time - (info.start_time or info.submission_time))}"
    return f"{end}: {info.message}" if info.message else end


def one_line(text: str) -> str:
    """Return text that stays on its line, whatever a job was called: no newline, no control sequence."""
    return _printable(" ".join(text.split()))


def duration_text(seconds: float) -> str:
    """Return a duration as a person says it: `0.4s`, `12s`, `3m05s`, `2h03m`, `4d01h`."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    for unit, smaller, size, per in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // per:02d}{smaller}"
    return f"{whole}s"


def time_text(moment: float | None, *, relative: bool = False) -> str:
    """Return a moment in local time with its offset, or how long ago it was; nothing for None."""
    if moment is None:
        return ""
    if relative:
        return f"{duration_text(time.time() - moment)} ago"
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")


def without_password(address: str) -> str:
    """Return an address with the user and password of its URL masked."""
    import re

    return re.sub(r"://[^/@\s]+@", "://***@", address)


def _printable(text: str) -> str:
    """Return text with every control character but newlines and tabs written out: no message moves the cursor."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in "\n\t" else each.encode("unicode_escape").decode() for each in text
    )


def _terminal_width() -> int:
    from rich.console import Console

    return Console().width


def _print_rich(what: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(what)
    write_out(captured.get().encode(errors="backslashreplace"))


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
