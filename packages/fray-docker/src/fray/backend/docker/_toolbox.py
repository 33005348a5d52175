"""What every job's container is given: the runner, and the light part of Fray, in a volume that is mounted at `/.fray`.

The volume is filled once for each engine and version of Fray, from an image of a few hundred kilobytes that is
imported into the engine (no client's disk is mounted, so the engine may be anywhere). The same image is what
stands in for a job while its own image is being prepared.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

from docker.errors import APIError, ImageNotFound
from fray.backend.docker._engine import Engine
from fray.errors import PlatformError
from fray.shipping import light_part

__all__ = ["LIGHT_PART", "MOUNT_POINT", "RUNNER", "Toolbox", "is_missing_runner"]

MOUNT_POINT = "/.fray"
RUNNER = f"{MOUNT_POINT}/runner"
LIGHT_PART = f"{MOUNT_POINT}/light"

_ARCHITECTURES = {"amd64": "amd64", "x86_64": "amd64", "arm64": "arm64", "aarch64": "arm64"}


class Toolbox:
    """The tools in one engine; made there when they are first needed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._content = _content(_architecture(engine))
        name = hashlib.sha256(self._content).hexdigest()[:16]
        self.image = f"fray-runner:{name}"
        self.volume = f"fray-runner-{name}"
        self._has_volume = False

    def mount(self) -> dict[str, object]:
        """Return the mount of a job's container, as the engine's API has it."""
        return {
            "Type": "volume",
            "Source": self.volume,
            "Target": MOUNT_POINT,
            "ReadOnly": True,
            "VolumeOptions": {"NoCopy": True},
        }

    def ensure_volume(self) -> None:
        """Have the volume there, by a look at its name alone: that its runner is missing shows when a job starts."""
        if self._has_volume:
            return
        with self._engine.errors():
            known = self._engine.api.volumes(filters={"name": self.volume})["Volumes"] or []
        if self.volume not in [volume["Name"] for volume in known]:
            self.fill_volume()
        self._has_volume = True

    def fill_volume(self) -> None:
        """Fill the volume, whatever is in it; others may do the same at once, and containers may be running on it."""
        self.ensure_image()
        api = self._engine.api
        with self._engine.errors():
            api.create_volume(self.volume, labels={"fray.toolbox": "1"})
            mount = {"Type": "volume", "Source": self.volume, "Target": MOUNT_POINT}
            filler = api.create_container_from_config(
                {
                    "Image": self.image,
                    "Entrypoint": [RUNNER],
                    "Labels": {"fray.toolbox": "1"},
                    "HostConfig": {"Mounts": [mount], "NetworkMode": "none"},
                }
            )
            # An empty volume gets what the image has there; what a fill left behind that was cut off, only this mends.
            api.put_archive(filler["Id"], "/", self._content)
            api.remove_container(filler["Id"])

    def ensure_image(self) -> None:
        """Have the image there."""
        with self._engine.errors():
            try:
                self._engine.api.inspect_image(self.image)
                return
            except ImageNotFound:
                pass
            repository, _, tag = self.image.partition(":")
            answer = self._engine.api.import_image_from_data(
                self._content, repository=repository, tag=tag, changes=["LABEL fray.toolbox=1"]
            )
        if '"error"' in answer:
            raise PlatformError(f"the engine at {self._engine.endpoint.host} did not import {self.image}: {answer}")


def is_missing_runner(error: APIError) -> bool:
    """Whether a container could not be started for want of what is in the volume."""
    said = str(error.explanation)
    return RUNNER in said


def _architecture(engine: Engine) -> str:
    said = engine.version.get("Arch", "")
    if engine.version.get("Os", "linux") != "linux" or said not in _ARCHITECTURES:
        raise PlatformError(
            f"the engine at {engine.endpoint.host} runs on {engine.version.get('Os')}/{said}; Fray has a runner for "
            f"linux on {' and '.join(sorted(set(_ARCHITECTURES.values())))}"
        )
    return _ARCHITECTURES[said]


@cache
def _content(architecture: str) -> bytes:
    """The image's file system, the same bytes each time."""
    runner = files("fray.backend.docker").joinpath("runner", f"fray-runner-{architecture}").read_bytes()
    return _tar(
        {
            RUNNER.lstrip("/"): runner,
            **{f"{LIGHT_PART}/{name}".lstrip("/"): content for name, content in light_part().items()},
        },
        executable={RUNNER.lstrip("/")},
    )


def _tar(content: Mapping[str, bytes], executable: set[str]) -> bytes:
    folders = sorted({str(parent) for name in content for parent in _parents(name)})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
        for name in sorted(content):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content[name]), 0o755 if name in executable else 0o644
            archive.addfile(entry, io.BytesIO(content[name]))
    return buffer.getvalue()


def _parents(name: str) -> list[str]:
    parts = name.split("/")[:-1]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]
