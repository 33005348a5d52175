"""What `fray doctor` looks at for TPU slices: credentials, the project, the API."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fray.errors import FrayError

__all__ = ["checks"]

_LOG_IN = "gcloud auth application-default login"
# Where Google's libraries and gcloud look, and what a machine of Google's says it is.
_VARIABLES = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT", "CLOUDSDK_CONFIG", "FRAY_TPU_ENDPOINT")
_PRODUCT = Path("/sys/class/dmi/id/product_name")


def checks() -> Iterator[tuple[bool, str, str]]:
    """Yield whether each thing is well, what was found, and the remedy."""
    from fray.backend.tpu.provisioner import TpuProvisioner

    if not _is_wanted():
        # Nobody has said that there should be an account; a look for one would ask the network.
        yield True, f"gcp-tpu: there are no Google credentials here; `fray tpu` needs them: {_LOG_IN}", ""
        return
    provisioner = TpuProvisioner()
    try:
        try:
            project = provisioner.project
        except FrayError as error:
            yield False, f"gcp-tpu: {error}", f"{_LOG_IN}; gcloud config set project PROJECT"
            return
        yield True, f"gcp-tpu: the project is {project}, and slices here are {provisioner.owner}'s", ""
        try:
            planned = provisioner.plan_gc()
            count = len(provisioner.list())
        except FrayError as error:
            yield False, f"gcp-tpu: {error}", _remedy(str(error), project)
            return
        slices = {0: "no slices", 1: "one group of slices"}.get(count, f"{count} groups of slices")
        yield True, f"gcp-tpu: the Cloud TPU API answers; there are {slices} of yours", ""
        if planned.doomed:
            names = ", ".join(one.name for one in planned.doomed)
            yield False, f"gcp-tpu: left behind, and maybe billed: {names}", "fray tpu gc, then fray tpu gc --yes"
        for problem in planned.unreadable:
            yield False, f"gcp-tpu: {problem}", "see what it was, and whether it is still there: fray tpu list"
    finally:
        provisioner.close()


def _is_wanted() -> bool:
    if any(os.environ.get(name) for name in _VARIABLES):
        return True
    configuration = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "gcloud"
    if configuration.is_dir() or (Path.home() / ".config" / "gcloud").is_dir():
        return True
    try:
        return _PRODUCT.read_text().startswith("Google")
    except OSError:
        return False


def _remedy(message: str, project: str) -> str:
    """Return the command that mends it: the one that the message names, where it names one."""
    named = [part for part in message.split("`")[1::2] if part.startswith("gcloud ")]
    return named[0] if named else f"gcloud services list --enabled --project {project}; gcloud auth list"
