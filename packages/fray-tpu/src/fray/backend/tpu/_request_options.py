"""The options that say what is asked for, which `fray tpu up` and `fray tpu plan` share."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fray.backend.tpu.types import DataDisk, SliceChoice, SliceRequest, Tier
from fray.cli._quantities import parse_duration, parse_pairs
from fray.errors import InvalidValueError

if TYPE_CHECKING:
    from fray.backend.tpu._startup import RayJoin

__all__ = ["asks"]


def asks(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a command of a function that takes a request: `up` and `plan` have the same options."""
    of_request = inspect.signature(_request, eval_str=True).parameters
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        asked = {name: values.pop(name) for name in of_request if name != "fake"}
        return function(_request(**asked, fake=values["fake"]), **values)

    parameters = [each for name, each in of_request.items() if name != "fake"] + own
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _request(
    types: Annotated[
        list[str], typer.Argument(metavar="TYPE...", help="Acceptable types, the best first.", show_default=False)
    ],
    name: Annotated[str | None, typer.Option("--name", "-n", metavar="NAME", help="The group's name.")] = None,
    zone: Annotated[
        list[str] | None,
        typer.Option("--zone", "-z", metavar="ZONE", help="An acceptable zone, the best first; may be repeated."),
    ] = None,
    slices: Annotated[int, typer.Option("--slices", "-s", metavar="N", min=1, help="How many.")] = 1,
    spot: Annotated[bool, typer.Option("--spot", help="Cheaper, and can be taken back.")] = False,
    on_demand: Annotated[bool, typer.Option("--on-demand", help="The default; with --spot, where no spot is.")] = False,
    reserved: Annotated[bool, typer.Option("--reserved", help="From a reservation.")] = False,
    reservation: Annotated[
        str | None, typer.Option("--reservation", metavar="NAME", help="Which one; implies --reserved.")
    ] = None,
    at_once: Annotated[
        bool, typer.Option("--at-once", help="Ask for all choices at the same time; the first to come stays.")
    ] = False,
    ttl: Annotated[
        str,
        typer.Option(
            "--ttl", metavar="DURATION", help="Of the lease, from the last deadline on, unless it is renewed."
        ),
    ] = "4h",
    queue_timeout: Annotated[
        str, typer.Option("--queue-timeout", metavar="DURATION", help="How long to wait for capacity.")
    ] = "1h",
    boot_timeout: Annotated[
        str, typer.Option("--boot-timeout", metavar="DURATION", help="How long booting may take.")
    ] = "20m",
    self_delete_after: Annotated[
        str | None,
        typer.Option("--self-delete-after", metavar="DURATION", help="When the hosts delete themselves, used or not."),
    ] = None,
    purpose: Annotated[str, typer.Option("--purpose", metavar="TEXT", help="What for; a label says it.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="Another label; may be repeated.")
    ] = None,
    runtime_version: Annotated[
        str, typer.Option("--runtime-version", metavar="VERSION", help="What hosts boot; by the type unless given.")
    ] = "",
    network: Annotated[str | None, typer.Option("--network", metavar="NETWORK", help="The hosts' network.")] = None,
    subnetwork: Annotated[str | None, typer.Option("--subnetwork", metavar="SUBNET", help="And its part.")] = None,
    no_external_ips: Annotated[
        bool, typer.Option("--no-external-ips", help="No addresses that the internet reaches.")
    ] = False,
    tag: Annotated[
        list[str] | None, typer.Option("--tag", metavar="TAG", help="A network tag; may be repeated.")
    ] = None,
    disk: Annotated[
        list[str] | None, typer.Option("--disk", metavar="DISK", help="A disk to read; may be repeated.")
    ] = None,
    service_account: Annotated[
        str | None, typer.Option("--service-account", metavar="EMAIL", help="Whom the hosts act as.")
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", metavar="KEY=VALUE", help="Metadata of the hosts, no secrets; may be repeated."),
    ] = None,
    setup: Annotated[
        Path | None, typer.Option("--setup", metavar="FILE", help="A script that each host runs as root when it boots.")
    ] = None,
    join_ray: Annotated[
        str | None, typer.Option("--join-ray", metavar="ADDRESS", help="The Ray head to join: host:port of its GCS.")
    ] = None,
    ray_version: Annotated[
        str | None, typer.Option("--ray-version", metavar="VERSION", help="The head's Ray; the one here unless given.")
    ] = None,
    python_version: Annotated[
        str | None, typer.Option("--python-version", metavar="X.Y", help="The head's Python; this one unless given.")
    ] = None,
    ray_token_secret: Annotated[
        str | None,
        typer.Option(
            "--ray-token-secret",
            metavar="SECRET",
            help="Where the head wants a token: projects/PROJECT/secrets/NAME of Secret Manager.",
        ),
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option("--package", "-p", metavar="REQUIREMENT", help="A package beside Ray; may be repeated."),
    ] = None,
    *,
    fake: bool,
) -> SliceRequest:
    lease = parse_duration("--ttl", ttl)
    return SliceRequest(
        f"tpu-{os.urandom(4).hex()}" if name is None else name,
        _choices(types, zone, spot, on_demand, reserved, reservation, runtime_version, fake=fake),
        at_once=at_once,
        num_slices=slices,
        purpose=purpose,
        network=network,
        subnetwork=subnetwork,
        external_ips=not no_external_ips,
        service_account=service_account,
        tags=tuple(tag or ()),
        labels=parse_pairs("--label", label or ()),
        metadata=parse_pairs("--metadata", metadata or ()),
        data_disks=tuple(DataDisk(source) for source in disk or ()),
        startup_script=_script(
            types,
            setup,
            _join(join_ray, ray_version, python_version, ray_token_secret, package, fake=fake),
            lease,
            None if self_delete_after is None else parse_duration("--self-delete-after", self_delete_after),
        ),
        queue_timeout_seconds=parse_duration("--queue-timeout", queue_timeout),
        boot_timeout_seconds=parse_duration("--boot-timeout", boot_timeout),
        time_to_live_seconds=lease,
    )


def _choices(
    types: list[str],
    zones: list[str] | None,
    spot: bool,
    on_demand: bool,
    reserved: bool,
    reservation: str | None,
    runtime_version: str,
    *,
    fake: bool,
) -> tuple[SliceChoice, ...]:
    """Return all that is acceptable: by tier first, since that decides the price, then by type, then by zone."""
    default = os.environ.get("CLOUDSDK_COMPUTE_ZONE") or ("us-central1-a" if fake else None)
    zones = zones or ([default] if default else [])
    if not zones:
        raise InvalidValueError("say where: --zone us-central1-a (https://cloud.google.com/tpu/docs/regions-zones)")
    wanted = {Tier.SPOT: spot, Tier.RESERVED: reserved or reservation is not None, Tier.ON_DEMAND: on_demand}
    tiers = [tier for tier, is_wanted in wanted.items() if is_wanted] or [Tier.ON_DEMAND]
    return tuple(
        SliceChoice(kind, zone, tier, reservation if tier is Tier.RESERVED else None, runtime_version)
        for tier in tiers
        for kind in types
        for zone in zones
    )


def _join(
    address: str | None,
    ray_version: str | None,
    python_version: str | None,
    token_secret: str | None,
    packages: list[str] | None,
    *,
    fake: bool,
) -> RayJoin | None:
    from importlib.metadata import PackageNotFoundError, version

    from fray.backend.tpu._startup import RayJoin

    if address is None:
        given = {
            "--ray-version": ray_version,
            "--python-version": python_version,
            "--ray-token-secret": token_secret,
            "--package": packages,
        }
        if lost := [option for option, value in given.items() if value]:
            raise InvalidValueError(f"{lost[0]} is for hosts that join a Ray cluster: --join-ray ADDRESS")
        return None
    if ray_version is None:
        try:
            ray_version = version("ray")
        except PackageNotFoundError:
            raise InvalidValueError("--ray-version: there is no Ray here to take it from; give the head's") from None
    python_version = python_version or f"{sys.version_info.major}.{sys.version_info.minor}"
    join = RayJoin(address, ray_version, python_version, token_secret, tuple(packages or ()))
    if join.is_loopback and not fake:
        raise InvalidValueError(f"--join-ray: {address} is each TPU host's own; give an address that they reach")
    return join


def _script(
    types: list[str], setup: Path | None, join: RayJoin | None, lease_seconds: float, self_delete_seconds: float | None
) -> str | None:
    from fray.backend.tpu._startup import startup_script

    text = None
    if setup is not None:
        try:
            text = setup.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidValueError(f"--setup: {setup} cannot be read: {error}") from None
    if text is None and join is None and self_delete_seconds is None:
        return None
    return startup_script(
        types,
        join,
        lease_seconds=lease_seconds if join is not None else None,
        time_to_live_seconds=self_delete_seconds,
        setup=text,
    )
