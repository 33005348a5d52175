"""A uv project's locked dependencies as a Ray runtime environment, for Fray and for any other submit script.

```python
from fray.backend.ray.ray_deps import build_runtime_env_for_packages

runtime_env = build_runtime_env_for_packages(extra=["tpu"], env_vars={"WANDB_PROJECT": "x"})
JobSubmissionClient(address).submit_job(entrypoint="python train.py", runtime_env=runtime_env | {"working_dir": "."})
```

What is installed from an index or from git goes into `pip` (or `uv`), as the lock pins it. What the project has in its
own tree travels with the working directory: modules, those of workspace members above all, are found by `PYTHONPATH`,
and wheels are installed from there. Imports no Ray.

`PYTHONPATH` is relative. Ray changes to the working directory before it starts the Python of a job or a worker, and
Python makes its path absolute as it starts; nothing that Ray expands in `env_vars` names that directory.
"""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from fray.backend.ray._runtime_env import Installer, packages_entry
from fray.errors import InvalidTypeError, InvalidValueError
from fray.uv import export_lock

__all__ = ["build_runtime_env_for_packages", "find_project", "source_roots", "torch_indexes_of"]

CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_TORCH_INDEX = "https://download.pytorch.org/whl/cu128"

# What PyTorch publishes on indexes of its own; and what its builds need, which other projects need as well.
_TORCH = re.compile(r"torch(|vision|audio|text|data|ao|codec|rec|-tensorrt|-xla)|pytorch-triton.*")
_OF_TORCH = re.compile(r"triton|nvidia-.+")
_CUDA_EXTRA = re.compile(r"gpu|cuda.*|cu\d+")
# pip and uv expand it in the lines of a requirements file; Ray sets it while it installs a job's packages.
_ON_THE_NODE = "${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def build_runtime_env_for_packages(
    extra: Sequence[str] | None = None,
    pip_packages: Sequence[str] | None = None,
    env_vars: Mapping[str, str] | None = None,
    *,
    project: str | os.PathLike[str] | None = None,
    ignore: Sequence[str] = ("ray",),
    python_path: Sequence[str] | None = None,
    torch_index: str | None = None,
    installer: Installer = "pip",
) -> dict[str, Any]:
    """Return a Ray runtime environment with a project's locked dependencies.

    Args:
        extra: Extras of the project to add to its dependencies.
        pip_packages: More requirements; one takes the place of what the lock says of the same distribution.
        env_vars: Variables for the job; a `PYTHONPATH` among them comes after the project's.
        project: The directory that the job is shipped, with `uv.lock` in it or above it; the current one where None.
        ignore: Distributions to leave out, with what nothing else needs: the cluster has its own Ray.
        python_path: Where the project's own modules are, below the shipped directory. Where None, this is what the
            build settings of the project, its workspace members and its path dependencies say.
        torch_index: The index that has the builds of PyTorch; `""` for none. Where None, see `torch_indexes_of`.
        installer: Which of Ray's plugins is to install: `pip` or `uv`.

    Returns:
        `env_vars`, with a `PYTHONPATH` relative to the working directory, and, where there is anything to install,
        `pip` or `uv`. What is passed in is not changed.

    Raises:
        InvalidTypeError: `extra` or another list is a string.
        InvalidValueError: There is no lock, or no such extra; or the lock has something that cannot travel.
    """
    lists = {"extra": extra, "pip_packages": pip_packages, "ignore": ignore, "python_path": python_path}
    for what, names in lists.items():
        if isinstance(names, str):
            raise InvalidTypeError(f"{what} must be a list of strings, got {names!r}")
    shipped = Path(project or ".").resolve()
    root = find_project(shipped)
    extras, more = list(extra or ()), list(pip_packages or ())
    left_out = {_normalized(name) for name in ignore} | {_name_of(each) for each in more} - {""}
    requirements, folders = _read_export(_export(root, shipped, extras, left_out), root, shipped)
    folders = [each for each in folders if _normalized(_project_name(each)) not in left_out]
    if python_path is None:
        paths = [_below(shipped, root, each, "modules") for folder in folders for each in source_roots(folder)]
    else:
        paths = list(python_path)
    lines: list[str] = []
    torch: list[str] = []
    for each in [*requirements, *more]:
        (torch if _is_torch(each) or _OF_TORCH.fullmatch(_name_of(each)) else lines).append(each)
    if any(map(_is_torch, torch)):
        indexes = torch_indexes_of([root, *folders], extras, torch) if torch_index is None else [torch_index]
        lines += [f"--extra-index-url {index}" for index in indexes if index]
    variables = dict(env_vars or {})
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [*dict.fromkeys(paths), variables.get("PYTHONPATH")])) or "."
    return {"env_vars": variables, **(packages_entry([*lines, *torch], installer) if lines or torch else {})}


