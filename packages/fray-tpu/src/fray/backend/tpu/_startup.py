"""The startup script of a slice's hosts: installs Ray and hands over to the agent (`_agent.py`), which it brings along.

What is of one slice stands at the top of the script as plain assignments; the rest (`_startup.sh`) is the same for all.
The script is metadata of the slice, so whoever may read the slice may read it, and there is no secret in it: Ray's
token is named, as a secret in Secret Manager, and each host fetches it with its service account. Pushing the token over
SSH would need a client that is there whenever a host boots, also after a repair at night.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fray.errors import InvalidTypeError, InvalidValueError
from fray.tpu import tpu_type

__all__ = ["RayJoin", "startup_script"]

# Google's limit for one value of metadata.
_LARGEST_SCRIPT_BYTES = 256 * 1024
_UV_REQUIREMENT = "uv>=0.9"

_ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:]+\]):(?P<port>\d{1,5})")
_RAY_VERSION = re.compile(r"\d+\.\d+(\.\w+)*")
_PYTHON_VERSION = re.compile(r"3\.\d{1,2}(\.\d{1,2})?")
_SECRET = re.compile(r"projects/[^/\s]+(/locations/[^/\s]+)?/secrets/[\w-]+(?P<version>/versions/[\w-]+)?")
_LOOPBACK = re.compile(r"localhost|127\.\d+\.\d+\.\d+|\[::1\]")


@dataclass(frozen=True)
class RayJoin:
    """The Ray cluster that hosts join.

    Attributes:
        address: Of the head's GCS, such as `10.128.0.2:6379`, as the hosts reach it.
        ray_version: The head's: Ray refuses another.
        python_version: The head's, such as `3.11`: another minor version cannot work with it.
        token_secret: Where the cluster wants a token: the secret in Secret Manager that holds it,
            `projects/PROJECT/secrets/NAME`, the latest version unless one is named.
        packages: More requirements for the environment of Ray, such as `jax[tpu]`.

    Raises:
        InvalidTypeError: A field is of the wrong type.
        InvalidValueError: A value cannot be.
    """

    address: str
    ray_version: str
    python_version: str
    token_secret: str | None = None
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for what in ("address", "ray_version", "python_version"):
            if not isinstance(value := getattr(self, what), str):
                raise InvalidTypeError(f"{what}: {value!r} is no str")
        found = _ADDRESS.fullmatch(self.address)
        if found is None or not 0 < int(found["port"]) < 65536:
            hint = ""
            if self.address.startswith(("http:", "https:")):
                hint = " (that is the dashboard's address; hosts join the GCS, which `ray start --head` prints)"
            raise InvalidValueError(f"address: {self.address!r} is no HOST:PORT, as in 10.128.0.2:6379{hint}")
        if not _RAY_VERSION.fullmatch(self.ray_version):
            raise InvalidValueError(f"ray_version: {self.ray_version!r} is no version, as in 2.60.0")
        if not _PYTHON_VERSION.fullmatch(self.python_version):
            raise InvalidValueError(f"python_version: {self.python_version!r} is no version, as in 3.11")
        if self.token_secret is not None:
            if not isinstance(self.token_secret, str):
                raise InvalidTypeError(f"token_secret: {self.token_secret!r} is no str")
            if not _SECRET.fullmatch(self.token_secret):
                # Not quoted: somebody may have given the token itself.
                raise InvalidValueError(
                    "token_secret: write the name of a secret in Secret Manager, projects/PROJECT/secrets/NAME, "
                    "never the token itself"
                )
        packages = tuple(self.packages) if isinstance(self.packages, list | tuple) else None
        if packages is None or not all(isinstance(package, str) for package in packages):
            raise InvalidTypeError(f"packages: {self.packages!r} is no tuple of str")
        for package in packages:
            if not package.strip() or package.lstrip().startswith("-") or not package.isprintable():
                raise InvalidValueError(f"packages: {package!r} is no requirement")
        object.__setattr__(self, "packages", packages)

    @property
    def is_loopback(self) -> bool:
        """Whether only a process on the head's own machine could reach it there."""
        return _LOOPBACK.match(self.address) is not None

    @property
    def secret_version(self) -> str | None:
        """The secret's full name, its version included."""
        if self.token_secret is None:
            return None
        found = _SECRET.fullmatch(self.token_secret)
        assert found is not None
        return self.token_secret + ("" if found["version"] else "/versions/latest")


