"""Removing what Fray left in an engine: images that nothing uses, what killed clients left.

Nothing that Fray did not make is touched, and no job.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from docker.errors import APIError, NotFound
from fray.backend.docker._engine import Engine
from fray.backend.docker._record import JOB_LABEL, SUBMISSION_LABEL, Container, job_containers, read_job
from fray.backend.docker._start import remove_container

__all__ = ["Pruned", "prune"]

TOOLBOX_LABEL = "fray.toolbox"
# By label, and what tags Fray gives: an image that somebody builds on top of one of Fray's inherits the label.
_MADE_BY_FRAY = {"fray.image": r"[0-9a-f]{24}", TOOLBOX_LABEL: r"[0-9a-f]{16}", "fray.uv": r"\d.*"}
# A container that is younger may be on its way to a job.
_LEFT_BEHIND_SECONDS = 3600.0


@dataclass(frozen=True)
class Pruned:
    """One thing that was, or would be, removed.

    Attributes:
        kind: `image`, `container` or `volume`.
        name: What it is called.
        size_bytes: How much it takes, shared layers included; 0 where that is unknown.
    """

    kind: str
    name: str
    size_bytes: int = 0


def prune(engine: Engine, older_than_seconds: float, *, dry_run: bool = False) -> Iterator[Pruned]:
    """Remove images that Fray made before that, if no container uses them, and what is left of killed clients.

    Jobs are not touched: `fray purge` removes those.
    """
    yield from _left_behind(engine, dry_run)
    with engine.errors():
        used = {container["ImageID"] for container in engine.api.containers(all=True)}
        images = [
            image
            for label, tag in _MADE_BY_FRAY.items()
            for image in engine.api.images(filters={"label": label})
            if image["Id"] not in used
            and image["Created"] <= time.time() - older_than_seconds
            and image["RepoTags"]
            and all(re.fullmatch(tag, name.rpartition(":")[2]) for name in image["RepoTags"])
        ]
    for image in images:
        names = image["RepoTags"]
        with engine.errors():
            try:
                if not dry_run:
                    for name in names:
                        engine.api.remove_image(name)
            except (NotFound, APIError) as error:
                if error.status_code not in (404, 409):
                    raise
                continue  # gone, or somebody has just begun to use it
        yield Pruned("image", ", ".join(names), image["Size"])
    yield from _volumes(engine, older_than_seconds, dry_run)


def _left_behind(engine: Engine, dry_run: bool) -> Iterator[Pruned]:
    standing = job_containers(engine)
    jobs = {container.labels[JOB_LABEL] for container, _ in standing}
    with engine.errors():
        listed = [
            *engine.api.containers(all=True, filters={"label": JOB_LABEL}),
            *engine.api.containers(all=True, filters={"label": TOOLBOX_LABEL}),
        ]
    for found in listed:
        container = Container.listed(found)
        if found["Created"] > time.time() - _LEFT_BEHIND_SECONDS or container.state == "running":
            continue
        if container.labels.get(SUBMISSION_LABEL):
            is_left = read_job(engine, container) is None
        else:
            is_left = container.labels.get(JOB_LABEL) not in jobs
        if is_left:
            if not dry_run:
                remove_container(engine, container.id)
            yield Pruned("container", found["Names"][0].lstrip("/"))


def _volumes(engine: Engine, older_than_seconds: float, dry_run: bool) -> Iterator[Pruned]:
    from datetime import datetime

    with engine.errors():
        volumes = engine.api.volumes(filters={"label": TOOLBOX_LABEL, "dangling": "true"})["Volumes"] or []
    for volume in volumes:
        if datetime.fromisoformat(volume["CreatedAt"]).timestamp() > time.time() - older_than_seconds:
            continue
        with engine.errors(), suppress(NotFound):
            if not dry_run:
                try:
                    engine.api.remove_volume(volume["Name"])
                except APIError as error:
                    if error.status_code != 409:
                        raise
                    continue
        yield Pruned("volume", volume["Name"])
