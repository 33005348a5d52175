"""From a project directory to a container image, without a Dockerfile; the second build takes no time.

```python
builder = ImageBuilder("my-project", extras=["gpu"])
image = builder.push(builder.build(), "registry.example.com/team/my-project")
```

An image is named by all that goes into it: what is in the engine under that name is what a build would make, so an
unchanged project costs one look-up. `freeze` fixes everything now, `build_frozen` builds it later, in another process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit, urlunsplit

from docker.errors import APIError
from docker.utils import parse_repository_tag
from fray.backend.docker import _registry
from fray.backend.docker._buildkit import BuildKitCommand, build_by_buildkit, find_cli
from fray.backend.docker._classic import build_classic
from fray.backend.docker._context import Context, Source, file_digest, read_context, read_source
from fray.backend.docker._dockerfile import ENVIRONMENT_SECRET, USER_ID, Recipe, find_base_images, free_venv, render
from fray.backend.docker._engine import Engine, find_endpoint
from fray.backend.docker._request import BuildRequest
from fray.backend.docker._uv_image import ensure_uv_image, uv_image, uv_version
from fray.errors import AuthenticationError, ImageBuildError, InvalidTypeError, InvalidValueError, UnsupportedError
from fray.types import RuntimeEnv
from fray.uv import export_lock, has_dependencies, make_lock

__all__ = ["FrozenBuild", "ImageBuilder", "ImagePlan", "ImageRef", "build_frozen", "index_settings"]

BuilderName = Literal["auto", "buildkit", "classic"]

# What a tag stands for; a change of what is built from the same input is a new number.
_RECIPE_VERSION = 1
_TAG_DIGITS = 24
_CONTEXT_FILE = "context.tar"
_OWN_DOCKERFILE = ".fray.dockerfile"
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
_SETTINGS = frozenset(
    {
        *("UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_STRATEGY", "UV_INDEX_URL"),
        *("UV_EXCLUDE_NEWER", "UV_FORK_STRATEGY", "UV_INSECURE_HOST", "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE"),
        *("UV_NO_BUILD", "UV_NO_BUILD_PACKAGE", "UV_NO_INDEX", "UV_PRERELEASE", "UV_RESOLUTION", "UV_TORCH_BACKEND"),
        *("UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_CONCURRENT_DOWNLOADS"),
    }
)
_WITHOUT_EFFECT = frozenset({"UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_CONCURRENT_DOWNLOADS", "UV_INSECURE_HOST"})
_LISTS_OF_PLACES = frozenset({"UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_URL"})
_CREDENTIAL_NAME = re.compile(r"UV_INDEX_.*_(USERNAME|PASSWORD)$|_TOKEN$")
# What surely holds no token, in its path or elsewhere.
_PLAIN_INDEX = re.compile(r"https?://[^/@?#\s]+(/(pypi/)?simple)?/?")
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


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
        self._directory = None if directory is None else Path(directory).absolute()
        self._given_engine = engine
        self._base_image = base_image or f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"
        self._dockerfile = None if dockerfile is None else Path(dockerfile)
        self._target = target
        self._build_args = _strings("build_args", build_args or {})
        self._build_secrets = _strings("build_secrets", build_secrets or {})
        self._requirements = tuple(checked.package_requirements)
        self._extras = tuple(checked.extras)
        self._excludes = tuple(checked.excludes)
        self._ca_bundle = None if ca_bundle is None else os.fspath(ca_bundle)
        self._platform = platform
        self._keep_user = keep_user
        self._limit_bytes = upload_limit_bytes
        self._builder: BuilderName = builder
        self._asks_registry = asks_registry
        self._pull = pull
        self._planned: _Inputs | None = None
        self._project = _sanitised(self._directory.name if self._directory is not None else "image")
        self._repository = repository or f"fray/{self._project}"
        self._check(base_image)

    def _check(self, base_image: str | None) -> None:
        if self._directory is not None and not self._directory.is_dir():
            raise InvalidValueError(f"{self._directory} is not a directory")
        if self._builder not in ("auto", "buildkit", "classic"):
            raise InvalidValueError(f"builder is auto, buildkit or classic, not {self._builder!r}")
        if self._platform is not None and not re.fullmatch(r"linux/\w+(/\w+)?", self._platform):
            raise InvalidValueError(f"platform is such as linux/amd64 or linux/arm64, not {self._platform!r}")
        if (
            not re.fullmatch(r"[a-z0-9]+([._:/-]+[a-z0-9]+)*", self._repository)
            or parse_repository_tag(self._repository)[1]
        ):
            raise InvalidValueError(
                f"{self._repository!r} is no repository: lower-case letters, digits and . _ - /, and no tag"
            )
        if self._dockerfile is None:
            for name, value in (("target", self._target), ("build_args", self._build_args)):
                if value:
                    raise InvalidValueError(f"{name} is for a Dockerfile of your own: give dockerfile too")
            if self._build_secrets:
                raise InvalidValueError("build_secrets are for a Dockerfile of your own: give dockerfile too")
        else:
            for name, given in (
                ("package_requirements", self._requirements),
                ("extras", self._extras),
                ("ca_bundle", self._ca_bundle),
                ("base_image", base_image),
                ("keep_user", self._keep_user),
            ):
                if given:
                    raise UnsupportedError(
                        f"{name} and a Dockerfile of your own do not go together: say it in the Dockerfile, or build "
                        "that first and give its tag as base_image of a second build"
                    )
            if self._directory is None:
                raise InvalidValueError("a Dockerfile of your own needs a directory")
            if not self._dockerfile_path.is_file():
                raise InvalidValueError(f"there is no Dockerfile {self._dockerfile_path}")
        if self._build_secrets and self._builder == "classic":
            raise UnsupportedError(_NO_SECRETS)
        if self._extras and not self._has_lock and not self._needs_lock:
            raise InvalidValueError(
                f"extras need a uv.lock in the directory, and {self._directory} has none: run `uv lock` there"
            )

    @cached_property
    def engine(self) -> Engine:
        """The client in use."""
        given = self._given_engine
        return given if isinstance(given, Engine) else Engine(find_endpoint(given))

    def plan(self) -> ImagePlan:
        """Say what `build` would do, and change nothing. The next `build` or `freeze` takes the files as they are now.

        Raises:
            InvalidValueError: A file cannot be read, the files are too large, the lock cannot be used.
            UnsupportedError: The builder cannot do what is asked.
            ImageBuildError: The base image is nowhere.
            ConnectionFailedError: The engine cannot be reached.
        """
        inputs = self._planned = self._read()
        builder = "classic" if self._choose() is None else "buildkit"
        frozen = self._freeze(inputs)
        recipe = frozen.recipe
        if recipe is not None and self._needs_lock:
            recipe = replace(recipe, has_lock=True, uv_image=uv_image(inputs.base.platform, inputs.base.name))
        text = frozen.dockerfile if recipe is None else render(recipe, _dialect(builder))
        files = () if inputs.source is None else inputs.source.snapshot.files
        sent = self._context(inputs, frozen)
        return ImagePlan(
            tag=f"{self._repository}:unlocked" if self._needs_lock else inputs.tag,
            dockerfile=text,
            base=inputs.base.pinned,
            context_bytes=sum(file.size for file in files) + sum(map(len, sent.files.values())),
            files=sum(not file.path.endswith("/") for file in files),
            builder=_dialect(builder),
            is_built=not self._needs_lock and self.engine.inspect_image(inputs.tag) is not None,
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
        say = on_progress or _ignore
        self._lock(say)
        inputs, self._planned = self._planned or self._read(), None
        if found := self.engine.inspect_image(inputs.tag):
            return _reference(inputs.tag, found)
        frozen = _with_its_base(self._freeze(inputs), self.engine, say)
        if found := self.engine.inspect_image(frozen.tag):
            return _reference(frozen.tag, found)
        return _carry_out(
            frozen,
            self._context(inputs, frozen),
            self.engine,
            on_output or _ignore,
            say,
            self._build_secrets,
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
        self._lock(_ignore)
        inputs, self._planned = self._planned or self._read(), None
        self._choose()
        frozen = self._freeze(inputs)
        path = Path(place)
        path = path / _CONTEXT_FILE if path.is_dir() else path
        with path.open("wb") as file:
            self._context(inputs, frozen).write_tar(file)
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
        digest = _registry.push(self.engine, place, tag or "latest", on_progress or _ignore)
        return ImageRef(f"{place}:{tag or 'latest'}", image.id, f"{place}@{digest}")

    @property
    def _has_lock(self) -> bool:
        return self._may_have_lock and self._directory is not None and (self._directory / "uv.lock").is_file()

    @property
    def _needs_lock(self) -> bool:
        """Whether the project names dependencies, and nobody has locked them yet."""
        if not self._may_have_lock or self._directory is None or self._has_lock:
            return False
        return has_dependencies(self._directory, self._extras)

    @property
    def _may_have_lock(self) -> bool:
        # On an image that somebody gave its own packages count, unless the lock's are asked for.
        return self._dockerfile is None and (not self._keep_user or bool(self._extras))

    def _lock(self, on_progress: Callable[[str], None]) -> None:
        if self._needs_lock:
            assert self._directory is not None
            on_progress("locking the dependencies of pyproject.toml (uv lock)")
            make_lock(self._directory)
            self._planned = None

    @property
    def _dockerfile_path(self) -> Path:
        assert self._directory is not None
        assert self._dockerfile is not None
        return self._directory / self._dockerfile

    def _choose(self) -> BuildKitCommand | None:
        command = choose_builder(self._builder, self.engine)
        _check_builder(command, bool(self._build_secrets), index_settings() if self._installs else {})
        return command

    @property
    def _installs(self) -> bool:
        return self._dockerfile is None and (self._has_lock or bool(self._requirements))

    def _read(self) -> _Inputs:
        """Read all that goes into the image, once."""
        settings = index_settings()
        source = None
        if self._directory is not None:
            ignore = self._directory / ".dockerignore"
            if self._dockerfile is not None:
                # As BuildKit does: the file beside the Dockerfile, with its name, comes first.
                beside = self._dockerfile_path.with_name(f"{self._dockerfile_path.name}.dockerignore")
                ignore = beside if beside.is_file() else ignore
            is_own = self._dockerfile is not None
            owner = (0, 0) if is_own or self._keep_user else (USER_ID, USER_ID)
            source = read_source(
                self._directory,
                excludes=self._excludes,
                dockerignore=ignore,
                prefix="" if is_own else "workspace/",
                owner=owner,
                limit_bytes=self._limit_bytes,
            )
        ingredients: dict[str, Any] = {
            "version": _RECIPE_VERSION,
            "source": source and source.digest,
            "keep_user": self._keep_user,
            "project": self._project,
        }
        dockerfile, files = "", {}
        if self._dockerfile is not None:
            dockerfile = self._dockerfile_path.read_text()
            names, base_name = find_base_images(dockerfile, self._build_args, self._target)
            bases = {
                name: _find_base(self.engine, name, self._platform, must_exist=False, asks_registry=self._asks_registry)
                for name in names
            }
            base = bases.get(base_name) or _Base(base_name, "", base_name, _platform_of_engine(self.engine), None)
            ingredients |= {
                "dockerfile": dockerfile,
                "bases": {name: each.digest for name, each in bases.items()},
                "target": self._target,
                "build_args": self._build_args,
                "secrets": sorted(self._build_secrets),
            }
        else:
            base = self._find_base()
            ingredients["base"] = base.digest
            if self._ca_bundle is not None:
                files["ca.pem"] = _read_bundle(self._ca_bundle)
                ingredients["ca"] = file_digest(files["ca.pem"])
            if self._has_lock:
                assert self._directory is not None
                ingredients["lock"] = [
                    file_digest((self._directory / name).read_bytes())
                    for name in ("uv.lock", "pyproject.toml")
                    if (self._directory / name).is_file()
                ]
                ingredients["extras"] = sorted(self._extras)
            if self._requirements:
                files["requirements.txt"] = "".join(f"{each}\n" for each in self._requirements).encode()
                ingredients["requirements"] = self._requirements
                ingredients["settings"] = _settings_digest(settings)
            if self._installs:
                ingredients["uv"] = uv_version()
        ingredients["platform"] = base.platform
        tag = _tag(self._repository, ingredients)
        return _Inputs(tag, ingredients, base, source, files, dockerfile, settings)

    def _find_base(self) -> _Base:
        name, platform = self._base_image, self._platform
        if self._pull == "always":
            return _Base(name, "", name, platform or _platform_of_engine(self.engine), None)
        if self._pull == "never" and self.engine.inspect_image(name) is None:
            raise InvalidValueError(f"the engine has no base image {name!r}, and pull is 'never': pull it")
        return _find_base(self.engine, name, platform, must_exist=True, asks_registry=self._asks_registry)

    def _freeze(self, inputs: _Inputs) -> FrozenBuild:
        recipe, name = None, "Dockerfile"
        if self._dockerfile is None:
            recipe = self._recipe(inputs)
        else:
            name = self._own_dockerfile_name(inputs)
        return FrozenBuild(
            tag=inputs.tag,
            base=inputs.base.name,
            base_pin=inputs.base.digest,
            platform=inputs.base.platform,
            needs_platform=self._platform is not None,
            builder=self._builder,
            recipe=recipe,
            dockerfile_name=name,
            dockerfile=inputs.dockerfile,
            target=self._target,
            build_args=self._build_args,
            secret_names=tuple(sorted(self._build_secrets)),
            project=self._project,
            repository=self._repository,
            ingredients={} if inputs.base.digest else inputs.ingredients,
            pulls=self._pull == "always",
        )

    def _own_dockerfile_name(self, inputs: _Inputs) -> str:
        """The Dockerfile's name in the context: its own where it is shipped."""
        assert inputs.source is not None
        try:
            name = self._dockerfile_path.resolve().relative_to(inputs.source.snapshot.directory.resolve()).as_posix()
        except ValueError:
            return _OWN_DOCKERFILE
        return name if any(file.path == name for file in inputs.source.snapshot.files) else _OWN_DOCKERFILE

    def _recipe(self, inputs: _Inputs) -> Recipe:
        locked = self._export(inputs)
        settings = tuple(sorted(inputs.settings)) if self._installs else ()
        config = inputs.base.config
        return Recipe(
            base=inputs.base.from_name,
            keep_user=self._keep_user,
            user=None if config is None else str(config.get("User") or ""),
            venv=free_venv([] if config is None else config.get("Env") or []),
            has_ca_bundle="ca.pem" in inputs.files,
            has_lock="pylock.toml" in inputs.files,
            has_requirements="requirements.txt" in inputs.files,
            has_source=inputs.source is not None,
            lock_indexes=_project_indexes(self._directory) if locked else (),
            local_projects=locked,
            settings=settings,
            settings_digest=_settings_digest(inputs.settings) if self._requirements else "",
            uv_image=uv_image(inputs.base.platform, inputs.base.name) if self._installs else "",
            project=self._project,
        )

    def _export(self, inputs: _Inputs) -> tuple[str, ...]:
        """Add what the lock says to the files, and return what of it is in the source, as uv's arguments."""
        if not self._has_lock:
            return ()
        assert self._directory is not None
        options = ["--no-dev", "--no-default-groups"]
        names = export_lock(self._directory, self._extras, [*options, "--no-hashes"]).splitlines()
        local = [line for line in names if line.startswith(("-e ", ".", "/", "file:"))]
        if len(local) < sum(bool(line.strip()) for line in names):
            exported = export_lock(self._directory, self._extras, [*options, "--no-emit-local", "--format=pylock.toml"])
            inputs.files["pylock.toml"] = exported.encode()
        arguments: list[str] = []
        for line in local:
            path = line.removeprefix("-e ").partition(" ;")[0].strip()
            inside = os.path.normpath(path)
            if inside.startswith(("..", "/", "file:")):
                raise InvalidValueError(
                    f"the lock of {self._directory} names {path}, which is outside of the directory and cannot be in "
                    "the image: build from a directory that has both"
                )
            inside = "/workspace" if inside == "." else f"/workspace/{inside}"
            arguments += ["--editable"] if line.startswith("-e ") else []
            arguments.append(shlex.quote(inside))
        return tuple(arguments)

    def _context(self, inputs: _Inputs, frozen: FrozenBuild) -> Context:
        archive = None if inputs.source is None else inputs.source.archive
        if frozen.recipe is not None:
            return Context(inputs.files, archive)
        files = {}
        if frozen.dockerfile_name == _OWN_DOCKERFILE:
            files[_OWN_DOCKERFILE] = inputs.dockerfile.encode()
        return Context(files, archive, is_flat=True)


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
    frozen = _with_its_base(frozen, found, on_progress or _ignore)
    if built := found.inspect_image(frozen.tag):
        return _reference(frozen.tag, built)
    secrets = dict(build_secrets or {})
    if missing := sorted(set(frozen.secret_names) - secrets.keys()):
        raise InvalidValueError(f"build_secrets has no value for {', '.join(missing)}")
    if context is None and frozen.context_path is None:
        raise InvalidValueError("the frozen build names no file for its context: give context")
    with contextlib.nullcontext(context) if context is not None else open(frozen.context_path or "", "rb") as archive:
        archive.seek(0)
        sent = Context(source=archive, is_flat=True) if frozen.recipe is None else read_context(archive)
        return _carry_out(
            frozen,
            sent,
            found,
            on_output or _ignore,
            on_progress or _ignore,
            secrets,
            index_settings() if settings is None else settings,
            cancel,
        )


def index_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what of an environment changes what uv resolves to in a build: indexes, their credentials, strategies.

    Places that only this machine has are left out. The values may hold credentials.
    """
    found: dict[str, str] = {}
    for name, value in (os.environ if environment is None else environment).items():
        if name not in _SETTINGS and not re.fullmatch(r"UV_INDEX_\w+_(USERNAME|PASSWORD)", name):
            continue
        if name in _LISTS_OF_PLACES:
            separator = "," if name == "UV_FIND_LINKS" else " "
            places = value.split(separator if separator == "," else None)
            value = separator.join(place for place in places if "://" in place and "file://" not in place)
        if value:
            found[name] = value
    return found


def choose_builder(builder: BuilderName, engine: Engine) -> BuildKitCommand | None:
    """Return the docker command whose BuildKit is to be used; None is the engine's classic builder.

    Raises:
        UnsupportedError: BuildKit was asked for and no docker command has it.
    """
    command = None if builder == "classic" else find_cli(engine)
    if command is None and builder == "buildkit":
        raise UnsupportedError(
            "no docker command on PATH has BuildKit: install docker's buildx plugin, or use the classic builder"
        )
    return command


_NO_SECRETS = (
    "the engine's classic builder has no build secrets, and build arguments would show them in the image's history: "
    "install a docker command with BuildKit (the buildx plugin)"
)


@dataclass(frozen=True)
class _Base:
    """A base image.

    Attributes:
        name: As the caller gave it.
        digest: `sha256:…`, of the registry where it has one, else its id.
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
        return self.from_name if "@" in self.from_name else (self.digest or self.name)


