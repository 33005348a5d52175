"""Who the calling user is, for the labels: decided once, the same on every machine of theirs where that can be."""

from __future__ import annotations

import configparser
import getpass
import os
import platform
from pathlib import Path

__all__ = ["default_owner"]


def default_owner() -> str:
    """Return `$FRAY_TPU_OWNER`, else the account that gcloud is configured for, else this user on this machine.

    Two users of one account are one owner to Fray: set `FRAY_TPU_OWNER` where many share a service account.
    """
    return os.environ.get("FRAY_TPU_OWNER") or _gcloud_account() or f"{getpass.getuser()}@{platform.node()}"


def _gcloud_account() -> str | None:
    """Return the account in gcloud's active configuration; asking gcloud itself takes a second."""
    if account := os.environ.get("CLOUDSDK_CORE_ACCOUNT"):
        return account
    directory = Path(os.environ.get("CLOUDSDK_CONFIG") or Path.home() / ".config" / "gcloud")
    try:
        active = os.environ.get("CLOUDSDK_ACTIVE_CONFIG_NAME") or (directory / "active_config").read_text().strip()
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string((directory / "configurations" / f"config_{active}").read_text())
    except (OSError, configparser.Error, UnicodeDecodeError):
        return None  # gcloud need not be there
    return parser.get("core", "account", fallback=None)
