"""Jobs on a Ray cluster, beyond the rules that every backend keeps."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

import fray
from fray.backend.ray._runtime_env import build_ray_runtime_env
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    InvalidTypeError,
    InvalidValueError,
    UnsupportedError,
)
from fray.types import JobStatus, Resource, RuntimeEnv, TerminationReason
from tests.ray.ray_harness import Head, RayHarness

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture
def harness(ray_head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHarness]:
    directory = tmp_path / "work"
    directory.mkdir()
    monkeypatch.chdir(directory)
    with RayHarness(ray_head) as harness:
        yield harness


@pytest.fixture
def cluster(harness: RayHarness) -> fray.ClusterContext:
    return harness.cluster


# What users of earlier versions rely on, under the names that they know


def test_ray_cluster_context_initialization(ray_head: Head) -> None:
    with RayClusterContext(ray_head.dashboard) as by_dashboard:
        assert by_dashboard.spec == f"ray:{ray_head.dashboard}"
    with RayClusterContext(ray_head.address) as by_head:
        assert by_head.spec == by_dashboard.spec
    with RayClusterContext(ray_head.address, ray_head.dashboard) as by_both:
        assert by_both.list_jobs() is not None
    with fray.connect(by_dashboard.spec) as connected:
        assert isinstance(connected, RayClusterContext)


def test_create_job_returns_job_id(cluster: fray.ClusterContext) -> None:
    job_id = cluster.create_job("true")
    assert job_id.startswith("fray-")
    assert cluster.wait(job_id, 60).id == job_id


def test_list_jobs_returns_list(cluster: fray.ClusterContext) -> None:
    job_id = cluster.create_job("true")
    listed = cluster.list_jobs()
    assert isinstance(listed, list)
    assert listed[0].id == listed[0]["id"] == job_id
    assert "SUCCEEDED" in cluster.wait(job_id, 60)["status"]


def test_delete_job_stops_running_job(harness: RayHarness) -> None:
    job_id = harness.cluster.create_job("echo up; exec sleep 600")
    harness.until_logged(job_id, b"up")
    harness.cluster.delete_job(job_id)
    assert harness.end(job_id).status is JobStatus.STOPPED
    rest = harness.cluster._rest  # type: ignore[attr-defined]
    harness.until(lambda: rest.job(job_id).status == "STOPPED", "Ray's own word for it")


def test_build_ray_runtime_env_from_fray_env(cluster: fray.ClusterContext) -> None:
    env = RuntimeEnv(["six"], [Resource("CPU", 2), Resource("memory", 1 << 20), Resource("gate", 1)], env={"A": "1"})
    built = build_ray_runtime_env(env)
    assert built == {"env_vars": {"A": "1"}, "uv": {"packages": ["six"], "uv_pip_install_options": []}}
    assert build_ray_runtime_env(env, installer="pip")["pip"] == {"packages": ["six"]}
    assert build_ray_runtime_env(RuntimeEnv()) == {}
    native = cluster.plan_job("python train.py", env, metadata={"team": "a"}).native
    assert native["entrypoint"].endswith("/fray_entrypoint.py\" 'python train.py'")
    assert (native["entrypoint_num_cpus"], native["entrypoint_memory"]) == (2, 1 << 20)
    assert native["entrypoint_resources"] == {"gate": 1}
    assert native["metadata"] == {"team": "a"}
    assert native["runtime_env"]["config"] == {"setup_timeout_seconds": 1800}
    assert native["runtime_env"]["working_dir"].startswith("gcs://")


def test_submit_simple_script_job(harness: RayHarness) -> None:
    Path("my_script.py").write_text("import sys; print('hello', *sys.argv[1:])")
    info = harness.run("python my_script.py a 'b c'")
    assert info.status is JobStatus.SUCCEEDED
    assert harness.cluster.get_logs(info.id) == "hello a b c\n"


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_submit_job_with_packages(ray_head: Head, tmp_path: Path, installer: str) -> None:
    with RayHarness(ray_head, installer=installer) as harness:
        program = 'python -c "import six, sys; print(six.__name__, sys.prefix != sys.base_prefix)"'
        info = harness.run(program, RuntimeEnv(["six"], working_dir=str(tmp_path)))
        assert harness.cluster.get_logs(info.id) == "six True\n"


def test_submit_job_with_env_vars(harness: RayHarness) -> None:
    info = harness.run('echo "$A $B"', RuntimeEnv(env={"A": "1"}, secrets={"B": "2"}))
    assert harness.cluster.get_logs(info.id) == "1 2\n"


def test_job_lifecycle_submit_wait_delete(harness: RayHarness) -> None:
    cluster = harness.cluster
    job_id = cluster.create_job("echo done")
    info = cluster.wait(job_id, 60)
    cluster.delete_job(job_id)
    assert cluster.get_job(job_id) == info
    cluster.purge_job(job_id)
    assert job_id not in [job.id for job in cluster.list_jobs()]


def test_multiple_concurrent_jobs(harness: RayHarness) -> None:
    ids = [harness.cluster.create_job(f"echo {number}") for number in range(5)]
    assert [harness.end(job_id).status for job_id in ids] == [JobStatus.SUCCEEDED] * 5
    assert [harness.cluster.get_logs(job_id) for job_id in ids] == [f"{number}\n" for number in range(5)]


def test_create_job_with_script(harness: RayHarness) -> None:
    assert harness.run("python nonexistent_script.py").status is JobStatus.FAILED


def test_delete_job(harness: RayHarness) -> None:
    with harness.hold_pending() as held:
        job_id = harness.cluster.create_job("true", held)
        harness.cluster.delete_job(job_id)
        # Not when its turn comes: now.
        assert harness.end(job_id).status is JobStatus.STOPPED


# Addresses and credentials


def test_an_address_in_code_wins_over_the_environments(ray_head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with RayClusterContext(ray_head.dashboard) as cluster:
        cluster.list_jobs()


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
def test_without_one_the_environments_is_used(ray_head: Head, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, ray_head.dashboard)
    with RayClusterContext() as cluster:
        assert cluster.spec == f"ray:{ray_head.dashboard}"


@pytest.mark.parametrize(
    "address", ["os://x", "foo://head:1", "ftp://head:1", "head", "head:port", "http://", "ray://h:1"]
)
def test_an_address_that_cannot_be_is_refused(address: str) -> None:
    with pytest.raises(InvalidValueError, match="address"):
        RayClusterContext(address)


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="installer"):
        RayClusterContext("http://127.0.0.1:1", installer="conda")  # type: ignore[arg-type]
    with pytest.raises(InvalidValueError, match="verify"):
        RayClusterContext("http://127.0.0.1:1", verify=str(tmp_path / "ca.pem"))
    with pytest.raises(InvalidTypeError, match="headers"):
        RayClusterContext("http://127.0.0.1:1", headers="Authorization: Bearer x")  # type: ignore[arg-type]


def test_nobody_at_the_address_is_said_at_once() -> None:
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1:1"):
        RayClusterContext("http://127.0.0.1:1")
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1:1"):
        RayClusterContext("127.0.0.1:1")


def test_a_black_hole_is_given_up(tmp_path: Path) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as hole:
        address = f"http://127.0.0.1:{hole.getsockname()[1]}"
        with pytest.raises(ConnectionFailedError, match=address):
            RayClusterContext(address, request_timeout_seconds=0.3)


def test_headers_cookies_and_token_are_sent_with_each_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    with _Recorder() as server:
        token = tmp_path / "token"
        token.write_text("first\n")
        count = iter(range(100))
        with RayClusterContext(
            server.address, headers=lambda: {"X-Count": str(next(count))}, cookies={"session": "abc"}, token_file=token
        ) as cluster:
            assert cluster.list_jobs() == []
            token.write_text("second\n")
            assert cluster.list_jobs() == []
        assert [each["X-Count"] for each in server.seen] == ["0", "1", "2"]
        assert [each["Authorization"] for each in server.seen] == ["Bearer first", "Bearer first", "Bearer second"]
        assert {each["Cookie"] for each in server.seen} == {"session=abc"}
        monkeypatch.setenv("RAY_AUTH_TOKEN", "from-the-environment")
        with RayClusterContext(server.address):
            assert server.seen[-1]["Authorization"] == "Bearer from-the-environment"
        with RayClusterContext(server.address, headers={"authorization": "Basic xyz"}):
            assert server.seen[-1]["authorization"] == "Basic xyz"


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_told_as_such(status: int) -> None:
    with _Recorder(status) as server, pytest.raises(AuthenticationError, match="token_file"):
        RayClusterContext(server.address)


# Jobs that wait, or cannot start


def test_a_pending_job_says_what_it_lacks(harness: RayHarness) -> None:
    cluster = harness.cluster
    with harness.hold_pending() as held:
        job_id = cluster.create_job("true", held)
        harness.until(lambda: "gate" in cluster.get_job(job_id).message, "the resource's name")
        assert cluster.get_job(job_id).message == "waiting for 1 gate (1 of 1 in use)"
    harness.end(job_id)


def test_what_no_node_has_is_waited_for_and_said(harness: RayHarness) -> None:
    cluster = harness.cluster
    job_id = cluster.create_job("true", RuntimeEnv([], [Resource("CPU", 1000), Resource("GPU", 2)]))
    harness.until(lambda: "no node has" in cluster.get_job(job_id).message, "why it waits")
    message = cluster.get_job(job_id).message
    assert "1000 CPU: no node has so much" in message
    assert "2 GPU: no node has so much (the largest has 0)" in message
    cluster.delete_job(job_id)
    assert harness.end(job_id).status is JobStatus.STOPPED
    # Ray's own record says so too, and nothing waits in its queue any more.
    assert cluster._rest.job(job_id).status == "STOPPED"  # type: ignore[attr-defined]


def test_an_unknown_resource_is_refused_unless_it_can_be_brought(ray_head: Head, harness: RayHarness) -> None:
    env = RuntimeEnv([], [Resource("unobtainium", 1)])
    with pytest.raises(UnsupportedError, match=r"unobtainium.*gate"):
        harness.cluster.create_job("true", env)
    with RayHarness(ray_head, autoscaled_resources=["unobtainium"]) as bringing:
        job_id = bringing.cluster.create_job("true", env)
        assert "unobtainium" in bringing.cluster.get_job(job_id).message


def test_a_job_whose_packages_are_being_installed_can_be_stopped(harness: RayHarness) -> None:
    env = RuntimeEnv(["no-such-distribution-4f1c==1.0"])
    job_id = harness.cluster.create_job("echo never", env)
    harness.until(lambda: "packages" in harness.cluster.get_job(job_id).message, "what it waits for")
    harness.cluster.delete_job(job_id)
    # Now, and not when the installer gives up.
    info = harness.end(job_id)
    assert (info.status, info.reason) == (JobStatus.STOPPED, TerminationReason.STOPPED_BY_USER)


def test_a_directory_over_the_limit_is_refused_before_anything_is_sent(harness: RayHarness, tmp_path: Path) -> None:
    directory = tmp_path / "large"
    directory.mkdir()
    (directory / "model.bin").write_bytes(os.urandom(101 << 20))
    (directory / "small.txt").write_text("x")
    before = harness.cluster.list_jobs()
    for call in (harness.cluster.plan_job, harness.cluster.create_job):
        with pytest.raises(InvalidValueError, match=r"model\.bin"):
            call("true", RuntimeEnv(working_dir=str(directory)))
    assert harness.cluster.list_jobs() == before
    info = harness.run("ls", RuntimeEnv(working_dir=str(directory), excludes=["*.bin"]))
    assert harness.cluster.get_logs(info.id) == "small.txt\n"


# Other versions of Ray


def test_a_version_that_was_not_tested_is_served_by_rays_own_client(
    harness: RayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fray.backend.ray._internals.is_tested", lambda version: False)
    info = harness.run('echo "$S"; exit 3', RuntimeEnv(secrets={"S": "handed over"}))
    assert (info.exit_code, info.reason) == (3, TerminationReason.EXITED)
    assert harness.cluster.get_logs(info.id) == "handed over\n"
    assert harness.cluster._rest.job(info.id).metadata["fray"].count('"plain":false') == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.54.0", True),
        ("2.60.3", True),
        ("2.53.9", False),
        ("2.61.0", False),
        ("3.0.0.dev0", False),
        ("nightly", False),
    ],
)
def test_which_versions_were_tested(version: str, expected: bool) -> None:
    from fray.backend.ray._internals import is_tested

    assert is_tested(version) is expected


def test_without_rays_log_service_its_own_log_is_read(harness: RayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    from fray.backend.ray._rest import HttpError

    def missing(*arguments: object, **options: object) -> None:
        raise HttpError("not there", 404, "404: Not Found")

    monkeypatch.setattr(harness.cluster._rest, "_open", missing)  # type: ignore[attr-defined]
    job_id = harness.cluster.create_job("echo one; sleep 1; echo two")
    lines = harness.lines(job_id)
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert harness.cluster.get_logs(job_id).splitlines() == lines


def test_a_file_that_takes_longer_than_ray_gives_an_answer_comes_whole(harness: RayHarness) -> None:
    from ray.util.state.common import DEFAULT_RPC_TIMEOUT

    known = harness.cluster._known(harness.run('truncate --size 256M "$FRAY_OUTPUT_DIR/a"').id)  # type: ignore[attr-defined]
    pieces = harness.cluster._rest.read_file(known.details.driver_node_id, f"{known.folder}/outputs/a")  # type: ignore[attr-defined]
    size = len(next(pieces))
    time.sleep(DEFAULT_RPC_TIMEOUT + 2)
    assert size + sum(len(piece) for piece in pieces) == 256 << 20


# The job and its surroundings


def test_jobs_with_the_same_content_do_not_meet(harness: RayHarness) -> None:
    Path("input").write_text("x")
    first, second = (harness.run("ls; touch left-behind; echo >> input") for _ in range(2))
    assert harness.cluster.get_logs(first.id) == harness.cluster.get_logs(second.id) == "input\n"


def test_modules_beside_the_script_are_found_by_tasks_too(harness: RayHarness) -> None:
    Path("helper.py").write_text("def double(x): return 2 * x")
    Path("main.py").write_text(
        "import fray, helper\n"
        "ctx = fray.get_job_context()\n"
        "print(type(ctx).__name__, ctx.get(ctx.create_task(helper.double, (21,))))"
    )
    info = harness.run("python main.py 2>/dev/null")
    assert harness.cluster.get_logs(info.id) == "RayJobContext 42\n"


def test_executables_stay_executable(harness: RayHarness) -> None:
    Path("run.sh").write_text("#!/bin/sh\necho ran\n")
    Path("run.sh").chmod(0o755)
    info = harness.run("./run.sh")
    assert harness.cluster.get_logs(info.id) == "ran\n"


def test_modules_of_the_working_directory_do_not_break_the_entrypoint(harness: RayHarness) -> None:
    for name in ("fray", "fray_entrypoint"):
        Path(f"{name}.py").write_text("raise SystemExit('the wrong one')")
    info = harness.run("echo fine")
    assert harness.cluster.get_logs(info.id) == "fine\n", info


def test_metadata_is_rays_too(harness: RayHarness) -> None:
    info = harness.run("true", metadata={"team": "a"})
    assert harness.cluster._rest.job(info.id).metadata["team"] == "a"  # type: ignore[attr-defined]
    with pytest.raises(InvalidValueError, match="fray_journal"):
        harness.cluster.create_job("true", metadata={"fray_journal": "x"})


def test_a_job_that_ray_was_given_by_others_is_told_too(harness: RayHarness, ray_head: Head) -> None:
    client = JobSubmissionClient(ray_head.dashboard)
    job_id = client.submit_job(entrypoint="echo foreign; exit 3", metadata={"a": "b"})
    info = harness.end(job_id)
    assert (info.status, info.reason, info.exit_code) == (JobStatus.FAILED, TerminationReason.EXITED, 3)
    assert info.metadata == {"a": "b"}
    assert "foreign" in harness.lines(job_id)
    assert job_id in [each.id for each in harness.cluster.list_jobs()]
    running = client.submit_job(entrypoint="sleep 600")
    harness.cluster.delete_job(running)
    assert harness.end(running).status is JobStatus.STOPPED


def test_errands_are_not_shown_and_not_left(harness: RayHarness, ray_head: Head) -> None:
    info = harness.run("true")
    harness.cluster.purge_job(info.id)
    client = JobSubmissionClient(ray_head.dashboard)

    def is_swept() -> bool:
        assert not [each.id for each in harness.cluster.list_jobs() if "errand" in each.id]
        return not [job for job in client.list_jobs() if "errand" in (job.submission_id or "")]

    harness.until(is_swept, "the end of all errands")


def test_submitting_starts_no_ray_here(harness: RayHarness) -> None:
    program = """
