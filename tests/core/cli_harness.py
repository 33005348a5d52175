"""The `fray` command as its users meet it: a process of its own, in a pipe or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fray

DEADLINE_SECONDS = 60.0


class Command:
    """Runs the command against a store of its own, in an environment without anything of Fray's."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.spec = f"local:{self.store}"
        self.project = directory / "project"
        self.project.mkdir()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("DOCKER_", "FRAY_", "VIRTUAL_ENV"))
        }
        self.environment |= {
            "XDG_STATE_HOME": str(directory / "state"),
            "XDG_CACHE_HOME": str(directory / "cache"),
            "FRAY_CLUSTER": self.spec,
            "TERM": "xterm",
        }

    def __call__(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run it to its end in pipes."""
        return subprocess.run(
            self._line(arguments),
            cwd=self.project,
            env={**self.environment, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )

    def json(self, *arguments: str, env: dict[str, str] | None = None) -> Any:
        """Run it with `--json` and return the one document on its standard output."""
        name, *rest = arguments
        return json.loads(self(name, "--json", *rest, env=env).stdout)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start it in a session of its own, as a shell's foreground job would be that Ctrl-C reaches."""
        return subprocess.Popen(
            self._line(arguments),
            cwd=self.project,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        )

    def on_terminal(self, *arguments: str, when_seen: dict[str, Callable[[], object]] | None = None) -> tuple[int, str]:
        """Run it to its end on a terminal of 100 columns; return the exit code and all that the screen was sent.

        What stands in `when_seen` is called once its text has been on the screen.
        """
        awaited = dict(when_seen or {})
        ours, theirs = pty.openpty()
        with subprocess.Popen(
            self._line(arguments),
            cwd=self.project,
            env={**self.environment, "COLUMNS": "100"},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=_heed_interrupts,
        ) as process:
            os.close(theirs)
            screen = b""
            try:
                while chunk := _read(ours):
                    screen += chunk
                    for text in [text for text in awaited if text.encode() in screen]:
                        awaited.pop(text)()
            finally:
                os.close(ours)
            return process.wait(DEADLINE_SECONDS), screen.decode()

    def submit(self, *arguments: str) -> str:
        """Submit a job and return its id."""
        done = self("submit", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def cluster(self) -> fray.ClusterContext:
        """The same cluster by the library."""
        return fray.connect(self.spec)

    def stop_all(self) -> None:
        """Leave no job behind."""
        with self.cluster() as cluster:
            for info in cluster.list_jobs():
                cluster.delete_job(info.id)
            for info in cluster.list_jobs():
                cluster.wait(info.id, DEADLINE_SECONDS)

    def _line(self, arguments: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", "fray.cli", *arguments]


def read_until(process: subprocess.Popen[bytes], stream: Any, text: bytes) -> bytes:
    """Read a stream of the process until `text` has come; its end or the deadline is a failure."""
    seen, deadline = b"", time.monotonic() + DEADLINE_SECONDS
    while text not in seen:
        ready, _, _ = select.select([stream], [], [], max(0.0, deadline - time.monotonic()))
        chunk = os.read(stream.fileno(), 65536) if ready else b""
        assert chunk, f"{text!r} never came; there was {seen!r}, exit code {process.poll()}"
        seen += chunk
    return seen


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C."""
    os.killpg(process.pid, signal.SIGINT)


def install_command(
    folder: Path, name: str, source: str, *, distribution: str = "fray-extra", group: str = "fray.commands"
) -> None:
    """Put a distribution with one entry point into a folder for the `PYTHONPATH`, as an installer would."""
    module = f"{distribution.replace('-', '_')}_{name.replace('-', '_')}"
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{distribution.replace('-', '_')}-1.2.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2.3\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {module}:app\n")
    (info / "RECORD").write_text("")


def _heed_interrupts() -> None:
    """Undo what a shell does to its background jobs, of which this test run may be one: they ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(descriptor: int) -> bytes:
    ready, _, _ = select.select([descriptor], [], [], DEADLINE_SECONDS)
    assert ready, "the command says nothing and does not end"
    try:
        return os.read(descriptor, 65536)
    except OSError:  # Linux's word for: the other end of the terminal is closed
        return b""
