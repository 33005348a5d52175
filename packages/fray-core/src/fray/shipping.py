"""The light part of Fray that travels into every job, so that `from fray import get_job_context` works there.

It holds fray-core's modules without the command and the test suites, those of a backend that has a job context of its
own, and the dist-info by which entry points are found. Each backend puts it on the job's `PYTHONPATH`; no package index
is asked, and the version is the client's.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from functools import cache
from pathlib import Path

__all__ = ["light_part", "write_light_part"]

_LEFT_OUT = ("fray/cli", "fray/testing")


@cache
def light_part(distributions: Sequence[str] = ("fray-core",)) -> dict[str, bytes]:
    """Return the files of the light part: path below a `PYTHONPATH` entry → content.

    Args:
        distributions: fray-core, and whatever holds the backend's own job context.
    """
    from importlib.metadata import distribution
    from importlib.util import find_spec

    files: dict[str, bytes] = {}
    core = Path(__file__).parent
    for path in sorted(core.rglob("*.py")):
        name = f"fray/{path.relative_to(core).as_posix()}"
        if not name.startswith(_LEFT_OUT) and path.parent in (core, core / "backend"):
            files[name] = path.read_bytes()
    for name in distributions:
        installed = distribution(name)
        folder = f"{name.replace('-', '_')}-{installed.version}.dist-info"
        for member in ("METADATA", "entry_points.txt"):
            files[f"{folder}/{member}"] = (installed.read_text(member) or "").encode()
        modules = {entry.value.partition(":")[0] for entry in installed.entry_points}
        for package in {".".join(module.split(".")[:3]) for module in modules if module.startswith("fray.backend.")}:
            spec = find_spec(package)
            for location in (spec and spec.submodule_search_locations) or ():
                for path in sorted(Path(location).rglob("*.py")):
                    files[f"{package.replace('.', '/')}/{path.relative_to(location).as_posix()}"] = path.read_bytes()
    return files


def write_light_part(parent: Path) -> Path:
    """Write the light part below `parent` unless it is there, and return its directory, named by its content.

    Safe against others doing the same at once, and against being killed on the way.
    """
    directory = parent / _digest()
    if directory.is_dir():
        return directory
    staging = parent / f".{secrets.token_hex(8)}"
    for name, content in light_part().items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        with (staging / name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave empty files under a name that is trusted
    try:
        os.rename(staging, directory)
    except OSError:
        if not directory.is_dir():
            raise
        import shutil

        shutil.rmtree(staging)  # somebody else was first with the same
    return directory


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for name, content in sorted(light_part().items()):
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:24]
