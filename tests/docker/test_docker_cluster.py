"""What the Docker backend does beyond the contract: its options, its plans, what people see in the engine."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fray
from fray.backend.docker import _buildkit, _lock, images
from fray.backend.docker._engine import Endpoint, Engine, find_endpoint
from fray.backend.docker.cluster import DockerClusterContext, Mount
from fray.errors import (
    ConnectionFailedError,
    InvalidTypeError,
    InvalidValueError,
    JobExistsError,
    JobNotFoundError,
    UnsupportedError,
)
from fray.types import JobStatus, Resource, RuntimeEnv, TerminationReason

from .conftest import Peer
from .docker_harness import DockerHarness
from .engine_proxy import TlsProxy
from .registry import Registry

pytestmark = pytest.mark.xdist_group("docker")


@pytest.fixture
def harness(engine: Engine, base_image: str, registry: Registry) -> Iterator[DockerHarness]:
    with DockerHarness(engine, base_image, registry) as harness:
        yield harness


def in_image(harness: DockerHarness, **more: Any) -> RuntimeEnv:
    return RuntimeEnv(container_image=harness.base_image, **more)


def derived(engine: Engine, base: str, name: str, dockerfile: str) -> str:
    """An image on top of another."""
    subprocess.run(
        ["docker", "build", "-q", "-t", name, "-"],
        input=f"FROM {base}\n{dockerfile}".encode(),
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", **engine.endpoint.environment()},
    )
    return name


# The plan


def test_a_plan_is_the_engines_own_request_and_does_nothing(harness: DockerHarness) -> None:
    env = in_image(harness, env={"LR": "1e-3", "API_TOKEN": "t0p"}, secrets={"HIDDEN": "s3cret"})
    before = [each["Id"] for each in harness.engine.api.containers(all=True)]
    plan = harness.cluster.plan_job("echo hi", env, job_id="planned", timeout_seconds=5, max_retries=2)
    assert [each["Id"] for each in harness.engine.api.containers(all=True)] == before
    native = json.loads(str(plan))["native"]
    assert native["name"] == "fray.planned"
    container = native["container"]
    assert container["Entrypoint"][0] == "/.fray/runner"
    assert container["Entrypoint"][-1] == "echo hi"
    assert container["Entrypoint"][container["Entrypoint"].index("--timeout") :][:2] == ["--timeout", "5"]
    assert "LR=1e-3" in container["Env"]
    assert "API_TOKEN=***" in container["Env"]
    assert "s3cret" not in str(plan)
    assert container["HostConfig"]["LogConfig"]["Type"] == "json-file"
    assert plan.image == harness.base_image
    assert plan.upload_bytes is None


def test_a_job_whose_image_is_built_waits_for_no_builder(
    harness: DockerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.py").write_text(f"print({time.time_ns()})\n")
    monkeypatch.chdir(tmp_path)
    plan = harness.cluster.plan_job("python main.py")
    assert (plan.native["prepares"], plan.native["builder"] in ("buildkit", "classic")) == ("build", True)
    assert plan.upload_bytes
    first = harness.run("python main.py")
    asked: list[object] = []
    for module, name in ((_buildkit, "_find_cli"), (_lock, "export_lock"), (images, "freeze"), (images, "render")):
        monkeypatch.setattr(module, name, lambda *given, **named: asked.append(given))
    plan = harness.cluster.plan_job("python main.py")
    assert (plan.native["prepares"], plan.upload_bytes) == ("", None)
    second = harness.run("python main.py")
    assert harness.cluster.read_logs(second.id) == harness.cluster.read_logs(first.id)
    assert asked == []


# Resources


def test_resources_become_the_engines_limits(harness: DockerHarness) -> None:
    env = RuntimeEnv(
        [], [Resource("CPU", 0.5), Resource("memory", 64 << 20)], [Resource("CPU", 1)],
        container_image=harness.base_image,
    )  # fmt: skip
    info = harness.run("cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null", env)
    assert harness.cluster.get_logs(info.id).split() == [str(64 << 20)]
    host = harness.command_container(info.id)["HostConfig"]
    assert (host["NanoCpus"], host["CpuShares"]) == (10**9, 512), "the cap, and the share of what was asked for"
    assert (host["Memory"], host["MemorySwap"], host["MemoryReservation"]) == (64 << 20, 64 << 20, 64 << 20)


def test_what_the_machine_will_never_have_is_infeasible(harness: DockerHarness) -> None:
    for resource in (Resource("CPU", 4096), Resource("memory", 1 << 50)):
        info = harness.run("echo ran", RuntimeEnv([], [resource], container_image=harness.base_image))
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.INFEASIBLE)
        assert resource.name in info.message
        assert (info.start_time, info.exit_code) == (None, None)
        assert harness.cluster.read_logs(info.id) == b""


@pytest.mark.parametrize("resource", [Resource("TPU", 4), Resource("license", 1), Resource("GPU", 0.5)])
def test_what_no_engine_has_is_refused(harness: DockerHarness, resource: Resource) -> None:
    with pytest.raises(UnsupportedError, match=resource.name):
        harness.cluster.plan_job("true", RuntimeEnv([], [resource]))
    with pytest.raises(UnsupportedError, match=resource.name):
        harness.cluster.plan_job("true", RuntimeEnv([], [], [resource]))


def test_a_gpu_that_is_not_there_fails_the_job(harness: DockerHarness) -> None:
    if "nvidia" in harness.engine.info["Runtimes"]:
        pytest.skip("this engine has GPUs")
    info = harness.run("echo ran", RuntimeEnv([], [Resource("GPU", 1)], container_image=harness.base_image))
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.INFEASIBLE)
    assert "gpu" in info.message


def test_too_little_memory_for_the_engine_is_refused(harness: DockerHarness) -> None:
    with pytest.raises(InvalidValueError, match="memory=1024"):
        harness.cluster.create_job("true", RuntimeEnv([], [Resource("memory", 1024)]))


def test_a_cap_above_what_the_machine_has_is_no_cap(harness: DockerHarness) -> None:
    env = RuntimeEnv([], [Resource("CPU", 1)], [Resource("CPU", 4096)], container_image=harness.base_image)
    info = harness.run("true", env)
    assert info.status is JobStatus.SUCCEEDED, info
    assert harness.command_container(info.id)["HostConfig"]["NanoCpus"] == 0


# Options


def test_an_unknown_network_is_refused_by_the_plan(engine: Engine, base_image: str, registry: Registry) -> None:
    with (
        DockerHarness(engine, base_image, registry, network="no-such-network-4f1c") as harness,
        pytest.raises(InvalidValueError, match="no-such-network-4f1c"),
    ):
        harness.cluster.plan_job("true", in_image(harness))


@pytest.mark.parametrize("policy", ["never", "always"])
def test_the_pull_policy_holds_for_what_is_built_on(
    engine: Engine, base_image: str, registry: Registry, shell_image: str, tmp_path: Path, policy: str
) -> None:
    (tmp_path / "file").touch()
    reference = registry.push(shell_image, f"base-{policy}:latest")
    env = RuntimeEnv(container_image=reference, working_dir=str(tmp_path))
    with DockerHarness(engine, base_image, registry, pull=policy) as harness:
        if policy == "never":
            with pytest.raises(InvalidValueError, match="never"):
                harness.cluster.plan_job("true", env)
            return
        ask = "command -v python3 || echo none"
        assert harness.cluster.get_logs(harness.run(ask, env).id) == "none\n"
        registry.push(base_image, f"base-{policy}:latest")
        engine.api.tag(shell_image, f"{registry.address}/base-{policy}", "latest")  # what is here is the old one
        assert harness.cluster.get_logs(harness.run(ask, env).id) == "/usr/bin/python3\n"
    engine.api.remove_image(reference, force=True)


def test_mounts_network_and_shared_memory(
    engine: Engine, base_image: str, registry: Registry, tmp_path: Path, peer: Peer
) -> None:
    (tmp_path / "data.txt").write_text("of the machine\n")
    options: dict[str, Any] = {
        "mounts": [f"{tmp_path}:/data:ro", {"source": "fray-test-cache", "target": "/cache"}],
        "network": peer.network,
        "shm_bytes": 128 << 20,
    }
    try:
        with DockerHarness(engine, base_image, registry, **options) as harness:
            ask = f"import urllib.request as r; print(r.urlopen('{peer.url}', timeout=20).read().decode(), end='')"
            command = (
                "cat /data/data.txt; touch /data/x 2>/dev/null || echo read-only; echo kept > /cache/file; "
                f'df -B1 /dev/shm | tail -1 | awk "{{print \\$2}}"; python -c "{ask}"'
            )
            info = harness.run(command, in_image(harness))
            log = harness.cluster.get_logs(info.id)
            assert log == f"of the machine\nread-only\n{128 << 20}\n{peer.content.decode()}"
            assert harness.cluster.get_logs(harness.run("cat /cache/file", in_image(harness)).id) == "kept\n"
    finally:
        engine.api.remove_volume("fray-test-cache", force=True)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pull": "sometimes"}, InvalidValueError),
        ({"mounts": "/a:/b"}, InvalidTypeError),
        ({"mounts": ["/a:b"]}, InvalidValueError),
        ({"mounts": ["./a:/b"]}, InvalidValueError),
        ({"mounts": ["/a:/b:rx"]}, InvalidValueError),
        ({"mounts": [{"source": "/a", "destination": "/b"}]}, InvalidValueError),
        ({"mounts": [3]}, InvalidTypeError),
        ({"shm_bytes": -1}, InvalidValueError),
        ({"grace_seconds": -1}, InvalidValueError),
        ({"build_args": ["a"]}, InvalidTypeError),
        ({"build_args": {"A": "1"}}, InvalidValueError),
        ({"dockerfile": "Dockerfile", "base_image": "x"}, InvalidValueError),
        ({"builder": "kaniko"}, InvalidValueError),
        ({"platform": "nonsense"}, InvalidValueError),
        ({"ca_bundle": "/nowhere.pem"}, InvalidValueError),
        ({"address": "no-such-context"}, InvalidValueError),
        ({"address": "ssh://user@host"}, UnsupportedError),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        DockerClusterContext(**options)


def test_mounts_say_what_they_are() -> None:
    assert Mount("/data", "/data", True).kind == "bind"
    assert Mount("cache", "/cache").kind == "volume"


# Images as they are


def test_an_image_keeps_its_user_its_directory_and_its_variables(harness: DockerHarness) -> None:
    dockerfile = """
