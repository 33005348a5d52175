"""What the Docker tests are made of does what they rely on."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest
from docker.errors import APIError
from docker.tls import TLSConfig

from fray.backend.docker._engine import Endpoint, Engine
from fray.errors import ConnectionFailedError, SubmissionError

from .conftest import Peer
from .engine_proxy import Proxy, TlsProxy
from .private_engine import PrivateEngine
from .registry import Registry

pytestmark = pytest.mark.xdist_group("docker")

DEADLINE = 60.0


@contextmanager
def container(api: docker.APIClient, image: str, command: list[str], **options: Any) -> Iterator[str]:
    created: str = api.create_container(image, command, **options)["Id"]
    try:
        yield created
    finally:
        api.remove_container(created, force=True)


def output_of(api: docker.APIClient, image: str, command: list[str], **options: Any) -> bytes:
    with container(api, image, command, **options) as created:
        api.start(created)
        ended = api.wait(created, timeout=DEADLINE)
        said: bytes = api.logs(created)
        assert ended["StatusCode"] == 0, said
        return said


@pytest.fixture
def proxy(engine: Engine) -> Iterator[Proxy]:
    with Proxy(engine.endpoint.host) as proxy:
        yield proxy


@pytest.fixture
def tls_proxy(engine: Engine, tmp_path: Path) -> Iterator[TlsProxy]:
    proxy = TlsProxy(engine.endpoint.host, tmp_path / "tls")
    yield proxy
    proxy.close()


@pytest.fixture
def live_engine(private_engine: Callable[..., PrivateEngine], engine: Engine, shell_image: str) -> PrivateEngine:
    private = private_engine(live_restore=True)
    private.start()
    private.load(shell_image, engine)
    return private


def test_what_shares_the_engine_runs_in_one_worker(request: pytest.FixtureRequest) -> None:
    # A pytest-xdist that does not know its pytest forgets the groups without a word.
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@docker")


def test_the_base_image_has_a_python_with_venv_and_pip(engine: Engine, base_image: str) -> None:
    command = ["sh", "-c", "python -m pip --version >/dev/null && python -m venv /tmp/it && /tmp/it/bin/python -V"]
    assert output_of(engine.api, base_image, command).startswith(b"Python 3.11")


def test_the_shell_image_has_no_python_and_a_folder_for_everybody(engine: Engine, shell_image: str) -> None:
    command = ["sh", "-c", "! command -v python && ! command -v python3 && touch /tmp/it && ls -ld /tmp"]
    assert output_of(engine.api, shell_image, command, user="1234").startswith(b"drwxrwxrwt")


def test_the_proxy_passes_a_hijacked_attach_with_half_close(proxy: Proxy, shell_image: str) -> None:
    api = docker.APIClient(proxy.host, version="auto")
    with container(api, shell_image, ["sh", "-c", "cat; echo end"], stdin_open=True) as created:
        attached = api.attach_socket(created, {"stdin": 1, "stdout": 1, "stream": 1})
        api.start(created)
        with attached._sock as connection, attached:
            connection.sendall(b"hello\n")
            connection.shutdown(socket.SHUT_WR)
            assert read_to_the_end(connection) == b"hello\nend\n"
    api.close()


def read_to_the_end(connection: socket.socket) -> bytes:
    connection.settimeout(DEADLINE)
    raw = b""
    while piece := connection.recv(1 << 16):
        raw += piece
    content = b""
    while raw:
        size = int.from_bytes(raw[4:8], "big")
        content, raw = content + raw[8 : 8 + size], raw[8 + size :]
    return content


def test_cut_off_breaks_connections_and_refuses_new_ones(proxy: Proxy, shell_image: str) -> None:
    engine = Engine(Endpoint(proxy.host, "the test"))
    with container(engine.api, shell_image, ["sleep", "600"]) as created, ThreadPoolExecutor() as pool:
        engine.api.start(created)
        events = pool.submit(list, engine.api.events(decode=True, filters={"container": created}))
        wait = pool.submit(engine.api.wait, created)
        with proxy.cut_off():
            with pytest.raises(ConnectionFailedError), engine.errors():
                wait.result(DEADLINE)
            assert events.exception(DEADLINE) or not events.result()  # for docker-py that is just their end
            with pytest.raises(ConnectionFailedError), engine.errors():
                engine.api.ping()
        assert engine.api.ping()
    engine.close()


def test_the_tls_proxy_serves_who_has_a_certificate(tls_proxy: TlsProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # which docker-py would heed in place of DOCKER_CERT_PATH
        monkeypatch.delenv(name, raising=False)
    for name, value in tls_proxy.environment().items():
        monkeypatch.setenv(name, value)
    client = docker.from_env()
    assert client.ping()
    client.close()
    done = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    stranger = TLSConfig(ca_cert=str(tls_proxy.certificates / "ca.pem"), verify=True)
    with pytest.raises(docker.errors.DockerException):
        docker.APIClient(f"https://{tls_proxy.address}", version="auto", tls=stranger).ping()


def test_the_tls_proxy_passes_half_closes(tls_proxy: TlsProxy, shell_image: str) -> None:
    command = ["docker", "run", "--rm", "-i", shell_image, "sh", "-c", "cat; echo end"]
    environment = {**os.environ, **tls_proxy.environment()}
    content = os.urandom(1 << 19).hex().encode() + b"\n"
    done = subprocess.run(command, env=environment, input=content, capture_output=True, timeout=DEADLINE)
    assert done.stdout == content + b"end\n", done.stderr


def test_a_context_leads_to_the_tls_proxy(
    tls_proxy: TlsProxy, docker_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls_proxy.create_context("elsewhere", docker_config)
    monkeypatch.delenv("DOCKER_HOST", raising=False)
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    done = subprocess.run(["docker", "version"], capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr


def new_image(engine: Engine, name: str, mebibytes: int = 1) -> None:
    """Make an image that no other has a layer in common with."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo("it")
        entry.size = mebibytes << 20
        archive.addfile(entry, io.BytesIO(os.urandom(entry.size)))
    repository, _, tag = name.partition(":")
    with engine.errors():
        engine.api.import_image_from_data(content.getvalue(), repository=repository, tag=tag)


