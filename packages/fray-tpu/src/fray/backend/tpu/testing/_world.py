"""What Google's side is: requests, slices, operations, and all that ever was.

Its time is the clock's: whatever is due is done, in order, before the next call is answered. What lasts how long, and
what becomes of what, is a model after Google's documentation; where that says nothing, a comment says "assumed".
"""

from __future__ import annotations

import heapq
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from typing import Any, TypeVar, cast

from google.cloud import tpu_v2
from google.longrunning import operations_pb2
from google.protobuf import any_pb2, empty_pb2, field_mask_pb2
from google.rpc import error_details_pb2, status_pb2

from fray.backend.tpu.interface import Clock
from fray.backend.tpu.testing._faults import Ending, Fault, Supply
from fray.tpu import tpu_type, tpu_types

__all__ = ["ApiError", "JournalEntry", "World"]

_Message = TypeVar("_Message", tpu_v2.QueuedResource, tpu_v2.Node)

_INVALID, _DEADLINE, _NOT_FOUND, _EXISTS, _DENIED, _EXHAUSTED, _PRECONDITION = 3, 4, 5, 6, 7, 8, 9
_QR = tpu_v2.QueuedResourceState.State
_NODE = tpu_v2.Node.State
_USER = tpu_v2.QueuedResourceState.StateInitiator.USER
_SERVICE = tpu_v2.QueuedResourceState.StateInitiator.SERVICE
_LABEL_KEY = re.compile(r"[a-z][a-z0-9_-]{0,62}")
_LABEL_VALUE = re.compile(r"[a-z0-9_-]{0,63}")
# Addresses for benchmarks (RFC 2544): nobody has them.
_INTERNAL, _EXTERNAL = IPv4Address("198.18.0.2"), IPv4Address("198.19.0.2")
_ADDRESSES = 65_000
# Without `force` only these can be deleted.
_DELETABLE = (_QR.ACCEPTED, _QR.WAITING_FOR_RESOURCES, _QR.FAILED, _QR.SUSPENDED)


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(self, status: status_pb2.Status) -> None:
        super().__init__(status.message)
        self.status = status


@dataclass
class JournalEntry:
    """One thing that there was.

    Attributes:
        kind: `queued resource` or `node`.
        name: Its full name.
        labels: As it was made.
        created: When.
        ready: When it was first ready.
        billed_from: Since when it costs money: a slice from when it is being made (assumed; Google may begin later).
        billed_until: Until when.
        gone: When it was gone.
        states: What it was when, by Google's names.
    """

    kind: str
    name: str
    labels: dict[str, str]
    created: float
    ready: float | None = None
    billed_from: float | None = None
    billed_until: float | None = None
    gone: float | None = None
    states: list[tuple[float, str]] = field(default_factory=list)

    @property
    def is_billed(self) -> bool:
        """Whether it costs money now."""
        return self.billed_from is not None and self.billed_until is None


@dataclass
class _Resource:
    message: tpu_v2.QueuedResource
    supply: Supply
    entry: JournalEntry
    nodes: list[str] = field(default_factory=list)


@dataclass
class _Node:
    message: tpu_v2.Node
    entry: JournalEntry


