"""The startup script and the agent that it brings: as a TPU VM runs them, with a metadata server of our own."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from fray.backend.ray._local_ray import NODE_PORTS, port_options
from fray.backend.tpu import _agent, _startup
from fray.backend.tpu._host_services import HostServices
from fray.backend.tpu._labels import LEASE_UNTIL, lease_value, parse_lease
from fray.backend.tpu._startup import RayJoin, startup_script
from fray.errors import InvalidTypeError, InvalidValueError
from fray.ports import free_ports
from tests.ray.conftest import RayHead
from tests.requirements import missing
from tools import docker_base_image

DEADLINE_SECONDS = 60
NODE = "projects/some-project/locations/us-central1-a/nodes/train-0"
QUEUED = "projects/some-project/locations/us-central1-a/queuedResources/train"
SECRET = "projects/some-project/secrets/ray-token"
JOIN = RayJoin("10.128.0.2:6379", "2.60.0", "3.11")


class MemoryNodes:
    """One node, in memory."""

    def __init__(self, *, created: datetime | None = None) -> None:
        self.node: dict[str, Any] | None = {
            "name": NODE,
            "queuedResource": QUEUED,
            "createTime": (created or datetime.now(UTC)).isoformat().replace("+00:00", "Z"),
            "labels": {"fray-managed-by": "fray-tpu", LEASE_UNTIL: lease_value(datetime.now(UTC)), "team": "ours"},
        }
        self.deleted: list[str] = []
        self.is_orphan = False

    def get(self, path: str) -> dict[str, Any] | None:
        return self.node if path == NODE else None

    def set_labels(self, path: str, labels: dict[str, str]) -> None:
        assert self.node is not None
        self.node = {**self.node, "labels": dict(labels)}

    def delete(self, path: str) -> bool:
        if self.is_orphan and path == QUEUED:
            return False
        self.deleted.append(path)
        was_there = self.node is not None
        self.node = None
        return was_there

    @property
    def lease(self) -> datetime | None:
        assert self.node is not None
        return parse_lease(self.node["labels"][LEASE_UNTIL])


class HostProcess:
    """A startup script that runs as a process of this machine, with a stub in Ray's place."""

    def __init__(self, directory: Path, services: HostServices, script: str, **variables: str) -> None:
        self.directory = directory
        self.fray = directory / "opt-fray"
        self.stub = directory / "stub"
        self.stub.mkdir(parents=True)
        os.mkfifo(self.stub / "pipe")
        # Kept open for writing too: the agent's Ray may come and go without an end of the file.
        self._events = os.fdopen(os.open(self.stub / "pipe", os.O_RDWR))
        self.script = directory / "startup-script"
        self.script.write_text(script)
        self.script.chmod(0o755)
        ray = directory / "ray"
        ray.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stub_ray.py")} "$@"\n')
        ray.chmod(0o755)
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "FRAY_TPU_DIRECTORY": str(self.fray),
            "FRAY_RAY": str(ray),
            "FRAY_TPU_CHIPS": "4",
            "STUB_RAY": str(self.stub),
            **services.environment(),
            **variables,
        }
        self.log = directory / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [str(self.script)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def next_event(self) -> str:
        return self._events.readline().strip()

    def starts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.stub / "starts").read_text().splitlines()]

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(DEADLINE_SECONDS)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._events.close()


@pytest.fixture
def nodes() -> MemoryNodes:
    return MemoryNodes()


@pytest.fixture
def serve(nodes: MemoryNodes) -> Iterator[Callable[..., HostServices]]:
    started: list[HostServices] = []

    def make(worker_id: int = 0, secrets: dict[str, str] | None = None, backend: Any = None) -> HostServices:
        services = HostServices(
            backend or nodes,
            project="some-project",
            zone="us-central1-a",
            node="train-0",
            worker_id=worker_id,
            accelerator_type="v5litepod-16",
            topology="4x4",
            secrets=secrets,
        )
        started.append(services)
        return services

    yield make
    for services in started:
        services.close()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., HostProcess]]:
    made: list[HostProcess] = []

    def make(services: HostServices, script: str | None = None, **variables: str) -> HostProcess:
        script = startup_script("v5litepod-16", JOIN) if script is None else script
        process = HostProcess(tmp_path / f"host-{len(made)}", services, script, **variables)
        made.append(process)
        return process

    yield make
    for each in made:
        each.close()


