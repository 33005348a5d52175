"""What a project's `uv.lock` says, in the words of a build: packages for uv to install, and what is in the source."""

from __future__ import annotations

import os
import shlex
import tomllib
from collections.abc import Sequence
from pathlib import Path

from fray.backend.docker._dockerfile import WORKSPACE
from fray.errors import InvalidValueError
from fray.uv import export_lock

__all__ = ["project_indexes", "read_lock"]

_OPTIONS = ("--no-dev", "--no-default-groups")


def read_lock(directory: Path, extras: Sequence[str]) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the lock's packages as a `pylock.toml`, and those that are in the source, as uv's arguments.

    The first is None where all that the lock names is in the source.

    Raises:
        InvalidValueError: There are none of these extras, or a package is outside of the directory.
    """
    names = export_lock(directory, extras, [*_OPTIONS, "--no-hashes"]).splitlines()
    local = [line for line in names if line.startswith(("-e ", ".", "/", "file:"))]
    pylock = None
    if len(local) < sum(bool(line.strip()) for line in names):
        pylock = export_lock(directory, extras, [*_OPTIONS, "--no-emit-local", "--format=pylock.toml"]).encode()
    arguments: list[str] = []
    for line in local:
        path = line.removeprefix("-e ").partition(" ;")[0].strip()
        inside = os.path.normpath(path)
        if inside.startswith(("..", "/", "file:")):
            raise InvalidValueError(
                f"the lock of {directory} names {path}, which is outside of the directory and cannot be in the image: "
                "build from a directory that has both"
            )
        arguments += ["--editable"] if line.startswith("-e ") else []
        arguments.append(shlex.quote(WORKSPACE if inside == "." else f"{WORKSPACE}/{inside}"))
    return pylock, tuple(arguments)


def project_indexes(directory: Path) -> tuple[str, ...]:
    """Return the named indexes of a project: by their names uv finds the credentials for the URLs of the lock."""
    try:
        project = tomllib.loads((directory / "pyproject.toml").read_text())
        indexes = project.get("tool", {}).get("uv", {}).get("index", [])
    except (OSError, ValueError):
        return ()  # uv itself has read it, or has said what is wrong with it
    return tuple(
        f"{index['name']}={index['url']}"
        for index in indexes
        if index.get("name") and str(index.get("url", "")).startswith(("http://", "https://"))
    )
