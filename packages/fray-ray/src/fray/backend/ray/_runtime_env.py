"""Fray's `RuntimeEnv` in the terms of a Ray runtime environment, for jobs as for tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fray.types import RuntimeEnv

__all__ = ["Installer", "build_ray_runtime_env", "packages_entry", "split_resources"]

Installer = Literal["uv", "pip"]
"""Which of Ray's two plugins installs the packages of a runtime environment."""


def build_ray_runtime_env(env: RuntimeEnv, *, installer: Installer = "uv") -> dict[str, Any]:
    """Return the Ray runtime environment with the variables and the packages of `env`.

    What else `env` asks for is not a runtime environment's: files are shipped, secrets handed over, resources reserved
    by whoever submits.
    """
    built: dict[str, Any] = {}
    if env.env:
        built["env_vars"] = dict(env.env)
    if env.package_requirements:
        built |= packages_entry(env.package_requirements, installer)
    return built


def packages_entry(lines: Sequence[str], installer: Installer) -> dict[str, Any]:
    """Return what has one of Ray's plugins install the lines of a requirements file."""
    if installer == "pip":
        return {"pip": {"packages": list(lines)}}
    # Instead of Ray's own --no-cache: what a node has had once it need not fetch again. And a second index is asked too
    # where the first has another build of the same distribution, as pip does.
    options = (
        ["--index-strategy=unsafe-best-match"] if any(line.startswith("--extra-index-url") for line in lines) else []
    )
    return {"uv": {"packages": list(lines), "uv_pip_install_options": options}}


def split_resources(resources: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Split resources into those that Ray has arguments for (`num_cpus`, `num_gpus`, `memory`) and all others."""
    known = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}
    arguments: dict[str, float] = {}
    others: dict[str, float] = {}
    for name, quantity in resources.items():
        if name == "memory":
            arguments["memory"] = int(quantity)
        elif name in known:
            arguments[known[name]] = quantity
        else:
            others[name] = quantity
    return arguments, others