# The script as a text

VARIANTS = {
    "joins": {"join": JOIN},
    "joins nothing": {},
    "all": {
        "join": RayJoin(
            "head.internal:6379", "2.60.0", "3.12", SECRET, ("jax[tpu]", "flax >= 0.10; python_version > '3'")
        ),
        "lease_seconds": 7200,
        "time_to_live_seconds": 86400.5,
        "setup": "#!/bin/bash\necho \"it's $HOME\" `date` \\\\ $(uname)\ncat <<'SETUP'\nSETUP\nSETTINGS\n",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_shellcheck_finds_nothing(variant: str, tmp_path: Path) -> None:
    if not shutil.which("shellcheck"):
        missing("shellcheck", "apt install shellcheck")
    script = tmp_path / "startup-script"
    script.write_text(startup_script("v5litepod-16", **VARIANTS[variant]))  # type: ignore[arg-type]
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_the_agent_needs_the_standard_library_only_and_runs_on_python_3_8() -> None:
    source = Path(_agent.__file__).read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported <= set(sys.stdlib_module_names)
    # What 3.8 would evaluate and does not know: built-in generics outside annotations, and these methods.
    assert not re.search(r"\.remove(prefix|suffix)\(|datetime\.UTC|zip\(.*strict=", source)


def test_the_agent_and_the_provisioner_mean_the_same_label() -> None:
    assert _agent.LEASE_UNTIL == LEASE_UNTIL
    moment = datetime(2026, 3, 1, 12, 0, 5, tzinfo=UTC)
    assert time.strftime(_agent.LEASE_FORM, time.gmtime(moment.timestamp())) == lease_value(moment)


def test_a_script_that_metadata_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidValueError, match="262,144"):
        startup_script("v5litepod-16", JOIN, setup="#!/bin/sh\n" + "# padding\n" * 30_000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RayJoin("http://head:8265", "2.60.0", "3.11"), "dashboard"),
        (lambda: RayJoin("head", "2.60.0", "3.11"), "HOST:PORT"),
        (lambda: RayJoin("head:99999", "2.60.0", "3.11"), "HOST:PORT"),
        (lambda: RayJoin("-x:1", "2.60.0", "3.11"), "HOST:PORT"),
        (lambda: RayJoin("h:1\n", "2.60.0", "3.11"), "HOST:PORT"),
        (lambda: RayJoin("h:1", "latest", "3.11"), "ray_version"),
        (lambda: RayJoin("h:1", "2.60.0", "python3"), "python_version"),
        (lambda: RayJoin("h:1", "2.60.0", "3.11", "tok-3n"), "never the token"),
        (lambda: RayJoin("h:1", "2.60.0", "3.11", packages=("--index-url=http://x",)), "requirement"),
        (lambda: RayJoin("h:1", "2.60.0", "3.11", packages=(" ",)), "requirement"),
        (lambda: startup_script("v5litepod-17", JOIN), "v5litepod-16"),
        (lambda: startup_script("v5litepod-16", JOIN, lease_seconds=0), "lease_seconds"),
        (lambda: startup_script("v5litepod-16", JOIN, time_to_live_seconds=-1), "time_to_live_seconds"),
        (lambda: startup_script("v5litepod-16", JOIN, setup="echo hello"), "first line"),
    ],
)
def test_what_cannot_be_right_is_refused(make: Callable[[], object], words: str) -> None:
    with pytest.raises(InvalidValueError, match=words):
        make()


def test_a_token_that_was_given_for_its_name_is_not_repeated() -> None:
    with pytest.raises(InvalidValueError) as caught:
        RayJoin("h:1", "2.60.0", "3.11", "s3cret-token")
    assert "s3cret-token" not in str(caught.value)


