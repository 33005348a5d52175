"""What goes wrong around a job in a container: clients and engines that die, images that cannot be had, full disks."""

from __future__ import annotations

import io
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import fray
from fray.backend.docker import _outputs
from fray.backend.docker._engine import Engine
from fray.backend.docker.cluster import DockerClusterContext
from fray.errors import ConnectionFailedError, InvalidValueError, JobExistsError, JobNotFoundError, PlatformError
from fray.types import JobStatus, Resource, RuntimeEnv, TerminationReason

from .docker_harness import DockerHarness
from .private_engine import PrivateEngine
from .registry import Registry

pytestmark = pytest.mark.xdist_group("docker")

SEEDS = range(8 * int(os.environ.get("FRAY_SOAK") or 1))
DEADLINE_SECONDS = 90.0

MakeEngine = Callable[..., PrivateEngine]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def harness(engine: Engine, base_image: str, registry: Registry) -> Iterator[DockerHarness]:
    with DockerHarness(engine, base_image, registry) as harness:
        yield harness


def until(condition: Callable[[], object], what: str) -> None:
    give_up = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < give_up, f"not within {DEADLINE_SECONDS} s: {what}"
        time.sleep(0.01)


def follow(cluster: fray.ClusterContext, job_id: str) -> tuple[threading.Thread, list[str]]:
    """Follow a log in a thread; a job that is removed meanwhile is its last line."""
    lines: list[str] = []

    def read() -> None:
        try:
            lines.extend(cluster.stream_logs(job_id))
        except JobNotFoundError:
            lines.append("gone")

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    return thread, lines


def succeeds_saying(cluster: DockerClusterContext, said: str, env: RuntimeEnv) -> None:
    """Run a job that says something, and ends well."""
    info = cluster.wait(cluster.create_job(f"echo '{said}'", env), DEADLINE_SECONDS)
    assert info.status is JobStatus.SUCCEEDED, info
    assert cluster.get_logs(info.id) == f"{said}\n"


# The engine


# The pause is for whoever ends the engine: what it has read and not written yet as it is killed is lost. So is what it
# has not read yet of a job that ends before it is back.
TICKS = (
    "i=0; while [ $i -lt 60 ]; do echo line $i; sleep 0.05; i=$((i+1)); [ $i -ne 10 ] || sleep 8; done; "
    "until [ -e /is-back ]; do sleep 0.1; done; echo back"
)


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_a_job_and_its_log_go_on_while_the_engine_is_away(
    private_engine: MakeEngine, engine: Engine, shell_image: str, way: str
) -> None:
    own = private_engine(live_restore=True)
    own.start()
    own.load(shell_image, engine)
    with DockerClusterContext(own.endpoint.host) as cluster:
        job_id = cluster.create_job(TICKS, RuntimeEnv(container_image=shell_image))
        thread, lines = follow(cluster, job_id)
        until(lambda: len(lines) >= 10, "the pause")
        getattr(own, way)()
        time.sleep(9)  # it writes while nobody takes it
        own.start()
        api = cluster._engine.api
        (container,) = api.containers(filters={"label": f"fray.job={job_id}"})
        api.exec_start(api.exec_create(container["Id"], ["sh", "-c", ": > /is-back"])["Id"])
        info = cluster.wait(job_id, DEADLINE_SECONDS)
        assert info.status is JobStatus.SUCCEEDED
        thread.join(DEADLINE_SECONDS)
        assert lines == [*(f"line {i}" for i in range(60)), "back"]
        assert cluster.get_logs(job_id).splitlines() == lines
    own.close()


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_a_job_that_ends_with_its_engine_is_lost(
    private_engine: MakeEngine, engine: Engine, shell_image: str, way: str
) -> None:
    own = private_engine()
    own.start()
    own.load(shell_image, engine)
    with DockerClusterContext(own.endpoint.host) as cluster:
        finished = cluster.create_job("echo done; exit 3", RuntimeEnv(container_image=shell_image))
        ended = cluster.wait(finished, DEADLINE_SECONDS)
        job_id = cluster.create_job("echo begun; sleep 600", RuntimeEnv(container_image=shell_image))
        thread, lines = follow(cluster, job_id)
        until(lambda: lines or not thread.is_alive(), "a line")
        getattr(own, way)()
        own.start()
        info = cluster.wait(job_id, DEADLINE_SECONDS)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
        assert info.message
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive(), "a followed log ends with its job"
        assert lines == ["begun"]
        with DockerClusterContext(own.endpoint.host) as other:
            assert other.get_job(job_id) == info
            assert other.get_job(finished) == ended, "what was over stays as it was"
            assert other.get_logs(finished) == "done\n"
    own.close()


