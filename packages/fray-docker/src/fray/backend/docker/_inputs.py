"""All that goes into an image, read once, and the frozen build and the context that are made of it.

What a build would make of the same input is the same: its name is the digest of the ingredients that are noted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fray.backend.docker._bases import Base, find_base, unknown_base
from fray.backend.docker._context import Context, Source, file_digest, read_source
from fray.backend.docker._dockerfile import USER_ID, Recipe, find_base_images, free_venv
from fray.backend.docker._engine import Engine
from fray.backend.docker._frozen import FrozenBuild, image_tag
from fray.backend.docker._lock import project_indexes, read_lock
from fray.backend.docker._settings import index_settings, read_ca_bundle, settings_digest
from fray.backend.docker._spec import ImageSpec
from fray.backend.docker._uv_image import uv_image, uv_version
from fray.errors import InvalidValueError

__all__ = ["Inputs", "freeze", "read_inputs"]

# What a tag stands for; a change of what is built from the same input is a new number.
_RECIPE_VERSION = 2
_OWN_DOCKERFILE = ".fray.dockerfile"


@dataclass(frozen=True)
class Inputs:
    """All that goes into an image.

    Attributes:
        tag: What the image will be called, as far as that is known.
        ingredients: What the tag stands for.
        base: What the image begins from.
        source: The directory's files.
        files: What is sent beside them.
        dockerfile: The content of the project's own; empty for Fray's.
        settings: What `index_settings` gave; may hold credentials.
    """

    tag: str
    ingredients: Mapping[str, Any]
    base: Base
    source: Source | None
    files: Mapping[str, bytes]
    dockerfile: str
    settings: Mapping[str, str] = field(repr=False)


def read_inputs(spec: ImageSpec, engine: Engine) -> Inputs:
    """Read all that goes into an image.

    Raises:
        InvalidValueError: A file cannot be read, the files are too large, the base is not to be pulled.
        ImageBuildError: The base image is nowhere.
        ConnectionFailedError: The engine cannot be reached.
    """
    settings = index_settings()
    source = _read_source(spec)
    ingredients: dict[str, Any] = {
        "version": _RECIPE_VERSION,
        "source": source and source.digest,
        "keep_user": spec.keep_user,
        "project": spec.project,
    }
    dockerfile, files = "", {}
    if spec.dockerfile is not None:
        dockerfile = spec.dockerfile_path.read_text()
        names, base_name = find_base_images(dockerfile, spec.build_args, spec.target)
        bases = {
            name: find_base(engine, name, spec.platform, must_exist=False, asks_registry=spec.asks_registry)
            for name in names
        }
        base = bases.get(base_name) or unknown_base(engine, base_name, spec.platform)
        ingredients |= {
            "dockerfile": dockerfile,
            "bases": {name: each.digest for name, each in bases.items()},
            "target": spec.target,
            "build_args": spec.build_args,
            "secrets": sorted(spec.build_secrets),
        }
    else:
        base = _find_base(spec, engine)
        ingredients["base"] = base.digest
        if spec.ca_bundle is not None:
            files["ca.pem"] = read_ca_bundle(spec.ca_bundle)
            ingredients["ca"] = file_digest(files["ca.pem"])
        if spec.has_lock:
            assert spec.directory is not None
            ingredients["lock"] = [
                file_digest((spec.directory / name).read_bytes())
                for name in ("uv.lock", "pyproject.toml")
                if (spec.directory / name).is_file()
            ]
            ingredients["extras"] = sorted(spec.extras)
        if spec.package_requirements:
            files["requirements.txt"] = "".join(f"{each}\n" for each in spec.package_requirements).encode()
            ingredients["requirements"] = spec.package_requirements
            ingredients["settings"] = settings_digest(settings)
        if spec.installs:
            ingredients["uv"] = uv_version()
    ingredients["platform"] = base.platform
    tag = image_tag(spec.name, ingredients)
    return Inputs(tag, ingredients, base, source, files, dockerfile, settings)


def freeze(spec: ImageSpec, inputs: Inputs) -> tuple[FrozenBuild, Context]:
    """Return the build of what was read, with everything fixed, and what it sends.

    Raises:
        InvalidValueError: The lock cannot be used.
    """
    archive = None if inputs.source is None else inputs.source.archive
    if spec.dockerfile is None:
        recipe, files = _recipe(spec, inputs)
        name, context = "Dockerfile", Context(files, archive)
    else:
        recipe, name = None, _own_dockerfile_name(spec, inputs)
        files = {name: inputs.dockerfile.encode()} if name == _OWN_DOCKERFILE else {}
        context = Context(files, archive, is_flat=True)
    frozen = FrozenBuild(
        tag=inputs.tag,
        base=inputs.base.name,
        base_pin=inputs.base.digest,
        platform=inputs.base.platform,
        needs_platform=spec.platform is not None,
        builder=spec.builder,
        recipe=recipe,
        dockerfile_name=name,
        dockerfile=inputs.dockerfile,
        target=spec.target,
        build_args=spec.build_args,
        secret_names=tuple(sorted(spec.build_secrets)),
        project=spec.project,
        repository=spec.name,
        ingredients={} if inputs.base.digest else inputs.ingredients,
        pulls=spec.pull == "always",
    )
    return frozen, context


def _read_source(spec: ImageSpec) -> Source | None:
    if spec.directory is None:
        return None
    ignore = spec.directory / ".dockerignore"
    is_own = spec.dockerfile is not None
    if is_own:
        # As BuildKit does: the file beside the Dockerfile, with its name, comes first.
        beside = spec.dockerfile_path.with_name(f"{spec.dockerfile_path.name}.dockerignore")
        ignore = beside if beside.is_file() else ignore
    return read_source(
        spec.directory,
        excludes=spec.excludes,
        dockerignore=ignore,
        prefix="" if is_own else "workspace/",
        owner=(0, 0) if is_own or spec.keep_user else (USER_ID, USER_ID),
        limit_bytes=spec.upload_limit_bytes,
    )


def _find_base(spec: ImageSpec, engine: Engine) -> Base:
    if spec.pull == "always":
        return unknown_base(engine, spec.base, spec.platform)
    if spec.pull == "never" and engine.inspect_image(spec.base) is None:
        raise InvalidValueError(f"the engine has no base image {spec.base!r}, and pull is 'never': pull it")
    return find_base(engine, spec.base, spec.platform, must_exist=True, asks_registry=spec.asks_registry)


def _recipe(spec: ImageSpec, inputs: Inputs) -> tuple[Recipe, dict[str, bytes]]:
    """Return what Fray's Dockerfile says, and the small files that it needs."""
    files = dict(inputs.files)
    projects: tuple[str, ...] = ()
    indexes: tuple[str, ...] = ()
    if spec.has_lock:
        assert spec.directory is not None
        pylock, projects = read_lock(spec.directory, spec.extras)
        if pylock is not None:
            files["pylock.toml"] = pylock
        indexes = project_indexes(spec.directory)
    config = inputs.base.config
    recipe = Recipe(
        base=inputs.base.from_name,
        keep_user=spec.keep_user,
        user=None if config is None else str(config.get("User") or ""),
        venv=free_venv([] if config is None else config.get("Env") or []),
        has_ca_bundle="ca.pem" in files,
        has_lock="pylock.toml" in files,
        has_requirements="requirements.txt" in files,
        has_source=inputs.source is not None,
        lock_indexes=indexes,
        local_projects=projects,
        settings=tuple(sorted(inputs.settings)) if spec.installs else (),
        settings_digest=settings_digest(inputs.settings) if spec.package_requirements else "",
        uv_image=uv_image(inputs.base.platform, inputs.base.name) if spec.installs else "",
        project=spec.project,
    )
    return recipe, files


def _own_dockerfile_name(spec: ImageSpec, inputs: Inputs) -> str:
    """The Dockerfile's name in the context: its own where it is shipped."""
    assert inputs.source is not None
    try:
        name = spec.dockerfile_path.resolve().relative_to(inputs.source.snapshot.directory.resolve()).as_posix()
    except ValueError:
        return _OWN_DOCKERFILE
    return name if any(file.path == name for file in inputs.source.snapshot.files) else _OWN_DOCKERFILE
