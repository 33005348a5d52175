"""All that Fray relies on in Ray without Ray's documentation promising it, in one place.

- `PUT /api/packages/gcs/NAME` puts bytes into the head's key-value store: working directories and Fray's own files, as
  Ray's client does; secrets; the mark of a job that is not to start. Without it no job can be submitted.
- The store's own protocol, plain gRPC on `RAY_ADDRESS`: a job reads those, and reports what becomes of it, in
  milliseconds. Without it `ray._raylet.GcsClient` does, for an `import ray` (half a second a job).
- Where the Jobs API keeps a job's record in that store. Without it a job's own report is missing, and Ray's is told.
- `GET /api/v0/logs...` gives files below a node's log folder: exact output, outputs. Without it
  Ray's own log of the job is read, with Ray's words in it, all of it each time; and there are no outputs.
- The names of the supervisor actor and its namespace, for stopping a job that waits. Without them it stops when Ray
  starts it.
- What Ray's monitor of a job writes when the job's record is gone.
- What each node has free (`ray._private.state`), by which `run_on_tpu` sees which slices can be had. Without it all
  look free, and taking them fails until they are.

`_rest` has the paths, and replaces the one method of Ray's client by which it reaches the network.

Tested against the versions that `TESTED` spans; on others the plain protocol is not used. Part of this runs inside the
job before anything of Ray is imported there: the standard library only.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

__all__ = [
    "GHOST_ENTRYPOINT",
    "JOB_NAMESPACE",
    "MONITOR_SECONDS",
    "KvError",
    "PlainKv",
    "RayKv",
    "TESTED",
    "available_resources",
    "connect_kv",
    "current_session",
    "drop_pending_program",
    "is_tested",
    "job_key",
    "package_key",
    "supervisor_name",
    "SUPERVISOR_NAMESPACE",
]

TESTED = ((2, 54), (2, 60))
"""The first and the last minor version of Ray that the tests ran on."""

JOB_NAMESPACE = b"job"
SUPERVISOR_NAMESPACE = "SUPERVISOR_ACTOR_RAY_NAMESPACE"

GHOST_ENTRYPOINT = "Entrypoint not found."
"""The entrypoint of a record that Ray's monitor wrote of a job that it watched, and whose own record was deleted."""

MONITOR_SECONDS = 2.5
"""After so long the monitor has seen that a job is over; it looks every second."""

_TIMEOUT_SECONDS = 10.0
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 0x1, 0x1, 0x4
_LARGEST_FRAME = 16384
_WINDOW = 65535

_DROP_PENDING = """
import json, time, ray
ray.init(address="auto", namespace={namespace!r}, log_to_driver=False, configure_logging=False)
from ray._private.worker import global_worker
kv = global_worker.gcs_client
found = kv.internal_kv_get({key!r}, namespace={job_namespace!r})
record = json.loads(found) if found else {{}}
if record.get("status") == "PENDING":
    record.update(status="STOPPED", message="stopped on request", end_time=int(time.time() * 1000))
    kv.internal_kv_put({key!r}, json.dumps(record).encode(), True, namespace={job_namespace!r})
    for name in {names!r}:
        kv.internal_kv_del(name, False, namespace=None)
    try:
        ray.kill(ray.get_actor({supervisor!r}))
    except ValueError:
        pass
"""


class KvError(OSError):
    """The head's store cannot be reached, or does not answer as expected."""


def is_tested(ray_version: str) -> bool:
    """Say whether the tests ran on this version of Ray, give or take a patch."""
    try:
        major, minor = (int(part) for part in ray_version.split(".")[:2])
    except ValueError:
        return False
    return TESTED[0] <= (major, minor) <= TESTED[1]


def job_key(job_id: str) -> bytes:
    """Where the record of a submitted job is, in the namespace `JOB_NAMESPACE`."""
    return f"_ray_internal_job_info_{job_id}".encode()


def package_key(name: str) -> bytes:
    """Where what was put under this name by `PUT /api/packages/gcs/NAME` is, in the empty namespace."""
    return f"gcs://{name}".encode()


def supervisor_name(job_id: str) -> str:
    """The name of the actor that runs a submitted job, in the namespace `SUPERVISOR_NAMESPACE`."""
    return f"_ray_internal_job_actor_{job_id}"


