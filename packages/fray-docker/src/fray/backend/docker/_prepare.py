"""The process that prepares a job whose image is not there: pulls or builds it, then hands the job on.

It is started detached by the client that submits the job, and outlives it. The job's holder in the engine tells all
others how far it is, and that it is alive. What it needs comes over its standard input: nothing of it, the secrets
above all, is ever in a file or an argument.
"""

from __future__ import annotations

import base64
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from fray.backend.docker._attach import Attached
from fray.backend.docker._build import build_frozen
from fray.backend.docker._containers import with_image
from fray.backend.docker._engine import Endpoint, Engine
from fray.backend.docker._frozen import FrozenBuild
from fray.backend.docker._holder import Holder
from fray.backend.docker._record import command_name
from fray.backend.docker._registry import pull
from fray.backend.docker._start import LackingError, create_container, removed_unless_done, start_container
from fray.detached import leave_caller
from fray.errors import FrayError, PlatformError
from fray.types import TerminationReason

__all__ = ["READY", "Preparation", "main"]

READY = b"ready\n"
"""What the process says on its standard error once the holder runs, and so the job is accepted."""


@dataclass(frozen=True)
class Preparation:
    """What is to be done, as it goes to the process.

    Attributes:
        endpoint: The engine.
        timeout_seconds: How long the engine may take to answer.
        job_id: The job's.
        holder: The id of its holder.
        not_before: The submission time.
        native: The request for the container that runs the command.
        image: The image to be pulled; None where one is built.
        build: What is to be built, as `ImageBuilder.freeze` fixed it.
        platform: The image's platform, None for the engine's own.
        handover: What the runner of the command is sent; holds the secrets.
        settings: What of the client's environment counts for uv in a build; may hold credentials.
    """

    endpoint: Endpoint
    timeout_seconds: float
    job_id: str
    holder: str
    not_before: float
    native: dict[str, Any] = field(repr=False)
    image: str | None
    build: dict[str, Any] | None
    platform: str | None
    handover: bytes = field(repr=False)
    settings: dict[str, str] = field(repr=False)

    def encode(self) -> bytes:
        """Return it as it is sent."""
        return json.dumps({**asdict(self), "handover": base64.b64encode(self.handover).decode()}).encode()

    @classmethod
    def decode(cls, sent: bytes) -> Preparation:
        """Read what was sent; ValueError where it was cut short."""
        known = json.loads(sent)
        endpoint = known.pop("endpoint")
        certificate = endpoint.pop("certificate")
        known["endpoint"] = Endpoint(certificate=tuple(certificate) if certificate else None, **endpoint)
        return cls(**{**known, "handover": base64.b64decode(known["handover"])})


def main() -> None:
    """Prepare the job that standard input describes."""
    with open(0, "rb", closefd=False) as stdin:
        sent = stdin.read()
    try:
        preparation = Preparation.decode(sent)
    except ValueError:
        os._exit(1)  # the client is gone, and its job was never accepted
    leave_caller()
    os.chdir("/")
    engine = Engine(preparation.endpoint, preparation.timeout_seconds)
    with Holder(engine, preparation.holder, preparation.not_before) as holder:
        holder.say("preparing the image")
        holder.wait_until_known()
        with suppress(BrokenPipeError):  # the client has been killed, and its job goes on
            os.write(2, READY)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 2)
        try:
            _prepare(engine, preparation, holder)
        except LackingError as error:
            holder.end(TerminationReason.INFEASIBLE, str(error))
        except FrayError as error:
            holder.end(TerminationReason.SETUP_FAILED, str(error))
        except Exception as error:
            import traceback

            holder.write(traceback.format_exc().encode())
            holder.end(TerminationReason.SETUP_FAILED, f"{type(error).__name__}: {error}")
    os._exit(0)


def _prepare(engine: Engine, preparation: Preparation, holder: Holder) -> None:
    image_name, image = _image(engine, preparation, holder)
    if holder.is_over.is_set():
        return
    holder.say("starting")
    name = command_name(preparation.job_id)
    container = create_container(engine, name, with_image(preparation.native, image_name, image), preparation.platform)
    with removed_unless_done(engine, container) as done, Attached(engine, container) as stdin:
        # It waits for its handover, so that nothing of the command runs before the holder has let it.
        start_container(engine, container)
        if holder.release():
            done()
            stdin.send(preparation.handover)
            stdin.finish()


def _image(engine: Engine, preparation: Preparation, holder: Holder) -> tuple[str, dict[str, Any]]:
    """Pull or build the image, and return its name and its inspection."""
    name = preparation.image
    if name is not None:
        pull(engine, name, preparation.platform, holder.say)
    else:
        assert preparation.build is not None
        frozen = FrozenBuild.from_dict(preparation.build)
        settings, cancel = preparation.settings, holder.is_over
        built = build_frozen(frozen, engine, holder.write, holder.say, settings=settings, cancel=cancel)
        name = built.tag
    found = engine.inspect_image(name)
    if found is None:
        raise PlatformError(f"the image {name} was made, and the engine does not have it")
    return name, found
