"""What of a working directory is shipped with a job, and all of it as one archive.

Rule 13 of the contract: what git would ignore stays behind, so does what `.frayignore` and `excludes` name, and always
what belongs to git or to a virtual environment. A line `!pattern` in `.frayignore` brings something back.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fray.errors import InvalidValueError

__all__ = ["Snapshot", "SnapshotFile", "collect", "digest", "write_zip"]

_NEVER = frozenset({".git", ".venv", "__pycache__"})
# Compressed already: squeezing them again costs time and gains nothing.
_COMPRESSED = {
    *(".7z", ".bz2", ".gz", ".jpeg", ".jpg", ".lz4", ".mp3", ".mp4", ".npz", ".parquet", ".png", ".pt", ".pth"),
    *(".safetensors", ".webp", ".whl", ".xz", ".zip", ".zst"),
}
_CHUNK_BYTES = 1 << 20
_SHOWN_FILES = 10


class SnapshotFile(NamedTuple):
    """One file, or one empty directory, of a snapshot.

    Attributes:
        path: Below the directory, with `/`; ends in one for an empty directory.
        size: In bytes.
        is_executable: Whether its owner may execute it.
    """

    path: str
    size: int
    is_executable: bool = False


@dataclass(frozen=True)
class Snapshot:
    """Which files of a directory are shipped, in the order of their paths.

    Attributes:
        directory: Where they are.
        files: Which they are.
    """

    directory: Path
    files: tuple[SnapshotFile, ...]

    @property
    def size(self) -> int:
        """How large they are together, in bytes."""
        return sum(file.size for file in self.files)

    def largest(self, count: int = _SHOWN_FILES) -> list[SnapshotFile]:
        """Return the largest of them, the largest first."""
        return sorted(self.files, key=lambda file: -file.size)[:count]


def collect(directory: Path, excludes: Sequence[str] = ()) -> Snapshot:
    """Find out what of a directory is shipped. Symbolic links are followed; what they lead to is shipped instead.

    The patterns of `.gitignore` files count as git counts them, those in directories above included, up to the
    repository's root. `.frayignore` files have the same syntax, come after them, and may bring back single files of an
    ignored directory. `excludes` are patterns for the whole tree, and come last.

    Raises:
        InvalidValueError: A file cannot be read, or has a name that is not UTF-8.
    """
    top = directory.absolute()
    above = [_Level(str(each), _read_patterns(each / ".gitignore"), ()) for each in _repository_above(top)]
    walk = _Walk(tuple(compiled for text in excludes if (compiled := _compile(text))))
    walk.enter(str(top), "", tuple(above), is_ignored=False, links=frozenset())
    return Snapshot(top, tuple(sorted(walk.found)))


def digest(snapshot: Snapshot) -> str:
    """Return what tells a snapshot's content from others: paths, execute permission and bytes."""
    sha = hashlib.sha256()
    for file in snapshot.files:
        sha.update(f"{file.path}\0{file.size}\0{file.is_executable:d}\0".encode())
        if not file.path.endswith("/"):
            for chunk in _content(snapshot.directory, file):
                sha.update(chunk)
    return sha.hexdigest()


def write_zip(snapshot: Snapshot, limit_bytes: int) -> bytes:
    """Return the snapshot as a zip archive, the same bytes for the same content.

    Raises:
        InvalidValueError: It would be larger than `limit_bytes`; the message names the largest files.
    """
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=4) as target:
        for file in snapshot.files:
            entry = zipfile.ZipInfo(file.path)  # of 1980, whenever the file was written
            entry.external_attr = (stat.S_IFDIR | 0o755) << 16 if file.path.endswith("/") else _mode(file) << 16
            if os.path.splitext(file.path)[1].lower() not in _COMPRESSED:
                entry.compress_type = zipfile.ZIP_DEFLATED
            entry.file_size = file.size
            with target.open(entry, "w") as member:
                if not file.path.endswith("/"):
                    for chunk in _content(snapshot.directory, file):
                        member.write(chunk)
                        if archive.tell() > limit_bytes:
                            raise InvalidValueError(_too_large(snapshot, limit_bytes))
    return archive.getvalue()


class _Pattern(NamedTuple):
    """A line of an ignore file.

    Attributes:
        regex: Matches the path from the file's directory, or, where `is_name`, the last part of it.
        is_name: Whether it names files wherever they are.
        brings_back: Whether it began with `!`.
        is_for_directories: Whether it ended in `/`.
        prefix: The directories that it begins with, up to the first wildcard.
        is_deep: Whether it may match below directories that `prefix` does not name.
    """

    regex: re.Pattern[str]
    is_name: bool
    brings_back: bool
    is_for_directories: bool
    prefix: str
    is_deep: bool

    def matches(self, path: str, is_directory: bool) -> bool:
        if self.is_for_directories and not is_directory:
            return False
        return self.regex.fullmatch(path.rpartition("/")[2] if self.is_name else path) is not None


