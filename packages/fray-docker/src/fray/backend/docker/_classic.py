"""Builds by the Engine API's own builder, which every engine has: no mounts, no secrets, one step at a time."""

from __future__ import annotations

import re
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from fray.backend.docker._engine import Engine
from fray.backend.docker._request import BuildRequest
from fray.errors import ImageBuildError

__all__ = ["build_classic"]

_SHOWN_LINES = 20
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # by which the engine tells what went to stderr


def build_classic(
    request: BuildRequest,
    engine: Engine,
    on_output: Callable[[bytes], None],
    on_progress: Callable[[str], None],
    cancel: threading.Event | None,
) -> None:
    """Build an image; it has its tag only when the last step was done.

    Raises:
        ImageBuildError: A step failed, or the build was cancelled.
    """
    tail: deque[str] = deque(maxlen=_SHOWN_LINES)
    step = ""
    with tempfile.TemporaryFile() as archive:
        request.context.write_tar(archive)
        archive.seek(0)
        with engine.errors():
            events = engine.api.build(
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
            )
            try:
                for event in events:
                    if cancel is not None and cancel.is_set():
                        raise ImageBuildError(f"building the image {request.tag} was cancelled")
                    text = _text(event)
                    if text:
                        on_output(text.encode())
                        tail.extend(line for line in _COLOURS.sub("", text).splitlines() if line.strip())
                    if match := re.match(r"Step (\d+/\d+) : (.*)", text):
                        step = match[2]
                        on_progress(f"building image, step {match[1]}")
                    if "error" in event:
                        raise ImageBuildError(_failure(request, step, tail))
            finally:
                events.close()  # the engine stops a build whose client has gone


def _text(event: dict[str, Any]) -> str:
    if "stream" in event:
        return str(event["stream"])
    if "error" in event:
        return f"{event['error']}\n"
    if "status" in event and "progress" not in event:
        return f"{event['status']}\n"
    return ""


def _failure(request: BuildRequest, step: str, tail: deque[str]) -> str:
    where = f"the step `{step}` failed" if step else "it did not begin"
    return f"the image {request.tag} could not be built: {where}; its last lines:\n" + "\n".join(tail)