def test_the_runner_is_brought_back_where_its_volume_was_pruned(
    private_engine: MakeEngine, engine: Engine, shell_image: str
) -> None:
    own = private_engine()
    own.start()
    own.load(shell_image, engine)
    client = Engine(own.endpoint)
    api = client.api
    with DockerClusterContext(own.endpoint.host) as cluster:
        image = RuntimeEnv(container_image=shell_image)
        succeeds_saying(cluster, "first", image)
        volume = cluster._toolbox.volume
        for each in api.containers(all=True, filters={"volume": volume}):
            api.remove_container(each["Id"], force=True)
        api.remove_volume(volume)
        api.create_volume(volume)  # empty, as the engine makes one by itself
        succeeds_saying(cluster, "after it was emptied", image)
        for each in api.containers(all=True, filters={"volume": volume}):
            api.remove_container(each["Id"], force=True)
        api.remove_volume(volume)
        mount = {"Type": "volume", "Source": volume, "Target": "/.fray"}
        half = {"Image": shell_image, "Cmd": ["mkdir", "/.fray/light"], "HostConfig": {"Mounts": [mount]}}
        filler = api.create_container_from_config(half)["Id"]
        api.start(filler)  # half full, as a fill leaves it that is cut off
        api.wait(filler)
        api.remove_container(filler)
        succeeds_saying(cluster, "after it was half filled", image)
    client.close()
    own.close()


def test_an_absent_engine_is_said_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConnectionFailedError, match="docker info") as refused:
        fray.connect(f"docker:unix://{tmp_path}/no.sock")
    assert str(tmp_path) in str(refused.value)


