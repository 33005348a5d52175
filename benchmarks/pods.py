"""How `run_on_tpu` grows with the number of hosts: time, and calls to Ray's head, as a table and a plot.

python -m benchmarks.pods [--sizes N …] [--model N …] [--rounds N] [--output FILE.svg]

Up to some hosts each is a real raylet on this machine. Beyond that there is a model: Fray's own code finds and holds
the slices of a table of hosts that is made up, and Ray's head answers at once. Its calls are exact and so is Fray's own
time; what the head and the network would need is not in it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measuring import Side, clock, interleave
from benchmarks.on_tpu import SimulatedPod
from fray.errors import PlatformError

# A slice of one host, so that there are as many of the one as of the other.
_TYPE = "v4-8"
_HOLDS = 9
_MODEL_ROUNDS = 31
_LINEAR = 1.1
_RUN, _BY_HAND, _ACQUIRE, _GROUP = "run_on_tpu", "by hand", "acquire", "group alone"
_MODEL = "Fray's part of acquire (model)"
_COLORS = {_RUN: "#1b6ca8", _BY_HAND: "#999999", _ACQUIRE: "#c9720c", _GROUP: "#c9b79c", _MODEL: "#a23b72"}


@dataclass
class Growth:
    """What was measured at each size.

    Attributes:
        seconds: What → number of hosts → median.
        calls: The same of the calls to Ray's head that holding and giving back the slices takes: name → how many.
        rows: Number of hosts → the nodes in the answers to those.
        run_calls: Number of hosts → the calls of a whole run.
        steps: Number of hosts → the functions that Python calls in the model, which no noise changes.
    """

    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    calls: dict[int, Counter[str]] = field(default_factory=dict)
    rows: dict[int, int] = field(default_factory=dict)
    run_calls: dict[int, Counter[str]] = field(default_factory=dict)
    steps: dict[int, int] = field(default_factory=dict)

    def note(self, what: str, size: int, seconds: float) -> None:
        """Note a median."""
        self.seconds.setdefault(what, {})[size] = seconds


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pods", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="numbers of real raylets")
    parser.add_argument("--model", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3, help="runs at each size")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/run-on-tpu-scaling.svg"))
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    load = os.getloadavg()[0]
    growth = Growth()
    if options.sizes:
        measure_raylets(growth, sorted(options.sizes), options.rounds)
    measure_model(growth, sorted(options.model))
    print(f"{os.cpu_count()} CPUs, load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at the end\n")
    print_table(growth)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(plot(growth))
    print(f"\nthe plot: {options.output}")


def measure_raylets(growth: Growth, sizes: Sequence[int], rounds: int) -> None:
    """Measure on real raylets, of which there are ever more."""
    with SimulatedPod.of(_TYPE, 0) as pod:
        for size in sizes:
            print(f"{size} of {sizes[-1]} hosts", file=sys.stderr, flush=True)
            try:
                while len(pod.slices.hosts) < size:
                    pod.slices.add_slice()
            except PlatformError as error:
                print(f"{size} hosts are too many for this machine as busy as it is: {error}", file=sys.stderr)
                return
            pod.rest()
            calls = Counted()

            def hold(calls: Counted = calls) -> float:
                pod.settle()
                calls.clear()
                with calls:
                    return clock_first(lambda: _acquire(size), lambda held: held.release())  # noqa: B023

            def group() -> float:
                from ray.util.placement_group import remove_placement_group

                pod.settle()
                return clock_first(_awaited(pod.group_by_hand), remove_placement_group)

            holding = [Side(_ACQUIRE, hold), Side(_GROUP, group)]
            _note(growth, size, interleave(f"holding {size} hosts", holding, _HOLDS, 0, warmups=2))
            growth.calls[size], growth.rows[size] = Counter(calls), calls.rows

            def by_hand() -> float:
                pod.settle()
                return clock(pod.by_hand)

            def run(action: Callable[[], None]) -> float:
                pod.settle()
                calls.clear()  # noqa: B023
                with calls:  # noqa: B023
                    seconds = clock(action)
                growth.run_calls[size] = Counter(calls)  # noqa: B023
                return seconds

            running = [
                Side(_BY_HAND, by_hand),
                Side(_RUN, lambda: run(pod.through_fray)),
            ]
            _note(
                growth,
                size,
                interleave(f"running on {size} hosts", running, rounds, 0, warmups=1 if size == sizes[0] else 0),
            )


def measure_model(growth: Growth, sizes: Sequence[int]) -> None:
    """Have Fray find and hold so many hosts of a cluster that is made up.

    What counts is the least of many times: it is computing alone, so all that is more is the machine's noise.
    """
    calls = Counted()
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(_MODEL_ROUNDS):
        for size in sizes:
            calls.clear()
            with _made_up_cluster(size), calls:
                begin = time.thread_time()
                held = _acquire(size)
                seconds[size].append(time.thread_time() - begin)
                assert len(held.hosts) == size
                held.release()
            growth.calls[size], growth.rows[size] = Counter(calls), calls.rows
    for size in sizes:
        growth.note(_MODEL, size, min(seconds[size]))
        with _made_up_cluster(size):
            growth.steps[size] = _steps(lambda: _acquire(size))  # noqa: B023


def print_table(growth: Growth) -> None:
    """Print what was measured, and whether any of it grows faster than the hosts do."""
    names = sorted({name for calls in growth.calls.values() for name in calls})
    print(f"Holding slices of {_TYPE} (one host each) and giving them back: seconds, and calls to Ray's head\n")
    shown = (_ACQUIRE, _GROUP, _MODEL)
    print(f"{'hosts':>6}" + "".join(f"  {each}" for each in (*shown, *names, "nodes in the answers")))
    for size, calls in growth.calls.items():
        line = "".join(f"  {_seconds(growth, each, size):>{len(each)}}" for each in shown)
        line += "".join(f"  {calls[name]:>{len(name)}}" for name in names)
        print(f"{size:>6}{line}  {growth.rows[size]:>20}")
    if growth.run_calls:
        names = sorted({name for calls in growth.run_calls.values() for name in calls})
        print("\nA whole run of a trivial function on real raylets of this machine: seconds, and calls\n")
        print(f"{'hosts':>6}  {_RUN}  s a host  {_BY_HAND}" + "".join(f"  {name}" for name in names))
        for size, calls in growth.run_calls.items():
            whole = growth.seconds[_RUN][size]
            line = f"  {whole:>10.2f}  {whole / size:>8.2f}  {_seconds(growth, _BY_HAND, size):>7}"
            print(f"{size:>6}{line}" + "".join(f"  {calls[name]:>{len(name)}}" for name in names))
    print(f"\nGrowth, as the exponent of the number of hosts; linear is 1, at most linear is said up to {_LINEAR}\n")
    grown: dict[str, Mapping[int, float]] = dict(growth.seconds)
    grown["calls to hold and release"] = {size: sum(calls.values()) for size, calls in growth.calls.items()}
    grown["nodes in the answers"] = growth.rows
    if growth.run_calls:
        grown["calls of a run"] = {size: sum(calls.values()) for size, calls in growth.run_calls.items()}
    grown["functions called (model)"] = growth.steps
    for what, values in grown.items():
        if len(values) < 2:
            continue
        whole, end = exponent(values), exponent(dict(list(values.items())[-3:]))
        verdict = "at most linear" if whole <= _LINEAR else "FASTER THAN LINEAR"
        print(f"{what:<32} {whole:5.2f} over all: {verdict} ({end:.2f} over the last {min(3, len(values))})")


def exponent(values: Mapping[int, float]) -> float:
    """Return the slope of the line through the values on logarithmic axes."""
    return statistics.linear_regression([math.log(x) for x in values], [math.log(y) for y in values.values()]).slope


def plot(growth: Growth) -> str:
    """Return an SVG with the seconds on the left and the calls on the right, over the number of hosts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fray", "font.size": 9}):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        for what, values in growth.seconds.items():
            is_model = what == _MODEL
            style = {"marker": "s", "linestyle": "--", "markerfacecolor": "white"} if is_model else {"marker": "o"}
            left.plot(list(values), list(values.values()), color=_COLORS[what], markersize=4, label=what, **style)
        left.set_ylabel("seconds (median)")
        real = {size: sum(calls.values()) for size, calls in growth.calls.items() if size in growth.run_calls}
        model = {size: sum(calls.values()) for size, calls in growth.calls.items() if size not in growth.run_calls}
        whole = {size: sum(calls.values()) for size, calls in growth.run_calls.items()}
        right.plot(list(whole), list(whole.values()), "o-", color=_COLORS[_RUN], markersize=4, label=f"{_RUN}: calls")
        right.plot(
            list(real),
            list(real.values()),
            "o-",
            color=_COLORS[_ACQUIRE],
            markersize=4,
            label="acquire, release: calls",
        )
        right.plot(
            list(model), list(model.values()), "s--", color=_COLORS[_MODEL], markersize=4, markerfacecolor="white",
            label="acquire, release: calls (model)",
        )  # fmt: skip
        rows = growth.rows
        right.plot(list(rows), list(rows.values()), ":", color="#3a7d44", label="nodes in the answers")
        right.set_ylabel("number")
        sizes = sorted(growth.calls)
        for axes, start in ((left, growth.seconds.get(_RUN)), (right, whole)):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
            axes.set_xlabel("hosts = slices: raylets on this machine; beyond (dashed), a model")
            axes.grid(visible=True, color="#eeeeee")
            if start:
                first = min(start)
                line = [start[first] * size / first for size in sizes]
                axes.plot(sizes, line, color="#cccccc", linewidth=1, zorder=0, label="linear")
            axes.legend(frameon=False, fontsize=8)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in drawn.getvalue().splitlines()) + "\n"


