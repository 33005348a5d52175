"""What a job wrote to `$FRAY_OUTPUT_DIR`, out of its container by the engine's archive."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import IO, cast

from docker.errors import NotFound
from fray.backend.docker._engine import Engine
from fray.errors import PlatformError
from fray.state import replacing

__all__ = ["fetch_outputs"]

_ATTEMPTS = 3
# A tar ends with two blocks of zeros.
_END_BYTES = 1024


def fetch_outputs(engine: Engine, container: str, outputs: str, destination: Path) -> list[Path]:
    """Copy a directory of a container below a destination, each file in place of what is there under its name.

    Symbolic links stay what they are.

    Raises:
        PlatformError: The engine's archive of the directory breaks off, as it does where a file shrinks while it is
            read.
        OSError: The destination cannot be written to.
    """
    for _ in range(_ATTEMPTS):
        with suppress(_IncompleteError), engine.errors():
            try:
                with engine.stream(
                    f"/containers/{container}/archive", {"path": outputs}, engine.timeout_seconds
                ) as pieces:
                    return _unpack(pieces, destination)
            except NotFound:
                return []
    raise PlatformError(
        f"the outputs cannot be fetched: the engine's archive of them broke off {_ATTEMPTS} times, as it does where a "
        "file shrinks while it is read: fetch them when the job does not write to them"
    )


class _IncompleteError(Exception):
    """An archive ends before its end."""


def _unpack(pieces: Iterator[bytes], destination: Path) -> list[Path]:
    fetched = []
    source = _Source(pieces)
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", source), mode="r|") as archive:
            for member in archive:
                # The archive's names begin with the directory's own.
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if inside.is_absolute() or ".." in inside.parts:
                    continue
                copy = destination / inside
                if member.isdir():
                    if copy.is_symlink():
                        copy.unlink()  # of an earlier fetch: what it leads to is not the job's
                    copy.mkdir(parents=True, exist_ok=True)
                elif member.issym():
                    with replacing(copy) as new:
                        new.symlink_to(member.linkname)
                    fetched.append(copy)
                elif member.islnk():
                    # Another name of a file that came before.
                    other = destination / PurePosixPath(*PurePosixPath(member.linkname).parts[1:])
                    if other in fetched:
                        with replacing(copy) as new:
                            shutil.copy2(other, new)
                        fetched.append(copy)
                elif member.isreg():
                    _write(archive, member, copy)
                    fetched.append(copy)
    except tarfile.ReadError as error:
        raise _IncompleteError from error
    if not source.has_ended():
        raise _IncompleteError
    return sorted(fetched)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, copy: Path) -> None:
    content = archive.extractfile(member)
    assert content is not None
    with replacing(copy) as new:
        with new.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        if member.mode & 0o100:
            new.chmod(0o755)


class _Source:
    """An archive to read from, of pieces as they come."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""
        self._last = b""

    def read(self, size: int) -> bytes:
        parts, have = [self._rest], len(self._rest)
        while have < size and (piece := next(self._pieces, b"")):
            parts.append(piece)
            have += len(piece)
            self._last = (self._last + piece[-_END_BYTES:])[-_END_BYTES:]
        content = b"".join(parts)
        self._rest = content[size:]
        return content[:size]

    def has_ended(self) -> bool:
        """Whether the archive has an end of its own: that nothing more comes does not say that it is whole."""
        while self.read(1 << 18):
            pass
        return self._last == bytes(_END_BYTES)
