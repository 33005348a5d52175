"""Options that several commands share, each group of them written once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import typer

from fray import plugins
from fray.cli._errors import reported
from fray.cluster import ClusterContext

__all__ = ["Shared", "connect", "takes"]

Group = TypeVar("Group")


@dataclass(frozen=True)
class Shared:
    """What every command is told.

    Attributes:
        cluster: The cluster's spec, None for the default.
        as_json: Whether standard output is to have one JSON document.
        debug: Whether an error is to show where it comes from.
    """

    cluster: str | None
    as_json: bool
    debug: bool

    def command_line(self, command: str, *arguments: str) -> str:
        """Return a command to suggest, that reaches the same cluster."""
        import shlex

        cluster = [] if self.cluster is None else ["-c", self.cluster]
        return shlex.join(["fray", command, *cluster, *arguments])


def connect(shared: Shared, *, python: str | None = None, submits: bool = False) -> ClusterContext:
    """Connect to the cluster that the user means.

    Args:
        shared: Says which.
        python: The interpreter of the jobs, an option of the backends that let it be chosen.
        submits: Whether jobs are made, for which the backend has options that suit a command.
    """
    options: dict[str, Any] = {}
    if python is not None:
        options["python"] = python
    elif submits:
        name, _, configured = plugins.resolve(shared.cluster)
        suited = plugins.load_backend(name).command_options()
        options = {option: value for option, value in suited.items() if option not in configured}
    return plugins.connect(shared.cluster, **options)


def takes(
    *groups: Callable[..., Any],
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Make a command of a function: add the options that all share, and those of `groups`, and report its errors.

    The function's first argument is the `Shared`, the next ones are what each group makes of its options; what
    follows are the command's own parameters.
    """

    def decorate(function: Callable[..., int | None]) -> Callable[..., int]:
        of_groups = [inspect.signature(group, eval_str=True).parameters for group in groups]
        of_all = inspect.signature(_shared, eval_str=True).parameters
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1 + len(groups) :]

        @functools.wraps(function)
        def command(**values: Any) -> int:
            shared = _shared(**{name: values.pop(name) for name in of_all})

            def call() -> int | None:
                made = [
                    group(**{name: values.pop(name) for name in names})
                    for group, names in zip(groups, of_groups, strict=True)
                ]
                return function(shared, *made, **values)

            return reported(call, as_json=shared.as_json, debug=shared.debug)

        parameters = [*own, *(each for group in of_groups for each in group.values()), *of_all.values()]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters]
        # typer reads a command's options off its signature, older versions off the annotations too.
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate


def _shared(
    context: typer.Context,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            "-c",
            metavar="SPEC",
            help="A backend (local), a backend and an address (ray:http://head:8265), or a cluster that the project "
            "configures. Default: $FRAY_CLUSTER, else the project's default, else local.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in Fray an error comes from.")] = False,
) -> Shared:
    return Shared(cluster, as_json, debug or bool(context.find_root().params.get("debug")))
