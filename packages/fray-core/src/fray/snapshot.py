"""What of a working directory is shipped with a job, and all of it as one archive.

Rule 13 of the contract: what git would ignore stays behind, so does what `.frayignore` and `excludes` name, and always
what belongs to git or to a virtual environment. A line `!pattern` in `.frayignore` brings something back. A build of a
container image leaves behind what its `.dockerignore` names too.
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
from typing import BinaryIO, NamedTuple

from fray.errors import InvalidValueError

__all__ = ["Snapshot", "SnapshotFile", "collect", "digest", "write_tar", "write_zip"]

_NEVER = frozenset({".git", ".venv", "__pycache__"})
# Compressed already: squeezing them again costs time and gains nothing.
_COMPRESSED = {
    *(".7z", ".bz2", ".gz", ".jpeg", ".jpg", ".lz4", ".mp3", ".mp4", ".npz", ".parquet", ".png", ".pt", ".pth"),
    *(".safetensors", ".webp", ".whl", ".xz", ".zip", ".zst"),
}
_CHUNK_BYTES = 1 << 20
# Of every member of a tar: a day that zip archives, which build backends make of the files, can express in any zone.
TAR_TIME_SECONDS = 1_580_601_600  # 2020-02-02
_TAR_BLOCK_BYTES = 512
# Of a header, after the 157 bytes up to a member's kind.
_TAR_REST = (b"\0" * 100 + b"ustar\00000").ljust(_TAR_BLOCK_BYTES - 157, b"\0")
_TAR_REST_SUM = sum(_TAR_REST) + sum(b" " * 8)  # the checksum itself counts as blanks
_TAR_SIZE_LIMIT_BYTES = 8**11  # what a header's octal field holds; beyond it stands in an extended header
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


def collect(directory: Path, excludes: Sequence[str] = (), dockerignore: Path | None = None) -> Snapshot:
    """Find out what of a directory is shipped. Symbolic links are followed; what they lead to is shipped instead.

    The patterns of `.gitignore` files count as git counts them, those in directories above included, up to the
    repository's root. `.frayignore` files have the same syntax, come after them, and may bring back single files of an
    ignored directory. `excludes` are patterns for the whole tree, and come last.

    Args:
        directory: Which one.
        excludes: Patterns as in `.gitignore`.
        dockerignore: A file of Docker's patterns, which need not be there. What these exclude is left out on top of all
            else; a `!` brings back only what they themselves excluded.

    Raises:
        InvalidValueError: A file cannot be read, or has a name that is not UTF-8; a pattern of `dockerignore` is none.
    """
    top = directory.absolute()
    rules = _Rules()
    for each in _repository_above(top):
        rules = rules.within(str(each), fray=False)
    walk = _Walk(
        tuple(compiled for text in excludes if (compiled := _compile(text))),
        None if dockerignore is None else _read_dockerignore(dockerignore),
    )
    walk.enter(str(top), "", rules, is_ignored=False, links=frozenset())
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


def write_tar(
    snapshot: Snapshot, target: BinaryIO, *, prefix: str = "", owner: tuple[int, int] = (0, 0), limit_bytes: int
) -> str:
    """Write the snapshot as a tar archive, the same bytes for the same content, and return their SHA-256.

    Directories are members of their own, and before what is in them. Each file is read once.

    Args:
        snapshot: What to write.
        target: Where to.
        prefix: A directory that everything goes below, with `/` at its end.
        owner: The numeric user and group of every member.
        limit_bytes: How large the contents may be together.

    Raises:
        InvalidValueError: They are larger than that (the message names the largest), or a file cannot be read.
    """
    if snapshot.size > limit_bytes:
        raise InvalidValueError(_too_large(snapshot, limit_bytes, "more"))
    sha = hashlib.sha256()
    parts: list[bytes] = []
    pending = written = 0
    directories: set[str] = set()

    def put(part: bytes) -> None:
        nonlocal pending
        parts.append(part)
        pending += len(part)
        if pending >= _CHUNK_BYTES:
            flush()

    def flush() -> None:
        nonlocal pending
        block = b"".join(parts)
        parts.clear()
        pending = 0
        sha.update(block)
        target.write(block)

    headers = _TarHeaders(owner)

    def enter(path: str) -> None:
        if path and path not in directories:
            enter(path[: path.rfind("/", 0, -1) + 1])
            directories.add(path)
            put(headers.directory(path))

    enter(prefix)
    root = f"{snapshot.directory}/"
    for file in snapshot.files:
        path = prefix + file.path
        enter(path[: path.rfind("/") + 1])
        if path.endswith("/"):
            continue
        try:
            descriptor = os.open(root + file.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # removed since
        except OSError as error:
            raise _unreadable(file.path, error) from error
        try:
            content = _read(descriptor, file)
            if len(content) <= _CHUNK_BYTES:
                size = len(content)
                put(headers.file(path, size, file.is_executable))
                put(content)
            else:  # as large as it is now, whatever happens to it meanwhile
                size = os.fstat(descriptor).st_size
                put(headers.file(path, size, file.is_executable))
                left = size
                while left:
                    content = (content or b"\0" * _CHUNK_BYTES)[:left]
                    left -= len(content)
                    put(content)
                    content = _read(descriptor, file) if left else b""
            written += size
        finally:
            os.close(descriptor)
        if written > limit_bytes:
            raise InvalidValueError(_too_large(snapshot, limit_bytes, "more"))
        if rest := -size % _TAR_BLOCK_BYTES:
            put(b"\0" * rest)
    put(b"\0" * (2 * _TAR_BLOCK_BYTES))
    flush()
    return sha.hexdigest()


def _read(descriptor: int, file: SnapshotFile) -> bytes:
    """Read what is left of a file, or a byte more than a chunk of it."""
    limit = _CHUNK_BYTES + 1
    try:
        content = os.read(descriptor, min(file.size + 1, limit))
        # A byte more than it had was asked for: as much as it had is all of it. Else it has changed, or the file system
        # gives less at once.
        while len(content) != file.size and len(content) < limit:
            more = os.read(descriptor, limit - len(content))
            if not more:
                break
            content += more
        return content
    except OSError as error:
        raise _unreadable(file.path, error) from error


class _TarHeaders:
    """Makes the headers of tar members; tarfile takes ten times as long."""

    def __init__(self, owner: tuple[int, int]) -> None:
        self._ids = b"%07o\0%07o\0" % owner

    def directory(self, path: str) -> bytes:
        return self._member(path, 0, 0o755, b"5")

    def file(self, path: str, size: int, is_executable: bool) -> bytes:
        return self._member(path, size, 0o755 if is_executable else 0o644, b"0")

    def _member(self, path: str, size: int, mode: int, kind: bytes) -> bytes:
        name = path.encode()
        if len(name) <= 100 and size < _TAR_SIZE_LIMIT_BYTES and name.isascii():
            return self._header(name, size, mode, kind)
        records = _tar_record("path", name)
        if size >= _TAR_SIZE_LIMIT_BYTES:
            records += _tar_record("size", b"%d" % size)
        extended = self._header(b"pax", len(records), 0o644, b"x") + records + b"\0" * (-len(records) % 512)
        return extended + self._header(name[:100], size if size < _TAR_SIZE_LIMIT_BYTES else 0, mode, kind)

    def _header(self, name: bytes, size: int, mode: int, kind: bytes) -> bytes:
        fields = b"%07o\0%b%011o\0%011o\0" % (mode, self._ids, size, TAR_TIME_SECONDS)
        checksum = sum(name) + sum(fields) + sum(kind) + _TAR_REST_SUM
        return b"%b%b%06o\0 %b%b" % (name.ljust(100, b"\0"), fields, checksum, kind, _TAR_REST)


def _tar_record(key: str, value: bytes) -> bytes:
    rest = b" " + key.encode() + b"=" + value + b"\n"
    length = len(rest) + len(str(len(rest)))
    if len(str(length)) + len(rest) != length:
        length += 1
    return b"%d" % length + rest


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
    """The patterns of one directory's ignore file, of which there are some."""

    directory: str
    patterns: tuple[_Pattern, ...]