class _Level(NamedTuple):
    """The patterns of one directory, git's and Fray's."""

    directory: str
    git: tuple[_Pattern, ...]
    fray: tuple[_Pattern, ...]


class _Walk:
    def __init__(self, excludes: tuple[_Pattern, ...]) -> None:
        self.found: list[SnapshotFile] = []
        self._excludes = excludes

    def enter(
        self, directory: str, below: str, levels: tuple[_Level, ...], *, is_ignored: bool, links: frozenset[str]
    ) -> None:
        """Add what is in a directory; of an ignored one only what a `.frayignore` names.

        Args:
            directory: Where it is.
            below: Its path below the top, with a `/` at its end.
            levels: The patterns of the directories above it, the outermost first.
            is_ignored: Whether git would not look into it.
            links: The real paths of the directories that were entered through links to get here.
        """
        git = () if is_ignored else _read_patterns(Path(directory, ".gitignore"))
        levels = (*levels, _Level(directory, git, _read_patterns(Path(directory, ".frayignore"))))
        try:
            entries = list(os.scandir(directory))
        except OSError as error:
            raise _unreadable(below or ".", error) from error
        for entry in entries:
            if entry.name not in _NEVER:
                self._add(entry, f"{below}{entry.name}", levels, is_ignored, links)
        if not entries and below and not is_ignored:
            self.found.append(SnapshotFile(below, 0))

    def _add(
        self, entry: os.DirEntry[str], path: str, levels: tuple[_Level, ...], is_ignored: bool, links: frozenset[str]
    ) -> None:
        try:
            status = entry.stat()
        except FileNotFoundError:
            return  # a link to nowhere, or gone in this moment
        except OSError as error:
            raise _unreadable(path, error) from error
        is_directory = stat.S_ISDIR(status.st_mode)
        if _verdict(self._excludes, path, is_directory):
            return
        if not is_ignored:
            # To git a link is a file, whatever it leads to.
            is_ignored = (
                _ask(
                    [(level.directory, level.git) for level in levels], entry.path, entry.is_dir(follow_symlinks=False)
                )
                or False
            )
        fray = _ask([(level.directory, level.fray) for level in levels], entry.path, is_directory)
        if fray is not None:
            is_ignored = fray
        if is_directory:
            if os.path.exists(f"{entry.path}/pyvenv.cfg") or (is_ignored and not _may_hold_wanted(levels, entry.path)):
                return
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if real in links or f"{os.path.realpath(os.path.dirname(entry.path))}/".startswith(f"{real}/"):
                    return  # round in a circle
                links = links | {real}
            self.enter(entry.path, f"{path}/", levels, is_ignored=is_ignored, links=links)
        elif stat.S_ISREG(status.st_mode) and not is_ignored:
            try:
                path.encode()
            except UnicodeEncodeError:
                raise InvalidValueError(
                    f"the working directory has a file whose name is not UTF-8: {path!r}; rename it, or exclude it"
                ) from None
            self.found.append(SnapshotFile(path, status.st_size, bool(status.st_mode & stat.S_IXUSR)))


def _ask(levels: Sequence[tuple[str, tuple[_Pattern, ...]]], path: str, is_directory: bool) -> bool | None:
    """What the innermost level that has something to say says of an absolute path."""
    for directory, patterns in reversed(levels):
        if patterns:
            verdict = _verdict(patterns, path[len(directory) :].lstrip("/"), is_directory)
            if verdict is not None:
                return verdict
    return None


def _verdict(patterns: tuple[_Pattern, ...], path: str, is_directory: bool) -> bool | None:
    """What the last pattern that matches says: ignored, brought back, or nothing."""
    for pattern in reversed(patterns):
        if pattern.matches(path, is_directory):
            return not pattern.brings_back
    return None


def _may_hold_wanted(levels: tuple[_Level, ...], path: str) -> bool:
    """Whether something inside an ignored directory may be named by a `.frayignore`."""
    for level in levels:
        relative = path[len(level.directory) :].lstrip("/") + "/"
        for pattern in level.fray:
            prefix = f"{pattern.prefix}/"
            is_near = prefix.startswith(relative) or (pattern.is_deep and relative.startswith(prefix))
            if pattern.brings_back and pattern.prefix and is_near:
                return True
    return False


def _repository_above(top: Path) -> list[Path]:
    """The directories above `top` up to the root of its git repository, the outermost first; none outside of one."""
    above = []
    for directory in (top, *top.parents):
        if directory != top:
            above.append(directory)
        if (directory / ".git").exists():
            return above[::-1]
    return []


