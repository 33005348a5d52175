"""Admission: jobs that ask for CPU, memory or GPU wait their turn, first come first served.

Each such job has a ticket, a file named by its submission time whose lock its supervisors hold from before the job is
accepted until the last of its processes is gone. A ticket whose lock is free is dead and counts for nothing, so a
killed waiter holds nobody up and a killed job gives back what it had.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fray.state import held, is_locked, write_all

if TYPE_CHECKING:
    from fray.types import Resource

__all__ = ["KNOWN_RESOURCES", "Ticket", "draw_ticket", "infeasible", "machine_resources", "wait_for_admission"]

KNOWN_RESOURCES = ("CPU", "memory", "GPU")
_WAITING, _ADMITTED = ".waiting", ".admitted"
_FIRST_LOOK_SECONDS, _LONGEST_PAUSE_SECONDS = 0.02, 0.2


class Ticket:
    """A place in the queue: its name orders it, its lock keeps it alive."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.lock_fd = lock_fd


def machine_resources() -> dict[str, float]:
    """Return what this machine has to give; a kind that cannot be counted here is not in it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, float] = {"CPU": cores, "memory": memory}
    if Path("/proc").is_dir():  # Linux: the driver lists the devices that there are
        gpus = Path("/proc/driver/nvidia/gpus")
        found["GPU"] = len(list(gpus.iterdir())) if gpus.is_dir() else 0
    return found


def draw_ticket(directory: Path, submitted_ns: int, job_id: str, resources: list[Resource]) -> Ticket:
    """Queue a job up; its place is kept as long as the ticket's descriptor is open anywhere."""
    path = directory / f"{submitted_ns:020d}.{job_id}{_WAITING}"
    # Under another name until it is locked and whole: a ticket seen without its lock would count as dead.
    staging = directory / f"new-{submitted_ns:020d}.{job_id}.{os.getpid()}"
    lock = os.open(staging, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_all(lock, json.dumps({each.name: each.quantity for each in resources}).encode())
        os.rename(staging, path)
    except BaseException:
        os.close(lock)
        staging.unlink(missing_ok=True)
        raise
    return Ticket(path, lock)


def infeasible(resources: dict[str, float]) -> str:
    """Say what of `resources` this machine will never have; empty where it can be had."""
    has = machine_resources()
    short = [
        f"{_amount(name, quantity)} asked for, this machine has {_amount(name, has.get(name, 0))}"
        for name, quantity in resources.items()
        if quantity > has.get(name, 0)
    ]
    return "; ".join(short)


def wait_for_admission(ticket: Path, resources: dict[str, float], say: Callable[[str], None]) -> Path:
    """Return once the job may start, with its ticket's new name; `say` is told what it waits for, when that changes."""
    directory, has = ticket.parent, machine_resources()
    pause, said = _FIRST_LOOK_SECONDS, ""
    wanted = ", ".join(_amount(name, quantity) for name, quantity in resources.items())
    while True:
        ahead = _first_alive_ahead(directory, ticket.name)
        if ahead is None:
            with held(directory / "lock"):
                free = _free(directory, has)
                if all(free[name] + 1e-9 * has[name] >= quantity for name, quantity in resources.items()):
                    admitted = ticket.with_name(ticket.name.removesuffix(_WAITING) + _ADMITTED)
                    os.rename(ticket, admitted)
                    return admitted
            left = ", ".join(f"{_amount(name, free[name])} of {_amount(name, has[name])}" for name in resources)
            message = f"waiting for {wanted}; free now: {left}"
        else:
            message = f"waiting for {wanted}, behind job {ahead}"
        if message != said:
            say(message)
            said = message
        time.sleep(pause)
        pause = min(pause * 1.5, _LONGEST_PAUSE_SECONDS)


def _first_alive_ahead(directory: Path, own: str) -> str | None:
    """Return the job whose turn is before this one's, None where it is this one's."""
    for name in sorted(os.listdir(directory)):
        if name >= own:
            return None
        if name.endswith(_WAITING) and _is_alive(directory / name):
            return name.partition(".")[2].removesuffix(_WAITING)
    return None


def _free(directory: Path, has: dict[str, float]) -> dict[str, float]:
    free = dict(has)
    for name in os.listdir(directory):
        if name.endswith(_ADMITTED) and _is_alive(directory / name):
            with suppress(OSError, ValueError):
                for resource, quantity in json.loads((directory / name).read_text()).items():
                    free[resource] = free.get(resource, 0) - quantity
    return free


def _is_alive(ticket: Path) -> bool:
    if is_locked(ticket):
        return True
    ticket.unlink(missing_ok=True)
    return False


def _amount(name: str, quantity: float) -> str:
    if name != "memory":
        return f"{quantity:g} {name}"
    return f"{quantity / 2**30:.3g} GiB of memory" if quantity >= 2**30 else f"{quantity / 2**20:.3g} MiB of memory"
