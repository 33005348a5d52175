"""Following a job as if it ran here: its output, its end, and what Ctrl-C means."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress

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
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._stopper: threading.Thread | None = None
        self.job_id: str | None = None
        self.info: JobInfo | None = None
        self.is_asked_to_stop = False

    def follow(self) -> JobInfo | None:
        """Follow the job and return its final record; None where the user left it.

        The first Ctrl-C asks the job to stop, and following goes on to its end; the second one leaves it.
        """
        threading.Thread(target=self._work, name="fray-follow", daemon=True).start()
        try:
            self._done.wait()
        except KeyboardInterrupt:
            try:
                self._begin_to_stop()
                self._done.wait()
            except KeyboardInterrupt:
                self._finish_asking()
                return None
        if self._error is not None:
            raise self._error
        return self.info

    def _begin_to_stop(self) -> None:
        if self._accepted.is_set():
            self._progress.say(f"stopping {self.job_id}; Ctrl-C again leaves it to itself")
        else:
            self._progress.say("the job will be stopped as soon as it is accepted; Ctrl-C again does not wait for that")
        # In a thread: a second Ctrl-C right after the first must not take the request back.
        self._stopper = threading.Thread(target=self._ask_to_stop, name="fray-stop", daemon=True)
        self._stopper.start()

    def _finish_asking(self) -> None:
        """Let a request to stop go out; a third Ctrl-C gives that up too."""
        if self._accepted.is_set() and self._stopper is not None:
            with suppress(KeyboardInterrupt):
                self._stopper.join()

    def _ask_to_stop(self) -> None:
        self._accepted.wait()
        if self.job_id is None:
            return
        try:
            self._cluster.delete_job(self.job_id)
        except FrayError as error:
            self._progress.say(f"{self.job_id} could not be asked to stop: {error}")
        else:
            self.is_asked_to_stop = True

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
            self._done.set()

    def _copy_output(self, job_id: str) -> None:
        for chunk in log_chunks(self._cluster, job_id):
            self._progress.before_output(chunk)
            try:
                self._write(chunk)
            except OutputClosedError:
                # The promise of the exit code stands without a reader.
                self._progress.say("nobody reads the job's output any more; waiting for its end")
                return
