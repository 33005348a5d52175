"""What a job wrote to `$FRAY_OUTPUT_DIR`, out of its container by the engine's archive."""

from __future__ import annotations

import os
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, cast

from docker.errors import NotFound
from fray.backend.docker._engine import Engine
from fray.errors import PlatformError

__all__ = ["fetch_outputs"]


def fetch_outputs(engine: Engine, container: str, outputs: str, destination: Path) -> list[Path]:
    """Copy a directory of a container below a destination, each file in place of what is there under its name.

    Symbolic links stay what they are.

    Raises:
        PlatformError: The destination cannot be written to.
    """
    fetched = []
    with engine.errors():
        try:
            chunks, _ = engine.api.get_archive(container, outputs, chunk_size=1 << 18)
        except NotFound:
            return []
        with tarfile.open(fileobj=cast("IO[bytes]", _Stream(chunks)), mode="r|") as archive:
            for member in archive:
                # The archive's names begin with the directory's own.
                inside = PurePosixPath(*PurePosixPath(member.name).parts[1:])
                if inside.is_absolute() or ".." in inside.parts:
                    continue
                copy = destination / inside
                try:
                    if member.isdir():
                        if copy.is_symlink():
                            copy.unlink()  # of an earlier fetch: what it leads to is not the job's
                        copy.mkdir(parents=True, exist_ok=True)
                    elif member.issym():
                        _link(member.linkname, copy)
                        fetched.append(copy)
                    elif member.islnk():
                        # Another name of a file that came before.
                        other = destination / PurePosixPath(*PurePosixPath(member.linkname).parts[1:])
                        if other in fetched:
                            shutil.copy2(other, copy)
                            fetched.append(copy)
                    elif member.isreg():
                        _write(archive, member, copy)
                        fetched.append(copy)
                except OSError as error:
                    raise PlatformError(
                        f"outputs cannot be fetched to {str(destination)!r}: {error.strerror or error}: fetch them to "
                        "another directory"
                    ) from error
    return sorted(fetched)


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{secrets.token_hex(8)}.part")
    content = archive.extractfile(member)
    assert content is not None
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(content, file, 1 << 20)
        if member.mode & 0o100:
            temporary.chmod(0o755)
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _link(target: str, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    temporary = copy.with_name(f".{secrets.token_hex(8)}.part")
    temporary.symlink_to(target)
    os.replace(temporary, copy)


class _Stream:
    """A file to read from, of pieces as they come."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts, have = [self._rest], len(self._rest)
        while have < size and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            have += len(chunk)
        content = b"".join(parts)
        self._rest = content[size:]
        return content[:size]
