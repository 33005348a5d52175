"""What a backend keeps on this machine's disk.

Locks that the kernel frees when their last holder is gone, writes that are whole, and what tells this machine from
others that share a home directory.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["held", "is_locked", "machine_digest", "replacing", "taken", "write_all", "write_durably"]


def machine_digest() -> str:
    """Return a short name of this machine: in a shared home directory, another one's state is not our business."""
    import hashlib
    import platform

    machine = platform.node()
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        try:
            machine += Path(path).read_text().strip()
            break
        except OSError:
            continue
    return hashlib.sha256(machine.encode()).hexdigest()[:12]


def is_locked(path: Path) -> bool:
    """Whether somebody holds a lock; a missing one is held by nobody."""
    with taken(path, shared=True) as free:
        return not free and path.exists()


@contextmanager
def taken(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Take a lock if it is free; say whether it was."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock, waiting for whoever has it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write a file or a link by; it takes the place of `path` in one step, or where it fails, is gone.

    The directory that it is to be in is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that is there, whole, when what names it is, even after a power cut."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, mode)
    try:
        write_all(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, or raise what stands in the way."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
