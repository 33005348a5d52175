"""TPU slices that are only simulated: test your pod training on a laptop.

`SimulatedSlices` starts a Ray cluster on this machine in which every host of every slice is a Ray node of its own, with
the resources and labels that Ray gives a TPU host. `run_on_tpu` takes them for the real thing; a host or a slice can be
taken away, as a preemption would, and brought back.

```python
from fray import TpuRunConfig
from fray.backend.ray.ray_cluster import RayClusterContext
from fray.backend.ray.testing import SimulatedSlices

with SimulatedSlices("v4-16", 2) as slices, RayClusterContext(slices.address) as cluster:
    print(cluster.run_on_tpu(lambda ctx: (ctx.slice_id, ctx.host_id), TpuRunConfig("v4-16", 2)))
```

The hosts share this machine's CPUs, memory, disk and address; there is no TPU in them: JAX computes on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fray.backend.ray._internals import PlainKv
from fray.backend.ray._local_ray import HEAD_PORTS, NODE_PORTS, port_options, start_on_free_ports
from fray.backend.ray._tpu_host import LOCKFILE_VARIABLE
from fray.errors import ConnectionFailedError, InvalidValueError, PlatformError
from fray.ports import free_ports
from fray.tpu import TpuType
from fray.tpu import tpu_type as type_of

__all__ = ["SimulatedHost", "SimulatedSlices"]

_START_SECONDS = 120.0
_STARTS = 3
# In the environment of every process of a host: what is taken away with it.
_MARK = "FRAY_SIMULATED_HOST"
# Ray notices the loss of a node within a second or so, where its own settings allow half a minute; and starts no
# workers in advance, of which many hosts on one machine would have more than it can bear.
_SYSTEM_CONFIG = {
    "prestart_worker_first_driver": False,
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 3,
}


@dataclass
class SimulatedHost:
    """One host of a simulated slice.

    Attributes:
        slice_name: Which slice it belongs to, as Ray knows it.
        worker_id: Its place in the slice (`TPU_WORKER_ID`).
        folder: Its own files; what stands for libtpu's lock file, `libtpu_lockfile`, is there.
        is_up: Whether it is a node of the cluster now.
    """

    slice_name: str
    worker_id: int
    folder: Path
    is_up: bool = False
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def mark(self) -> str:
        """What the environment of each of its processes holds under `FRAY_SIMULATED_HOST`."""
        return str(self.folder)

    @property
    def log(self) -> Path:
        """What its start said."""
        return self.folder / "start.log"


class SimulatedSlices:
    """A Ray cluster on this machine with simulated TPU slices.

    All methods can be called from any thread, so a host can be taken away in the middle of a run.

    Attributes:
        address: Of the cluster's head, for `RayClusterContext(address)` or `ray.init(address)`.
        dashboard: Of its dashboard, `http://…`.
        hosts: One list a slice, its hosts in the order of their worker ids.

    Args:
        tpu_type: Such as `v4-16`.
        num_slices: How many slices there are to begin with.
        cpus_per_host: What each host says it has.
        head_cpus: What the head says it has, which is no TPU host.

    Raises:
        InvalidValueError: There is no such TPU type, or a count that cannot be.
        PlatformError: Ray does not start.
    """

    def __init__(self, tpu_type: str, num_slices: int = 1, *, cpus_per_host: int = 2, head_cpus: int = 2) -> None:
        if num_slices < 0:
            raise InvalidValueError(f"num_slices cannot be negative, got {num_slices}")
        self._default = type_of(tpu_type)
        self._cpus_per_host = cpus_per_host
        self._lock = threading.RLock()
        self._types: list[TpuType] = []
        self.hosts: list[list[SimulatedHost]] = []
        # A short path: Ray's sockets lie below it, and the kernel allows them a hundred characters.
        self.folder = Path(tempfile.mkdtemp(prefix="frs-", dir="/tmp"))
        self._log = self.folder / "start.log"
        self._head: subprocess.Popen[bytes] | None = None
        try:
            start_on_free_ports(len(HEAD_PORTS), lambda ports: self._start_head(ports, head_cpus))
            for _ in range(num_slices):
                self._new_slice(self._default)
            self._start_hosts([host for hosts in self.hosts for host in hosts])
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_slice(self, tpu_type: str | None = None) -> int:
        """Start another slice, of the first ones' type unless one is named; return its index in `hosts`."""
        with self._lock:
            index = self._new_slice(type_of(tpu_type) if tpu_type else self._default)
            self._start_hosts(self.hosts[index])
            return index

    def take_away(self, slice_index: int, worker_id: int | None = None) -> None:
        """End a host, or all hosts of a slice, as a preemption does: nothing on it is asked, all its processes go.

        Ray notices by itself, in a second or two. One that is gone already is passed over.
        """
        with self._lock:
            hosts = self._chosen(slice_index, worker_id)
            for host in hosts:
                host.is_up = False
            self._kill([host.mark for host in hosts])

    def bring_back(self, slice_index: int, worker_id: int | None = None) -> None:
        """Start what was taken away, under its old name and worker id. One that is up is passed over."""
        with self._lock:
            self._start_hosts([host for host in self._chosen(slice_index, worker_id) if not host.is_up])

    def processes(self) -> list[int]:
        """Return the ids of all processes of the hosts that are up, the users' own among them."""
        with self._lock:
            return _marked({host.mark for hosts in self.hosts for host in hosts})

    def close(self) -> None:
        """End the cluster and all its processes, and remove its files."""
        with self._lock:
            self._kill([host.mark for hosts in self.hosts for host in hosts] + [str(self.folder)])
            if self._head is not None:
                self._head.wait(30)
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start_head(self, ports: Sequence[int], cpus: int) -> None:
        self.address = f"127.0.0.1:{ports[0]}"
        self.dashboard = f"http://127.0.0.1:{ports[1]}"
        head = self._head = self._start(
            {},
            ["--head", f"--num-cpus={cpus}", "--include-dashboard=true", "--dashboard-host=127.0.0.1"],
            port_options(HEAD_PORTS, ports),
            [f"--system-config={json.dumps(_SYSTEM_CONFIG)}", f"--temp-dir={self.folder}"],
        )
        try:
            self._until(lambda: self._is_head_up(head), "the head of the simulated cluster")
        except BaseException:
            self._kill([str(self.folder)])
            head.wait(30)
            raise

    def _new_slice(self, kind: TpuType) -> int:
        index = len(self.hosts)
        name = f"simulated-{index}"
        hosts = [SimulatedHost(name, worker, self.folder / f"s{index}h{worker}") for worker in range(kind.hosts)]
        for host in hosts:
            host.folder.mkdir()
        self.hosts.append(hosts)
        self._types.append(kind)
        return index

    def _chosen(self, slice_index: int, worker_id: int | None) -> list[SimulatedHost]:
        if not 0 <= slice_index < len(self.hosts):
            raise InvalidValueError(f"there are {len(self.hosts)} simulated slices, and none of index {slice_index}")
        hosts = self.hosts[slice_index]
        if worker_id is None:
            return hosts
        if not 0 <= worker_id < len(hosts):
            raise InvalidValueError(f"slice {slice_index} has {len(hosts)} hosts, and none of worker id {worker_id}")
        return [hosts[worker_id]]

    def _start_hosts(self, hosts: list[SimulatedHost]) -> None:
        # Not more at once than there are CPUs: each takes two seconds of one, and Ray gives up on one that takes long.
        together = max(1, os.cpu_count() or 1)
        for begin in range(0, len(hosts), together):
            batch = hosts[begin : begin + together]
            starts = dict.fromkeys((host.mark for host in batch), 0)
            # Of a host that was taken away a moment ago, Ray may still believe that it is there.
            before: set[str] = set()
            self._until(lambda: self._adds_nodes(before), "the head of the simulated cluster")  # noqa: B023
            for host in batch:
                self._start_host(host)
            wanted = {(host.slice_name, str(host.worker_id)) for host in batch}
            self._until(
                lambda: self._are_starting(batch, starts) and wanted <= self._present(before),  # noqa: B023
                "simulated hosts",
            )

    def _are_starting(self, hosts: list[SimulatedHost], starts: dict[str, int]) -> bool:
        """Start anew those on which Ray has given up."""
        for host in hosts:
            if host._process is not None and host._process.poll() is not None:
                starts[host.mark] += 1
                if starts[host.mark] >= _STARTS:
                    raise PlatformError(f"a simulated host does not start: {_end_of(host.log)}")
                self._kill([host.mark])
                self._start_host(host)
        return True

    def _start_host(self, host: SimulatedHost) -> None:
        kind = self._types[next(index for index, hosts in enumerate(self.hosts) if host in hosts)]
        environment = {
            _MARK: host.mark,
            "TPU_NAME": host.slice_name,
            "TPU_WORKER_ID": str(host.worker_id),
            "TPU_ACCELERATOR_TYPE": kind.name,
            "TPU_TOPOLOGY": _topology(kind),
            LOCKFILE_VARIABLE: str(host.folder / "libtpu_lockfile"),
        }
        host._process = self._start(
            environment,
            [f"--address={self.address}", f"--num-cpus={self._cpus_per_host}"],
            [f"--resources={json.dumps({'TPU': kind.chips_per_host})}"],
            # A folder each: in one, hosts that start side by side may choose the same names for their sockets.
            [f"--temp-dir={host.folder}", *port_options(NODE_PORTS, free_ports(len(NODE_PORTS)))],
            log=host.log,
        )
        host.is_up = True

    def _start(self, extra: dict[str, str], *arguments: list[str], log: Path | None = None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
        command += ["--node-ip-address=127.0.0.1", *(each for some in arguments for each in some)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("FRAY_", "RAY_"))}
        environment |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", _MARK: str(self.folder)}
        environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
        with (log or self._log).open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment | extra,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _is_head_up(self, head: subprocess.Popen[bytes]) -> bool:
        if head.poll() is not None:
            raise PlatformError(f"Ray does not start: {_end_of(self._log)}")
        with suppress(OSError), closing(PlainKv(self.address)) as kv:
            # Another's Ray may be at that address.
            return kv.get(b"dashboard", b"dashboard") == self.dashboard.removeprefix("http://").encode()
        return False

    def _adds_nodes(self, known: set[str]) -> bool:
        """Add the ids of the cluster's nodes, if it says which they are."""
        labels = self._labels()
        known.update(each.get("ray.io/node-id", "") for each in labels)
        return bool(labels)

    def _present(self, before: set[str]) -> set[tuple[str, str]]:
        """Return the hosts, by slice and worker id, that are nodes of the cluster and were not before."""
        return {
            (each.get("ray.io/tpu-slice-name", ""), each.get("ray.io/tpu-worker-id", ""))
            for each in self._labels()
            if each.get("ray.io/node-id") not in before
        }

    def _labels(self) -> list[dict[str, str]]:
        """Return the labels of the cluster's nodes, the head's among them; none while it does not answer."""
        from fray.backend.ray._rest import RayRest

        with suppress(ConnectionFailedError):  # it is on its way
            rest = RayRest(self.dashboard, headers=dict, cookies=None, verify=True, timeout_seconds=10.0)
            with closing(rest):
                return rest.node_labels()
        return []

    def _until(self, is_so: Any, what: str) -> None:
        give_up = time.monotonic() + _START_SECONDS
        while not is_so():
            if time.monotonic() > give_up:
                raise PlatformError(f"{what} did not come up in {_START_SECONDS:g} s: {_end_of(self._log)}")
            time.sleep(0.05)

    def _kill(self, marks: list[str]) -> None:
        give_up = time.monotonic() + 30
        while left := _marked(set(marks)):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > give_up:
                raise PlatformError(f"processes of the simulated cluster cannot be killed: {left}")
            time.sleep(0.01)
        for host in (host for hosts in self.hosts for host in hosts if host.mark in marks):
            if host._process is not None:
                host._process.wait()


def _topology(kind: TpuType) -> str:
    """Return a topology with the slice's chips; which of several possible ones, nothing here depends on."""
    dimensions = 2 if kind.generation in ("v2", "v3", "v5e", "v6e") else 3
    sides = [1] * dimensions
    left, factor = kind.chips, 2
    while left > 1:
        if left % factor:
            factor += 1
            continue
        sides[sides.index(min(sides))] *= factor
        left //= factor
    return "x".join(str(side) for side in sorted(sides))


def _marked(marks: set[str]) -> list[int]:
    """Return the live processes of this machine whose environment bears one of the marks."""
    wanted = {f"{_MARK}={mark}".encode() for mark in marks}
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            with suppress(OSError):
                if wanted & set(Path("/proc", entry, "environ").read_bytes().split(b"\0")):
                    found.append(int(entry))
    return found


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-2000:] or "it says nothing"
