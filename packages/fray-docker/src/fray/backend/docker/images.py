"""From a project directory to a container image, without a Dockerfile; the second build takes no time.

```python
builder = ImageBuilder("my-project", extras=["gpu"])
image = builder.push(builder.build(), "registry.example.com/team/my-project")
```

An image is named by all that goes into it: what is in the engine under that name is what a build would make, so an
unchanged project costs one look-up. `freeze` fixes everything now, `build_frozen` builds it later, in another process.

All that others import is here. Behind it, what the caller said (`_spec`) is read with all that it names (`_inputs`, by
`_bases`, `_lock`, `_settings` and `_context`), fixed (`_frozen`), and carried out (`_build`) by the builder that there
is (`_builders`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from docker.utils import parse_repository_tag
from fray.backend.docker._build import ImageRef, build_frozen, carry_out, find_built, ignore, with_base
from fray.backend.docker._builders import BuilderName, choose_builder
from fray.backend.docker._buildkit import BuildKitCommand
from fray.backend.docker._dockerfile import Dialect, render
from fray.backend.docker._engine import Engine, find_endpoint
from fray.backend.docker._frozen import FrozenBuild
from fray.backend.docker._inputs import Inputs, freeze, read_inputs
from fray.backend.docker._registry import push
from fray.backend.docker._settings import index_settings
from fray.backend.docker._spec import ImageSpec
from fray.backend.docker._uv_image import uv_image
from fray.errors import InvalidTypeError, InvalidValueError
from fray.types import RuntimeEnv
from fray.uv import make_lock

__all__ = ["FrozenBuild", "ImageBuilder", "ImagePlan", "ImageRef", "build_frozen", "index_settings"]

_CONTEXT_FILE = "context.tar"


@dataclass(frozen=True)
class ImagePlan:
    """What a build would do.

    Attributes:
        tag: The name that the image would have; it ends in `:unpulled` where it is known once the base has been pulled,
            in `:unlocked` once the dependencies have been locked.
        dockerfile: As it would be given to the builder.
        base: The base image, pinned by its digest, or by its id in the engine where it has none.
        context_bytes: How large the files that would be sent are together.
        files: How many they are.
        builder: Which of the two would be used.
        is_built: Whether the engine has the image, so that nothing would be done.
        platform: The image's, as `linux/amd64`.
    """

    tag: str
    dockerfile: str
    base: str
    context_bytes: int
    files: int
    builder: Literal["buildkit", "classic"]
    is_built: bool
    platform: str


class ImageBuilder:
    """Builds the image of one project.

    Without `dockerfile` the image is: the base, a CA bundle if asked for, what the directory's `uv.lock` says (without
    development groups) and `package_requirements` in an environment at `/opt/venv` that is first on `PATH`, the files
    of the directory in `/workspace`, and the packages of the project that the lock names as its own. Where a
    `pyproject.toml` names dependencies and there is no lock yet, `build` and `freeze` have uv write one, as uv's own
    commands do; a directory with neither is just files.

    Args:
        directory: The project; None for an image without source.
        engine: A client, or the address or docker context of one; None finds it as the docker command does.
        base_image: What the image begins from; None is `python:X.Y-slim` of this interpreter's version.
        dockerfile: The project's own Dockerfile, relative to the directory, instead of Fray's.
        target: The stage of it to build.
        build_args: Values for its `ARG`s. They show in the image's history.
        build_secrets: Id → value, for its `RUN --mount=type=secret`. BuildKit only.
        package_requirements: PEP 508 requirements.
        extras: Extras of the project, from its lock.
        excludes: Patterns of files that stay behind, beside those of the ignore files and `.dockerignore`.
        ca_bundle: A file of certificates for the image to trust, or `system` for this machine's.
        platform: As `linux/arm64`; None is the base's in the engine, or the engine's.
        repository: The image's name without its tag; None is `fray/<name of the directory>`.
        keep_user: Whether the base's own user stays, and its packages importable below the requirements. Otherwise a
            user `fray` with id 1000 is made.
        upload_limit_bytes: How large the directory's files may be together.
        builder: `auto` is BuildKit where a docker command has it, else the engine's classic builder.
        asks_registry: Whether planning asks the registry about a base that the engine does not have. Otherwise such a
            build gets its name once it has pulled the base.
        pull: When a base is pulled: where the engine lacks it, always, or never.

    Raises:
        InvalidTypeError: An argument is of the wrong type.
        InvalidValueError: An argument cannot be.
        UnsupportedError: A combination is not to be had.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None,
        *,
        engine: Engine | str | None = None,
        base_image: str | None = None,
        dockerfile: str | os.PathLike[str] | None = None,
        target: str | None = None,
        build_args: Mapping[str, str] | None = None,
        build_secrets: Mapping[str, str] | None = None,
        package_requirements: Sequence[str] = (),
        extras: Sequence[str] = (),
        excludes: Sequence[str] = (),
        ca_bundle: str | os.PathLike[str] | None = None,
        platform: str | None = None,
        repository: str | None = None,
        keep_user: bool = False,
        upload_limit_bytes: int = 2 * 1024**3,
        builder: BuilderName = "auto",
        asks_registry: bool = True,
        pull: Literal["missing", "always", "never"] = "missing",
    ) -> None:
        checked = RuntimeEnv(
            package_requirements=list(package_requirements), extras=list(extras), excludes=list(excludes)
        )
        self._spec = ImageSpec(
            directory=None if directory is None else Path(directory).absolute(),
            base_image=base_image,
            dockerfile=None if dockerfile is None else Path(dockerfile),
            target=target,
            build_args=_strings("build_args", build_args or {}),
            build_secrets=_strings("build_secrets", build_secrets or {}),
            package_requirements=tuple(checked.package_requirements),
            extras=tuple(checked.extras),
            excludes=tuple(checked.excludes),
            ca_bundle=None if ca_bundle is None else os.fspath(ca_bundle),
            platform=platform,
            repository=repository,
            keep_user=keep_user,
            upload_limit_bytes=upload_limit_bytes,
            builder=builder,
            asks_registry=asks_registry,
            pull=pull,
        )
        self._given_engine = engine
        self._planned: Inputs | None = None

    @cached_property
    def engine(self) -> Engine:
        """The client in use."""
        given = self._given_engine
        return given if isinstance(given, Engine) else Engine(find_endpoint(given))

    def tag(self) -> str:
        """Return the image's name, by the files as they are now: all that a job needs whose image is there.

        It ends in `:unlocked` or `:unpulled` where it cannot be known yet.

        Raises:
            InvalidValueError: A file cannot be read, or the files are too large.
            ImageBuildError: The base image is nowhere.
            ConnectionFailedError: The engine cannot be reached.
        """
        return self._name(read_inputs(self._spec, self.engine))

    def plan(self) -> ImagePlan:
        """Say what `build` would do, and change nothing. The next `build` or `freeze` takes the files as they are now.

        Raises:
            InvalidValueError: A file cannot be read, the files are too large, the lock cannot be used.
            UnsupportedError: The builder cannot do what is asked.
            ImageBuildError: The base image is nowhere.
            ConnectionFailedError: The engine cannot be reached.
        """
        inputs = self._planned = read_inputs(self._spec, self.engine)
        builder: Dialect = "classic" if self._choose() is None else "buildkit"
        frozen, sent = freeze(self._spec, inputs)
        needs_lock = self._spec.needs_lock
        recipe = frozen.recipe
        if recipe is not None and needs_lock:
            recipe = replace(recipe, has_lock=True, uv_image=uv_image(inputs.base.platform, inputs.base.name))
        text = frozen.dockerfile if recipe is None else render(recipe, builder)
        files = () if inputs.source is None else inputs.source.snapshot.files
        return ImagePlan(
            tag=self._name(inputs),
            dockerfile=text,
            base=inputs.base.pinned,
            context_bytes=sum(file.size for file in files) + sum(map(len, sent.files.values())),
            files=sum(not file.path.endswith("/") for file in files),
            builder=builder,
            is_built=not needs_lock and self.engine.inspect_image(inputs.tag) is not None,
            platform=inputs.base.platform,
        )

    def build(
        self,
        on_output: Callable[[bytes], None] | None = None,
        on_progress: Callable[[str], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> ImageRef:
        """Build the image unless the engine has it.

        Args:
            on_output: Is given the builder's own output, piece by piece.
            on_progress: Is told what is being done, in a few words.
            cancel: Set by another thread, it ends the build; nothing is left of it.

        Raises:
            ImageBuildError: It failed or was cancelled; the message has the failing step and its last lines.
            InvalidValueError: A file cannot be read, the files are too large, the lock cannot be used.
            UnsupportedError: The builder cannot do what is asked.
            ConnectionFailedError: The engine cannot be reached.
        """
        say = on_progress or ignore
        self._lock(say)
        inputs = self._read()
        if built := find_built(self.engine, inputs.tag):
            return built
        frozen, context = freeze(self._spec, inputs)
        frozen = with_base(frozen, self.engine, say)
        if built := find_built(self.engine, frozen.tag):
            return built
        return carry_out(
            frozen,
            context,
            self.engine,
            on_output or ignore,
            say,
            self._spec.build_secrets,
            index_settings(),
            cancel,
            is_base_known=inputs.base.config is not None,
        )

    def freeze(self, place: str | os.PathLike[str]) -> FrozenBuild:
        """Fix everything, and write what the build will send to a file.

        The user's settings of uv and the secrets, which may be credentials, are not in it; `build_frozen` takes them.

        Args:
            place: The file, or a folder for it to be `context.tar` in. It is not read here.

        Raises:
            FrayError: As `plan`.
        """
        self._lock(ignore)
        inputs = self._read()
        self._choose()
        frozen, context = freeze(self._spec, inputs)
        path = Path(place)
        path = path / _CONTEXT_FILE if path.is_dir() else path
        with path.open("wb") as file:
            context.write_tar(file)
        return replace(frozen, context_path=str(path))

    def push(
        self, image: ImageRef, repository: str | None = None, on_progress: Callable[[str], None] | None = None
    ) -> ImageRef:
        """Push an image, and return it with its digest. The credentials are those of `docker login`.

        Args:
            image: Which one.
            repository: Where to, with the registry; None is where its tag says.
            on_progress: Is told how far it is.

        Raises:
            AuthenticationError: The registry refuses the credentials.
            ConnectionFailedError: The registry or the engine cannot be reached.
            PlatformError: Anything else that the registry says.
        """
        own, tag = parse_repository_tag(image.tag)
        place = repository or own
        if parse_repository_tag(place)[1]:
            raise InvalidValueError(f"{place!r} is no repository: give it without a tag, which the image has")
        with self.engine.errors():
            if place != own:
                self.engine.api.tag(image.id, place, tag=tag or "latest")
        digest = push(self.engine, place, tag or "latest", on_progress or ignore)
        return ImageRef(f"{place}:{tag or 'latest'}", image.id, f"{place}@{digest}")

    def _lock(self, on_progress: Callable[[str], None]) -> None:
        if self._spec.needs_lock:
            assert self._spec.directory is not None
            on_progress("locking the dependencies of pyproject.toml (uv lock)")
            make_lock(self._spec.directory)
            self._planned = None

    def _name(self, inputs: Inputs) -> str:
        return f"{self._spec.name}:unlocked" if self._spec.needs_lock else inputs.tag

    def _read(self) -> Inputs:
        """Return what `plan` has read, once, or else read it."""
        inputs, self._planned = self._planned or read_inputs(self._spec, self.engine), None
        return inputs

    def _choose(self) -> BuildKitCommand | None:
        settings = index_settings() if self._spec.installs else {}
        has_secrets = bool(self._spec.build_secrets)
        return choose_builder(self._spec.builder, self.engine, has_secrets=has_secrets, settings=settings)


def _strings(what: str, values: Mapping[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidTypeError(f"{what} must be strings, got {name!r}: {type(value).__name__}")
    return dict(values)
