"""A real registry on this machine, for tests that push and pull; also one that wants to know who one is."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fray.backend.docker._engine import Engine

from .engine_proxy import Proxy

START_SECONDS = 30.0
USER, PASSWORD = "fray", "open sesame"
# bcrypt of the password, which is the only kind of hash that the registry takes.
PASSWORD_HASH = "$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"


class Registry:
    """A process of docker-registry, with its storage in a folder of its own, at a loopback port.

    Attributes:
        address: Its host and port, with which the names of its images begin.
        auth_config: What docker-py's `push` and `pull` take as `auth_config`; None where anybody may.
    """

    def __init__(self, engine: Engine, *, is_private: bool = False) -> None:
        self._engine = engine
        self.folder = Path(tempfile.mkdtemp(prefix="fray-registry-"))
        self.auth_config = {"username": USER, "password": PASSWORD} if is_private else None
        config: dict[str, Any] = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(self.folder / "storage")}, "delete": {"enabled": True}},
            "http": {"addr": "127.0.0.1:0"},
        }
        if is_private:
            (self.folder / "htpasswd").write_text(f"{USER}:{PASSWORD_HASH}\n")
            config["auth"] = {"htpasswd": {"realm": "tests", "path": str(self.folder / "htpasswd")}}
        (self.folder / "config.yml").write_text(json.dumps(config))  # JSON is YAML
        self._log = self.folder / "log"
        with self._log.open("wb") as log:
            command = ["docker-registry", "serve", str(self.folder / "config.yml")]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.address = self._wait_until_it_listens()
        except BaseException:
            self.close()
            raise

    def push(self, image: str, name: str) -> str:
        """Push an image of the engine's as `name` (`repository:tag`); return the reference to pull it by.

        The engine keeps the image and forgets the reference.
        """
        reference = f"{self.address}/{name}"
        repository, _, tag = reference.rpartition(":")
        api = self._engine.api
        api.tag(image, repository, tag)
        try:
            for line in api.push(repository, tag, stream=True, decode=True, auth_config=self.auth_config):
                assert "error" not in line, line
        finally:
            api.remove_image(reference)
        return reference

    def add_tag(self, repository: str, existing_tag: str, new_tag: str) -> str:
        """Give an image that is there another tag too, or move that tag to it; return the reference."""
        manifest = self.request("GET", f"{repository}/manifests/{existing_tag}")
        self.request("PUT", f"{repository}/manifests/{new_tag}", manifest)
        return f"{self.address}/{repository}:{new_tag}"

    def request(self, method: str, path: str, content: bytes | None = None) -> bytes:
        """Make a request to its HTTP API, below `/v2/`."""
        request = urllib.request.Request(f"http://{self.address}/v2/{path}", content, method=method)
        request.add_header("Accept", MANIFEST)
        if content is not None:
            request.add_header("Content-Type", MANIFEST)
        if self.auth_config:
            request.add_header("Authorization", f"Basic {self._token()}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            found: bytes = answer.read()
            return found

    def log_in(self, config: Path, address: str | None = None) -> None:
        """Write the credentials into a folder that `DOCKER_CONFIG` is to name, as `docker login` does."""
        file = config / "config.json"
        said = json.loads(file.read_text()) if file.exists() else {}
        said.setdefault("auths", {})[address or self.address] = {"auth": self._token()}
        file.write_text(json.dumps(said))

    @contextmanager
    def stalled(self) -> Iterator[StalledRegistry]:
        """Give a second way to the registry, by which a pull hangs until it is released."""
        with StalledRegistry(self.address) as stalled:
            yield stalled

    def close(self) -> None:
        """End it and remove its storage."""
        self._process.terminate()
        self._process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _token(self) -> str:
        return base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()

    def _wait_until_it_listens(self) -> str:
        give_up = time.monotonic() + START_SECONDS
        while True:
            said = self._log.read_text()
            if found := re.search(r"listening on (127\.0\.0\.1:\d+)", said):
                return found[1]
            assert self._process.poll() is None, said
            assert time.monotonic() < give_up, f"no registry within {START_SECONDS} s: {said}"
            time.sleep(0.01)


class StalledRegistry(Proxy):
    """A second way to a registry, which holds up whatever asks for an image, until it is released.

    The question whether a registry is there at all passes: an engine waits 15 s for that answer, and for the others
    without end.

    Attributes:
        has_held: An event: somebody waits.
    """

    def __init__(self, address: str) -> None:
        super().__init__(f"tcp://{address}", is_held=lambda data: b"/manifests/" in data or b"/blobs/" in data)
        self.stalled_address = self.address

    def reference(self, reference: str) -> str:
        """Return the reference by which an image of the registry's is pulled this way."""
        return f"{self.stalled_address}/{reference.partition('/')[2]}"

    def __enter__(self) -> StalledRegistry:
        return self
