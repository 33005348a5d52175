"""Run the long, seeded fault schedules, and the conformance suites many times over, under load.

`make soak` runs twenty rounds of the suites beside two busy loops, then the schedules of which `make test` runs a
sample: 200 clients killed at any point, and long random process trees; and at last, by themselves, 100 schedules of
`run_on_tpu` on simulated slices.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

SUITES = ["tests/local/test_conformance.py", "tests/core/test_local_job_context.py::TestLocalJobContext"]
SCHEDULES = ["tests/local/test_faults.py", "tests/local/test_environments.py", "tests/core/test_runner.py"]
SCHEDULES += ["tests/ray/test_faults.py", "tests/tpu/test_schedules.py"]
TPU_SCHEDULES = "tests/ray/test_tpu_schedules.py"


def main() -> int:
    """Return the exit code: 0 where everything passed every time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of both conformance suites")
    parser.add_argument("--tpu-schedules", type=int, default=100, help="how many of run_on_tpu")
    parser.add_argument("--only-tpu", action="store_true", help="run those of run_on_tpu, and nothing else")
    arguments = parser.parse_args()
    return (0 if arguments.only_tpu else jobs(arguments.rounds)) or tpu_schedules(arguments.tpu_schedules)


def jobs(rounds: int) -> int:
    """Run the suites and schedules of jobs and of provisioning; return the exit code."""
    # Eight workers, and beside them two processes that take whatever they leave: no core is ever idle.
    load = [subprocess.Popen([sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"]) for _ in range(2)]
    began = time.monotonic()
    try:
        for number in range(rounds):
            done = pytest(*SUITES)
            print(f"round {number + 1}/{rounds}: {done.stdout.strip().splitlines()[-1]}", flush=True)
            if done.returncode:
                print(done.stdout)
                return 1
    finally:
        for process in load:
            process.kill()
            process.wait()
    done = pytest(*SCHEDULES, FRAY_SOAK="10")
    print(f"schedules: {done.stdout.strip().splitlines()[-1]} ({time.monotonic() - began:.0f} s in all)", flush=True)
    if done.returncode:
        print(done.stdout)
    return done.returncode


def tpu_schedules(count: int) -> int:
    """Run schedules of `run_on_tpu`, one after the other; print what they met and how they ended."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report")
        done = pytest(TPU_SCHEDULES, FRAY_TPU_SCHEDULES=str(count), FRAY_TPU_SCHEDULES_REPORT=str(report))
        runs = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    print(f"run_on_tpu: {len(runs)} schedules ended as promised and left nothing behind")
    for title, counts in (
        ("faults", Counter(kind for run in runs for kind in run["met"])),
        ("ends", Counter(run["end"] for run in runs)),
    ):
        print(f"  {title}: " + ", ".join(f"{number} {name}" for name, number in counts.most_common()))
    seconds = sorted(run["seconds"] for run in runs)
    if seconds:
        median = seconds[len(seconds) // 2]
        print(f"  attempts: {sum(run['attempts'] for run in runs)}")
        print(f"  seconds: {sum(seconds):.0f} in all, {median:.0f} the median, {seconds[-1]:.0f} the longest")
    print(f"run_on_tpu: {done.stdout.strip().splitlines()[-1]}", flush=True)
    if done.returncode:
        print(done.stdout)
    return done.returncode


def pytest(*files: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run test files; return what came of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    command += ["-m", "", *files]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