@pytest.fixture
def pushed(engine: Engine, registry: Registry) -> str:
    """An image that only the registry has."""
    name = f"fray-test-{uuid.uuid4().hex}:one"
    new_image(engine, name)
    reference = registry.push(name, name)
    engine.api.remove_image(name)
    return reference


def pull(engine: Engine, reference: str, **options: Any) -> None:
    for line in engine.api.pull(reference, stream=True, decode=True, **options):
        assert "error" not in line, line


def test_an_added_tag_is_the_same_image(engine: Engine, registry: Registry, pushed: str) -> None:
    repository = pushed.partition("/")[2].partition(":")[0]
    other = registry.add_tag(repository, "one", "two")
    pull(engine, pushed)
    pull(engine, other)
    assert engine.api.inspect_image(pushed)["Id"] == engine.api.inspect_image(other)["Id"]
    for reference in (pushed, other):
        engine.api.remove_image(reference)


def test_a_stalled_pull_hangs_until_it_is_released(engine: Engine, registry: Registry, pushed: str) -> None:
    with registry.stalled() as stalled, ThreadPoolExecutor() as pool:
        reference = stalled.reference(pushed)
        pulling = pool.submit(pull, engine, reference)
        assert stalled.has_held.wait(DEADLINE)
        assert engine.inspect_image(reference) is None
        assert not pulling.done()
        stalled.release()
        pulling.result(DEADLINE)
        engine.api.remove_image(reference)


