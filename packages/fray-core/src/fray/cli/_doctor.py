"""What `fray doctor` looks at. Each problem comes with what to do about it; one of them hides no other."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fray import plugins
from fray.cli._output import without_password
from fray.cli._plugin_commands import load_command
from fray.config import FrayConfig, find_config
from fray.errors import BackendConflictError, BackendNotFoundError, FrayError
from fray.types import mask_sensitive

__all__ = ["Check", "examine"]

_LOADERS: dict[str, Callable[[str], Any]] = {
    plugins.BACKENDS: plugins.load_backend,
    plugins.JOB_CONTEXTS: plugins.load_job_context,
    plugins.PROVISIONERS: plugins.load_provisioner,
    plugins.COMMANDS: load_command,
}
# What Fray reads or sets; a plugin's class has its own in `environment_variables`.
_VARIABLES = {"FRAY_CLUSTER", "FRAY_JOB_ID", "FRAY_OUTPUT_DIR", "FRAY_ATTEMPT", "FRAY_JOB_CONTEXT"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        ok: Whether it is as it should be.
        what: What was found.
        remedy: What to do where it is not.
    """

    ok: bool
    what: str
    remedy: str = ""


def examine(spec: str | None = None) -> Iterator[Check]:
    """Look at everything, and yield what is found as it is found.

    Args:
        spec: The one cluster to try; None tries the default and all that are configured.
    """
    yield Check(True, f"Python {platform.python_version()} at {sys.executable}")
    yield from _distributions()
    examined: list[tuple[str, str, Any]] = []
    variables = set(_VARIABLES)
    for group, load in _LOADERS.items():
        for plugin in plugins.list_plugins(group):
            check, loaded = _loads(group, plugin, load)
            yield check
            variables |= getattr(loaded, "environment_variables", frozenset())
            if group in (plugins.BACKENDS, plugins.PROVISIONERS) and hasattr(loaded, "doctor"):
                examined.append((plugins._KINDS[group], plugin.name, loaded))
    yield from _variables(variables)
    try:
        config = find_config()
    except FrayError as error:
        yield Check(False, str(error), "mend the file; docs/configuration.md shows what it may say")
        config = FrayConfig()
    else:
        named = ", ".join(sorted(config.clusters)) or "none"
        yield Check(True, f"configuration {config.path}, its clusters: {named}" if config.path else "no configuration")
    for kind, name, loaded in examined:
        yield from _own_checks(kind, name, loaded)
    specs = [spec] if spec is not None else [None, *(name for name in config.clusters if name != config.default)]
    for each in specs:
        yield _reaches(each)


def _distributions() -> Iterator[Check]:
    own = version("fray-core")
    yield Check(True, f"fray-core {own}")
    for distribution in sorted(set(plugins._FIRST_PARTY.values())):
        try:
            found = version(distribution)
        except PackageNotFoundError:
            continue
        yield Check(
            found == own,
            f"{distribution} {found}" + ("" if found == own else f", which is not made for fray-core {own}"),
            f"pip install --upgrade fray-core {distribution}",
        )


def _loads(group: str, plugin: plugins.Plugin, load: Callable[[str], Any]) -> tuple[Check, Any]:
    what = f"{plugins._KINDS[group]} {plugin.name!r} of {plugin.distribution}"
    names = [part.split()[0] for part in plugin.distribution.split(" and ")]
    try:
        loaded = load(plugin.name)
    except BackendConflictError as error:
        return Check(False, str(error), " or ".join(f"pip uninstall {name}" for name in names)), None
    except FrayError as error:
        again = f"pip install --upgrade --force-reinstall {names[0]}"
        return Check(False, str(error), f"{again}, or pip uninstall {names[0]}"), None
    return Check(True, f"{what} loads"), loaded


def _variables(known: set[str]) -> Iterator[Check]:
    for name, value in sorted(mask_sensitive(os.environ).items()):
        if name in known:
            yield Check(True, f"{name}={without_password(value)}")
        elif name.startswith("FRAY_"):
            # The value is not shown: whatever it is, Fray does not know how secret.
            yield Check(True, f"{name} is set, which Fray does not read (misspelt?)")


def _own_checks(kind: str, name: str, loaded: Any) -> Iterator[Check]:
    try:
        for ok, what, remedy in loaded.doctor():
            yield Check(ok, what, remedy)
    except Exception as error:
        yield Check(
            False,
            f"the checks of the {kind} {name!r} failed: {type(error).__name__}: {error}",
            f"report it to whoever makes that {kind}",
        )


def _reaches(spec: str | None) -> Check:
    title = "the default cluster" if spec is None else f"the cluster {without_password(spec)!r}"
    try:
        if spec is None:
            name, address, _ = plugins.resolve(None)
            title += f" ({without_password(name if address is None else f'{name}:{address}')})"
        with plugins.connect(spec) as cluster:
            cluster.list_jobs(limit=1)
            return Check(True, f"{title} can be reached at {without_password(cluster.spec)}")
    except BackendNotFoundError as error:
        return Check(False, f"{title} is not there", str(error))
    except FrayError as error:
        remedy = "see that it runs, that the address is right and that you may use it"
        return Check(False, f"{title} cannot be used: {without_password(str(error))}", remedy)
    except Exception as error:
        return Check(
            False,
            f"{title} cannot be used: {type(error).__name__}: {without_password(str(error))}",
            "report it to whoever makes that backend",
        )
