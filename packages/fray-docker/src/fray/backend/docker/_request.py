"""What either builder is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fray.backend.docker._context import Context

__all__ = ["BuildRequest"]


@dataclass(frozen=True)
class BuildRequest:
    """One build, ready to be sent.

    Attributes:
        tag: What the image will be called.
        context: What is sent.
        dockerfile_name: Which file of the context says how.
        target: The stage to build, where not the last.
        build_args: Values of `ARG`; they are not secrets.
        inherited_args: The names of those whose values are not to be shown in a command line: proxies.
        labels: To be put on the image.
        platform: Which one to build for, as `linux/arm64`; None is the engine's own.
        secrets: By id, for `RUN --mount=type=secret`.
    """

    tag: str
    context: Context
    dockerfile_name: str = "Dockerfile"
    target: str | None = None
    build_args: Mapping[str, str] = field(default_factory=dict)
    inherited_args: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    platform: str | None = None
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
