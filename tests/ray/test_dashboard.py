"""The example job on Ray, as its users see it: by the command, and in Ray's dashboard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ray.ray_harness import Head
from tests.requirements import missing

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.timeout(900)]

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
# The page asks the cluster for what it shows; the browser gives it so long.
PATIENCE_MILLISECONDS = 15_000


def test_the_example_runs_and_shows_up_in_the_dashboard(ray_head: Head, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        missing("chromium", "the dashboard is looked at in a real browser")
    job_id = f"digits-{os.getpid()}"
    command = [sys.executable, "-m", "fray.cli", "run", "-c", f"ray:{ray_head.dashboard}", "--job-id", job_id]
    command += [
        "--package",
        "scikit-learn",
        "--fetch",
        str(tmp_path / "out"),
        "--",
        "python",
        "train.py",
        "--folds",
        "3",
    ]
    done = subprocess.run(command, cwd=DIGITS, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "3 folds as tasks of RayJobContext" in done.stdout
    assert f"{job_id} SUCCEEDED (exit code 0)" in done.stderr
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert len(metrics["fold_accuracies"]) == 3

    page = f"{ray_head.dashboard}/#/jobs/{job_id}"
    picture = tmp_path / "dashboard.png"
    browser = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    browser += [f"--user-data-dir={tmp_path / 'browser'}", f"--virtual-time-budget={PATIENCE_MILLISECONDS}"]
    give_up = time.monotonic() + 120
    while True:
        text = subprocess.run(
            [*browser, "--dump-dom", page], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=120
        ).stdout
        if job_id in text and "SUCCEEDED" in text:
            break
        assert time.monotonic() < give_up, f"the dashboard does not show the job: {text[-3000:]}"
    subprocess.run(
        [*browser, f"--screenshot={picture}", page], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120
    )
    assert picture.stat().st_size > 10_000
    if folder := os.environ.get("FRAY_TESTS_KEEP"):
        shutil.copy(picture, folder)
