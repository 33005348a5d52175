"""The uv that builds use: one small image in the engine for each version and platform, so that no build sends it."""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fray.backend.docker._engine import Engine
from fray.errors import ImageBuildError
from fray.snapshot import TAR_TIME_SECONDS
from fray.uv import find_uv, uv_environment

__all__ = ["ensure_uv_image", "uv_image", "uv_version"]

_MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "arm": "armv7", "386": "i686", "ppc64le": "powerpc64le"}


@cache
def uv_version() -> str:
    """The version of the uv that came with this package."""
    from importlib.metadata import version

    return version("uv")


def uv_image(image_platform: str, base: str) -> str:
    """Return the name of the image that holds the uv for a platform, as `linux/amd64`, and a base image."""
    architecture = image_platform.split("/")[1]
    return f"fray/uv:{uv_version()}-{architecture}{'-musl' if _is_musl(base) else ''}"


def ensure_uv_image(
    engine: Engine, name: str, image_platform: str, base: str, on_progress: Callable[[str], None]
) -> None:
    """Put the image of `uv_image` into the engine, unless it is there.

    Raises:
        ImageBuildError: The uv of that platform cannot be had.
    """
    if engine.inspect_image(name) is not None:
        return
    on_progress("sending uv to the engine, once")
    machine = _MACHINES.get(image_platform.split("/")[1], image_platform.split("/")[1])
    here = {"arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if sys.platform == "linux" and here == machine and not _is_musl(base):
        binary = Path(find_uv()).read_bytes()
    else:
        binary = _fetch(f"{machine}-unknown-linux-{'musl' if _is_musl(base) else 'gnu'}")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as members:
        member = tarfile.TarInfo("uv")
        member.size, member.mode, member.mtime = len(binary), 0o755, TAR_TIME_SECONDS
        members.addfile(member, io.BytesIO(binary))
    repository, _, tag = name.rpartition(":")
    with engine.errors():
        engine.api.import_image_from_data(
            archive.getvalue(), repository=repository, tag=tag, changes=[f"LABEL fray.uv={uv_version()}"]
        )


def _is_musl(base: str) -> bool:
    return "alpine" in base or "musl" in base


def _fetch(target: str) -> bytes:
    with tempfile.TemporaryDirectory(prefix="fray-uv-") as folder:
        command = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        command += ["--target", folder, "--python-platform", target, f"uv=={uv_version()}"]
        done = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, env=uv_environment(), cwd=folder
        )
        if done.returncode != 0:
            raise ImageBuildError(f"the uv for {target}, which the build needs, cannot be had: {done.stderr.strip()}")
        return Path(folder, "bin", "uv").read_bytes() if os.path.exists(f"{folder}/bin/uv") else _inside(folder)


def _inside(folder: str) -> bytes:
    for path in Path(folder).rglob("uv"):
        if path.is_file():
            return path.read_bytes()
    raise ImageBuildError(f"the uv {uv_version()} of the package index has no binary in it")
