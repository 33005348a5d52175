"""What a build sends to the engine: a few small files, and the project's source as one archive.

For a Dockerfile of Fray's the source is a single member, `source.tar`, that the engine unpacks into a layer: neither
side handles thousands of files twice. For the project's own Dockerfile its files are the context.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tarfile
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fray.snapshot import TAR_TIME_SECONDS, Snapshot, collect, write_tar

__all__ = ["SOURCE", "Context", "Source", "file_digest", "read_context", "read_source"]

SOURCE = "source.tar"
_IN_MEMORY_BYTES = 256 << 20
_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class Source:
    """A directory's files as an archive.

    Attributes:
        archive: The tar, in memory or in a nameless file.
        digest: The SHA-256 of it.
        snapshot: What is in it.
    """

    archive: IO[bytes]
    digest: str
    snapshot: Snapshot


def read_source(
    directory: Path,
    *,
    excludes: tuple[str, ...],
    dockerignore: Path,
    prefix: str,
    owner: tuple[int, int],
    limit_bytes: int,
) -> Source:
    """Read a directory once: which files are shipped, their content, and its digest."""
    snapshot = collect(directory, excludes, dockerignore)
    archive = _Spool(_IN_MEMORY_BYTES)
    digest = write_tar(snapshot, archive, prefix=prefix, owner=owner, limit_bytes=limit_bytes)  # type: ignore[arg-type]
    source = Source(archive, digest, snapshot)
    weakref.finalize(source, archive.close)  # of a plan that comes to nothing, too
    return source


@dataclass(frozen=True)
class Context:
    """All that a build sends.

    Attributes:
        files: Small files by name.
        source: The archive of the source; None where there is none.
        is_flat: Whether the members of the archive are the context's own, beside `files`.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    source: IO[bytes] | None = None
    is_flat: bool = False

    def write_tar(self, target: IO[bytes]) -> None:
        """Write the context as one archive."""
        with tarfile.open(fileobj=target, mode="w", format=tarfile.PAX_FORMAT) as archive:
            for name, content in sorted(self.files.items()):
                archive.addfile(_member(name, len(content)), io.BytesIO(content))
            if self.source is not None and not self.is_flat:
                self.source.seek(0)
                archive.addfile(_member(SOURCE, _size(self.source)), self.source)
            if self.source is not None and self.is_flat:
                # Its members follow ours, its end is the end.
                self.source.seek(0)
                shutil.copyfileobj(self.source, target, _COPY_BYTES)

    def write_directory(self, directory: Path) -> None:
        """Write a context that is not flat as files of a directory, with the same modes everywhere."""
        for name, content in self.files.items():
            _write(directory / name, io.BytesIO(content))
        if self.source is not None:
            self.source.seek(0)
            _write(directory / SOURCE, self.source)


def read_context(archive: IO[bytes]) -> Context:
    """Return the context that `Context.write_tar` wrote, of one that is not flat."""
    files: dict[str, bytes] = {}
    source: IO[bytes] | None = None
    with tarfile.open(fileobj=archive, mode="r:") as members:
        for member in members:
            content = members.extractfile(member)
            assert content is not None
            if member.name == SOURCE:
                source = _Spool(_IN_MEMORY_BYTES)
                shutil.copyfileobj(content, source, _COPY_BYTES)
            else:
                files[member.name] = content.read()
    return Context(files, source)


def file_digest(content: bytes) -> str:
    """The SHA-256 of a small file."""
    return hashlib.sha256(content).hexdigest()


class _Spool(tempfile.SpooledTemporaryFile[bytes]):
    """Lives as long as what holds it, and is then closed without a word."""

    def __del__(self) -> None:
        self.close()


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, TAR_TIME_SECONDS, 0o644
    return member


def _size(file: IO[bytes]) -> int:
    at = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(at)
    return size


def _write(path: Path, content: IO[bytes]) -> None:
    with path.open("wb") as file:
        shutil.copyfileobj(content, file, _COPY_BYTES)
        os.fchmod(file.fileno(), 0o644)
