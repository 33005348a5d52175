"""What the options of a Docker cluster say of every job's container."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fray.errors import InvalidTypeError, InvalidValueError

__all__ = ["ContainerOptions", "Mount", "read_mounts"]


@dataclass(frozen=True)
class Mount:
    """Something of the engine's machine that a job sees.

    Attributes:
        source: A path on the engine's machine, or the name of a volume.
        target: The absolute path in the container.
        read_only: Whether the job may only read it.
    """

    source: str
    target: str
    read_only: bool = False

    def __post_init__(self) -> None:
        if not self.source or not self.target.startswith("/"):
            raise InvalidValueError(
                f"mounts: a source and an absolute path in the container, not {self.source!r} and {self.target!r}"
            )
        if self.kind == "volume" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]+", self.source):
            raise InvalidValueError(
                f"mounts: {self.source!r} is neither an absolute path on the engine's machine nor the name of a volume"
            )

    @property
    def kind(self) -> Literal["bind", "volume"]:
        """A path of the machine, or a volume of the engine."""
        return "bind" if self.source.startswith("/") else "volume"


@dataclass(frozen=True)
class ContainerOptions:
    """What the cluster's options say of every job's container; see `DockerClusterContext`."""

    mounts: tuple[Mount, ...] = ()
    network: str | None = None
    shm_bytes: int = 2 * 1024**3
    grace_seconds: float = 10.0


def read_mounts(mounts: Iterable[Mount | str | Mapping[str, Any]]) -> tuple[Mount, ...]:
    """Return mounts from what users write: a `Mount`, `SOURCE:TARGET[:ro]`, or a table with a mount's fields."""
    if isinstance(mounts, (str, Mapping)):
        raise InvalidTypeError("mounts must be a list, such as ['/data:/data:ro']")
    found = []
    for mount in mounts:
        if isinstance(mount, str):
            source, _, rest = mount.partition(":")
            target, _, mode = rest.partition(":")
            if mode not in ("", "ro", "rw"):
                raise InvalidValueError(f"mounts: write SOURCE:TARGET or SOURCE:TARGET:ro, not {mount!r}")
            mount = Mount(source, target, mode == "ro")
        elif isinstance(mount, Mapping):
            if not {"source", "target"} <= mount.keys() <= {"source", "target", "read_only"}:
                raise InvalidValueError(f"mounts: a table of source, target and read_only, not {dict(mount)!r}")
            mount = Mount(**mount)
        elif not isinstance(mount, Mount):
            raise InvalidTypeError(f"mounts must be Mount or strings, got {type(mount).__name__}")
        found.append(mount)
    return tuple(found)
