"""The stand-in for Google that `fray tpu … --fake` talks to: one process for a user and machine, started when needed.

The hosts of its slices are processes too, which run their startup scripts. It ends by itself when nothing has been
there and nobody has asked for a while, so that a `down` leaves no process. Two that start at once are one: the second
finds the lock taken and leaves.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fray.errors import ConnectionFailedError

__all__ = ["StandIn", "main", "stand_in"]

_START_SECONDS = 30.0
_IDLE_SECONDS = 60.0


@dataclass(frozen=True)
class StandIn:
    """A stand-in that runs.

    Attributes:
        address: Where it is spoken to.
        project: The one there is.
        directory: Where it and its clients keep their state.
    """

    address: str
    project: str
    directory: Path


def stand_in() -> StandIn:
    """Return the stand-in that runs here; start one where there is none.

    Raises:
        ConnectionFailedError: It does not start.
    """
    import platformdirs

    directory = Path(os.environ.get("FRAY_TPU_FAKE_DIRECTORY") or platformdirs.user_state_path("fray") / "tpu-fake")
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (found := _find(directory)) is not None:
        return found
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fray.backend.tpu._stand_in", str(directory)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            cwd="/",
        )
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()  # when it serves, or has ended, or has left the place to another
    process.returncode = 0  # it goes on, and is nobody's child when this ends: not an omission that Python should mourn
    deadline = time.monotonic() + _START_SECONDS
    while (found := _find(directory)) is None:
        if time.monotonic() > deadline:
            raise ConnectionFailedError(f"the stand-in for Google does not start; see {directory / 'log'}")
        time.sleep(0.05)
    return found


def main(directory: Path) -> None:
    """Serve until nothing is left and nobody asks."""
    with (directory / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _serve(directory)


def _serve(directory: Path) -> None:
    from fray.backend.tpu.interface import SystemClock
    from fray.backend.tpu.testing import FakeCloud, Supply

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what leaves the cloud, and with it all hosts
    with FakeCloud(SystemClock()) as cloud:
        cloud.offer(Supply(accept_seconds=0.2, queue_seconds=1.0, boot_seconds=2.0, delete_seconds=0.5))
        if sys.platform == "linux":
            cloud.run_startup_scripts(directory / "hosts")
        record = directory / "server.json"
        partial = record.with_suffix(".part")
        partial.write_text(json.dumps({"address": cloud.address, "project": cloud.project, "pid": os.getpid()}))
        partial.rename(record)
        print("serving", flush=True)
        calls, since = 0, time.monotonic()
        while True:
            time.sleep(1.0)
            if cloud.existing() or len(cloud.calls) != calls:
                calls, since = len(cloud.calls), time.monotonic()
            elif time.monotonic() - since > _IDLE_SECONDS:
                break
        record.unlink(missing_ok=True)


def _find(directory: Path) -> StandIn | None:
    try:
        with (directory / "lock").open("r") as lock:
            if _is_free(lock):
                return None
        said = json.loads((directory / "server.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return StandIn(said["address"], said["project"], directory)


def _is_free(lock: IO[str]) -> bool:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    return False


if __name__ == "__main__":
    main(Path(sys.argv[1]))
