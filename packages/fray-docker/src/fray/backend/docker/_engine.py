"""The container engine: where it is, a client for it, and its errors as Fray's.

The engine is found as the docker command finds it: by what the caller names, `DOCKER_HOST`, `DOCKER_CONTEXT`, the
context in use, the default socket. Whatever a request meets comes out as an error of `fray.errors`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import docker
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.errors import APIError, DockerException, ImageNotFound, NotFound, create_api_error_from_http_exception
from docker.tls import TLSConfig
from fray.errors import (
    AuthenticationError,
    ConnectionFailedError,
    FrayError,
    InvalidValueError,
    PlatformError,
    SubmissionError,
    UnsupportedError,
)

__all__ = ["ContainerGoneError", "Endpoint", "Engine", "engine_errors", "find_endpoint"]

DEFAULT = "the default"
REMEDY = "see that the engine runs (`docker info`), and that DOCKER_HOST or the docker context in use names it"


@dataclass(frozen=True)
class Endpoint:
    """Where an engine is.

    Attributes:
        host: As in `DOCKER_HOST`.
        named_by: What said so, for messages.
        ca: The path of the CA that its certificate is checked by; None where it needs no TLS.
        certificate: The paths of the client's certificate and key.
        verify: Whether its certificate is checked.
    """

    host: str
    named_by: str
    ca: str | None = None
    certificate: tuple[str, str] | None = None
    verify: bool = True

    @property
    def uses_tls(self) -> bool:
        """Whether requests go by TLS."""
        return self.certificate is not None or self.ca is not None

    def environment(self) -> dict[str, str]:
        """Return the variables by which the docker command reaches the same engine; give it no others of its own."""
        variables = {"DOCKER_HOST": self.host}
        if self.uses_tls:
            folder = os.path.dirname(self.certificate[0] if self.certificate else self.ca or "")
            variables["DOCKER_CERT_PATH"] = folder
            if self.verify:
                variables["DOCKER_TLS_VERIFY"] = "1"
            else:
                variables["DOCKER_TLS"] = "1"
        return variables


def find_endpoint(address: str | None = None) -> Endpoint:
    """Find the engine.

    Args:
        address: A URL as in `DOCKER_HOST`, or the name of a docker context; where None, the environment says.

    Raises:
        InvalidValueError: There is no such context, or the address is none.
        UnsupportedError: It is reached by ssh.
    """
    found = _find_endpoint(address)
    if found.host.startswith("ssh://"):
        # docker-py's way by ssh closes the connection before what was sent has arrived: secrets would be lost.
        raise UnsupportedError(
            f"{found.host} (by {found.named_by}): engines are not reached by ssh; forward the socket, as in "
            "`ssh -nNT -L /tmp/engine.sock:/var/run/docker.sock USER@HOST`, and connect to docker:unix:///tmp/engine.sock"
        )
    return found


def _find_endpoint(address: str | None) -> Endpoint:
    if address is not None and ("://" in address or address.startswith("/")):
        return _with_tls_of_environment(f"unix://{address}" if address.startswith("/") else address, "the address")
    if address is not None:
        return _of_context(address, f"the docker context {address!r}")
    if host := os.environ.get("DOCKER_HOST"):
        return _with_tls_of_environment(host, "DOCKER_HOST")
    context = os.environ.get("DOCKER_CONTEXT") or _context_in_use()
    if context and context != "default":
        return _of_context(context, f"the docker context {context!r}")
    return Endpoint("unix:///var/run/docker.sock", DEFAULT)


class ContainerGoneError(Exception):
    """A container that is asked about is not there any more."""


class Engine:
    """A client for one engine. It keeps connections open and may be used by several threads.

    Args:
        endpoint: Where the engine is.
        timeout_seconds: How long it may take to answer a request.
    """

    def __init__(self, endpoint: Endpoint, timeout_seconds: float = 60.0) -> None:
        self.endpoint = endpoint
        self.timeout_seconds = timeout_seconds
        self._has_client = False

    @cached_property
    def version(self) -> dict[str, Any]:
        """The engine's version, operating system (`Os`) and architecture (`Arch`), asked once."""
        with self.errors():
            client = self._client(DEFAULT_DOCKER_API_VERSION)
            try:
                found: dict[str, Any] = client.version(api_version=False)
            finally:
                client.close()
            return found

    @cached_property
    def api(self) -> docker.APIClient:
        """docker-py's client, at the engine's own version of the API; its first use asks for that."""
        client = self._client(self.version["ApiVersion"])
        self._has_client = True
        return client

    def _client(self, version: str) -> docker.APIClient:
        tls: TLSConfig | bool = False
        if self.endpoint.uses_tls:
            tls = TLSConfig(
                client_cert=self.endpoint.certificate, ca_cert=self.endpoint.ca, verify=self.endpoint.verify
            )
        timeout: Any = self.timeout_seconds  # docker-py says int, and hands it to requests, which takes fractions
        client = docker.APIClient(
            base_url=self.endpoint.host,
            version=version,
            tls=tls,
            timeout=timeout,
        )
        if client.verify is not True:
            # Or REQUESTS_CA_BUNDLE would go before the CA that the engine is checked by (psf/requests#3829).
            client.trust_env = False
        return client

    @cached_property
    def info(self) -> dict[str, Any]:
        """What the engine says of itself and its machine, asked once."""
        with self.errors():
            found: dict[str, Any] = self.api.info()
            return found

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what requests inside meet into errors of Fray's; see `engine_errors`."""
        with engine_errors(self.endpoint):
            yield

    @contextmanager
    def stream(self, path: str, params: dict[str, Any], silence_seconds: float) -> Iterator[Iterator[bytes]]:
        """Ask for something long, and have its pieces to read as they come; what is left unread is not sent.

        docker-py's own readers make two reads of each line of a log, wait for ever for an engine that went without a
        word, and leave an answer open that is not read to its end, which keeps its container locked.

        Args:
            path: What to ask for, as in `/containers/ID/logs`.
            params: The query.
            silence_seconds: How long the engine may send nothing before the reader gets a `ReadTimeoutError` of
                urllib3's. To begin its answer it has as long, and requests says so.

        Raises:
            docker.errors.APIError: The engine refuses.
        """
        import requests

        api: Any = self.api  # by its own way of asking, which sends the headers that docker's configuration has
        response = api._get(
            api._url(path),
            params=params,
            headers={"Accept-Encoding": "identity"},
            stream=True,
            timeout=(self.timeout_seconds, silence_seconds),
        )
        with closing(response):
            try:
                response.raise_for_status()
            except requests.exceptions.HTTPError as error:
                raise create_api_error_from_http_exception(error) from error
            yield response.raw.stream(1 << 18, decode_content=False)

    def inspect_image(self, reference: str) -> dict[str, Any] | None:
        """Return what the engine knows of an image; None where it has none of that name."""
        with self.errors():
            try:
                found: dict[str, Any] = self.api.inspect_image(reference)
                return found
            except (ImageNotFound, NotFound):
                return None

    def inspect_container(self, container: str) -> dict[str, Any] | None:
        """Return what the engine knows of a container; None where there is none of that name or id."""
        with self.errors():
            try:
                found: dict[str, Any] = self.api.inspect_container(container)
                return found
            except NotFound:
                return None

    def is_running(self, container: str) -> bool:
        """Whether there is such a container and it runs."""
        found = self.inspect_container(container)
        return found is not None and bool(found["State"]["Running"])

    def wait_for_end(self, container: str, seconds: float) -> int | None:
        """Wait until a container does not run; return its exit code, -1 where it is gone, None after that time."""
        import requests

        with self.errors():
            try:
                timeout: Any = seconds  # as above
                return int(self.api.wait(container, timeout=timeout)["StatusCode"])
            except NotFound:
                return -1
            except requests.exceptions.ReadTimeout:
                return None
            except requests.exceptions.ConnectionError as error:
                if "Read timed out" not in str(error):
                    raise
                return None

    def ask_to_stop(self, container: str) -> None:
        """Send SIGTERM to a container's first process; nothing where it does not run."""
        with self.errors():
            try:
                self.api.kill(container, "SIGTERM")
                if self.api.inspect_container(container)["State"]["Paused"]:
                    self.api.unpause(container)  # or it would hear of it when somebody else does that
            except APIError as error:
                if error.status_code not in (404, 409):  # it does not run
                    raise

    @contextmanager
    def own_client(self, timeout_seconds: float | None = None) -> Iterator[Engine]:
        """Have another client for the same engine, with connections of its own, closed at the end."""
        own = Engine(self.endpoint, timeout_seconds or self.timeout_seconds)
        own.version = self.version
        try:
            yield own
        finally:
            own.close()

    def close(self) -> None:
        """Close the connections."""
        if self._has_client:
            self.api.close()


