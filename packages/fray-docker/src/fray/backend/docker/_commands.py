"""The commands that this distribution joins to `fray`: `build`, and `docker prune`."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated, Any

import typer

from fray.errors import InvalidValueError

__all__ = ["build_app", "docker_app"]

build_app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
docker_app = typer.Typer(
    rich_markup_mode=None, pretty_exceptions_enable=False, help="Look after what Fray keeps in a docker engine."
)

Cluster = Annotated[
    str, typer.Option("--cluster", "-c", metavar="SPEC", help="docker, docker:ADDRESS, or a configured cluster.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@build_app.command("build")
def build(
    directory: Annotated[str, typer.Argument(metavar="[DIR]", help="The project's directory.")] = ".",
    tag: Annotated[
        str | None,
        typer.Option("--tag", "-t", metavar="REPOSITORY", help="The image's name, as in registry/team/project."),
    ] = None,
    push: Annotated[bool, typer.Option("--push", help="Push it to the registry that its name says.")] = False,
    base_image: Annotated[str | None, typer.Option("--base-image", metavar="IMAGE", help="What to build on.")] = None,
    dockerfile: Annotated[
        str | None, typer.Option("--dockerfile", "-f", metavar="FILE", help="The project's own Dockerfile.")
    ] = None,
    target: Annotated[str | None, typer.Option("--target", metavar="STAGE", help="The stage of it to build.")] = None,
    build_arg: Annotated[
        list[str] | None, typer.Option("--build-arg", metavar="NAME=VALUE", help="An argument for it.")
    ] = None,
    build_secret: Annotated[
        list[str] | None,
        typer.Option(
            "--build-secret",
            metavar="ID",
            help="A secret for its RUN --mount=type=secret,id=ID, the value of the variable ID here.",
        ),
    ] = None,
    package: Annotated[
        list[str] | None, typer.Option("--package", "-p", metavar="REQUIREMENT", help="A package to install.")
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option("--extra", metavar="NAME", help="An extra of the uv project, by its lock.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", metavar="PATTERN", help="What not to ship, as in .gitignore.")
    ] = None,
    ca_bundle: Annotated[
        str | None,
        typer.Option("--ca-bundle", metavar="FILE", help="Certificates to trust; `system` for this machine's."),
    ] = None,
    platform: Annotated[str | None, typer.Option("--platform", metavar="OS/ARCH", help="The image's platform.")] = None,
    builder: Annotated[str, typer.Option("--builder", help="auto, buildkit or classic.")] = "auto",
    print_dockerfile: Annotated[
        bool, typer.Option("--print-dockerfile", help="Print the Dockerfile, and build nothing.")
    ] = False,
    cluster: Cluster = "docker",
    as_json: AsJson = False,
) -> None:
    """Build the image that a project's jobs run in; nothing is built where nothing changed.

    Prints the image's name, or with --push the digest to run it by.
    """
    from fray.backend.docker.images import ImageBuilder

    if build_secret and (lacking := [name for name in build_secret if name not in os.environ]):
        raise InvalidValueError(f"--build-secret: the variable {lacking[0]} is not set here")
    if push and tag is None:
        raise InvalidValueError("--push needs --tag: the registry and the repository to push to")
    engine, configured = _engine(cluster)
    if dockerfile:  # what is configured for Fray's own does not count
        configured = {name: value for name, value in configured.items() if name not in ("base_image", "ca_bundle")}
    maker = ImageBuilder(
        directory,
        engine=engine,
        base_image=base_image or configured.get("base_image"),
        dockerfile=dockerfile or configured.get("dockerfile"),
        target=target or configured.get("target"),
        build_args={**configured.get("build_args", {}), **_pairs("--build-arg", build_arg)},
        build_secrets={name: os.environ[name] for name in build_secret or ()},
        package_requirements=package or (),
        extras=extra or (),
        excludes=exclude or (),
        ca_bundle=ca_bundle or configured.get("ca_bundle"),
        platform=platform or configured.get("platform"),
        repository=tag or configured.get("repository"),
        builder=builder,  # type: ignore[arg-type]  # checked there
    )
    plan = maker.plan()
    if print_dockerfile:
        _say_json({"tag": plan.tag, "dockerfile": plan.dockerfile}) if as_json else typer.echo(
            plan.dockerfile, nl=False
        )
        return
    with _Progress() as progress:
        image = maker.build(on_output=progress.output, on_progress=progress.step)
        if push:
            image = maker.push(image, on_progress=progress.step)
    if as_json:
        _say_json({"tag": image.tag, "id": image.id, "digest": image.digest, "was_built": not plan.is_built})
    else:
        typer.echo(str(image))
    engine.close()


@docker_app.callback()
def _docker() -> None:
    """Look after what Fray keeps in a docker engine."""


@docker_app.command("prune")
def prune(
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="DURATION", help="Only images made before that: 12h, 7d, 2w.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed.")] = False,
    cluster: Cluster = "docker",
    as_json: AsJson = False,
) -> None:
    """Remove Fray's images that no job uses, and what killed clients left behind.

    Jobs stay (`fray purge` removes those), and whatever Fray did not make.
    """
    from dataclasses import asdict

    from fray.backend.docker._prune import prune as remove

    engine, _ = _engine(cluster)
    removed = []
    for each in remove(engine, _seconds(older_than), dry_run=dry_run):
        removed.append(each)
        if not as_json:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {each.kind} {each.name}")
    if as_json:
        _say_json([asdict(each) for each in removed])
    elif not removed:
        typer.echo("nothing to remove", err=True)
    engine.close()


class _Progress:
    """The build's steps and its output: on a terminal a spinner with the output above it, else plain lines."""

    def __init__(self) -> None:
        self._spinner: Any = None
        self._said = ""

    def __enter__(self) -> _Progress:
        if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console

            self._spinner = Console(stderr=True).status("building")
            self._spinner.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._spinner is not None:
            self._spinner.stop()

    def output(self, content: bytes) -> None:
        sys.stderr.write(content.decode(errors="replace"))
        sys.stderr.flush()

    def step(self, message: str) -> None:
        if message == self._said:
            return
        self._said = message
        if self._spinner is not None:
            from rich.text import Text

            self._spinner.update(Text(message))
        else:
            typer.echo(f"fray: {message}", err=True)


def _engine(spec: str) -> tuple[Any, dict[str, Any]]:
    """Return the engine of a cluster's spec, and what the project's configuration says of that cluster."""
    from fray.backend.docker._engine import Engine, find_endpoint
    from fray.plugins import resolve

    name, address, configured = resolve(spec)
    if name != "docker":
        raise InvalidValueError(f"{spec!r} is a cluster of the backend {name!r}, no docker engine: use -c docker")
    return Engine(find_endpoint(address)), configured


def _pairs(option: str, texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InvalidValueError(f"{option}: write NAME=VALUE, not {text!r}")
        pairs[name] = value
    return pairs


def _seconds(text: str) -> float:
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        return float(number) * units[unit]
    except ValueError:
        raise InvalidValueError(f"--older-than: {text!r} is no duration; write 12h, 7d or 2w") from None


def _say_json(content: object) -> None:
    typer.echo(json.dumps(content, indent=2))