@dataclass(frozen=True)
class _Inputs:
    tag: str
    ingredients: dict[str, Any]
    base: _Base
    source: Source | None
    files: dict[str, bytes]
    dockerfile: str
    settings: Mapping[str, str] = field(repr=False)


def _tag(repository: str, ingredients: Mapping[str, Any]) -> str:
    if ingredients.get("base") == "":
        return f"{repository}:unpulled"
    text = json.dumps(ingredients, sort_keys=True)
    return f"{repository}:{hashlib.sha256(text.encode()).hexdigest()[:_TAG_DIGITS]}"


def _with_its_base(frozen: FrozenBuild, engine: Engine, on_progress: Callable[[str], None]) -> FrozenBuild:
    """Pull the base of a build that was frozen without it, and give the build its name."""
    if frozen.recipe is None or frozen.base_pin:
        return frozen
    platform = frozen.platform if frozen.needs_platform else None
    if frozen.pulls or engine.inspect_image(frozen.base) is None:
        _registry.pull(engine, frozen.base, platform, on_progress)
    base = _find_base(engine, frozen.base, platform, must_exist=True)
    tag = _tag(frozen.repository, {**frozen.ingredients, "base": base.digest, "platform": base.platform})
    recipe = replace(frozen.recipe, base=base.from_name)
    return replace(frozen, tag=tag, base_pin=base.digest, platform=base.platform, recipe=recipe, ingredients={})


