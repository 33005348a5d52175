"""A secret is looked for in everything that a run leaves on disk, prints, logs or shows to other processes."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

import fray
from fray.types import JobStatus, RuntimeEnv
from tests.wheels import make_wheel

# One after the other: each looks into all processes of the machine.
pytestmark = pytest.mark.xdist_group("secrets")

SECRET = "s3cret-4f1c-do-not-show"


def _files_with_secret(*roots: Path) -> list[str]:
    found = []
    for root in roots:
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and SECRET.encode() in path.read_bytes():
                found.append(str(path))
    return found


def _arguments_with_secret() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if SECRET in "\0".join(process.cmdline()):
                found.append(str(process))
        except psutil.Error:
            continue
    return found


def _processes_with_secret() -> set[str]:
    """The names of the processes that have it in their environment."""
    found = set()
    for process in psutil.process_iter():
        try:
            if SECRET in process.environ().values():
                found.add(process.name())
        except (psutil.Error, OSError):
            continue
    return found


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, a temporary directory and a cache that hold nothing but what the run leaves there."""
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "UV_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_the_sdk_shows_a_secret_nowhere(
    home: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("PASSPHRASE", "what the caller has under that name")
    env = RuntimeEnv(
        [make_wheel(tmp_path / "w", "tinypkg")],
        [fray.Resource("CPU", 1)],
        env={"RUST_LOG": "trace", "UV_LOG": "trace", "PYTHONVERBOSE": "1"},
        secrets={"PASSPHRASE": SECRET},
    )
    with fray.connect("local", grace_seconds=1) as cluster:
        job_id = cluster.create_job('echo ready; test "$PASSPHRASE" && sleep 600 & wait', env)
        assert next(line for line in cluster.stream_logs(job_id) if line == "ready")
        assert _processes_with_secret() <= {"sh", "sleep", "dash", "bash"}, "the command's processes have it, alone"
        assert _processes_with_secret()
        assert _arguments_with_secret() == []
        assert _files_with_secret(home, tmp_path) == []
        for shown in (cluster.get_job(job_id), cluster.list_jobs(), cluster.plan_job("true", env), env):
            assert SECRET not in repr(shown) + str(shown)
        cluster.delete_job(job_id)
        assert cluster.wait(job_id, 60).status is JobStatus.STOPPED
        for broken in (
            RuntimeEnv(["nothing @ file:///nowhere/n-1-py3-none-any.whl"], secrets={"PASSPHRASE": SECRET}),
            RuntimeEnv([], [fray.Resource("CPU", 1e6)], secrets={"PASSPHRASE": SECRET}),
        ):
            info = cluster.wait(cluster.create_job("true", broken), 60)
            assert info.status is JobStatus.FAILED
            assert SECRET not in repr(info) + cluster.get_logs(info.id)
    assert _files_with_secret(home, tmp_path) == []
    printed = capfd.readouterr()
    assert SECRET not in caplog.text + printed.out + printed.err


def test_the_command_shows_a_secret_nowhere(home: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    file = tmp_path.parent / f"{tmp_path.name}-secret"
    file.write_text(SECRET)
    variables = {**os.environ, "PASSPHRASE": SECRET}
    commands = [
        ["run", "--debug", "--secret", "PASSPHRASE", "--", 'test "$PASSPHRASE"'],
        [
            "run",
            "--debug",
            "--json",
            "--secret-file",
            f"OTHER={file}",
            "--job-id",
            "one",
            "--",
            'test "$OTHER"; exit 3',
        ],
        ["run", "--debug", "--secret-file", f"OTHER={file}", "--job-id", "one", "--", "another"],
        ["plan", "--debug", "--secret", "PASSPHRASE", "--", "true"],
        ["run", "--debug", "--secret", f"PASSPHRASE={SECRET}", "--", "true"],
        ["list", "--json", "--debug"],
        ["describe", "one", "--debug"],
        ["doctor", "--debug"],
    ]
    codes = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "fray.cli", *command],
            cwd=project,
            env=variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        codes.append(done.returncode)
        assert SECRET not in done.stdout + done.stderr, command
    assert codes[:5] == [0, 3, 2, 0, 2]
    file.unlink()
    # The user's own environment is handed to a local job, so it is the files and the arguments that count.
    assert _files_with_secret(home, tmp_path) == []
    assert _arguments_with_secret() == []


def test_an_exported_secret_reaches_the_command_and_not_its_supervisors(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSPHRASE", SECRET)
    with fray.connect("local", grace_seconds=1) as cluster:
        env = RuntimeEnv(secrets={"PASSPHRASE": SECRET})
        job_id = cluster.create_job('echo ready; test "$PASSPHRASE" && sleep 600 & wait', env)
        assert next(cluster.stream_logs(job_id)) == "ready"
        own = psutil.Process().name()
        assert _processes_with_secret() - {own} <= {"sh", "sleep", "dash", "bash"}
        cluster.delete_job(job_id)
        cluster.wait(job_id, 60)
