"""Which of the two builders makes an image: BuildKit (`_buildkit`), or the engine's classic one (`_classic`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fray.backend.docker._buildkit import BuildKitCommand, find_cli
from fray.backend.docker._engine import Engine
from fray.backend.docker._settings import may_hold_credentials
from fray.errors import UnsupportedError

__all__ = ["NO_SECRETS", "BuilderName", "choose_builder"]

BuilderName = Literal["auto", "buildkit", "classic"]

NO_SECRETS = (
    "the engine's classic builder has no build secrets, and build arguments would show them in the image's history: "
    "install a docker command with BuildKit (the buildx plugin)"
)


def choose_builder(
    builder: BuilderName, engine: Engine, *, has_secrets: bool, settings: Mapping[str, str]
) -> BuildKitCommand | None:
    """Return the docker command whose BuildKit is to be used; None is the engine's classic builder.

    Args:
        builder: What the caller asked for.
        engine: Whose builder.
        has_secrets: Whether the build mounts secrets.
        settings: Which of `index_settings` the build is to have.

    Raises:
        UnsupportedError: BuildKit was asked for and no docker command has it, or the classic builder cannot keep secret
            what the build needs.
    """
    command = None if builder == "classic" else find_cli(engine)
    if command is not None:
        return command
    if builder == "buildkit":
        raise UnsupportedError(
            "no docker command on PATH has BuildKit: install docker's buildx plugin, or use the classic builder"
        )
    if has_secrets:
        raise UnsupportedError(NO_SECRETS)
    for name, value in sorted(settings.items()):
        if may_hold_credentials(name, value):
            raise UnsupportedError(f"{name} holds, or may hold, credentials for an index: {NO_SECRETS}")
    return None
