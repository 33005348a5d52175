"""The server: Google's protocol on one port, for Google's own client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import grpc
from google.cloud import tpu_v2
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport
from google.longrunning import operations_pb2
from grpc_status import rpc_status

from fray.backend.tpu.interface import Clock
from fray.backend.tpu.testing._clock import VirtualClock
from fray.backend.tpu.testing._faults import Fault, Moment, Supply
from fray.backend.tpu.testing._world import ApiError, JournalEntry, World, error, error_of, pending
from fray.errors import SliceNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from fray.backend.tpu.testing._machines import Machines

__all__ = ["FakeCloud"]

DEFAULT_ZONES = ("us-central1-a", "us-central2-b", "us-east5-b", "europe-west4-b")
_DEADLINE_EXCEEDED = 4
_SERIALIZED: dict[str, Any] = {
    "CreateQueuedResource": tpu_v2.CreateQueuedResourceRequest,
    "GetQueuedResource": tpu_v2.GetQueuedResourceRequest,
    "ListQueuedResources": tpu_v2.ListQueuedResourcesRequest,
    "DeleteQueuedResource": tpu_v2.DeleteQueuedResourceRequest,
    "GetNode": tpu_v2.GetNodeRequest,
    "ListNodes": tpu_v2.ListNodesRequest,
    "DeleteNode": tpu_v2.DeleteNodeRequest,
    "UpdateNode": tpu_v2.UpdateNodeRequest,
}
_CAN_FAIL_LATER = ("CreateQueuedResource", "DeleteQueuedResource")


class FakeCloud:
    """A stand-in for the Cloud TPU API that Google's own client talks to, over gRPC, on this machine.

    It keeps state as Google does: requests wait, are granted, boot, are taken back, expire, hold quota; operations
    run and fail; a repeated `request_id` is the same request. It is a model after Google's documentation, and nothing
    of it was compared with Google's servers.

    ```python
    with FakeCloud() as cloud:
        cloud.offer(Supply(ending=Ending.STOCKOUT), zone="us-central1-a")
        cloud.inject(Fault("GetQueuedResource", times=3))
        provisioner = TpuProvisioner(cloud.project, client=cloud.client(), clock=cloud.clock, owner="me")
        ...
        assert cloud.billed() == []
    ```

    Args:
        clock: What time is told by; by default one that only sleeping moves.
        project: The one there is.
        zones: Those there are.
        quotas: The most chips at the same time, by generation and zone, as `{("v5e", "us-central1-a"): 16}`.
        page_size: The most that one page of a list holds.
    """

    def __init__(
        self,
        clock: Clock | None = None,
        *,
        project: str = "fray-test",
        zones: Iterable[str] = DEFAULT_ZONES,
        quotas: Mapping[tuple[str, str], int] | None = None,
        page_size: int = 1000,
    ) -> None:
        self.project = project
        self._zones = tuple(zones)
        self._quotas = dict(quotas or {})
        self._page_size = page_size
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="fake-cloud")
        self._server = grpc.server(self._pool)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    "google.cloud.tpu.v2.Tpu", {method: self._handler(method) for method in _SERIALIZED}
                ),
                grpc.method_handlers_generic_handler(
                    "google.longrunning.Operations",
                    {
                        "GetOperation": grpc.unary_unary_rpc_method_handler(
                            lambda request, context: self._answer("GetOperation", request, context),
                            request_deserializer=operations_pb2.GetOperationRequest.FromString,
                            response_serializer=operations_pb2.Operation.SerializeToString,
                        )
                    },
                ),
            )
        )
        self._machines: list[Machines] = []
        self._channels: list[grpc.Channel] = []
        self.reset(clock)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def reset(self, clock: Clock | None = None) -> None:
        """Begin anew, as a cloud in which nothing ever was; the server and its clients stay.

        Its time begins anew too, by another `clock`: provisioners that were made before have the former.
        """
        self.clock: Clock = clock or VirtualClock()
        self.world = World(
            self.clock, project=self.project, zones=self._zones, quotas=self._quotas, page_size=self._page_size
        )

    def client(self, *interceptors: grpc.UnaryUnaryClientInterceptor) -> tpu_v2.TpuClient:
        """Return Google's client, connected to this; `interceptors` see each of its calls."""
        channel = grpc.insecure_channel(self.address)
        self._channels.append(channel)
        if interceptors:
            channel = grpc.intercept_channel(channel, *interceptors)
        return tpu_v2.TpuClient(transport=TpuGrpcTransport(channel=channel))

    def offer(self, supply: Supply, *, zone: str = "", accelerator_type: str = "", name: str = "") -> None:
        """Say what becomes of later requests: all, or those of a zone, a type, a queued resource's id.

        Of several that fit, the last one said counts.
        """
        with self.world.lock:
            self.world.offers.append((zone, accelerator_type, name, supply))

    def inject(self, *faults: Fault) -> None:
        """Let later calls go wrong; of several faults for one call the first injected befalls it."""
        with self.world.lock:
            self.world.faults += [pending(fault) for fault in faults]

    def heal(self) -> None:
        """Let calls go well again."""
        with self.world.lock:
            self.world.faults.clear()

    def forget_request_ids(self) -> None:
        """Take a repeated request for a new one from now on, as Google does after a while: the name is taken then."""
        with self.world.lock:
            self.world.forgets_request_ids = True

    def preempt(self, node: str, *, vanishes: bool = False) -> None:
        """Take a slice back, by its id.

        Raises:
            SliceNotFoundError: There is none.
        """
        with self.world.lock:
            self.world.advance()
            for name in self.world.node_names():
                if name.rpartition("/")[2] == node:
                    self.world.preempt(name, vanishes=vanishes)
                    return
        raise SliceNotFoundError(f"there is no slice {node!r} here: {self.world.node_names()}")

    def run_startup_scripts(self, directory: Path, **options: Any) -> Machines:
        """From now on, run each host of a slice as a process of this machine, with its startup script.

        It needs Linux, and a clock that goes by itself (`fray.backend.tpu.SystemClock`).

        Args:
            directory: Where each host gets a directory, with its `log`.
            options: More of `Machines`: `environment`, `notice_seconds`, `secrets`.
        """
        from fray.backend.tpu.testing._machines import Machines

        if isinstance(self.clock, VirtualClock):
            raise UnsupportedError("processes do not live in virtual time: FakeCloud(SystemClock()) runs them")
        self._machines.append(Machines(self.world, directory, **options))
        return self._machines[-1]

    @property
    def journal(self) -> list[JournalEntry]:
        """All that ever was, in the order in which it came to be."""
        with self.world.lock:
            self.world.advance()
            return list(self.world.journal)

    def billed(self) -> list[JournalEntry]:
        """Return what costs money now."""
        return [entry for entry in self.journal if entry.is_billed]

    def existing(self) -> list[JournalEntry]:
        """Return what is there now: what is billed, and what holds quota only."""
        return [entry for entry in self.journal if entry.gone is None]

    @property
    def calls(self) -> list[str]:
        """The methods that were called, in order, those that went wrong too."""
        with self.world.lock:
            return list(self.world.calls)

    def close(self) -> None:
        """Stop the server, and end what runs."""
        for machines in self._machines:
            machines.close()
        for channel in self._channels:
            channel.close()
        self._server.stop(None).wait()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _handler(self, method: str) -> grpc.RpcMethodHandler[Any, Any]:
        def serialize(answer: Any) -> bytes:
            if isinstance(answer, operations_pb2.Operation):
                return answer.SerializeToString()
            return bytes(type(answer).serialize(answer))

        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(method, request, context),
            request_deserializer=_SERIALIZED[method].deserialize,
            response_serializer=serialize,
        )

    def _answer(self, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        world = self.world
        try:
            with world.lock:
                world.calls.append(method)
                world.advance()
                return self._act(world, method, request, context)
        except ApiError as refusal:
            context.abort_with_status(rpc_status.to_status(refusal.status))

    def _act(self, world: World, method: str, request: Any, context: grpc.ServicerContext) -> Any:
        function: Callable[..., Any] = getattr(world, _snake(method))
        name = str(getattr(request, "parent", "") or getattr(request, "name", "") or request.node.name)
        zone = name.split("/")[3] if name.count("/") >= 3 else ""
        fault = world.fault_for(method, zone)
        if fault is None:
            return function(request)
        if fault.moment is Moment.OPERATION and method in _CAN_FAIL_LATER:
            return function(request, fault)
        if fault.moment is Moment.LATE:
            world.at(fault.delay_seconds, lambda: _quietly(function, request))
            raise error_of(fault)
        if fault.moment is Moment.SLOW:
            patience = context.time_remaining()
            if patience is not None and fault.delay_seconds >= patience:
                _quietly(function, request)
                world.clock.sleep(patience)
                raise error(_DEADLINE_EXCEEDED, "Deadline Exceeded")
            world.clock.sleep(fault.delay_seconds)
            world.advance()
            return function(request)
        if fault.moment is Moment.AFTER:
            _quietly(function, request)
        raise error_of(fault)


def _quietly(function: Callable[..., Any], request: Any) -> None:
    """Do what was asked for; nobody hears whether it could be done."""
    with suppress(ApiError):
        function(request)


def _snake(method: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in method).removeprefix("_")