def _read_patterns(file: Path) -> tuple[_Pattern, ...]:
    try:
        lines = file.read_bytes().decode(errors="surrogateescape").removeprefix("\ufeff").split("\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ()
    except OSError as error:
        raise _unreadable(file.name, error) from error
    return tuple(compiled for line in lines if (compiled := _compile(line)))


@cache
def _compile(line: str) -> _Pattern | None:
    """Return the pattern of a line (gitignore(5)), None for one that is none or matches nothing."""
    text = line.removesuffix("\r")
    while text.endswith(" ") and not re.search(r"(?<!\\)(\\\\)*\\ $", text):
        text = text[:-1]
    if not text or text.startswith("#"):
        return None
    brings_back = text.startswith("!")
    text = text[1:] if brings_back else text
    is_for_directories = text.endswith("/")
    text = text[:-1] if is_for_directories else text
    is_name = "/" not in text
    text = text.removeprefix("/")
    if not text:
        return None
    regex = _translate(text)
    if regex is None:
        return None
    parts = text.split("/")
    named = 0
    while named < len(parts) - 1 and not re.search(r"[*?\[\\]", parts[named]):
        named += 1
    return _Pattern(
        re.compile(regex, re.DOTALL),
        is_name,
        brings_back,
        is_for_directories,
        "/".join(parts[:named]),
        named < len(parts) - 1 or "**" in text,
    )


def _translate(text: str) -> str | None:
    """Return the regular expression of a pattern; None for one that git takes to match nothing."""
    out, at = "", 0
    while at < len(text):
        character = text[at]
        if character == "*":
            stars = len(text[at:]) - len(text[at:].lstrip("*"))
            is_whole = stars > 1 and (at == 0 or text[at - 1] == "/")
            at += stars
            if is_whole and text[at : at + 1] == "/":
                out += "(?:.*/)?"
                at += 1
            elif is_whole and at == len(text):
                out += ".*" if at == stars else ".+"
            else:
                out += "[^/]*"
        elif character == "?":
            out += "[^/]"
            at += 1
        elif character == "[":
            found = _translate_set(text, at)
            if found is None:
                return None
            part, at = found
            out += part
        else:
            if character == "\\":
                at += 1
                if at == len(text):
                    return None
            out += re.escape(text[at])
            at += 1
    return out


def _translate_set(text: str, at: int) -> tuple[str, int] | None:
    """Return the regular expression of a `[…]`, and where it ends; None where it does not."""
    at += 1
    is_negated = text[at : at + 1] in ("!", "^")
    at += is_negated
    members, is_first = "", True
    while True:
        if at >= len(text):
            return None
        character = text[at]
        if character == "]" and not is_first:
            break
        is_first = False
        if named := re.match(r"\[:([a-z]+):\]", text[at:]):
            if named[1] not in _CLASSES:
                return None
            members += _CLASSES[named[1]]
            at += named.end()
            continue
        if character == "\\":
            at += 1
            if at >= len(text):
                return None
            character = text[at]
        at += 1
        if text[at : at + 1] == "-" and text[at + 1 : at + 2] not in ("]", ""):
            at += 1
            if text[at] == "\\":
                at += 1
                if at >= len(text):
                    return None
            last = text[at]
            at += 1
            if character <= last:
                members += f"{re.escape(character)}-{re.escape(last)}"
        else:
            members += re.escape(character)
    if is_negated:
        return f"[^/{members}]", at + 1
    return (f"(?!/)[{members}]" if members else "(?!)"), at + 1


_CLASSES = {
    "alnum": "A-Za-z0-9",
    "alpha": "A-Za-z",
    "blank": " \\t",
    "cntrl": "\\x00-\\x1f\\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": "!-/:-@\\[-`{-~",
    "space": "\\s",
    "upper": "A-Z",
    "xdigit": "A-Fa-f0-9",
}


def _content(directory: Path, file: SnapshotFile) -> Iterator[bytes]:
    try:
        with (directory / file.path).open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk
    except FileNotFoundError:
        return  # removed since: as empty as it can be
    except OSError as error:
        raise _unreadable(file.path, error) from error


def _mode(file: SnapshotFile) -> int:
    return stat.S_IFREG | (0o755 if file.is_executable else 0o644)


def _unreadable(path: str, error: OSError) -> InvalidValueError:
    return InvalidValueError(
        f"the working directory cannot be shipped: {path!r} cannot be read ({error.strerror}); exclude it by a line in "
        ".frayignore or by excludes"
    )


def _too_large(snapshot: Snapshot, limit_bytes: int) -> str:
    largest = ", ".join(f"{file.path} ({_size(file.size)})" for file in snapshot.largest())
    return (
        f"the working directory {str(snapshot.directory)!r} is too large to be shipped: {_size(snapshot.size)} in "
        f"{len(snapshot.files)} files, compressed more than the {_size(limit_bytes)} that the cluster takes. The "
        f"largest files: {largest}. Name what the job does not need in .frayignore or excludes, or have it fetched"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
