"""Clients that die or are interrupted at a chosen call, and what a test needs to look after them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from fray.backend.tpu import SliceChoice, SliceRequest, TpuProvisioner
from fray.backend.tpu.testing import FakeCloud

ZONE = "us-central1-a"


class Killed(BaseException):
    """The client's process ends here: nothing that comes after may have an effect."""


class Trap(grpc.UnaryUnaryClientInterceptor):  # type: ignore[misc]
    """Springs at one call: before it is made, or when it has taken effect.

    A kill also holds from then on, and keeps the disk as it was.
    """

    def __init__(
        self,
        call: int,
        *,
        after: bool = False,
        raises: Callable[[], BaseException] = Killed,
        state: Path | None = None,
        kept: Path | None = None,
    ) -> None:
        self._left = call
        self._after = after
        self._raises = raises
        self._state, self._kept = state, kept
        self._lock = threading.Lock()
        self.has_sprung = False

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        with self._lock:
            if self.has_sprung and self._raises is Killed:
                raise Killed
            self._left -= 1
            springs = self._left == 0
        if not springs:
            return continuation(details, request)
        if self._after:
            continuation(details, request).result()
        with self._lock:
            self.has_sprung = True
            if self._state is not None and self._kept is not None and self._state.exists():
                shutil.copytree(self._state, self._kept, ignore=shutil.ignore_patterns("*.tmp"))
        raise self._raises()


def provisioner_of(cloud: FakeCloud, state: Path, *interceptors: Any, **options: Any) -> TpuProvisioner:
    client = cloud.client(*interceptors)
    settings: dict[str, Any] = {"owner": "jane", "parallel_calls": 1, **options}
    return TpuProvisioner(cloud.project, client=client, clock=cloud.clock, state_directory=state, **settings)


def request_of(name: str = "train", *choices: SliceChoice, **options: Any) -> SliceRequest:
    return SliceRequest(name, choices or (SliceChoice("v5litepod-16", ZONE),), **options)
