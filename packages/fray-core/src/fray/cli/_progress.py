"""Says on standard error where a job stands while somebody waits for it."""

from __future__ import annotations

import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fray.cli._output import is_terminal, one_line, say, write_error
from fray.cluster import ClusterContext
from fray.types import JobInfo, JobStatus

if TYPE_CHECKING:
    from rich.status import Status

__all__ = ["Progress", "watch"]

_FIRST_LOOK_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0


class Progress:
    """A spinner on a terminal as long as the job has printed nothing; else a line for each thing that changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spinner: Status | None = None
        self._spins = is_terminal(sys.stderr)
        self._at_line_start = True
        self._last: JobInfo | None = None
        self._said = ""
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._closed = True
            self._stop_spinner()

    def show(self, info: JobInfo) -> None:
        """Show where the job stands, if that is news."""
        with self._lock:
            if self._closed or info.status.is_terminal:
                return
            last, self._last = self._last, info
            text = f"{info.id} {info.status}" + (f": {info.message}" if info.message else "")
            if info.status is JobStatus.PENDING and self._spins:
                self._spin(text)
                return
            self._stop_spinner()
            # A running job's message, such as the wait before a retry, counts once it holds: what passes by between
            # two looks is no news.
            holds = info.status is JobStatus.PENDING or (last is not None and last.message == info.message)
            if info.message and holds and text != self._said:
                self._said = text
                self._say(text)

    def say(self, message: str) -> None:
        """Tell the user something, below what the job has printed so far."""
        with self._lock:
            if not self._closed:
                self._stop_spinner()
                self._say(message)

    def before_output(self, content: bytes) -> None:
        """Make way for output of the job's, which is about to be written."""
        with self._lock:
            self._spins = False
            self._stop_spinner()
            self._at_line_start = content.endswith(b"\n")

    def _say(self, message: str) -> None:
        if not self._at_line_start and _share_a_screen():
            write_error(b"\n")
        self._at_line_start = True
        say(message)

    def _spin(self, text: str) -> None:
        from rich.text import Text

        if self._spinner is None:
            from rich.console import Console

            self._spinner = Console(stderr=True).status(Text(one_line(text)))
            self._spinner.start()
        else:
            self._spinner.update(Text(one_line(text)))

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


def watch(cluster: ClusterContext, job_id: str, progress: Progress) -> threading.Event:
    """Keep showing where a job stands, in a thread of its own, until the returned event is set."""
    over = threading.Event()

    def look() -> None:
        pause = _FIRST_LOOK_SECONDS
        while not over.wait(pause):
            try:
                info = cluster.get_job(job_id)
            except Exception:
                info = None  # whoever waits for the job meets the same error, and reports it
            if info is not None:
                progress.show(info)
            pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)

    threading.Thread(target=look, name="fray-progress", daemon=True).start()
    return over


def _share_a_screen() -> bool:
    """Whether standard output and standard error end in the same place."""
    try:
        output, error = os.fstat(1), os.fstat(2)
    except OSError:
        return False
    return (output.st_dev, output.st_ino) == (error.st_dev, error.st_ino)
