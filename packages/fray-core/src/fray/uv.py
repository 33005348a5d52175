"""What backends ask of uv: where it is, what it runs in, and what a project's lock says.

uv itself comes with the backends that use it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["export_lock", "find_uv", "uv_environment"]


@cache
def find_uv() -> str:
    """Return the path of the uv that came with the backend."""
    from uv import find_uv_bin

    return find_uv_bin()


def uv_environment() -> dict[str, str]:
    """The environment that uv runs in: the user's, with the system's certificates unless they said otherwise."""
    environment = dict(os.environ)
    if not {"UV_SYSTEM_CERTS", "UV_NATIVE_TLS"} & environment.keys():
        environment["UV_SYSTEM_CERTS"] = "1"
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME"):
        environment.pop(name, None)
    return environment


def export_lock(project: Path, extras: Sequence[str], options: Sequence[str] = ()) -> str:
    """Return the requirements that a project's uv lock gives, without development dependencies, one a line.

    Args:
        project: The directory with the lock.
        extras: Which extras to add.
        options: More options of `uv export`.

    Raises:
        InvalidValueError: There is no lock, or none of these extras.
    """
    import subprocess

    from fray.errors import InvalidValueError

    if not (project / "uv.lock").is_file():
        raise InvalidValueError(
            f"extras need a uv.lock in the working directory, and {project} has none: run `uv lock` there"
        )
    # Said, as UV_PROJECT in the user's environment would otherwise have another project's lock exported.
    command = [find_uv(), "export", "--project", str(project.absolute())]
    command += ["--frozen", "--quiet", "--no-header", "--no-annotate", *options]
    for extra in extras:
        command += ["--extra", extra]
    done = subprocess.run(
        command, cwd=project, env=uv_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        what = f"extras {', '.join(extras)} of {project}" if extras else f"the lock of {project}"
        raise InvalidValueError(f"{what}: {done.stderr.strip()}")
    return done.stdout
