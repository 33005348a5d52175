"""Data-parallel training on every host of a TPU pod, that goes on where it was when a slice is taken away.

Each host computes the gradient of its part of the data; `psum` adds them up over all devices of all hosts; host 0 of
slice 0 writes a checkpoint after each epoch. A new attempt begins from the last one.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

EPOCHS, EXAMPLES, FEATURES, LEARNING_RATE = 60, 4096, 16, 0.05


def train(ctx: Any, checkpoints: str, seconds_per_epoch: float = 0.0) -> dict[str, Any]:
    """Train on this host's part of the data, together with all others; return what came of it."""
    # Here, and not above: by now the environment is the one that JAX is to see.
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    world = ctx.num_slices * ctx.num_hosts
    rank = ctx.slice_id * ctx.num_hosts + ctx.host_id
    # On a TPU `initialize()` finds the numbers by itself; the coordinator is in the environment everywhere.
    jax.distributed.initialize(num_processes=world, process_id=rank)
    mesh = Mesh(np.array(jax.devices()), ("hosts",))

    # The truth, and this host's share of noisy observations of it.
    weights_true = np.linspace(-1.0, 1.0, FEATURES)
    share = EXAMPLES // world
    random = np.random.default_rng(rank)
    inputs = random.normal(size=(share, FEATURES))
    targets = inputs @ weights_true + 0.1 * random.normal(size=share)
    split = NamedSharding(mesh, P("hosts"))
    inputs, targets = (jax.make_array_from_process_local_data(split, each) for each in (inputs, targets))

    def loss(weights: Any, inputs: Any, targets: Any) -> Any:
        return jnp.mean((inputs @ weights - targets) ** 2)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(P(), P("hosts"), P("hosts")), out_specs=(P(), P()), check_vma=False)
    def step(weights: Any, inputs: Any, targets: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(weights, inputs, targets)
        value, gradient = jax.lax.psum((value, gradient), "hosts")
        return weights - LEARNING_RATE * gradient / jax.device_count(), value / jax.device_count()

    newest = max(Path(checkpoints).glob("epoch-*.npz"), default=None)
    begin, weights = 0, jnp.zeros(FEATURES)
    if newest is not None:
        with np.load(newest) as saved:
            begin, weights = int(saved["epoch"]) + 1, jnp.asarray(saved["weights"])
    if rank == 0:
        print(f"attempt {ctx.attempt}: {jax.device_count()} devices on {world} hosts, from epoch {begin}", flush=True)

    value = 0.0
    for epoch in range(begin, EPOCHS):
        weights, loss_now = step(weights, inputs, targets)
        value = float(loss_now)
        time.sleep(seconds_per_epoch)
        if rank == 0:
            save(Path(checkpoints), epoch, np.asarray(weights), value, ctx.attempt)
        ctx.report_step(epoch)
    error = float(np.abs(np.asarray(weights) - weights_true).max())
    return {"rank": rank, "attempt": ctx.attempt, "loss": value, "error": error}


def save(folder: Path, epoch: int, weights: Any, loss: float, attempt: int) -> None:
    """Write a checkpoint, whole or not at all, and a line of the history."""
    import numpy as np

    staging = folder / f".epoch-{epoch:05}.npz"
    with staging.open("wb") as file:
        np.savez(file, epoch=epoch, weights=weights)
    os.rename(staging, folder / f"epoch-{epoch:05}.npz")
    with (folder / "history.jsonl").open("a") as history:
        history.write(json.dumps({"time": time.time(), "epoch": epoch, "loss": loss, "attempt": attempt}) + "\n")