def drop_pending_program(job_id: str, secrets: str | None) -> str:
    """Return the Python program that, run on the cluster, ends a job that waits, and has its secrets forgotten.

    The record says STOPPED before the supervisor dies, so that Ray's monitor finds nothing to report. A supervisor that
    starts in between finds a job that is over, and the job's entrypoint that it is deleted.
    """
    return _DROP_PENDING.format(
        namespace=SUPERVISOR_NAMESPACE,
        key=job_key(job_id),
        job_namespace=JOB_NAMESPACE,
        names=[package_key(secrets)] if secrets else [],
        supervisor=supervisor_name(job_id),
    )


def available_resources() -> dict[str, dict[str, float]]:
    """Return what each node of the cluster that this process is connected to has free: node id → resources."""
    from ray._private.state import available_resources_per_node

    found: dict[str, dict[str, float]] = available_resources_per_node()  # type: ignore[no-untyped-call]
    return found


def current_session() -> str | None:
    """Return the name of the session of the cluster that this process is connected to, as its dashboard gives it."""
    from ray._private.worker import global_worker

    node = global_worker.node
    return str(node.session_name) if node is not None else None


def connect_kv(address: str, *, plain: bool) -> PlainKv | RayKv:
    """Return a client of the head's store: the quick one where it may be used and answers, else Ray's own."""
    if plain and os.environ.get("RAY_USE_TLS", "0") in ("", "0", "false", "False"):
        kv = PlainKv(address, _token())
        try:
            kv.get(b"fray")
            return kv
        except KvError:
            kv.close()  # somebody is there, and Ray's own client knows better how to speak with them
        except OSError as error:
            kv.close()
            raise KvError(f"{address}: {error.strerror or error}") from error
    return RayKv(address)


class RayKv:
    """The head's store by Ray's own client, which knows TLS and every version's protocol."""

    def __init__(self, address: str) -> None:
        if sys.flags.no_site:  # a job's entrypoint is started without
            import site

            site.main()
        try:
            from ray._raylet import GcsClient  # type: ignore[attr-defined]
        except ImportError as error:
            raise KvError(f"this Python ({sys.executable}) has no ray: {error}") from error

        self._client = GcsClient(address=address)

    def get(self, key: bytes, namespace: bytes = b"") -> bytes | None:
        """Return what is stored under a key."""
        try:
            value: bytes | None = self._client.internal_kv_get(key, namespace=namespace or None)
            return value
        except Exception as error:
            raise KvError(f"{type(error).__name__}: {error}") from error

    def put(self, key: bytes, value: bytes, namespace: bytes = b"") -> None:
        """Store a value under a key, in place of what was there."""
        try:
            self._client.internal_kv_put(key, value, True, namespace=namespace or None)
        except Exception as error:
            raise KvError(f"{type(error).__name__}: {error}") from error

    def delete(self, key: bytes, namespace: bytes = b"") -> None:
        """Remove a key, whether it is there or not."""
        try:
            self._client.internal_kv_del(key, False, namespace=namespace or None)
        except Exception as error:
            raise KvError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Nothing: Ray's client closes itself."""


