"""Carrying out a build that is fixed (`_frozen`), here or in another process, by whichever builder there is."""

from __future__ import annotations

import contextlib
import re
import shlex
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import IO

from docker.utils import parse_repository_tag
from fray.backend.docker._bases import find_base
from fray.backend.docker._builders import choose_builder
from fray.backend.docker._buildkit import build_by_buildkit
from fray.backend.docker._classic import CacheVanishedError, build_classic
from fray.backend.docker._context import Context, read_context
from fray.backend.docker._dockerfile import ENVIRONMENT_SECRET, Recipe, free_venv, render
from fray.backend.docker._engine import Engine, find_endpoint
from fray.backend.docker._frozen import FrozenBuild, image_tag
from fray.backend.docker._registry import pull
from fray.backend.docker._request import BuildRequest
from fray.backend.docker._settings import index_settings, proxies
from fray.backend.docker._uv_image import ensure_uv_image
from fray.errors import ImageBuildError, InvalidValueError

__all__ = ["ImageRef", "build_frozen", "carry_out", "find_built", "ignore", "with_base"]


@dataclass(frozen=True)
class ImageRef:
    """An image.

    Attributes:
        tag: Its name, `repository:tag`.
        id: What the engine knows it by, `sha256:…`.
        digest: What a registry knows it by, `repository@sha256:…`; None where it was never pushed.
    """

    tag: str
    id: str
    digest: str | None = None

    def __str__(self) -> str:
        return self.digest or self.tag


def build_frozen(
    frozen: FrozenBuild,
    engine: Engine | str | None = None,
    on_output: Callable[[bytes], None] | None = None,
    on_progress: Callable[[str], None] | None = None,
    *,
    context: IO[bytes] | None = None,
    build_secrets: Mapping[str, str] | None = None,
    settings: Mapping[str, str] | None = None,
    cancel: threading.Event | None = None,
) -> ImageRef:
    """Carry out what `ImageBuilder.freeze` fixed, unless the engine has the image.

    Args:
        frozen: What to build.
        engine: A client, or the address or docker context of one; None finds it as the docker command does.
        on_output: Is given the builder's own output, piece by piece.
        on_progress: Is told what is being done.
        context: The archive, where it is no longer at `frozen.context_path`.
        build_secrets: The values of `frozen.secret_names`.
        settings: What `index_settings` gave when it was frozen; None takes this process's.
        cancel: Set by another thread, it ends the build; nothing is left of it.

    Raises:
        FrayError: As `ImageBuilder.build`.
    """
    found = engine if isinstance(engine, Engine) else Engine(find_endpoint(engine))
    frozen = with_base(frozen, found, on_progress or ignore)
    if built := find_built(found, frozen.tag):
        return built
    secrets = dict(build_secrets or {})
    if missing := sorted(set(frozen.secret_names) - secrets.keys()):
        raise InvalidValueError(f"build_secrets has no value for {', '.join(missing)}")
    if context is None and frozen.context_path is None:
        raise InvalidValueError("the frozen build names no file for its context: give context")
    with contextlib.nullcontext(context) if context is not None else open(frozen.context_path or "", "rb") as archive:
        archive.seek(0)
        sent = Context(source=archive, is_flat=True) if frozen.recipe is None else read_context(archive)
        return carry_out(
            frozen,
            sent,
            found,
            on_output or ignore,
            on_progress or ignore,
            secrets,
            index_settings() if settings is None else settings,
            cancel,
        )


def with_base(frozen: FrozenBuild, engine: Engine, on_progress: Callable[[str], None]) -> FrozenBuild:
    """Pull the base of a build that was frozen without it, and give the build its name.

    Raises:
        FrayError: The base cannot be had.
    """
    if frozen.recipe is None or frozen.base_pin:
        return frozen
    platform = frozen.platform if frozen.needs_platform else None
    if frozen.pulls or engine.inspect_image(frozen.base) is None:
        pull(engine, frozen.base, platform, on_progress)
    base = find_base(engine, frozen.base, platform, must_exist=True)
    tag = image_tag(frozen.repository, {**frozen.ingredients, "base": base.digest, "platform": base.platform})
    recipe = replace(frozen.recipe, base=base.from_name)
    return replace(frozen, tag=tag, base_pin=base.digest, platform=base.platform, recipe=recipe, ingredients={})


