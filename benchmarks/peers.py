"""The peers, in an environment of their own, each in a process of its own that is told over a pipe what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.measuring import Settings

__all__ = ["Peer", "peer_python", "peer_versions", "uv", "uv_environment"]

_HERE = Path(__file__).parent
_REQUIREMENTS = _HERE / "peers.txt"
_ENVIRONMENT = _HERE.parent / ".cache" / "bench-peers"


@dataclass(frozen=True)
class _Installed:
    python: str | None
    problem: str = ""


def uv() -> str:
    """Return the path of the project's uv."""
    from uv import find_uv_bin

    return find_uv_bin()


def uv_environment() -> dict[str, str]:
    """Return the environment that uv runs in here; the system's certificates count unless the user said otherwise."""
    kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    return {"UV_SYSTEM_CERTS": "1", **kept}


def peer_python(settings: Settings) -> tuple[str | None, str]:
    """Return the Python that has the peers, installed on the first call; else None, and why."""
    if not settings.peers:
        return None, "peers are left out"
    installed = _install()
    return installed.python, installed.problem


def peer_versions() -> dict[str, str]:
    """Return the pinned versions of the peers themselves."""
    lines = (line.partition("==") for line in _REQUIREMENTS.read_text().splitlines())
    return {name: version for name, _, version in lines if name in ("submitit", "torchx")}


@cache
def _install() -> _Installed:
    python = _ENVIRONMENT / "bin" / "python"
    mark = _ENVIRONMENT / "installed.txt"
    wanted = f"{sys.version}\n{_REQUIREMENTS.read_text()}"
    if mark.exists() and mark.read_text() == wanted:
        return _Installed(str(python))
    print("installing the peers (once)", file=sys.stderr)
    make = [uv(), "venv", "--quiet", "--clear", "--no-project", "--python", sys.executable, str(_ENVIRONMENT)]
    fill = [uv(), "pip", "install", "--quiet", "--python", str(python), "-r", str(_REQUIREMENTS)]
    for command in (make, fill):
        done = subprocess.run(command, env=uv_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no word from uv"]
            return _Installed(None, f"the peers could not be installed: {said[0].strip()}")
    mark.write_text(wanted)
    return _Installed(str(python))


class Peer:
    """A peer's warm process. Each request is one line of JSON to it, each answer one from it.

    Args:
        name: Which of `peer_worker.py`.
        python: The peers' own.
        scratch: Where its directory is made.
        arguments: What it needs to know beside.
        environment: Variables beside this process's.
    """

    def __init__(
        self, name: str, python: str, scratch: Path, *arguments: str, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name = name
        self._scratch = scratch / f"peer-{name}"
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._trouble = (self._scratch / "stderr").open("w+")
        process = subprocess.Popen(
            [python, str(_HERE / "peer_worker.py"), name, str(self._scratch), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._trouble,
            text=True,
            cwd=self._scratch,
            env={**os.environ, **(environment or {})},
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout

    def measure(self, jobs: int) -> float:
        """Return the seconds from the submission of so many jobs, or builds, until all are known to be over."""
        self._requests.write(json.dumps({"jobs": jobs}) + "\n")
        self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            self._trouble.seek(0)
            raise RuntimeError(f"the worker of {self.name} died: {self._trouble.read()[-2000:]}")
        return float(json.loads(answer)["seconds"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._requests.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._trouble.close()