RUN useradd -m somebody && mkdir /app && echo content > /app/file
ENV PYTHONPATH=/app/lib MODE=image
WORKDIR /app
USER somebody
ENTRYPOINT ["echo", "the image's own entrypoint"]
"""
    image = derived(harness.engine, harness.base_image, "fray-test-own:1", dockerfile)
    command = 'whoami; pwd; cat file; echo $MODE $HOME; echo out > "$FRAY_OUTPUT_DIR/o.txt"; echo $PYTHONPATH'
    info = harness.run(command, RuntimeEnv(container_image=image))
    assert harness.cluster.get_logs(info.id).splitlines() == [
        "somebody",
        "/app",
        "content",
        "image /home/somebody",
        "/.fray/light:/app/lib",
    ]


def test_outputs_of_an_image_with_a_user_of_its_own_come_back(harness: DockerHarness, tmp_path: Path) -> None:
    image = derived(harness.engine, harness.base_image, "fray-test-nobody:1", "USER 65534:65534\n")
    info = harness.run('echo mine > "$FRAY_OUTPUT_DIR/o.txt"', RuntimeEnv(container_image=image))
    assert info.status is JobStatus.SUCCEEDED, harness.cluster.get_logs(info.id)
    (fetched,) = harness.cluster.fetch_outputs(info.id, tmp_path)
    assert fetched.read_text() == "mine\n"


def test_outputs_are_kept_inside_their_destination(harness: DockerHarness, tmp_path: Path) -> None:
    command = 'cd "$FRAY_OUTPUT_DIR"; echo in > file; ln -s /etc/passwd link; ln file hard; mkdir empty; chmod +x file'
    info = harness.run(command, in_image(harness))
    to = tmp_path / "to"
    fetched = harness.cluster.fetch_outputs(info.id, to)
    assert fetched == [to / "file", to / "hard", to / "link"]
    assert (to / "link").is_symlink()
    assert (to / "hard").read_text() == "in\n"
    assert (to / "empty").is_dir()
    assert (to / "file").stat().st_mode & 0o100
    (to / "empty").rmdir()
    (to / "empty").symlink_to(tmp_path)
    (tmp_path / "outside").write_text("outside")
    for name in ("file", "hard"):
        (to / name).unlink()
        (to / name).symlink_to(tmp_path / "outside")
    harness.cluster.fetch_outputs(info.id, to)
    assert not (to / "empty").is_symlink(), "nothing is written through a link"
    assert (tmp_path / "outside").read_text() == "outside"
    assert (to / "hard").read_text() == "in\n"


def test_a_shell_is_enough(harness: DockerHarness, shell_image: str) -> None:
    info = harness.run('echo "from $0"; echo x > $FRAY_OUTPUT_DIR/f; exit 7', RuntimeEnv(container_image=shell_image))
    assert (info.exit_code, harness.cluster.get_logs(info.id)) == (7, "from /bin/sh\n")


def test_an_image_without_a_shell_fails_its_job(harness: DockerHarness) -> None:
    toolbox = harness.cluster._toolbox  # type: ignore[attr-defined]
    toolbox.ensure_image()
    info = harness.run("echo hi", RuntimeEnv(container_image=toolbox.image))
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
    assert "/bin/sh" in info.message


# What people see in the engine


def test_the_engines_own_log_is_readable(harness: DockerHarness) -> None:
    info = harness.run("echo first; printf 'bar \\377\\n'; echo last", in_image(harness))
    shown = harness.engine.api.logs(harness.command_container(info.id)["Id"]).decode().split("\n")
    assert "first" in shown
    assert "last" in shown
    assert "\x1e+bar \\xff" in shown


def test_a_container_exits_as_its_command_did(harness: DockerHarness) -> None:
    for command, code in (("exit 3", 3), ("true", 0), ("kill -9 $$", 137)):
        info = harness.run(command, in_image(harness))
        assert harness.exit_code(harness.command_container(info.id)) == code


def test_docker_stop_is_not_frays_stop(harness: DockerHarness) -> None:
    job_id = harness.cluster.create_job("trap 'echo TERM; exit' TERM; echo ready; while :; do sleep 0.05; done")
    harness.until_logged(job_id, b"ready")
    harness.engine.api.stop(harness.command_container(job_id)["Id"])
    info = harness.end(job_id)
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
    assert "docker stop" in info.message
    assert b"TERM" in harness.cluster.read_logs(job_id), "it was asked, not killed"


def test_a_paused_job_says_so_and_can_be_stopped(harness: DockerHarness) -> None:
    job_id = harness.cluster.create_job("echo ready; sleep 600", in_image(harness))
    harness.until_logged(job_id, b"ready")
    harness.engine.api.pause(harness.command_container(job_id)["Id"])
    info = harness.cluster.get_job(job_id)
    assert (info.status, info.message) == (JobStatus.RUNNING, "paused in the engine")
    harness.cluster.delete_job(job_id)
    assert harness.end(job_id).status is JobStatus.STOPPED


def test_a_holder_ends_with_the_decision_that_it_makes(harness: DockerHarness, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(str(time.time_ns()))
    env = RuntimeEnv(working_dir=str(tmp_path))
    job_id = harness.cluster.create_job("echo ready; sleep 600", env)
    harness.until_logged(job_id, b"ready")
    (holder,) = [each for each in harness.containers(job_id) if each["Config"]["Labels"]["fray.role"] == "holder"]
    assert harness.exit_code(holder) == 0
    assert b'{"event":"released"' in harness.engine.api.logs(holder["Id"]).splitlines()[-1]
    failed = harness.run("true", RuntimeEnv(container_image=f"{harness.registry.address}/no/such:image"))
    (holder,) = harness.containers(failed.id)
    assert harness.exit_code(holder) == 1
    assert harness.engine.api.logs(holder["Id"]).count(b'"ended"') == 1


# Names


def test_what_a_killed_client_left_is_nobodys_job(harness: DockerHarness) -> None:
    plan = harness.cluster.plan_job("echo ran", in_image(harness), job_id="left-behind")
    native = json.loads(str(plan))["native"]
    # Created, and never started: as a client leaves it that dies between the two.
    left = harness.engine.api.create_container_from_config(native["container"], "fray.left-behind")["Id"]
    assert "left-behind" not in [info.id for info in harness.cluster.list_jobs()]
    with pytest.raises(JobNotFoundError):
        harness.cluster.get_job("left-behind")
    with pytest.raises(JobExistsError):
        harness.cluster.create_job("echo ran", in_image(harness), job_id="left-behind")
    harness.engine.api.remove_container(left)


def test_a_foreign_container_of_that_name_is_left_alone(harness: DockerHarness) -> None:
    foreign = {"Image": harness.base_image, "Cmd": ["true"]}
    container = harness.engine.api.create_container_from_config(foreign, "fray.foreign")["Id"]
    try:
        with pytest.raises(JobExistsError, match=r"none of Fray's"):
            harness.cluster.create_job("true", in_image(harness), job_id="foreign")
        assert harness.engine.inspect_container(container)
    finally:
        harness.engine.api.remove_container(container)


def test_adopting_leaves_a_foreign_container_alone(harness: DockerHarness) -> None:
    foreign = {"Image": harness.base_image, "Cmd": ["sleep", "600"]}
    container = harness.engine.api.create_container_from_config(foreign, "fray.foreign-adopt")["Id"]
    try:
        for start in (False, True):
            if start:
                harness.engine.api.start(container)
            with pytest.raises(JobExistsError, match=r"none of Fray's"):
                harness.cluster.create_job("true", in_image(harness), job_id="foreign-adopt", if_exists="adopt")
        assert harness.engine.inspect_container(container)
    finally:
        harness.engine.api.remove_container(container, force=True)


def test_purging_takes_no_container_that_is_not_the_jobs(harness: DockerHarness) -> None:
    info = harness.run("true", in_image(harness))
    foreign = {"Image": harness.base_image, "Cmd": ["true"]}
    container = harness.engine.api.create_container_from_config(foreign, f"fray.{info.id}.run")["Id"]
    try:
        harness.cluster.purge_job(info.id)
        assert harness.engine.inspect_container(container)
    finally:
        harness.engine.api.remove_container(container)


def test_what_is_made_of_a_jobs_container_is_no_job(harness: DockerHarness) -> None:
    info = harness.run("true", in_image(harness))
    harness.engine.api.commit(harness.command_container(info.id)["Id"], "fray-test-committed", "1")
    copy = {"Image": "fray-test-committed:1", "Entrypoint": ["true"]}
    container = harness.engine.api.create_container_from_config(copy)["Id"]
    try:
        assert [each.id for each in harness.cluster.list_jobs()].count(info.id) == 1
        other = harness.run("echo other", RuntimeEnv(container_image="fray-test-committed:1"))
        assert other.entrypoint == "echo other"
    finally:
        harness.engine.api.remove_container(container)
        for each in harness.containers(other.id):
            harness.engine.api.remove_container(each["Id"], force=True)
        harness.engine.api.remove_image("fray-test-committed:1")


def test_a_finished_job_is_not_run_again_by_hand(harness: DockerHarness) -> None:
    info = harness.run("echo ran", in_image(harness))
    container = harness.command_container(info.id)
    assert harness.exit_code(container) == 0
    harness.engine.api.start(container["Id"])
    assert harness.exit_code(container) != 0
    assert harness.connect().get_job(info.id) == info
    assert harness.cluster.get_logs(info.id) == "ran\n"


def test_engines_times_are_read_in_any_zone() -> None:
    from fray.backend.docker._start import _seconds

    times = ["2026-11-25T09:50:33.317430984Z", "2026-11-25T18:50:33.3+09:00", "2026-11-25T02:50:33-07:00"]
    assert len({_seconds(each) for each in times}) == 1


# Remote engines


def test_an_engine_behind_tls_with_client_certificates(
    engine: Engine, base_image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docker_config: Path
) -> None:
    with TlsProxy(engine.endpoint.host, tmp_path) as proxy:
        for name, value in proxy.environment().items():
            monkeypatch.setenv(name, value)
        _runs_a_job_with_a_secret(fray.connect("docker"), base_image)
        for name in proxy.environment():
            monkeypatch.delenv(name)
        with pytest.raises((ConnectionFailedError, fray.PlatformError)):
            fray.connect(f"docker:{proxy.host}").list_jobs()
        proxy.create_context("far", docker_config)
        _runs_a_job_with_a_secret(fray.connect("docker:far"), base_image)
        monkeypatch.setenv("DOCKER_CONTEXT", "far")
        assert find_endpoint().host == find_endpoint("far").host
        _runs_a_job_with_a_secret(fray.connect("docker"), base_image)


def _runs_a_job_with_a_secret(cluster: fray.ClusterContext, image: str) -> None:
    with cluster:
        env = RuntimeEnv(container_image=image, secrets={"S": "s3cret"})
        job_id = cluster.create_job("echo ${#S}; sleep 0.1; echo end", env)
        assert list(cluster.stream_logs(job_id)) == ["6", "end"]
        assert cluster.wait(job_id, 60).status is JobStatus.SUCCEEDED
        cluster.purge_job(job_id)


def test_an_endpoint_says_itself_to_the_docker_command(monkeypatch: pytest.MonkeyPatch, docker_config: Path) -> None:
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.delenv("DOCKER_CONTEXT", raising=False)
    assert find_endpoint().environment() == {"DOCKER_HOST": "unix:///var/run/docker.sock"}
    assert find_endpoint("tcp://h:1").environment() == {"DOCKER_HOST": "tcp://h:1"}
    secure = Endpoint("tcp://h:2", "test", "/c/ca.pem", ("/c/cert.pem", "/c/key.pem"))
    assert secure.environment() == {"DOCKER_HOST": "tcp://h:2", "DOCKER_CERT_PATH": "/c", "DOCKER_TLS_VERIFY": "1"}
    monkeypatch.setenv("DOCKER_HOST", "tcp://from-the-environment:3")
    assert find_endpoint().named_by == "DOCKER_HOST"


# The job's own Fray


def test_connect_in_a_job_says_why_it_cannot(harness: DockerHarness) -> None:
    info = harness.run('python -c "import fray; fray.connect()"', in_image(harness))
    assert "FRAY_CLUSTER" in harness.cluster.get_logs(info.id)
    assert "UnsupportedError" in harness.cluster.get_logs(info.id)


def test_logs_are_read_from_any_offset_of_a_long_log(harness: DockerHarness) -> None:
    program = "for i in range(60000): print(i, 'x' * (i % 97))"
    info = harness.run(f'python -c "{program}"', in_image(harness))
    whole = harness.cluster.read_logs(info.id)
    assert whole.count(b"\n") == 60000
    for offset in (1, 4096, len(whole) // 3, len(whole) - 70_000, len(whole) - 1, len(whole), len(whole) + 5):
        assert harness.cluster.read_logs(info.id, offset) == whole[offset:]
    for tail in (1, 10, 3000, 59_999, 70_000):
        assert harness.cluster.get_logs(info.id, tail=tail).splitlines() == whole.decode().splitlines()[-tail:]


def test_a_tail_of_a_growing_log_is_right(harness: DockerHarness) -> None:
    # Faster than one reads it, but not faster than the engine gives it out.
    command = "i=0; while :; do i=$((i+1)); echo line $i; [ $((i % 500)) -gt 0 ] || sleep 0.01; done"
    job_id = harness.cluster.create_job(command, in_image(harness))
    harness.until_logged(job_id, b"line 100\n")
    for tail in (1, 5, 3000):
        for _ in range(5):
            lines = harness.cluster.get_logs(job_id, tail=tail).splitlines()
            numbers = [int(line.removeprefix("line ")) for line in lines if line.startswith("line ")]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            assert len(lines) == tail or numbers[0] == 1
    followed = harness.cluster.stream_logs(job_id, tail=10_000_000)
    assert harness.soon(lambda: next(followed), "a line") == "line 1"
    followed.close()  # type: ignore[attr-defined]


def test_a_tail_of_a_long_log_is_a_small_answer(harness: DockerHarness) -> None:
    info = harness.run("yes 'a line of some length' | head -c 30000000", in_image(harness))
    sent = _Counter()
    session = harness.cluster._engine.api  # type: ignore[attr-defined]
    session.hooks["response"].append(sent)
    assert harness.cluster.get_logs(info.id, tail=3).count("\n") <= 3
    assert sent.bytes < 3_000_000
    assert info.exit_code == 0


class _Counter:
    """Counts what the engine answers, as it is read."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, response: Any, *args: object, **kwargs: object) -> None:
        stream = response.raw.stream

        def counted(*arguments: Any, **options: Any) -> Iterator[bytes]:
            for chunk in stream(*arguments, **options):
                self.bytes += len(chunk)
                yield chunk

        response.raw.stream = counted


