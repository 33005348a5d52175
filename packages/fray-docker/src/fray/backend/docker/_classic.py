"""Builds by the Engine API's own builder, which every engine has: no mounts, no secrets, one step at a time."""

from __future__ import annotations

import contextlib
import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from docker.errors import APIError
from fray.backend.docker._engine import Engine
from fray.backend.docker._request import SHOWN_LINES, BuildRequest
from fray.errors import ImageBuildError

__all__ = ["CacheVanishedError", "build_classic"]

_VANISHED = "unknown parent image ID"
_WATCH_SECONDS = 0.05
_REMOVAL_SECONDS = 20
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # by which the engine tells what went to stderr


class CacheVanishedError(ImageBuildError):
    """What the build was to go on from was removed meanwhile: somebody pruned, or removed an image that shared it."""


def build_classic(
    request: BuildRequest,
    engine: Engine,
    on_output: Callable[[bytes], None],
    on_progress: Callable[[str], None],
    cancel: threading.Event | None,
) -> None:
    """Build an image; it has its tag only when the last step was done.

    Raises:
        CacheVanishedError: It may be begun again.
        ImageBuildError: A step failed, or the build was cancelled.
    """
    tail: deque[str] = deque(maxlen=SHOWN_LINES)
    step = layer = ""
    # A client of its own: to end the build, its connection is cut.
    with tempfile.TemporaryFile() as archive, engine.own_client() as own, _Connection(own, cancel) as connection:
        request.context.write_tar(archive)
        archive.seek(0)
        try:
            with own.errors():
                for event in own.api.build(
                    fileobj=archive,
                    custom_context=True,
                    dockerfile=request.dockerfile_name,
                    tag=request.tag,
                    buildargs=dict(request.build_args),
                    target=request.target,
                    platform=request.platform,
                    labels=dict(request.labels) or None,
                    rm=True,
                    forcerm=True,
                    decode=True,
                    timeout=None,
                ):
                    text = _text(event)
                    if text:
                        on_output(text.encode())
                        tail.extend(line for line in _COLOURS.sub("", text).splitlines() if line.strip())
                    if match := re.match(r"Step (\d+/\d+) : (.*)", text):
                        step = match[2]
                        on_progress(f"building image, step {match[1]}")
                    if match := re.match(r" ---> ([0-9a-f]{12,})\s", text):
                        layer = match[1]
                    if "error" in event:
                        kind = CacheVanishedError if _VANISHED in text else ImageBuildError
                        where = f"the step `{step}` failed" if step else "it did not begin"
                        raise kind(request.failure(where, tail))
        except Exception as error:
            if not connection.is_cut:
                raise
            _remove_half(engine, layer)
            raise ImageBuildError(f"building the image {request.tag} was cancelled") from error
        if connection.is_cut:
            _remove_half(engine, layer)
            raise ImageBuildError(f"building the image {request.tag} was cancelled")


def _remove_half(engine: Engine, layer: str) -> None:
    """Remove the nameless image that a cancelled build has come to, and those that were made only for it."""
    found = engine.inspect_image(layer) if layer else None
    if found is None or found.get("RepoTags") or found.get("RepoDigests"):
        return  # the base, or the finished image
    for container in engine.api.containers(all=True, filters={"ancestor": found["Id"]}):
        # The engine ends the step when it sees that the client has gone, and then removes its container.
        with contextlib.suppress(APIError, OSError):
            engine.api.wait(container["Id"], timeout=_REMOVAL_SECONDS, condition="removed")
    with contextlib.suppress(APIError):  # another build goes on from it
        engine.api.remove_image(found["Id"])


class _Connection:
    """The connection that a build goes over; when it is cut, the engine stops the build and removes its container."""

    def __init__(self, own: Engine, cancel: threading.Event | None) -> None:
        self.is_cut = False
        self._cancel = cancel
        self._is_over = threading.Event()
        self._responses: list[Any] = []
        with own.errors():
            own.api.hooks["response"].append(lambda response, **_: self._responses.append(response))
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Connection:
        if self._cancel is not None:
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._cancel is not None:
            self._watcher.join()
        for response in self._responses:
            response.close()

    def _watch(self) -> None:
        assert self._cancel is not None
        while not self._is_over.is_set():
            if self._responses and self._cancel.wait(_WATCH_SECONDS):
                self.is_cut = True
                with contextlib.suppress(OSError, ValueError):  # it has ended by itself
                    self._responses[-1].raw.shutdown()
                return
            if not self._responses:
                self._is_over.wait(_WATCH_SECONDS)


def _text(event: dict[str, Any]) -> str:
    if "stream" in event:
        return str(event["stream"])
    if "error" in event:
        return f"{event['error']}\n"
    if "status" in event and "progress" not in event:
        return f"{event['status']}\n"
    return ""
