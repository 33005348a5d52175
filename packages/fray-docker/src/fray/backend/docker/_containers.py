"""From a job's request to the engine's own: the containers that a job consists of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fray.backend.docker._options import ContainerOptions, Mount
from fray.backend.docker._record import JOB_LABEL, ROLE_LABEL, SUBMISSION_LABEL, Submission
from fray.backend.docker._toolbox import LIGHT_PART, RUNNER, Toolbox
from fray.errors import InvalidValueError, UnsupportedError
from fray.request import JobRequest
from fray.supervision import runner_arguments
from fray.types import Resource, mask_sensitive

__all__ = [
    "command_container",
    "holder_container",
    "infeasible",
    "limits",
    "masked",
    "with_image",
]

# Where a job's outputs go: the first that the image's user can make.
OUTPUT_DIRECTORIES = ("/outputs", "/tmp/fray-outputs", "/var/tmp/fray-outputs")

# How long a runner waits for its client, and a holder for a sign of life from whoever prepares its job.
HANDOVER_SECONDS = 60.0
# The engine kills a container that it stops (`docker stop`, a shutdown) so long after the runner should have been done.
_STOP_MARGIN_SECONDS = 5
_LOG = {
    "Type": "json-file",
    # Said, since the engine's configuration would otherwise add to it: a log that is cut, or lines that are dropped.
    "Config": {"max-size": "1000p", "max-file": "1", "compress": "false", "mode": "blocking"},
}
_LEAST_MEMORY_BYTES = 6 * 1024 * 1024


def limits(
    minimum: Iterable[Resource], maximum: Iterable[Resource], machine_cpus: float | None = None
) -> dict[str, Any]:
    """Return the part of a container's configuration that resources become: a cap, by default what is asked for.

    Raises:
        UnsupportedError: A kind that an engine does not have, or a fraction of a GPU.
        InvalidValueError: Less memory than the engine takes.
    """
    asked = {each.name: each.quantity for each in minimum}
    caps = {each.name: each.quantity for each in maximum}
    for name in (*asked, *caps):
        if name not in ("CPU", "memory", "GPU"):
            raise UnsupportedError(f"a docker engine has no {name}: ask for CPU, memory or GPU")
    limit = {name: caps.get(name, asked.get(name, 0)) for name in ("CPU", "memory", "GPU")}
    found: dict[str, Any] = {}
    if machine_cpus and limit["CPU"] >= machine_cpus:
        limit["CPU"] = 0  # a cap that caps nothing, which the engine would refuse
    if limit["CPU"]:
        found["NanoCpus"] = max(math.ceil(limit["CPU"] * 1e9), 10_000_000)
    if asked.get("CPU"):
        found["CpuShares"] = max(2, round(asked["CPU"] * 1024))
    if limit["memory"]:
        if limit["memory"] < _LEAST_MEMORY_BYTES:
            raise InvalidValueError(f"memory={limit['memory']}: an engine gives no less than {_LEAST_MEMORY_BYTES}")
        found["Memory"] = found["MemorySwap"] = int(limit["memory"])
        if asked.get("memory"):
            found["MemoryReservation"] = int(asked["memory"])
    if limit["GPU"]:
        if limit["GPU"] != int(limit["GPU"]):
            raise UnsupportedError(f"GPU={limit['GPU']}: an engine gives whole GPUs")
        found["DeviceRequests"] = [{"Count": int(limit["GPU"]), "Capabilities": [["gpu"]]}]
    return found


def infeasible(minimum: Iterable[Resource], machine: Mapping[str, Any]) -> str:
    """Return what of the resources the engine's machine (its `info`) will never have; nothing where it has all."""
    has = {"CPU": machine.get("NCPU", 0), "memory": machine.get("MemTotal", 0)}
    short = [
        f"{each.name}={each.quantity:g} of {has[each.name]}"
        for each in minimum
        if each.name in has and each.quantity > has[each.name]
    ]
    return f"the engine's machine has less: {', '.join(short)}" if short else ""


