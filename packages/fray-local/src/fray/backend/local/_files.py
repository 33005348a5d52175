"""Locks that the kernel frees when their last holder is gone, and writes that are whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["is_locked", "taken", "write_all"]


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


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of `data`, or raise what stands in the way."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
