"""What watching a job costs the reader in delay, and what supervising one costs the machine in memory. No bars."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.jobs import connected
from benchmarks.measuring import Comparison, Settings, Side, compare, interleave, state
from fray.backend.local._paths import StorePaths
from fray.supervision import read_journal

__all__ = ["ROWS"]

# The pause is out of step with every interval at which a reader may look.
_CLOCK_JOB = "import time\nfor _ in range(20):\n print(time.time(), flush=True)\n time.sleep(0.0237)"
_WAITING_SUPERVISOR = (
    'import posix; posix.waitpid(posix.posix_spawn("/bin/sh", ["sh", "-c", "sleep 60"], posix.environ), 0)'
)


def measure_follow(settings: Settings) -> list[Comparison]:
    """Follow a job that prints the time, and look at the clock when a line arrives, and when the log ends."""
    command = shlex.join([sys.executable, "-I", "-S", "-c", _CLOCK_JOB])
    ends: list[float] = []
    with connected(settings.scratch / "follow") as cluster:

        def lag() -> float:
            job_id = cluster.create_job(command)
            lags = [time.time() - float(line) for line in cluster.stream_logs(job_id)]
            over = time.time()
            end_time = cluster.wait(job_id, check=True).end_time
            assert end_time is not None
            ends.append(over - end_time)
            return median(lags)

        found = interleave("follow", [Side("lag", lag)], settings.rounds(9), settings.seed)
    return [
        state("follow", "lag of a followed log line", found["lag"]),
        state("follow", "job's end → end of the followed log", list(ends[1:])),
    ]


def measure_memory(settings: Settings) -> list[Comparison]:
    """Look at a runner and its guard while their job sleeps, against a bare supervisor of the same."""
    if not Path("/proc/self/smaps_rollup").exists():
        return [Comparison("memory", "runner and guard", "bare supervisor", note="this system does not say")]
    root = settings.scratch / "memory"
    resident: list[float] = []
    with connected(root) as cluster:

        def runner_and_guard() -> float:
            job_id = cluster.create_job("echo started; exec sleep 60")
            next(cluster.stream_logs(job_id))
            outcome = read_journal(StorePaths(root).job(job_id).journal.read_bytes())
            pids = [pid for pid in (outcome.runner, outcome.guard) if pid is not None]
            resident.append(sum(_memory(pid, "Rss") for pid in pids))
            share = sum(_memory(pid, "Pss") for pid in pids)
            cluster.delete_job(job_id)
            cluster.wait(job_id)
            return share

        found = interleave(
            "memory", [Side("fray", runner_and_guard), Side("bare", _bare)], settings.rounds(5), settings.seed
        )
    what = "runner and guard, proportional share (PSS)"
    return [
        compare("memory", what, found["fray"], "bare supervisor", found["bare"], kind="ratio", unit="bytes"),
        state("memory", "runner and guard, resident (RSS)", list(resident[1:]), unit="bytes"),
    ]


def _bare() -> float:
    command = [sys.executable, "-I", "-S", "-c", _WAITING_SUPERVISOR]
    with subprocess.Popen(command, start_new_session=True) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        give_up = time.monotonic() + 10
        while not (found := children.read_text().split()) and time.monotonic() < give_up:
            time.sleep(0.01)
        share = _memory(process.pid, "Pss")
        process.kill()
        for pid in found:
            os.kill(int(pid), signal.SIGTERM)
    return share


def _memory(pid: int, what: str) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return 1024.0 * int(line.split()[1])
    raise ValueError(f"no {what} of process {pid}")


ROWS = {"follow": measure_follow, "memory": measure_memory}