def test_a_progress_bar_is_seen_before_its_line_ends(harness: DockerHarness) -> None:
    job_id = harness.cluster.create_job("printf '50%%'; sleep 600", in_image(harness))
    harness.until_logged(job_id, b"50%")


def test_many_readers_follow_one_job(harness: DockerHarness) -> None:
    job_id = harness.cluster.create_job("for i in 1 2 3 4 5; do echo $i; sleep 0.05; done", in_image(harness))
    seen: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: seen.append(list(harness.cluster.stream_logs(job_id)))) for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert seen == [["1", "2", "3", "4", "5"]] * 5


def test_the_command_of_fray_runs_jobs_in_containers(harness: DockerHarness) -> None:
    command = [sys.executable, "-m", "fray.cli", "run", "-c", harness.spec, "--image", harness.base_image]
    done = subprocess.run([*command, "--", "echo", "a  b"], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stdout) == (0, "a  b\n"), done.stderr
    assert "SUCCEEDED" in done.stderr


def test_listing_gives_the_newest_first_without_reading_the_rest(harness: DockerHarness) -> None:
    ids = [harness.cluster.create_job("true", in_image(harness)) for _ in range(12)]
    for job_id in ids:
        harness.end(job_id)
    fresh = harness.connect()
    assert [info.id for info in fresh.list_jobs(limit=3)] == ids[-3:][::-1]
    assert [info.id for info in fresh.list_jobs() if info.id in ids] == ids[::-1]
