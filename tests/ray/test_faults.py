"""What goes wrong around a Ray job: clients, nodes and heads that die, broken connections, wrong tokens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

import fray
from fray.backend.ray import _rest
from fray.backend.ray._internals import PlainKv
from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    JobExistsError,
    JobNotFoundError,
    PlatformError,
    SubmissionError,
)
from fray.types import JobStatus, Resource, RuntimeEnv, TerminationReason
from tests.ray.conftest import RayHead
from tests.ray.ray_harness import RayHarness
from tests.ray.tpu_harness import until

pytestmark = pytest.mark.xdist_group("ray")

SEEDS = range(8 * int(os.environ.get("FRAY_SOAK") or 1))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def harness(ray_head: RayHead) -> Iterator[RayHarness]:
    with RayHarness(ray_head) as harness:
        yield harness


# Clients


@pytest.mark.parametrize("seed", SEEDS)
def test_a_client_killed_while_it_submits_leaves_nothing_half_done(harness: RayHarness, seed: int) -> None:
    job_id = f"killed-{seed}-{os.getpid()}"
    program = f"""
import fray, sys
cluster = fray.connect({harness.spec!r}, **{harness.options!r})
print("connected", flush=True)
cluster.create_job("echo ran", fray.RuntimeEnv(secrets={{"S": "x"}}), job_id={job_id!r})
print("submitted", flush=True)
cluster.wait({job_id!r})
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"connected\n"
        # Up to what a submission takes here, and a bit into the wait.
        time.sleep(random.Random(seed).uniform(0, 0.15))
        client.kill()
        was_told = b"submitted" in client.stdout.read()
    try:
        harness.cluster.get_job(job_id)
    except JobNotFoundError:
        assert not was_told
        with suppress(JobExistsError):  # Ray was still at what the killed client had asked for
            harness.cluster.create_job("echo ran", job_id=job_id)  # the id is free
    assert harness.end(job_id).status is JobStatus.SUCCEEDED
    assert harness.cluster.get_logs(job_id) == "ran\n"


@pytest.mark.timeout(900)
def test_fifty_jobs_at_once(harness: RayHarness) -> None:
    clients = [harness.cluster, harness.connect()]
    with ThreadPoolExecutor(10) as pool:
        calls = [
            pool.submit(clients[number % 2].create_job, f"echo {number}; exit {number % 3}") for number in range(50)
        ]
        ids = [call.result() for call in calls]
    infos = [harness.cluster.wait(job_id, 800) for job_id in ids]
    assert [info.exit_code for info in infos] == [number % 3 for number in range(50)]
    assert [harness.cluster.get_logs(job_id) for job_id in ids] == [f"{number}\n" for number in range(50)]


# Supervision


@pytest.mark.parametrize("whom", ["runner", "supervisor", "entrypoint"])
def test_whoever_of_its_supervision_is_killed_the_job_is_lost_whole(
    harness: RayHarness, tmp_path: Path, whom: str
) -> None:
    beat = tmp_path / "beat"
    child = f"trap '' TERM HUP; while :; do echo >> {beat}; sleep 0.05; done"
    job_id = harness.cluster.create_job(f'echo up; setsid sh -c "{child}" & sh -c "{child}"')
    harness.until_logged(job_id, b"up")
    harness.until(beat.exists, "a sign of life")
    process = {
        "runner": harness.runner_of,
        "supervisor": harness.supervisor_of,
        "entrypoint": harness.entrypoint_of,
    }[whom](job_id)
    process.send_signal(signal.SIGKILL)
    info = harness.end(job_id)
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
    assert harness.cluster.get_logs(job_id) == "up\n", "Ray's own words are not the job's"
    # The supervisor's watch over its child takes a second to look.
    harness.until(lambda: _is_still(beat), "the end of all its processes")
    harness.later()
    assert harness.cluster.get_job(job_id) == info


def _is_still(beat: Path) -> bool:
    size = beat.stat().st_size
    time.sleep(0.3)  # six beats
    return beat.stat().st_size == size


# Connections


def test_a_cluster_that_is_away_for_a_while_is_waited_for(harness: RayHarness) -> None:
    cluster = harness.cluster
    job_id = cluster.create_job("i=0; while [ $i -lt 60 ]; do echo line $i; sleep 0.05; i=$((i+1)); done; exit 4")
    harness.until_logged(job_id, b"line 3")
    calls: list[Callable[[], Any]] = [lambda: cluster.wait(job_id), lambda: list(cluster.stream_logs(job_id))]
    with ThreadPoolExecutor(2) as pool:
        waits = [pool.submit(call) for call in calls]
        for pause in (0.1, 1.5):
            with harness.proxy.cut_off():
                time.sleep(pause)
            time.sleep(0.3)
        assert waits[0].result(60).exit_code == 4
        assert waits[1].result(60) == [f"line {number}" for number in range(60)]


def test_a_cluster_that_stays_away_is_said(harness: RayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fray.cluster._CALL_PATIENCE_SECONDS", 0.5)
    cluster = harness.cluster
    job_id = cluster.create_job("true")
    harness.end(job_id)
    with harness.proxy.cut_off():
        for call in (cluster.list_jobs, lambda: cluster.get_job(job_id), lambda: cluster.create_job("true")):
            with pytest.raises(ConnectionFailedError, match=harness.spec.removeprefix("ray:")):
                call()


def test_a_submission_whose_answer_is_lost_is_looked_up(harness: RayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    rest = harness.cluster._rest  # type: ignore[attr-defined]
    submit = rest.submit

    def accepted_and_cut_off(**request: Any) -> None:
        submit(**request)
        raise ConnectionFailedError("cut off")

    def cut_off(**request: Any) -> None:
        raise ConnectionFailedError("cut off")

    monkeypatch.setattr(rest, "submit", accepted_and_cut_off)
    job_id = harness.cluster.create_job("echo ran")
    assert harness.end(job_id).status is JobStatus.SUCCEEDED
    late: list[dict[str, Any]] = []

    def accepted_later(**request: Any) -> None:
        late.append(request)
        raise ConnectionFailedError("cut off")

    monkeypatch.setattr(rest, "submit", accepted_later)
    with pytest.raises(fray.PlatformError, match="not accepted"):
        harness.cluster.create_job("echo never", job_id=f"late-{os.getpid()}")
    submit(**late[0])  # what was on its way arrives after all
    assert harness.end(f"late-{os.getpid()}").status is JobStatus.STOPPED
    assert harness.cluster.read_logs(f"late-{os.getpid()}") == b""
    monkeypatch.setattr(rest, "submit", cut_off)
    with pytest.raises(fray.PlatformError, match="not accepted"):
        harness.cluster.create_job("true", job_id="never-there")
    with pytest.raises(fray.JobExistsError):
        harness.cluster.create_job("true", job_id=job_id)


def test_what_rays_monitor_writes_of_a_purged_job_is_no_job(harness: RayHarness) -> None:
    cluster = harness.cluster
    rest = cluster._rest  # type: ignore[attr-defined]
    for number in range(5):
        job_id = f"ghost-{os.getpid()}-{number}"
        cluster.create_job("true", job_id=job_id)
        harness.end(job_id)
        while (status := rest.job(job_id).status) != "SUCCEEDED":
            assert status in ("PENDING", "RUNNING"), status
        rest.delete(job_id)  # as soon as that, while the monitor looks every second: it may just have looked
        give_up = time.monotonic() + 20
        while not _has(rest, job_id) and time.monotonic() < give_up:
            time.sleep(0.1)
        if _has(rest, job_id):
            break
    else:
        pytest.fail("this version of Ray leaves deleted jobs alone: what is done about it can go")
    assert job_id not in [info.id for info in cluster.list_jobs()]
    with pytest.raises(JobNotFoundError):
        cluster.get_job(job_id)
    cluster.create_job("echo again", job_id=job_id)
    assert harness.end(job_id).status is JobStatus.SUCCEEDED
    assert cluster.get_logs(job_id) == "again\n"


def _has(rest: Any, job_id: str) -> bool:
    try:
        rest.job(job_id)
    except JobNotFoundError:
        return False
    return True


# Nodes and heads


def test_a_killed_node_loses_its_job_and_not_what_was_read(tmp_path: Path) -> None:
    head = RayHead(quick=True)
    try:
        node = head.add_node('{"elsewhere": 1}')
        with RayHarness(head) as harness:
            rest = harness.cluster._rest  # type: ignore[attr-defined]
            harness.until(lambda: "elsewhere" in rest.resources()[0], "the node to join")
            env = RuntimeEnv([], [Resource("elsewhere", 1)])
            job_id = harness.cluster.create_job("echo read; sleep 600", env)
            lines = harness.cluster.stream_logs(job_id)
            assert harness.soon(lambda: next(lines), "a line") == "read"
            head.kill_node(node)
            assert harness.soon(lambda: list(lines), "the end of the log") == []
            info = harness.end(job_id)
            assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
            assert info.message
            with pytest.raises(PlatformError, match="gone"):
                harness.cluster.read_logs(job_id)
            harness.cluster.purge_job(job_id)
    finally:
        head.stop()


def test_a_head_whose_agent_is_not_there_yet_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    head = RayHead()
    try:
        with closing(PlainKv(head.address)) as kv, fray.connect(f"ray:{head.dashboard}") as cluster:
            rest = cluster._rest  # type: ignore[attr-defined]
            until(rest._nodes, "the head to be a node")
            key = f"DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX:{rest._nodes()[0]['node_id']}".encode()
            until(lambda: kv.get(key, b"dashboard"), "its agent")
            agent = kv.get(key, b"dashboard")
            assert agent
            kv.delete(key, b"dashboard")
            with monkeypatch.context() as patch:
                patch.setattr(_rest, "_SUBMIT_SECONDS", 0.0)
                with pytest.raises(SubmissionError, match="No available agent"):
                    cluster.create_job("true", job_id="early")
            tries: list[str] = []
            submit_job = rest._client.submit_job

            def counted(**request: Any) -> str:
                tries.append(request["submission_id"])
                return str(submit_job(**request))

            monkeypatch.setattr(rest._client, "submit_job", counted)
            with ThreadPoolExecutor(1) as pool:
                submitting = pool.submit(cluster.create_job, "echo ran", job_id="early")
                until(lambda: len(tries) > 1 or submitting.done(), "the second try")
                kv.put(key, agent, b"dashboard")
                assert submitting.result(90) == "early"
            assert cluster.wait("early", 90).status is JobStatus.SUCCEEDED
            assert cluster.get_logs("early") == "ran\n"
    finally:
        head.stop()


def test_a_head_that_is_started_anew_has_forgotten_its_jobs() -> None:
    head = RayHead()
    try:
        with fray.connect(f"ray:{head.dashboard}", request_timeout_seconds=10) as cluster:
            job_id = cluster.create_job("echo up; sleep 600")
            lines = cluster.stream_logs(job_id)
            assert next(lines) == "up"
            outcome: list[Any] = []
            waiting = threading.Thread(target=lambda: outcome.append(cluster.wait(job_id)), daemon=True)
            waiting.start()
            ports = head.ports
            head.stop()
            head = RayHead(ports=ports)
            waiting.join(120)
            assert outcome, "the wait came to no end"
            assert (outcome[0].status, outcome[0].reason) == (JobStatus.FAILED, TerminationReason.LOST)
            assert "anew" in outcome[0].message
            assert list(lines) == []
            with pytest.raises(JobNotFoundError), fray.connect(f"ray:{head.dashboard}") as another:
                another.wait(job_id)
    finally:
        head.stop()


def test_a_cluster_with_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = tmp_path / "token"
    token.write_text("0123456789abcdef" * 4)
    head = RayHead(token=token.read_text())
    try:
        for wrong in ({}, {"headers": {"Authorization": "Bearer wrong"}}):
            with pytest.raises(AuthenticationError):
                fray.connect(f"ray:{head.dashboard}", **wrong)
        with fray.connect(f"ray:{head.dashboard}", token_file=str(token)) as cluster:
            program = "import fray; print(len(fray.connect().list_jobs()))"
            job_id = cluster.create_job(f'echo "$S"; python -c "{program}"', RuntimeEnv(secrets={"S": "handed over"}))
            assert list(cluster.stream_logs(job_id)) == ["handed over", "1"]
            assert cluster.wait(job_id, 60).status is JobStatus.SUCCEEDED
    finally:
        head.stop()


# Secrets


def test_a_secret_is_nowhere_while_its_job_waits(harness: RayHarness) -> None:
    secret = f"s3cret-{os.getpid()}-{time.time_ns()}"
    with harness.hold_pending() as held:
        env = RuntimeEnv([], held.minimum_resources, secrets={"PASSPHRASE": secret})
        job_id = harness.cluster.create_job("echo ${#PASSPHRASE}", env)
        dropped = harness.cluster.create_job("true", env)
        _search(harness, secret)
        harness.cluster.delete_job(dropped)
        assert harness.end(dropped).status is JobStatus.STOPPED
    harness.end(job_id)
    assert harness.cluster.get_logs(job_id) == f"{len(secret)}\n"
    _search(harness, secret)


def _search(harness: RayHarness, secret: str) -> None:
    for where, content in harness.observable():
        assert secret.encode() not in content, f"the secret is in {where}"
