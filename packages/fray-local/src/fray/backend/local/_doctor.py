"""What `fray doctor` looks at for local jobs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fray.backend.local import _paths
from fray.backend.local._interpreters import command_python
from fray.uv import find_uv

__all__ = ["checks"]

_LITTLE_SPACE_BYTES = 1 << 30


def checks() -> Iterator[tuple[bool, str, str]]:
    """Yield whether each thing is well, what was found, and the remedy."""
    for title, directory, variable in (
        ("state directory", _paths.default_root(), "XDG_STATE_HOME"),
        ("cache of environments", _paths.default_cache(), "XDG_CACHE_HOME"),
    ):
        there = _nearest(directory)
        trouble = _cannot_write(there)
        if trouble:
            yield (
                False,
                f"local: the {title} {directory} cannot be written to: {trouble}",
                (f"see to the permissions of {there}, or set {variable} to a directory of yours"),
            )
            continue
        free = shutil.disk_usage(there).free
        yield (
            free >= _LITTLE_SPACE_BYTES,
            f"local: the {title} {directory} can be written to, {free / (1 << 30):.1f} GiB are free",
            "free some space: `fray purge --older-than 30d` removes old jobs, and the cache may be deleted",
        )
    yield _uv()
    python = command_python()
    yield True, f"local: `python` is {python} in jobs of the fray command", ""


def _nearest(directory: Path) -> Path:
    """Return the directory, or the nearest above it that exists."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    return directory


def _cannot_write(directory: Path) -> str:
    """Return why no file can be made in a directory; nothing where one can."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"fray")
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def _uv() -> tuple[bool, str, str]:
    remedy = "pip install --force-reinstall uv (jobs with packages need it)"
    try:
        path = find_uv()
        said = subprocess.run(
            [path, "--version"], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL
        ).stdout.strip()
    except (ImportError, OSError, subprocess.SubprocessError) as error:
        return False, f"local: uv does not run: {error}", remedy
    return True, f"local: {said} at {path}", remedy
