"""`fray tpu` as its users meet it, talking to the stand-in that this test holds.

What needs a process of its own (signals, a terminal, ssh in its place) has one; the rest is called in this one, which
has Google's client loaded already.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fray.backend.tpu import SystemClock
from fray.backend.tpu.testing import Ending, FakeCloud, Fault, Supply
from fray.cli import main
from tests.core.cli_harness import DEADLINE_SECONDS, Command, interrupt, read_until

from .sshd import Server, make_key, require_openssh

QUICK = {"accept_seconds": 0.05, "queue_seconds": 0.1, "boot_seconds": 0.1, "delete_seconds": 0.05}


class TpuCommand(Command):
    """The command, in an environment without Google, with `--fake` leading to the test's own stand-in."""

    def __init__(self, directory: Path, cloud: FakeCloud, capfd: pytest.CaptureFixture[str]) -> None:
        super().__init__(directory)
        self.cloud = cloud
        self.capfd = capfd
        stand_in = directory / "stand-in"
        stand_in.mkdir()
        (stand_in / "server.json").write_text(json.dumps({"address": cloud.address, "project": cloud.project}))
        # Held as the stand-in's own process holds it: whoever finds it free would start one.
        self.lock = (stand_in / "lock").open("a")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        for name in [name for name in self.environment if name.startswith(("GOOGLE_", "CLOUDSDK_", "XDG_CONFIG"))]:
            del self.environment[name]
        self.environment |= {
            "HOME": str(directory / "home"),
            "FRAY_TPU_FAKE_DIRECTORY": str(stand_in),
            "FRAY_TPU_OWNER": "jane",
        }

    def tpu(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return self.here("tpu", *arguments, env=env)

    def here(self, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Call the command in this process."""
        self.capfd.readouterr()
        with pytest.MonkeyPatch.context() as here:
            for name in os.environ.keys() - self.environment.keys():
                here.delenv(name)
            for name, value in {**self.environment, **(env or {})}.items():
                here.setenv(name, value)
            here.chdir(self.project)
            code = main(arguments)
        said = self.capfd.readouterr()
        return subprocess.CompletedProcess(list(arguments), code, said.out, said.err)

    def tpu_json(self, *arguments: str) -> Any:
        name, *rest = arguments
        done = self.tpu(name, "--json", *rest)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def up(self, *arguments: str) -> None:
        done = self.tpu("up", "--fake", *arguments)
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[FakeCloud]:
    with FakeCloud(SystemClock()) as cloud:
        yield cloud


@pytest.fixture
def cloud(server: FakeCloud) -> FakeCloud:
    server.reset(SystemClock())
    server.offer(Supply(**QUICK))
    return server


@pytest.fixture
def fray(tmp_path: Path, cloud: FakeCloud, capfd: pytest.CaptureFixture[str]) -> Iterator[TpuCommand]:
    command = TpuCommand(tmp_path, cloud, capfd)
    yield command
    command.lock.close()


# Getting slices, and giving them back


def test_slices_come_are_listed_and_go(fray: TpuCommand, cloud: FakeCloud) -> None:
    done = fray.tpu("up", "v5litepod-16", "--slices", "2", "--name", "train", "--fake")
    assert (done.stdout, done.returncode) == ("train\n", 0)
    assert "train is READY: 2 x v5litepod-16 in us-central1-a until " in done.stderr
    assert "it costs $38.40 an hour" in done.stderr
    header, line = fray.tpu("list", "--fake").stdout.splitlines()
    assert header.split()[:6] == ["NAME", "STATE", "TYPE", "SLICES", "ZONE", "TIER"]
    assert line.split()[:6] == ["train", "READY", "v5litepod-16", "2", "us-central1-a", "on-demand"]
    assert "$38.40" in line
    described = fray.tpu("describe", "train", "--fake").stdout
    assert "Owner:      jane" in described
    assert "Host 7:     train-1 worker 3" in described
    done = fray.tpu("down", "train", "--fake")
    assert (done.stdout, done.stderr, done.returncode) == ("train\n", "", 0)
    assert cloud.existing() == []


def test_json_is_one_document_everywhere(fray: TpuCommand) -> None:
    group = fray.tpu_json("up", "v5litepod-4", "--name", "one", "--spot", "--fake")
    assert (group["name"], group["state"], group["tier"]) == ("one", "READY", "spot")
    assert group["cost_per_hour"]["dollars"] is None
    assert "spot prices change" in group["cost_per_hour"]["note"]
    assert [each["name"] for each in fray.tpu_json("list", "--fake")] == ["one"]
    assert fray.tpu_json("describe", "one", "--fake")["slices"][0]["hosts"][0]["worker_id"] == 0
    before = group["lease"]["until"]
    assert fray.tpu_json("renew", "one", "--ttl", "2d", "--fake")["lease_until"] > before
    assert fray.tpu_json("gc", "--fake") == {"doomed": [], "unreadable": []}
    assert fray.tpu_json("down", "one", "--fake") == {"deleted": ["one"]}
    done = fray.tpu("describe", "one", "--json", "--fake")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "SliceNotFoundError"


def test_what_was_asked_for_can_be_waited_for_later(fray: TpuCommand, cloud: FakeCloud) -> None:
    assert fray.tpu_json("up", "v5litepod-4", "--name", "train", "--no-wait", "--fake")["state"] == "QUEUED"
    assert fray.tpu("wait", "train", "--fake").stdout == "train\n"
    assert fray.tpu("wait", "train", "--fake").stdout == "train\n", "it is ready"
    fray.tpu("down", "train", "--fake")


def test_ctrl_c_deletes_what_was_asked_for(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(**{**QUICK, "queue_seconds": 1e6}))
    with fray.start("tpu", "up", "v5litepod-16", "--name", "train", "--fake") as process:
        read_until(process, process.stderr, b"QUEUED: waiting for capacity")
        assert cloud.existing() != []
        interrupt(process)
        _, said = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 130
    assert b"interrupted: train is being deleted" in said
    assert b"should that be interrupted too: `fray tpu gc --yes --fake`\nfray: nothing is left of train\n" in said
    assert cloud.existing() == []


def test_a_closed_terminal_deletes_what_was_asked_for(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(**{**QUICK, "queue_seconds": 1e6}))
    ours, theirs = pty.openpty()
    line = fray._line(["tpu", "up", "v5litepod-16", "--name", "train", "--fake"])
    with subprocess.Popen(
        line, env=fray.environment, cwd=fray.project, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        with open(ours, "rb", buffering=0) as screen:
            read_until(process, screen, b"waiting for capacity")
        os.kill(process.pid, signal.SIGHUP)
        assert process.wait(DEADLINE_SECONDS) == 128 + signal.SIGHUP
    assert cloud.existing() == []


def test_a_gc_that_fails_prints_one_document(fray: TpuCommand, cloud: FakeCloud) -> None:
    fray.up("v5litepod-4", "--name", "train", "--no-wait")
    cloud.inject(Fault("DeleteQueuedResource", code=16, message="Request had invalid authentication", times=100))
    done = fray.tpu("gc", "--yes", "--json", "--fake")
    assert done.returncode == 69
    assert json.loads(done.stdout)["failed"][0]["name"] == "train"
    assert done.stderr == ""


def test_a_terminated_up_deletes_what_was_asked_for(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(**{**QUICK, "queue_seconds": 1e6}))
    with fray.start("tpu", "up", "v5litepod-16", "--name", "train", "--fake") as process:
        read_until(process, process.stderr, b"QUEUED: waiting for capacity")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 143
    assert cloud.existing() == []


def test_a_killed_up_is_found_by_gc(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(**{**QUICK, "queue_seconds": 1e6}))
    with fray.start("tpu", "up", "v5litepod-16", "--name", "train", "--fake") as process:
        read_until(process, process.stderr, b"QUEUED: waiting for capacity")
        process.kill()
        process.communicate(timeout=DEADLINE_SECONDS)
    shown = fray.tpu("gc", "--fake")
    assert "train" in shown.stdout
    assert "nothing was deleted: --yes deletes it" in shown.stderr
    assert cloud.existing() != []
    assert fray.tpu("gc", "--yes", "--fake").stdout == "train\n"
    assert cloud.existing() == []
    assert "nothing was left behind" in fray.tpu("gc", "--fake").stderr


def test_a_choice_that_cannot_be_had_is_not_the_last(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(ending=Ending.STOCKOUT, **QUICK), zone="us-central1-a")
    zones = ["--zone", "us-central1-a", "--zone", "us-east5-b"]
    group = fray.tpu_json("up", "v5litepod-16", *zones, "--name", "train", "--fake")
    assert group["zone"] == "us-east5-b"
    assert [entry.name for entry in cloud.existing() if "us-central1-a" in entry.name] == []


def test_others_slices_are_shown_on_request_and_not_deleted(fray: TpuCommand, cloud: FakeCloud) -> None:
    fray.up("v5litepod-4", "--name", "mine")
    other = {"FRAY_TPU_OWNER": "joe"}
    assert fray.tpu("list", "--fake", env=other).stdout.count("\n") == 1
    assert "jane" in fray.tpu("list", "--all-owners", "--fake", env=other).stdout
    done = fray.tpu("down", "mine", "--fake", env=other)
    assert done.returncode == 2
    assert cloud.existing() != []
    fray.tpu("down", "mine", "--fake")


def test_on_a_terminal_a_spinner_says_what_is_waited_for(fray: TpuCommand, cloud: FakeCloud) -> None:
    cloud.offer(Supply(**{**QUICK, "queue_seconds": 3}))
    code, screen = fray.on_terminal("tpu", "up", "v5litepod-4", "--name", "train", "--fake")
    assert code == 0, screen
    assert "waiting for" in screen
    code, screen = fray.on_terminal("tpu", "list", "--fake")
    assert re.search(r" in \dh\d\dm ", screen)
    fray.tpu("down", "train", "--fake")


# What cannot be had


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [
        (Fault.quota(), 69, "uota"),
        (Fault.denied(), 69, "tpu.queuedResources.create"),
        (Fault.unauthenticated(), 69, "gcloud auth application-default login"),
        (Fault.api_disabled("fray-test"), 69, "gcloud services enable tpu.googleapis.com --project fray-test"),
        (Fault.invalid(), 69, "accelerator type"),
    ],
    ids=["quota", "permission", "credentials", "api disabled", "invalid"],
)
def test_googles_refusals_say_what_to_do(
    fray: TpuCommand, cloud: FakeCloud, fault: Fault, code: int, words: str
) -> None:
    cloud.inject(fault)
    done = fray.tpu("up", "v5litepod-16", "--name", "train", "--fake")
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert cloud.existing() == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "v5litepod-17", "--fake"], "v5litepod-16"),
        (["up", "v5litepod-16"], "--zone us-central1-a"),
        (["up", "v5litepod-16", "--fake", "--slices", "0"], "--slices"),
        (["up", "v5litepod-16", "--fake", "--ttl", "soon"], "--ttl"),
        (["up", "v5litepod-16", "--fake", "--name", "Train"], "lower-case"),
        (["up", "v5litepod-16", "--fake", "--label", "x"], "KEY=VALUE"),
        (["up", "v5litepod-16", "--fake", "--label", "1abc=x"], "a letter first"),
        (["up", "v5litepod-16", "--fake", "--reservation", ""], "reservation"),
        (["up", "v5litepod-16", "--fake", "--service-account", ""], "service_account"),
        (["up", "v5litepod-16", "--fake", "--metadata", "startup-script=x"], "startup_script"),
        (["up", "v5litepod-16", "v5litepod-8", "--fake", "--at-once", "--no-wait"], "--no-wait"),
        (["up", "v5litepod-16", "--fake", "--setup", "/no/such/file"], "--setup"),
        (["up", "v5litepod-16", "--fake", "--join-ray", "http://head:8265"], "dashboard"),
        (["up", "v5litepod-16", "-z", "us-central1-a", "--join-ray", "localhost:6379"], "each TPU host's own"),
        (["up", "v5litepod-16", "--fake", "--package", "jax"], "--join-ray"),
        (["up", "tpu7x-8", "--fake"], "GKE"),
        (["plan", "v5litepod-16", "--fake", "--script"], "--script"),
        (["types", "v9"], "v5e"),
        (["describe", "nonesuch", "--fake"], "nonesuch"),
        (["down", "nonesuch", "--fake"], "nonesuch"),
        (["exec", "nonesuch", "--fake", "true"], "no SSH"),
        (["ssh", "nonesuch", "--fake", "--print"], "nonesuch"),
        (["up", "v5litepod-16", "--fake", "--name", ""], "no name for slices"),
        (["plan", "v5litepod-16", "--zone", "us-central1"], "no zone"),
        (["down", "one", "other", "--fake"], "Nothing was deleted"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)
def test_what_cannot_be_right_is_refused(fray: TpuCommand, cloud: FakeCloud, arguments: list[str], words: str) -> None:
    done = fray.tpu(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stdout == ""
    assert cloud.journal == []


# Before anything is asked


def test_a_plan_shows_choices_and_prices_and_calls_nothing(fray: TpuCommand, cloud: FakeCloud) -> None:
    arguments = [
        "v5litepod-16",
        "v6e-16",
        "-z",
        "us-central1-a",
        "-z",
        "us-east5-b",
        "--spot",
        "--on-demand",
        "-s",
        "2",
    ]
    lines = fray.tpu("plan", *arguments).stdout.splitlines()
    assert [line.split()[:4] for line in lines[1:4]] == [
        ["v5litepod-16", "us-central1-a", "spot", "2"],
        ["v5litepod-16", "us-east5-b", "spot", "2"],
        ["v6e-16", "us-central1-a", "spot", "2"],
    ]
    assert len(lines) == 9
    assert "unknown" in lines[1]
    assert "$38.40" in lines[5]
    plan = fray.tpu_json("plan", *arguments)
    assert plan["num_slices"] == 2
    assert plan["choices"][4]["cost_per_hour"]["dollars"] == 38.4
    assert cloud.calls == []


def test_a_plan_shows_the_startup_script_which_has_the_versions_of_here(fray: TpuCommand) -> None:
    from importlib.metadata import version

    done = fray.tpu(
        "plan", "v5e-16", "-z", "us-central1-a", "--join-ray", "10.0.0.2:6379", "-p", "jax[tpu]", "--script"
    )
    assert done.stdout.startswith("#!/usr/bin/env bash\n")
    assert f"requirements=('ray[default]=={version('ray')}' 'jax[tpu]')" in done.stdout
    assert f"python_version={sys.version_info.major}.{sys.version_info.minor}" in done.stdout
    assert '"lease_seconds": 14400.0' in done.stdout


def test_what_joins_ray_gets_the_startup_script(fray: TpuCommand, cloud: FakeCloud) -> None:
    fray.up("v5litepod-4", "--name", "train", "--join-ray", "127.0.0.1:6379", "--self-delete-after", "1d")
    (node,) = cloud.world._nodes.values()
    script = node.message.metadata["startup-script"]
    assert '"ray_address": "127.0.0.1:6379"' in script
    assert '"time_to_live_seconds": 86400.0' in script
    fray.tpu("down", "train", "--fake")


def test_the_catalogue_is_shown(fray: TpuCommand) -> None:
    lines = fray.tpu("types", "v5e").stdout.splitlines()
    assert lines[0].split() == ["TYPE", "GENERATION", "CHIPS", "HOSTS", "CHIPS/HOST", "PER", "HOUR", "RUNTIME"]
    assert lines[4].split() == ["v5litepod-16", "v5e", "16", "4", "4", "$19.20", "v2-alpha-tpuv5-lite"]
    every = fray.tpu_json("types", "--region", "europe-west4")
    prices = {each["name"]: each["cost_per_hour"]["dollars"] for each in every}
    assert prices["v6e-1"] == 2.97
    assert prices["tpu7x-8"] is None


# On the hosts


@pytest.fixture
def key(tmp_path: Path) -> Path:
    require_openssh()
    return make_key(tmp_path / "key")


@pytest.fixture
def on_hosts(
    fray: TpuCommand, cloud: FakeCloud, tmp_path: Path, key: Path
) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `exec` against a group whose four hosts are one SSH server, which their addresses are led to."""
    server = Server(tmp_path / "sshd", key)
    fray.up("v5litepod-16", "--name", "train")
    # What a host's address would do: lead to its machine. The alias of its key stays the host's.
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec ssh -o HostName=127.0.0.1 -o Port={server.port} "$@"\n')
    ssh.chmod(0o755)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # `ssh` takes the place of the process.
        run = fray.tpu if arguments[0] == "exec" else functools.partial(fray, "tpu")
        return run(*arguments, env={"FRAY_TPU_SSH": str(ssh)})

    yield run
    fray.tpu("down", "train", "--fake")
    server.close()


def test_a_command_runs_on_all_hosts(on_hosts: Callable[..., subprocess.CompletedProcess[str]], key: Path) -> None:
    common = ["exec", "train", "--fake", "--identity", str(key)]
    done = on_hosts(*common, "--", "echo", "two  words")
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] two  words" for rank in range(4)]
    assert (done.stderr, done.returncode) == ("", 0)
    done = on_hosts(*common, "exit 3")
    assert done.returncode == 3
    assert "ended with 3" in done.stderr
    done = on_hosts(*common, "--timeout", "1s", "sleep 1000")
    assert done.returncode == 124
    assert "the time is over: 4 of 4 hosts were stopped" in done.stderr
    done = on_hosts(*common, "--json", "echo hello")
    assert [(end["rank"], end["exit_code"]) for end in json.loads(done.stdout)] == [(rank, 0) for rank in range(4)]
    assert "[2] hello" in done.stderr
    done = on_hosts("ssh", "train", "--fake", "--identity", str(key), "--rank", "2", "--", "echo", "$HOME")
    assert (done.stdout, done.returncode) == ("$HOME\n", 0)


def test_hosts_that_cannot_be_reached_are_said_to_be(
    on_hosts: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = on_hosts("exec", "train", "--fake", "--identity", str(make_key(tmp_path / "other")), "true")
    assert done.returncode == 69
    assert "Permission denied" in done.stderr
    assert "--identity names one that they know" in done.stderr


def test_the_ssh_command_is_printed(fray: TpuCommand, cloud: FakeCloud) -> None:
    fray.up("v5litepod-16", "--name", "train")
    done = fray.tpu(
        "ssh", "train", "--fake", "--rank", "3", "--user", "ada", "--internal-ip", "--print", "--", "uptime"
    )
    words = shlex.split(done.stdout)
    assert words[0] == "ssh"
    assert words[-3:] == ["--", "198.18.0.5", "uptime"]
    assert words[words.index("-l") + 1] == "ada"
    assert any(word.startswith("HostKeyAlias=train-") and word.endswith("-w3") for word in words)
    assert fray.tpu("ssh", "train", "--fake", "--rank", "4", "--print").returncode == 2
    fray.tpu("down", "train", "--fake")


# What is wrong here


def test_doctor_says_nothing_is_wrong_where_nobody_wants_google(fray: TpuCommand) -> None:
    done = fray.here("doctor", "-c", "local")
    assert "gcp-tpu: there are no Google credentials here" in done.stdout
    assert "FAIL" not in done.stdout


@pytest.mark.parametrize(
    ("fault", "fix"),
    [
        (Fault.unauthenticated(), "gcloud auth application-default login"),
        (Fault.api_disabled("fray-test"), "gcloud services enable tpu.googleapis.com --project fray-test"),
    ],
    ids=["credentials", "api disabled"],
)
def test_doctor_names_the_command_that_mends_it(fray: TpuCommand, cloud: FakeCloud, fault: Fault, fix: str) -> None:
    cloud.inject(Fault(**{**{name: getattr(fault, name) for name in fault.__dataclass_fields__}, "method": "*"}))
    done = fray.here(
        "doctor", "-c", "local", env={"FRAY_TPU_ENDPOINT": cloud.address, "GOOGLE_CLOUD_PROJECT": "fray-test"}
    )
    assert done.returncode == 1
    assert f"      fix: {fix}\n" in done.stdout


def test_doctor_finds_missing_credentials(fray: TpuCommand) -> None:
    nowhere = {"GOOGLE_APPLICATION_CREDENTIALS": "/no/such/key.json", "NO_GCE_CHECK": "true"}
    done = fray.here("doctor", "-c", "local", env=nowhere)
    assert done.returncode == 1
    assert "/no/such/key.json" in done.stdout
    assert "gcloud auth application-default login" in done.stdout


def test_doctor_finds_what_answers(fray: TpuCommand, cloud: FakeCloud) -> None:
    endpoint = {"FRAY_TPU_ENDPOINT": cloud.address, "GOOGLE_CLOUD_PROJECT": cloud.project}
    done = fray.here("doctor", "-c", "local", env=endpoint)
    assert done.returncode == 0, done.stdout
    assert "ok    gcp-tpu: the Cloud TPU API answers; there are no slices of yours" in done.stdout


# The stand-in of --fake


def test_the_stand_in_is_started_once_and_its_hosts_run_their_scripts(fray: TpuCommand, tmp_path: Path) -> None:
    directory, stub, ray = tmp_path / "own", tmp_path / "stub", tmp_path / "ray"
    stub.mkdir()
    os.mkfifo(stub / "pipe")
    ray.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stub_ray.py")} "$@"\n')
    ray.chmod(0o755)
    own = {"FRAY_TPU_FAKE_DIRECTORY": str(directory), "FRAY_RAY": str(ray), "STUB_RAY": str(stub)}
    try:
        arguments = ["v5litepod-8", "--name", "train", "--join-ray", "127.0.0.1:6379", "--fake"]
        assert fray.tpu("up", *arguments, env=own).returncode == 0
        with os.fdopen(os.open(stub / "pipe", os.O_RDWR)) as events:
            assert events.readline() == "started 1\n"
        start = json.loads((stub / "starts").read_text())
        assert start["arguments"][:3] == ["start", "--address=127.0.0.1:6379", '--resources={"TPU": 8}']
        first = json.loads((directory / "server.json").read_text())
        assert "READY" in fray.tpu("list", "--fake", env=own).stdout
        assert fray.tpu("down", "train", "--fake", env=own).returncode == 0
        assert json.loads((directory / "server.json").read_text()) == first
    finally:
        pid = int(json.loads((directory / "server.json").read_text())["pid"])
        os.kill(pid, signal.SIGTERM)
        with suppress(ChildProcessError):  # where it was started in this process
            os.waitpid(pid, 0)
