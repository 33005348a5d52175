"""The `fray` command: jobs from a shell.

`main` is the console script and `app` the typer application, for who wants to embed or extend it; distributions add
commands of their own under the entry point group `fray.commands`. What goes where:

- standard output has what was asked for and nothing else: a job's output, an id, a table, one JSON document;
- standard error has everything that is said about it: progress, notes, `fray: error: …`;
- the exit code is one of `fray --help`.

No backend is imported before a command needs it.
"""

from fray.cli._app import app, main

__all__ = ["app", "main"]
