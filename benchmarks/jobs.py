"""Local jobs from submission to known end: one, and a hundred at once; and what of that the parts take."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import fray
from benchmarks.measuring import Comparison, Settings, Side, clock, compare, interleave
from benchmarks.peers import Peer, peer_python
from fray.backend.local._paths import StorePaths
from fray.supervision import parse_events

__all__ = ["BARE_SUPERVISOR", "ROWS", "connected", "run_job"]

# The least that a supervisor in Python can be: started apart, it spawns the command and reaps it.
BARE_SUPERVISOR = (
    'import posix; posix.waitpid(posix.posix_spawn("/bin/sh", ["sh", "-c", "true"], posix.environ), 0); posix._exit(0)'
)


def measure_submit(settings: Settings) -> list[Comparison]:
    """Run one job of `true` at a time, against `Popen().wait()` of the same shell."""
    with ExitStack() as stack:
        root = settings.scratch / "submit"
        cluster = stack.enter_context(connected(root))
        phases = _Phases(cluster, StorePaths(root))
        sides = [Side("fray", phases.measure), Side("Popen().wait()", lambda: clock(_popen_and_wait))]
        peers, problem = _peers(stack, settings, {"torchx": 2, "submitit": 5})
        sides += [Side(peer.name, lambda peer=peer: peer.measure(1), every) for peer, every in peers]  # type: ignore[misc]
        found = interleave("submit", sides, settings.rounds(40), settings.seed, warmups=3)
    what = "submit → known terminal of `true`"
    floor = "Popen().wait()"
    first = compare("submit", what, found["fray"], floor, found[floor], kind="difference", bar=0.020)
    phases.forget(3)
    first.details["phases"] = phases.medians()
    first.note = phases.in_words()
    return [first, *_against_peers("submit", what, found, problem)]


def measure_many(settings: Settings) -> list[Comparison]:
    """Submit a hundred jobs and wait for all, against as many bare supervisors."""
    count = 20 if settings.quick else 100
    with ExitStack() as stack:
        cluster = stack.enter_context(connected(settings.scratch / "many"))

        def run_all() -> None:
            for job_id in [cluster.create_job("true") for _ in range(count)]:
                cluster.wait(job_id, check=True)

        floor = f"{count} bare supervisors"
        sides = [Side("fray", lambda: clock(run_all)), Side(floor, lambda: clock(lambda: _bare_supervisors(count)))]
        peers, problem = _peers(stack, settings, {"torchx": 3})
        sides += [Side(peer.name, lambda peer=peer: peer.measure(count), every) for peer, every in peers]  # type: ignore[misc]
        found = interleave("many", sides, settings.rounds(7), settings.seed)
    what = f"{count} jobs at once, all known terminal"
    first = compare("many", what, found["fray"], floor, found[floor], kind="ratio", bar=2.0)
    return [first, *_against_peers("many", what, found, problem, names=("torchx",))]


@contextmanager
def connected(root: Path, **options: object) -> Iterator[fray.ClusterContext]:
    """Connect to a local cluster below `root`, warmed by one job."""
    with fray.connect(f"local:{root}", **options) as cluster:
        run_job(cluster)
        yield cluster


def run_job(cluster: fray.ClusterContext, env: fray.RuntimeEnv | None = None) -> str:
    """Run a job of `true` to its end."""
    job_id = cluster.create_job("true", env)
    cluster.wait(job_id, check=True)
    return job_id


def _popen_and_wait() -> None:
    subprocess.Popen(["/bin/sh", "-c", "true"]).wait()


def _bare_supervisors(count: int) -> None:
    command = [sys.executable, "-I", "-S", "-c", BARE_SUPERVISOR]
    for process in [subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True) for _ in range(count)]:
        assert process.wait() == 0


def _peers(stack: ExitStack, settings: Settings, every: dict[str, int]) -> tuple[list[tuple[Peer, int]], str]:
    """Start the peers that there are, each to take part in every so-manieth round; else say why there are none."""
    python, problem = peer_python(settings)
    if not python:
        return [], problem
    started = [(stack.enter_context(Peer(name, python, settings.scratch)), often) for name, often in every.items()]
    return started, ""


def _against_peers(
    row: str,
    what: str,
    found: dict[str, list[float | None]],
    problem: str,
    names: tuple[str, ...] = ("torchx", "submitit"),
) -> list[Comparison]:
    if problem:
        return [Comparison(row, what, ", ".join(names), note=problem)]
    return [compare(row, what, found["fray"], name, found[name], kind="ratio", bar=1.0) for name in names]


class _Phases:
    """Measures a job, and keeps when each thing happened: to the client by its clock, to the runner by its journal."""

    def __init__(self, cluster: fray.ClusterContext, paths: StorePaths) -> None:
        self._cluster = cluster
        self._paths = paths
        self._found: list[dict[str, float]] = []

    def measure(self) -> float:
        """Run a job; return the seconds from its submission to its known end."""
        wall, begin = time.time(), time.perf_counter()
        job_id = self._cluster.create_job("true")
        accepted = time.perf_counter() - begin
        self._cluster.wait(job_id, check=True)
        known = time.perf_counter() - begin
        events = parse_events(self._paths.job(job_id).journal.read_bytes())
        found = {event.event: event.time - wall for event in events}
        self._found.append({"accepted": accepted, **found, "known": known})
        return known

    def forget(self, count: int) -> None:
        """Leave out the first ones, which warmed up."""
        del self._found[:count]

    def medians(self) -> dict[str, float]:
        """Return the median time of each event since the submission, in the order of the events."""
        names = {name for each in self._found for name in each}
        middles = {name: median(each[name] for each in self._found if name in each) for name in names}
        return dict(sorted(middles.items(), key=lambda item: item[1]))

    def in_words(self) -> str:
        """Return the medians as one line."""
        return "ms since the submission: " + ", ".join(f"{name} {1e3 * at:.1f}" for name, at in self.medians().items())


ROWS = {"submit": measure_submit, "many": measure_many}