def find_project(directory: Path) -> Path:
    """Return the directory with the uv lock that counts for a directory: it, or the nearest above.

    Raises:
        InvalidValueError: There is no such directory, or no lock.
    """
    if not directory.is_dir():
        raise InvalidValueError(f"project: there is no directory {directory}")
    for each in (directory, *directory.parents):
        if (each / "uv.lock").is_file():
            return each
    raise InvalidValueError(f"there is no uv.lock in {directory} or above it: run `uv lock` in the project")


def source_roots(project: Path) -> list[Path]:
    """Return the folders of a project that have its modules, as its build settings say; `src`, where there is one."""
    said = dict.fromkeys(_said_roots(_toml(project / "pyproject.toml").get("tool", {})))
    return [project / each for each in said] or [project / "src" if (project / "src").is_dir() else project]


def torch_indexes_of(projects: Sequence[Path], extras: Sequence[str], requirements: Sequence[str]) -> list[str]:
    """Return the indexes that a project takes PyTorch from.

    These are the ones that `[tool.uv.sources]` names for it under the extras; else those of `[[tool.uv.index]]`, but
    for the default, that the lock has these requirements from; else PyTorch's own, of CUDA builds where an extra is
    called `gpu`, `cuda…` or `cu…`, and of CPU builds elsewhere. Without the credentials that an address has in it: what
    is in a runtime environment, Ray shows to everybody.

    Args:
        projects: The directory with the lock, then those of workspace members.
        extras: The extras asked for.
        requirements: What of PyTorch the lock pins.
    """
    named: list[str] = []
    declared: dict[str, str] = {}
    above: dict[str, str] = {}  # of the workspace, for its members too
    for project in dict.fromkeys(projects):
        settings = _toml(project / "pyproject.toml").get("tool", {}).get("uv", {})
        tables = [*settings.get("index", []), *_toml(project / "uv.toml").get("index", [])]
        indexes = above | {each["name"]: _shown(each["url"]) for each in tables if "name" in each}
        if project == projects[0]:
            above = indexes
        declared |= {_shown(each["url"]).rstrip("/"): _shown(each["url"]) for each in tables if not each.get("default")}
        for name, sources in settings.get("sources", {}).items():
            if _is_torch(name):
                asked = _asked(sources if isinstance(sources, list) else [sources], extras)
                named += [indexes[each] for each in asked if each in indexes]
    if named:
        return list(dict.fromkeys(named))
    if declared:
        pins = {each.partition(" ;")[0].strip() for each in requirements}
        for package in _toml(projects[0] / "uv.lock").get("package", []):
            if f"{package['name']}=={package.get('version')}" in pins:
                named += filter(None, [declared.get(package["source"].get("registry", "").rstrip("/"))])
    default = GPU_TORCH_INDEX if any(map(_CUDA_EXTRA.fullmatch, extras)) else CPU_TORCH_INDEX
    return list(dict.fromkeys(named)) or [default]


def _export(root: Path, shipped: Path, extras: list[str], left_out: set[str]) -> str:
    options = ["--no-hashes", "--no-default-groups"]
    whole = _project_name(root)  # none for a workspace whose root is no distribution: uv exports all its members
    if shipped != root and _project_name(shipped):
        whole = _project_name(shipped)
        options += ["--package", whole]
    for name in sorted(left_out - {_normalized(whole)}):  # without it there would be nothing
        options += ["--prune", name]
    return export_lock(root, extras, options)