def test_what_is_of_the_wrong_type_is_refused() -> None:
    with pytest.raises(InvalidTypeError):
        RayJoin(None, "2.60.0", "3.11")  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError):
        RayJoin("h:1", "2.60.0", "3.11", packages="jax")  # type: ignore[arg-type]


def test_a_secret_has_its_latest_version_unless_one_is_named() -> None:
    assert RayJoin("h:1", "2.60.0", "3.11", SECRET).secret_version == f"{SECRET}/versions/latest"
    assert RayJoin("h:1", "2.60.0", "3.11", f"{SECRET}/versions/3").secret_version == f"{SECRET}/versions/3"


# Joining Ray


def test_ray_is_started_with_what_the_metadata_says(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    process = host(serve(worker_id=2))
    process.start()
    assert process.next_event() == "started 1"
    (start,) = process.starts()
    assert start["arguments"] == [
        "start",
        "--address=10.128.0.2:6379",
        '--resources={"TPU": 4}',
        "--disable-usage-stats",
        "--block",
    ]
    environment = start["environment"]
    assert environment["TPU_NAME"] == "train-0"
    assert environment["TPU_WORKER_ID"] == "2"
    assert environment["TPU_ACCELERATOR_TYPE"] == "v5litepod-16"
    assert environment["TPU_TOPOLOGY"] == "4x4"
    assert environment["RAY_AUTH_MODE"] == "disabled"


def test_ray_that_ends_is_started_again(serve: Callable[..., HostServices], host: Callable[..., HostProcess]) -> None:
    process = host(serve())
    (process.stub / "exit").write_text("1 0")
    process.start()
    assert [process.next_event() for _ in range(3)] == ["started 1", "started 2", "started 3"]
    assert re.search(r"Ray ended with 1; it is started again in (0\.[5-9]|1\.0) s", process.log.read_text())
    assert re.search(r"Ray ended with 0; it is started again in (1\.\d|2\.0) s", process.log.read_text())


def test_a_preemption_notice_makes_the_host_leave(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    services = serve()
    process = host(services)
    process.start()
    assert process.next_event() == "started 1"
    services.preempt()
    assert process.next_event() == "told to end"
    assert process.wait() == 0
    assert "being preempted" in process.log.read_text()


def test_a_host_that_is_shut_down_leaves(serve: Callable[..., HostServices], host: Callable[..., HostProcess]) -> None:
    process = host(serve())
    process.start()
    assert process.next_event() == "started 1"
    assert process.process is not None
    process.process.terminate()
    assert process.next_event() == "told to end"
    assert process.wait() == 0


def test_the_token_comes_from_secret_manager_and_is_seen_nowhere(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    token = "s3cret-4f1c-token"
    join = RayJoin("10.128.0.2:6379", "2.60.0", "3.11", SECRET)
    script = startup_script("v5litepod-16", join)
    process = host(serve(secrets={f"{SECRET}/versions/latest": token + "\n"}), script)
    process.start()
    assert process.next_event() == "started 1"
    (start,) = process.starts()
    assert start["environment"]["RAY_AUTH_MODE"] == "token"
    path = Path(start["environment"]["RAY_AUTH_TOKEN_PATH"])
    assert path.read_text() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert token not in json.dumps(start)
    assert token not in process.log.read_text()
    elsewhere = [each for each in process.fray.rglob("*") if each.is_file() and each != path]
    assert not [each for each in elsewhere if token.encode() in each.read_bytes()]


def test_a_secret_that_may_not_be_read_is_waited_for_and_names_the_permission(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    services = serve(secrets={f"{SECRET}/versions/latest": "token"})
    services.denied.add("secretmanager.versions.access")
    process = host(services, startup_script("v5litepod-16", RayJoin("10.128.0.2:6379", "2.60.0", "3.11", SECRET)))
    process.start()
    assert services.wait_for("GET", ":access")
    services.denied.clear()
    assert process.next_event() == "started 1"
    assert "the VM's service account needs secretmanager.versions.access" in process.log.read_text()


# The lease


def test_the_lease_of_a_slice_in_use_is_renewed_and_other_labels_stay(
    nodes: MemoryNodes, serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    services = serve()
    process = host(services, startup_script("v5litepod-16", JOIN, lease_seconds=4))
    (process.stub / "busy").touch()
    before = nodes.lease
    process.start()
    assert services.wait_for("PATCH", NODE)
    assert nodes.node is not None
    assert nodes.node["labels"]["team"] == "ours"
    assert before is not None
    assert nodes.lease is not None
    assert nodes.lease > before


def test_a_slice_that_idles_is_not_renewed(
    nodes: MemoryNodes, serve: Callable[..., HostServices], tmp_path: Path
) -> None:
    """By what decides it: that nothing happens cannot be waited for."""
    program = """
    import subprocess, sys
    titles = ("ray::IDLE", "ray::train")
    pause = ["-c", "import signal; print(flush=True); signal.pause()"]
    idle, busy = (
        subprocess.Popen([title, *pause], executable=sys.executable, stdout=subprocess.PIPE) for title in titles
    )
    for process in (idle, busy):
        process.stdout.readline()  # its title is its own by now
    print("both", flush=True)
    sys.stdin.readline()
    busy.kill()
    busy.wait()
    print("idle", flush=True)
    sys.stdin.readline()
    idle.kill()
    idle.wait()
    """
    # Below a process of their own: this one may have a Ray of another test's.
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as raylet:
        assert raylet.stdin is not None
        assert raylet.stdout is not None
        assert raylet.stdout.readline() == "both\n"
        assert _agent.busy_workers(raylet.pid) == ["ray::train"]
        print("kill", file=raylet.stdin, flush=True)
        assert raylet.stdout.readline() == "idle\n"
        assert _agent.busy_workers(raylet.pid) == []


def test_a_lease_is_never_made_shorter(
    nodes: MemoryNodes, serve: Callable[..., HostServices], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes.node is not None
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    nodes.node["labels"][LEASE_UNTIL] = lease_value(later)
    services = serve()
    for name, value in services.environment().items():
        monkeypatch.setenv(name, value)
    google = _agent.Google()
    _agent.Agent(Path(), {}, google).renew(google.host(), 3600)
    assert nodes.lease == later
    assert [method for method, _ in services.requests] == ["GET"]
    _agent.Agent(Path(), {}, google).renew(google.host(), 4 * 86400)
    assert nodes.lease is not None
    assert nodes.lease > later


def test_only_worker_0_renews(serve: Callable[..., HostServices], host: Callable[..., HostProcess]) -> None:
    first, second = serve(0), serve(1)
    script = startup_script("v5litepod-16", JOIN, lease_seconds=4)
    hosts = [host(first, script), host(second, script)]
    for each in hosts:
        (each.stub / "busy").touch()
        each.start()
        assert each.next_event() == "started 1"
    assert first.wait_for("PATCH", NODE)
    assert second.requests == []


# The time to live


def test_a_slice_whose_time_is_over_deletes_its_whole_group(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    nodes = MemoryNodes(created=datetime.now(UTC) - timedelta(hours=2))
    services = serve(backend=nodes)
    services.denied |= {"tpu.queuedResources.delete", "tpu.nodes.delete"}
    process = host(services, startup_script("v5litepod-16", time_to_live_seconds=3600))
    process.start()
    assert services.wait_for("DELETE", QUEUED)
    assert services.wait_for("DELETE", NODE), "what may be left of it"
    services.denied.clear()
    with services._changed:
        assert services._changed.wait_for(lambda: QUEUED in nodes.deleted, DEADLINE_SECONDS)
    deletions = [path for method, path in services.requests if method == "DELETE"]
    assert deletions[0] == f"/v2/{QUEUED}?force=true", "the group, before what may be left of it"
    assert "tpu.queuedResources.delete and tpu.nodes.delete" in process.log.read_text()


# The machine around it


def test_a_machine_that_is_no_tpu_vm_is_told_so(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    services = serve()
    services.set_metadata("instance/attributes/tpu-env", None)
    process = host(services)
    process.start()
    assert services.wait_for_metadata("instance/attributes/tpu-env")
    services.set_metadata("instance/attributes/tpu-env", "NODE_ID: 'train-0'\nZONE: 'us-central1-a'\n")
    assert process.next_event() == "started 1"
    assert "this is no TPU VM" in process.log.read_text()


def test_the_setup_script_runs_first_with_its_own_interpreter(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess], tmp_path: Path
) -> None:
    setup = f"#!{sys.executable}\nprint('it\\'s', 'a `setup` $HOME', file=open({str(tmp_path / 'done')!r}, 'w'))\n"
    process = host(serve(), startup_script("v5litepod-16", JOIN, setup=setup))
    process.start()
    assert process.next_event() == "started 1"
    assert (tmp_path / "done").read_text() == "it's a `setup` $HOME\n"


@pytest.mark.parametrize("hangs", [False, True])
def test_a_setup_script_that_fails_or_hangs_keeps_the_host_out_of_ray_and_it_ends_in_time(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess], tmp_path: Path, hangs: bool
) -> None:
    services = serve(backend=MemoryNodes(created=datetime.now(UTC) - timedelta(hours=2)))
    os.mkfifo(tmp_path / "gate")
    setup = f"#!/bin/sh\nread line <{tmp_path / 'gate'}\nexit 3\n"
    process = host(services, startup_script("v5litepod-16", JOIN, setup=setup, time_to_live_seconds=3600))
    process.start()
    if hangs:
        assert services.wait_for("DELETE", QUEUED)
    (tmp_path / "gate").write_text("go on\n")
    give_up = time.monotonic() + DEADLINE_SECONDS
    while "the setup script failed with 3, so this host does not join Ray" not in process.log.read_text():
        assert time.monotonic() < give_up
        time.sleep(0.05)
    assert services.wait_for("DELETE", QUEUED)
    assert not (process.stub / "starts").exists()


def test_a_slice_without_its_queued_resource_is_deleted_by_its_own_name(
    serve: Callable[..., HostServices], host: Callable[..., HostProcess]
) -> None:
    nodes = MemoryNodes(created=datetime.now(UTC) - timedelta(hours=2))
    nodes.is_orphan = True
    services = serve(backend=nodes)
    host(services, startup_script("v5litepod-16", time_to_live_seconds=3600)).start()
    assert services.wait_for("DELETE", NODE)
    assert set(nodes.deleted) == {NODE}


# In a Debian root: everything but the TPU


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: uv as it is installed here, and a stub of Ray."""
    folder = tmp_path_factory.mktemp("wheels")
    uv = distribution("uv")
    assert uv.files is not None
    tags = [line.split(": ")[1] for line in (uv.read_text("WHEEL") or "").splitlines() if line.startswith("Tag: ")]
    with zipfile.ZipFile(folder / f"uv-{uv.version}-{tags[0]}.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for file in uv.files:
            path = Path(str(file.locate()))
            if file.parts[0] == "..":  # the programs, which an installer puts beside Python
                _add(wheel, f"uv-{uv.version}.data/scripts/{file.name}", path.read_bytes(), 0o755)
            elif file.name not in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json") and file.suffix != ".pyc":
                _add(wheel, str(file), path.read_bytes(), 0o644)
        _add(wheel, f"uv-{uv.version}.dist-info/RECORD", b"", 0o644)
    with zipfile.ZipFile(folder / "pip-26.3-py3-none-any.whl", "w") as wheel:  # which nobody calls here
        info = "pip-26.3.dist-info"
        _add(wheel, f"{info}/METADATA", b"Metadata-Version: 2.1\nName: pip\nVersion: 26.3\n", 0o644)
        _add(wheel, f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", 0o644)
        _add(wheel, f"{info}/RECORD", b"", 0o644)
    info = "ray-2.60.0.dist-info"
    with zipfile.ZipFile(folder / "ray-2.60.0-py3-none-any.whl", "w") as wheel:
        _add(wheel, "stub_ray.py", Path(__file__).with_name("stub_ray.py").read_bytes(), 0o644)
        metadata = "Metadata-Version: 2.1\nName: ray\nVersion: 2.60.0\nProvides-Extra: default\n"
        _add(wheel, f"{info}/METADATA", metadata.encode(), 0o644)
        _add(wheel, f"{info}/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n", 0o644)
        _add(wheel, f"{info}/entry_points.txt", b"[console_scripts]\nray = stub_ray:main\n", 0o644)
        _add(wheel, f"{info}/RECORD", b"", 0o644)
    (folder / "uv.toml").write_text('no-index = true\nfind-links = ["/wheels"]\n')
    return folder


def _add(wheel: zipfile.ZipFile, name: str, content: bytes, mode: int) -> None:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFREG | mode) << 16
    wheel.writestr(entry, content)


@pytest.mark.xdist_group("docker")
def test_it_runs_in_a_debian_root_up_to_where_it_needs_a_tpu(
    serve: Callable[..., HostServices], tmp_path: Path, wheels: Path
) -> None:
    if subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        missing("docker", "start a Docker engine")
    try:
        docker_base_image.BASE.make()
    except (docker_base_image.CannotBeMade, OSError) as error:
        missing("docker-base-image", str(error))
    services = serve(secrets={f"{SECRET}/versions/latest": "token"})
    join = RayJoin("10.128.0.2:6379", "2.60.0", "3.11", SECRET)
    (tmp_path / "startup-script").write_text(startup_script("v5litepod-16", join, lease_seconds=7200))
    (tmp_path / "startup-script").chmod(0o755)
    stub = tmp_path / "stub"
    stub.mkdir()
    os.mkfifo(stub / "pipe")
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "UV_CONFIG_FILE": "/wheels/uv.toml"}
    variables = {**services.environment(), **offline, "UV_PYTHON_DOWNLOADS": "never", "STUB_RAY": "/stub"}
    name = f"fray-test-startup-{os.getpid()}"
    command = ["docker", "run", "--rm", "--init", "--name", name, "--network", "host"]
    for source, target in (
        (tmp_path / "startup-script", "/startup-script:ro"),
        (wheels, "/wheels:ro"),
        (stub, "/stub"),
    ):
        command += ["--volume", f"{source}:{target}"]
    for variable, value in variables.items():
        command += ["--env", f"{variable}={value}"]
    with subprocess.Popen(
        [*command, docker_base_image.BASE.name, "/startup-script"], stderr=subprocess.PIPE, text=True
    ) as process:
        killer = threading.Timer(300, process.kill)
        killer.start()
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line.strip())
                if "waiting for the TPU" in line:
                    break
            assert said[-1:] == [
                "fray: cannot see the TPU: waiting for the TPU: neither /dev/accel* nor /dev/vfio/* is there"
            ], said
            assert "fray: installs ray[default]==2.60.0 on Python 3.11" in said
            assert "fray: this is worker 0 of train-0 (v5litepod-16) in us-central1-a" in said
            # The TPU turns up.
            subprocess.run(["docker", "exec", name, "touch", "/dev/accel0"], check=True)
            with os.fdopen(os.open(stub / "pipe", os.O_RDWR)) as events:
                assert events.readline() == "started 1\n"
                services.preempt()
                assert events.readline() == "told to end\n"
            assert process.wait(DEADLINE_SECONDS) == 0
        finally:
            killer.cancel()
            subprocess.run(["docker", "kill", name], capture_output=True)
    (start,) = [json.loads(line) for line in (stub / "starts").read_text().splitlines()]
    assert start["arguments"][:3] == ["start", "--address=10.128.0.2:6379", '--resources={"TPU": 4}']
    assert start["environment"]["RAY_AUTH_TOKEN_PATH"] == "/opt/fray/ray-token"


# With Ray itself

RAY_PROGRAM = """
import json, os, ray

@ray.remote(num_cpus=0, resources={"TPU-v5litepod-16-head": 1, "TPU": 4})
def look():
    node = ray.get_runtime_context().get_node_id()
    (found,) = [each for each in ray.nodes() if each["NodeID"] == node]
    return {"resources": found["Resources"], "labels": found["Labels"]}

@ray.remote(num_cpus=0, resources={"train-0": 1, "TPU": 4}, max_retries=0)
def train(events, gate):
    print("trains", file=open(events, "w"), flush=True)
    open(gate).read()

ray.init(address=os.environ["ADDRESS"], log_to_driver=False)
print(json.dumps(ray.get(look.remote())), flush=True)
try:
    ray.get(train.remote(os.environ["EVENTS"], os.environ["GATE"]))
except ray.exceptions.RayError as error:
    print(type(error).__name__, flush=True)
"""


@pytest.fixture
def head() -> Iterator[RayHead]:
    head = RayHead()
    yield head
    head.stop()


@pytest.mark.xdist_group("ray")
def test_a_host_joins_ray_as_run_on_tpu_wants_it_and_leaves_when_it_is_preempted(
    nodes: MemoryNodes, serve: Callable[..., HostServices], head: RayHead, tmp_path: Path
) -> None:
    ray = Path(sys.executable).with_name("ray")
    gate, events = tmp_path / "gate", tmp_path / "events"
    os.mkfifo(gate)
    os.mkfifo(events)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TPU_", "FRAY_"))},
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    ports = port_options(NODE_PORTS, free_ports(len(NODE_PORTS)))
    services = serve()
    before = nodes.lease
    script = tmp_path / "startup-script"
    script.write_text(startup_script("v5litepod-16", RayJoin(head.address, "2.60.0", "3.11"), lease_seconds=16))
    script.chmod(0o755)
    joining = {
        **environment,
        **services.environment(),
        "FRAY_TPU_DIRECTORY": str(tmp_path / "opt-fray"),
        "FRAY_RAY": str(ray),
        "FRAY_RAY_OPTIONS": " ".join(["--num-cpus=1", "--node-ip-address=127.0.0.1", *ports]),
        "FRAY_TPU_CHIPS": "4",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }
    driving = {**environment, "ADDRESS": head.address, "EVENTS": str(events), "GATE": str(gate)}
    with (tmp_path / "log").open("wb") as log:
        host = subprocess.Popen([str(script)], env=joining, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    driver = subprocess.Popen([sys.executable, "-c", RAY_PROGRAM], env=driving, stdout=subprocess.PIPE, text=True)
    try:
        assert driver.stdout is not None
        seen = json.loads(driver.stdout.readline())
        assert {name: seen["resources"][name] for name in ("TPU", "train-0", "TPU-v5litepod-16-head")} == {
            "TPU": 4,
            "train-0": 1,
            "TPU-v5litepod-16-head": 1,
        }
        labels = {name.removeprefix("ray.io/"): value for name, value in seen["labels"].items()}
        assert labels["tpu-slice-name"] == "train-0"
        assert labels["tpu-worker-id"] == "0"
        assert labels["tpu-topology"] == "4x4"
        assert labels["tpu-pod-type"] == "v5litepod-16"
        assert events.read_text() == "trains\n"
        assert services.wait_for("PATCH", NODE)
        assert before is not None
        assert nodes.lease is not None
        assert nodes.lease > before
        services.preempt()
        assert host.wait(DEADLINE_SECONDS) == 0
        assert driver.stdout.readline().strip() in ("NodeDiedError", "WorkerCrashedError", "NodePreemptedError")
        assert "leaving: worker 0 of train-0 is being preempted" in (tmp_path / "log").read_text()
    finally:
        for process in (driver, host):
            process.terminate()
            try:
                process.wait(DEADLINE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        assert driver.stdout is not None
        driver.stdout.close()


def test_the_package_has_what_the_script_is_made_of() -> None:
    assert _startup._source("_agent.py")
    assert _startup._source("_startup.sh")
