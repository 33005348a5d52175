"""From an outcome to an exit code, and from an error to the one line that the user reads."""

from __future__ import annotations

from collections.abc import Callable

import typer

from fray.cli._output import OutputClosedError, discard_output, print_json, say
from fray.errors import FrayError, PlatformError, UsageError, WaitTimeoutError
from fray.types import JobInfo, JobStatus

__all__ = [
    "EXIT_CODES_HELP",
    "EXIT_DETACHED",
    "EXIT_FAILURE",
    "EXIT_USAGE",
    "error_as_plain",
    "exit_code_of_error",
    "exit_code_of_job",
    "reported",
]

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_PLATFORM = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_TIMEOUT = 124  # as timeout(1)
EXIT_NO_CODE = 125  # as docker run and timeout(1), for a failure that is not the command's own
EXIT_DETACHED = 130  # 128 + SIGINT
EXIT_OUTPUT_CLOSED = 141  # 128 + SIGPIPE
EXIT_STOPPED = 143  # 128 + SIGTERM

EXIT_CODES_HELP = """\b
Exit codes:
  run and wait exit as the job's command did; where it has no exit code of
  its own, or one of 0 and yet did not succeed:
    125  the job failed (not set up, lost, too large, ...)
    143  the job was stopped
  and all commands with:
    0    done
    1    an error that is none of those below, or doctor found a problem
    2    the command line, or what it asks for, cannot be right
    69   the cluster cannot be reached, or failed
    124  wait: the time was over, the job goes on
    130  interrupted; run: left by a second Ctrl-C while the job stops
    141  nobody reads the output any more

With --json standard output has exactly one JSON document, also for an
error: {"error": {"type": ..., "message": ...}}. Errors, progress and,
under `run --json`, the job's output are on standard error."""

# The base of every error in the command line: click's where typer stands on click, else typer's own copy of it.
_CommandLineError: type[Exception] = typer.BadParameter.__mro__[2]


def exit_code_of_job(info: JobInfo) -> int:
    """Return the exit code with which `run` and `wait` pass on how a job ended."""
    if info.status is JobStatus.SUCCEEDED:
        return 0
    if info.exit_code is not None and 0 < info.exit_code < 256:
        return info.exit_code
    return EXIT_STOPPED if info.status is JobStatus.STOPPED else EXIT_NO_CODE


def exit_code_of_error(error: FrayError) -> int:
    """Return the exit code for an error, by who is to blame."""
    if isinstance(error, UsageError):
        return EXIT_USAGE
    if isinstance(error, WaitTimeoutError):
        return EXIT_TIMEOUT
    return EXIT_PLATFORM if isinstance(error, PlatformError) else EXIT_FAILURE


def error_as_plain(error: Exception) -> dict[str, str]:
    """Return an error ready for JSON."""
    return {"type": type(error).__name__, "message": str(error)}


def reported(call: Callable[[], object], *, as_json: bool = False, debug: bool = False) -> int:
    """Make a call, report its error as the command does, and return the exit code: the call's own where it has one.

    An exception that is no user's to meet passes through: its traceback is what a bug report needs.
    """
    try:
        result = call()
        return result if isinstance(result, int) else 0
    except OutputClosedError:
        discard_output()
        return EXIT_OUTPUT_CLOSED
    except typer.Abort:
        return EXIT_DETACHED
    except FrayError as error:
        return _report(error, error_as_plain(error), exit_code_of_error(error), as_json, debug)
    except _CommandLineError as error:
        message = _in_words(error)
        plain = {"type": "UsageError", "message": message}
        return _report(error, plain, getattr(error, "exit_code", EXIT_USAGE), as_json, debug)
    except OSError as error:
        return _report(error, error_as_plain(error), EXIT_FAILURE, as_json, debug)


def _report(error: Exception, plain: dict[str, str], exit_code: int, as_json: bool, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exception(error)
    say(f"error: {plain['message']}")
    if as_json:
        try:
            print_json({"error": plain})
        except OutputClosedError:
            discard_output()
    return exit_code


def _in_words(error: Exception) -> str:
    """Return the message of an error in the command line, and where help is."""
    in_words = getattr(error, "format_message", error.__str__)
    message: str = in_words()
    context = getattr(error, "ctx", None)
    message = message.rstrip(".")
    return f"{message} (see `{context.command_path} --help`)" if context is not None else message
