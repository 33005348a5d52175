"""Following a job as if it ran here: its output, its end, and what Ctrl-C means."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from queue import SimpleQueue

from fray.cli._output import OutputClosedError, write_error, write_out
from fray.cli._progress import Progress, watch
from fray.cluster import ClusterContext
from fray.errors import FrayError
from fray.types import JobInfo

__all__ = ["Follower", "log_chunks"]


def log_chunks(
    cluster: ClusterContext, job_id: str, *, tail: int | None = None, follow: bool = True
) -> Iterator[bytes]:
    """Iterate over the job's output as it comes, in bytes.

    Not `stream_logs`, whose whole lines keep back a progress bar, which has one long line, and a prompt.
    """
    cluster.get_job(job_id)
    return cluster._chunks(job_id, cluster._tail_offset(job_id, tail), follow)


class _Event(Enum):
    """What the main thread waits for."""

    INTERRUPTED = auto()
    STOP_ANSWERED = auto()
    DONE = auto()


class Follower:
    """Submits a job and follows it to its end, while the main thread is free for Ctrl-C.

    Args:
        cluster: Where.
        create: Submits the job and returns its id.
        progress: Is told how it goes.
        to_stderr: Whether the job's output goes to standard error.

    Attributes:
        job_id: The job's id, None until it is accepted.
        info: Its final record, None until it is over.
        is_asked_to_stop: Whether the cluster has taken a request to stop it.
    """

    def __init__(
        self, cluster: ClusterContext, create: Callable[[], str], progress: Progress, *, to_stderr: bool = False
    ) -> None:
        self._cluster = cluster
        self._create = create
        self._progress = progress
        self._write = write_error if to_stderr else write_out
        self._accepted = threading.Event()
        self._events: SimpleQueue[_Event] = SimpleQueue()
        self._error: BaseException | None = None
        self.job_id: str | None = None
        self.info: JobInfo | None = None
        self.is_asked_to_stop = False

    def follow(self) -> JobInfo | None:
        """Follow the job and return its final record; None where the user left it.

        The first Ctrl-C asks the job to stop, and following goes on to its end. The second one leaves it, once the
        cluster has answered the first; the third does not wait for that either.
        """
        presses, is_answered = 0, False
        with self._interrupts():
            threading.Thread(target=self._work, name="fray-follow", daemon=True).start()
            while (event := self._events.get()) is not _Event.DONE:
                if event is _Event.STOP_ANSWERED:
                    is_answered = True
                else:
                    presses += 1
                if presses == 1 and event is _Event.INTERRUPTED:
                    self._begin_to_stop()
                if presses > 2 or (presses == 2 and (is_answered or not self._accepted.is_set())):
                    return None
        if self._error is not None:
            raise self._error
        return self.info

    @contextmanager
    def _interrupts(self) -> Iterator[None]:
        """Make events of Ctrl-C.

        An exception would come between any two steps, such as saying that the job is being stopped and doing so.
        """
        before = signal.getsignal(signal.SIGINT)
        # Ignored, as for a shell's background job, it stays so; and only the main thread may choose.
        if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
            yield
            return
        # Of all queues only SimpleQueue may be put to by a signal handler.
        signal.signal(signal.SIGINT, lambda number, frame: self._events.put(_Event.INTERRUPTED))
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _begin_to_stop(self) -> None:
        if self._accepted.is_set():
            self._progress.say(f"stopping {self.job_id}; Ctrl-C again leaves it to itself")
        else:
            self._progress.say("the job will be stopped as soon as it is accepted; Ctrl-C again does not wait for that")
        threading.Thread(target=self._ask_to_stop, name="fray-stop", daemon=True).start()

    def _ask_to_stop(self) -> None:
        self._accepted.wait()
        if self.job_id is None:
            return
        try:
            self._cluster.delete_job(self.job_id)
            self.is_asked_to_stop = True
        except FrayError as error:
            self._progress.say(f"{self.job_id} could not be asked to stop: {error}")
        finally:
            self._events.put(_Event.STOP_ANSWERED)

    def _work(self) -> None:
        try:
            try:
                self.job_id = self._create()
            finally:
                self._accepted.set()
            over = watch(self._cluster, self.job_id, self._progress)
            try:
                self._copy_output(self.job_id)
                self.info = self._cluster.wait(self.job_id)
            finally:
                over.set()
        except BaseException as error:
            self._error = error  # raised again by the thread that waits
        finally:
            self._events.put(_Event.DONE)

    def _copy_output(self, job_id: str) -> None:
        for chunk in log_chunks(self._cluster, job_id):
            self._progress.before_output(chunk)
            try:
                self._write(chunk)
            except OutputClosedError:
                # The promise of the exit code stands without a reader.
                self._progress.say("nobody reads the job's output any more; waiting for its end")
                return