def test_a_private_registry_serves_who_has_its_password(
    engine: Engine, private_registry: Registry, shell_image: str, docker_config: Path
) -> None:
    reference = private_registry.push(shell_image, "private/shell:1")
    with pytest.raises(APIError, match="no basic auth credentials"):
        pull(engine, reference, auth_config={})
    pull(engine, reference, auth_config=private_registry.auth_config)
    private_registry.add_tag("private/shell", "1", "2")
    private_registry.log_in(docker_config)
    command = ["docker", "pull", "--quiet", reference[:-1] + "2"]
    environment = {**os.environ, **engine.endpoint.environment()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE)
    assert done.returncode == 0, done.stderr
    for tag in "12":
        engine.api.remove_image(reference[:-1] + tag)


@pytest.mark.parametrize("end", [PrivateEngine.stop, PrivateEngine.kill])
def test_a_container_goes_on_while_its_engine_is_away(
    live_engine: PrivateEngine, shell_image: str, end: Callable[[PrivateEngine], None]
) -> None:
    engine = Engine(live_engine.endpoint)
    assert output_of(engine.api, shell_image, ["echo", "hello"]) == b"hello\n"
    with container(engine.api, shell_image, ["sleep", "600"]) as created:
        engine.api.start(created)
        started = engine.api.inspect_container(created)["State"]["StartedAt"]
        end(live_engine)
        with pytest.raises(ConnectionFailedError), engine.errors():
            engine.api.ping()
        live_engine.start()
        state = engine.api.inspect_container(created)["State"]
        assert (state["Status"], state["StartedAt"]) == ("running", started)
    engine.close()


TRAPS = "trap 'exit 3' TERM; echo ready; sleep 600 & wait"


def test_containers_end_with_an_engine_that_does_not_keep_them(
    private_engine: Callable[..., PrivateEngine], engine: Engine, shell_image: str
) -> None:
    with private_engine() as private:
        private.start()
        private.load(shell_image, engine)
        client = Engine(private.endpoint)
        with container(client.api, shell_image, ["sh", "-c", TRAPS]) as created:
            client.api.start(created)
            for line in client.api.logs(created, stream=True, follow=True):
                assert line == b"ready\n"
                break
            private.restart()
            assert client.api.inspect_container(created)["State"]["ExitCode"] == 3
        client.close()


def test_a_full_disk_is_met_by_containers_and_by_the_engine(
    private_engine: Callable[..., PrivateEngine], engine: Engine, shell_image: str
) -> None:
    with private_engine(disk_mebibytes=64) as private:
        private.start()
        private.load(shell_image, engine)
        client = Engine(private.endpoint)
        # What it says is written to the same disk, so it waits until there is space again.
        fill = "said=$(dd if=/dev/zero of=/it bs=1M count=99 2>&1); rm /it; echo $said"
        said = output_of(client.api, shell_image, ["sh", "-c", fill])
        assert b"No space left on device" in said
        with pytest.raises(SubmissionError, match="no space left"):
            new_image(client, "large:1", mebibytes=99)
        client.close()


def test_a_private_engine_leaves_the_machine_as_it_was(
    private_engine: Callable[..., PrivateEngine], engine: Engine, shell_image: str
) -> None:
    bridge = Path("/sys/class/net/docker0")
    had_bridge = bridge.exists()
    with private_engine() as private:
        private.start()
        private.load(shell_image, engine)
        client = Engine(private.endpoint)
        created = client.api.create_container(shell_image, ["sleep", "600"])["Id"]
        client.api.start(created)
        assert engine.api.containers(filters={"id": created}) == []
        client.close()
        name = private.folder.name
    assert not private.folder.exists()
    assert name not in Path("/proc/mounts").read_text()
    assert bridge.exists() == had_bridge
    for found in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            assert name.encode() not in found.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
    cgroups = [folder for _, folders, _ in os.walk("/sys/fs/cgroup") for folder in folders]
    assert f"fray-test-{name}" not in cgroups


def test_a_job_on_its_network_reaches_the_peer(engine: Engine, peer: Peer, shell_image: str) -> None:
    host_config = engine.api.create_host_config(network_mode=peer.network)
    said = output_of(engine.api, shell_image, ["wget", "-q", "-O", "-", peer.url], host_config=host_config)
    assert said == peer.content