class Counted(Counter[str]):
    """Counts calls to Ray's head while it is entered.

    Attributes:
        rows: How many nodes the answers had.
    """

    rows = 0

    def __enter__(self) -> Counted:
        import ray
        import ray.actor

        from fray.backend.ray import _internals

        self._patches = ExitStack()
        groups = _groups()
        for holder, name, said in (
            (ray, "nodes", "nodes"),
            (_internals, "available_resources", "free resources"),
            (groups, "placement_group", "group made"),
            (groups.PlacementGroup, "wait", "group awaited"),
            (groups, "placement_group_table", "group looked at"),
            (groups, "remove_placement_group", "group removed"),
            (ray.actor.ActorClass, "_remote", "actors made"),
            (ray.actor.ActorHandle, "_actor_method_call", "actors called"),
        ):
            self._patches.enter_context(patch.object(holder, name, self._counting(getattr(holder, name), said)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def clear(self) -> None:
        super().clear()
        self.rows = 0

    def _counting(self, function: Callable[..., Any], said: str) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            self[said] += 1
            answer = function(*arguments, **named)
            if said in ("nodes", "free resources"):
                self.rows += len(answer)
            return answer

        return counting


@contextmanager
def _made_up_cluster(size: int) -> Iterator[None]:
    """Have Ray's head be one that answers at once, and knows a head and so many slices."""
    import ray
    from ray import PlacementGroupID

    from fray.backend.ray import _internals

    groups = _groups()
    nodes = [_node("head", "10.0.0.1", {}, {"CPU": 8.0, "memory": 3e10})]
    for number in range(size):
        labels = {
            "ray.io/tpu-slice-name": f"slice-{number}",
            "ray.io/tpu-worker-id": "0",
            "ray.io/tpu-pod-type": _TYPE,
            "ray.io/node-id": f"{number:056x}",
        }
        has = {"CPU": 240.0, "TPU": 4.0, "memory": 4e11, f"TPU-{_TYPE}-head": 1.0, f"slice-{number}": 1.0}
        nodes.append(_node(labels["ray.io/node-id"], f"10.1.{number // 256}.{number % 256}", labels, has))
    free = {node["NodeID"]: node["Resources"] for node in nodes}

    def group(bundles: list[dict[str, float]], *_: object, bundle_label_selector: list[Any], **__: object) -> Any:
        assert len(bundles) == len(bundle_label_selector) == size
        return groups.PlacementGroup(PlacementGroupID.nil(), bundles)

    with (
        patch.object(ray, "nodes", lambda: nodes),
        patch.object(_internals, "available_resources", lambda: free),
        patch.object(groups, "placement_group", group),
        patch.object(groups.PlacementGroup, "wait", lambda *_: True),
        patch.object(groups, "placement_group_table", lambda *_: {"state": "REMOVED"}),
        patch.object(groups, "remove_placement_group", lambda *_: None),
    ):
        yield


def _steps(action: Callable[[], object]) -> int:
    """Return how many functions a call calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def _node(node_id: str, address: str, labels: dict[str, str], resources: dict[str, float]) -> dict[str, Any]:
    return {
        "NodeID": node_id,
        "Alive": True,
        "NodeManagerAddress": address,
        "NodeName": address,
        "Labels": labels,
        "Resources": resources,
    }


def _groups() -> Any:
    """Return Ray's module of placement groups, whose name in its package is a function's."""
    return importlib.import_module("ray.util.placement_group")


def _acquire(size: int) -> Any:
    from fray.backend.ray._tpu_slices import SetAside, acquire
    from fray.tpu import tpu_type

    return acquire(
        tpu_type(_TYPE),
        size,
        resources={},
        give_up=time.monotonic() + 60,
        set_aside=SetAside(),
        tell=lambda missing: print(missing),
    )


def _awaited(ask: Callable[[], Any]) -> Callable[[], Any]:
    def awaited() -> Any:
        group = ask()
        assert group.wait(60)
        return group

    return awaited


def clock_first(first: Callable[[], Any], then: Callable[[Any], object]) -> float:
    """Return the seconds that a call takes, and undo it."""
    begin = time.perf_counter()
    made = first()
    seconds = time.perf_counter() - begin
    then(made)
    return seconds


def _note(growth: Growth, size: int, found: Mapping[str, Sequence[float | None]]) -> None:
    for what, series in found.items():
        growth.note(what, size, statistics.median(value for value in series if value is not None))


def _seconds(growth: Growth, what: str, size: int) -> str:
    value = growth.seconds.get(what, {}).get(size)
    return "" if value is None else f"{value:.4f}" if value < 1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
