"""Builds by BuildKit, through whichever docker command on PATH has it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from fray.backend.docker._engine import REMEDY, Engine
from fray.backend.docker._request import SHOWN_LINES, BuildRequest
from fray.errors import ConnectionFailedError, ImageBuildError

__all__ = ["BuildKitCommand", "build_by_buildkit", "find_cli"]

# From 23.0 on DOCKER_BUILDKIT=1 needs the buildx plugin; before, the command has a client of its own.
_FIRST_WITHOUT_OWN_CLIENT = 23
_FIRST_API_WITH_BUILDKIT = (1, 39)
_PROBE_SECONDS = 20
_KILL_SECONDS = 5.0

_LEFT_OUT = frozenset(
    {
        *("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CERT_PATH", "DOCKER_TLS", "DOCKER_TLS_VERIFY"),
        *("BUILDX_BUILDER", "BUILDKIT_PROGRESS", "BUILDKIT_HOST", "DOCKER_DEFAULT_PLATFORM"),
    }
)


@dataclass(frozen=True)
class BuildKitCommand:
    """A docker command that has BuildKit.

    Attributes:
        path: Where it is.
        has_buildx: Whether by the buildx plugin, not by a client of its own.
    """

    path: str
    has_buildx: bool

    def __str__(self) -> str:
        return f"{self.path} buildx" if self.has_buildx else self.path


def find_cli(engine: Engine) -> BuildKitCommand | None:
    """Return the first docker command on PATH by which the engine's BuildKit is reached; None where there is none."""
    with engine.errors():
        version = tuple(map(int, engine.api.api_version.split(".")))
    if version < _FIRST_API_WITH_BUILDKIT:
        return None
    return _find_cli(os.environ.get("PATH", os.defpath))


@cache
def _find_cli(path: str) -> BuildKitCommand | None:
    commands: list[str] = []
    for folder in path.split(os.pathsep):
        found = shutil.which("docker", path=folder or os.curdir)
        if found is not None and not any(os.path.samefile(found, other) for other in commands):
            commands.append(found)
    if not commands:
        return None
    with ThreadPoolExecutor(len(commands)) as pool:
        return next((found for found in pool.map(_probe, commands) if found is not None), None)


def _probe(command: str) -> BuildKitCommand | None:
    version = _ask(command, "--version")
    number = re.search(r"version (\d+)\.(\d+)", version or "")
    if number is None:
        return None
    major = int(number[1])
    if _ask(command, "buildx", "version") is not None:
        return BuildKitCommand(command, has_buildx=True)
    if (major, int(number[2])) >= (18, 9) and major < _FIRST_WITHOUT_OWN_CLIENT:
        return BuildKitCommand(command, has_buildx=False)
    return None


