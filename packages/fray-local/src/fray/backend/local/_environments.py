"""The Python environments of jobs with packages: made by uv, named by what determines them, shared by jobs.

`package_requirements` make an overlay on the base interpreter: its own site-packages first, then the base's.
`extras` make an isolated environment of what the project's uv lock says. An environment is built beside its place and
renamed into it, under a lock, so that a killed preparation is never used and ten jobs at once prepare one.

Part of the preparer: what this imports, each first job of an environment waits for.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["EnvironmentPlan", "build_environment"]


class EnvironmentPlan(NamedTuple):
    """An environment, by what determines it.

    Attributes:
        uv: The path of the uv that makes it.
        key: A digest of all of what follows.
        directory: Where the environment is, or will be.
        python: The base interpreter's executable.
        requirements: The content of uv's requirements file.
        constraints: The content of uv's constraints file.
        overlays: The base's site folders that shine through; none for an isolated environment.
        project: The directory that paths in the requirements start from.
        title: What it holds, for messages.
    """

    uv: str
    key: str
    directory: str
    python: str
    requirements: str
    constraints: str
    overlays: tuple[str, ...]
    project: str
    title: str

    @property
    def python_path(self) -> Path:
        """The environment's own interpreter."""
        return Path(self.directory) / "bin" / "python"

    @property
    def is_ready(self) -> bool:
        """Whether it has been made."""
        return Path(self.directory).is_dir()


def build_environment(
    plan: EnvironmentPlan, log: int, say: Callable[[str], None], run: Callable[[list[str], str, int], int]
) -> bool:
    """Make the environment unless it is there; whoever comes second waits for the first.

    Args:
        plan: Which one.
        log: A descriptor for uv's output.
        say: Is told what is being done.
        run: Runs a command in a directory, its output to a descriptor, and returns its exit code.

    Returns:
        Whether it is there. Where it is not, uv's output says why.
    """
    place = Path(plan.directory)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(f"{place}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another job that prepares the same environment")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if plan.is_ready:
            return True
        say(f"preparing the environment: {plan.title}")
        for name in os.listdir(place.parent):
            if name.startswith(f".{plan.key}-"):
                _remove(place.parent / name)  # of a preparation that was killed; we hold the lock
        staging = place.parent / f".{plan.key}-{os.urandom(4).hex()}"
        try:
            if not _build(plan, staging, log, run):
                return False
            os.rename(staging, place)
        finally:
            if staging.exists():
                _remove(staging)
        return True
    finally:
        os.close(lock)


def _build(plan: EnvironmentPlan, staging: Path, log: int, run: Callable[[list[str], str, int], int]) -> bool:
    made = run(
        [plan.uv, "venv", "--quiet", "--no-project", "--relocatable", "--python", plan.python, str(staging)], "/", log
    )
    if made != 0:
        return False
    notes = staging / "fray"
    notes.mkdir()
    (notes / "requirements.txt").write_text(plan.requirements)
    (notes / "constraints.txt").write_text(plan.constraints)
    command = [plan.uv, "pip", "install", "--python", str(staging / "bin" / "python")]
    command += ["-r", str(notes / "requirements.txt"), "-c", str(notes / "constraints.txt")]
    if run(command, plan.project if not plan.overlays else "/", log) != 0:
        return False
    if plan.overlays:
        # addsitedir, not a plain path: the base's own .pth files and editable installs count too.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in plan.overlays]
        (next(staging.glob("lib/python*/site-packages")) / "_fray_base.pth").write_text("".join(lines))
    return True


def _remove(directory: Path) -> None:
    import shutil

    shutil.rmtree(directory, ignore_errors=True)
