"""The engine that this machine has, and what tests need beside it: images, registries, engines of their own, a peer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fray.backend.docker._engine import Engine, find_endpoint
from fray.errors import FrayError
from tests.requirements import missing
from tools import docker_base_image

from .private_engine import PrivateEngine
from .registry import Registry

ENGINE_REMEDY = "start a Docker engine; on Debian: `apt-get install docker.io iptables`, `tools/with_docker make test`"


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """The engine that the environment names."""
    found = Engine(find_endpoint())
    try:
        with found.errors():
            found.api.ping()
    except FrayError:
        missing("docker", ENGINE_REMEDY)
    yield found
    found.close()


@pytest.fixture(scope="session")
def base_image(engine: Engine) -> str:
    """The name of an image with Debian and Python."""
    return _made(docker_base_image.BASE, engine)


@pytest.fixture(scope="session")
def shell_image(engine: Engine) -> str:
    """The name of an image with a shell (busybox) and no Python."""
    return _made(docker_base_image.SHELL, engine)


def _made(image: docker_base_image.Image, engine: Engine) -> str:
    if engine.inspect_image(image.name) is None:
        make = [sys.executable, docker_base_image.__file__]
        done = subprocess.run(make, env={**os.environ, **engine.endpoint.environment()}, capture_output=True, text=True)
        if engine.inspect_image(image.name) is None:
            missing("docker-base-image", done.stderr.strip() or done.stdout.strip())
    return image.name


@pytest.fixture(scope="session")
def registry(engine: Engine) -> Iterator[Registry]:
    """A registry that serves anybody."""
    yield from _registry(engine, is_private=False)


@pytest.fixture(scope="session")
def private_registry(engine: Engine) -> Iterator[Registry]:
    """A registry that serves only who has its `auth_config`."""
    yield from _registry(engine, is_private=True)


def _registry(engine: Engine, *, is_private: bool) -> Iterator[Registry]:
    if not shutil.which("docker-registry"):
        missing("registry", "apt-get install docker-registry")
    registry = Registry(engine, is_private=is_private)
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def private_engine(engine: Engine) -> Iterator[Callable[..., PrivateEngine]]:
    """Makes engines that belong to the test: `private_engine(disk_mebibytes=…, live_restore=…)`, not yet started.

    Those that a test does not close itself end with the module.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("dockerd", "unshare", "nsenter"))):
        missing("private-engine", "needs Linux, root, dockerd and util-linux")
    with ExitStack() as made:

        def make(**options: Any) -> PrivateEngine:
            return made.enter_context(PrivateEngine(**options))

        yield make


@dataclass(frozen=True)
class Peer:
    """A container that others on its network can talk to.

    Attributes:
        network: The name of the network.
        url: What it serves there, to containers on that network.
        content: What is found at that URL.
        container: testcontainers' object for it.
    """

    network: str
    url: str
    content: bytes
    container: Any


@pytest.fixture(scope="module")
def peer(engine: Engine, shell_image: str) -> Iterator[Peer]:
    """A container that serves a page on a user-defined network."""
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        # Its cleaner is an image that would have to be pulled; the contexts below clean up.
        patch.setenv("TESTCONTAINERS_RYUK_DISABLED", "true")
        for name, value in engine.endpoint.environment().items():
            patch.setenv(name, value)
        from testcontainers.core.container import DockerContainer
        from testcontainers.core.network import Network

        network = stack.enter_context(Network())
        serve = "mkdir /www && echo hello > /www/index.html && exec httpd -f -p 80 -h /www"
        server = DockerContainer(shell_image).with_network(network).with_network_aliases("peer")
        server.with_command(["sh", "-c", serve])
        stack.enter_context(server)
        # `wget` waits for what is not there yet no more than nothing at all: the loop is the container's.
        ask = "i=0; until wget -q -O - http://127.0.0.1/; do i=$((i+1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done"
        code, said = server.exec(["sh", "-c", ask])
        assert (code, said.splitlines()[-1]) == (0, b"hello"), said
        yield Peer(network.name, "http://peer/", b"hello\n", server)


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of settings, which this test's clients read in place of the user's."""
    folder = tmp_path / "docker-config"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    return folder