def _find_base(
    engine: Engine, name: str, platform: str | None, *, must_exist: bool, asks_registry: bool = True
) -> _Base:
    found = engine.inspect_image(name)
    if found is not None:
        own = f"{found.get('Os', 'linux')}/{found.get('Architecture', 'amd64')}"
        if platform is None or platform == own or platform.startswith(f"{own}/"):
            repository = parse_repository_tag(name)[0].partition("@")[0]
            digests: list[str] = sorted(found.get("RepoDigests") or [])
            mine = [each for each in digests if each.partition("@")[0] == repository] or digests
            if mine:
                # By its name all the same: some engines give digests to images that no registry has.
                return _Base(name, mine[0].partition("@")[2], name, platform or own, found.get("Config") or {})
            tags: list[str] = found.get("RepoTags") or []
            is_id = name.removeprefix("sha256:") in found["Id"]
            from_name = tags[0] if is_id and tags else name
            return _Base(name, found["Id"], from_name, platform or own, found.get("Config") or {})
    wanted = platform or _platform_of_engine(engine)
    if not asks_registry:
        return _Base(name, "", name, wanted, None)
    with engine.errors():
        try:
            answer = engine.api.inspect_distribution(name)
        except APIError as error:
            said = str(error.explanation or error)
            if not must_exist:
                return _Base(name, "", name, wanted, None)
            mapped = _registry.registry_error(f"the base image {name}", said)
            where = "is not in the engine" if found is None else f"is in the engine, and not for {platform}"
            message = f"the base image {name} {where}, and its registry does not have it for us: {said}"
            remedy = f"`docker pull {name}` where that works, or give another base_image"
            if isinstance(mapped, AuthenticationError):
                raise AuthenticationError(f"{message}; `docker login`, {remedy}") from error
            raise ImageBuildError(f"{message}; {remedy}") from error
    digest = str(answer["Descriptor"]["digest"])
    repository = parse_repository_tag(name)[0].partition("@")[0]
    return _Base(name, digest, f"{repository}@{digest}", wanted, None)


