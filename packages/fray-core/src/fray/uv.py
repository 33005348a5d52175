"""What backends ask of uv: where it is, what it runs in, and what a project's lock says.

uv itself comes with the backends that use it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["export_lock", "find_uv", "has_dependencies", "make_lock", "uv_environment"]


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
    from fray.errors import InvalidValueError

    if not (project / "uv.lock").is_file():
        raise InvalidValueError(
            f"extras need a uv.lock in the working directory, and {project} has none: run `uv lock` there"
        )
    arguments = ["export", "--frozen", "--quiet", "--no-header", "--no-annotate", *options]
    for extra in extras:
        arguments += ["--extra", extra]
    what = f"extras {', '.join(extras)} of {project}" if extras else f"the lock of {project}"
    return _run(project, arguments, what)


def has_dependencies(project: Path, extras: Sequence[str] = ()) -> bool:
    """Whether a project's `pyproject.toml` names packages that a lock would have.

    Raises:
        InvalidValueError: It is no TOML.
    """
    import tomllib

    from fray.errors import InvalidValueError

    try:
        content = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as error:
        raise InvalidValueError(f"{project / 'pyproject.toml'} is not valid TOML: {error}") from None
    table = content.get("project", {})
    return bool(table.get("dependencies") or (extras and table.get("optional-dependencies")))


def make_lock(project: Path) -> None:
    """Write the `uv.lock` of a project, as any command of uv's in it does that needs one.

    Raises:
        InvalidValueError: There is no solution, or the directory cannot be written to.
    """
    _run(project, ["lock", "--quiet"], f"the dependencies of {project} cannot be locked")


def _run(project: Path, arguments: list[str], what: str) -> str:
    import subprocess

    from fray.errors import InvalidValueError

    # Said, as UV_PROJECT in the user's environment would otherwise have another project meant.
    command = [find_uv(), *arguments[:1], "--project", str(project.absolute()), *arguments[1:]]
    done = subprocess.run(
        command, cwd=project, env=uv_environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode != 0:
        raise InvalidValueError(f"{what}: {done.stderr.strip()}")
    return done.stdout