def test_a_full_disk_of_the_engines_is_said_and_leaves_no_half_job(
    private_engine: MakeEngine, engine: Engine, shell_image: str, directory: Path
) -> None:
    own = private_engine(disk_mebibytes=64)
    own.start()
    own.load(shell_image, engine)
    client = Engine(own.endpoint)
    with DockerClusterContext(own.endpoint.host, base_image=shell_image) as cluster:
        image = RuntimeEnv(container_image=shell_image)
        assert cluster.wait(cluster.create_job("true", image), DEADLINE_SECONDS).status is JobStatus.SUCCEEDED
        # A job that fills the disk itself gets the error, not the engine.
        filler = cluster.create_job('dd if=/dev/zero of=$FRAY_OUTPUT_DIR/big bs=1M; echo "dd: $?"; exit 4', image)
        info = cluster.wait(filler, DEADLINE_SECONDS)
        assert info.status is JobStatus.FAILED
        assert info.reason in (TerminationReason.EXITED, TerminationReason.LOST), info
        # A build that does not fit fails its job, or is not accepted; nothing half done stays under its name.
        (directory / "large.bin").write_bytes(os.urandom(24 << 20))
        images = {tag for each in client.api.images() for tag in each["RepoTags"] or ()}
        try:
            job_id = cluster.create_job("true", RuntimeEnv(working_dir=str(directory)), job_id="too-large")
        except PlatformError as error:
            assert "no space left" in str(error)  # noqa: PT017 - one of two right ways
            with pytest.raises(JobNotFoundError):
                cluster.get_job("too-large")
        else:
            failed = cluster.wait(job_id, DEADLINE_SECONDS)
            assert (failed.status, failed.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
            assert "no space left" in failed.message + cluster.get_logs(job_id)
        assert {tag for each in client.api.images() for tag in each["RepoTags"] or ()} - images <= {
            cluster._toolbox.image
        }
        # Once there is space, all is well again.
        cluster.purge_job(filler)
        assert cluster.wait(cluster.create_job("true", image), DEADLINE_SECONDS).status is JobStatus.SUCCEEDED
    client.close()
    own.close()


# Images


def test_an_image_that_is_nowhere_fails_its_job(harness: DockerHarness) -> None:
    name = f"{harness.registry.address}/no/such:image"
    info = harness.run("echo ran", RuntimeEnv(container_image=name))
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
    assert name in info.message
    assert "manifest unknown" in info.message or "not found" in info.message
    assert (info.start_time, info.exit_code, info.attempts) == (None, None, ())


def test_an_image_that_may_not_be_pulled_is_refused(engine: Engine, base_image: str, registry: Registry) -> None:
    with DockerHarness(engine, base_image, registry, pull="never") as harness:
        for call in (harness.cluster.plan_job, harness.cluster.create_job):
            with pytest.raises(InvalidValueError, match="never"):
                call("true", RuntimeEnv(container_image="no-such-image-4f1c"))
        assert harness.run("true", RuntimeEnv(container_image=base_image)).status is JobStatus.SUCCEEDED


def test_a_registry_that_refuses_is_the_jobs_failure_and_credentials_mend_it(
    harness: DockerHarness, private_registry: Registry, shell_image: str, docker_config: Path
) -> None:
    reference = private_registry.push(shell_image, "refused:1")
    info = harness.run("echo ran", RuntimeEnv(container_image=reference))
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
    assert "docker login" in info.message
    private_registry.log_in(docker_config)
    cluster = harness.connect()
    info = harness.end(cluster.create_job("echo ran", RuntimeEnv(container_image=reference)))
    assert info.status is JobStatus.SUCCEEDED, info
    harness.engine.api.remove_image(reference, force=True)


def test_an_image_is_pulled_anew_where_that_is_asked_for(
    engine: Engine, base_image: str, shell_image: str, registry: Registry
) -> None:
    reference = registry.push(shell_image, "moving:latest")
    with DockerHarness(engine, base_image, registry, pull="always") as harness:
        env = RuntimeEnv(container_image=reference)
        ask = "command -v python3 || echo none"
        assert harness.cluster.get_logs(harness.run(ask, env).id) == "none\n"
        registry.push(base_image, "moving:latest")
        engine.api.tag(shell_image, f"{registry.address}/moving", "latest")  # what is here is the old one
        assert harness.cluster.get_logs(harness.run(ask, env).id) == "/usr/bin/python3\n"
    engine.api.remove_image(reference, force=True)


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_a_failing_build_step_is_the_jobs_failure(
    engine: Engine, base_image: str, registry: Registry, directory: Path, builder: str
) -> None:
    (directory / "Dockerfile").write_text(f"FROM {base_image}\nRUN echo step-one-4f1c\nRUN echo boom-4f1c; exit 3\n")
    with DockerHarness(engine, base_image, registry, dockerfile="Dockerfile", builder=builder) as harness:
        before = {each["Id"] for each in engine.api.containers(all=True)}
        env = RuntimeEnv()
        job_id = harness.cluster.create_job("echo ran", env)
        lines = harness.lines(job_id)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED)
        assert "boom-4f1c" in info.message
        assert any("step-one-4f1c" in line for line in lines), "the tool's own output is the log"
        assert lines == harness.cluster.get_logs(job_id).splitlines()
        tag = harness.cluster.plan_job("echo ran", env).image
        assert tag
        assert engine.inspect_image(tag) is None, "no half image stays"
        after = {each["Id"] for each in engine.api.containers(all=True)}
        assert len(after - before) == 1, "of the build no container stays"


