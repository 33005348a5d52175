"""One attempt of a run: the function, once on every host of the slices that are held, begun together, ended together.

An attempt gives all results, or an `AttemptError` that says whether the slices or the function were to blame. Either
way nothing of it is left on the hosts, or it is said on which something is.
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from fray.backend.ray._tpu_blame import AttemptError, has_died, judge, preempted
from fray.backend.ray._tpu_frames import END, GO, GONE, HELLO, KILL, PING, PONG, STEP
from fray.backend.ray._tpu_host import Assignment, HostProcess
from fray.backend.ray._tpu_keeper import MARK
from fray.backend.ray._tpu_slices import Host, Reservation
from fray.backend.ray._tpu_switchboard import CLOSED, Switchboard
from fray.errors import HostFailedError, PlatformError

__all__ = ["Attempt", "HostEnvironment"]

# A host from which no sign of life comes for so long may be gone, and Ray is asked.
_SILENCE_SECONDS = 5.0
# By then Ray has noticed that a node is gone, by its own default settings.
_VERDICT_SECONDS = 60.0
_LOOK_SECONDS = 0.2
# Where nothing comes, it is looked so often whether all are still there.
_PULSE_SECONDS = 1.0
# Beyond the grace that a host's processes are given.
_END_SECONDS = 45.0


@dataclass(frozen=True)
class HostEnvironment:
    """What the function's processes are to be given.

    Attributes:
        runtime_env: Ray's runtime environment: packages, files, the user's variables.
        secrets: The user's variables that are not to be shown.
        own: Variables that the user has set, here or for the whole job: these are left alone.
        defaults: Variables that are set unless there is one of that name.
        resources: What is reserved on each host beside its chips.
    """

    runtime_env: Mapping[str, Any]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    own: Mapping[str, str] = field(default_factory=dict, repr=False)
    defaults: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)


class Attempt:
    """The function on all hosts, from the first process to the last.

    Attributes:
        step: The highest that any host has reported; -1 before the first.
        held: After the end: the hosts on which something stays that could not be ended.
    """

    def __init__(
        self,
        reservation: Reservation,
        function: Any,
        environment: HostEnvironment,
        *,
        run_id: str,
        number: int,
        num_slices: int,
        chips_per_host: int,
        grace_seconds: float,
        stall_seconds: float | None,
        setup_seconds: float,
    ) -> None:
        self.step = -1
        self.held: list[Host] = []
        self._reservation, self._environment = reservation, environment
        self._hosts = reservation.hosts
        self._number, self._num_slices = number, num_slices
        self._num_hosts = len(self._hosts) // num_slices
        self._chips, self._grace = chips_per_host, grace_seconds
        self._stall_seconds, self._setup_seconds = stall_seconds, setup_seconds
        self._function = function
        self._mark = f"{run_id}-{number}-{secrets.token_hex(4)}"
        self._events: queue.SimpleQueue[tuple[int, bytes, Any]] = queue.SimpleQueue()
        self._actors: list[Any] = []
        self._refs: list[Any] = []
        self._hello: dict[int, dict[str, Any]] = {}
        self._results: dict[int, Any] = {}
        self._done: set[int] = set()  # Ray knows how their tasks ended
        self._gone: set[int] = set()
        self._without_ray: set[int] = set()  # there, and no nodes of the cluster any more
        self._heard: dict[int, float] = {}
        self._switchboard: Switchboard | None = None

    def run(self) -> list[Any]:
        """Run it to its end; return the results, host by host.

        Raises:
            AttemptError: It has failed.
        """
        try:
            self._start()
            return self._follow()
        finally:
            self._end()

    # From the start to the results

    def _start(self) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        num_hosts = self._num_hosts
        prefixes = [f"[slice {index // num_hosts}, host {index % num_hosts}] " for index in range(len(self._hosts))]
        here = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        board = Switchboard(here, prefixes, lambda index, kind, said: self._events.put((index, kind, said)))
        self._switchboard = board
        # An actor, and no task: of a task Ray starts workers on the caller's machine too, in case it should run there.
        remote = ray.remote(max_restarts=0, max_task_retries=0)(HostProcess)
        resources = dict(self._environment.resources)
        for index in range(len(self._hosts)):
            slice_id, host_id = divmod(index, num_hosts)
            mark = f"{self._mark}-{index}"
            assignment = Assignment(
                caller=board.address,
                token=board.token,
                index=index,
                mark=mark,
                slice_id=slice_id,
                num_slices=self._num_slices,
                host_id=host_id,
                num_hosts=num_hosts,
                attempt=self._number,
                grace_seconds=self._grace,
                secrets=self._environment.secrets,
            )
            runtime_env = dict(self._environment.runtime_env)
            # A variable of its own, and so a process of its own: no other that has imported something is used again.
            runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), MARK: mark}
            actor: Any = remote.options(
                num_cpus=resources.get("CPU", 0),
                memory=int(resources["memory"]) if "memory" in resources else None,
                resources={
                    "TPU": self._chips,
                    **{name: value for name, value in resources.items() if name not in ("CPU", "memory")},
                },
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._reservation.group, placement_group_bundle_index=index
                ),
                runtime_env=runtime_env,
            ).remote(assignment)
            self._actors.append(actor)
            ref = actor.call.remote(self._function)
            self._refs.append(ref)
            ref.future().add_done_callback(lambda _, index=index: self._events.put((index, b"", None)))

    def _follow(self) -> list[Any]:
        """Take what comes from the hosts, until all have returned or something is wrong."""
        moved = time.monotonic()
        give_up: float | None = moved + self._setup_seconds
        while len(self._results) < len(self._hosts):
            try:
                index, kind, said = self._events.get(timeout=_PULSE_SECONDS)
            except queue.Empty:
                index, kind, said = -1, b"?", None
            before = self.step
            self._note(index, kind, said)
            if kind == HELLO and len(self._hello) == len(self._hosts):
                self._go()
                moved, give_up = time.monotonic(), None
            elif self.step > before:
                moved = time.monotonic()
            elif kind == b"":
                self._take_result(index)
            elif kind in (CLOSED, GONE) and index not in self._results:
                self._expect_result(index)
            now = time.monotonic()
            if give_up is not None and now > give_up:
                late = [i for i in range(len(self._hosts)) if i not in self._hello]
                raise self._verdict(
                    late[0],
                    PlatformError(
                        f"{len(late)} of {len(self._hosts)} hosts did not start in {self._setup_seconds:g} s"
                    ),
                )
            if give_up is None and self._stall_seconds is not None and now - moved > self._stall_seconds:
                where = f"step {self.step}" if self.step >= 0 else "its start, with no step reported"
                waiting = [i for i in range(len(self._hosts)) if i not in self._results]
                raise self._verdict(
                    waiting[0],
                    HostFailedError(f"run_on_tpu hangs: {self._stall_seconds:g} s without a new step, since {where}"),
                )
            if kind == b"?" and (lost := self._lost_silently()):
                raise preempted(lost)
        return [self._results[index] for index in range(len(self._hosts))]

    def _note(self, index: int, kind: bytes, said: Any) -> None:
        if index >= 0:
            self._heard[index] = time.monotonic()
        if kind == HELLO:
            self._hello[index] = said
        elif kind == STEP:  # it may come when the attempt has failed already, and counts nevertheless
            self.step = max(self.step, int(said["step"]))
        elif kind == b"":
            self._done.add(index)
        elif kind == GONE:
            self._gone.add(index)
            if not said["raylet"]:
                self._without_ray.add(index)
            if said["left"]:
                self.held.append(self._hosts[index])

    def _go(self) -> None:
        assert self._switchboard is not None
        own, first, address = self._environment.own, self._hello[0], self._hosts[0].address
        megascale_port = own.get("MEGASCALE_PORT", str(first["megascale_port"]))
        for index in range(len(self._hosts)):
            slice_id, host_id = divmod(index, self._num_hosts)
            values = {
                "TPU_WORKER_ID": str(host_id),
                "JAX_COORDINATOR_ADDRESS": f"{address}:{first['jax_port']}",
            }
            if self._num_slices > 1:
                values |= {
                    "MEGASCALE_COORDINATOR_ADDRESS": f"{address}:{megascale_port}",
                    "MEGASCALE_NUM_SLICES": str(self._num_slices),
                    "MEGASCALE_PORT": megascale_port,
                    "MEGASCALE_SLICE_ID": str(slice_id),
                }
            values = {name: value for name, value in values.items() if name not in own}
            self._switchboard.send(index, GO, {"environment": values, "defaults": dict(self._environment.defaults)})

    def _take_result(self, index: int) -> None:
        import ray

        try:
            self._results[index] = ray.get(self._refs[index])
        except Exception as error:
            raise self._verdict(index, error) from error

    def _expect_result(self, index: int) -> None:
        """A host's processes have ended: its result, or what became of it, is to be known in a moment."""
        import ray

        done, _ = ray.wait([self._refs[index]], timeout=_VERDICT_SECONDS, fetch_local=False)
        if done:
            self._take_result(index)
        else:
            raise self._verdict(index, PlatformError(f"host {index} has ended, and Ray does not say how"))

    # Whose fault it is

    def _verdict(self, index: int, error: BaseException) -> AttemptError:
        """Say what an error is to be taken for: where a host has gone, its loss is the cause of all the others'."""
        if lost := self._lost(index if has_died(error) else None):
            return preempted(lost, error)
        return judge(self._hosts[index], error)

    def _lost(self, suspect: int | None) -> list[Host]:
        """Find the hosts that have gone, now that something is wrong: those that do not answer are asked Ray about.

        A process that ended without a result may have been the first of its host to go, whatever its keeper could say.
        """
        assert self._switchboard is not None
        suspects = {index for index in self._gone if index not in self._results}
        if suspect is not None:
            suspects.add(suspect)
        for index in self._hello:
            if index not in self._gone and index not in suspects and not self._switchboard.send(index, PING):
                suspects.add(index)
        asked = {i for i in self._hello if i not in self._gone and i not in suspects}
        give_up = time.monotonic() + _SILENCE_SECONDS
        while asked and time.monotonic() < give_up:
            try:
                index, kind, said = self._events.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            self._note(index, kind, said)
            if kind == PONG:
                asked.discard(index)
                if not said["raylet"]:
                    suspects.add(index)
            elif kind == GONE:
                asked.discard(index)
            elif kind == CLOSED and index not in self._gone:
                asked.discard(index)
                suspects.add(index)
        suspects |= asked | self._without_ray
        give_up = time.monotonic() + _VERDICT_SECONDS
        while True:
            lost = self._reservation.lost_hosts()
            if lost or not suspects or time.monotonic() > give_up:
                return lost
            suspects -= self._answering(suspects)

    def _lost_silently(self) -> list[Host]:
        """Look for hosts that have gone without anything having failed: they say nothing any more, or have not yet."""
        quiet = time.monotonic() - _SILENCE_SECONDS
        assert self._switchboard is not None
        silent = [i for i in range(len(self._hosts)) if i not in self._results and self._heard.get(i, 0.0) < quiet]
        if not silent:
            return []
        for index in silent:
            self._switchboard.send(index, PING)
        return self._reservation.lost_hosts()

    def _answering(self, indices: set[int]) -> set[int]:
        """Have nodes run a trivial task; return which do, and so are there."""
        import ray

        tasks = {self._on_node(lambda: True, self._hosts[index]).remote(): index for index in sorted(indices)}
        done, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=_SILENCE_SECONDS)
        answering = set()
        for task in done:
            with suppress(Exception):
                ray.get(task)
                answering.add(tasks[task])
        if answering != indices:
            time.sleep(_LOOK_SECONDS)
        return answering

    # The end

    def _end(self) -> None:
        """See to it that nothing of the attempt is left on a host that is still there."""
        import ray

        board = self._switchboard
        if board is None:
            return
        unheard = []
        try:
            for index, actor in enumerate(self._actors):
                if index in self._done and board.send(index, END):
                    actor.__ray_terminate__.remote()  # ends as a program does, its exit handlers called
                elif not board.send(index, KILL) and index not in self._hello:
                    ray.kill(actor)  # nobody but Ray knows of its process yet
                    unheard.append(index)
            self._await_gone()
            self._end_unheard(unheard)
        finally:
            board.close()

    def _await_gone(self) -> None:
        assert self._switchboard is not None
        give_up = time.monotonic() + self._grace + _END_SECONDS
        while True:
            pending = {i for i in self._switchboard.connected() if i not in self._gone}
            if not pending or time.monotonic() > give_up:
                break
            try:
                index, kind, said = self._events.get(timeout=_PULSE_SECONDS)
            except queue.Empty:
                if {self._hosts[i].node_id for i in pending} <= {h.node_id for h in self._reservation.lost_hosts()}:
                    return
                continue
            self._note(index, kind, said)
        self.held += [self._hosts[i] for i in pending if self._hosts[i] not in self.held]

    def _end_unheard(self, unheard: list[int]) -> None:
        """End the workers of hosts that had not begun: Ray keeps those, idle, for as long as the caller lives."""
        import ray

        if not unheard:
            return

        def end(marker: bytes) -> None:  # nested, so that it travels by value: a host without a job may have no fray
            import os
            import signal
            from contextlib import suppress

            for entry in os.listdir("/proc"):
                with suppress(OSError, ValueError):
                    pid = int(entry)
                    with open(f"/proc/{pid}/environ", "rb") as file:
                        if marker in file.read().split(b"\0"):
                            os.kill(pid, signal.SIGKILL)

        lost = {host.node_id for host in self._reservation.lost_hosts()}
        refs = [
            self._on_node(end, self._hosts[index]).remote(f"{MARK}={self._mark}-{index}".encode())
            for index in unheard
            if self._hosts[index].node_id not in lost
        ]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=_END_SECONDS, fetch_local=False)

    def _on_node(self, fn: Callable[..., Any], host: Host) -> Any:
        """Return a task of Ray's that runs on a host's node, and nowhere else."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        strategy = NodeAffinitySchedulingStrategy(host.node_id, soft=False)
        return ray.remote(num_cpus=0, max_retries=0)(fn).options(scheduling_strategy=strategy)
