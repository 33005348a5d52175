"""What a TPU VM can reach from inside, served on loopback: for hosts that are simulated as processes.

One server stands for the metadata server of one host, and for the REST forms of the Cloud TPU API and Secret Manager,
as far as the agent uses them. What there is of nodes is somebody else's to know: a `Nodes`.
"""

from __future__ import annotations

import base64
import json
import re
import threading
import urllib.parse
import zlib
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol, Self

__all__ = ["HostServices", "Nodes"]

_TOKEN = "ya29.simulated"
_METADATA = "/computeMetadata/v1/"


class Nodes(Protocol):
    """The slices that a simulation has, in the API's JSON form and under its names."""

    def get(self, path: str) -> dict[str, Any] | None:
        """Return a node; None where there is none of that name."""

    def set_labels(self, path: str, labels: dict[str, str]) -> None:
        """Replace a node's labels."""

    def delete(self, path: str) -> bool:
        """Delete a node, or a queued resource with its nodes; False where there is none."""
        ...


class HostServices:
    """The services of one host, as a context manager.

    Attributes:
        requests: Method and path of what was asked of the two APIs.
        metadata_requests: The keys that were asked of the metadata server.
        denied: Permissions that the host's service account lacks, such as `tpu.nodes.update`.
    """

    def __init__(
        self,
        nodes: Nodes,
        *,
        project: str,
        zone: str,
        node: str,
        worker_id: int,
        accelerator_type: str,
        topology: str,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.requests: list[tuple[str, str]] = []
        self.metadata_requests: list[str] = []
        self.denied: set[str] = set()
        self._nodes = nodes
        self._secrets = dict(secrets or {})
        said = {
            "ACCELERATOR_TYPE": accelerator_type,
            "CONSUMER_PROJECT_ID": project,
            "NODE_ID": node,
            "TOPOLOGY": topology,
            "WORKER_ID": str(worker_id),
            "ZONE": zone,
        }
        self._metadata = {
            "project/project-id": project,
            "instance/zone": f"projects/123456789/zones/{zone}",
            "instance/attributes/instance-id": node,
            "instance/attributes/agent-worker-number": str(worker_id),
            "instance/attributes/accelerator-type": accelerator_type,
            "instance/attributes/tpu-env": "".join(f"{name}: '{value}'\n" for name, value in said.items()),
            "instance/service-accounts/default/token": json.dumps(
                {"access_token": _TOKEN, "expires_in": 3599, "token_type": "Bearer"}
            ),
            "instance/preempted": "FALSE",
        }
        self._changed = threading.Condition()
        self._closed = False
        services = self

        class Handler(_Handler):
            host_services = services

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """Return host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """Return the variables that lead the agent here."""
        url = f"http://{self.address}"
        return {"GCE_METADATA_HOST": self.address, "FRAY_TPU_API": url, "FRAY_SECRETS_API": url}

    def preempt(self) -> None:
        """Give the host its preemption notice."""
        self.set_metadata("instance/preempted", "TRUE")

    def set_metadata(self, key: str, value: str | None) -> None:
        """Change what the metadata server says; None for what it does not know."""
        with self._changed:
            if value is None:
                self._metadata.pop(key, None)
            else:
                self._metadata[key] = value
            self._changed.notify_all()

    def wait_for(self, method: str, path_part: str, timeout: float = 60.0) -> bool:
        """Wait until something was asked that has these; return whether it was."""
        with self._changed:
            return self._changed.wait_for(
                lambda: any(method == how and path_part in what for how, what in self.requests), timeout
            )

    def wait_for_metadata(self, key: str, timeout: float = 60.0) -> bool:
        """Wait until the metadata server was asked for a key; return whether it was."""
        with self._changed:
            return self._changed.wait_for(lambda: key in self.metadata_requests, timeout)

    def close(self) -> None:
        """Stop serving."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer_metadata(self, key: str, query: Mapping[str, str]) -> tuple[int, str, str]:
        """Return status, tag and value."""
        with self._changed:
            if query.get("wait_for_change") == "true":
                seen = query.get("last_etag")
                self._changed.wait_for(
                    lambda: self._closed or _tag(self._metadata.get(key, "")) != seen,
                    float(query.get("timeout_sec", "60")),
                )
            value = self._metadata.get(key)
            self.metadata_requests.append(key)
            self._changed.notify_all()
        return (404, "", "") if value is None else (200, _tag(value), value)

    def answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> tuple[int, Any]:
        """Return status and JSON of the other APIs."""
        result = self._answer(method, path, query, body)
        with self._changed:
            self.requests.append((method, path + (f"?{urllib.parse.urlencode(query)}" if query else "")))
            self._changed.notify_all()
        return result

    def _answer(self, method: str, path: str, query: Mapping[str, str], body: Any) -> tuple[int, Any]:
        if found := re.fullmatch(r"/v1/(projects/[^/]+/secrets/[^/]+/versions/[^/]+):access", path):
            if "secretmanager.versions.access" in self.denied:
                return _error(403, "Permission 'secretmanager.versions.access' denied")
            if (value := self._secrets.get(found[1])) is None:
                return _error(404, "Secret not found")
            return 200, {"name": found[1], "payload": {"data": base64.b64encode(value.encode()).decode()}}
        path = path.removeprefix("/v2/")
        kind = "queuedResources" if "/queuedResources/" in path else "nodes"
        permission = f"tpu.{kind}.{ {'GET': 'get', 'PATCH': 'update', 'DELETE': 'delete'}[method] }"
        if permission in self.denied:
            return _error(403, f"Permission '{permission}' denied on '{path}'")
        if method == "DELETE":
            return (
                (200, {"done": True}) if self._nodes.delete(path) else _error(404, f"Resource '{path}' was not found")
            )
        node = self._nodes.get(path)
        if node is None:
            return _error(404, f"Resource '{path}' was not found")
        if method == "GET":
            return 200, node
        if query.get("updateMask") != "labels" or set(body) != {"labels"}:
            return _error(400, "the simulation changes labels only")
        self._nodes.set_labels(path, body["labels"])
        return 200, {"done": True}


class _Handler(BaseHTTPRequestHandler):
    host_services: HostServices
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        if url.path.startswith(_METADATA):
            if self.headers.get("Metadata-Flavor") != "Google":
                self._send(403, "Missing Metadata-Flavor:Google header.")
                return
            status, tag, value = self.host_services.answer_metadata(url.path.removeprefix(_METADATA), query)
            self._send(status, value, ETag=tag)
            return
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {_TOKEN}":
            status, answer = _error(401, "Request is missing required authentication credential")
        else:
            body = json.loads(content) if content else None
            status, answer = self.host_services.answer(self.command, url.path, query, body)
        self._send(status, json.dumps(answer))

    def _send(self, status: int, text: str, **headers: str) -> None:
        content = text.encode()
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the host has ended meanwhile


def _tag(value: str) -> str:
    return f"{zlib.crc32(value.encode()):08x}"


def _error(status: int, message: str) -> tuple[int, Any]:
    return status, {"error": {"code": status, "message": message}}