def _read_export(exported: str, root: Path, shipped: Path) -> tuple[list[str], list[Path]]:
    """Return what is to be installed, and the folders of what is in the project's own tree."""
    requirements, folders = [], []
    for line in exported.splitlines():
        requirement = line.strip()
        if not requirement or requirement.startswith("#"):
            continue
        location = _location_of(requirement)
        if location is None:
            requirements.append(requirement)
            continue
        path = Path(os.path.normpath(root / location))
        if path.is_dir():
            folders.append(path)
        else:
            requirements.append(_archive(requirement, path, _below(shipped, root, path, "dependency")))
    return requirements, folders


def _archive(requirement: str, file: Path, below: str) -> str:
    """Return the requirement of a wheel or an archive that travels with the working directory.

    By its hash, for Ray takes an environment with the same lines for the same environment.
    """
    name = file.name.partition("-")[0] if file.suffix == ".whl" else file.name.rpartition("-")[0]
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise InvalidValueError(f"the lock has {requirement!r}, and {file} cannot be read: {error}") from error
    _, semicolon, marker = requirement.partition(" ;")
    return f"{_normalized(name)} @ file://{_ON_THE_NODE}/{quote(below)}#sha256={digest}{semicolon}{marker}"


def _location_of(requirement: str) -> str | None:
    """Where a requirement is on this machine; None for one that is had from elsewhere."""
    text = requirement.partition(" ;")[0].strip()
    if text.startswith(("-e ", "--editable ")):
        text = text.split(maxsplit=1)[1]
    elif " @ " in text:
        text = text.partition(" @ ")[2].strip()
        if not text.startswith("file:"):
            return None
    elif not text.startswith((".", "/", "file:")):
        return None
    return unquote(urlsplit(text).path) if text.startswith("file:") else text


def _below(shipped: Path, root: Path, path: Path, what: str) -> str:
    """Return a path from the directory that is shipped.

    Raises:
        InvalidValueError: It is not in it.
    """
    path = Path(os.path.normpath(path))
    if path.is_relative_to(shipped):
        return path.relative_to(shipped).as_posix()
    remedy = (
        f"submit from {root}"
        if path.is_relative_to(root)
        else "move it into the project, or depend on a release or a git repository of it"
    )
    if what == "modules":
        remedy += ", or say by python_path where modules are"
    raise InvalidValueError(f"the project's {what} in {path} would not travel, as only {shipped} is shipped: {remedy}")


def _said_roots(tool: dict[str, Any]) -> Iterator[str]:
    if (module_root := tool.get("uv", {}).get("build-backend", {}).get("module-root")) is not None:
        yield module_root
    setuptools = tool.get("setuptools", {})
    packages = setuptools.get("packages")
    if isinstance(packages, dict):
        yield from packages.get("find", {}).get("where", [])
    if "" in setuptools.get("package-dir", {}):
        yield setuptools["package-dir"][""]
    build = tool.get("hatch", {}).get("build", {})
    wheel = build.get("targets", {}).get("wheel", {})
    for package in wheel.get("packages", build.get("packages", [])):
        yield str(PurePosixPath(package).parent)
    sources = wheel.get("sources", build.get("sources"))
    if isinstance(sources, list):
        yield from sources
    for package in tool.get("poetry", {}).get("packages", []):
        yield package.get("from", ".")
    if package_dir := tool.get("pdm", {}).get("build", {}).get("package-dir"):
        yield package_dir


def _asked(sources: Sequence[Mapping[str, str]], extras: Sequence[str]) -> list[str]:
    """Return the names of the indexes that count: those of the extras asked for, or else those of no extra."""
    named = [each for each in sources if "index" in each and "group" not in each]
    asked = [each for each in named if each.get("extra") in extras] or [each for each in named if "extra" not in each]
    return [each["index"] for each in asked]


def _shown(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{file} cannot be read: {error}") from error


def _project_name(directory: Path) -> str:
    return str(_toml(directory / "pyproject.toml").get("project", {}).get("name", ""))


def _is_torch(requirement: str) -> bool:
    return _TORCH.fullmatch(_name_of(requirement)) is not None


def _name_of(requirement: str) -> str:
    found = _NAME.match(requirement)
    return _normalized(found[0]) if found else ""


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
