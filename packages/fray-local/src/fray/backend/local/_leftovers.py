"""Find and kill what is left of a job whose runner and guard are both dead.

They are known by the `FRAY_JOB_ID` and `FRAY_OUTPUT_DIR` in their environment, never by a process id alone, which
may long be somebody else's; and by sharing a session of the job's with one that is known so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterator
from contextlib import suppress

import psutil

from fray.backend.local._watch import sleep_until_gone

__all__ = ["belongs_to_job", "kill_leftovers"]

_PATIENCE_SECONDS = 10.0


def kill_leftovers(job_id: str, outputs: str, sessions: Collection[int]) -> None:
    """Kill a job's processes, and return when they are gone (or after ten seconds: some cannot be killed)."""
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < give_up:
        found = list(_members(job_id, outputs, sessions))
        if not found:
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        for process in found:
            sleep_until_gone(process.pid, 0.2)


def belongs_to_job(pid: int, job_id: str, outputs: str) -> bool:
    """Whether a process was started for a job, by its environment: the id, and the store that the job is in."""
    try:
        environment = psutil.Process(pid).environ()
        return environment.get("FRAY_JOB_ID") == job_id and environment.get("FRAY_OUTPUT_DIR") == outputs
    except (psutil.Error, OSError):
        return False


def _members(job_id: str, outputs: str, sessions: Collection[int]) -> Iterator[psutil.Process]:
    known: set[int] = set()
    others: list[tuple[psutil.Process, int]] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            session = _session_of(process.pid)
            environment = process.environ()
            if environment.get("FRAY_JOB_ID") == job_id and environment.get("FRAY_OUTPUT_DIR") == outputs:
                known.add(session)
                yield process
            elif session in sessions and not environment.get("FRAY_JOB_ID"):
                others.append((process, session))
    # One that cleared its environment is the job's if its session is, which a marked member of it proves.
    yield from (process for process, session in others if session in known)


def _session_of(pid: int) -> int:
    return os.getsid(pid)
