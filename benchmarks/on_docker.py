"""What Fray adds to a container's life, and what the second build of an image costs, on the engine that is there."""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measuring import Comparison, Settings, Side, clock, compare, interleave, state
from benchmarks.peers import Peer, peer_python

if TYPE_CHECKING:
    import fray
    from fray.backend.docker._buildkit import BuildKitCommand
    from fray.backend.docker._engine import Engine

__all__ = ["ROWS"]

_FILES = 2000
_FILE_BYTES = 2048
_FILES_IN_FOLDER = 100
# What Fray's own Dockerfile of such a project comes to.
_DOCKERFILE = """\
FROM {base}
RUN echo 'fray:x:1000:1000:fray:/home/fray:/bin/sh' >> /etc/passwd; \\
    echo 'fray:x:1000:' >> /etc/group; \\
    mkdir -p /home/fray /workspace; chown 1000:1000 /home/fray /workspace
ENV PYTHONUNBUFFERED=1
LABEL fray-bench=1
WORKDIR /workspace
USER fray
COPY --chown=1000:1000 . /workspace
"""


def measure_submit(settings: Settings) -> list[Comparison]:
    """Submit `true` in an image that is there, through Fray and by docker-py, and wait until it is known to be over."""
    row, what, floor = "docker-submit", "submit → known terminal of `true`", "docker-py run + wait"
    with ExitStack() as stack:
        try:
            place = stack.enter_context(_place())
        except _CannotBeMeasuredError as reason:
            return [Comparison(row, what, floor, note=str(reason))]
        import docker

        import fray

        cluster = stack.enter_context(fray.connect("docker"))
        client = docker.from_env(environment={**os.environ, **place.engine.endpoint.environment()})
        stack.callback(client.close)

        def through_fray(env: fray.RuntimeEnv) -> float:
            begun: list[str] = []

            def run() -> None:
                begun.append(cluster.create_job("true", env))
                cluster.wait(begun[0], check=True)

            seconds = clock(run)
            cluster.purge_job(begun[0])
            return seconds

        def by_docker() -> float:
            begun = []

            def run() -> None:
                begun.append(client.containers.run(place.base, ["/bin/sh", "-c", "true"], detach=True))
                assert begun[0].wait()["StatusCode"] == 0

            seconds = clock(run)
            begun[0].remove(v=True)
            return seconds

        plain = fray.RuntimeEnv(container_image=place.base)
        secret = fray.RuntimeEnv(container_image=place.base, secrets={"TOKEN": "of no use"})
        sides = [
            Side("fray", lambda: through_fray(plain)),
            Side("fray, a secret", lambda: through_fray(secret)),
            Side(floor, by_docker),
        ]
        peer, problem = _peer(stack, settings, place, "torchx-docker", place.base_id)
        if peer is not None:
            sides.append(Side("torchx", lambda: peer.measure(1), 2))
        found = interleave(row, sides, settings.rounds(30), settings.seed, warmups=2)
    first = compare(row, what, found["fray"], floor, found[floor], kind="ratio", bar=1.10)
    first.details["engine"] = place.version
    return [
        first,
        compare(row, f"{what} with a secret", found["fray, a secret"], floor, found[floor], kind="ratio"),
        # The bar is docker-py, which TorchX is made of.
        Comparison(row, what, "torchx", note=problem)
        if problem
        else compare(row, what, found["fray"], "torchx", found["torchx"], kind="ratio"),
    ]


def measure_rebuild(settings: Settings) -> list[Comparison]:
    """Build the image of a directory again, with nothing changed and with one file edited."""
    # The bars are for the full size.
    row, count, has_bar = "docker-rebuild", 200 if settings.quick else _FILES, not settings.quick
    same, edited = f"image of {count:,} files again, nothing changed", "the same, one file edited"
    with ExitStack() as stack:
        try:
            place = stack.enter_context(_place())
        except _CannotBeMeasuredError as reason:
            return [Comparison(row, what, note=str(reason)) for what in (same, edited)]
        from fray.backend.docker._buildkit import find_cli

        command = find_cli(place.engine)
        project = _Project(settings.scratch / "project", count)
        fray_build = stack.enter_context(_fray_build(place, project))
        sides = [Side("fray", lambda: clock(fray_build)), Side("fray, edited", project.edited(fray_build))]
        by = "docker build -q"
        if command is not None:
            # Each contender has a directory of its own, so that an edit is a change to one of them only.
            copy = _Project(settings.scratch / "project-docker", count)
            build = stack.enter_context(_docker_build(place, command, copy, settings.scratch))
            sides += [Side(by, lambda: clock(build)), Side(f"{by}, edited", copy.edited(build))]
        copy = _Project(settings.scratch / "project-torchx", count)
        peer, problem = _peer(stack, settings, place, "torchx-docker-build", place.base, str(copy.directory))
        if peer is not None:
            sides += [
                Side("torchx", lambda: peer.measure(1), 5),
                Side("torchx, edited", copy.edited(lambda: peer.measure(1), takes_time_itself=True), 5),
            ]
        found = interleave(row, sides, settings.rounds(25), settings.seed)
    first = state(row, same, found["fray"], bar=0.15 if has_bar else None)
    first.details |= {"engine": place.version, "command": str(command)}
    rows = [first]
    for what, suffix, bar in ((same, "", None), (edited, ", edited", 1.2 if has_bar else None)):
        mine = found[f"fray{suffix}"]
        if command is None:
            rows.append(Comparison(row, what, by, note="no docker command here has BuildKit"))
        else:
            rows.append(compare(row, what, mine, by, found[by + suffix], kind="ratio", bar=bar))
        if peer is None:
            rows.append(Comparison(row, what, "torchx", note=problem))
        else:
            rows.append(compare(row, what, mine, "torchx", found[f"torchx{suffix}"], kind="ratio", bar=1.0))
    return rows