@contextmanager
def engine_errors(endpoint: Endpoint) -> Iterator[None]:
    """Turn what docker-py and its transport raise into errors of Fray's.

    An answer that a caller expects (no such container, a conflict) is for it to catch inside.

    Raises:
        ConnectionFailedError: The engine cannot be reached, or went away.
        AuthenticationError: Somebody refuses the credentials.
        SubmissionError: The engine's disk is full.
        PlatformError: Anything else that the engine says.
    """
    import requests
    import urllib3

    try:
        yield
    except FrayError:
        raise  # by an inner use of this
    except APIError as error:
        said = str(error.explanation or error)
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise AuthenticationError(f"the engine at {endpoint.host} refuses: {said}") from error
        if "no space left on device" in said:
            raise SubmissionError(
                f"the engine at {endpoint.host} has no space left on its disk: {said}; free some there "
                "(`docker system df` shows what takes it, `fray docker prune` removes old images of Fray's)"
            ) from error
        raise PlatformError(f"the engine at {endpoint.host} says: {said}") from error
    except (
        requests.exceptions.RequestException,
        urllib3.exceptions.HTTPError,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise ConnectionFailedError(_unreachable(endpoint, error)) from error
    except DockerException as error:
        raise ConnectionFailedError(_unreachable(endpoint, error)) from error


def _unreachable(endpoint: Endpoint, error: BaseException) -> str:
    return f"the docker engine at {endpoint.host} (by {endpoint.named_by}) cannot be reached: {error}; {REMEDY}"


def _with_tls_of_environment(host: str, named_by: str) -> Endpoint:
    if "://" not in host:
        host = f"tcp://{host}"
    if not host.startswith(("tcp://", "https://")):
        return Endpoint(host, named_by)
    folder = os.environ.get("DOCKER_CERT_PATH") or None
    verify = bool(os.environ.get("DOCKER_TLS_VERIFY"))
    if not folder and not verify:
        return Endpoint(host, named_by)
    folder = folder or os.path.expanduser("~/.docker")
    files = (f"{folder}/ca.pem", f"{folder}/cert.pem", f"{folder}/key.pem")
    for file in files:
        if not os.path.exists(file):
            raise InvalidValueError(f"DOCKER_CERT_PATH: {file} is not there, which TLS to {host} needs")
    return Endpoint(host, named_by, files[0], files[1:], verify)


def _of_context(name: str, named_by: str) -> Endpoint:
    # The docker command's own files: docker-py's reader finds none where there is no config.json beside them.
    key = hashlib.sha256(name.encode()).hexdigest()
    folder = _config_folder() / "contexts"
    try:
        known = json.loads((folder / "meta" / key / "meta.json").read_bytes())["Endpoints"]["docker"]
        host, verify = str(known["Host"]), not known.get("SkipTLSVerify", False)
    except FileNotFoundError:
        raise InvalidValueError(
            f"there is no docker context {name!r} (`docker context ls` shows them); an address is a URL such as "
            "unix:///var/run/docker.sock or tcp://host:2376"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidValueError(f"{named_by} cannot be read: {type(error).__name__}: {error}") from error
    files = {file: str(folder / "tls" / key / "docker" / f"{file}.pem") for file in ("ca", "cert", "key")}
    there = {file: path for file, path in files.items() if os.path.exists(path)}
    certificate = (there["cert"], there["key"]) if {"cert", "key"} <= there.keys() else None
    return Endpoint(host, named_by, there.get("ca"), certificate, verify)


def _context_in_use() -> str | None:
    try:
        name = json.loads((_config_folder() / "config.json").read_bytes()).get("currentContext")
    except (OSError, ValueError, AttributeError):
        return None  # without it, as the docker command does
    return name if isinstance(name, str) else None


def _config_folder() -> Path:
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")