def _ask(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None  # not a command that can be used
    return done.stdout if done.returncode == 0 else None


def build_by_buildkit(
    request: BuildRequest,
    command: BuildKitCommand,
    engine: Engine,
    on_output: Callable[[bytes], None],
    on_progress: Callable[[str], None],
    cancel: threading.Event | None,
) -> None:
    """Build an image; it has its tag only when all is done. Interrupted, the command is killed, and the engine stops.

    Raises:
        ImageBuildError: A step failed, or the build was cancelled.
        ConnectionFailedError: The engine cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        # Few files go as a directory, which the engine handles once; the many of a flat context as a stream.
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fray-build-")))
        standard_input: IO[bytes] | None = None
        if request.context.is_flat:
            standard_input = stack.enter_context(tempfile.TemporaryFile())
            request.context.write_tar(standard_input)
            standard_input.seek(0)
        else:
            request.context.write_directory(folder)
        descriptors: list[int] = []
        arguments = _arguments(request, command)
        for name, value in request.secrets.items():
            where, descriptor = stack.enter_context(_secret_file(value))
            descriptors += [] if descriptor is None else [descriptor]
            arguments += ["--secret", f"id={name},src={where}"]
        if request.context.is_flat:
            arguments += ["--file", request.dockerfile_name, "-"]
        else:
            arguments += ["--file", str(folder / request.dockerfile_name), str(folder)]
        try:
            process = subprocess.Popen(
                arguments,
                stdin=standard_input or subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=_environment(request, command, engine),
                pass_fds=descriptors,
                start_new_session=True,  # the terminal's Ctrl-C is ours to handle
            )
        except OSError as error:
            raise ImageBuildError(f"{command.path} cannot be run: {error}") from error
        progress = _Progress(on_output, on_progress)
        with _killed_at_the_end(process, cancel):
            assert process.stdout is not None
            for line in process.stdout:
                progress.add(line)
            code = process.wait()
    if cancel is not None and cancel.is_set() and code != 0:
        raise ImageBuildError(f"building the image {request.tag} was cancelled")
    if code != 0:
        said = "\n".join(progress.last)
        if "Cannot connect to the Docker daemon" in said or "error during connect" in said:
            raise ConnectionFailedError(f"the docker engine at {engine.endpoint.host}: {said}; {REMEDY}")
        raise ImageBuildError(request.failure(*progress.failure(code)))


def _arguments(request: BuildRequest, command: BuildKitCommand) -> list[str]:
    # The engine's own BuildKit, not a builder in a container, which does not see the engine's images.
    arguments = [command.path, "buildx", "build", "--builder", "default", "--load"] if command.has_buildx else []
    arguments = arguments or [command.path, "build"]
    arguments += ["--progress=plain", "--tag", request.tag]
    if command.has_buildx:
        arguments.append("--provenance=false")
    if request.target is not None:
        arguments += ["--target", request.target]
    if request.platform is not None:
        arguments += ["--platform", request.platform]
    for name, value in request.build_args.items():
        arguments += ["--build-arg", name if name in request.inherited_args else f"{name}={value}"]
    for name, value in request.labels.items():
        arguments += ["--label", f"{name}={value}"]
    return arguments


def _environment(request: BuildRequest, command: BuildKitCommand, engine: Engine) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    environment |= {name: request.build_args[name] for name in request.inherited_args}
    environment |= engine.endpoint.environment() | {"DOCKER_CLI_HINTS": "false", "NO_COLOR": "1"}
    if not command.has_buildx:
        environment["DOCKER_BUILDKIT"] = "1"
    return environment


@contextlib.contextmanager
def _secret_file(value: bytes) -> Iterator[tuple[str, int | None]]:
    """A path for the command to read a secret from, that no file system keeps where there are anonymous files."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("fray-secret")
        try:
            os.write(descriptor, value)
            yield f"/dev/fd/{descriptor}", descriptor
        finally:
            os.close(descriptor)
        return
    with tempfile.NamedTemporaryFile(prefix="fray-") as file:  # only its owner can read it
        file.write(value)
        file.flush()
        yield file.name, None


@contextlib.contextmanager
def _killed_at_the_end(process: subprocess.Popen[bytes], cancel: threading.Event | None) -> Iterator[None]:
    """Leave nothing of a process behind, and end it when `cancel` is set."""
    is_over = threading.Event()

    def watch() -> None:
        assert cancel is not None
        while not is_over.is_set():
            if cancel.wait(0.05):
                _end(process)
                return

    watcher = threading.Thread(target=watch, daemon=True) if cancel is not None else None
    if watcher is not None:
        watcher.start()
    try:
        yield
    finally:
        is_over.set()
        if process.poll() is None:
            _end(process)
        process.wait()
        if watcher is not None:
            watcher.join()
        if process.stdout is not None:
            process.stdout.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the command to stop, so that it tells the engine; kill it where it does not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_KILL_SECONDS)
            return


class _Progress:
    """Reads BuildKit's plain progress: `#8 [stage 2/5] RUN …`, `#8 0.123 output`, `#8 ERROR: …`."""

    def __init__(self, on_output: Callable[[bytes], None], on_progress: Callable[[str], None]) -> None:
        self._on_output = on_output
        self._on_progress = on_progress
        self._names: dict[str, str] = {}
        self._outputs: dict[str, deque[str]] = {}
        self._failed: str | None = None
        self._last_said = ""
        self.last: deque[str] = deque(maxlen=SHOWN_LINES)

    def add(self, raw: bytes) -> None:
        self._on_output(raw)
        line = raw.decode(errors="replace").rstrip()
        if not line:
            return
        self.last.append(line)
        match = re.match(r"#(\d+) (.*)", line)
        if match is None:
            return
        number, text = match.groups()
        if number not in self._names:
            self._names[number] = text
            self._outputs[number] = deque(maxlen=SHOWN_LINES)
            if step := re.match(r"\[(?:[^\]]* )?(\d+)/(\d+)\]", text):
                self._say(f"building image, step {step[1]}/{step[2]}")
        elif text.startswith("ERROR"):
            self._failed = number
            self._outputs[number].append(text)
        elif output := re.match(r"\d+\.\d+ (.*)", text):
            self._outputs[number].append(output[1])

    def failure(self, code: int) -> tuple[str, Iterable[str]]:
        """Return what failed, and its last lines."""
        if self._failed is None:
            return f"docker build exited with {code}", self.last
        return f"the step `{self._names[self._failed]}` failed", self._outputs[self._failed]

    def _say(self, what: str) -> None:
        if what != self._last_said:
            self._last_said = what
            self._on_progress(what)
