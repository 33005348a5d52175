"""Build fray-docker's runner for each architecture, or check that those in the tree are what its source builds.

The compiler is the pinned one of requirements/runner.txt, in an environment of its own; it brings the C library along,
so that the same source makes the same bytes on every machine and in every directory.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "packages" / "fray-docker" / "runner"
BINARIES = ROOT / "packages" / "fray-docker" / "src" / "fray" / "backend" / "docker" / "runner"
LOCK = ROOT / "requirements" / "runner.txt"
CACHE = ROOT / ".cache" / "runner"
TARGETS = {"fray-runner-amd64": "x86_64-linux-musl", "fray-runner-arm64": "aarch64-linux-musl"}
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-static", "-O2", "-s"]


def main() -> int:
    """Return the exit code: 0 where the binaries are, by then, what the source builds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("uv", help="the uv that installs the compiler")
    parser.add_argument("--check", action="store_true", help="change nothing in the tree")
    arguments = parser.parse_args()
    python = compiler_environment(arguments.uv)
    fresh = ROOT / "build" / "runner"
    fresh.mkdir(parents=True, exist_ok=True)
    for name, target in TARGETS.items():
        build(python, target, fresh / name)
    if arguments.check:
        return check(fresh)
    BINARIES.mkdir(exist_ok=True)
    for name in TARGETS:
        # Not written into: the one in the tree may be running.
        shutil.copy(fresh / name, BINARIES / f".{name}")
        os.replace(BINARIES / f".{name}", BINARIES / name)
        print(f"{name}: {(BINARIES / name).stat().st_size} bytes")
    return 0


def compiler_environment(uv: str) -> Path:
    """Install the pinned compiler, unless that was done, and return its Python."""
    folder = CACHE / hashlib.sha256(LOCK.read_bytes()).hexdigest()[:16]
    python, is_ready = folder / "bin" / "python", folder / ".ready"
    if not is_ready.exists():
        shutil.rmtree(CACHE, ignore_errors=True)
        subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(python), "--require-hashes", "-r", str(LOCK)]
        subprocess.run(install, check=True)
        is_ready.touch()
    return python


def build(python: Path, target: str, binary: Path) -> None:
    """Compile the runner for one target."""
    sources = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.glob("*.c"))
    command = [str(python), "-m", "ziglang", "cc", "-target", target, *FLAGS, f"-ffile-prefix-map={SOURCE}=."]
    cache = {"ZIG_GLOBAL_CACHE_DIR": str(CACHE / "zig"), "ZIG_LOCAL_CACHE_DIR": str(CACHE / "zig")}
    subprocess.run([*command, *sources, "-o", str(binary)], cwd=SOURCE, env={**os.environ, **cache}, check=True)


def check(fresh: Path) -> int:
    """Compare the binaries in the tree with those that were built afresh."""
    stale = [
        name
        for name in TARGETS
        if not os.access(BINARIES / name, os.X_OK) or (BINARIES / name).read_bytes() != (fresh / name).read_bytes()
    ]
    if stale:
        print(f"{', '.join(stale)}: not what packages/fray-docker/runner builds: run `make runner`")
        return 1
    print("the runners are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