class _Rules(NamedTuple):
    """The levels from the outermost directory to the one that is looked into."""

    git: tuple[_Level, ...] = ()
    fray: tuple[_Level, ...] = ()

    def within(self, directory: str, *, git: bool = True, fray: bool = True) -> _Rules:
        """Return them with those of a directory further in."""
        return _Rules(
            self.git + (_read_level(directory, ".gitignore") if git else ()),
            self.fray + (_read_level(directory, ".frayignore") if fray else ()),
        )


class _Walk:
    def __init__(self, excludes: tuple[_Pattern, ...], docker: _Dockerignore | None) -> None:
        self.found: list[SnapshotFile] = []
        self._excludes = excludes
        self._docker = docker

    def enter(self, directory: str, below: str, rules: _Rules, *, is_ignored: bool, links: frozenset[str]) -> None:
        """Add what is in a directory; of an ignored one only what a `.frayignore` names.

        Args:
            directory: Where it is.
            below: Its path below the top, with a `/` at its end.
            rules: The patterns of the directories above it.
            is_ignored: Whether git would not look into it.
            links: The real paths of the directories that were entered through links to get here.
        """
        rules = rules.within(directory, git=not is_ignored)
        try:
            entries = list(os.scandir(directory))
        except OSError as error:
            raise _unreadable(below or ".", error) from error
        for entry in entries:
            if entry.name not in _NEVER:
                self._add(entry, f"{below}{entry.name}", rules, is_ignored, links)
        if not entries and below and not is_ignored:
            self._keep(SnapshotFile(below, 0))

    def _add(self, entry: os.DirEntry[str], path: str, rules: _Rules, is_ignored: bool, links: frozenset[str]) -> None:
        try:
            status = entry.stat()
        except FileNotFoundError:
            return  # a link to nowhere, or gone in this moment
        except OSError as error:
            raise _unreadable(path, error) from error
        is_directory = stat.S_ISDIR(status.st_mode)
        if _verdict(self._excludes, path, is_directory):
            return
        if self._docker is not None and self._docker.leaves_out(path, is_directory):
            return
        if not is_ignored:
            # To git a link is a file, whatever it leads to.
            is_ignored = _ask(rules.git, entry.path, entry.is_dir(follow_symlinks=False)) or False
        fray = _ask(rules.fray, entry.path, is_directory)
        if fray is not None:
            is_ignored = fray
        if is_directory:
            if os.path.exists(f"{entry.path}/pyvenv.cfg") or (
                is_ignored and not _may_hold_wanted(rules.fray, entry.path)
            ):
                return
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                if real in links or f"{os.path.realpath(os.path.dirname(entry.path))}/".startswith(f"{real}/"):
                    return  # round in a circle
                links = links | {real}
            self.enter(entry.path, f"{path}/", rules, is_ignored=is_ignored, links=links)
        elif stat.S_ISREG(status.st_mode) and not is_ignored:
            self._keep(SnapshotFile(path, status.st_size, bool(status.st_mode & stat.S_IXUSR)))

    def _keep(self, file: SnapshotFile) -> None:
        try:
            file.path.encode()
        except UnicodeEncodeError:
            raise InvalidValueError(
                f"the working directory has a file whose name is not UTF-8: {file.path!r}; rename it, or exclude it"
            ) from None
        self.found.append(file)


