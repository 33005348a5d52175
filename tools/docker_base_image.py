#!/usr/bin/env python3
"""Make the images that the Docker tests start from, where the engine has them not; nothing is pulled.

`fray-test-base` is Debian with Python, as an image is that users begin with; `fray-test-shell` has a shell and no
Python. What they are made of comes from the package mirror that apt uses on this machine. The tars are kept in
`$XDG_CACHE_HOME/fray-tests` (or `~/.cache/fray-tests`), so that the next engine has them in seconds. Runs on any
Python from 3.11 on, with nothing installed. The base image needs root and debootstrap.
"""

import argparse
import fcntl
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fray-tests"


class CannotBeMade(Exception):
    """An image cannot be made here; the message says what is wanted."""


@dataclass(frozen=True)
class Image:
    """An image; a recipe that makes something else has a number of its own, and with it the image another name."""

    repository: str
    recipe: int
    fill: Callable[[Path, str | None], None]
    command: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.recipe}"

    @property
    def tar(self) -> Path:
        return CACHE / f"{self.repository}-{self.recipe}-{platform.machine()}.tar"

    def find(self) -> dict[str, object] | None:
        """What the engine says of the image; None where it has it not."""
        done = subprocess.run(["docker", "image", "inspect", self.name], capture_output=True, text=True)
        if done.returncode == 0:
            found: dict[str, object] = json.loads(done.stdout)[0]
            return found
        if "no such image" in done.stderr.lower():
            return None
        raise CannotBeMade(f"no docker engine answers: {done.stderr.strip()}")

    def make(self, mirror: str | None = None) -> None:
        """Give the image to the engine, where it has it not."""
        if self.find():
            return
        with one_at_a_time():
            if self.find():
                return
            if not self.tar.exists():
                with tempfile.NamedTemporaryFile(dir=CACHE, prefix=f"{self.repository}-", suffix=".part") as part:
                    self.fill(Path(part.name), mirror)
                    os.link(part.name, self.tar)
            changes = [f"ENV PATH={PATH}", "ENV LANG=C.UTF-8", f"CMD {json.dumps(self.command)}"]
            changes += [f"LABEL fray-test-image={self.repository}", f"LABEL fray-test-recipe={self.recipe}"]
            arguments = [argument for change in changes for argument in ("--change", change)]
            run(["docker", "import", *arguments, str(self.tar), self.name])

    def describe(self) -> str:
        found = self.find()
        engine = f"{found['Id']}, {int(str(found['Size'])) / 1e6:.0f} MB" if found else "not in the engine"
        cache = f"{self.tar}, {self.tar.stat().st_size / 1e6:.0f} MB" if self.tar.exists() else "not in the cache"
        return f"{self.name}: {engine}; {cache}"


def fill_base(tar: Path, mirror: str | None) -> None:
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        raise CannotBeMade("the base image is made with debootstrap, as root: `apt-get install debootstrap`")
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="root-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        # What debootstrap mounts in there, and leaves mounted when it fails, goes with the namespace.
        command = ["unshare", "--mount", "debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        run([*command, SUITE, folder, mirror or mirror_of_apt()])
        (root / "usr/bin/python").symlink_to("python3")
        for stale in [*root.glob("var/lib/apt/lists/*"), *root.glob("var/cache/apt/*")]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        for log in root.glob("var/log/**/*.log"):
            log.unlink()
        run(["tar", "--numeric-owner", "--sort=name", "-C", folder, "-cf", str(tar), "."])


def fill_shell(tar: Path, mirror: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", "busybox-static"]
        if subprocess.run(download, cwd=folder, capture_output=True).returncode:
            run(["apt-get", "update", "-qq"])
            run(download, cwd=folder)
        (package,) = Path(folder).glob("*.deb")
        run(["dpkg-deb", "--extract", str(package), folder])
        (busybox,) = (path for path in Path(folder).rglob("busybox") if path.is_file() and path.parent.name == "bin")
        applets = run([str(busybox), "--list-full"]).split()
        program = busybox.read_bytes()

    names = {"bin/busybox", *applets}
    folders = {"etc", "proc", "sys", "dev", "root", "run", "var"}
    for name in names:
        folders |= {str(parent) for parent in Path(name).parents} - {"."}
    with tarfile.open(tar, "w") as archive:
        for name in sorted(folders):
            add(archive, name, tarfile.DIRTYPE, mode=0o755)
        add(archive, "tmp", tarfile.DIRTYPE, mode=0o1777)
        add(archive, "bin/busybox", tarfile.REGTYPE, program, mode=0o755)
        add(archive, "etc/passwd", tarfile.REGTYPE, b"root:x:0:0:root:/root:/bin/sh\n")
        add(archive, "etc/group", tarfile.REGTYPE, b"root:x:0:\n")
        for name in sorted(names - {"bin/busybox"}):
            add(archive, name, tarfile.SYMTYPE, target="/bin/busybox")


def add(
    archive: tarfile.TarFile, name: str, kind: bytes, content: bytes = b"", *, mode: int = 0o644, target: str = ""
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.linkname, entry.size = kind, mode, target, len(content)
    archive.addfile(entry, io.BytesIO(content))


def mirror_of_apt() -> str:
    """The mirror that apt takes this machine's own release from."""
    release = platform.freedesktop_os_release()
    if release["ID"] == "debian":
        targets = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)"])
        for line in targets.splitlines():
            uri, name, component = line.split()
            if component == "main" and name in (release.get("VERSION_CODENAME"), SUITE, "stable", "testing"):
                return uri
    raise CannotBeMade("apt names no mirror of Debian's here: give one with --mirror")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run(command: list[str], cwd: str | None = None) -> str:
    """Run a command that has to succeed; return what it printed."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise CannotBeMade(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout


BASE = Image("fray-test-base", 1, fill_base, ("python3",))
SHELL = Image("fray-test-shell", 1, fill_shell, ("/bin/sh",))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="make nothing; print what is there")
    parser.add_argument("--mirror", help="where debootstrap gets Debian from; else where apt does")
    arguments = parser.parse_args()
    try:
        for image in (SHELL, BASE):
            if not arguments.check:
                image.make(arguments.mirror)
            print(image.describe(), flush=True)
    except (CannotBeMade, OSError) as error:
        print(f"the images for the Docker tests cannot be made: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
