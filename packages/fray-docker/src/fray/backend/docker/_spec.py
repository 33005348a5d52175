"""What an image is to be made of, as the caller of `ImageBuilder` said, refused where it cannot be.

Nothing is read here but whether files are there; `_inputs` reads them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from docker.utils import parse_repository_tag
from fray.backend.docker._builders import NO_SECRETS, BuilderName
from fray.errors import InvalidValueError, UnsupportedError
from fray.uv import has_dependencies

__all__ = ["ImageSpec"]


@dataclass(frozen=True)
class ImageSpec:
    """What an image is to be made of.

    The attributes are the arguments of `ImageBuilder`.

    Raises:
        InvalidValueError: An argument cannot be.
        UnsupportedError: A combination is not to be had.
    """

    directory: Path | None
    base_image: str | None
    dockerfile: Path | None
    target: str | None
    build_args: Mapping[str, str]
    build_secrets: Mapping[str, str] = field(repr=False)
    package_requirements: tuple[str, ...]
    extras: tuple[str, ...]
    excludes: tuple[str, ...]
    ca_bundle: str | None
    platform: str | None
    repository: str | None
    keep_user: bool
    upload_limit_bytes: int
    builder: BuilderName
    asks_registry: bool
    pull: Literal["missing", "always", "never"]

    def __post_init__(self) -> None:
        if self.directory is not None and not self.directory.is_dir():
            raise InvalidValueError(f"{self.directory} is not a directory")
        if self.builder not in ("auto", "buildkit", "classic"):
            raise InvalidValueError(f"builder is auto, buildkit or classic, not {self.builder!r}")
        if self.platform is not None and not re.fullmatch(r"linux/\w+(/\w+)?", self.platform):
            raise InvalidValueError(f"platform is such as linux/amd64 or linux/arm64, not {self.platform!r}")
        if not re.fullmatch(r"[a-z0-9]+([._:/-]+[a-z0-9]+)*", self.name) or parse_repository_tag(self.name)[1]:
            raise InvalidValueError(
                f"{self.name!r} is no repository: lower-case letters, digits and . _ - /, and no tag"
            )
        if self.dockerfile is None:
            self._check_without_dockerfile()
        else:
            self._check_with_dockerfile()
        if self.build_secrets and self.builder == "classic":
            raise UnsupportedError(NO_SECRETS)
        if self.extras and not self.has_lock and not self.needs_lock:
            raise InvalidValueError(
                f"extras need a uv.lock in the directory, and {self.directory} has none: run `uv lock` there"
            )

    def _check_without_dockerfile(self) -> None:
        for name, value in (("target", self.target), ("build_args", self.build_args)):
            if value:
                raise InvalidValueError(f"{name} is for a Dockerfile of your own: give dockerfile too")
        if self.build_secrets:
            raise InvalidValueError("build_secrets are for a Dockerfile of your own: give dockerfile too")

    def _check_with_dockerfile(self) -> None:
        for name, given in (
            ("package_requirements", self.package_requirements),
            ("extras", self.extras),
            ("ca_bundle", self.ca_bundle),
            ("base_image", self.base_image),
            ("keep_user", self.keep_user),
        ):
            if given:
                raise UnsupportedError(
                    f"{name} and a Dockerfile of your own do not go together: say it in the Dockerfile, or build "
                    "that first and give its tag as base_image of a second build"
                )
        if self.directory is None:
            raise InvalidValueError("a Dockerfile of your own needs a directory")
        if not self.dockerfile_path.is_file():
            raise InvalidValueError(f"there is no Dockerfile {self.dockerfile_path}")

    @property
    def project(self) -> str:
        """The project's name, in the characters that an image's may have."""
        name = self.directory.name if self.directory is not None else "image"
        return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "project"

    @property
    def name(self) -> str:
        """The image's name without its tag."""
        return self.repository or f"fray/{self.project}"

    @property
    def base(self) -> str:
        """The name of the image that one without a Dockerfile of its own begins from."""
        return self.base_image or f"python:{sys.version_info.major}.{sys.version_info.minor}-slim"

    @property
    def dockerfile_path(self) -> Path:
        """Where the project's own Dockerfile is."""
        assert self.directory is not None
        assert self.dockerfile is not None
        return self.directory / self.dockerfile

    @property
    def has_lock(self) -> bool:
        """Whether there is a lock that counts."""
        return self._may_have_lock and self.directory is not None and (self.directory / "uv.lock").is_file()

    @property
    def needs_lock(self) -> bool:
        """Whether the project names dependencies, and nobody has locked them yet."""
        if not self._may_have_lock or self.directory is None or self.has_lock:
            return False
        return has_dependencies(self.directory, self.extras)

    @property
    def _may_have_lock(self) -> bool:
        # On an image that somebody gave its own packages count, unless the lock's are asked for.
        return self.dockerfile is None and (not self.keep_user or bool(self.extras))

    @property
    def installs(self) -> bool:
        """Whether there are packages to install."""
        return self.dockerfile is None and (self.has_lock or bool(self.package_requirements))