def _platform_of_engine(engine: Engine) -> str:
    machine = str(engine.info.get("Architecture", "x86_64"))
    names = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm/v7", "i686": "386"}
    return f"linux/{names.get(machine, machine)}"


def _carry_out(
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
    command = choose_builder(frozen.builder, engine)
    recipe = frozen.recipe
    if recipe is None or not recipe.has_packages:
        settings = {}
    _check_builder(command, bool(frozen.secret_names), settings)
    if cancel is not None and cancel.is_set():
        raise ImageBuildError(f"building the image {frozen.tag} was cancelled")
    args = dict(frozen.build_args)
    proxies = _proxies()
    inherited = tuple(sorted(proxies.keys() - args.keys()))
    args |= {name: proxies[name] for name in inherited}
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
        build_classic(request, engine, on_output, on_progress, cancel)
    else:
        build_by_buildkit(request, command, engine, on_output, on_progress, cancel)
    found = engine.inspect_image(frozen.tag)
    if found is None:
        raise ImageBuildError(f"the image {frozen.tag} was built, and the engine does not have it")
    return _reference(frozen.tag, found)


def _complete(frozen: FrozenBuild, recipe: Recipe, engine: Engine, on_progress: Callable[[str], None]) -> Recipe:
    """Pull the base where it must be known, and see that it is still the one that was planned with."""
    found = engine.inspect_image(recipe.base)
    if found is None:
        _registry.pull(engine, recipe.base, frozen.platform if frozen.needs_platform else None, on_progress)
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


def _check_builder(command: BuildKitCommand | None, has_secrets: bool, settings: Mapping[str, str]) -> None:
    if command is not None:
        return
    if has_secrets:
        raise UnsupportedError(_NO_SECRETS)
    for name, value in sorted(settings.items()):
        places = re.findall(r"\w+://\S+", value) if name in _LISTS_OF_PLACES else []
        if _CREDENTIAL_NAME.search(name) or not all(map(_PLAIN_INDEX.fullmatch, places)):
            raise UnsupportedError(f"{name} holds, or may hold, credentials for an index: {_NO_SECRETS}")


def _settings_digest(settings: Mapping[str, str]) -> str:
    """What tells settings from others that may give other packages, whoever's credentials they hold."""
    counted = {
        name: " ".join(_without_credentials(part) for part in value.split())
        for name, value in settings.items()
        if name not in _WITHOUT_EFFECT and not _CREDENTIAL_NAME.search(name)
    }
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12] if counted else ""


def _without_credentials(place: str) -> str:
    name, separator, url = place.rpartition("=") if re.match(r"[\w.-]+=\w+://", place) else ("", "", place)
    if "://" not in url:
        return place
    parts = urlsplit(url)
    return f"{name}{separator}{urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2]))}"


def _project_indexes(directory: Path | None) -> tuple[str, ...]:
    """The named indexes of a project: by their names uv finds the credentials for the URLs of the lock."""
    import tomllib

    if directory is None:
        return ()
    try:
        project = tomllib.loads((directory / "pyproject.toml").read_text())
        indexes = project.get("tool", {}).get("uv", {}).get("index", [])
    except (OSError, ValueError):
        return ()  # uv itself has read it, or has said what is wrong with it
    return tuple(
        f"{index['name']}={index['url']}"
        for index in indexes
        if index.get("name") and str(index.get("url", "")).startswith(("http://", "https://"))
    )


def _proxies() -> dict[str, str]:
    names = [*_PROXIES, *(name.lower() for name in _PROXIES)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def _read_bundle(bundle: str) -> bytes:
    if bundle != "system":
        try:
            return Path(bundle).read_bytes()
        except OSError as error:
            raise InvalidValueError(f"the CA bundle {bundle} cannot be read: {error.strerror}") from error
    import ssl

    named = (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_BUNDLES)
    for path in named:
        if path and os.path.isfile(path):
            return Path(path).read_bytes()
    raise InvalidValueError("this machine has no CA bundle where they usually are: give ca_bundle as a file")


def _reference(tag: str, found: Mapping[str, Any]) -> ImageRef:
    repository = parse_repository_tag(tag)[0]
    mine = [each for each in found.get("RepoDigests") or [] if each.partition("@")[0] == repository]
    # Some engines give digests to images that were never pushed: one counts where the name has a registry.
    has_registry = bool(re.match(r"localhost/|[^/]*[.:][^/]*/", repository))
    return ImageRef(tag, str(found["Id"]), mine[0] if mine and has_registry else None)


def _dialect(builder: str) -> Literal["buildkit", "classic"]:
    return "classic" if builder == "classic" else "buildkit"


def _sanitised(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "project"


def _strings(what: str, values: Mapping[str, str]) -> dict[str, str]:
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidTypeError(f"{what} must be strings, got {name!r}: {type(value).__name__}")
    return dict(values)


def _ignore(what: object) -> None:
    """Do nothing with what is told."""
