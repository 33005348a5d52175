"""What is known of a Python interpreter that jobs use: where its packages are, and which are installed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from fray.errors import InvalidValueError

__all__ = ["Interpreter", "InstalledPackage", "command_python", "describe_interpreter"]

_PROBE = """
import json, os, site, sys, sysconfig
paths = sysconfig.get_paths()
folders = [paths["purelib"], paths["platlib"], *site.getsitepackages()]
if site.ENABLE_USER_SITE:
    folders.append(site.getusersitepackages())
print(json.dumps({
    "executable": sys.executable,
    "version": sys.version,
    "platform": sysconfig.get_platform(),
    "site_folders": list(dict.fromkeys(f for f in folders if os.path.isdir(f))),
    "scripts": paths["scripts"] if sys.prefix != sys.base_prefix else None,
}))
"""


@dataclass(frozen=True)
class InstalledPackage:
    """One distribution that an interpreter sees."""

    name: str
    version: str
    from_index: bool


@dataclass(frozen=True)
class Interpreter:
    """A Python that jobs run on.

    Attributes:
        executable: Its path.
        version: Its `sys.version`.
        platform: Such as `linux-x86_64`.
        site_folders: Where it finds packages, first to last.
        scripts: Its virtual environment's `bin`, None where it is not one's.
    """

    executable: str
    version: str
    platform: str
    site_folders: tuple[str, ...]
    scripts: str | None

    def installed_digest(self) -> str:
        """What changes when a package is installed, removed or updated."""
        digest = hashlib.sha256()
        for folder in self.site_folders:
            digest.update(folder.encode(errors="surrogateescape"))
            for name in _listed(folder):
                if name.endswith((".dist-info", ".egg-info", ".egg-link", ".pth")):
                    digest.update(name.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def installed(self) -> list[InstalledPackage]:
        """The distributions that it sees; of several of one name the first counts."""
        found: dict[str, InstalledPackage] = {}
        for folder in self.site_folders:
            for name in _listed(folder):
                stem, _, ending = name.rpartition(".")
                if ending != "dist-info" or "-" not in stem:
                    continue
                package, _, version = stem.rpartition("-")
                # A direct_url.json is there when it did not come from an index: editable, a directory, git.
                local = (Path(folder) / name / "direct_url.json").exists()
                found.setdefault(normalized(package), InstalledPackage(normalized(package), version, not local))
        return list(found.values())


def normalized(name: str) -> str:
    """The one spelling of a distribution's name (packaging.python.org, "Names and normalization")."""
    import re

    return re.sub(r"[-_.]+", "-", name).lower()


def describe_interpreter(executable: str, cache_directory: Path) -> Interpreter:
    """Ask an interpreter about itself, or a note of its answer if it has not changed since.

    Raises:
        InvalidValueError: There is no such program, or it is no Python.
    """
    if executable == sys.executable:
        return _this_interpreter()
    found = shutil.which(executable)
    if found is None:
        raise InvalidValueError(f"python: {executable!r} is not there, or cannot be executed")
    path = os.path.abspath(found)
    stat = Path(path).stat()
    settings = Path(path).parent.parent / "pyvenv.cfg"
    stamp = [path, stat.st_mtime_ns, stat.st_size, settings.stat().st_mtime_ns if settings.exists() else 0]
    note = cache_directory / f"python-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:24]}.json"
    try:
        known = json.loads(note.read_text())
        return Interpreter(**{**known, "site_folders": tuple(known["site_folders"])})
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not asked yet, or the note is damaged
    interpreter = _ask(path)
    temporary = note.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps(asdict(interpreter)))
        os.replace(temporary, note)
    except OSError:
        temporary.unlink(missing_ok=True)  # asked again next time
    return interpreter


def command_python() -> str:
    """Return the interpreter that the `fray` command's jobs use where `--python` names none.

    The user's virtual environment counts, not the one that the command happens to be installed in.
    """
    for environment in (os.environ.get("VIRTUAL_ENV"), ".venv"):
        if environment:
            candidate = Path(environment).absolute() / "bin" / "python"
            if os.access(candidate, os.X_OK):
                return str(candidate)
    return shutil.which("python3") or shutil.which("python") or sys.executable


@cache
def _this_interpreter() -> Interpreter:
    return _ask(sys.executable)


def _ask(path: str) -> Interpreter:
    try:
        answer = subprocess.run(
            [path, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
            cwd="/",
            check=True,
            env={name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
        ).stdout
        told = json.loads(answer.strip().splitlines()[-1])
        return Interpreter(**{**told, "site_folders": tuple(told["site_folders"])})
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, TypeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InvalidValueError(f"python: {path!r} does not answer as a Python: {said.strip()}") from None


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []
