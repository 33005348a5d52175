"""What of this machine counts in a build: how uv reaches the package indexes, the proxies, the certificates.

Values may hold credentials: `settings_digest`, which an image's name is made of, leaves those out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from fray.errors import InvalidValueError

__all__ = ["index_settings", "may_hold_credentials", "proxies", "read_ca_bundle", "settings_digest"]

_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY")
_SETTINGS = frozenset(
    {
        *("UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_STRATEGY", "UV_INDEX_URL"),
        *("UV_EXCLUDE_NEWER", "UV_FORK_STRATEGY", "UV_INSECURE_HOST", "UV_NO_BINARY", "UV_NO_BINARY_PACKAGE"),
        *("UV_NO_BUILD", "UV_NO_BUILD_PACKAGE", "UV_NO_INDEX", "UV_PRERELEASE", "UV_RESOLUTION", "UV_TORCH_BACKEND"),
        *("UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_CONCURRENT_DOWNLOADS"),
    }
)
_WITHOUT_EFFECT = frozenset({"UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_CONCURRENT_DOWNLOADS", "UV_INSECURE_HOST"})
_LISTS_OF_PLACES = frozenset({"UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_INDEX", "UV_INDEX_URL"})
_CREDENTIAL_NAME = re.compile(r"UV_INDEX_.*_(USERNAME|PASSWORD)$|_TOKEN$")
# What surely holds no token, in its path or elsewhere.
_PLAIN_INDEX = re.compile(r"https?://[^/@?#\s]+(/(pypi/)?simple)?/?")
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def index_settings(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what of an environment changes what uv resolves to in a build: indexes, their credentials, strategies.

    Places that only this machine has are left out. The values may hold credentials.
    """
    found: dict[str, str] = {}
    for name, value in (os.environ if environment is None else environment).items():
        if name not in _SETTINGS and not re.fullmatch(r"UV_INDEX_\w+_(USERNAME|PASSWORD)", name):
            continue
        if name in _LISTS_OF_PLACES:
            separator = "," if name == "UV_FIND_LINKS" else " "
            places = value.split(separator if separator == "," else None)
            value = separator.join(place for place in places if "://" in place and "file://" not in place)
        if value:
            found[name] = value
    return found


def settings_digest(settings: Mapping[str, str]) -> str:
    """Return what tells settings from others that may give other packages, whoever's credentials they hold."""
    counted = {
        name: " ".join(_without_credentials(part) for part in value.split())
        for name, value in settings.items()
        if name not in _WITHOUT_EFFECT and not _CREDENTIAL_NAME.search(name)
    }
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:12] if counted else ""


def may_hold_credentials(name: str, value: str) -> bool:
    """Whether a setting is credentials, or places that may have some in their addresses."""
    places = re.findall(r"\w+://\S+", value) if name in _LISTS_OF_PLACES else []
    return bool(_CREDENTIAL_NAME.search(name)) or not all(map(_PLAIN_INDEX.fullmatch, places))


def proxies() -> dict[str, str]:
    """Return the proxies of this process's environment, by the names that it has them under."""
    names = [*_PROXIES, *(name.lower() for name in _PROXIES)]
    return {name: os.environ[name] for name in names if os.environ.get(name)}


def read_ca_bundle(bundle: str) -> bytes:
    """Return the certificates of a file, or of this machine where it is `system`.

    Raises:
        InvalidValueError: There are none.
    """
    if bundle != "system":
        try:
            return Path(bundle).read_bytes()
        except OSError as error:
            raise InvalidValueError(f"the CA bundle {bundle} cannot be read: {error.strerror}") from error
    import ssl

    named = (os.environ.get("SSL_CERT_FILE"), ssl.get_default_verify_paths().cafile, *_BUNDLES)
    for path in named:
        if path and os.path.isfile(path):
            return Path(path).read_bytes()
    raise InvalidValueError("this machine has no CA bundle where they usually are: give ca_bundle as a file")


def _without_credentials(place: str) -> str:
    name, separator, url = place.rpartition("=") if re.match(r"[\w.-]+=\w+://", place) else ("", "", place)
    if "://" not in url:
        return place
    parts = urlsplit(url)
    return f"{name}{separator}{urlunsplit(parts._replace(netloc=parts.netloc.rpartition('@')[2]))}"
