"""The calls that are made, one method each: repeated while that can help, never without a bound, never too fast.

Google's client has no default timeout and no default retry for any of them, and its own retry sleeps by the wall clock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from fray.backend.tpu._errors import (
    is_passing_credentials_error,
    is_transient,
    retry_after_seconds,
    translate,
    translate_credentials,
    translate_status,
)
from fray.backend.tpu.interface import Clock
from fray.errors import AuthenticationError, ConnectionFailedError, FrayError

if TYPE_CHECKING:
    from google.cloud.tpu_v2 import Node, QueuedResource, TpuClient

__all__ = ["CALL_TIMEOUT_SECONDS", "Api", "at_once"]

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

# For one attempt: after this its answer is not waited for any more.
CALL_TIMEOUT_SECONDS = 30.0
# For one call with all its attempts, where the caller has no nearer deadline.
CALL_DEADLINE_SECONDS = 120.0
_FIRST_DELAY_SECONDS = 1.0
_LONGEST_DELAY_SECONDS = 30.0
_PAGE_SIZE = 500
# More calls than are ever made at the same time.
_LONGEST_LINE = 1000
_stopping = threading.local()


class StoppedError(Exception):
    """Raised in a thread whose siblings do not need its answer any more."""


class _Stop:
    """Whether those who work at once are to end; so are those whom one of them has working at once for it."""

    def __init__(self, outer: _Stop | None) -> None:
        self.is_wanted = False
        self._outer = outer

    def __bool__(self) -> bool:
        return self.is_wanted or bool(self._outer)


def at_once(function: Callable[[_Item], _Answer], items: Sequence[_Item], workers: int) -> list[_Answer]:
    """Call a function for each item, several at the same time; return the answers in order.

    Whatever one raises, an interrupt included, is raised when all have ended; those that wait to try again end early.
    """
    if workers <= 1 or len(items) <= 1:
        return [function(item) for item in items]
    stop = _Stop(getattr(_stopping, "stop", None))

    def call(item: _Item) -> _Answer:
        _stopping.stop = stop
        return function(item)

    with ThreadPoolExecutor(min(workers, len(items)), thread_name_prefix="fray-tpu") as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            stop.is_wanted = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Api:
    """The Cloud TPU API of one project.

    Args:
        project: Its id.
        connect: Makes the client, when it is first needed.
        clock: What time is told by.
        calls_per_second: More than this are spread over time. Google's own limits are per minute and project.
        jitter: Returns numbers from 0 to 1, so that clients that failed together do not try again together.
    """

    def __init__(
        self,
        project: str,
        connect: Callable[[], TpuClient],
        clock: Clock,
        *,
        calls_per_second: float = 10.0,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.project = project
        self._connect = connect
        self._clock = clock
        self._interval = 1.0 / calls_per_second
        self._burst_seconds = 2.0
        self._next_call = 0.0
        self._jitter = jitter
        self._lock = threading.Lock()
        self._connecting = threading.Lock()
        self._connected: TpuClient | None = None

    def create_queued_resource(
        self,
        zone: str,
        resource_id: str,
        resource: QueuedResource,
        *,
        request_id: str,
        deadline: float,
        on_attempt: Callable[[], None],
    ) -> str:
        """Ask for slices; return the operation's name. `on_attempt` is called before each attempt."""
        from google.cloud.tpu_v2 import CreateQueuedResourceRequest

        request = CreateQueuedResourceRequest(
            parent=self._parent(zone), queued_resource_id=resource_id, queued_resource=resource, request_id=request_id
        )

        def attempt(timeout: float) -> str:
            on_attempt()
            created = self._client.create_queued_resource(request, retry=None, timeout=timeout)
            return str(created.operation.name)

        return self._call(f"create {resource_id} in {zone}", zone, attempt, deadline)

    def get_queued_resource(self, name: str, deadline: float | None = None) -> QueuedResource | None:
        """Return a queued resource; None where there is none of this name."""
        return self._get(
            name, lambda timeout: self._client.get_queued_resource(name=name, retry=None, timeout=timeout), deadline
        )

    def get_node(self, name: str, deadline: float | None = None) -> Node | None:
        """Return a node; None where there is none of this name."""
        return self._get(name, lambda timeout: self._client.get_node(name=name, retry=None, timeout=timeout), deadline)

    def get_nodes(self, names: Sequence[str], workers: int, deadline: float | None = None) -> dict[str, Node]:
        """Return those of the nodes that there are, by the names that they were asked for by."""
        found = at_once(lambda name: self.get_node(name, deadline), names, workers)
        return {name: node for name, node in zip(names, found, strict=True) if node is not None}

    def delete_queued_resource(self, name: str, *, request_id: str, deadline: float) -> str | None:
        """Delete a queued resource and its nodes; return the operation's name, None where it was gone."""
        from google.cloud.tpu_v2 import DeleteQueuedResourceRequest

        request = DeleteQueuedResourceRequest(name=name, request_id=request_id, force=True)

        def attempt(timeout: float) -> str:
            deleted = self._client.delete_queued_resource(request, retry=None, timeout=timeout)
            return str(deleted.operation.name)

        return self._get(name, attempt, deadline, verb="delete")

    def delete_node(self, name: str, deadline: float) -> str | None:
        """Delete a node; return the operation's name, None where it was gone."""

        def attempt(timeout: float) -> str:
            return str(self._client.delete_node(name=name, retry=None, timeout=timeout).operation.name)

        return self._get(name, attempt, deadline, verb="delete")

    def set_labels(self, node: Node, labels: dict[str, str], deadline: float | None = None) -> None:
        """Replace a node's labels."""
        from google.cloud.tpu_v2 import Node
        from google.protobuf.field_mask_pb2 import FieldMask

        changed, mask = Node(name=node.name, labels=labels), FieldMask(paths=["labels"])

        def attempt(timeout: float) -> None:
            self._client.update_node(node=changed, update_mask=mask, retry=None, timeout=timeout)

        self._call(f"label {_short(node.name)}", _zone(node.name), attempt, deadline)

    def list_queued_resources(self, zone: str) -> list[QueuedResource]:
        """Return all queued resources of a zone."""
        from google.cloud.tpu_v2 import ListQueuedResourcesRequest

        def page(timeout: float, token: str) -> tuple[Iterable[QueuedResource], Iterable[str], str]:
            request = ListQueuedResourcesRequest(parent=self._parent(zone), page_size=_PAGE_SIZE, page_token=token)
            found = next(iter(self._client.list_queued_resources(request, retry=None, timeout=timeout).pages))
            return found.queued_resources, found.unreachable, found.next_page_token

        return self._all_pages("queued resources", zone, page)

    def list_nodes(self, zone: str) -> list[Node]:
        """Return all nodes of a zone."""
        from google.cloud.tpu_v2 import ListNodesRequest

        def page(timeout: float, token: str) -> tuple[Iterable[Node], Iterable[str], str]:
            request = ListNodesRequest(parent=self._parent(zone), page_size=_PAGE_SIZE, page_token=token)
            found = next(iter(self._client.list_nodes(request, retry=None, timeout=timeout).pages))
            return found.nodes, found.unreachable, found.next_page_token

        return self._all_pages("nodes", zone, page)

    def operation_error(self, operation: str, *, what: str, zone: str) -> tuple[bool, FrayError | None]:
        """Return whether an operation is done, and why it failed if it did. One that is forgotten is done."""

        def attempt(timeout: float) -> tuple[bool, FrayError | None]:
            from google.api_core import exceptions

            client = self._client.transport.operations_client
            try:
                found = client.get_operation(operation, retry=None, timeout=timeout)
            except exceptions.NotFound:
                return True, None
            if found.done and found.HasField("error"):
                return True, translate_status(found.error, what=what, project=self.project, zone=zone)
            return bool(found.done), None

        return self._call(what, zone, attempt, None)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._connected is not None:
            self._connected.transport.close()  # type: ignore[no-untyped-call]

    @property
    def _client(self) -> TpuClient:
        with self._connecting:
            if self._connected is None:
                self._connected = self._connect()
            return self._connected

    def _get(
        self, name: str, attempt: Callable[[float], _Answer], deadline: float | None, *, verb: str = "look at"
    ) -> _Answer | None:
        from google.api_core import exceptions

        def get(timeout: float) -> _Answer | None:
            try:
                return attempt(timeout)
            except exceptions.NotFound:
                return None

        return self._call(f"{verb} {_short(name)} in {_zone(name)}", _zone(name), get, deadline)

    def _call(self, what: str, zone: str, attempt: Callable[[float], _Answer], deadline: float | None) -> _Answer:
        """Make a call, again and again while it fails in a way that passes, until the deadline."""
        from google.api_core.exceptions import GoogleAPICallError
        from google.auth.exceptions import GoogleAuthError

        if deadline is None:
            deadline = self._clock.now() + CALL_DEADLINE_SECONDS
        delay = _FIRST_DELAY_SECONDS
        while True:
            self._wait_for_turn()
            try:
                # An answer that is due after the deadline is better than none: at least a second.
                return attempt(max(1.0, min(CALL_TIMEOUT_SECONDS, deadline - self._clock.now())))
            except GoogleAuthError as error:
                pause = delay * (0.5 + self._jitter())
                if not is_passing_credentials_error(error) or self._clock.now() + pause >= deadline:
                    raise translate_credentials(error) from error
            except GoogleAPICallError as error:
                pause = max(delay * (0.5 + self._jitter()), retry_after_seconds(error))
                if not is_transient(error) or self._clock.now() + pause >= deadline:
                    raise translate(error, what=what, project=self.project, zone=zone) from error
            self.pause(pause)
            delay = min(2 * delay, _LONGEST_DELAY_SECONDS)

    def pause(self, seconds: float) -> None:
        """Let time go by; end early where nobody waits any more."""
        stop: _Stop | None = getattr(_stopping, "stop", None)
        if stop is None:
            self._clock.sleep(seconds)
            return
        while seconds > 0:
            if stop:
                raise StoppedError
            self._clock.sleep(min(1.0, seconds))
            seconds -= 1.0

    def _wait_for_turn(self) -> None:
        """Take a place in the line of calls: some may come in a burst, then they are spread."""
        with self._lock:
            now = self._clock.now()
            if self._next_call > now + _LONGEST_LINE * self._interval:
                self._next_call = now  # the clock was set back: there is no such line
            self._next_call = max(self._next_call, now - self._burst_seconds) + self._interval
            wait = self._next_call - now
        if wait > 0:
            self.pause(wait)

    def _all_pages(
        self, what: str, zone: str, page: Callable[[float, str], tuple[Iterable[_Answer], Iterable[str], str]]
    ) -> list[_Answer]:
        """Return all that a list call gives, each page a call of its own, repeated by itself where it fails.

        Args:
            what: What is listed.
            zone: Where.
            page: Makes the call, given its timeout and a page's token; returns what is on the page, the places that
                could not be asked, and the next page's token, empty after the last.
        """
        found: list[_Answer] = []
        token = ""
        while True:

            def attempt(timeout: float, token: str = token) -> tuple[list[_Answer], str]:
                listed, unreachable, following = page(timeout, token)
                self._all_reached(unreachable)
                return list(listed), following

            listed, token = self._call(f"list {what} in {_where(zone)}", zone, attempt, None)
            found += listed
            if not token:
                return found

    def _all_reached(self, unreachable: Iterable[str]) -> None:
        # What cannot be seen is not taken for what is not there.
        if missing := ", ".join(sorted(_short(place) for place in unreachable)):
            raise ConnectionFailedError(
                f"Google cannot say what there is in {missing}: try later, or ask for other zones one by one"
            )

    def _parent(self, zone: str) -> str:
        return f"projects/{self.project}/locations/{zone}"


def project_of_environment() -> str:
    """Return the project that the environment or gcloud's configuration names.

    Raises:
        AuthenticationError: There are no credentials, which is where it is looked for.
    """
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    try:
        _, project = google.auth.default()
    except GoogleAuthError as error:
        raise translate_credentials(error) from error
    if not project:
        raise AuthenticationError(
            "no project is named: give one, set GOOGLE_CLOUD_PROJECT, or run `gcloud config set project PROJECT`"
        )
    return str(project)


def connect(endpoint: str | None) -> TpuClient:
    """Return a client: of Google, or of a stand-in that listens at `host:port` without encryption."""
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.tpu_v2 import TpuClient
    from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcTransport

    if endpoint is not None:
        import grpc

        return TpuClient(transport=TpuGrpcTransport(channel=grpc.insecure_channel(endpoint)))
    try:
        return TpuClient()
    except GoogleAuthError as error:
        raise translate_credentials(error) from error


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _zone(name: str) -> str:
    return name.split("/")[3]


def _where(zone: str) -> str:
    return "all zones" if zone == "-" else zone
