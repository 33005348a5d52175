"""The Docker backend as the conformance suite, and this folder's own tests, meet it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
from docker.errors import NotFound

from fray.backend.docker._engine import Engine
from fray.request import current_owner
from fray.testing import ClusterHarness
from fray.types import RuntimeEnv

from .engine_proxy import Proxy
from .registry import Registry


class DockerHarness(ClusterHarness):
    """Serves a test with an engine that others use too; requests go through a proxy that can be cut off.

    Only jobs of this harness are stopped and purged at its end: the engine may have others, and they are nobody's
    business. Which those are is told by their owner, who has a name that no other has.
    """

    ships_working_dir = True
    deadline_seconds = 90.0

    def __init__(self, engine: Engine, base_image: str, registry: Registry, **options: Any) -> None:
        super().__init__()
        self.engine = engine
        self.base_image = base_image
        self.registry = registry
        self._open = ExitStack()
        self._images: list[str] = []
        self.proxy = self._open.enter_context(Proxy(engine.endpoint.host))
        self.spec = f"docker:{self.proxy.host}"
        # Not the directory's name: what one test builds serves the others.
        self.options = {"grace_seconds": 4.0, "repository": "fray-test/job", **options}
        if "dockerfile" not in options:
            self.options |= {"base_image": base_image, "ca_bundle": "system"}
        self.owner = f"fray-test-{uuid4().hex}"
        patch = self._open.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("LOGNAME", self.owner)  # whoever is asked for takes it from there, in fresh processes too
        current_owner.cache_clear()
        self._open.callback(current_owner.cache_clear)

    @contextmanager
    def hold_pending(self) -> Iterator[RuntimeEnv]:
        # The way stays open behind the hold: what was held has to come through.
        stalled = self._open.enter_context(self.registry.stalled())
        tag = uuid4().hex
        self.registry.push(self.base_image, f"held:{tag}")
        try:
            yield RuntimeEnv(container_image=f"{stalled.stalled_address}/held:{tag}")
        finally:
            stalled.release()
            self._images.append(f"{stalled.stalled_address}/held:{tag}")

    def containers(self, job_id: str) -> list[dict[str, Any]]:
        """The containers of a job, by their inspection."""
        listed = self.engine.api.containers(all=True, filters={"label": f"fray.job={job_id}"})
        return [self.engine.api.inspect_container(each["Id"]) for each in listed]

    def command_container(self, job_id: str) -> dict[str, Any]:
        """The container that runs a job's command."""
        (found,) = [each for each in self.containers(job_id) if each["Config"]["Labels"]["fray.role"] != "holder"]
        return found

    def exit_code(self, container: dict[str, Any]) -> int:
        """How a container ends. That a job is over is known a moment before its container is."""
        code: int = self.engine.api.wait(container["Id"], timeout=self.deadline_seconds)["StatusCode"]
        return code

    def kill_supervision(self, job_id: str) -> None:
        os.kill(self.command_container(job_id)["State"]["Pid"], signal.SIGKILL)

    def observable(self) -> Iterator[tuple[str, bytes]]:
        api = self.engine.api
        for name, answer in {
            "the list of containers": api.containers(all=True, size=True),
            "the list of images": api.images(all=True),
            "the list of volumes": api.volumes(),
            "info": api.info(),
        }.items():
            yield name, json.dumps(answer).encode()
        for container in api.containers(all=True, filters={"label": "fray.job"}):
            inspected = self.engine.inspect_container(container["Id"])
            if inspected is None:  # another's, gone by now
                continue
            yield f"inspect {container['Names']}", json.dumps(inspected).encode()
            yield f"logs {container['Names']}", api.logs(container["Id"])
            yield from self._written(inspected)
            with suppress(Exception):
                yield f"processes in {container['Names']}", json.dumps(api.top(container["Id"])).encode()
            for file in Path(inspected["ResolvConfPath"]).parent.glob("*"):
                with suppress(OSError):
                    if file.is_file():
                        yield str(file), file.read_bytes()
        for image in api.images():
            for tag in image["RepoTags"] or ():
                if tag.startswith("fray"):
                    yield f"history of {tag}", json.dumps(api.history(tag)).encode()
                    yield f"inspect {tag}", json.dumps(api.inspect_image(tag)).encode()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                yield f"the arguments of process {process.pid}", "\0".join(process.cmdline()).encode()

    def _written(self, inspected: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        """What a container has written, and what is in its volumes.

        Taken from the engine's own disk where that can be read: an archive of each change asks much more of it.
        """
        driver = inspected.get("GraphDriver") or {}  # an engine whose images are containerd's has none
        layer = (driver.get("Data") or {}).get("UpperDir")
        if layer is not None and os.access(layer, os.R_OK | os.X_OK):
            volumes = [mount["Source"] for mount in inspected["Mounts"] if mount["Type"] == "volume"]
            for root in (layer, *volumes):
                yield from _files(root)
            return
        for change in self.engine.api.diff(inspected["Id"]) or ():
            with suppress(Exception):  # gone by now
                content, _ = self.engine.api.get_archive(inspected["Id"], change["Path"])
                yield f"{change['Path']} in {inspected['Name']}", b"".join(content)

    @contextmanager
    def interrupt_engine(self) -> Iterator[None]:
        with self.proxy.cut_off():
            yield

    def __exit__(self, *error: Any) -> None:
        own = [info.id for info in self.cluster.list_jobs() if info.owner.startswith(f"{self.owner}@")]
        for job_id in own:
            self.cluster.delete_job(job_id)
        for job_id in own:
            self.end(job_id)
            self.cluster.purge_job(job_id)
        for image in self._images:
            with suppress(NotFound):
                self.engine.api.remove_image(image)
        for cluster in self._clusters:
            cluster.close()
        self._open.close()


def _files(root: str) -> Iterator[tuple[str, bytes]]:
    """The names and contents of all that is below a directory, in which things may come and go meanwhile."""

    def must_be_gone(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for directory, directories, files in os.walk(root, onerror=must_be_gone):
        for path in (Path(directory, name) for name in (*directories, *files)):
            try:
                if path.is_symlink():
                    content = os.fsencode(path.readlink())
                else:
                    content = path.read_bytes() if path.is_file() else b""
            except OSError as error:
                must_be_gone(error)
                continue
            yield str(path), os.fsencode(path) + b"\n" + content
