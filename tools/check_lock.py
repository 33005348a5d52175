"""Check that the lock is what `make lock` would write, and that no committed file names a package index's host."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main(uv: str) -> int:
    """Return the exit code: 0 where the lock holds."""
    packages = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / "dev.txt"
        locked = ROOT / "requirements" / "dev.txt"
        fresh.write_text(locked.read_text())  # what is locked stays, where it still satisfies what is asked for
        command = [uv, "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--no-emit-index-url"]
        command += ["--no-header", "--python-version", "3.11", "requirements/dev.in", "--all-extras"]
        command += [f"packages/{name}/pyproject.toml" for name in packages]
        command += [argument for name in packages for argument in ("--no-emit-package", name)]
        subprocess.run([*command, "-o", str(fresh)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        if pins(fresh) != pins(locked):
            print("requirements/dev.txt is out of date: run `make lock`")
            return 1
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    if stray := [name for name in tracked if name.endswith("uv.lock")]:
        print(f"uv.lock files name the hosts of an index and stay out of git: {stray}")
        return 1
    hosts = [name for name in tracked if name.startswith("requirements/") and "://" in (ROOT / name).read_text()]
    if hosts:
        print(f"the lock names hosts: {hosts}")
        return 1
    print("the lock is up to date")
    return 0


def pins(path: Path) -> set[str]:
    """Return the pinned requirements of a lock, without their hashes and comments."""
    return set(re.findall(r"^[A-Za-z0-9][^\s\\]*==[^\\\n]*", path.read_text(), re.MULTILINE))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
