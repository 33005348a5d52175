"""Train on two simulated slices of this machine, lose one in the middle, and draw what the loss did.

`python main.py OUTPUTS` needs fray-ray, jax and matplotlib. On a cluster with TPUs only `run_on_tpu` below is needed.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

from train import train

import fray
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.backend.ray.testing import SimulatedSlices

TYPE, NUM_SLICES = "v4-16", 2


def main(outputs: Path) -> None:
    """Run the whole."""
    checkpoints = outputs.absolute() / "checkpoints"  # the hosts work in folders of their own
    checkpoints.mkdir(parents=True)
    with SimulatedSlices(TYPE, NUM_SLICES) as slices, RayClusterContext(slices.address) as cluster:
        taken: list[float] = []
        preemption = threading.Thread(target=preempt, args=(slices, checkpoints, taken), daemon=True)
        preemption.start()
        results = cluster.run_on_tpu(
            partial(train, checkpoints=str(checkpoints), seconds_per_epoch=0.1),
            fray.TpuRunConfig(TYPE, NUM_SLICES),
            fray.RuntimeEnv(env={"JAX_PLATFORMS": "cpu"}, working_dir=str(Path(__file__).parent)),
        )
        preemption.join()
    for result in results:
        print(json.dumps(result))
    history = [json.loads(line) for line in (checkpoints / "history.jsonl").read_text().splitlines()]
    draw(history, taken, outputs / "loss.png")
    print(f"the loss curve is in {outputs / 'loss.png'}")


def preempt(slices: SimulatedSlices, checkpoints: Path, taken: list[float]) -> None:
    """Take a slice away in the middle of the training, and bring it back a little later."""
    while not (checkpoints / "epoch-00025.npz").exists():
        time.sleep(0.01)
    slices.take_away(1)
    taken.append(time.time())
    time.sleep(3)
    slices.bring_back(1)
    taken.append(time.time())


def draw(history: list[dict[str, float]], taken: list[float], path: Path) -> None:
    """Draw the loss over epochs and over time, an attempt a colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_epoch, by_time) = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    begin = history[0]["time"]
    for attempt in sorted({line["attempt"] for line in history}):
        own = [line for line in history if line["attempt"] == attempt]
        losses = [line["loss"] for line in own]
        by_epoch.plot([line["epoch"] for line in own], losses, ".-", label=f"attempt {attempt:g}")
        by_time.plot([line["time"] - begin for line in own], losses, ".-", label=f"attempt {attempt:g}")
    by_time.axvspan(taken[0] - begin, taken[1] - begin, color="tab:red", alpha=0.15, label="slice 1 is away")
    by_epoch.set(xlabel="epoch", ylabel="mean squared error", yscale="log", title="Loss by epoch")
    by_time.set(xlabel="seconds", title="Loss by time")
    for axes in (by_epoch, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs"))
