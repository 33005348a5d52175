"""The `fray` command, as a process, on the real local backend."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fray import plugins
from fray.cli._plugin_commands import load_command
from fray.errors import BackendNotFoundError
from tests.core.cli_harness import DEADLINE_SECONDS, Command, install_command, interrupt, read_until

SECRET = "s3cr3t-v4lue"
# Runs until it is stopped, and says so as soon as it can be.
ENDLESS = "trap 'echo stopped; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
UNTIL_RELEASED = "echo ready; until [ -e release ]; do sleep 0.02; done; echo released"


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    command = Command(tmp_path)
    yield command
    command.stop_all()


# run


def test_run_prints_the_jobs_output_and_nothing_else_on_standard_output(command: Command) -> None:
    done = command("run", "--", "echo out; echo err >&2; printf unfinished")
    assert (done.returncode, done.stdout) == (0, "out\nerr\nunfinished")
    submitted, ended = done.stderr.splitlines()
    assert re.fullmatch(r"fray: submitted fray-\d+", submitted)
    assert re.fullmatch(r"fray: fray-\d+ SUCCEEDED \(exit code 0\) after \S+s", ended)


def test_run_exits_as_the_command_did(command: Command) -> None:
    done = command("run", "exit 3")
    assert done.returncode == 3
    assert "FAILED (EXITED, exit code 3)" in done.stderr
    assert "the command exited with 3" in done.stderr
    assert command("run", "--", "no-such-command-anywhere").returncode == 127


def test_a_job_that_failed_without_an_exit_code_of_its_own_is_125(command: Command) -> None:
    done = command("run", "--cpu", "100000", "--", "true")
    assert done.returncode == 125
    assert "INFEASIBLE" in done.stderr


def test_run_out_of_time_does_not_succeed_even_where_the_command_exits_with_0(command: Command) -> None:
    done = command("run", "--timeout", "3s", "--", "trap 'exit 0' TERM; while :; do sleep 0.05; done")
    assert done.returncode == 125
    assert "TIMED_OUT" in done.stderr


def test_several_arguments_are_quoted_and_one_is_a_shell_command(command: Command) -> None:
    quoted = command("run", "--", "python3", "-c", 'print("a  b", "$HOME", "*")')
    assert quoted.stdout == "a  b $HOME *\n"
    assert command("run", "--", "echo one | tr a-z A-Z").stdout == "ONE\n"
    # Fray's own options stand before the command; what is behind it is the job's, with or without "--".
    assert command("run", "echo", "--json", "-c", "x").stdout == "--json -c x\n"


def test_run_json_is_one_document_and_the_output_is_on_standard_error(command: Command) -> None:
    done = command("run", "--json", "-m", "team=blue", "--", "echo hello; exit 4")
    info = json.loads(done.stdout)
    assert done.returncode == 4
    assert (info["status"], info["reason"], info["exit_code"]) == ("FAILED", "EXITED", 4)
    assert info["metadata"] == {"team": "blue"}
    assert [(each["number"], each["exit_code"]) for each in info["attempts"]] == [(1, 4)]
    assert "hello\n" in done.stderr


def test_run_fetches_the_outputs_of_a_failed_job_too(command: Command) -> None:
    done = command("run", "--fetch", "got", "--", "echo 42 > $FRAY_OUTPUT_DIR/result; exit 5")
    assert done.returncode == 5
    assert "fetched 1 file to got" in done.stderr
    assert (command.project / "got" / "result").read_text() == "42\n"
    (command.project / "file").touch()
    refused = command("run", "--fetch", "file", "--", "true")
    assert refused.returncode == 2
    assert "submitted" not in refused.stderr


def test_run_says_what_a_pending_job_waits_for(command: Command) -> None:
    cores = str(os.cpu_count())
    holder = command.submit("--cpu", cores, "--", ENDLESS)
    process = command.start("run", "--cpu", cores, "--", "echo at last")
    said = read_until(process, process.stderr, b"PENDING: ")
    assert b"fray: submitted" in said
    assert command("delete", holder).stdout == f"{holder}\n"
    output, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, output) == (0, b"at last\n")


def test_run_retries_and_keeps_every_attempt(command: Command) -> None:
    info = command.json("run", "--max-retries", "1", "--", '[ "$FRAY_ATTEMPT" = 2 ]')
    assert info["status"] == "SUCCEEDED"
    assert [each["exit_code"] for each in info["attempts"]] == [1, 0]


def test_ctrl_c_stops_the_job_and_shows_its_end(command: Command) -> None:
    process = command.start("run", "--job-id", "one", "--", ENDLESS)
    read_until(process, process.stdout, b"ready\n")
    interrupt(process)
    output, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 7
    assert output.endswith(b"stopped\n")
    assert b"fray: stopping one" in errors
    assert b"one STOPPED" in errors


def test_a_stopped_job_that_exits_with_0_is_143(command: Command) -> None:
    process = command.start("run", "--", ENDLESS.replace("exit 7", "exit 0"))
    read_until(process, process.stdout, b"ready\n")
    interrupt(process)
    process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 143


def test_a_second_ctrl_c_leaves_the_job_and_says_how_to_come_back(command: Command) -> None:
    deaf = "trap '' TERM; " + UNTIL_RELEASED
    process = command.start("run", "-c", command.spec, "--job-id", "deaf", "--", deaf)
    read_until(process, process.stdout, b"ready\n")
    interrupt(process)
    read_until(process, process.stderr, b"stopping deaf")
    interrupt(process)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert f"left deaf, which has been asked to stop; follow it again: fray logs -c {command.spec} -f deaf" in (
        errors.decode()
    )
    assert b"Traceback" not in errors
    (command.project / "release").touch()
    assert "deaf STOPPED" in command("wait", "deaf").stderr


def test_a_killed_run_leaves_its_job_running(command: Command) -> None:
    process = command.start("run", "--job-id", "kept", "--", UNTIL_RELEASED)
    read_until(process, process.stdout, b"ready\n")
    process.kill()
    process.communicate(timeout=DEADLINE_SECONDS)
    (command.project / "release").touch()
    followed = command("logs", "-f", "kept")
    assert (followed.returncode, followed.stdout) == (0, "ready\nreleased\n")


def test_run_whose_output_nobody_reads_still_exits_as_the_job_does(command: Command) -> None:
    process = command.start("run", "--", "echo ready; until [ -e release ]; do sleep 0.02; done; echo more; exit 6")
    read_until(process, process.stdout, b"ready\n")
    assert process.stdout is not None
    process.stdout.close()
    (command.project / "release").touch()
    assert process.stderr is not None
    errors = process.stderr.read()
    assert process.wait(DEADLINE_SECONDS) == 6
    assert b"nobody reads the job's output" in errors
    process.stderr.close()


# submit, plan, secrets


def test_submit_prints_the_id_alone(command: Command) -> None:
    done = command("submit", "--job-id", "mine", "--", "true")
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")
    assert command.json("submit", "--", "true")["job_id"].startswith("fray-")
    assert command.submit("--job-id-prefix", "digits", "--", "true").startswith("digits-")


def test_adopt_takes_the_same_job_and_refuses_another(command: Command) -> None:
    same = ("--job-id", "nightly", "--adopt", "--", "echo once >> ran")
    assert command.submit(*same) == "nightly"
    assert command("wait", "nightly").returncode == 0
    assert command.submit(*same) == "nightly"
    assert (command.project / "ran").read_text() == "once\n"
    other = command("submit", "--job-id", "nightly", "--adopt", "--", "something else")
    assert (other.returncode, other.stdout) == (2, "")
    assert command("submit", "--job-id", "nightly", "--", "true").returncode == 2
    assert "--adopt needs --job-id" in command("submit", "--adopt", "--", "true").stderr


def test_the_environment_reaches_the_job(command: Command) -> None:
    (command.project / "sub").mkdir()
    show = 'echo "$A|$B|$(basename "$PWD")"'
    done = command("run", "-e", "A=1=2", "-e", "B", "-w", "sub", "--", show, env={"B": "from here"})
    assert done.stdout == "1=2|from here|sub\n"
    missing = command("run", "-e", "NOT_SET_HERE", "--", "true")
    assert missing.returncode == 2
    assert "NOT_SET_HERE is not set here" in missing.stderr


def test_secrets_come_from_the_environment_or_a_file_and_are_shown_nowhere(command: Command) -> None:
    (command.project / "token").write_text(f"{SECRET}-2\n")
    given = ("--secret", "ONE", "--secret-file", "TWO=token", "--job-id", "quiet")
    digest = hashlib.sha256(f"{SECRET}{SECRET}-2".encode()).hexdigest()
    test = f'[ "$(printf %s "$ONE$TWO" | sha256sum | cut -c1-64)" = {digest} ]'
    everything = ""
    for arguments in (("plan", *given, "--", test), ("plan", "--json", *given, "--", test)):
        done = command(*arguments, env={"ONE": SECRET})
        everything += done.stdout + done.stderr
        assert done.returncode == 0
        assert "***" in done.stdout
    done = command("run", "--debug", *given, "--", test, env={"ONE": SECRET})
    assert done.returncode == 0, done.stderr
    everything += done.stdout + done.stderr
    for arguments in (("describe", "quiet"), ("describe", "--json", "quiet"), ("list",), ("logs", "quiet")):
        done = command(*arguments)
        everything += done.stdout + done.stderr
    assert SECRET not in everything


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--secret", f"API={SECRET}", "--", "true"),
        ("submit", "--json", "--secret", f"API={SECRET}", "--", "true"),
        ("plan", "--debug", "--secret", f"API={SECRET}", "--", "true"),
        ("run", "--secret-file", SECRET, "--", "true"),
        ("run", "--secret-file", f"API={SECRET}", "--", "true"),
    ],
)
def test_a_secret_on_the_command_line_is_refused_and_not_repeated(command: Command, arguments: tuple[str, ...]) -> None:
    done = command(*arguments)
    assert done.returncode == 2
    assert "--secret-file" in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_plan_shows_what_would_be_done_and_does_nothing(command: Command) -> None:
    arguments = ("--memory", "1.5GiB", "--cpu", "1", "-e", "API_KEY=hidden", "--timeout", "1h30m", "--", "echo", "a b")
    shown = command("plan", *arguments)
    assert shown.returncode == 0
    assert re.search(r"^Command: +echo 'a b'$", shown.stdout, re.MULTILINE)
    assert "memory=1610612736" in shown.stdout
    assert "API_KEY=***" in shown.stdout
    planned = command.json("plan", *arguments)
    assert planned["entrypoint"] == "echo 'a b'"
    assert planned["timeout_seconds"] == 5400
    assert planned["env"]["minimum_resources"] == {"CPU": 1, "memory": 1610612736}
    assert command.json("list") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--memory", "8 apples"), "'8 apples' is no size; write 8GiB"),
        (("--timeout", "soon"), "'soon' is no duration; write 90"),
        (("--timeout", "1h30"), "'1h30' is no duration"),
        (("--resource", "TPU"), "write NAME=QUANTITY"),
        (("--resource", "CPU=many"), "'many' is no quantity of CPU"),
        (("--metadata", "note"), "write KEY=VALUE"),
        (("--cpu", "1", "--resource", "CPU=2"), "names CPU twice"),
        (("--max-resource", "CPU=1"), "maximum_resources"),
        (("--image", "debian"), "container_image"),
        (("--job-id", "a b"), "no job id"),
        (("--job-id", "a", "--job-id-prefix", "b"), "exclude each other"),
        (("--no-such-option",), "No such option"),
        (("--python", "/no/such/python"), "/no/such/python"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(command: Command, arguments: tuple[str, ...], message: str) -> None:
    done = command("submit", *arguments, "--", "true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fray: error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_python_is_the_project_environments_unless_it_is_named(command: Command) -> None:
    interpreter = command.project / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\necho the project python\n")
    interpreter.chmod(0o755)
    assert command("run", "--", "python", "x.py").stdout == "the project python\n"
    named = command("run", "--python", sys.executable, "--", "python", "-c", "print('named')")
    assert named.stdout == "named\n"
    refused = command("run", "-c", "in-memory", "--python", sys.executable, "--", "true")
    assert refused.returncode == 2
    assert "has no option 'python'" in refused.stderr


def test_a_configured_python_is_not_overridden_by_the_commands_own_choice(command: Command) -> None:
    interpreter = command.directory / "python"
    interpreter.write_text("#!/bin/sh\necho the configured python\n")
    interpreter.chmod(0o755)
    (command.project / "fray.toml").write_text(
        f'[clusters.here]\nbackend = "local"\naddress = "{command.store}"\npython = "{interpreter}"\n'
    )
    assert command("run", "-c", "here", "--", "python").stdout == "the configured python\n"


# list, describe, logs, wait, fetch, delete, purge


def test_list_in_a_pipe_is_aligned_lines_with_a_header(command: Command) -> None:
    command("run", "--job-id", "first", "--", "exit 3")
    command("run", "--job-id", "second-and-longer", "--", "printf '%s\\n' '[bold]a' '\x1b[31m'")
    done = command("list")
    header, second, first = done.stdout.splitlines()
    assert header.split() == ["ID", "STATUS", "EXIT", "SUBMITTED", "DURATION", "COMMAND"]
    assert first.split()[:3] == ["first", "FAILED", "3"]
    assert second.split()[:3] == ["second-and-longer", "SUCCEEDED", "0"]
    assert header.index("COMMAND") == first.index("exit 3") == second.index("printf")
    assert "[bold]a" in second
    assert "\x1b" not in done.stdout
    assert [info["id"] for info in command.json("list")] == ["second-and-longer", "first"]
    assert [info["id"] for info in command.json("list", "--limit", "1")] == ["second-and-longer"]
    assert [info["id"] for info in command.json("list", "--status", "failed")] == ["first"]
    assert command("list", "--status", "lost").returncode == 2


def test_describe_shows_everything(command: Command) -> None:
    command("run", "--job-id", "told", "-m", "team=blue", "-m", "note=[red]x[/red]", "--", "exit 3")
    shown = command("describe", "told").stdout
    for line in (
        r"Status: +FAILED",
        r"Reason: +EXITED",
        r"Exit code: +3",
        r"Message: +the command exited with 3",
        r"Command: +exit 3",
        r"Attempt 1: +started \S+, ran \S+, exit code 3, EXITED, its output begins at byte 0",
    ):
        assert re.search(f"^{line}$", shown, re.MULTILINE), shown
    assert "note=[red]x[/red]" in shown
    info = command.json("describe", "told")
    assert info["id"] == "told"
    assert info["metadata"] == {"team": "blue", "note": "[red]x[/red]"}
    assert len(info["attempts"]) == 1


def test_logs_are_the_exact_bytes(command: Command) -> None:
    content = bytes(range(256)) * 3 + b"\n[bold]no markup[/bold]\r\nlast without newline"
    (command.project / "content").write_bytes(content)
    assert command.submit("--job-id", "bytes", "--", "cat content") == "bytes"
    assert command("wait", "bytes").returncode == 0
    for arguments in (("logs", "bytes"), ("logs", "-f", "bytes")):
        process = command.start(*arguments)
        output, errors = process.communicate(timeout=DEADLINE_SECONDS)
        assert (process.returncode, output, errors) == (0, content, b"")
    command("run", "--job-id", "lines", "--", "seq 5")
    assert command("logs", "--tail", "2", "lines").stdout == "4\n5\n"
    assert command("logs", "--tail", "0", "lines").stdout == ""
    assert command.json("logs", "lines") == {"job_id": "lines", "logs": "1\n2\n3\n4\n5\n"}


def test_logs_follow_a_running_job_and_ctrl_c_leaves_it_alone(command: Command) -> None:
    job_id = command.submit("--", "printf 'half a line'; until [ -e release ]; do sleep 0.02; done; echo , whole")
    process = command.start("logs", "-f", job_id)
    read_until(process, process.stdout, b"half a line")
    interrupt(process)
    _, errors = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, errors) == (130, b"")
    (command.project / "release").touch()
    assert command("wait", job_id).returncode == 0
    assert command("logs", job_id).stdout == "half a line, whole\n"


def test_logs_into_a_reader_who_leaves_is_quiet(command: Command) -> None:
    job_id = command.submit("--", "seq 1000000")
    assert command("wait", job_id).returncode == 0
    process = command.start("logs", job_id)
    read_until(process, process.stdout, b"1\n")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(DEADLINE_SECONDS) == 141
    process.stderr.close()


def test_wait_exits_as_the_job_did_or_when_the_time_is_over(command: Command) -> None:
    job_id = command.submit("--", UNTIL_RELEASED + "; exit 9")
    early = command("wait", "--timeout", "0", job_id)
    assert (early.returncode, early.stdout) == (124, "")
    assert "it goes on" in early.stderr
    assert command.json("wait", "--timeout", "0", job_id)["error"]["type"] == "WaitTimeoutError"
    (command.project / "release").touch()
    done = command("wait", "--timeout", "1m", job_id)
    assert (done.returncode, done.stdout) == (9, "")
    assert "FAILED (EXITED, exit code 9)" in done.stderr
    assert command.json("wait", job_id)["exit_code"] == 9


def test_fetch_prints_what_it_copied(command: Command) -> None:
    command("run", "--job-id", "made", "--", "mkdir $FRAY_OUTPUT_DIR/d; echo 1 > $FRAY_OUTPUT_DIR/d/a")
    assert command("fetch", "made", "to").stdout == "to/d/a\n"
    assert (command.project / "to" / "d" / "a").read_text() == "1\n"
    assert command.json("fetch", "made") == {"job_id": "made", "files": ["d/a"]}


def test_delete_stops_what_it_can_and_names_what_it_cannot(command: Command) -> None:
    job_id = command.submit("--", ENDLESS)
    done = command("delete", "unknown", job_id)
    assert (done.returncode, done.stdout) == (2, f"{job_id}\n")
    assert "fray: error: " in done.stderr
    assert "unknown" in done.stderr
    assert "STOPPED" in command("wait", job_id).stderr
    answer = command.json("delete", job_id, "unknown")
    assert answer["job_ids"] == [job_id]
    assert [(each["job_id"], each["type"]) for each in answer["errors"]] == [("unknown", "JobNotFoundError")]


def test_purge_removes_finished_jobs_only(command: Command) -> None:
    running = command.submit("--job-id", "running", "--", ENDLESS)
    for name in ("a", "b", "c"):
        command("run", "--job-id", name, "--", "true")
    assert command("purge").returncode == 2
    assert command("purge", "a", "--older-than", "1d").returncode == 2
    kept = command("purge", running)
    assert (kept.returncode, kept.stdout) == (2, "")
    assert command("purge", "a").stdout == "a\n"
    assert command("purge", "--older-than", "1d").stdout == ""
    assert sorted(command("purge", "--older-than", "0").stdout.split()) == ["b", "c"]
    assert [info["id"] for info in command.json("list")] == ["running"]


# Errors, plugins, the installation


def test_an_error_is_one_line_or_one_document(command: Command) -> None:
    done = command("describe", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"fray: error: .*nothing.*\n", done.stderr)
    done = command("describe", "--json", "nothing")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "JobNotFoundError"
    assert json.loads(command("list", "--json", "--nope").stdout)["error"]["type"] == "UsageError"
    assert "Traceback" in command("describe", "--debug", "nothing").stderr
    assert "Traceback" in command("--debug", "describe", "nothing").stderr


def test_an_engine_that_cannot_be_used_is_69(command: Command) -> None:
    (command.project / "file").touch()
    done = command("list", "-c", f"local:{command.project}/file/store")
    assert done.returncode == 69
    assert len(done.stderr.splitlines()) == 1


def test_a_name_that_is_not_there_comes_with_what_to_do(command: Command) -> None:
    assert "did you mean 'run'?" in command("rnu").stderr
    assert command("rnu").returncode == 2
    assert "did you mean 'local'?" in command("list", "-c", "locl").stderr


def test_a_command_whose_distribution_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_entry_points", lambda group: {})
    with pytest.raises(BackendNotFoundError, match="pip install fray-tpu"):
        load_command("tpu")


def test_help_and_version(command: Command) -> None:
    shown = command("--help")
    assert shown.returncode == 0
    assert "Exit codes:" in shown.stdout
    assert command("run", "-h").returncode == 0
    assert re.fullmatch(r"fray \d+\.\d+\S*\n", command("--version").stdout)
    bare = command()
    assert (bare.returncode, bare.stdout) == (2, "")
    assert "Usage: fray" in bare.stderr


def test_help_imports_no_backend_and_nothing_heavy(command: Command) -> None:
    program = (
        "import sys; from fray.cli import main; main(['--help']); "
        "print([name for name in ('rich', 'pydantic', 'fray.backend.local') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], env=command.environment, capture_output=True, text=True)
    assert done.stderr == "[]\n"


def test_a_plugin_brings_a_command(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "plugins"
    group = (
        "import typer\nimport fray\napp = typer.Typer()\n"
        "@app.command()\ndef one(name: str):\n    print('hello', name)\n"
        "@app.command()\ndef two():\n    raise fray.PlatformError('it is down: start it')\n"
    )
    install_command(folder, "extra", group)
    single = "import typer\napp = typer.Typer()\n@app.command()\ndef only(name: str):\n    raise typer.Exit(5)\n"
    install_command(folder, "single", single, distribution="fray-single")
    install_command(folder, "broken", "import no_such_module\n", distribution="fray-broken")
    install_command(folder, "odd", "app = 3\n", distribution="fray-odd")
    env = {"PYTHONPATH": str(folder)}
    # Help names all of them and loads none: the broken one would show.
    shown = command("--help", env=env)
    assert shown.returncode == 0
    assert re.search(r"broken +\(brought by fray-broken 1\.2\.3\)", shown.stdout)
    assert command("extra", "one", "world", env=env).stdout == "hello world\n"
    assert command("extra", "--help", env=env).returncode == 0
    failed = command("extra", "two", env=env)
    assert (failed.returncode, failed.stderr) == (69, "fray: error: it is down: start it\n")
    assert command("single", "x", env=env).returncode == 5
    broken = command("broken", env=env)
    assert broken.returncode == 2
    assert "fray-broken 1.2.3" in broken.stderr
    assert "no_such_module" in broken.stderr
    assert "Traceback" not in broken.stderr
    assert "no typer application" in command("odd", env=env).stderr
    assert command("list", env=env).returncode == 0


def test_two_plugins_of_one_name_are_both_named(command: Command, tmp_path: Path) -> None:
    for distribution in ("fray-a", "fray-b"):
        install_command(tmp_path / "plugins", "same", "", distribution=distribution)
    done = command("same", env={"PYTHONPATH": str(tmp_path / "plugins")})
    assert done.returncode == 2
    assert "fray-a 1.2.3 and fray-b 1.2.3" in done.stderr or "fray-b 1.2.3 and fray-a 1.2.3" in done.stderr


def test_backends_says_what_is_there_and_what_could_be(command: Command) -> None:
    shown = command("backends").stdout
    assert re.search(r"^local +fray-local \d", shown, re.MULTILINE)
    named = {each["name"]: each for each in command.json("backends")}
    assert named["local"]["installed"]
    for name in ("docker", "ray"):
        if not named[name]["installed"]:
            assert named[name]["install"] == f"pip install fray-{name}"


def test_doctor_finds_nothing_where_nothing_is_wrong(command: Command) -> None:
    done = command("doctor")
    assert done.returncode == 0, done.stdout
    assert "ok    backend 'local' of fray-local" in done.stdout
    assert "no problem found" in done.stdout
    answer = command.json("doctor")
    assert answer["ok"]
    assert all(check["ok"] for check in answer["checks"])


def test_doctor_names_each_problem_and_its_remedy(command: Command, tmp_path: Path) -> None:
    install_command(tmp_path / "plugins", "broken", "import no_such_module\n", distribution="fray-broken")
    (command.project / "fray.toml").write_text(
        f'default = "good"\n[clusters.good]\nbackend = "local"\naddress = "{command.store}"\n'
        '[clusters.lost]\nbackend = "nowhere"\n'
    )
    env = {"PYTHONPATH": str(tmp_path / "plugins"), "FRAY_CLUSTER": "", "FRAY_CLUSTR": SECRET}
    done = command("doctor", env=env)
    assert done.returncode == 1
    assert re.search(r"FAIL .*'broken' of fray-broken.*\n +fix: pip install .*fray-broken", done.stdout)
    assert re.search(r"FAIL .*'lost'.*\n +fix: ", done.stdout)
    assert re.search(r"ok +the default cluster .*can be reached", done.stdout)
    assert "2 problems found" in done.stdout
    assert "FRAY_CLUSTR is set" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_doctor_says_what_is_wrong_with_the_configuration(command: Command) -> None:
    (command.project / "fray.toml").write_text("default = \n")
    done = command("doctor", "-c", command.spec)
    assert done.returncode == 1
    assert "is not valid TOML" in done.stdout


# On a terminal


def test_on_a_terminal_the_list_is_a_table(command: Command) -> None:
    command("run", "--job-id", "shown", "--", "echo '[bold]x[/bold]'; " + "true " * 100)
    exit_code, screen = command.on_terminal("list")
    assert exit_code == 0
    assert "\x1b[" in screen
    assert "shown" in screen
    assert "ago" in screen
    assert "[bold]x[/bold]" in screen
    assert "…" in screen  # what does not fit is cut, in the last column only
    exit_code, screen = command.on_terminal("describe", "shown")
    assert exit_code == 0
    assert "\x1b[" in screen
    assert "[bold]x[/bold]" in screen


def test_on_a_terminal_a_pending_job_is_shown_as_progress(command: Command) -> None:
    cores = str(os.cpu_count())
    command.submit("--cpu", cores, "--", UNTIL_RELEASED)
    exit_code, screen = command.on_terminal(
        *("run", "--cpu", cores, "--", "echo '[bold]done[/bold]'; exit 8"),
        when_seen={"PENDING": (command.project / "release").touch},
    )
    assert exit_code == 8
    hidden, shown = screen.index("\x1b[?25l"), screen.index("\x1b[?25h")  # the spinner hides the cursor
    assert hidden < screen.index("PENDING") < shown < screen.index("[bold]done[/bold]")


def test_on_a_terminal_what_is_said_begins_below_an_unfinished_line(command: Command) -> None:
    _, screen = command.on_terminal("run", "--", "printf unfinished")
    assert re.search(r"unfinished\r\n(\x1b\S*)?fray: fray-\d+ SUCCEEDED", screen)
