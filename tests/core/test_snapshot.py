"""What of a working directory is shipped: git is the oracle for what git ignores."""

from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from fray.errors import InvalidValueError
from fray.snapshot import collect, digest, write_tar, write_zip

LIMIT = 1 << 30


def make(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
    return directory


def shipped(directory: Path, *excludes: str) -> list[str]:
    return [file.path for file in collect(directory, excludes).files]


def test_all_files_are_shipped_in_order(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/c", "a/.hidden", "empty/", "ü ' \"\n", ".env")
    assert shipped(tmp_path) == sorted(["a/.hidden", "a/c", "b", "empty/", "ü ' \"\n", ".env"])


def test_what_belongs_to_git_or_an_environment_never_is(tmp_path: Path) -> None:
    make(tmp_path, ".git/config", "sub/.git", ".venv/x", "env/pyvenv.cfg", "env/lib/y", "pkg/__pycache__/m.pyc", "kept")
    (tmp_path / ".frayignore").write_text("!.git\n!.git/config\n!.venv\n!env/\n!__pycache__\n")
    assert shipped(tmp_path) == [".frayignore", "kept"]


def test_frayignore_comes_after_gitignore_and_excludes_last(tmp_path: Path) -> None:
    make(tmp_path, "a.log", "b.log", "data/big.bin", "data/deep/vocab.txt", "notes.md", "c.tmp")
    (tmp_path / ".gitignore").write_text("*.log\ndata/\n")
    (tmp_path / ".frayignore").write_text("!b.log\n!data/deep/vocab.txt\n*.tmp\n")
    kept = [".frayignore", ".gitignore", "b.log", "data/deep/vocab.txt", "notes.md"]
    assert shipped(tmp_path) == kept
    assert shipped(tmp_path, "*.md", "/data") == [".frayignore", ".gitignore", "b.log"]
    assert shipped(tmp_path, "!c.tmp") == kept, "excludes exclude"


@pytest.mark.parametrize("line", ["!data/", "!data", "!/data/"])
def test_an_ignored_directory_is_brought_back_whole(tmp_path: Path, line: str) -> None:
    make(tmp_path, "data/a", "data/b/c")
    (tmp_path / ".gitignore").write_text("data/\n")
    (tmp_path / ".frayignore").write_text(f"{line}\n")
    assert "data/a" in shipped(tmp_path)
    assert "data/b/c" in shipped(tmp_path)


@pytest.mark.parametrize("line", ["!data/*.txt", "!data/**/x.txt", "!data/s*/x.txt"])
def test_wildcards_bring_back_from_the_directories_that_they_name(tmp_path: Path, line: str) -> None:
    make(tmp_path, "data/x.txt", "data/sub/x.txt", "data/sub/y.bin", "other/x.txt")
    (tmp_path / ".gitignore").write_text("data/\nother/\n")
    (tmp_path / ".frayignore").write_text(f"{line}\n")
    expected = {"!data/*.txt": {"data/x.txt"}, "!data/s*/x.txt": {"data/sub/x.txt"}}
    assert set(shipped(tmp_path)) - {".gitignore", ".frayignore"} == expected.get(
        line, {"data/x.txt", "data/sub/x.txt"}
    )


def test_the_repository_above_counts(tmp_path: Path) -> None:
    make(tmp_path, ".git/HEAD", "project/sub/a.log", "project/sub/out/x", "project/sub/kept", "project/out/y")
    (tmp_path / ".gitignore").write_text("*.log\n/project/sub/out\n")
    assert shipped(tmp_path / "project" / "sub") == ["kept"]
    shutil.rmtree(tmp_path / ".git")
    assert shipped(tmp_path / "project" / "sub") == ["a.log", "kept", "out/x"], "no repository, nothing above"


def test_a_directory_that_git_ignores_is_shipped_when_it_is_asked_for(tmp_path: Path) -> None:
    make(tmp_path, ".git/HEAD", "build/a")
    (tmp_path / ".gitignore").write_text("build/\n")
    assert shipped(tmp_path / "build") == ["a"]


def test_links_are_followed_and_circles_left(tmp_path: Path) -> None:
    outside = make(tmp_path / "outside", "model.bin", "deep/x")
    project = make(tmp_path / "project", "a", "sub/b")
    (project / "model").symlink_to(outside / "model.bin")
    (project / "data").symlink_to(outside)
    (project / "sub" / "up").symlink_to(project)
    (project / "self").symlink_to(".")
    (project / "nowhere").symlink_to("missing")
    assert shipped(project) == ["a", "data/deep/x", "data/model.bin", "model", "sub/b"]
    names = zipfile.ZipFile(io.BytesIO(write_zip(collect(project), LIMIT)))
    assert names.read("model") == b"model.bin"


def test_what_is_no_file_is_left(tmp_path: Path) -> None:
    make(tmp_path, "kept")
    os.mkfifo(tmp_path / "pipe")
    assert shipped(tmp_path) == ["kept"]


def test_a_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"bad\xff")).write_text("x")
    with pytest.raises(InvalidValueError, match="UTF-8"):
        collect(tmp_path)
    assert shipped(tmp_path, "bad*") == []


