"""What is asked for is on disk before Google hears of it, so that nothing is forgotten by a client that dies.

One file a group, named by it, written whole (a new file, flushed, renamed), private to the user; gone when the group
is ready, or seen to be gone. The lock beside it (flock) is held by the process that looks after the request: the
kernel frees it with the process, so a free lock means that nobody does. The store is per machine, as the locks are.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fray.backend.tpu._messages import node_ids, queued_resource_id
from fray.backend.tpu.types import SliceRequest
from fray.errors import PlatformError
from fray.state import machine_digest, write_durably

__all__ = ["Candidate", "Claim", "Intent", "IntentState", "IntentStore", "default_directory"]


class IntentState(StrEnum):
    """How far a request is."""

    ASKED = "asked"
    """Somebody waits for it, as long as the lock is held."""
    GIVEN_UP = "given-up"
    """Whatever is there of it is to be deleted."""


class Candidate(BaseModel):
    """One queued resource that the request may have made.

    Attributes:
        full_name: In the API.
        zone: Where.
        node_names: Those of the nodes that it makes, in the API.
        index: Of the choice.
        request_id: By which Google knows a repeated create for the same.
        asked_at: When it was last tried to be created, before the attempt; None where it never was.
        is_settled: Whether Google answered: without that, a create may still take effect later.
        operation: That of its creation.
        is_gone: Whether it was seen to be gone (or never came to be).
        deadline: Until when it may stay in the queue; None before it was asked for.
    """

    model_config = ConfigDict(extra="forbid")

    full_name: str
    zone: str
    node_names: tuple[str, ...]
    index: int = 0
    request_id: str = ""
    asked_at: float | None = None
    is_settled: bool = False
    operation: str = ""
    is_gone: bool = False
    deadline: float | None = None

    @property
    def id(self) -> str:
        """Its id in its zone."""
        return self.full_name.rpartition("/")[2]


class Intent(BaseModel):
    """One request, and what may be there of it.

    Attributes:
        id: Of this request: another one of the same name has another.
        name: The group's.
        project: Who pays.
        owner: Who asked.
        state: How far it is.
        created: When it was recorded.
        queue_deadline: Until when it may stay in the queue.
        deadline: Until when all of it may take.
        request: What was asked for; None for the deletion of what was ready.
        candidates: What there may be of it.
        reason: Why it was given up.
    """

    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)] = 1
    id: str
    name: str
    project: str
    owner: str
    state: IntentState
    created: float
    queue_deadline: float = 0.0
    deadline: float = 0.0
    request: SliceRequest | None = None
    candidates: list[Candidate]
    reason: str = ""

    @classmethod
    def of(cls, request: SliceRequest, project: str, owner: str, now: float) -> Intent:
        """Return the record of a new request."""
        identity = uuid.uuid4()
        candidates = []
        for index, choice in enumerate(request.choices):
            parent, resource_id = f"projects/{project}/locations/{choice.zone}", queued_resource_id(request.name, index)
            nodes = node_ids(resource_id, request.num_slices)
            candidates.append(
                Candidate(
                    full_name=f"{parent}/queuedResources/{resource_id}",
                    zone=choice.zone,
                    node_names=tuple(f"{parent}/nodes/{node}" for node in nodes),
                    index=index,
                    request_id=str(uuid.uuid5(identity, f"create {index}")),
                )
            )
        queue_deadline = now + request.queue_timeout_seconds
        return cls(
            id=identity.hex,
            name=request.name,
            project=project,
            owner=owner,
            state=IntentState.ASKED,
            created=now,
            queue_deadline=queue_deadline,
            deadline=queue_deadline + request.boot_timeout_seconds,
            request=request,
            candidates=candidates,
        )

    @property
    def zones(self) -> tuple[str, ...]:
        """Where something of it may be."""
        return tuple(sorted({one.zone for one in self.candidates if one.asked_at is not None and not one.is_gone}))


@dataclass(frozen=True)
class Claim:
    """A held lock."""

    path: Path
    descriptor: int

    def release(self) -> None:
        """Let go of it, and leave no file behind."""
        try:
            # Under the lock: whoever opened it meanwhile finds that it is not the file of this name any more.
            with suppress(OSError):  # a file that stays is not locked
                self.path.unlink(missing_ok=True)
        finally:
            os.close(self.descriptor)


class IntentStore:
    """The records of one project's requests that this machine made.

    Args:
        directory: Of the whole store.
        project: Whose.
        remedy: What deletes what is left of these requests, in the words of a message.
    """

    def __init__(self, directory: Path, project: str, remedy: str) -> None:
        self._directory = directory / quote(project, safe="")
        self.remedy = remedy

    def claim(self, name: str) -> Claim | None:
        """Take the lock of a group; None where a living process (this one too) has it."""
        with self._mapped(f"lock {name}"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._directory / f"{name}.lock"
            while True:
                descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if _is_at(descriptor, path):
                        return Claim(path, descriptor)
                except BlockingIOError:
                    os.close(descriptor)
                    return None
                except BaseException:
                    os.close(descriptor)
                    raise
                os.close(descriptor)  # released by its holder between the opening and the lock

    def save(self, intent: Intent) -> None:
        """Write a record, so that it is there even after a power cut."""
        with self._mapped(f"record {intent.name}"):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path = self._path(intent.name)
            fresh = path.with_suffix(f".{os.getpid()}.tmp")
            try:
                write_durably(fresh, intent.model_dump_json().encode())
                os.replace(fresh, path)
            except BaseException:
                fresh.unlink(missing_ok=True)
                raise
            self._flush()

    def load(self, name: str) -> Intent | None:
        """Return a record; None where there is none.

        Raises:
            PlatformError: It cannot be read.
        """
        path = self._path(name)
        with self._mapped(f"read {path}"):
            try:
                text = path.read_bytes()
            except FileNotFoundError:
                return None
        try:
            return Intent.model_validate_json(text)
        except ValidationError as error:
            raise PlatformError(
                f"the record {path} of a request for TPU slices is damaged or of a later version of Fray ({error}). "
                f"Look with `gcloud` whether slices of the name {name!r} exist, then remove the file"
            ) from error

    def remove(self, name: str) -> None:
        """Forget a record."""
        with self._mapped(f"remove the record of {name}"):
            self._path(name).unlink(missing_ok=True)
            self._cancelled(name).unlink(missing_ok=True)

    def cancel(self, name: str, request: str) -> None:
        """Say to the process that looks after a request that it is not wanted any more."""
        with self._mapped(f"cancel {name}"):
            write_durably(self._cancelled(name), request.encode())

    def is_cancelled(self, name: str, request: str) -> bool:
        """Whether that was said of this request."""
        try:
            return self._cancelled(name).read_text() == request
        except OSError:
            return False

    def names(self) -> list[str]:
        """Return the names of the groups that there are records of."""
        with self._mapped(f"read {self._directory}"):
            try:
                return sorted(path.stem for path in self._directory.iterdir() if path.suffix == ".json")
            except FileNotFoundError:
                return []

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.json"

    def _cancelled(self, name: str) -> Path:
        return self._directory / f"{name}.cancelled"

    def _flush(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    @contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise PlatformError(
                f"cannot {what}: {error}. Nothing is asked for without a record, since it could be forgotten: free "
                "space there, or name another directory with state_directory"
            ) from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def default_directory() -> Path:
    """The store of this machine and user."""
    return platformdirs.user_state_path("fray") / "tpu" / machine_digest()