class World:
    """All of it, behind one lock.

    Args:
        clock: What time is told by.
        project: The one there is.
        zones: Those there are.
        quotas: The most chips at the same time, by generation and zone, as `("v5e", "us-central1-a")`.
        page_size: The most that one page of a list holds.
        on_node: Called with a slice's name and message when its state changes, and without a message when it is gone.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        project: str,
        zones: Iterable[str],
        quotas: Mapping[tuple[str, str], int],
        page_size: int,
        on_node: Callable[[str, tpu_v2.Node | None], None] | None = None,
    ) -> None:
        self.clock = clock
        self.project = project
        self.zones = set(zones)
        self.quotas = dict(quotas)
        self.page_size = page_size
        self.on_node = on_node
        self.forgets_request_ids = False
        self.journal: list[JournalEntry] = []
        self.calls: list[str] = []
        self.offers: list[tuple[str, str, str, Supply]] = []
        self.faults: list[_Pending] = []
        self.lock = threading.RLock()
        self._resources: dict[str, _Resource] = {}
        self._addresses = 0  # that were given
        self._nodes: dict[str, _Node] = {}
        self._operations: dict[str, operations_pb2.Operation] = {}
        self._by_request_id: dict[tuple[str, str], str] = {}
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._event_time: float | None = None
        self._numbers = itertools.count(1)

    # Time

    def advance(self) -> None:
        """Do what is due."""
        with self.lock:
            while self._due and self._due[0][0] <= self.clock.now():
                self._event_time, _, action = heapq.heappop(self._due)
                try:
                    action()
                finally:
                    self._event_time = None

    def now(self) -> float:
        """Return the time: for what is done when it is due, however late, the time at which it was due."""
        return self.clock.now() if self._event_time is None else self._event_time

    def next_due(self) -> float | None:
        """Return when something is due next."""
        with self.lock:
            return self._due[0][0] if self._due else None

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something in some time."""
        heapq.heappush(self._due, (self.now() + seconds, next(self._numbers), action))

    # Faults

    def fault_for(self, method: str, zone: str) -> Fault | None:
        """Return what goes wrong with a call, if anything."""
        for pending in self.faults:
            if pending.matches(method, zone):
                return pending.fault
        return None

    # The methods

    def create_queued_resource(
        self, request: tpu_v2.CreateQueuedResourceRequest, fails: Fault | None = None
    ) -> operations_pb2.Operation:
        """Accept a request for slices; `fails` makes its operation fail."""
        zone = self._zone(request.parent)
        if known := self._repeated("create", request.request_id):
            return known
        full_name = f"{request.parent}/queuedResources/{request.queued_resource_id}"
        resource = copy_of(request.queued_resource)
        self._validate(resource, zone)
        if full_name in self._resources:
            raise error(_EXISTS, f"Resource '{full_name}' already exists")
        operation = self._operation("create", full_name, request.request_id)
        if fails is not None:
            self.at(2.0, lambda: self._fail(operation, fails))
            return self._copy(operation)
        self._check_quota(resource, zone)
        resource.name = full_name
        raw = tpu_v2.QueuedResource.pb(resource)
        raw.create_time.FromNanoseconds(int(self.now() * 1e9))
        spec = resource.tpu.node_spec[0]
        entry = JournalEntry("queued resource", full_name, dict(spec.node.labels), self.now())
        self.journal.append(entry)
        supply = self._offer(zone, spec.node.accelerator_type, request.queued_resource_id)
        self._resources[full_name] = _Resource(resource, supply, entry)
        self._enter(full_name, _QR.CREATING)
        self.at(supply.accept_seconds, lambda: self._accept(full_name, operation))
        return self._copy(operation)

    def delete_queued_resource(
        self, request: tpu_v2.DeleteQueuedResourceRequest, fails: Fault | None = None
    ) -> operations_pb2.Operation:
        """Delete a request and its slices; `fails` makes its operation fail."""
        self._zone(request.name)
        if known := self._repeated("delete", request.request_id):
            return known
        found = self._resources.get(request.name)
        if found is None:
            raise error(_NOT_FOUND, f"Resource '{request.name}' was not found")
        state = found.message.state.state
        if not request.force and state not in _DELETABLE:
            raise error(_PRECONDITION, f"Queued resource in state {_QR(state).name} cannot be deleted without force")
        operation = self._operation("delete", request.name, request.request_id)
        if fails is not None:
            self.at(2.0, lambda: self._fail(operation, fails))
            return self._copy(operation)
        self._enter(request.name, _QR.DELETING, _USER)
        for name in found.nodes:
            self._enter_node(name, _NODE.DELETING)

        def finish() -> None:
            for name in found.nodes:
                self._forget_node(name)
            if self._resources.get(request.name) is found:
                del self._resources[request.name]
                found.entry.gone = self.now()
            self._finish(operation, empty_pb2.Empty())

        self.at(found.supply.delete_seconds, finish)
        return self._copy(operation)

    def get_queued_resource(self, request: tpu_v2.GetQueuedResourceRequest) -> tpu_v2.QueuedResource:
        """Return a request as it is."""
        self._zone(request.name)
        if request.name not in self._resources:
            raise error(_NOT_FOUND, f"Resource '{request.name}' was not found")
        return self._shown(self._resources[request.name])

    def list_queued_resources(self, request: tpu_v2.ListQueuedResourcesRequest) -> tpu_v2.ListQueuedResourcesResponse:
        """Return a page of requests."""
        names, token = self._page(self._resources, request.parent, request.page_size, request.page_token)
        shown = [self._shown(self._resources[name]) for name in names]
        return tpu_v2.ListQueuedResourcesResponse(queued_resources=shown, next_page_token=token)

    def get_node(self, request: tpu_v2.GetNodeRequest) -> tpu_v2.Node:
        """Return a slice as it is."""
        self._zone(request.name)
        if request.name not in self._nodes:
            raise error(_NOT_FOUND, f"Resource '{request.name}' was not found")
        return self._nodes[request.name].message

    def list_nodes(self, request: tpu_v2.ListNodesRequest) -> tpu_v2.ListNodesResponse:
        """Return a page of slices."""
        names, token = self._page(self._nodes, request.parent, request.page_size, request.page_token)
        return tpu_v2.ListNodesResponse(nodes=[self._nodes[name].message for name in names], next_page_token=token)

    def delete_node(self, request: tpu_v2.DeleteNodeRequest) -> operations_pb2.Operation:
        """Delete one slice, past its request."""
        self._zone(request.name)
        if request.name not in self._nodes:
            raise error(_NOT_FOUND, f"Resource '{request.name}' was not found")
        operation = self._operation("delete", request.name, "")
        self._enter_node(request.name, _NODE.DELETING)
        owner = self._nodes[request.name].message.queued_resource

        def finish() -> None:
            self._forget_node(request.name)
            self._finish(operation, empty_pb2.Empty())
            if owner in self._resources:  # assumed
                self._enter(owner, _QR.SUSPENDED, _USER)

        self.at(10.0, finish)
        return self._copy(operation)

    def update_node(self, request: tpu_v2.UpdateNodeRequest) -> operations_pb2.Operation:
        """Change a slice's labels."""
        name = request.node.name
        self._zone(name)
        if name not in self._nodes:
            raise error(_NOT_FOUND, f"Resource '{name}' was not found")
        mask: field_mask_pb2.FieldMask = request.update_mask
        if list(mask.paths) != ["labels"]:
            raise error(_INVALID, f"update_mask {list(mask.paths)} is not supported here")
        self._check_labels(dict(request.node.labels))
        found = self._nodes[name].message
        found.labels = dict(request.node.labels)
        operation = self._operation("update", name, "")
        self._finish(operation, tpu_v2.Node.pb(found))
        return self._copy(operation)

    def get_operation(self, request: operations_pb2.GetOperationRequest) -> operations_pb2.Operation:
        """Return an operation as it is."""
        if request.name not in self._operations:
            raise error(_NOT_FOUND, f"Operation '{request.name}' was not found")
        return self._copy(self._operations[request.name])

    # What a test does to it

    def preempt(self, node_name: str, *, vanishes: bool = False) -> None:
        """Take a slice back."""
        if node_name not in self._nodes:
            return
        owner = self._nodes[node_name].message.queued_resource
        self._enter_node(node_name, _NODE.PREEMPTED)
        if vanishes:
            self._forget_node(node_name)
        if owner in self._resources and self._resources[owner].message.state.state != _QR.DELETING:  # assumed
            self._enter(owner, _QR.SUSPENDED, _SERVICE)

    def node_names(self) -> list[str]:
        """Return the full names of the slices there are."""
        return list(self._nodes)

    # The course of a request

    def _accept(self, name: str, operation: operations_pb2.Operation) -> None:
        found = self._resources.get(name)
        if found is None or found.message.state.state != _QR.CREATING:
            return
        self._finish(operation, tpu_v2.QueuedResource.pb(found.message))
        self._enter(name, _QR.WAITING_FOR_RESOURCES)
        supply = found.supply
        valid = tpu_v2.QueuedResource.pb(found.message).queueing_policy.valid_until_duration.seconds
        if valid and not supply.outlives_its_deadline:
            self.at(max(0.0, found.entry.created + valid - self.now()), lambda: self._expire(name, found))
        if supply.ending is not Ending.NEVER:
            self.at(supply.queue_seconds, lambda: self._grant(name, found))

    def _expire(self, name: str, found: _Resource) -> None:
        if self._resources.get(name) is found and found.message.state.state == _QR.WAITING_FOR_RESOURCES:
            # The code and the words are assumed.
            self._fail_resource(name, status(_DEADLINE, "The queued resource's valid until time has passed."))

    def _grant(self, name: str, found: _Resource) -> None:
        if self._resources.get(name) is not found or found.message.state.state != _QR.WAITING_FOR_RESOURCES:
            return
        self._enter(name, _QR.PROVISIONING)
        zone = name.split("/")[3]
        words = {
            Ending.STOCKOUT: f"There is no more capacity in the zone {zone}; you can try in another zone where Cloud "
            "TPU Nodes are offered",
            Ending.QUOTA: "Quota limit 'TPUV5sPreemptibleLitepodPerProjectPerZone' has been exceeded. Limit: 8 in zone "
            f"{zone}.",
            Ending.RESERVATION: "Insufficient reserved capacity for the request.",
        }
        if said := words.get(found.supply.ending):
            self.at(5.0, lambda: self._fail_resource(name, status(_EXHAUSTED, said), found))
            return
        spec = found.message.tpu.node_spec[0]
        count = spec.multislice_params.node_count or 1
        prefix = spec.multislice_params.node_id_prefix or name.rpartition("/")[2]
        ids = [f"{prefix}-{number}" for number in range(count)] if count > 1 else [spec.node_id]
        for node_id in ids:
            self._make_node(f"{spec.parent}/nodes/{node_id}", name, spec.node, count > 1)
        found.nodes = [f"{spec.parent}/nodes/{node_id}" for node_id in ids]
        if found.supply.ending is not Ending.HANGS:
            boot_seconds = found.supply.boot_seconds
            if found.supply.preempted_during_boot:
                self.at(boot_seconds / 2, lambda: self.preempt(found.nodes[-1], vanishes=found.supply.vanishes))
            self.at(boot_seconds, lambda: self._make_ready(name, found))

    def _make_ready(self, name: str, found: _Resource) -> None:
        if self._resources.get(name) is not found or found.message.state.state != _QR.PROVISIONING:
            return
        for node_name in found.nodes:
            node = self._nodes[node_name].message
            hosts = tpu_type(node.accelerator_type).hosts
            first, self._addresses = self._addresses, self._addresses + hosts
            external = node.network_config.enable_external_ips
            node.network_endpoints = [
                tpu_v2.NetworkEndpoint(
                    ip_address=str(_INTERNAL + (first + host) % _ADDRESSES),
                    port=8470,
                    access_config=tpu_v2.AccessConfig(
                        external_ip=str(_EXTERNAL + (first + host) % _ADDRESSES) if external else ""
                    ),
                )
                for host in range(hosts)
            ]
            self._nodes[node_name].entry.ready = self.now()
            self._enter_node(node_name, _NODE.READY)
        found.entry.ready = self.now()
        self._enter(name, _QR.ACTIVE)
        if found.supply.preempt_after_seconds is not None:
            last = found.nodes[-1]
            self.at(found.supply.preempt_after_seconds, lambda: self.preempt(last, vanishes=found.supply.vanishes))

    def _make_node(self, name: str, owner: str, spec: tpu_v2.Node, is_multislice: bool) -> None:
        if name in self._nodes:
            # Two requests that name the same node: the second fails (assumed).
            self._fail_resource(owner, status(_EXISTS, f"Resource '{name}' already exists"))
            return
        node = copy_of(spec)
        node.name, node.queued_resource, node.multislice_node = name, owner, is_multislice
        node.scheduling_config.spot = "spot" in self._resources[owner].message
        tpu_v2.Node.pb(node).create_time.FromNanoseconds(int(self.now() * 1e9))
        entry = JournalEntry("node", name, dict(spec.labels), self.now(), billed_from=self.now())
        self.journal.append(entry)
        self._nodes[name] = _Node(node, entry)
        self._enter_node(name, _NODE.CREATING)

    def _fail_resource(self, name: str, said: status_pb2.Status, only: _Resource | None = None) -> None:
        found = self._resources.get(name)
        if found is None or (only is not None and found is not only) or found.message.state.state == _QR.DELETING:
            return
        self._enter(name, _QR.FAILED)
        tpu_v2.QueuedResource.pb(found.message).state.failed_data.error.CopyFrom(said)

    def _enter(self, name: str, state: int, initiator: int = 0) -> None:
        found = self._resources[name]
        found.message.state = tpu_v2.QueuedResourceState(state=state, state_initiator=initiator)
        found.entry.states.append((self.now(), _QR(state).name))

    def _enter_node(self, name: str, state: int) -> None:
        if name not in self._nodes:
            return
        found = self._nodes[name]
        found.message.state = _NODE(state)
        found.entry.states.append((self.now(), _NODE(state).name))
        if state == _NODE.PREEMPTED:
            found.entry.billed_until = found.entry.billed_until or self.now()
        if self.on_node is not None:
            self.on_node(name, copy_of(found.message))

    def _forget_node(self, name: str) -> None:
        if (found := self._nodes.pop(name, None)) is None:
            return
        found.entry.gone = self.now()
        found.entry.billed_until = found.entry.billed_until or self.now()
        if self.on_node is not None:
            self.on_node(name, None)

    # What a request has to be like

    def _validate(self, resource: tpu_v2.QueuedResource, zone: str) -> None:
        if len(resource.tpu.node_spec) != 1:
            raise error(_INVALID, "Exactly one node_spec is required")
        spec = resource.tpu.node_spec[0]
        if not spec.node_id and not spec.multislice_params.node_count > 1:
            raise error(_INVALID, "node_id or multislice_params with node_count > 1 is required")
        if spec.parent != f"projects/{self.project}/locations/{zone}":
            raise error(_INVALID, f"node_spec.parent '{spec.parent}' is not the request's parent")
        known = {one.name for one in tpu_types()}
        if spec.node.accelerator_type not in known:
            raise error(_INVALID, f"Accelerator type '{spec.node.accelerator_type}' is not available in {zone}")
        versions = {one.runtime_version for one in tpu_types()}
        if spec.node.runtime_version not in versions:
            raise error(_INVALID, f"Runtime version '{spec.node.runtime_version}' was not found")
        if spec.node.runtime_version != tpu_type(spec.node.accelerator_type).runtime_version:
            raise error(
                _INVALID,
                f"Runtime version '{spec.node.runtime_version}' does not support accelerator type "
                f"'{spec.node.accelerator_type}'",
            )
        self._check_labels(dict(spec.node.labels))

    def _check_labels(self, labels: dict[str, str]) -> None:
        if len(labels) > 64:
            raise error(_INVALID, "More than 64 labels")
        for key, value in labels.items():
            if not _LABEL_KEY.fullmatch(key) or not _LABEL_VALUE.fullmatch(value):
                raise error(_INVALID, f"Label {key}={value} is invalid")

    def _check_quota(self, resource: tpu_v2.QueuedResource, zone: str) -> None:
        asked = _chips(resource)
        generation = tpu_type(resource.tpu.node_spec[0].node.accelerator_type).generation
        limit = self.quotas.get((generation, zone))
        if limit is None:
            return
        # What failed or was preempted holds quota until it is deleted.
        held = sum(
            _chips(one.message)
            for name, one in self._resources.items()
            if name.split("/")[3] == zone
            and tpu_type(one.message.tpu.node_spec[0].node.accelerator_type).generation == generation
        )
        if held + asked > limit:
            fault = Fault.quota(f"TPU{generation.upper()}PerProjectPerZone", limit, zone)
            raise error(fault.code, fault.message, fault.reason, fault.metadata)

    def _zone(self, name: str) -> str:
        parts = name.split("/")
        if len(parts) < 4 or parts[0] != "projects" or parts[2] != "locations":
            raise error(_INVALID, f"'{name}' is not a resource name")
        if parts[1] != self.project:
            raise error(
                _DENIED,
                f"Project '{parts[1]}' not found or deleted",
                "CONSUMER_INVALID",
                {"consumer": f"projects/{parts[1]}"},
            )
        if parts[3] != "-" and parts[3] not in self.zones:
            raise error(_DENIED, f"Permission denied on 'locations/{parts[3]}' (or it may not exist).")
        return parts[3]

    def _offer(self, zone: str, accelerator_type: str, name: str) -> Supply:
        for where, what, whose, supply in reversed(self.offers):
            if where in ("", zone) and what in ("", accelerator_type) and whose in ("", name):
                return supply
        return Supply()

    # Operations and pages

    def _operation(self, verb: str, target: str, request_id: str) -> operations_pb2.Operation:
        zone = target.split("/")[3]
        name = f"projects/{self.project}/locations/{zone}/operations/operation-{next(self._numbers)}"
        operation = operations_pb2.Operation(name=name)
        now = tpu_v2.OperationMetadata(target=target, verb=verb, api_version="v2")
        operation.metadata.Pack(tpu_v2.OperationMetadata.pb(now))
        self._operations[name] = operation
        if request_id:
            self._by_request_id[verb, request_id] = name
        return operation

    def _repeated(self, verb: str, request_id: str) -> operations_pb2.Operation | None:
        if self.forgets_request_ids:
            return None
        name = self._by_request_id.get((verb, request_id)) if request_id else None
        return self._copy(self._operations[name]) if name else None

    def _finish(self, operation: operations_pb2.Operation, result: object) -> None:
        packed = any_pb2.Any()
        packed.Pack(result)  # type: ignore[arg-type]
        operation.response.CopyFrom(packed)
        operation.done = True

    def _fail(self, operation: operations_pb2.Operation, fault: Fault) -> None:
        operation.error.CopyFrom(status(fault.code, fault.message, fault.reason, fault.metadata))
        operation.done = True

    def _copy(self, operation: operations_pb2.Operation) -> operations_pb2.Operation:
        copy = operations_pb2.Operation()
        copy.CopyFrom(operation)
        return copy

    def _shown(self, found: _Resource) -> tpu_v2.QueuedResource:
        state = int(found.message.state.state)
        if state not in found.supply.states:
            return found.message
        shown = copy_of(found.message)
        tpu_v2.QueuedResource.pb(shown).state.state = found.supply.states[state]
        return shown

    def _page(self, all_names: Iterable[str], parent: str, size: int, token: str) -> tuple[list[str], str]:
        zone = self._zone(parent)
        start = int(token) if token else 0
        # A page begins where the last one ended: what comes or goes in between may be missed, as with any such list.
        names = [name for name in all_names if zone == "-" or name.split("/")[3] == zone]
        limit = min(size or self.page_size, self.page_size)
        following = str(start + limit) if start + limit < len(names) else ""
        return names[start : start + limit], following


