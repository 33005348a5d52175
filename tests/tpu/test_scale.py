"""A thousand slices cost a thousand times what one does, in calls: nothing is looked for by looking at everything."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from fray.backend.tpu.testing import FakeCloud
from tests.tpu.cloud_harness import provisioner_of, request_of

PAGE = 50


def calls_for(cloud: FakeCloud, state: Path, count: int) -> dict[str, Counter[str]]:
    """Create, await, list and delete some slices; return the calls that each took."""
    cloud.reset()
    provisioner = provisioner_of(cloud, state, calls_per_second=1e6, parallel_calls=8)
    made: dict[str, Counter[str]] = {}

    def note(step: str) -> None:
        made[step] = Counter(cloud.calls)
        cloud.world.calls.clear()

    for number in range(count):
        provisioner.create(request_of(f"train-{number}"))
    note("create")
    for number in range(count):
        provisioner.wait_ready(f"train-{number}")
    note("wait")
    groups = provisioner.list()
    assert len(groups) == count
    note("list")
    provisioner.delete(*groups)
    note("delete")
    assert cloud.existing() == []
    assert len(cloud.journal) == 2 * count
    return made


@pytest.fixture(scope="module")
def paged() -> Iterator[FakeCloud]:
    with FakeCloud(page_size=PAGE) as cloud:
        yield cloud


@pytest.mark.usefixtures("disks_that_need_no_flush")
def test_calls_grow_with_the_number_of_slices_and_no_faster(paged: FakeCloud, tmp_path: Path) -> None:
    few, many = (calls_for(paged, tmp_path / str(count), count) for count in (100, 1000))
    assert few["create"] == {"CreateQueuedResource": 100}
    assert many["create"] == {"CreateQueuedResource": 1000}
    assert few["list"] == {"ListQueuedResources": 100 / PAGE, "ListNodes": 100 / PAGE}
    assert many["list"] == {"ListQueuedResources": 1000 / PAGE, "ListNodes": 1000 / PAGE}
    # Until the first is ready it is looked at some times, which is the same for few and many; then each once.
    assert many["wait"].total() <= 2 * 1000 + few["wait"].total()
    # Looked at, deleted, looked at until it is gone, its node looked for.
    assert many["delete"]["DeleteQueuedResource"] == 1000
    assert many["delete"].total() <= 10 * 1000
    assert many["delete"].total() <= 12 * few["delete"].total()