def startup_script(
    accelerator_types: str | Sequence[str],
    join: RayJoin | None = None,
    *,
    lease_seconds: float | None = None,
    time_to_live_seconds: float | None = None,
    setup: str | None = None,
) -> str:
    """Return the startup script of a slice's hosts.

    Args:
        accelerator_types: What the slice is, or may come to be.
        join: The Ray cluster to join; None for hosts that join none.
        lease_seconds: How long the lease is renewed for while Ray runs something on the slice; None for not at all.
        time_to_live_seconds: When the hosts delete their own group, counted from when the slice was made; None for
            never. Their service account needs `tpu.nodes.get`, `tpu.nodes.delete` and `tpu.queuedResources.delete`.
        setup: A script of the user's that runs before Ray is joined, with the interpreter of its first line.

    Raises:
        InvalidValueError: There is no such type, a value cannot be, or the script is larger than metadata may be.
    """
    names = [accelerator_types] if isinstance(accelerator_types, str) else accelerator_types
    chips = {kind.name: kind.chips_per_host for kind in map(tpu_type, names)}
    for what, seconds in (("lease_seconds", lease_seconds), ("time_to_live_seconds", time_to_live_seconds)):
        if seconds is not None and not seconds > 0:
            raise InvalidValueError(f"{what}: {seconds} is not above 0")
    if setup is not None and not setup.startswith("#!"):
        raise InvalidValueError("setup: its first line has to say what runs it, such as #!/bin/bash")
    if setup is not None and "\0" in setup:
        raise InvalidValueError("setup: a script cannot have a NUL in it")
    settings = {
        "chips": chips,
        "ray_address": join.address if join else None,
        "token_secret": join.secret_version if join else None,
        "lease_seconds": lease_seconds,
        "time_to_live_seconds": time_to_live_seconds,
    }
    requirements = [f"ray[default]=={join.ray_version}", *join.packages] if join else []
    script = f"""\
#!/usr/bin/env bash
# The startup script of a TPU slice, made by fray-tpu {version("fray-tpu")}.
#
# It installs uv and Ray below /opt/fray, and starts the agent that joins this host to the Ray cluster, keeps it joined,
# renews the slice's lease while it is in use, and leaves on a preemption notice. There are no secrets in here.
# Logs: journalctl -u google-startup-scripts -u fray-agent
set -euo pipefail

readonly uv_requirement={shlex.quote(_UV_REQUIREMENT)}
readonly ray_version={shlex.quote(join.ray_version if join else "")}
readonly python_version={shlex.quote(join.python_version if join else "")}
readonly requirements=({" ".join(map(shlex.quote, requirements))})
readonly has_setup={"true" if setup else "false"}

write_settings() {{
    cat <<'SETTINGS'
{json.dumps(settings, indent=2)}
SETTINGS
}}

write_setup() {{
    cat <<'{(end := _delimiter(setup or ""))}'
{(setup or "").rstrip(chr(10))}
{end}
}}

write_agent() {{
    cat <<'AGENT'
{_source("_agent.py")}AGENT
}}

{_source("_startup.sh")}"""
    if len(script.encode()) > _LARGEST_SCRIPT_BYTES:
        raise InvalidValueError(
            f"the startup script is {len(script.encode()):,} bytes, and Google takes {_LARGEST_SCRIPT_BYTES:,}: let "
            "the setup script download what it needs"
        )
    return script


def _delimiter(text: str) -> str:
    """Return a line that ends the text and is not in it."""
    end = "SETUP"
    while end in text.splitlines():
        end += "_"
    return end


def _source(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
