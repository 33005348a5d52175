"""A training that can be taken away at any step: it goes on where its last checkpoint was.

What it learns is a sum, so that one sees at the end whether a step was lost, or was made twice.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

STEPS = 60


def train(ctx: Any, checkpoints: str, seconds_per_step: float = 0.2) -> dict[str, Any]:
    """Train on this host's share of the numbers; return what came of it."""
    world = ctx.num_slices * ctx.num_hosts
    rank = ctx.slice_id * ctx.num_hosts + ctx.host_id
    path = Path(checkpoints) / f"host-{rank}.json"
    first, total = 0, 0
    if path.exists():
        saved = json.loads(path.read_text())
        first, total = saved["step"] + 1, saved["total"]
    print(f"attempt {ctx.attempt}: from step {first}", flush=True)
    for step in range(first, STEPS):
        total += (step * world + rank) ** 2
        time.sleep(seconds_per_step)
        save(path, {"step": step, "total": total})
        ctx.report_step(step)
    return {"rank": rank, "attempt": ctx.attempt, "from_step": first, "total": total}


def expected(world: int) -> int:
    """Return what the totals of all hosts have to add up to."""
    return sum(number**2 for number in range(STEPS * world))


def save(path: Path, checkpoint: dict[str, int]) -> None:
    """Write a checkpoint, whole or not at all."""
    staging = path.with_suffix(".part")
    staging.write_text(json.dumps(checkpoint))
    os.replace(staging, path)