@dataclass
class _Pending:
    """A fault that has not befallen all its calls."""

    fault: Fault
    skipped: int = 0
    left: int = 0

    def matches(self, method: str, zone: str) -> bool:
        """Whether it befalls this call, which then counts."""
        fault = self.fault
        if self.left <= 0 or fault.method not in ("*", method) or fault.zone not in ("", zone):
            return False
        if self.skipped < fault.skip:
            self.skipped += 1
            return False
        self.left -= 1
        return True


def copy_of(message: _Message) -> _Message:
    """Return another message that says the same."""
    kind: Any = type(message)
    return cast("_Message", kind.deserialize(kind.serialize(message)))


def pending(fault: Fault) -> _Pending:
    """Return a fault before its first call."""
    return _Pending(fault, left=fault.times)


def status(code: int, message: str, reason: str = "", metadata: Mapping[str, str] | None = None) -> status_pb2.Status:
    """Return an error as Google writes it."""
    made = status_pb2.Status(code=code, message=message)
    if reason:
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="googleapis.com", metadata=dict(metadata or {})))
        made.details.append(packed)
    return made


def error(code: int, message: str, reason: str = "", metadata: Mapping[str, str] | None = None) -> ApiError:
    """Return an error to raise."""
    return ApiError(status(code, message, reason, metadata))


def error_of(fault: Fault) -> ApiError:
    """Return the error that a fault answers."""
    made = status(fault.code, fault.message, fault.reason, fault.metadata)
    if fault.retry_after_seconds:
        packed = any_pb2.Any()
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromMilliseconds(int(fault.retry_after_seconds * 1000))
        packed.Pack(info)
        made.details.append(packed)
    return ApiError(made)


def _chips(resource: tpu_v2.QueuedResource) -> int:
    spec = resource.tpu.node_spec[0]
    return tpu_type(spec.node.accelerator_type).chips * (spec.multislice_params.node_count or 1)
