"""Measure, print the table, and leave the numbers in `benchmarks/results/latest.json`.

python -m benchmarks [--only ROW]... [--rounds N] [--quick] [--no-peers] [--check]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import environments, jobs, listing, on_docker, on_ray, on_tpu, starting, watching
from benchmarks.measuring import Comparison, Settings
from benchmarks.report import as_document, machine_facts, print_table, save

_HERE = Path(__file__).parent
_ROWS: dict[str, Callable[[Settings], list[Comparison]]] = {
    **starting.ROWS,
    **jobs.ROWS,
    **listing.ROWS,
    **environments.ROWS,
    **watching.ROWS,
    **on_ray.ROWS,
    **on_tpu.ROWS,
    **on_docker.ROWS,
}


def main() -> int:
    options = _parse()
    # What is installed has its bytecode; a tree run with this set would be compiled anew in every process.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    machine = machine_facts()
    # Beside the project and not in /tmp, which may be memory, where a durable write is free.
    cache = _HERE.parent / ".cache"
    cache.mkdir(exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="bench-scratch-", dir=cache))
    settings = Settings(
        scratch,
        rounds=options.rounds,
        quick=options.quick,
        peers=not (options.quick or options.no_peers),
        seed=options.seed,
    )
    rows = [name for name in _ROWS if not options.only or name in options.only]
    comparisons: list[Comparison] = []
    took: dict[str, float] = {}
    try:
        for name in rows:
            row_begin = time.perf_counter()
            comparisons += _ROWS[name](settings)
            took[name] = round(time.perf_counter() - row_begin, 1)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    chosen = {"rows": rows, "rounds": options.rounds, "quick": options.quick, "seed": options.seed}
    document = as_document(comparisons, machine, chosen, took)
    save(document, options.output)
    print_table(comparisons, machine)
    missed = [each for each in comparisons if each.is_missed]
    if missed:
        print(f"\n{len(missed)} of {sum(each.bar is not None for each in comparisons)} bars missed")
    return 1 if options.check and missed else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Fray.")
    parser.add_argument("--only", action="append", choices=list(_ROWS), metavar="ROW", help=", ".join(_ROWS))
    parser.add_argument("--rounds", type=_positive, help="rounds of each row (default: each row's own)")
    parser.add_argument("--quick", action="store_true", help="three rounds, smaller sizes, no peers")
    parser.add_argument("--no-peers", action="store_true", help="leave the peers out, and do not install them")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a bar is missed")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the sides within the rounds")
    parser.add_argument("--output", type=Path, default=_HERE / "results" / "latest.json", help="where the JSON goes")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


sys.exit(main())