def _ask(levels: tuple[_Level, ...], path: str, is_directory: bool) -> bool | None:
    """What the innermost level that has something to say says of an absolute path."""
    for directory, patterns in reversed(levels):
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
        for pattern in level.patterns:
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


def _read_level(directory: str, name: str) -> tuple[_Level, ...]:
    patterns = _read_patterns(Path(directory, name))
    return (_Level(directory, patterns),) if patterns else ()


def _read_patterns(file: Path) -> tuple[_Pattern, ...]:
    try:
        lines = file.read_bytes().decode(errors="surrogateescape").removeprefix("\ufeff").split("\n")
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return ()
    except OSError as error:
        raise _unreadable(file.name, error) from error
    return tuple(compiled for line in lines if (compiled := _compile(line)))


class _Dockerignore:
    """Docker's patterns (moby/patternmatcher): from the context's root, the last that matches counts.

    A pattern that matches a directory matches all below it.
    """

    def __init__(self, patterns: Sequence[tuple[re.Pattern[str], bool]]) -> None:
        self._patterns = patterns
        self._may_bring_back = any(brings_back for _, brings_back in patterns)
        self._above: dict[str, list[bool]] = {"": [False] * len(patterns)}

    def leaves_out(self, path: str, is_directory: bool) -> bool:
        """Whether a path is excluded, for good: an excluded directory is not where something may be brought back."""
        if is_directory and self._may_bring_back:
            return False
        is_excluded = False
        for matches, (_, brings_back) in zip(self._matches(path), self._patterns, strict=True):
            if matches:
                is_excluded = not brings_back
        return is_excluded

    def _matches(self, path: str) -> list[bool]:
        """Which patterns match a path or a directory that it is in."""
        folder = path.rpartition("/")[0]
        above = self._above.get(folder)
        if above is None:
            above = self._above[folder] = self._matches(folder)
        return [
            is_inside or regex.fullmatch(path) is not None
            for is_inside, (regex, _) in zip(above, self._patterns, strict=True)
        ]