def carry_out(
    frozen: FrozenBuild,
    context: Context,
    engine: Engine,
    on_output: Callable[[bytes], None],
    on_progress: Callable[[str], None],
    build_secrets: Mapping[str, str],
    settings: Mapping[str, str],
    cancel: threading.Event | None,
    *,
    is_base_known: bool = False,
) -> ImageRef:
    """Build what is fixed, whether the engine has it or not.

    Args:
        frozen: What to build, with its base.
        context: What is sent.
        engine: Where.
        on_output: Is given the builder's own output.
        on_progress: Is told what is being done.
        build_secrets: The values of `frozen.secret_names`.
        settings: What `index_settings` gave; without effect where nothing is installed.
        cancel: Set by another thread, it ends the build.
        is_base_known: Whether the recipe has what the base's own configuration says.

    Raises:
        FrayError: As `ImageBuilder.build`.
    """
    recipe = frozen.recipe
    if recipe is None or not recipe.has_packages:
        settings = {}
    command = choose_builder(frozen.builder, engine, has_secrets=bool(frozen.secret_names), settings=settings)
    if cancel is not None and cancel.is_set():
        raise ImageBuildError(f"building the image {frozen.tag} was cancelled")
    args = dict(frozen.build_args)
    ours = proxies()
    inherited = tuple(sorted(ours.keys() - args.keys()))
    args |= {name: ours[name] for name in inherited}
    secrets = {name: build_secrets[name].encode() for name in frozen.secret_names}
    labels = {"fray.image": "1", "fray.project": frozen.project}
    if recipe is not None:
        labels = {}
        if not is_base_known:  # looked at just now
            recipe = _complete(frozen, recipe, engine, on_progress)
        if recipe.has_packages:
            ensure_uv_image(engine, recipe.uv_image, frozen.platform, frozen.base, on_progress)
            if command is None:
                args |= settings
            else:
                lines = (f"{name}={shlex.quote(value)}\n" for name, value in sorted(settings.items()))
                secrets[ENVIRONMENT_SECRET] = "".join(lines).encode()
        text = render(recipe, "classic" if command is None else "buildkit")
        context = replace(context, files={**context.files, "Dockerfile": text.encode()})
    request = BuildRequest(
        tag=frozen.tag,
        context=context,
        dockerfile_name=frozen.dockerfile_name,
        target=frozen.target,
        build_args=args,
        inherited_args=inherited,
        labels=labels,
        platform=frozen.platform if frozen.needs_platform else None,
        secrets=secrets,
    )
    on_progress("building image")
    if command is None:
        for is_last in (False, False, True):
            try:
                build_classic(request, engine, on_output, on_progress, cancel)
                break
            except CacheVanishedError:
                if is_last:
                    raise
    else:
        build_by_buildkit(request, command, engine, on_output, on_progress, cancel)
    built = find_built(engine, frozen.tag)
    if built is None:
        raise ImageBuildError(f"the image {frozen.tag} was built, and the engine does not have it")
    return built


def find_built(engine: Engine, tag: str) -> ImageRef | None:
    """Return the image of that name; None where the engine has none."""
    found = engine.inspect_image(tag)
    if found is None:
        return None
    repository = parse_repository_tag(tag)[0]
    mine = [each for each in found.get("RepoDigests") or [] if each.partition("@")[0] == repository]
    # Some engines give digests to images that were never pushed: one counts where the name has a registry.
    has_registry = bool(re.match(r"localhost/|[^/]*[.:][^/]*/", repository))
    return ImageRef(tag, str(found["Id"]), mine[0] if mine and has_registry else None)


def ignore(what: object) -> None:
    """Do nothing with what is told."""


def _complete(frozen: FrozenBuild, recipe: Recipe, engine: Engine, on_progress: Callable[[str], None]) -> Recipe:
    """Pull the base where it must be known, and see that it is still the one that was planned with."""
    found = engine.inspect_image(recipe.base)
    if found is None:
        pull(engine, recipe.base, frozen.platform if frozen.needs_platform else None, on_progress)
        found = engine.inspect_image(recipe.base)
        if found is None:
            raise ImageBuildError(f"the base image {recipe.base} was pulled, and the engine does not have it")
    if "@" not in recipe.base and found["Id"] != frozen.base_pin:
        digests = {each.partition("@")[2] for each in found.get("RepoDigests") or []}
        if frozen.base_pin not in digests:
            raise ImageBuildError(
                f"the base image {frozen.base} is another now ({found['Id']}) than when the build was planned "
                f"({frozen.base_pin}): plan it again"
            )
    config = found.get("Config") or {}
    return replace(recipe, user=str(config.get("User") or ""), venv=free_venv(config.get("Env") or []))
