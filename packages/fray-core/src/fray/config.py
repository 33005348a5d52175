"""Named clusters: `[tool.fray]` of the nearest `pyproject.toml` that has it, or the same tables in a `fray.toml`.

```toml
[tool.fray]
default = "pod"

[tool.fray.clusters.pod]
backend = "ray"
address = "http://head:8265"
# every other key is an option of the backend
```
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fray.errors import InvalidValueError

__all__ = ["ClusterConfig", "FrayConfig", "find_config"]


@dataclass(frozen=True)
class ClusterConfig:
    """One named cluster: its backend, where it is, and the backend's options."""

    backend: str
    address: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FrayConfig:
    """What a project says of its clusters; empty where no file does."""

    default: str | None = None
    clusters: dict[str, ClusterConfig] = field(default_factory=dict)
    path: Path | None = None


def find_config(start: Path | None = None) -> FrayConfig:
    """Read the configuration that holds in `start` (default: the current directory), looking upwards.

    Raises:
        InvalidValueError: The file is no TOML, or says what cannot be.
    """
    try:
        directory = (start or Path()).absolute()
    except FileNotFoundError:
        return FrayConfig()  # the current directory has been removed: nothing is configured there
    for folder in (directory, *directory.parents):
        for path in (folder / "fray.toml", folder / "pyproject.toml"):
            if (table := _read(path)) is not None:
                return _check(table, path)
    return FrayConfig()


def _read(path: Path) -> dict[str, Any] | None:
    """Return the file's table of Fray's, None where there is no file or no such table."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    if path.name == "pyproject.toml" and "fray" not in text:
        return None  # most files: not worth importing a parser for
    import tomllib

    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidValueError(f"{path} is not valid TOML: {error}") from None
    if path.name == "fray.toml":
        return content
    table = content.get("tool", {}).get("fray")
    return table if isinstance(table, dict) else None


def _check(table: dict[str, Any], path: Path) -> FrayConfig:
    from pydantic import TypeAdapter, ValidationError, with_config

    @dataclass(frozen=True)
    @with_config(extra="forbid")
    class Table:
        default: str | None = None
        clusters: dict[str, dict[str, Any]] = field(default_factory=dict)

    try:
        checked = TypeAdapter(Table).validate_python(table)
        clusters = {
            name: ClusterConfig(
                backend=TypeAdapter(str).validate_python(keys.get("backend"), strict=True),
                address=TypeAdapter(str | None).validate_python(keys.get("address"), strict=True),
                options={key: value for key, value in keys.items() if key not in ("backend", "address")},
            )
            for name, keys in checked.clusters.items()
        }
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"]) or "a cluster's backend or address"
        raise InvalidValueError(f"{path}: [tool.fray] {where}: {detail['msg']}") from None
    return FrayConfig(checked.default, clusters, path)
