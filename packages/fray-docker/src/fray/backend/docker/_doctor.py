"""What `fray doctor` looks at for jobs in containers."""

from __future__ import annotations

from collections.abc import Iterator

from fray.backend.docker._engine import DEFAULT, REMEDY, Engine, find_endpoint
from fray.errors import FrayError

__all__ = ["checks"]


def checks() -> Iterator[tuple[bool, str, str]]:
    """Yield whether each thing is well, what was found, and the remedy."""
    from fray.backend.docker._buildkit import find_cli

    try:
        endpoint = find_endpoint()
    except FrayError as error:
        yield False, f"docker: {error}", "see `docker context ls`, DOCKER_HOST and DOCKER_CONTEXT"
        return
    engine = Engine(endpoint, timeout_seconds=10)
    try:
        version, info = engine.version, engine.info
    except FrayError as error:
        if endpoint.named_by == DEFAULT:
            # Nobody has said that there should be one: `fray doctor -c docker` asks whether there is.
            yield True, f"docker: no engine answers at {endpoint.host}; jobs with -c docker need one", ""
        else:
            yield False, f"docker: {error}", REMEDY
        return
    yield (
        True,
        f"docker: the engine at {endpoint.host} (by {endpoint.named_by}) is {version['Version']}, "
        f"{version['Os']}/{version['Arch']}, {info['NCPU']} CPU, {info['MemTotal'] / (1 << 30):.1f} GiB",
        "",
    )
    for what, key in (("memory", "MemoryLimit"), ("CPU", "CpuCfsQuota")):
        if info.get(key) is False:
            yield (
                False,
                f"docker: the engine cannot limit {what}: jobs that ask for it are refused",
                ("enable the cgroup controller in the kernel of the engine's machine"),
            )
    try:
        cli = find_cli(engine)
    except FrayError as error:
        yield False, f"docker: {error}", "install docker's buildx plugin"
    else:
        if cli is None:
            yield (
                True,
                (
                    "docker: images are built by the engine's classic builder, without build secrets and caches of "
                    "packages, since no docker command with BuildKit is on PATH (the buildx plugin brings it)"
                ),
                "",
            )
        else:
            yield True, f"docker: images are built with BuildKit by {cli}", ""
    engine.close()