def test_an_archive_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    one, other = (make(tmp_path / name, "b/c", "a", "empty/") for name in ("one", "other"))
    os.utime(other / "a", (0, 0))
    (one / "run").write_text("#!/bin/sh\n")
    (one / "run").chmod(0o700)
    (other / "run").write_text("#!/bin/sh\n")
    (other / "run").chmod(0o775)
    assert write_zip(collect(one), LIMIT) == write_zip(collect(other), LIMIT)
    assert digest(collect(one)) == digest(collect(other))
    (other / "run").chmod(0o600)
    assert write_zip(collect(one), LIMIT) != write_zip(collect(other), LIMIT)
    assert digest(collect(one)) != digest(collect(other))
    archive = zipfile.ZipFile(io.BytesIO(write_zip(collect(one), LIMIT)))
    assert archive.namelist() == ["a", "b/c", "empty/", "run"]
    assert archive.getinfo("run").external_attr >> 16 & 0o777 == 0o755


def test_one_that_is_too_large_names_the_largest_files(tmp_path: Path) -> None:
    make(tmp_path, "small")
    (tmp_path / "model.bin").write_bytes(random.Random(0).randbytes(3_000_000))
    (tmp_path / "zeros").write_bytes(bytes(5_000_000))
    with pytest.raises(InvalidValueError, match=r"zeros \(4.8 MiB\), model.bin \(2.9 MiB\).*\.frayignore"):
        write_zip(collect(tmp_path), 1_000_000)
    assert len(write_zip(collect(tmp_path, ["*.bin"]), 1_000_000)) < 1_000_000, "what counts is what is sent"


def test_a_file_that_goes_away_is_no_trouble(tmp_path: Path) -> None:
    make(tmp_path, "a", "b")
    snapshot = collect(tmp_path)
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("much longer than it was when it was looked at")
    archive = zipfile.ZipFile(io.BytesIO(write_zip(snapshot, LIMIT)))
    assert archive.testzip() is None
    assert archive.read("b").startswith(b"much longer")


NAMES = ["a", "b", "foo", "bar.txt", "foo.txt", "a b", "#x", "!y", "z ", "[q]", "doc", "build"]
PIECES = [
    *NAMES,
    "*",
    "*.txt",
    "?",
    "fo*",
    "[ab]",
    "[!a]",
    "[a-f]*",
    "**",
    "b?r.*",
    r"\#x",
    r"\!y",
    r"a\ b",
    "[[:alpha:]]",
    "***",
]


def random_pattern(choose: random.Random) -> str:
    text = "/".join(choose.choice(PIECES) for _ in range(choose.choice([1, 1, 1, 2, 2, 3])))
    text = choose.choice(["", "", "", "/", "**/"]) + text + choose.choice(["", "", "", "/", "/**", " ", "/*"])
    return choose.choice(["", "", "", "!"]) + text


@pytest.mark.parametrize("seed", range(60))
def test_git_and_fray_agree(tmp_path: Path, seed: int) -> None:
    choose = random.Random(seed)
    tree = tmp_path / "tree"
    tree.mkdir()
    directories = [tree]
    for _ in range(choose.randint(3, 8)):
        directory = choose.choice(directories) / choose.choice(NAMES)
        if not directory.exists():
            directory.mkdir()
            directories.append(directory)
    for _ in range(choose.randint(10, 40)):
        path = choose.choice(directories) / choose.choice(NAMES)
        if not path.exists():
            path.write_text("x")
    for directory in choose.sample(directories, k=min(len(directories), 3)):
        lines = [random_pattern(choose) for _ in range(choose.randint(1, 5))]
        (directory / ".gitignore").write_text("\n".join(lines) + "\n")
    git = ["git", "-c", "core.quotePath=false", "-C", str(tree)]
    subprocess.run([*git, "init", "--quiet"], check=True)
    listing = subprocess.run(
        [*git, "ls-files", "-z", "--others", "--exclude-per-directory=.gitignore"], check=True, capture_output=True
    ).stdout
    expected = sorted(name for name in listing.decode().split("\0") if name)
    found = [name for name in shipped(tree) if not name.endswith("/")]
    patterns = {str(path.relative_to(tree)): path.read_text() for path in tree.rglob(".gitignore")}
    assert found == expected, patterns


def tar_of(directory: Path, **options: object) -> tuple[bytes, str]:
    target = io.BytesIO()
    sha = write_tar(collect(directory), target, **{"limit_bytes": LIMIT, **options})  # type: ignore[arg-type]
    return target.getvalue(), sha


