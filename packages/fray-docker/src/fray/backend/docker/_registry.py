"""Images to and from registries, with the credentials of docker's own configuration, credential helpers included."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from docker.errors import APIError
from docker.utils import parse_repository_tag
from fray.backend.docker._engine import Engine
from fray.errors import AuthenticationError, ConnectionFailedError, PlatformError

__all__ = ["pull", "push", "registry_error"]

# How long an engine may say nothing in a push: it does so as the registry puts a large layer away.
_PUSH_SECONDS = 3600.0

_DENIED = re.compile(
    r"unauthori[sz]ed|authentication required|no basic auth|denied|incorrect username or password|"
    r"credentials|forbidden|\b40[13]\b",
    re.IGNORECASE,
)
_UNREACHABLE = re.compile(
    r"dial tcp|no such host|connection refused|connection reset|i/o timeout|TLS handshake|x509|EOF|"
    r"server gave HTTP response|Client\.Timeout|network is unreachable|proxyconnect",
    re.IGNORECASE,
)


def push(engine: Engine, repository: str, tag: str, on_progress: Callable[[str], None]) -> str:
    """Push a tag that the engine has, and return the digest that the registry knows it by.

    Raises:
        AuthenticationError: The registry refuses the credentials, or there are none.
        ConnectionFailedError: The registry cannot be reached.
        PlatformError: Anything else that it says.
    """
    digest = ""
    with engine.errors(), engine.own_client(_PUSH_SECONDS) as own:
        events: Iterable[dict[str, Any]] = own.api.push(repository, tag=tag, stream=True, decode=True)
        for event in _follow(events, f"pushing {repository}:{tag}", on_progress):
            aux = event.get("aux")
            if isinstance(aux, dict) and aux.get("Digest"):
                digest = str(aux["Digest"])
    if not digest:
        found = engine.inspect_image(f"{repository}:{tag}") or {}
        mine = [each for each in found.get("RepoDigests") or [] if each.startswith(f"{repository}@")]
        if not mine:
            raise PlatformError(f"{repository}:{tag} was pushed, and the registry gave no digest for it")
        digest = mine[0].partition("@")[2]
    return digest


def pull(engine: Engine, reference: str, platform: str | None, on_progress: Callable[[str], None]) -> None:
    """Pull an image by tag or digest.

    Raises:
        AuthenticationError: The registry refuses the credentials, or has no such image that they may see.
        ConnectionFailedError: The registry cannot be reached.
        PlatformError: Anything else that it says.
    """
    repository, tag = parse_repository_tag(reference)
    with engine.errors():
        try:
            events: Iterable[dict[str, Any]] = engine.api.pull(
                repository, tag=tag or "latest", stream=True, decode=True, platform=platform
            )
            for _ in _follow(events, f"pulling {reference}", on_progress):
                pass
        except APIError as error:
            raise registry_error(f"pulling {reference}", str(error.explanation or error)) from error


def registry_error(what: str, said: str) -> PlatformError:
    """Return what a registry said, as the error that it is."""
    if _UNREACHABLE.search(said):
        return ConnectionFailedError(
            f"{what}: the engine cannot reach the registry: {said}; see that the name is right, and the engine's proxy "
            "and certificates"
        )
    if _DENIED.search(said):
        return AuthenticationError(f"{what}: the registry refuses: {said}; `docker login` gives the credentials")
    return PlatformError(f"{what}: {said}")


def _follow(
    events: Iterable[dict[str, Any]], what: str, on_progress: Callable[[str], None]
) -> Iterable[dict[str, Any]]:
    layers: dict[str, str] = {}
    last = ""
    for event in events:
        if "error" in event:
            raise registry_error(what, str(event["error"]))
        if "id" in event and "status" in event:
            layers[str(event["id"])] = str(event["status"])
            ready = sum(status in _READY for status in layers.values())
            said = f"{what}: {ready}/{len(layers)} layers"
            if said != last:
                on_progress(said)
                last = said
        yield event


_READY = frozenset({"Pushed", "Layer already exists", "Pull complete", "Already exists"})