@pytest.mark.parametrize("builder", ["buildkit", "classic"])
def test_a_build_that_fails_with_long_lines_says_so(
    engine: Engine, base_image: str, registry: Registry, directory: Path, builder: str
) -> None:
    long = "for i in $(seq 20); do head -c 2000 /dev/zero | tr '\\0' '\"'; echo; done"
    (directory / "Dockerfile").write_text(f"FROM {base_image}\nRUN {long}; echo boom-4f1c; exit 3\n")
    with DockerHarness(engine, base_image, registry, dockerfile="Dockerfile", builder=builder) as harness:
        info = harness.run("echo ran")
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.SETUP_FAILED), info
        assert "boom-4f1c" in harness.cluster.get_logs(info.id)


# Clients


def test_a_job_whose_secrets_got_lost_is_not_accepted(engine: Engine, base_image: str, registry: Registry) -> None:
    from .engine_proxy import Proxy

    with (
        DockerHarness(engine, base_image, registry) as harness,
        Proxy(engine.endpoint.host, is_held=lambda data: b"4f1c-hidden" in data) as lossy,
        DockerClusterContext(lossy.host, grace_seconds=1) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        env = RuntimeEnv(container_image=base_image, secrets={"S": "4f1c-hidden"})
        submitting = pool.submit(cluster.create_job, "echo ran", env, job_id="lost-handover")
        assert lossy.has_held.wait(DEADLINE_SECONDS)
        until(lambda: engine.inspect_container("fray.lost-handover"), "the container")
        assert "lost-handover" not in [info.id for info in harness.cluster.list_jobs()], "it does not count yet"
        with lossy.cut_off():
            until(lambda: not engine.is_running("fray.lost-handover"), "the runner to give up")
        with pytest.raises(PlatformError):
            submitting.result(DEADLINE_SECONDS)
        with pytest.raises(JobNotFoundError):
            harness.cluster.get_job("lost-handover")
        left = engine.inspect_container("fray.lost-handover")
        if left is not None:
            engine.api.remove_container(left["Id"], force=True)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("way", ["at once", "with a secret", "built"])
def test_a_client_killed_while_it_submits_leaves_nothing_half_done(
    harness: DockerHarness, directory: Path, way: str, seed: int
) -> None:
    job_id = f"killed-{seed}-{os.getpid()}"
    draw = random.Random(f"{way} {seed}")
    (directory / "file").write_text(f"{way} {seed} {time.time_ns()}")  # an image that is not there
    env = {
        "at once": f"fray.RuntimeEnv(container_image={harness.base_image!r})",
        "with a secret": f"fray.RuntimeEnv(container_image={harness.base_image!r}, secrets={{'S': 'x'}})",
        "built": "fray.RuntimeEnv(secrets={'S': 'x'})",
    }[way]
    command = "echo ran; exit ${S:+5}"
    program = f"""
import fray
cluster = fray.connect({harness.spec!r}, **{harness.options!r})
cluster.list_jobs(limit=1)
print("connected", flush=True)
cluster.create_job({command!r}, {env}, job_id={job_id!r})
print("submitted", flush=True)
cluster.wait({job_id!r})
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline() == b"connected\n"
        # Up to what a submission takes here, and a bit into the preparation and the wait.
        time.sleep(draw.uniform(0, 1.5 if way == "built" else 0.4))
        client.kill()
        was_told = b"submitted" in client.stdout.read()
    # The process that prepares it may be about to have it accepted, or not to.
    until(lambda: not _preparers(harness), "those that prepare jobs to end")
    stale_at, give_up = time.monotonic() + 2, time.monotonic() + DEADLINE_SECONDS
    while True:
        assert time.monotonic() < give_up, "neither is the job there, nor is its id free"
        try:
            harness.cluster.get_job(job_id)
            break
        except JobNotFoundError:
            assert not was_told
        left = harness.engine.inspect_container(f"fray.{job_id}")
        if left is None:
            with suppress(JobExistsError):  # the engine was still at what the killed client had asked for
                harness.cluster.create_job(command, eval(env), job_id=job_id)  # the id is free
                break
        elif time.monotonic() > stale_at:
            # Whoever wants its name removes it when it is a minute old: only age tells it from one on its way.
            harness.engine.api.remove_container(left["Id"], force=True)
        time.sleep(0.02)
    info = harness.end(job_id)
    assert (info.status, info.exit_code) == ((JobStatus.SUCCEEDED, 0) if way == "at once" else (JobStatus.FAILED, 5))
    assert harness.cluster.get_logs(job_id) == "ran\n", "it ran once"


def _preparers(harness: DockerHarness) -> list[psutil.Process]:
    """The processes that prepare jobs of the harness."""
    found = []
    for process in psutil.process_iter():
        try:
            is_one = "fray.backend.docker._prepare" in " ".join(process.cmdline())
            if is_one and process.environ().get("LOGNAME") == harness.owner:
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_killed_preparation_is_a_lost_job(harness: DockerHarness) -> None:
    with harness.hold_pending() as held:
        job_id = harness.cluster.create_job("echo ran", held)
        (preparer,) = _preparers(harness)
        preparer.send_signal(signal.SIGKILL)
        info = harness.end(job_id)
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
    assert "prepared the job" in info.message
    assert harness.connect().get_job(job_id) == info
    harness.later()
    assert harness.cluster.read_logs(job_id) == b""


def test_a_deleted_build_is_given_up(engine: Engine, base_image: str, registry: Registry, directory: Path) -> None:
    (directory / "Dockerfile").write_text(f"FROM {base_image}\nRUN echo begun-4f1c; sleep 599\n")
    with DockerHarness(engine, base_image, registry, dockerfile="Dockerfile") as harness:
        job_id = harness.cluster.create_job("echo ran", RuntimeEnv())
        until(lambda: _processes("sleep 599"), "the step to run")
        harness.cluster.delete_job(job_id)
        info = harness.end(job_id)
        assert (info.status, info.reason) == (JobStatus.STOPPED, TerminationReason.STOPPED_BY_USER)
        until(lambda: not _preparers(harness), "the preparation to end")
        until(lambda: not _processes("sleep 599"), "the step to end")


def _processes(command: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith(command):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_thirty_jobs_at_once_from_three_clients(harness: DockerHarness) -> None:
    clients = [harness.cluster, harness.connect(), harness.connect()]
    env = RuntimeEnv(container_image=harness.base_image)
    with ThreadPoolExecutor(9) as pool:
        calls = [
            pool.submit(clients[number % 3].create_job, f"echo {number}; exit {number % 3}", env)
            for number in range(30)
        ]
        ids = [call.result() for call in calls]
        infos = list(pool.map(lambda job_id: clients[0].wait(job_id, DEADLINE_SECONDS), ids))
    assert [info.exit_code for info in infos] == [number % 3 for number in range(30)]
    for number, job_id in enumerate(ids):
        assert clients[1].get_logs(job_id) == f"{number}\n"
    assert len(set(ids)) == 30
    assert {info.id for info in clients[2].list_jobs()} >= set(ids)


# Jobs


def test_a_job_deaf_to_sigterm_is_killed_after_its_grace(harness: DockerHarness) -> None:
    env = RuntimeEnv(container_image=harness.base_image)
    job_id = harness.cluster.create_job("trap '' TERM; echo ready; while :; do sleep 0.05; done", env)
    harness.until_logged(job_id, b"ready")
    harness.cluster.delete_job(job_id)
    info = harness.end(job_id)
    assert (info.status, info.exit_code) == (JobStatus.STOPPED, 137)


@pytest.mark.parametrize("eater", ["python", "its child"])
def test_a_job_that_takes_too_much_memory_says_so(harness: DockerHarness, eater: str) -> None:
    env = RuntimeEnv([], [Resource("memory", 64 << 20)], container_image=harness.base_image)
    eat = "python -c 'b = bytearray(1 << 30); print(len(b))'"
    info = harness.run(f"exec {eat}" if eater == "python" else f"{eat}", env)
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.OUT_OF_MEMORY), info
    assert info.exit_code == 137


def test_a_hundred_megabytes_come_back_exactly(harness: DockerHarness) -> None:
    program = "import sys; w = sys.stdout.write; [w('%099d\\n' % i) for i in range(1000000)]"
    info = harness.run(f'python -c "{program}"', RuntimeEnv(container_image=harness.base_image))
    assert info.exit_code == 0
    log = harness.cluster.read_logs(info.id)
    assert len(log) == 100_000_000
    assert log == b"".join(b"%099d\n" % i for i in range(1_000_000))


def test_lines_that_the_engine_would_cut_come_back_whole(harness: DockerHarness) -> None:
    program = "import sys; [sys.stdout.write('x\\u00fc'[n % 2] * n + '\\n') for n in range(16000, 17000, 97)]"
    info = harness.run(f'python -c "{program}"', RuntimeEnv(container_image=harness.base_image))
    expected = [("ü" if n % 2 else "x") * n for n in range(16000, 17000, 97)]
    assert harness.lines(info.id) == expected
    assert harness.cluster.read_logs(info.id).decode().splitlines() == expected


def test_a_root_process_that_the_images_user_left_ends_with_its_job(harness: DockerHarness) -> None:
    image = "fray-test-setuid:1"
    dockerfile = (
        f"FROM {harness.base_image}\n"
        "RUN cp $(readlink -f /usr/bin/python3) /usr/bin/rooted && chmod u+s /usr/bin/rooted\n"
        "USER 65534:65534\n"
    )
    subprocess.run(
        ["docker", "build", "-q", "-t", image, "-"],
        input=dockerfile.encode(),
        check=True,
        capture_output=True,
        env={"PATH": "/usr/bin:/bin", **harness.engine.endpoint.environment()},
    )
    left = "import os, time; os.setuid(0); print(os.getuid(), flush=True); time.sleep(600)"
    command = f'rooted -c "{left}" > /tmp/who & until grep -q 0 /tmp/who; do sleep 0.02; done; exit 6'
    info = harness.run(command, RuntimeEnv(container_image=image))
    assert info.exit_code == 6
    assert "another user" in info.message


def test_jobs_that_die_at_once_are_told_right(harness: DockerHarness) -> None:
    env = RuntimeEnv(container_image=harness.base_image)
    ids = [harness.cluster.create_job(command, env) for command in ("exit 9", "kill -9 $$", "no-such-command")]
    infos = [harness.end(job_id) for job_id in ids]
    assert [info.exit_code for info in infos] == [9, 137, 127]
    assert [info.reason for info in infos] == [
        TerminationReason.EXITED,
        TerminationReason.KILLED,
        TerminationReason.EXITED,
    ]


def _begins(of: object, name: str, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event that is set when a method is called."""
    method, begun = getattr(of, name), threading.Event()

    def call(*arguments: Any) -> Any:
        begun.set()
        return method(*arguments)

    monkeypatch.setattr(of, name, call)
    return begun


def test_a_container_removed_behind_ones_back_is_a_lost_job(
    harness: DockerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = RuntimeEnv(container_image=harness.base_image)
    job_id = harness.cluster.create_job("echo begun; sleep 600", env)
    harness.until_logged(job_id, b"begun")
    with ThreadPoolExecutor(1) as pool:
        asked = _begins(harness.cluster._engine, "wait_for_end", monkeypatch)  # type: ignore[attr-defined]
        waiting = pool.submit(harness.cluster.wait, job_id, DEADLINE_SECONDS)
        assert asked.wait(DEADLINE_SECONDS)
        thread, lines = follow(harness.cluster, job_id)
        until(lambda: lines or not thread.is_alive(), "a line")
        time.sleep(1)  # the engine has got what it was asked
        harness.engine.api.remove_container(f"fray.{job_id}", force=True)
        info = waiting.result(DEADLINE_SECONDS)
    assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)
    assert "removed" in info.message
    thread.join(DEADLINE_SECONDS)
    assert lines == ["begun", "gone"], "no log ends in the middle without a word"
    with pytest.raises(JobNotFoundError):  # the engine is the only store: to others it never was
        harness.connect().get_job(job_id)


def test_the_container_of_a_prepared_job_removed_is_a_lost_job_to_everybody(
    harness: DockerHarness, directory: Path
) -> None:
    (directory / "file").write_text(str(time.time_ns()))
    job_id = harness.cluster.create_job("echo begun; sleep 600")
    harness.until_logged(job_id, b"begun")
    harness.engine.api.remove_container(f"fray.{job_id}.run", force=True)
    for cluster in (harness.cluster, harness.connect()):
        info = harness.end(job_id, cluster)
        assert (info.status, info.reason) == (JobStatus.FAILED, TerminationReason.LOST)


# Secrets


def test_a_secret_is_nowhere_in_the_engine(harness: DockerHarness, directory: Path) -> None:
    """Searched for in all that the engine has written to its disk since, layers too, and in all that it answers."""
    secret = f"s3cret-{os.getpid()}-{time.time_ns()}"
    (directory / "file").write_text(str(time.time_ns()))
    since = directory.parent / "since"
    since.touch()
    ways = {"built": RuntimeEnv(["six"], secrets={"S": secret})}
    ways["at-once"] = RuntimeEnv(container_image=harness.base_image, secrets={"S": secret})
    for name, env in ways.items():
        job_id = harness.cluster.create_job("echo ${#S}; sleep 600", env, job_id=f"searched-{name}-{time.time_ns()}")
        harness.until_logged(job_id, str(len(secret)).encode())
        container = harness.command_container(job_id)
        _search(secret, since, harness)
        events = harness.engine.api.events(since=0, until=time.time(), decode=True)
        assert not [event for event in events if secret in str(event)]
        exported = b"".join(harness.engine.api.export(container["Id"])) if name == "at-once" else b""
        assert secret.encode() not in exported
        harness.cluster.delete_job(job_id)
        harness.end(job_id)
        _search(secret, since, harness)


def _search(secret: str, since: Path, harness: DockerHarness) -> None:
    for where, content in harness.observable():
        assert secret.encode() not in content, where
    root = harness.engine.info["DockerRootDir"]
    if os.access(root, os.R_OK):
        newer = ["find", root, "-name", "merged", "-prune", "-o", "-type", "f", "-cnewer", str(since), "-print0"]
        files = subprocess.run(newer, stdout=subprocess.PIPE).stdout  # some are gone before they are looked at
        assert files
        grep = ["xargs", "-0", "grep", "-laF", "-e", secret]
        found = subprocess.run(grep, input=files, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert found.stdout == b"", found.stdout.decode()


def test_a_secret_of_the_clients_environment_stays_out_of_the_preparation(
    harness: DockerHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIDDEN", "s3cret-4f1c")
    with harness.hold_pending() as held:
        from dataclasses import replace

        job_id = harness.cluster.create_job("echo ${#HIDDEN}", replace(held, secrets={"HIDDEN": "s3cret-4f1c"}))
        (preparer,) = _preparers(harness)
        assert "HIDDEN" not in preparer.environ()
        assert not re.search("s3cret", " ".join(preparer.cmdline()))
    assert harness.end(job_id).status is JobStatus.SUCCEEDED
    assert harness.cluster.get_logs(job_id) == "11\n"


# Outputs of a job that runs


@pytest.mark.parametrize("attempts", [3, 1])
def test_outputs_that_shrink_while_they_are_fetched_are_fetched_again(
    harness: DockerHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempts: int
) -> None:
    """The engine's archive breaks off there, and says nothing of it."""
    monkeypatch.setattr(_outputs, "_ATTEMPTS", attempts)
    job_id, outputs = _writes(harness, "truncate --size 64M a")
    with ThreadPoolExecutor(1) as executor, harness.proxy.silent(after_bytes=1 << 20) as is_silent:
        fetching = executor.submit(harness.cluster.fetch_outputs, job_id, tmp_path / "to")
        assert is_silent.wait(DEADLINE_SECONDS)
        os.truncate(outputs / "a", 7)
    if attempts == 1:
        with pytest.raises(PlatformError, match="broke off"):
            fetching.result()
    else:
        assert fetching.result() == [tmp_path / "to" / "a"]
        assert (tmp_path / "to" / "a").stat().st_size == 7
    assert not list((tmp_path / "to").glob(".*.part"))


def test_an_archive_without_its_end_is_not_taken_for_whole(tmp_path: Path) -> None:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name in ("outputs/a", "outputs/b"):
            member = tarfile.TarInfo(name)
            member.size = 512
            archive.addfile(member, io.BytesIO(b"x" * 512))
    content = whole.getvalue()
    assert _outputs._unpack(iter([content]), tmp_path) == [tmp_path / "a", tmp_path / "b"]
    assert _outputs._unpack(iter([content[:700], content[700:]]), tmp_path) == [tmp_path / "a", tmp_path / "b"]
    for size in (0, 512, 600, 1024, 1536, 2048, 2560):
        with pytest.raises(_outputs._IncompleteError):
            _outputs._unpack(iter([content[:size]]), tmp_path)


def test_a_fetch_that_fails_does_not_lock_its_container(harness: DockerHarness, tmp_path: Path) -> None:
    """As it would where what the engine still has to send is neither read nor refused."""
    job_id, _ = _writes(harness, "truncate --size 1M a; truncate --size 64M b")
    container = harness.command_container(job_id)["Id"]
    (tmp_path / "to" / "a" / "full").mkdir(parents=True)
    with pytest.raises(PlatformError, match="another directory") as caught:
        harness.cluster.fetch_outputs(job_id, tmp_path / "to")
    assert harness.engine.inspect_container(container) is not None
    assert caught.value, "still there, with all that its traceback holds"


@pytest.mark.parametrize("what", ["outputs", "log"])
def test_an_engine_that_falls_silent_in_an_answer_is_not_waited_for(
    harness: DockerHarness, tmp_path: Path, what: str
) -> None:
    job_id, _ = _writes(harness, "truncate --size 64M a; head -c 8000000 /dev/zero | base64 --wrap 1000")
    with fray.connect(harness.spec, **harness.options, request_timeout_seconds=3) as hasty:
        asked = {"outputs": lambda: hasty.fetch_outputs(job_id, tmp_path / "to"), "log": lambda: hasty.get_logs(job_id)}
        with harness.proxy.silent(after_bytes=1 << 20) as is_silent, pytest.raises(ConnectionFailedError):
            asked[what]()
        assert is_silent.is_set()


def _writes(harness: DockerHarness, command: str) -> tuple[str, Path]:
    """Have a job write outputs, and stay; return its id and where this machine sees them."""
    env = RuntimeEnv(container_image=harness.base_image)
    job_id = harness.cluster.create_job(f'cd "$FRAY_OUTPUT_DIR"; echo "$PWD"; {command}; echo written; sleep 600', env)
    harness.until_logged(job_id, b"written\n")
    root = Path("/proc", str(harness.command_container(job_id)["State"]["Pid"]), "root")
    return job_id, root / harness.cluster.get_logs(job_id).split("\n", 1)[0].lstrip("/")