import ray
job_id = cluster.create_job("true")
cluster.wait(job_id, 60)
assert not ray.is_initialized()
print(job_id)
"""
    assert harness.in_fresh_process(program).startswith("fray-")


def test_a_log_over_several_files_is_read_from_any_offset(harness: RayHarness) -> None:
    info = harness.run("head -c 9000000 /dev/zero | tr '\\0' x; echo; echo end")
    cluster = harness.cluster
    assert len(cluster.read_logs(info.id)) == 9_000_005
    assert cluster.read_logs(info.id, 8_999_998) == b"xx\nend\n"
    assert cluster.read_logs(info.id, 4_194_300)[:8] == b"x" * 8
    assert cluster.get_logs(info.id, tail=1) == "end\n"
    assert [len(line) for line in harness.lines(info.id)] == [9_000_000, 3]


def test_a_quiet_job_is_followed_to_its_end(harness: RayHarness) -> None:
    job_id = harness.cluster.create_job(f"head -c {1 << 22} /dev/zero; sleep 3; echo; echo end")
    lines = harness.lines(job_id)
    assert [len(line) for line in lines] == [1 << 22, 3]


class _Recorder:
    """A server that notes what it is asked with. What a Ray head would say to it is not what these tests are about."""

    def __init__(self, status: int = 200) -> None:
        seen = self.seen = []  # type: ignore[var-annotated]

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                seen.append(dict(self.headers))
                body = json.dumps([] if "jobs" in self.path else {"ray_version": "2.60.0"}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> _Recorder:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