def command_container(
    request: JobRequest,
    submission: Submission,
    options: ContainerOptions,
    toolbox: Toolbox,
    image: str,
    machine_cpus: float | None = None,
) -> dict[str, Any]:
    """Return the request for the container that runs a job's command, as the engine's API has it.

    Args:
        request: What was asked for.
        submission: What is stored; where the job has a holder that stores it, this one names the job only.
        options: The cluster's.
        toolbox: What is mounted for the runner.
        image: The image's name; `with_image` puts the image itself in its place.
        machine_cpus: How many the engine's machine has, where that matters.
    """
    env = request.env
    takes_handover = bool(env.secrets or submission.prepares)
    arguments = runner_arguments(
        request.entrypoint,
        output="frames:1",
        grace_seconds=options.grace_seconds,
        timeout_seconds=request.timeout_seconds,
        max_retries=request.max_retries,
        not_before=submission.submission_time,
        handover="counted" if takes_handover else False,
        handover_timeout_seconds=HANDOVER_SECONDS,
        outputs=OUTPUT_DIRECTORIES,
    )
    # Empty, or an image of another job's container would give its own.
    own = {JOB_LABEL: request.job_id, ROLE_LABEL: "run", SUBMISSION_LABEL: ""}
    labels = own if submission.prepares else submission.labels(request.job_id)
    host: dict[str, Any] = {
        **_HOST,
        **limits(env.minimum_resources, env.maximum_resources, machine_cpus),
        "Mounts": [toolbox.mount(), *(_native(mount) for mount in options.mounts)],
        "NetworkMode": options.network or "default",
        "ShmSize": options.shm_bytes,
    }
    return {
        "Image": image,
        "Entrypoint": [RUNNER, *arguments],
        "Env": [f"{name}={value}" for name, value in _variables(request).items()],
        "Labels": labels,
        "OpenStdin": takes_handover,
        "StdinOnce": takes_handover,
        "StopSignal": "SIGPWR",
        "StopTimeout": math.ceil(options.grace_seconds) + _STOP_MARGIN_SECONDS,
        "Healthcheck": {"Test": ["NONE"]},
        "HostConfig": host,
    }


def holder_container(job_id: str, submission: Submission, toolbox: Toolbox) -> dict[str, Any]:
    """Return the request for the container that stands for a job while it is being prepared."""
    return {
        "Image": toolbox.image,
        "Entrypoint": [RUNNER, "relay", f"{HANDOVER_SECONDS:g}"],
        "Labels": submission.labels(job_id),
        "OpenStdin": True,
        "StdinOnce": True,
        "StopSignal": "SIGPWR",
        "HostConfig": {**_HOST, "NetworkMode": "none"},
    }


def with_image(native: Mapping[str, Any], name: str, image: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request with the image that was found or made, and what has to fit with it.

    Args:
        native: The request.
        name: What the image is called, for people to read in the list of containers.
        image: Its inspection.
    """
    of_image = dict(entry.partition("=")[::2] for entry in image["Config"].get("Env") or ())
    path = of_image.get("PYTHONPATH")
    variables = [
        f"{entry}:{path}" if path and entry == f"PYTHONPATH={LIGHT_PART}" else entry for entry in native["Env"]
    ]
    return {**native, "Image": name, "Env": variables}


def masked(native: Mapping[str, Any]) -> dict[str, Any]:
    """Return a container's request with every value masked that is not to be shown."""
    shown = dict(entry.partition("=")[::2] for entry in native["Env"])
    return {**native, "Env": [f"{name}={value}" for name, value in mask_sensitive(shown).items()]}


_HOST = {"LogConfig": _LOG, "Init": False, "RestartPolicy": {"Name": "no"}, "AutoRemove": False}


def _variables(request: JobRequest) -> dict[str, str]:
    variables = {"PYTHONUNBUFFERED": "1", **request.env.env}  # a log that can be followed
    path = variables.get("PYTHONPATH")
    variables["PYTHONPATH"] = f"{LIGHT_PART}:{path}" if path else LIGHT_PART
    variables["FRAY_JOB_ID"] = request.job_id
    variables["FRAY_JOB_CONTEXT"] = "local"
    return variables


def _native(mount: Mount) -> dict[str, Any]:
    return {"Type": mount.kind, "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}
