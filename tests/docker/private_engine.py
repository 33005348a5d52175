"""An engine that belongs to a test: it may be stopped, killed, restarted, and have its disk filled.

It lives in mount, network and process namespaces of its own. A second engine in the network namespace of another
removes that one's bridge when it starts. And whatever an engine leaves behind, mounts, containers and what supervises
them, ends with the first process of a process namespace, which ends when the test's own process does.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from fray.backend.docker._engine import Endpoint, Engine
from tools import docker_base_image

START_SECONDS = STOP_SECONDS = 60.0

# The first process in the namespaces. It reaps orphans (by ignoring their signal), and ends when the test does (or
# when told to, which is the same to it); with it all the others end.
_HOLDER = """
import fcntl, signal, socket, struct, subprocess, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
data, size = sys.argv[1:]
# No engine of this machine's is to be found in here: neither its containerd, nor its plugins.
for folder in ("/run/containerd", "/run/docker"):
    subprocess.run(["mkdir", "-p", folder], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], check=True)
if size != "0":
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", data], check=True)
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
sys.stdin.read()
"""


class PrivateEngine:
    """A dockerd, with a containerd, of its own. Its containers reach each other and nothing outside.

    Args:
        disk_mebibytes: The size of the disk that it keeps everything on; None for as much as this machine has.
        live_restore: Whether containers go on while it is stopped or killed.
        arguments: More arguments for dockerd.

    Attributes:
        folder: Its folder. `log` in it is what it says.
        endpoint: Where it is, running or not; the same after a restart.
    """

    def __init__(
        self, *, disk_mebibytes: int | None = None, live_restore: bool = False, arguments: Iterable[str] = ()
    ) -> None:
        # A short path: sockets lie below it, and the kernel allows them a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="fd-", dir="/tmp"))
        self.log = self.folder / "log"
        self.endpoint = Endpoint(f"unix://{self.folder}/docker.sock", "the test")
        self.cgroup = f"fray-test-{self.folder.name}"
        data = self.folder / "data"
        data.mkdir()
        (self.folder / "daemon.json").write_text("{}")  # in place of the machine's
        self._arguments = [f"--host={self.endpoint.host}", f"--data-root={data}", f"--exec-root={self.folder}/exec"]
        self._arguments += [f"--pidfile={self.folder}/pid", f"--config-file={self.folder}/daemon.json", "--group=0"]
        self._arguments += [f"--cgroup-parent=/{self.cgroup}", "--exec-opt=native.cgroupdriver=cgroupfs"]
        self._arguments += ["--live-restore"] * live_restore
        self._arguments += arguments
        self._dockerd: subprocess.Popen[bytes] | None = None
        unshare = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        self._holder = subprocess.Popen(
            [*unshare, sys.executable, "-I", "-c", _HOLDER, str(data), str(disk_mebibytes or 0)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert self._holder.stdout is not None
            assert self._holder.stdout.readline() == b"ready\n", "no namespaces for an engine"
            (self._first,) = psutil.Process(self._holder.pid).children()
        except BaseException:
            self.close()
            raise

    @property
    def dockerd(self) -> psutil.Process:
        """Its process."""
        assert self._dockerd is not None, "not started"
        (found,) = psutil.Process(self._dockerd.pid).children()
        return found

    def start(self) -> None:
        """Start it; returns when it answers."""
        assert self._dockerd is None or self._dockerd.poll() is not None, "it runs"
        enter = ["nsenter", f"--target={self._first.pid}", "--mount", "--net", "--pid"]
        with self.log.open("ab") as log:
            self._dockerd = subprocess.Popen(
                [*enter, "dockerd", *self._arguments],
                env={name: value for name, value in os.environ.items() if not name.startswith("DOCKER_")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_ready(self._dockerd)

    def stop(self) -> None:
        """Ask it to end; returns when it has. Its containers end too, unless it was made with `live_restore`."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would; its containers go on, and end when it starts again without `live_restore`."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Stop it, and start it again."""
        self.stop()
        self.start()

    def load(self, image: str, source: Engine) -> None:
        """Give it an image of another engine's, by the same name."""
        engine = Engine(self.endpoint)
        try:
            with _saved(image, source).open("rb") as tar:
                for line in engine.api.load_image(tar):
                    assert "error" not in line, line
        finally:
            engine.close()

    def close(self) -> None:
        """End it with all that it runs, and remove its folder."""
        assert self._holder.stdin is not None
        assert self._holder.stdout is not None
        with suppress(BrokenPipeError):
            self._holder.stdin.close()
        self._holder.wait(STOP_SECONDS)
        self._holder.stdout.close()
        if self._dockerd is not None:
            self._dockerd.wait(STOP_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)
        for hierarchy in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            if (hierarchy / self.cgroup).is_dir():
                _remove_cgroup(hierarchy / self.cgroup)

    def __enter__(self) -> PrivateEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _end(self, by: signal.Signals) -> None:
        assert self._dockerd is not None, "not started"
        self.dockerd.send_signal(by)
        self._dockerd.wait(STOP_SECONDS)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        give_up = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, self.log.read_text()
            with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(START_SECONDS)
                connection.connect(self.endpoint.host.removeprefix("unix://"))
                connection.sendall(b"GET /_ping HTTP/1.0\r\n\r\n")
                if b" 200 " in connection.recv(100):
                    return
            assert time.monotonic() < give_up, f"no engine within {START_SECONDS} s: {self.log.read_text()}"
            time.sleep(0.05)


def _saved(image: str, source: Engine) -> Path:
    """The tar of an image of an engine's, from the cache where it is there; only the last one of a name is kept."""
    found = source.inspect_image(image)
    assert found is not None, f"no image {image}"
    name = image.replace("/", "_").replace(":", "_")
    tar = docker_base_image.CACHE / f"saved-{name}-{found['Id'].removeprefix('sha256:')[:16]}.tar"
    with docker_base_image.one_at_a_time():
        if not tar.exists():
            with tempfile.NamedTemporaryFile(dir=tar.parent, prefix="saved-", suffix=".part") as part:
                for piece in source.api.get_image(image):
                    part.write(piece)
                part.flush()
                for stale in tar.parent.glob(f"saved-{name}-*.tar"):
                    stale.unlink()
                os.link(part.name, tar)
    return tar


def _remove_cgroup(folder: Path) -> None:
    give_up = time.monotonic() + STOP_SECONDS
    for each in sorted([folder, *(path for path in folder.rglob("*") if path.is_dir())], reverse=True):
        while True:
            try:
                each.rmdir()
                break
            except FileNotFoundError:
                break
            except OSError:  # what was killed in it is not gone yet
                assert time.monotonic() < give_up, f"{each} cannot be removed"
                time.sleep(0.01)
