"""What some tests need of the machine. Where it is promised, its absence is a failure; elsewhere it is said loudly."""

from __future__ import annotations

import functools
import glob
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROMISED = set(filter(None, os.environ.get("FRAY_TESTS_REQUIRE", "").split(",")))


def missing(what: str, remedy: str) -> None:
    """End a test that cannot run here."""
    if what in PROMISED:
        pytest.fail(f"{what} was promised (FRAY_TESTS_REQUIRE) and is not here: {remedy}")
    pytest.skip(f"not tested here, for want of {what}: {remedy}")


def faketime_library() -> str:
    """The path of libfaketime."""
    for pattern in ("/usr/lib/*/faketime/libfaketime.so.1", "/usr/lib*/faketime/libfaketime.so.1"):
        for path in glob.glob(pattern):
            return path
    missing("faketime", "install libfaketime")
    raise AssertionError("unreachable")


@functools.cache
def _mount_namespace() -> tuple[str, ...]:
    for command in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            probe = [*command, "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
            if subprocess.run(probe, capture_output=True).returncode == 0:
                return command
        except FileNotFoundError:
            break
    return ()


def run_in_mount_namespace(program: str, directory: Path) -> str:
    """Run a Python program where it may mount file systems that nobody else sees; return what it printed."""
    command = _mount_namespace()
    if not command:
        missing("tmpfs", "needs Linux, and root or user namespaces")
    done = subprocess.run(
        [*command, sys.executable, "-c", textwrap.dedent(program), str(directory)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
