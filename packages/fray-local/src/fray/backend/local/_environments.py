"""The Python environments of jobs with packages: made by uv, named by what determines them, shared by jobs.

`package_requirements` make an overlay on the base interpreter: its own site-packages first, then the base's.
`extras` make an isolated environment of what the project's uv lock says. An environment is built beside its place and
renamed into it, under a lock, so that a killed preparation is never used and ten jobs at once prepare one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fray.backend.local._interpreters import Interpreter, normalized
from fray.errors import InvalidValueError

__all__ = ["EnvironmentPlan", "build_environment", "plan_environment"]

# What of the user's environment changes what uv resolves to.
_UV_SETTINGS = re.compile(
    r"UV_(INDEX|DEFAULT_INDEX|EXTRA_INDEX|FIND_LINKS|TORCH_BACKEND|CONSTRAINT|OVERRIDE|EXCLUDE|PRERELEASE|RESOLUTION"
    r"|NO_BINARY|NO_BUILD|NO_INDEX|CONFIG_FILE|NO_CONFIG)"
)


@dataclass(frozen=True)
class EnvironmentPlan:
    """An environment, by what determines it.

    Attributes:
        key: A digest of all of it.
        directory: Where the environment is, or will be.
        python: The base interpreter's executable.
        requirements: The content of uv's requirements file.
        constraints: The content of uv's constraints file.
        overlays: The base's site folders that shine through; none for an isolated environment.
        project: The directory that paths in the requirements start from.
        title: What it holds, for messages.
    """

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


def plan_environment(
    base: Interpreter,
    cache_directory: Path,
    *,
    requirements: list[str],
    extras: list[str],
    project: Path,
    variables: Mapping[str, str],
) -> EnvironmentPlan:
    """Determine the environment that a job needs, by its environment `variables` too. Nothing is made.

    Raises:
        InvalidValueError: `extras` without a uv lock in the project, or ones that it does not have.
    """
    lines, constraints, overlays = "\n".join(requirements) + "\n", "", base.site_folders
    if extras:
        lines = _export(project, tuple(extras)) + lines
        overlays = ()
    else:
        named = {normalized(re.split(r"[\s\[(@;<>=!~]", each.strip(), maxsplit=1)[0]) for each in requirements}
        # A local version (torch 2.1+cpu) is on no index; the public one of the same number matches it.
        constraints = "".join(
            f"{package.name}=={package.version.partition('+')[0]}\n"
            for package in sorted(base.installed(), key=lambda package: package.name)
            if package.from_index and package.name not in named
        )
    settings = {name: value for name, value in sorted(variables.items()) if _UV_SETTINGS.match(name)}
    parts = [
        base.executable,
        base.version,
        base.platform,
        base.installed_digest() if overlays else "",
        lines if extras else sorted(requirements),
        str(project) if extras else "",
        settings,
        [_local_content(each) for each in sorted(requirements)],
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    title = ", ".join([*(f"extra {extra}" for extra in extras), *requirements])
    return EnvironmentPlan(
        key, str(cache_directory / key), base.executable, lines, constraints, overlays, str(project), title
    )


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
        for left in place.parent.glob(f".{plan.key}-*"):
            shutil.rmtree(left, ignore_errors=True)  # of a preparation that was killed; we hold the lock
        staging = place.parent / f".{plan.key}-{secrets.token_hex(4)}"
        try:
            if not _build(plan, staging, log, run):
                return False
            os.rename(staging, place)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def uv_environment() -> dict[str, str]:
    """The environment that uv runs in: the user's, with the system's certificates unless they said otherwise."""
    environment = dict(os.environ)
    if not {"UV_SYSTEM_CERTS", "UV_NATIVE_TLS"} & environment.keys():
        environment["UV_SYSTEM_CERTS"] = "1"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    return environment


@cache
def find_uv() -> str:
    """Return the path of the uv that came with this package."""
    from uv import find_uv_bin

    return find_uv_bin()


def _build(plan: EnvironmentPlan, staging: Path, log: int, run: Callable[[list[str], str, int], int]) -> bool:
    uv = find_uv()
    made = run(
        [uv, "venv", "--quiet", "--no-project", "--relocatable", "--python", plan.python, str(staging)], "/", log
    )
    if made != 0:
        return False
    notes = staging / "fray"
    notes.mkdir()
    (notes / "requirements.txt").write_text(plan.requirements)
    (notes / "constraints.txt").write_text(plan.constraints)
    command = [uv, "pip", "install", "--python", str(staging / "bin" / "python")]
    command += ["-r", str(notes / "requirements.txt"), "-c", str(notes / "constraints.txt")]
    if run(command, plan.project if not plan.overlays else "/", log) != 0:
        return False
    if plan.overlays:
        # addsitedir, not a plain path: the base's own .pth files and editable installs count too.
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in plan.overlays]
        (next(staging.glob("lib/python*/site-packages")) / "_fray_base.pth").write_text("".join(lines))
    return True


def _export(project: Path, extras: tuple[str, ...]) -> str:
    """Return the requirements that the project's lock gives for the extras."""
    if not (project / "uv.lock").is_file():
        raise InvalidValueError(
            f"extras need a uv.lock in the working directory, and {project} has none: run `uv lock` there"
        )
    command = [find_uv(), "export", "--frozen", "--quiet", "--no-dev", "--no-header", "--no-annotate"]
    for extra in extras:
        command += ["--extra", extra]
    done = subprocess.run(
        command, cwd=project, env=uv_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise InvalidValueError(f"extras {', '.join(extras)} of {project}: {done.stderr.strip()}")
    return done.stdout


def _local_content(requirement: str) -> list[str]:
    """What changes when a requirement that is a local file or directory does."""
    url = requirement.partition("@")[2].partition(";")[0].strip()
    if not url.startswith("file:"):
        return []
    path = Path(unquote(urlsplit(url).path))
    files = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
    stamps = []
    for each in files:
        if not {".git", ".venv", "__pycache__"} & set(each.parts):
            stat = each.stat()
            stamps.append(f"{each}:{stat.st_size}:{stat.st_mtime_ns}")
    return stamps
