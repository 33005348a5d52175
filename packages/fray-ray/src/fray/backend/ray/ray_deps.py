"""A uv project's locked dependencies as a Ray runtime environment, for Fray and for any other submit script.

```python
from fray.backend.ray.ray_deps import build_runtime_env_for_packages

runtime_env = build_runtime_env_for_packages(extra=["tpu"], env_vars={"WANDB_PROJECT": "x"})
JobSubmissionClient(address).submit_job(entrypoint="python train.py", runtime_env=runtime_env | {"working_dir": "."})
```

What is installed from an index or from git goes into `pip` (or `uv`), as the lock pins it. What the project has in its
own tree, its workspace members above all, travels with the working directory and is found by `PYTHONPATH`. Imports no
Ray.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fray.backend.ray._runtime_env import Installer, packages_entry
from fray.errors import InvalidTypeError, InvalidValueError
from fray.uv import export_lock

__all__ = ["build_runtime_env_for_packages", "find_project", "source_root", "torch_index_of"]

CPU_TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
GPU_TORCH_INDEX = "https://download.pytorch.org/whl/cu128"

_TORCH_FAMILY = re.compile(r"(torch|torchvision|torchaudio|torchtext|pytorch-triton|triton|nvidia-.+)$")
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
        ignore: Distributions to leave out: the cluster has its own Ray.
        python_path: Where the project's own modules are, below the shipped directory. Where None, this is what the
            build settings of the project, its workspace members and its path dependencies say.
        torch_index: The index that has the builds of PyTorch; `""` for none. Where None, the one that
            `[tool.uv.sources]` names; else PyTorch's own, for CUDA where `extra` has `gpu` and for CPUs elsewhere.
        installer: Which of Ray's plugins is to install: `pip` or `uv`.

    Returns:
        `env_vars`, with a `PYTHONPATH` relative to the working directory, and, where there is anything to install,
        `pip` or `uv`. What is passed in is not changed.

    Raises:
        InvalidTypeError: `extra` or another list is a string.
        InvalidValueError: There is no lock, or no such extra; or the lock has something that cannot travel.
    """
    for what, names in (("extra", extra), ("pip_packages", pip_packages), ("ignore", ignore)):
        if isinstance(names, str):
            raise InvalidTypeError(f"{what} must be a list of strings, got {names!r}")
    shipped = Path(project or ".").absolute()
    root = find_project(shipped)
    extras, more = list(extra or ()), list(pip_packages or ())
    left_out = {_normalized(name) for name in ignore} | {_name_of(each) for each in more}
    requirements, folders = _read_export(_export(root, shipped, extras), root, left_out)
    paths = list(python_path) if python_path is not None else [_below(shipped, source_root(each)) for each in folders]
    torch = [each for each in [*requirements, *more] if _TORCH_FAMILY.match(_name_of(each))]
    lines = [each for each in [*requirements, *more] if each not in torch]
    if torch:
        index = torch_index_of(root, extras) if torch_index is None else torch_index
        lines += ([f"--extra-index-url {index}"] if index else []) + torch
    variables = dict(env_vars or {})
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [*dict.fromkeys(paths), variables.get("PYTHONPATH")])) or "."
    return {"env_vars": variables, **(packages_entry(lines, installer) if lines else {})}


def find_project(directory: Path) -> Path:
    """Return the directory with the uv lock that counts for a directory: it, or the nearest above.

    Raises:
        InvalidValueError: There is none.
    """
    for each in (directory, *directory.parents):
        if (each / "uv.lock").is_file():
            return each
    raise InvalidValueError(f"there is no uv.lock in {directory} or above it: run `uv lock` in the project")


def source_root(project: Path) -> Path:
    """Return the folder of a project that has its modules, as its build settings say; `src`, where there is one."""
    tool = _toml(project / "pyproject.toml").get("tool", {})
    if (module_root := tool.get("uv", {}).get("build-backend", {}).get("module-root")) is not None:
        return project / str(module_root)
    setuptools = tool.get("setuptools", {})
    where = setuptools.get("packages", {})
    if isinstance(where, dict) and where.get("find", {}).get("where"):
        return project / str(where["find"]["where"][0])
    if root := setuptools.get("package-dir", {}).get(""):
        return project / str(root)
    wheel = tool.get("hatch", {}).get("build", {}).get("targets", {}).get("wheel", {})
    if packages := wheel.get("packages"):
        return (project / str(packages[0])).parent
    for package in tool.get("poetry", {}).get("packages", []):
        if "from" in package:
            return project / str(package["from"])
    return project / "src" if (project / "src").is_dir() else project


def torch_index_of(project: Path, extras: Sequence[str]) -> str:
    """Return the index that a project takes PyTorch from under these extras."""
    settings = _toml(project / "pyproject.toml").get("tool", {}).get("uv", {})
    sources = settings.get("sources", {}).get("torch", [])
    sources = sources if isinstance(sources, list) else [sources]
    named = [each for each in sources if each.get("index")]
    asked = [each for each in named if each.get("extra") in extras] or [each for each in named if "extra" not in each]
    for source in asked:
        for index in settings.get("index", []):
            if index.get("name") == source["index"]:
                return str(index["url"])
    return GPU_TORCH_INDEX if "gpu" in extras else CPU_TORCH_INDEX


def _export(root: Path, shipped: Path, extras: list[str]) -> str:
    options = ["--no-hashes", "--no-default-groups"]
    if shipped != root and "project" in _toml(shipped / "pyproject.toml"):
        options += ["--package", _toml(shipped / "pyproject.toml")["project"]["name"]]
    elif "project" not in _toml(root / "pyproject.toml"):
        options.append("--all-packages")  # of a workspace whose root is no distribution
    return export_lock(root, extras, options)


def _read_export(exported: str, root: Path, left_out: set[str]) -> tuple[list[str], list[Path]]:
    """Return what is to be installed, and the folders of what is in the project's own tree."""
    requirements, folders = [], []
    for line in exported.splitlines():
        requirement = line.strip()
        if not requirement or requirement.startswith("#"):
            continue
        location = _location_of(requirement)
        if location is None:
            if _name_of(requirement) not in left_out:
                requirements.append(requirement)
            continue
        path = Path(os.path.normpath(root / location))
        if not path.is_dir():
            raise InvalidValueError(
                f"the lock of {root} has {requirement!r}, a file that no node of the cluster can install: depend on "
                "its directory instead, or on a release"
            )
        folders.append(path)
    return requirements, folders


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


def _below(shipped: Path, folder: Path) -> str:
    """Return a folder's path from the directory that is shipped."""
    try:
        return Path(os.path.normpath(folder)).relative_to(shipped).as_posix()
    except ValueError:
        raise InvalidValueError(
            f"the project's modules in {folder} are outside of {shipped}, which is all that is shipped: submit from "
            "the workspace's root, or name what is needed by python_path"
        ) from None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidValueError(f"{file} cannot be read: {error}") from error


def _name_of(requirement: str) -> str:
    found = _NAME.match(requirement)
    return _normalized(found[0]) if found else ""


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
