"""What a job wrote to `$FRAY_OUTPUT_DIR`, fetched file by file through Ray's log service."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from fray.backend.ray._record import KnownJob
from fray.backend.ray._rest import HttpError, RayRest
from fray.errors import PlatformError
from fray.state import replacing

__all__ = ["fetch_outputs"]


def fetch_outputs(rest: RayRest, job: KnownJob, destination: Path) -> list[Path]:
    """Copy a job's outputs below a directory, each file in place of what is there under its name.

    Raises:
        PlatformError: The job's node is gone.
        OSError: The destination cannot be written to.
    """
    node, fetched = job.details.driver_node_id, []
    if job.submission is None or not node:
        return []
    try:
        names = rest.list_files(node, f"{job.folder}/outputs/**/*")
    except PlatformError as error:
        raise PlatformError(
            f"the outputs of job {job.info.id} cannot be read: they are on node {node}, which is gone or does not "
            f"answer ({error})"
        ) from error
    destination.mkdir(parents=True, exist_ok=True)
    for name in names:
        copy = destination / PurePosixPath(name).relative_to(f"{job.folder}/outputs")
        if name.endswith("/"):
            copy.mkdir(parents=True, exist_ok=True)
        elif _fetch(rest, node, name, copy):
            fetched.append(copy)
    return sorted(fetched)


def _fetch(rest: RayRest, node: str, name: str, copy: Path) -> bool:
    """Fetch one file; False where a running job has just removed it."""
    try:
        with replacing(copy) as new, new.open("wb") as file:
            for chunk in rest.read_file(node, name):
                file.write(chunk)
        return True
    except HttpError as error:
        if "not found" not in error.text:
            raise
        return False
