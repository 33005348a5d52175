"""Commands that other distributions bring: found by their entry points, loaded when one is asked for."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from fray import plugins
from fray.errors import BackendConflictError, BackendLoadError

__all__ = ["PluginGroup", "load_command"]


def load_command(name: str, own: tuple[str, ...] = ()) -> Any:
    """Return the command that an installed distribution registers under this name.

    @plugin-dev: the entry point in `fray.commands` is a `typer.Typer`; with one command in it that one takes the
    name, with several it becomes a group. Raise `fray.errors.FrayError` for what the user is to read, `typer.Exit`
    for an exit code.

    Args:
        name: The command's name.
        own: Fray's own commands, for a near miss.

    Raises:
        BackendNotFoundError: None is registered; the message says what to install, or which name is near.
        BackendConflictError: Several are.
        BackendLoadError: It cannot be imported, or is no typer application.
    """
    entries = plugins._entry_points(plugins.COMMANDS).get(name)
    if not entries:
        raise plugins._not_found(plugins.COMMANDS, name, own)
    distributions = [plugins._distribution_of(entry) for entry in entries]
    if len(entries) > 1:
        raise BackendConflictError(
            f"the command {name!r} is claimed by {' and '.join(distributions)}: uninstall one of them"
        )
    what = f"the command {name!r} of {distributions[0]} cannot be loaded ({entries[0].value})"
    try:
        loaded = entries[0].load()
    except Exception as error:
        raise BackendLoadError(f"{what}: {type(error).__name__}: {error}; reinstall or uninstall it") from error
    if not isinstance(loaded, typer.Typer):
        raise BackendLoadError(
            f"{what}: it is {type(loaded).__name__}, no typer application; reinstall or uninstall it"
        )
    command = typer.main.get_command(loaded)
    command.name = name
    return command


class PluginGroup(TyperGroup):
    """Fray's own commands, and behind them those of other distributions. An own command is hidden by none."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names, without loading a plugin."""
        own = super().list_commands(ctx)
        return own + [name for name in sorted(plugins._entry_points(plugins.COMMANDS)) if name not in own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command, for a plugin's one a stand-in that is good for a line of help."""
        if command := super().get_command(ctx, cmd_name):
            return command
        entries = plugins._entry_points(plugins.COMMANDS).get(cmd_name)
        if not entries:
            return None
        brought_by = " and ".join(plugins._distribution_of(entry) for entry in entries)
        return TyperCommand(name=cmd_name, help=f"(brought by {brought_by})", rich_markup_mode=None)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is about to be run, a plugin's loaded."""
        name = args[0]
        own = super().list_commands(ctx)
        if name in own or name.startswith("-"):
            return super().resolve_command(ctx, args)
        if ctx.resilient_parsing and name not in plugins._entry_points(plugins.COMMANDS):
            return None, None, args  # shell completion asks what may follow, not what is wrong
        return name, load_command(name, tuple(own)), args[1:]