ROWS = {"docker-submit": measure_submit, "docker-rebuild": measure_rebuild}


class _CannotBeMeasuredError(Exception):
    """There is no engine, or not the image that is started from; the message says which."""


@dataclass(frozen=True)
class _Place:
    """The engine, and the image that everything here begins from, by its name and its id."""

    engine: Engine
    base: str
    base_id: str

    @property
    def version(self) -> str:
        return str(self.engine.version.get("Version", ""))


@contextmanager
def _place() -> Iterator[_Place]:
    from fray.backend.docker._engine import Engine, find_endpoint
    from fray.errors import FrayError
    from tools import docker_base_image

    image = docker_base_image.BASE
    try:
        engine = Engine(find_endpoint())
        found = engine.inspect_image(image.name)
        if found is None:
            image.make()
            found = engine.inspect_image(image.name)
    except (FrayError, OSError, docker_base_image.CannotBeMade) as error:
        raise _CannotBeMeasuredError(str(error)) from error
    if found is None:
        raise _CannotBeMeasuredError(f"the image {image.name} was made, and the engine does not have it")
    try:
        yield _Place(engine, image.name, found["Id"])
    finally:
        engine.close()


def _peer(stack: ExitStack, settings: Settings, place: _Place, name: str, *arguments: str) -> tuple[Peer | None, str]:
    """Start a peer that is there; else say why it is not."""
    python, problem = peer_python(settings)
    if not python:
        return None, problem
    environment = place.engine.endpoint.environment()
    return stack.enter_context(Peer(name, python, settings.scratch, *arguments, environment=environment)), ""


class _Project:
    """A directory of small files in folders, whose content nobody has built before."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self._files = [directory / f"part{n // _FILES_IN_FOLDER:02}" / f"file{n:04}.txt" for n in range(count)]
        self._next = itertools.cycle(self._files)
        for file in self._files:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._write(file)
        (directory / "main.py").write_text('print("hello")\n')
        # A repository of its own: what the one around it ignores is not this project's.
        (directory / ".git").mkdir(exist_ok=True)

    def edited(self, build: Callable[[], object], *, takes_time_itself: bool = False) -> Callable[[], float]:
        """Return what edits a file, and then builds and says what the build took."""

        def measure() -> float:
            self._write(next(self._next))
            if takes_time_itself:
                seconds = build()
                assert isinstance(seconds, float)
                return seconds
            return clock(build)

        return measure

    def _write(self, file: Path) -> None:
        file.write_text(secrets.token_hex(_FILE_BYTES // 2))


@contextmanager
def _fray_build(place: _Place, project: _Project) -> Iterator[Callable[[], None]]:
    from fray.backend.docker.images import ImageBuilder

    repository = f"fray-bench-{os.getpid()}/project"
    host = place.engine.endpoint.host

    def build() -> None:
        # All anew, the client too, as in a program that is started again.
        builder = ImageBuilder(project.directory, engine=host, base_image=place.base, repository=repository)
        builder.build()
        builder.engine.close()

    build()
    try:
        yield build
    finally:
        _remove_images(place, [tag for each in place.engine.api.images(name=repository) for tag in each["RepoTags"]])


@contextmanager
def _docker_build(
    place: _Place, command: BuildKitCommand, project: _Project, scratch: Path
) -> Iterator[Callable[[], None]]:
    """The same image by hand, through the command that Fray builds by."""
    dockerfile = scratch / "Dockerfile"
    dockerfile.write_text(_DOCKERFILE.format(base=place.base))
    verb = ["buildx", "build", "--builder", "default", "--load", "--provenance=false"]
    arguments = [command.path, *(verb if command.has_buildx else ["build"]), "-q", "-f", str(dockerfile)]
    arguments += ["-t", f"fray-bench-{os.getpid()}/by-hand", str(project.directory)]
    environment = {**os.environ, **place.engine.endpoint.environment(), "DOCKER_BUILDKIT": "1"}
    made: set[str] = set()

    def build() -> None:
        done = subprocess.run(arguments, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        made.add(done.stdout.strip())

    build()
    try:
        yield build
    finally:
        _remove_images(place, made)


def _remove_images(place: _Place, names: Iterable[str]) -> None:
    from docker.errors import APIError

    for name in names:
        with suppress(APIError):  # a copy of it may be in use; what is left is small
            place.engine.api.remove_image(name, force=True)