def _read_dockerignore(file: Path) -> _Dockerignore | None:
    """Return the patterns of a file; None where it has none or is not there."""
    try:
        lines = file.read_bytes().decode(errors="surrogateescape").removeprefix("\ufeff").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _unreadable(file.name, error) from error
    patterns = []
    for line in lines:
        if line.startswith("#"):
            continue
        text = line.strip()
        brings_back = text.startswith("!")
        text = text.removeprefix("!").strip()
        if not text:
            continue
        text = os.path.normpath(text).lstrip("/")
        if text in ("", "."):
            continue
        try:
            patterns.append((re.compile(_translate_for_docker(text), re.DOTALL), brings_back))
        except re.error as error:
            raise InvalidValueError(f"{file}: the pattern {line!r} cannot be read ({error})") from error
    return _Dockerignore(patterns) if patterns else None


def _translate_for_docker(text: str) -> str:
    out, at = "", 0
    while at < len(text):
        character = text[at]
        at += 1
        if character == "*" and text[at : at + 1] == "*":
            at += 1
            if text[at : at + 1] == "/":
                at += 1
                out += "(?:.*/)?"
            else:
                out += ".*"
        elif character == "*":
            out += "[^/]*"
        elif character == "?":
            out += "[^/]"
        elif character == "[":
            end = text.find("]", at + 1)
            if end < 0:
                raise re.error("a [ without a ]")
            members = text[at:end]
            out += f"(?!/)[{members}]"
            at = end + 1
        elif character == "\\" and at < len(text):
            out += re.escape(text[at])
            at += 1
        else:
            out += re.escape(character)
    return out


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


def _too_large(snapshot: Snapshot, limit_bytes: int, more: str = "compressed more") -> str:
    largest = ", ".join(f"{file.path} ({_size(file.size)})" for file in snapshot.largest())
    return (
        f"the working directory {str(snapshot.directory)!r} is too large to be shipped: {_size(snapshot.size)} in "
        f"{len(snapshot.files)} files, {more} than the {_size(limit_bytes)} that the cluster takes. The "
        f"largest files: {largest}. Name what the job does not need in .frayignore or excludes, or have it fetched"
    )


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
