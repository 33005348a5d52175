"""A build with everything fixed, and the name that it gives its image: what goes to the process that carries it out.

`_inputs` makes it, `_build` carries it out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fray.backend.docker._builders import BuilderName
from fray.backend.docker._dockerfile import Recipe

__all__ = ["FrozenBuild", "image_tag"]

_TAG_DIGITS = 24


@dataclass(frozen=True)
class FrozenBuild:
    """A build with everything fixed, for another process to carry out. It holds no secret.

    Attributes:
        tag: What the image will be called.
        base: The base's name.
        base_pin: Its digest or id; a base that is another by then is refused.
        platform: The image's.
        needs_platform: Whether the builder must be told.
        builder: What the caller asked for.
        recipe: What Fray's Dockerfile says; None for the project's own.
        dockerfile_name: Which file of the context is the project's own Dockerfile.
        dockerfile: The content of it.
        target: The stage to build.
        build_args: Values for `ARG`.
        secret_names: The ids of the secrets that the Dockerfile may mount.
        project: For the label.
        repository: The name without its tag.
        ingredients: What the tag stands for, where the base has to be pulled before the tag is known; else empty.
        pulls: Whether the base is pulled though the engine has one of that name.
        context_path: The archive of what will be sent; None where the caller keeps it elsewhere.
    """

    tag: str
    base: str
    base_pin: str
    platform: str
    needs_platform: bool
    builder: BuilderName
    recipe: Recipe | None
    dockerfile_name: str
    dockerfile: str
    target: str | None
    build_args: Mapping[str, str]
    secret_names: tuple[str, ...]
    project: str
    repository: str
    ingredients: Mapping[str, Any]
    pulls: bool = False
    context_path: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold, for `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrozenBuild:
        """Return what `as_dict` gave, also by way of JSON."""
        fields: dict[str, Any] = {**values, "secret_names": tuple(values["secret_names"])}
        if values["recipe"] is not None:
            recipe: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in values["recipe"].items()
            }
            fields["recipe"] = Recipe(**recipe)
        return cls(**fields)


def image_tag(repository: str, ingredients: Mapping[str, Any]) -> str:
    """Return an image's name: `repository:` and the digest of all that goes into it.

    It ends in `:unpulled` where the base has to be pulled before it is known.
    """
    if ingredients.get("base") == "":
        return f"{repository}:unpulled"
    text = json.dumps(ingredients, sort_keys=True)
    return f"{repository}:{hashlib.sha256(text.encode()).hexdigest()[:_TAG_DIGITS]}"
