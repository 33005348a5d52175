"""The hosts of a stand-in's slices as processes of this machine, which really run the startup script.

Each host has a metadata server and an API of its own on loopback, to which its environment leads it. What is of a host
is known by a variable in its environment, so that the end of the host is the end of all that it started.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.cloud import tpu_v2
from google.protobuf.json_format import MessageToDict

from fray.backend.tpu._host_services import HostServices
from fray.backend.tpu.testing._world import ApiError, World
from fray.ports import free_ports
from fray.tpu import tpu_type

__all__ = ["Machine", "Machines"]

_MARK = "FRAY_TPU_STAND_IN_HOST"
_TICK_SECONDS = 0.05
_LAST_RESORT_SECONDS = 10.0
_YOUNG_SECONDS = 30.0
_PF_KTHREAD = 0x00200000  # in the flags of proc_pid_stat(5); see linux/sched.h
_OBJECT_STORE_BYTES = 80_000_000  # Ray takes no less than 75 MB
_AGENT_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
_READY, _PREEMPTED = tpu_v2.Node.State.READY, tpu_v2.Node.State.PREEMPTED


@dataclass
class Machine:
    """One host.

    Attributes:
        node: The id of its slice.
        worker_id: Its place in there.
        directory: Its files; what it says is in `log`.
        process: What runs the startup script; None where there is none.
        services: What it can reach.
        ray_directory: Where its Ray keeps its files.
    """

    node: str
    worker_id: int
    directory: Path
    process: subprocess.Popen[bytes] | None
    services: HostServices
    # A short path: Ray's sockets lie below it, and the kernel allows them a hundred characters.
    ray_directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="frt-", dir="/tmp")))

    @property
    def log(self) -> str:
        """What it has said so far."""
        return (self.directory / "log").read_text(errors="replace")

    @property
    def mark(self) -> str:
        """The value by which its processes are known."""
        return f"{self.directory}"


class Machines:
    """Runs the hosts of all slices that a stand-in has.

    Args:
        world: The slices.
        directory: Where each host gets a directory.
        environment: More variables for the hosts. Unless they say otherwise, a host that joins a Ray cluster does so by
            this environment's own Ray, with one core and as many chips as its type has; `FRAY_RAY_OPTIONS` has more
            options for `ray start`.
        notice_seconds: Between the notice of a preemption and the end.
        secrets: Values in Secret Manager, by the full names of their versions.
    """

    def __init__(
        self,
        world: World,
        directory: Path,
        *,
        environment: Mapping[str, str] | None = None,
        notice_seconds: float = 5.0,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self._world = world
        self._directory = directory
        self._environment = dict(environment or {})
        self._notice_seconds = notice_seconds
        self._secrets = dict(secrets or {})
        self._machines: dict[str, list[Machine]] = {}
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        # What happens to slices is noted under the world's lock, and done outside of it.
        self._news: queue.SimpleQueue[tuple[str, tpu_v2.Node | None] | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        world.on_node = lambda name, node: self._news.put((name, node))
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._tick, self._work)]
        for thread in self._threads:
            thread.start()

    def of(self, node: str) -> list[Machine]:
        """Return the running hosts of a slice, by its id."""
        with self._changed:
            return list(self._machines.get(node, ()))

    def wait_for(self, node: str, count: int, timeout: float = 60.0) -> bool:
        """Wait until that many hosts of a slice run; return whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: len(self._machines.get(node, ())) == count, timeout)

    def close(self) -> None:
        """End all hosts."""
        self._stopping.set()
        self._news.put(None)
        for thread in self._threads:
            thread.join()
        for node in list(self._machines):
            self._end(node, notice_seconds=0.0)

    def _tick(self) -> None:
        """Let what is due be done though nobody calls."""
        while not self._stopping.wait(_TICK_SECONDS):
            self._world.advance()

    def _work(self) -> None:
        while (news := self._news.get()) is not None:
            name, node = news
            node_id = name.rpartition("/")[2]
            if node is None:
                self._end(node_id, notice_seconds=0.0)
            elif node.state == _READY and node_id not in self._machines:
                self._boot(node)
            elif node.state == _PREEMPTED:
                threading.Thread(target=self._end, args=(node_id, self._notice_seconds), daemon=True).start()

    def _boot(self, node: tpu_v2.Node) -> None:
        _, project, _, zone, _, node_id = node.name.split("/")
        booted = []
        for worker_id in range(tpu_type(node.accelerator_type).hosts):
            directory = self._directory / f"{node_id}-{worker_id}"
            directory.mkdir(parents=True, exist_ok=True)
            services = HostServices(
                _NodesOf(self._world),
                project=project,
                zone=zone,
                node=node_id,
                worker_id=worker_id,
                accelerator_type=node.accelerator_type,
                topology=topology_of(node.accelerator_type),
                secrets=self._secrets,
            )
            machine = Machine(node_id, worker_id, directory, None, services)
            if script := node.metadata.get("startup-script"):
                machine.process = self._run(machine, script)
            booted.append(machine)
        with self._changed:
            self._machines[node_id] = booted
            self._changed.notify_all()

    def _run(self, machine: Machine, script: str) -> subprocess.Popen[bytes]:
        path = machine.directory / "startup-script"
        path.write_text(script)
        path.chmod(0o700)
        given = {**os.environ, **self._environment}
        variables = {
            **_of_shared_machine(),
            **given,
            "FRAY_RAY_OPTIONS": f"{_ray_options(machine)} {given.get('FRAY_RAY_OPTIONS', '')}".strip(),
            "FRAY_TPU_DIRECTORY": str(machine.directory / "fray"),
            "FRAY_LIBTPU_LOCKFILE": str(machine.directory / "libtpu_lockfile"),
            **machine.services.environment(),
            _MARK: machine.mark,
        }
        with (machine.directory / "log").open("ab") as log:
            return subprocess.Popen(
                [str(path)],
                cwd=machine.directory,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _end(self, node_id: str, notice_seconds: float) -> None:
        machines = self.of(node_id)
        if notice_seconds:
            for machine in machines:
                machine.services.preempt()
            self._stopping.wait(notice_seconds)
        with self._ending:  # one at a time: a preempted slice may be deleted while it has its notice
            if self.of(node_id) != machines:
                return  # that is what happened; another of its name may be there by now
            for machine in machines:
                _kill_marked(machine.mark)
                if machine.process is not None:
                    machine.process.wait()
                machine.services.close()
                shutil.rmtree(machine.ray_directory, ignore_errors=True)
            with self._changed:
                self._machines.pop(node_id, None)
                self._changed.notify_all()


class _NodesOf:
    """The slices as the hosts' own API has them."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get(self, path: str) -> dict[str, Any] | None:
        with self._world.lock:
            self._world.advance()
            try:
                node = self._world.get_node(tpu_v2.GetNodeRequest(name=path))
            except ApiError:
                return None
            return dict(MessageToDict(tpu_v2.Node.pb(node)))

    def set_labels(self, path: str, labels: dict[str, str]) -> None:
        with self._world.lock:
            node = tpu_v2.Node(name=path, labels=labels)
            self._world.update_node(tpu_v2.UpdateNodeRequest(node=node, update_mask={"paths": ["labels"]}))

    def delete(self, path: str) -> bool:
        with self._world.lock, suppress(ApiError):
            if "/nodes/" in path:
                self._world.delete_node(tpu_v2.DeleteNodeRequest(name=path))
            else:
                self._world.delete_queued_resource(tpu_v2.DeleteQueuedResourceRequest(name=path, force=True))
            return True
        return False


def topology_of(accelerator_type: str) -> str:
    """Return the shape of a slice, such as `4x4`: the most compact one of its chips."""
    found = tpu_type(accelerator_type)
    sides = [1, 1, 1] if found.generation in ("v4", "v5p", "v7x") else [1, 1]
    chips = found.chips
    while chips > 1:
        sides[sides.index(min(sides))] *= 2
        chips //= 2
    # Google writes the long side last, but for a single host's 2x2x1.
    shape = sorted(sides) if min(sides) > 1 else sorted(sides, reverse=len(sides) == 3)
    return "x".join(map(str, shape))


def _of_shared_machine() -> dict[str, str]:
    """Return what hosts are given that share a machine: its Ray, where it has one, and make-believe chips."""
    ray = Path(sys.executable).with_name("ray")
    return {"FRAY_TPU_CHIPS": "by-type", **({"FRAY_RAY": str(ray)} if ray.exists() else {})}


def _ray_options(machine: Machine) -> str:
    """Return the options by which Ray's nodes on one machine leave each other alone."""
    # In one folder, nodes that start side by side choose the same names for their sockets. And a raylet that is not
    # told where its agents listen ends when these have not said so within 15 s (Ray 2.60, hard-coded), which on a
    # machine where several nodes start at the same time is too short.
    options: dict[str, object] = {
        "num-cpus": 1,
        "object-store-memory": _OBJECT_STORE_BYTES,
        "temp-dir": machine.ray_directory,
    }
    options |= zip(_AGENT_PORTS, free_ports(len(_AGENT_PORTS)), strict=True)
    return " ".join(f"--{name}={value}" for name, value in {**options, "node-ip-address": "127.0.0.1"}.items())


def _kill_marked(mark: str) -> None:
    """Kill every process of a host, those too that left its session and its tree."""
    wanted = f"{_MARK}={mark}".encode()
    deadline = time.monotonic() + _LAST_RESORT_SECONDS
    while time.monotonic() < deadline:
        if not (found := _marked(wanted)):
            if not _is_any_between_programs():
                return
            time.sleep(0.01)
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)


def _is_any_between_programs() -> bool:
    """Whether a young process has no environment at the moment: one in `exec` has not got it yet, and may be marked."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    youngest = (uptime - _YOUNG_SECONDS) * os.sysconf("SC_CLK_TCK")
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, *rest = path.read_text(errors="replace").rpartition(")")[2].split()
            is_of_kernel = int(rest[5]) & _PF_KTHREAD
            is_young = state not in "ZX" and not is_of_kernel and int(rest[18]) > youngest
            if is_young and not path.with_name("environ").read_bytes():
                return True
    return False


def _marked(wanted: bytes) -> list[int]:
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids
