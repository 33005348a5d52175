#!/usr/bin/env python3
"""Stands in for the `ray` command: notes how it was started, and ends or works as it is told.

Each start appends a JSON line to `$STUB_RAY/starts`. The file `$STUB_RAY/exit` names exit codes, one for each of the
first starts; after those it stays until SIGTERM, which it notes too. With `$STUB_RAY/busy` there it has a worker that
runs something, as Ray would title it. `$STUB_RAY/pipe`, a FIFO, gets a line for each thing that happens.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

folder = Path(os.environ["STUB_RAY"])


def note(event):
    with open(folder / "pipe", "w") as pipe:
        pipe.write(event + "\n")


def main():
    with open(folder / "starts", "a") as starts:
        starts.write(json.dumps({"arguments": sys.argv[1:], "environment": dict(os.environ)}) + "\n")
    number = len((folder / "starts").read_text().splitlines())
    codes = (folder / "exit").read_text().split() if (folder / "exit").exists() else []
    children = []
    title = "ray::train" if (folder / "busy").exists() else "ray::IDLE"
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    for name in (title, "ray::DashboardAgent"):
        children.append(subprocess.Popen([name, "-c", "import signal; signal.pause()"], executable=sys.executable))
    note(f"started {number}")
    if number <= len(codes):
        code = int(codes[number - 1])
    else:
        signal.sigwait({signal.SIGTERM})
        note("told to end")
        code = 1  # as Ray's does
    for child in children:
        child.kill()
        child.wait()
    return code


if __name__ == "__main__":
    sys.exit(main())
