"""Which environment a job needs: determined when it is submitted, so that nothing that changes later changes it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from fray.backend.local._environments import EnvironmentPlan
from fray.backend.local._interpreters import Interpreter, normalized
from fray.uv import export_lock, find_uv

__all__ = ["plan_environment"]

# What of the user's environment changes what uv resolves to.
_UV_SETTINGS = re.compile(
    r"UV_(INDEX|DEFAULT_INDEX|EXTRA_INDEX|FIND_LINKS|TORCH_BACKEND|CONSTRAINT|OVERRIDE|EXCLUDE|PRERELEASE|RESOLUTION"
    r"|NO_BINARY|NO_BUILD|NO_INDEX|CONFIG_FILE|NO_CONFIG)"
)


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
        lines = export_lock(project, extras, ["--no-dev"]) + lines
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
        find_uv(), key, str(cache_directory / key), base.executable, lines, constraints, overlays, str(project), title
    )


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
