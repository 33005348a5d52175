"""Where a Ray cluster's HTTP API is, and what credentials it is asked with.

An address that is given in code wins over the environment's, which Ray's own client does the other way round.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from fray.backend.ray._internals import connect_kv
from fray.errors import ConnectionFailedError, InvalidTypeError, InvalidValueError

__all__ = ["Headers", "find_dashboard", "headers_of", "local_address"]

Headers = Mapping[str, str] | Callable[[], Mapping[str, str]]
"""Headers for each request, or what is asked for them each time."""

_HTTP = re.compile(r"https?://[^\s/]+(/\S*)?")
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+):[0-9]{1,5}")
_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")


def find_dashboard(address: str | None, dashboard_address: str | None) -> str | None:
    """Return the `http://…` of the cluster's dashboard; None where nothing says which cluster is meant.

    Args:
        address: `http://host:8265`, `host:6379` (the head's own port) or `auto` (the Ray that runs on this machine).
        dashboard_address: The first of these, where `address` is none of them.

    Raises:
        InvalidValueError: An address that cannot be.
        ConnectionFailedError: The head cannot be asked.
    """
    for what, given in (("dashboard_address", dashboard_address), ("address", address)):
        if given is not None:
            if not isinstance(given, str):
                raise InvalidTypeError(f"{what} must be a string, got {type(given).__name__}")
            return _dashboard_of(what, given)
    for name in _VARIABLES:
        if given := os.environ.get(name):
            return _dashboard_of(name, given)
    return None


def local_address() -> str | None:
    """Return the address of the head of the Ray cluster that was started on this machine last, if it says so."""
    try:
        written = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return written or None


def headers_of(headers: Headers | None, token_file: str | os.PathLike[str] | None) -> Callable[[], Mapping[str, str]]:
    """Return what gives a request's headers, with the token as it stands then.

    The token is in `token_file`, else in `RAY_AUTH_TOKEN`, else in the file that `RAY_AUTH_TOKEN_PATH` names, else,
    where `RAY_AUTH_MODE` is `token`, in `~/.ray/auth_token`. An `Authorization` among `headers` is used instead.
    """
    if headers is not None and not callable(headers) and not isinstance(headers, Mapping):
        raise InvalidTypeError(f"headers must map names to values, got {type(headers).__name__}")

    def ask() -> Mapping[str, str]:
        found = dict(headers() if callable(headers) else headers or {})
        if not any(name.lower() == "authorization" for name in found) and (token := _token(token_file)):
            found["Authorization"] = f"Bearer {token}"
        return found

    return ask


def _dashboard_of(what: str, address: str) -> str:
    if _HTTP.fullmatch(address):
        return address.rstrip("/")
    if address.startswith("ray://"):
        raise InvalidValueError(
            f"{what}: jobs are submitted over HTTP, and {address!r} is Ray Client's address; name the dashboard's, "
            "such as dashboard_address='http://head:8265'"
        )
    if address == "auto":
        found = local_address()
        if found is None:
            raise ConnectionFailedError(
                f"{what} is 'auto', and no Ray runs on this machine: `ray start --head` starts one"
            )
        return _ask_head(found)
    if _HOST_PORT.fullmatch(address):
        return _ask_head(address)
    raise InvalidValueError(
        f"{what}: {address!r} is no address of a Ray cluster; write 'http://host:8265' (the dashboard), "
        "'host:6379' (the head) or 'auto'"
    )


def _ask_head(address: str) -> str:
    """Ask the head's store where the dashboard is."""
    try:
        with closing(connect_kv(address, plain=True)) as kv:
            found = kv.get(b"dashboard", b"dashboard")
    except Exception as error:
        raise ConnectionFailedError(f"the head of the Ray cluster at {address} cannot be reached: {error}") from error
    if not found:
        raise ConnectionFailedError(
            f"the Ray cluster at {address} has no dashboard, and jobs are submitted to it: start it with "
            "--include-dashboard=true, and install ray[default] on its head"
        )
    return f"http://{found.decode()}"


def _token(token_file: str | os.PathLike[str] | None) -> str | None:
    if token_file is not None:
        try:
            return Path(token_file).expanduser().read_text().strip()
        except OSError as error:
            raise InvalidValueError(f"token_file: {str(token_file)!r} cannot be read: {error.strerror}") from error
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named or os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        try:
            return Path(named or "~/.ray/auth_token").expanduser().read_text().strip()
        except OSError:
            return None  # the cluster will say what it thinks of that
    return None
