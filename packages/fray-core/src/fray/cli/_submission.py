"""The options that say what job is meant, shared by `run`, `submit` and `plan`."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from fray.cli._quantities import parse_duration, parse_memory, parse_pairs, parse_resource, whole
from fray.errors import InvalidValueError
from fray.types import Resource, RuntimeEnv

__all__ = ["Submission", "submission"]


@dataclass(frozen=True)
class Submission:
    """A job as the user described it, and the interpreter that it is to use."""

    entrypoint: str
    env: RuntimeEnv
    job_id: str | None
    adopt: bool
    metadata: dict[str, str]
    timeout_seconds: float | None
    max_retries: int
    python: str | None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `create_job` and `plan_job` by name."""
        return {
            "entrypoint": self.entrypoint,
            "env": self.env,
            "job_id": self.job_id,
            "if_exists": "adopt" if self.adopt else "error",
            "metadata": self.metadata,
            "timeout_seconds": self.timeout_seconds,
            "max_retries": self.max_retries,
        }


def submission(
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND",
            help="What to run, behind `--`. Several arguments are quoted for the shell as they stand; a single one is "
            "a shell command as it is: fray run -- 'make && ./train | tee log'.",
            show_default=False,
        ),
    ],
    package: Annotated[
        list[str] | None,
        typer.Option("--package", "-p", metavar="REQUIREMENT", help="A package to import, as in 'einops>=0.7'."),
    ] = None,
    extra: Annotated[
        list[str] | None, typer.Option("--extra", metavar="NAME", help="An extra of the uv project, by its lock.")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", "-e", metavar="NAME[=VALUE]", help="A variable; without a value, as it is set here."),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option("--secret", metavar="NAME", help="A variable as it is set here, never shown and never stored."),
    ] = None,
    secret_file: Annotated[
        list[str] | None,
        typer.Option(
            "--secret-file", metavar="NAME=PATH", help="A secret variable from a file (without its last newline)."
        ),
    ] = None,
    working_dir: Annotated[
        str | None, typer.Option("--working-dir", "-w", metavar="DIR", help="Where to run; here by default.")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar="PATTERN", help="What not to ship, as in .gitignore."),
    ] = None,
    image: Annotated[
        str | None, typer.Option("--image", metavar="IMAGE", help="The container image to run in.")
    ] = None,
    cpu: Annotated[float | None, typer.Option("--cpu", metavar="CORES", help="Cores that the job needs.")] = None,
    gpu: Annotated[float | None, typer.Option("--gpu", metavar="DEVICES", help="GPUs that the job needs.")] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", metavar="SIZE", help="Memory that the job needs: 8GiB, 512MB, bytes.")
    ] = None,
    resource: Annotated[
        list[str] | None,
        typer.Option("--resource", metavar="NAME=QUANTITY", help="Anything else that the job needs."),
    ] = None,
    max_resource: Annotated[
        list[str] | None,
        typer.Option("--max-resource", metavar="NAME=QUANTITY", help="What the job may use at most: CPU=2, memory=4G."),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="Its time limit: 90, 90s, 15m, 2h, 1d.")
    ] = None,
    max_retries: Annotated[
        int, typer.Option("--max-retries", metavar="N", help="How often a failing command is run again.")
    ] = 0,
    job_id: Annotated[
        str | None, typer.Option("--job-id", metavar="ID", help="The job's id; else one is made up.")
    ] = None,
    job_id_prefix: Annotated[
        str | None, typer.Option("--job-id-prefix", metavar="TEXT", help="What a made-up id begins with.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="With --job-id: where that same job exists already, take that.")
    ] = False,
    metadata: Annotated[
        list[str] | None, typer.Option("--metadata", "-m", metavar="KEY=VALUE", help="A note to keep with the job.")
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(
            "--python",
            metavar="PATH",
            help="The interpreter that is `python` in a local job. Default: $VIRTUAL_ENV's, else .venv's, else "
            "python3 on the PATH.",
        ),
    ] = None,
) -> Submission:
    """Read the options; their order here is the help's."""
    if adopt and job_id is None:
        raise InvalidValueError("--adopt needs --job-id: it says which job is meant")
    if job_id_prefix is not None:
        if job_id is not None:
            raise InvalidValueError("--job-id and --job-id-prefix exclude each other: give one of them")
        job_id = f"{job_id_prefix}-{time.time_ns()}"
    minimum = [
        Resource(name, whole(quantity)) for name, quantity in (("CPU", cpu), ("GPU", gpu)) if quantity is not None
    ]
    if memory is not None:
        minimum.append(Resource("memory", parse_memory("--memory", memory)))
    minimum += [parse_resource("--resource", text) for text in resource or []]
    return Submission(
        command[0] if len(command) == 1 else shlex.join(command),
        RuntimeEnv(
            package or [],
            minimum,
            [parse_resource("--max-resource", text) for text in max_resource or []],
            _variables(env or []),
            secrets=_secrets(secret or [], secret_file or []),
            working_dir=working_dir,
            excludes=exclude or [],
            container_image=image,
            extras=extra or [],
        ),
        job_id,
        adopt,
        parse_pairs("--metadata", metadata or []),
        None if timeout is None else parse_duration("--timeout", timeout),
        max_retries,
        python,
    )


def _variables(texts: list[str]) -> dict[str, str]:
    variables = {}
    for text in texts:
        name, equals, value = text.partition("=")
        variables[name] = value if equals else _from_here("--env", name)
    return variables


def _secrets(names: list[str], files: list[str]) -> dict[str, str]:
    secrets = {}
    for text in names:
        name, equals, _ = text.partition("=")
        if equals:
            raise InvalidValueError(
                f"--secret takes a name alone, since a value on the command line shows in process lists and in the "
                f"shell's history: export {name} and give `--secret {name}`, or give `--secret-file {name}=PATH` "
                "(and take the value that was given here for known)"
            )
        secrets[name] = _from_here("--secret", name)
    for text in files:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            # Not quoted back: it may be the value, given where the path belongs.
            raise InvalidValueError("--secret-file: write NAME=PATH")
        if name in secrets:
            raise InvalidValueError(f"the secret {name} is given twice: give it once")
        secrets[name] = _read_secret(name, path)
    return secrets


def _read_secret(name: str, path: str) -> str:
    try:
        value = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidValueError(f"--secret-file: the file for {name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidValueError(f"--secret-file: the file for {name} is not UTF-8 text") from None
    return value.removesuffix("\n").removesuffix("\r")


def _from_here(option: str, name: str) -> str:
    try:
        return os.environ[name]
    except KeyError:
        other = "give NAME=VALUE" if option == "--env" else f"or give `--secret-file {name}=PATH`"
        raise InvalidValueError(f"{option}: {name or 'the empty name'} is not set here: export it, {other}") from None
