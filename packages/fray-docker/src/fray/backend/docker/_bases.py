"""The images that a build begins from: which one a name means, in the engine or else in its registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from docker.errors import APIError
from docker.utils import parse_repository_tag
from fray.backend.docker._engine import Engine
from fray.backend.docker._registry import registry_error
from fray.errors import AuthenticationError, ImageBuildError

__all__ = ["Base", "find_base", "unknown_base"]


@dataclass(frozen=True)
class Base:
    """A base image.

    Attributes:
        name: As the caller gave it.
        digest: `sha256:…`, of the registry where it has one, else its id; empty where neither is known.
        from_name: What to write after `FROM`.
        platform: As `linux/amd64`.
        config: What the engine knows of it; None where the engine has not pulled it.
    """

    name: str
    digest: str
    from_name: str
    platform: str
    config: Mapping[str, Any] | None

    @property
    def pinned(self) -> str:
        """What names it and no other, as far as that is known."""
        return self.from_name if "@" in self.from_name else (self.digest or self.name)


def find_base(engine: Engine, name: str, platform: str | None, *, must_exist: bool, asks_registry: bool = True) -> Base:
    """Find out which image a name means.

    Args:
        engine: Where it may be.
        name: A tag, a digest or an id.
        platform: As `linux/amd64`; None is that of the image in the engine, or the engine's own.
        must_exist: Whether it is an error that its registry does not have it for us.
        asks_registry: Whether the registry is asked about one that the engine does not have.

    Raises:
        AuthenticationError: The registry refuses the credentials.
        ImageBuildError: It is nowhere.
        ConnectionFailedError: The engine cannot be reached.
    """
    repository = parse_repository_tag(name)[0].partition("@")[0]
    found = engine.inspect_image(name)
    if found is not None:
        own = f"{found.get('Os', 'linux')}/{found.get('Architecture', 'amd64')}"
        if platform is None or platform == own or platform.startswith(f"{own}/"):
            config = found.get("Config") or {}
            digests: list[str] = sorted(found.get("RepoDigests") or [])
            mine = [each for each in digests if each.partition("@")[0] == repository] or digests
            if mine:
                # By its name all the same: some engines give digests to images that no registry has.
                return Base(name, mine[0].partition("@")[2], name, platform or own, config)
            tags: list[str] = found.get("RepoTags") or []
            is_id = name.removeprefix("sha256:") in found["Id"]
            return Base(name, found["Id"], tags[0] if is_id and tags else name, platform or own, config)
    unknown = unknown_base(engine, name, platform)
    if not asks_registry:
        return unknown
    with engine.errors():
        try:
            answer = engine.api.inspect_distribution(name)
        except APIError as error:
            said = str(error.explanation or error)
            if not must_exist:
                return unknown
            mapped = registry_error(f"the base image {name}", said)
            where = "is not in the engine" if found is None else f"is in the engine, and not for {platform}"
            message = f"the base image {name} {where}, and its registry does not have it for us: {said}"
            remedy = f"`docker pull {name}` where that works, or give another base_image"
            if isinstance(mapped, AuthenticationError):
                raise AuthenticationError(f"{message}; `docker login`, {remedy}") from error
            raise ImageBuildError(f"{message}; {remedy}") from error
    digest = str(answer["Descriptor"]["digest"])
    return replace(unknown, digest=digest, from_name=f"{repository}@{digest}")


def unknown_base(engine: Engine, name: str, platform: str | None) -> Base:
    """Return an image of which no more than its name is known before it has been pulled."""
    return Base(name, "", name, platform or _platform_of_engine(engine), None)


def _platform_of_engine(engine: Engine) -> str:
    machine = str(engine.info.get("Architecture", "x86_64"))
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}
    return f"linux/{names.get(machine, machine)}"
