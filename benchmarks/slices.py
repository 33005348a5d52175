"""What a thousand TPU slices cost in calls and in time, against the stand-in for Google's API, as a table and a plot.

python -m benchmarks.slices [--output FILE.svg] [--sizes N …]

The clock is a virtual one, so the time is what client and stand-in compute, not what Google would take.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fray.backend.tpu import SliceChoice, SliceRequest, TpuProvisioner
from fray.backend.tpu.testing import FakeCloud

_STEPS = ("create", "wait", "list", "delete")
_COLORS = {"create": "#1b6ca8", "wait": "#c9720c", "list": "#3a7d44", "delete": "#a23b72"}
_PAGE = 100
_Rows = dict[int, dict[str, tuple[int, float]]]


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/slices.svg"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 250, 500, 750, 1000])
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    options = parser.parse_args()
    rows: _Rows = {}
    with FakeCloud(page_size=_PAGE) as cloud:
        for size in options.sizes * options.rounds:  # not one size after the other: the machine has its moods
            row = measure(cloud, size)
            best = rows.setdefault(size, row)
            rows[size] = {step: min(best[step], row[step], key=lambda found: found[1]) for step in row}
    print(f"{'slices':>8}" + "".join(f"{f'{step}: calls':>16}{'s':>8}" for step in _STEPS))
    for size, row in rows.items():
        print(f"{size:>8}" + "".join(f"{row[step][0]:>16}{row[step][1]:>8.2f}" for step in _STEPS))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(plot(rows))
    print(f"the plot: {options.output}")


def measure(cloud: FakeCloud, size: int) -> dict[str, tuple[int, float]]:
    """Return, for each step with so many slices, the calls that it made and the seconds that it took."""
    cloud.reset()
    row: dict[str, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as state:
        provisioner = TpuProvisioner(
            cloud.project,
            client=cloud.client(),
            clock=cloud.clock,
            owner="benchmark",
            state_directory=state,
            calls_per_second=1e6,
        )
        choice = SliceChoice("v5litepod-16", "us-central1-a")
        names = [f"train-{number}" for number in range(size)]

        def step(name: str, action: Callable[[], object]) -> None:
            before, begin = len(cloud.calls), time.perf_counter()
            action()
            row[name] = len(cloud.calls) - before, time.perf_counter() - begin

        step("create", lambda: [provisioner.create(SliceRequest(name, (choice,))) for name in names])
        step("wait", lambda: [provisioner.wait_ready(name) for name in names])
        step("list", provisioner.list)
        step("delete", lambda: provisioner.delete(*provisioner.list()))
        provisioner.close()
    if left := cloud.existing():
        raise SystemExit(f"{len(left)} things are left")
    return row


def plot(rows: _Rows) -> str:
    """Return an SVG with calls on the left and seconds on the right, over the number of slices."""
    panels = _panel(rows, 0, 60, "calls") + _panel(rows, 1, 500, "seconds")
    legend = "".join(
        f'<text x="{80 + 90 * number}" y="20" fill="{_COLORS[step]}">{step}</text>'
        for number, step in enumerate(_STEPS)
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="360" font-family="sans-serif" font-size="12">'
        f'<rect width="900" height="360" fill="white"/>{legend}{panels}</svg>\n'
    )


def _panel(rows: _Rows, which: int, left: int, title: str) -> str:
    width, height, top = 360, 250, 50
    sizes = list(rows)
    highest = max(row[step][which] for row in rows.values() for step in _STEPS) or 1

    def place(size: float, value: float) -> tuple[float, float]:
        return left + width * size / max(sizes), top + height * (1 - value / highest)

    def line(points: Sequence[tuple[float, float]], color: str) -> str:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in points)
        return f'<polyline points="{path}" fill="none" stroke="{color}"/>{dots}'

    lines = "".join(line([place(size, rows[size][step][which]) for size in sizes], _COLORS[step]) for step in _STEPS)
    ticks = "".join(
        f'<text x="{place(size, 0)[0]:.1f}" y="{top + height + 18}" text-anchor="middle">{size}</text>'
        for size in sizes
    )
    shown = f"{highest:,.0f}" if which == 0 else f"{highest:.1f}"
    return (
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>'
        f'<text x="{left - 6}" y="{top + 4}" text-anchor="end">{shown}</text>'
        f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>'
        f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">slices ({title})</text>'
        f"{ticks}{lines}"
    )


if __name__ == "__main__":
    main()
