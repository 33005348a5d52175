"""The benchmarks run and leave well-formed numbers. How good the numbers are is not a test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_quick_run_prints_a_table_and_leaves_json(tmp_path):
    output = tmp_path / "results" / "latest.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "import", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    assert "import fray, fresh interpreter" in done.stdout

    document = json.loads(output.read_text())
    assert document["settings"]["rows"] == ["import"]
    assert {"cpus", "kernel", "python"} <= document["machine"].keys()
    measured = [each for each in document["comparisons"] if each["value"] is not None]
    assert {each["row"] for each in measured} == {"import"}
    for each in measured:
        assert each["rounds"] == len(each["details"]["fray"]) > 0
        assert each["low"] is None or each["low"] <= each["value"] <= each["high"]
        assert each["verdict"] or each["bar"] is None


def test_importing_fray_loads_no_backend_and_nothing_heavy(tmp_path):
    output = tmp_path / "latest.json"
    command = [sys.executable, "-m", "benchmarks", "--only", "import", "--rounds", "1", "--no-peers"]
    subprocess.run([*command, "--output", str(output)], cwd=ROOT, check=True, capture_output=True)
    (loaded,) = [each for each in json.loads(output.read_text())["comparisons"] if "loaded" in each["details"]]
    assert loaded["details"]["loaded"] == []


def test_without_an_engine_the_docker_rows_say_so_and_are_left_out(tmp_path):
    output = tmp_path / "latest.json"
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "docker-submit", "--only", "docker-rebuild"]
    nowhere = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock"}
    done = subprocess.run(
        [*command, "--output", str(output)], cwd=ROOT, env=nowhere, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())["comparisons"]
    assert {each["row"] for each in found} == {"docker-submit", "docker-rebuild"}
    for each in found:
        assert each["verdict"] == "not measured"
        assert "no-engine.sock" in each["note"]
