"""The Ray that is started on this machine where no cluster is named: once, shared, and gone with who started it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import fray
from fray.backend.ray import _local_ray
from fray.types import JobStatus

pytestmark = pytest.mark.xdist_group("ray")

# What an owner's process does; another is started meanwhile.
_OWNER = """
import fray, sys
cluster = fray.connect("ray")
print(cluster.spec, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Where this test's Ray keeps all that it has; a short path, for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="fl-", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    monkeypatch.chdir(tmp_path)
    yield folder
    for process in rays(folder):
        with suppress(psutil.Error):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def rays(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder) in " ".join(process.cmdline()) and process.status() != "zombie":
                found.append(process)
    return found


def until_gone(folder: Path) -> None:
    give_up = time.monotonic() + 60
    while left := rays(folder):
        assert time.monotonic() < give_up, f"still there: {left}"
        time.sleep(0.1)


def test_it_is_started_once_shared_and_ended_by_who_started_it(folder: Path) -> None:
    owner = fray.connect("ray")
    try:
        sharer = fray.connect("ray")
        assert sharer.spec == owner.spec
        job_id = owner.create_job('python -c "import sys; print(sys.executable)"')
        assert sharer.wait(job_id, 90).status is JobStatus.SUCCEEDED
        assert sharer.get_logs(job_id).strip().startswith(str(Path(sys.executable).parent))
        # Another process finds it too.
        program = f"import fray; print(fray.connect('ray').get_job({job_id!r}).status)"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert found.stdout == "SUCCEEDED\n", found.stderr
        sharer.close()
        assert owner.get_job(job_id).status is JobStatus.SUCCEEDED, "it goes on"
        assert rays(folder)
        left = owner.create_job("sleep 600")
    finally:
        with pytest.warns(RuntimeWarning, match=left):
            owner.close()
    until_gone(folder)


def test_it_does_not_outlive_an_owner_that_is_killed(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout
        assert owner.stdout.readline().startswith("ray:http://127.0.0.1:")
        assert rays(folder)
        owner.send_signal(signal.SIGKILL)
    until_gone(folder)


def test_one_that_cannot_start_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", f"{folder}/{'x' * 120}")
    with pytest.raises(fray.PlatformError, match="does not start"):
        fray.connect("ray")
    assert os.path.exists(folder)


@pytest.mark.parametrize("index", range(2), ids=["head", "dashboard"])
def test_a_port_that_somebody_takes_meanwhile_is_no_hindrance(
    folder: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    found = _local_ray.free_ports
    given: list[list[int]] = []

    def free_ports(count: int) -> list[int]:
        given.append(found(count))
        if len(given) == 1:
            taker.bind(("127.0.0.1", given[0][index]))
            taker.listen()
        return given[-1]

    monkeypatch.setattr(_local_ray, "free_ports", free_ports)
    with socket.socket() as taker, fray.connect("ray") as cluster:
        assert cluster.wait(cluster.create_job("true"), 90).status is JobStatus.SUCCEEDED
        assert len(given) == 2
        assert cluster.spec.endswith(f":{given[1][1]}")
    until_gone(folder)
