"""One server for all tests of a process, and nothing in it at the beginning of each."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Tests start processes beside a server of gRPC's, whose handlers of a fork would speak up in them.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

from fray.backend.tpu.testing import FakeCloud


@pytest.fixture(scope="session")
def _server() -> Iterator[FakeCloud]:
    with FakeCloud() as cloud:
        yield cloud


@pytest.fixture
def disks_that_need_no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """For thousands of records: no power is cut in these tests, only processes end."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def cloud(_server: FakeCloud) -> FakeCloud:
    _server.reset()
    return _server
