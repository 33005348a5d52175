"""The application: which commands there are, and the way from the arguments to the exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fray.cli import _job_commands, _setup_commands, _submission_commands
from fray.cli._errors import EXIT_CODES_HELP, EXIT_USAGE, reported
from fray.cli._plugin_commands import PluginGroup

__all__ = ["app", "main"]

# Plain help texts: rich's would read "[tool.fray]" as markup, and cost as much time as everything else together.
app = typer.Typer(
    name="fray",
    cls=PluginGroup,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES_HELP,
)

# The command line of a job is not searched for Fray's own options: they stand before it.
_TAKES_A_COMMAND = {"allow_interspersed_args": False}

app.command("run", context_settings=_TAKES_A_COMMAND)(_submission_commands.run)
app.command("submit", context_settings=_TAKES_A_COMMAND)(_submission_commands.submit)
app.command("plan", context_settings=_TAKES_A_COMMAND)(_submission_commands.plan)
app.command("list")(_job_commands.list_jobs)
app.command("describe")(_job_commands.describe)
app.command("logs")(_job_commands.logs)
app.command("wait")(_job_commands.wait)
app.command("fetch")(_job_commands.fetch)
app.command("delete")(_job_commands.delete)
app.command("purge")(_job_commands.purge)
app.command("backends")(_setup_commands.backends)
app.command("doctor")(_setup_commands.doctor)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the `fray` command and return its exit code.

    Args:
        arguments: What stands behind `fray`; the process's own where None.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Only for an error that comes before the options are read; what stands behind "--" is the job's.
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    command = typer.main.get_command(app)
    return reported(
        lambda: command.main(arguments, prog_name="fray", standalone_mode=False),
        as_json="--json" in own,
        debug="--debug" in own,
    )


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"fray {version('fray-core')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in Fray an error comes from.")] = False,
) -> None:
    """Run jobs: the same shell command on this machine, in a container or on a cluster.

    fray run -- python train.py --lr 3e-4
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(EXIT_USAGE)