def test_a_tar_holds_every_file_below_its_directories(tmp_path: Path) -> None:
    make(tmp_path, "b", "a/c", "empty/deep/", "ü" * 60, "l" * 99 + "/" + "m" * 150)
    (tmp_path / "a" / "c").chmod(0o755)
    (tmp_path / "large").write_bytes(os.urandom((3 << 20) + 1))
    content, sha = tar_of(tmp_path, prefix="work/", owner=(1000, 100))
    assert hashlib.sha256(content).hexdigest() == sha
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
        names = [member.name for member in members]
        for member in members:
            assert (member.uid, member.gid, member.mtime) == (1000, 100, 1580601600)
            parent = member.name.rpartition("/")[0]
            assert not parent or names.index(parent) < names.index(member.name)
            file = archive.extractfile(member)
            if file is not None:
                assert file.read() == (tmp_path / member.name.removeprefix("work/")).read_bytes()
        assert {member.name: oct(member.mode) for member in members if member.name in ("work/a/c", "work/b")} == {
            "work/a/c": "0o755",
            "work/b": "0o644",
        }
        assert {"work", "work/empty", "work/empty/deep"} <= {member.name for member in members if member.isdir()}


def test_a_tar_is_the_same_for_the_same_content(tmp_path: Path) -> None:
    make(tmp_path / "one", "b", "a/c")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two" / "b", (1, 1))
    assert tar_of(tmp_path / "one") == tar_of(tmp_path / "two")
    (tmp_path / "two" / "b").write_text("c")
    assert tar_of(tmp_path / "one")[1] != tar_of(tmp_path / "two")[1]


@pytest.mark.parametrize("size", [0, 5, 600, (2 << 20) + 3])
def test_a_file_that_changes_meanwhile_leaves_a_readable_tar(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * 5000)
    (tmp_path / "b").write_text("after")
    (tmp_path / "gone").write_text("")
    snapshot = collect(tmp_path)
    (tmp_path / "a").write_bytes(b"y" * size)
    (tmp_path / "gone").unlink()
    target = io.BytesIO()
    write_tar(snapshot, target, limit_bytes=LIMIT)
    target.seek(0)
    with tarfile.open(fileobj=target) as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
    assert found == {"a": b"y" * size, "b": b"after"}


def test_a_tar_that_is_too_large_names_the_largest(tmp_path: Path) -> None:
    make(tmp_path, "small")
    (tmp_path / "big").write_bytes(b"x" * 2048)
    with pytest.raises(InvalidValueError, match=r"more than the 1\.0 KiB .*files: big \(2\.0 KiB\)"):
        tar_of(tmp_path, limit_bytes=1024)


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        ("a", "b.md|sub/a|sub/b.md|sub/deep/c.md"),
        ("*.md", "a|sub/a|sub/b.md|sub/deep/c.md"),
        ("**/*.md", "a|sub/a"),
        ("*/*.md", "a|b.md|sub/a|sub/deep/c.md"),
        ("/sub/", "a|b.md"),
        ("./sub/../sub", "a|b.md"),
        ("sub\n!sub/a", "a|b.md|sub/a"),
        ("!sub/a\nsub", "a|b.md"),
        ("*\n!**/*.md\nsub/deep", "b.md|sub/b.md"),
        ("# a\n\n  a  ", "b.md|sub/a|sub/b.md|sub/deep/c.md"),
        ("s?b/[a-b]*", "a|b.md|sub/deep/c.md"),
        ("**", ""),
        (".", "a|b.md|sub/a|sub/b.md|sub/deep/c.md"),
        ("sub/**/c.md", "a|b.md|sub/a|sub/b.md"),
    ],
)
def test_dockers_patterns_mean_what_they_mean_to_docker(tmp_path: Path, lines: str, kept: str) -> None:
    directory = make(tmp_path / "project", "a", "b.md", "sub/a", "sub/b.md", "sub/deep/c.md")
    (tmp_path / "ignore").write_text(lines)
    found = [file.path for file in collect(directory, (), tmp_path / "ignore").files]
    assert found == [path for path in kept.split("|") if path]


def test_dockers_patterns_bring_back_nothing_that_others_leave_behind(tmp_path: Path) -> None:
    make(tmp_path, "a.log", "b.tmp", "c", ".venv/x")
    (tmp_path / ".gitignore").write_text("*.log\n")
    (tmp_path / ".dockerignore").write_text("*\n!a.log\n!b.tmp\n!.venv\n")
    assert [file.path for file in collect(tmp_path, ["*.tmp"], tmp_path / ".dockerignore").files] == []
    (tmp_path / "bad").write_text("[a\n")
    with pytest.raises(InvalidValueError, match=r"\[a"):
        collect(tmp_path, (), tmp_path / "bad")
    assert "c" in [file.path for file in collect(tmp_path, (), tmp_path / "none").files]
