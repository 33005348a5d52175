"""One client of a Ray cluster's HTTP API: Ray's own, with a time limit on each request and errors told apart.

Ray's `JobSubmissionClient` takes its address from the environment before the one that it is given, has no time limits,
reads credentials once, and reports most of what goes wrong as a `RuntimeError`. Everything is as it says here instead.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import Any, NoReturn

import requests

import ray
from fray.errors import AuthenticationError, ConnectionFailedError, JobNotFoundError, PlatformError
from ray.dashboard.modules.dashboard_sdk import SubmissionClient
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

__all__ = ["HttpError", "RayRest", "Stream"]

_CONNECT_SECONDS = 5.0
_UPLOAD_SECONDS = 600.0
_SUBMIT_SECONDS = 60.0
_PAUSE_SECONDS = 0.5
# Ray breaks the answer off after this time, 30 s where it is not told, however much is still to come.
_FILE_SECONDS = 24 * 3600
# What Ray says where the head's agent is not there after ten seconds.
_NO_AGENT = "No available agent to submit job"


class HttpError(PlatformError):
    """The cluster answered, and the answer is a refusal.

    Attributes:
        status: The HTTP status.
        text: What the server said.
    """

    def __init__(self, message: str, status: int, text: str) -> None:
        super().__init__(message)
        self.status = status
        self.text = text


class RayRest:
    """Requests to one cluster.

    Attributes:
        address: Its dashboard.
        ray_version: Its version of Ray.
        session: The name of this life of it.

    Args:
        address: `http://…` or `https://…`.
        headers: Asked for the headers of each request anew.
        cookies: Sent with each request.
        verify: Whether to check the server's certificate, or the path of the CA to check it by.
        timeout_seconds: How long the server may take to begin its answer, or to go on with it.
    """

    def __init__(
        self,
        address: str,
        *,
        headers: Callable[[], Mapping[str, str]],
        cookies: Mapping[str, str] | None,
        verify: bool | str,
        timeout_seconds: float,
    ) -> None:
        self.address = address
        self._client = _Client(address, headers, dict(cookies or {}), verify, timeout_seconds)
        version = self._json("GET", "/api/version")
        self.ray_version = str(version["ray_version"])
        self.session = version.get("session_name")

    def has_restarted(self) -> bool:
        """Say whether this is another life of the cluster than the one that was connected to."""
        return bool(self._json("GET", "/api/version").get("session_name") != self.session)

    # Jobs

    def submit(self, **request: Any) -> None:
        """Submit a job; the arguments are those of `JobSubmissionClient.submit_job`.

        Raises:
            HttpError: The server refuses it, with "already exists" in its text where the id is taken.
        """
        give_up = time.monotonic() + _SUBMIT_SECONDS
        while True:
            try:
                with self._errors():
                    self._client.submit_job(**request)
                return
            except HttpError as error:
                # Nothing has been done then, and of a head that has just started it is true for a while.
                if _NO_AGENT not in error.text or time.monotonic() > give_up:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def job(self, job_id: str) -> JobDetails:
        """Return Ray's record of a job."""
        with self._errors(job_id):
            details = self._client.get_job_info(job_id)
        if details.type is not JobType.SUBMISSION or details.submission_id != job_id:
            raise JobNotFoundError(f"there is no job {job_id} on {self.address}")
        return details

    def jobs(self) -> list[JobDetails]:
        """Return Ray's records of all jobs that were submitted."""
        with self._errors():
            return [details for details in self._client.list_jobs() if details.type is JobType.SUBMISSION]

    def stop(self, job_id: str) -> None:
        """Ask Ray to stop a job."""
        with self._errors(job_id):
            self._client.stop_job(job_id)

    def delete(self, job_id: str) -> None:
        """Remove Ray's record of a job that is over."""
        with self._errors(job_id):
            self._client.delete_job(job_id)

    def ray_log(self, job_id: str) -> bytes:
        """Return Ray's own log of a job, as far as it is text."""
        with self._errors(job_id):
            return self._client.get_job_logs(job_id).encode(errors="surrogateescape")

    # The head's store

    def put(self, name: str, content: bytes) -> None:
        """Put bytes into the head's store."""
        with self._errors():
            self._check(self._client.request("PUT", f"/api/packages/gcs/{name}", content, timeout=_UPLOAD_SECONDS))

    def has(self, name: str) -> bool:
        """Say whether there is a package of this name. Asking has Ray remove it when no job has used it for minutes."""
        with self._errors():
            answer = self._client.request("GET", f"/api/packages/gcs/{name}")
            if answer.status_code == 404:
                return False
            self._check(answer)
            return True

    # Files below a node's log folder

    def list_files(self, node_id: str, pattern: str) -> list[str]:
        """Return the paths below a node's log folder that match a glob pattern; those of folders end in `/`."""
        answer = self._json("GET", "/api/v0/logs", params={"node_id": node_id, "glob": pattern})
        if not answer.get("result"):
            raise PlatformError(f"the logs of node {node_id} cannot be listed: {answer.get('msg')}")
        groups = answer["data"]["result"]
        return sorted({name for group in groups.values() for name in group})

    def read_file(self, node_id: str, name: str) -> Iterator[bytes]:
        """Yield what is in a file below a node's log folder."""
        with self._errors(), closing(self._open("file", node_id, name, timeout=str(_FILE_SECONDS))) as answer:
            yield from answer.iter_content(None)

    def follow_file(self, node_id: str, name: str, seconds: float) -> Stream:
        """Return what is in a file below a node's log folder, and what is added to it, looked for every `seconds`."""
        with self._errors():
            return Stream(self._open("stream", node_id, name, interval=str(seconds)), self._errors)

    def _open(self, kind: str, node_id: str, name: str, **options: str) -> requests.Response:
        params = {"node_id": node_id, "filename": name, "lines": "-1", **options}
        answer = self._client.request("GET", f"/api/v0/logs/{kind}", params=params, stream=True)
        try:
            self._check(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    # The cluster

    def resources(self) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
        """Return what the cluster has: resource → [used, total] of all nodes, and each node's own total."""
        status = self._json("GET", "/api/cluster_status")["data"]["clusterStatus"]
        usage = status["loadMetricsReport"]["usage"]
        return usage, [node.get("resources_total") or {} for node in self._nodes()]

    def node_labels(self) -> list[dict[str, str]]:
        """Return the labels of each node that is alive."""
        return [node.get("labels") or {} for node in self._nodes()]

    def has_node(self, node_id: str) -> bool:
        """Say whether a node is alive."""
        params = {"filter_keys": "node_id", "filter_predicates": "=", "filter_values": node_id}
        nodes = self._json("GET", "/api/v0/nodes", params=params)["data"]["result"]["result"]
        return any(node["state"] == "ALIVE" for node in nodes)

    def has_actor(self, name: str) -> bool:
        """Say whether there is, or was, an actor of this name."""
        params = {"filter_keys": "name", "filter_predicates": "=", "filter_values": name}
        actors = self._json("GET", "/api/v0/actors", params=params)["data"]["result"]["result"]
        return bool(actors)

    def close(self) -> None:
        """Close the connections."""
        self._client.session.close()

    # Behind it

    def _nodes(self) -> list[dict[str, Any]]:
        nodes = self._json("GET", "/api/v0/nodes", params={"limit": "10000", "detail": "true"})
        return [node for node in nodes["data"]["result"]["result"] if node["state"] == "ALIVE"]

    def _json(self, method: str, path: str, **options: Any) -> Any:
        with self._errors():
            answer = self._client.request(method, path, **options)
            self._check(answer)
            return answer.json()

    def _check(self, answer: requests.Response) -> None:
        if answer.status_code != 200:
            self._client._raise_error(answer)

    @contextmanager
    def _errors(self, job_id: str | None = None) -> Iterator[None]:
        """Turn what the libraries raise into errors of Fray's."""
        try:
            yield
        except HttpError as error:
            if error.status == 404 and job_id is not None:
                raise JobNotFoundError(f"there is no job {job_id} on {self.address}") from None
            raise
        except requests.exceptions.SSLError as error:
            raise ConnectionFailedError(
                f"the certificate of {self.address} is not trusted: {error}; name its CA by the option verify"
            ) from error
        except (requests.exceptions.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            raise ConnectionFailedError(
                f"the Ray cluster at {self.address} cannot be reached: {_innermost(error)}"
            ) from (error)
        except requests.exceptions.Timeout as error:
            raise ConnectionFailedError(f"the Ray cluster at {self.address} does not answer: {error}") from error
        except requests.exceptions.RequestException as error:
            raise PlatformError(f"the Ray cluster at {self.address}: {error}") from error


class Stream:
    """Bytes that come for as long as the server sends any. Closing it, in any thread, ends it in the one that reads."""

    def __init__(self, answer: requests.Response, errors: Callable[[], AbstractContextManager[None]]) -> None:
        self._answer = answer
        self._errors = errors
        self._is_closed = False

    def __iter__(self) -> Iterator[bytes]:
        try:
            with self._errors():
                yield from self._answer.iter_content(None)
        except PlatformError:
            if not self._is_closed:
                raise
        finally:
            self._answer.close()

    def close(self) -> None:
        """End it."""
        self._is_closed = True
        connection = self._answer.raw.connection
        if connection is not None and connection.sock is not None:
            with suppress(OSError):  # it has ended by itself
                connection.sock.shutdown(socket.SHUT_RDWR)


class _Client(JobSubmissionClient):
    """Ray's client, its one way to the network replaced."""

    def __init__(
        self,
        address: str,
        headers: Callable[[], Mapping[str, str]],
        cookies: dict[str, str],
        verify: bool | str,
        timeout_seconds: float,
    ) -> None:
        logging.getLogger("ray.dashboard.modules.dashboard_sdk").setLevel(logging.WARNING)
        # Not JobSubmissionClient's own: it would replace the address by the environment's.
        self._client_ray_version = ray.__version__
        SubmissionClient.__init__(self, address=address, cookies=cookies, verify=verify)
        self._ask_headers = headers
        self._timeout_seconds = timeout_seconds
        self.session = requests.Session()

    def request(
        self, method: str, endpoint: str, data: bytes | None = None, timeout: float | None = None, **options: Any
    ) -> requests.Response:
        """Make one request; a connection that has been idle is used again for what may be repeated only."""
        send = self.session.request if method == "GET" else requests.request
        answer = send(
            method,
            self._address + endpoint,
            cookies=self._cookies,
            data=data,
            headers=dict(self._ask_headers()),
            verify=self._verify,
            timeout=(_CONNECT_SECONDS, timeout or self._timeout_seconds),
            **options,
        )
        if answer.status_code in (401, 403):
            raise AuthenticationError(
                f"the Ray cluster at {self._address} refuses the credentials ({answer.status_code}: "
                f"{answer.text.strip()[:500]}); give them by the option token_file or headers, or by RAY_AUTH_TOKEN"
            )
        return answer

    def _do_request(
        self,
        method: str,
        endpoint: str,
        *,
        data: bytes | None = None,
        json_data: dict[str, Any] | None = None,
        **options: Any,
    ) -> requests.Response:
        # What cannot be repeated is waited for: a head that has just started takes seconds over its first job.
        patience = self._timeout_seconds if method == "GET" else max(self._timeout_seconds, _SUBMIT_SECONDS)
        return self.request(method, endpoint, data, timeout=patience, json=json_data, **options)

    def _check_connection_and_version(self, *args: object, **kwargs: object) -> None:
        """Nothing: the version is asked for once, when the cluster is connected to."""

    def _raise_error(self, r: requests.Response) -> NoReturn:
        text = r.text.strip()
        last = text.splitlines()[-1] if text else r.reason
        raise HttpError(f"the Ray cluster at {self._address} answered {r.status_code}: {last}", r.status_code, text)


def _innermost(error: BaseException) -> BaseException:
    """The error that says what happened, below the libraries' wrappings."""
    while True:
        reason = getattr(error, "reason", None) or (error.args[0] if error.args else None)
        if not isinstance(reason, BaseException):
            return error
        error = reason
