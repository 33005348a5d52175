"""Run the long, seeded fault schedules, and the conformance suites many times over, under load.

`make soak` runs twenty rounds of the suites beside two busy loops, then the schedules of which `make test` runs a
sample: 200 clients killed at any point, and long random process trees.
"""

import argparse
import os
import subprocess
import sys
import time

SUITES = ["tests/local/test_conformance.py", "tests/core/test_local_job_context.py::TestLocalJobContext"]
SCHEDULES = ["tests/local/test_faults.py", "tests/local/test_environments.py", "tests/core/test_runner.py"]
SCHEDULES += ["tests/ray/test_faults.py", "tests/tpu/test_schedules.py"]


def main() -> int:
    """Return the exit code: 0 where everything passed every time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of both conformance suites")
    arguments = parser.parse_args()
    # Eight workers, and beside them two processes that take whatever they leave: no core is ever idle.
    load = [subprocess.Popen([sys.executable, "-c", "import os; os.nice(19)\nwhile True: pass"]) for _ in range(2)]
    began = time.monotonic()
    try:
        for number in range(arguments.rounds):
            done = pytest(*SUITES)
            print(f"round {number + 1}/{arguments.rounds}: {done.stdout.strip().splitlines()[-1]}", flush=True)
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


def pytest(*files: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run test files; return what came of it."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "8", "--dist", "loadgroup", "-p", "no:cacheprovider"]
    command += ["-m", "", *files]
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main())