class PlainKv:
    """The head's store by as much of gRPC as it takes: importing grpc costs a job more than all else that Fray does.

    One connection, made when needed; a call that fails on an old one is repeated on a new one.

    Args:
        address: The host and port of the head's store (GCS).
        token: The cluster's authentication token, where it has one.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host.strip("[]"), int(port)
        self._authority = address
        self._token = token
        self._socket: socket.socket | None = None

    def get(self, key: bytes, namespace: bytes = b"") -> bytes | None:
        """Return what is stored under a key."""
        reply = self._call("InternalKVGet", _field(1, key) + _field(2, namespace))
        return _read_field(reply, 2)

    def put(self, key: bytes, value: bytes, namespace: bytes = b"") -> None:
        """Store a value under a key, in place of what was there."""
        overwrite = b"\x18\x01"  # field 3, true
        self._call("InternalKVPut", _field(1, key) + _field(2, value) + overwrite + _field(4, namespace))

    def delete(self, key: bytes, namespace: bytes = b"") -> None:
        """Remove a key, whether it is there or not."""
        self._call("InternalKVDel", _field(1, key) + _field(2, namespace))

    def close(self) -> None:
        """Close the connection; the next call makes another."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _call(self, method: str, message: bytes) -> bytes:
        is_new = self._socket is None
        try:
            return self._call_once(method, message)
        except OSError:
            self.close()
            if is_new:
                raise
        try:
            return self._call_once(method, message)
        except OSError:
            self.close()
            raise

    def _call_once(self, method: str, message: bytes) -> bytes:
        if self._socket is None:
            self._open()
        self._stream += 2
        self._credit = self._initial_credit  # how much may be sent on this stream before the server asks for more
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/ray.rpc.InternalKVGcsService/{method}"),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        if self._token:
            headers.append(("authorization", f"Bearer {self._token}"))
        self._send(_HEADERS, _END_HEADERS, self._stream, b"".join(_header(*pair) for pair in headers))
        data = b"\0" + struct.pack(">I", len(message)) + message
        received: list[bytes] = []
        while data:
            size = min(len(data), _LARGEST_FRAME, self._credit, self._connection_credit)
            if size <= 0:
                if self._receive(received):
                    raise KvError(f"{method}: the store answered before it had heard the question")
                continue
            self._credit -= size
            self._connection_credit -= size
            self._send(_DATA, _END_STREAM if size == len(data) else 0, self._stream, data[:size])
            data = data[size:]
        while not self._receive(received):
            pass
        answer = b"".join(received)
        if len(answer) < 5:
            raise KvError(f"{method}: refused by the store at {self._authority}")
        return answer[5:]

    def _open(self) -> None:
        self._socket = socket.create_connection((self._host, self._port), _TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = -1
        self._initial_credit = self._connection_credit = _WINDOW
        self._socket.sendall(_PREFACE)
        large = (1 << 31) - 1
        self._send(_SETTINGS, 0, 0, struct.pack(">HI", 4, large))  # SETTINGS_INITIAL_WINDOW_SIZE
        self._send(_WINDOW_UPDATE, 0, 0, struct.pack(">I", large - _WINDOW))

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        assert self._socket is not None
        self._socket.sendall(struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload)

    def _receive(self, received: list[bytes]) -> bool:
        """Take in one frame; say whether it ends the answer."""
        head = self._read(9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
        payload = self._read(length)
        if kind == _SETTINGS and not flags & _ACK:
            for at in range(0, length, 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == 4:
                    self._credit += value - self._initial_credit
                    self._initial_credit = value
            self._send(_SETTINGS, _ACK, 0, b"")
        elif kind == _PING and not flags & _ACK:
            self._send(_PING, _ACK, 0, payload)
        elif kind == _WINDOW_UPDATE:
            if stream == 0:
                self._connection_credit += int.from_bytes(payload, "big")
            elif stream == self._stream:
                self._credit += int.from_bytes(payload, "big")
        elif kind == _GOAWAY or (kind == _RST_STREAM and stream == self._stream):
            raise KvError("the store closed the connection")
        elif stream == self._stream:
            if kind == _DATA:
                received.append(payload)
            return kind in (_DATA, _HEADERS) and bool(flags & _END_STREAM)
        return False

    def _read(self, size: int) -> bytes:
        assert self._socket is not None
        data = b""
        while len(data) < size:
            chunk = self._socket.recv(size - len(data))
            if not chunk:
                raise KvError("the store closed the connection")
            data += chunk
        return data


def _token() -> str | None:
    """The cluster's token, where it uses one: found as Ray finds it."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return None


def _header(name: str, value: str) -> bytes:
    """One header, as HPACK's literal without indexing."""
    return b"\0" + _hpack_string(name.encode()) + _hpack_string(value.encode())


def _hpack_string(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    prefix, size = b"\x7f", size - 127
    return prefix + _varint(size) + text


def _field(number: int, value: bytes) -> bytes:
    """One field of bytes, in protobuf's encoding."""
    return bytes([number << 3 | 2]) + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def _read_field(message: bytes, wanted: int) -> bytes | None:
    """Return a field of bytes of a protobuf message, None where it is not there."""
    at = 0
    while at < len(message):
        tag, at = _read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, at = _read_varint(message, at)
        elif kind == 2:
            size, at = _read_varint(message, at)
            if number == wanted:
                return message[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise KvError("the store's answer cannot be read")
    return None


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise KvError("the store's answer cannot be read")
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
