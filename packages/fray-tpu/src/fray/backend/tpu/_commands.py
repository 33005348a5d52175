"""The command that this distribution joins to `fray`: `tpu`, with `up`, `list`, `down` and so on."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fray.backend.tpu._request_options import asks
from fray.backend.tpu.types import SliceGroup, SliceRequest, SliceState
from fray.cli._errors import EXIT_PLATFORM, EXIT_TIMEOUT
from fray.cli._output import print_json, print_lines, say, write_error, write_out
from fray.cli._quantities import parse_duration
from fray.errors import InvalidValueError, ProvisioningError, SliceNotFoundError, UnsupportedError

if TYPE_CHECKING:
    from fray.backend.tpu._ssh import SshOptions, Worker, WorkerEnd, WorkerLine
    from fray.backend.tpu.provisioner import TpuProvisioner

__all__ = ["app"]

app = typer.Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Get Cloud TPU slices, use them, and leave nothing running.",
)

_GCLOUD_KEY = Path("~/.ssh/google_compute_engine")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The group's name.", show_default=False)]
Project = Annotated[
    str | None,
    typer.Option("--project", metavar="PROJECT", help="Who pays; $GOOGLE_CLOUD_PROJECT or gcloud's unless given."),
]
Zones = Annotated[
    list[str] | None,
    typer.Option("--zone", "-z", metavar="ZONE", help="Where to look; everywhere unless given; may be repeated."),
]
Fake = Annotated[
    bool, typer.Option("--fake", help="Talk to a stand-in for Google on this machine: no account, no money.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
AllOwners = Annotated[bool, typer.Option("--all-owners", help="Everybody's, not only yours.")]
User = Annotated[str | None, typer.Option("--user", metavar="USER", help="The user on the hosts.")]
Identity = Annotated[
    Path | None,
    typer.Option("--identity", "-i", metavar="FILE", help=f"A private key; {_GCLOUD_KEY} where it is there."),
]
Internal = Annotated[bool, typer.Option("--internal-ip", help="Reach the hosts by their internal addresses.")]


@app.callback()
def _tpu() -> None:
    """Get Cloud TPU slices, use them, and leave nothing running."""


@app.command("up")
@asks
def up(
    request: SliceRequest,
    *,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Return when it is asked for; `fray tpu wait` takes it up.")
    ] = False,
    project: Project = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Get slices, wait until they are ready, and print their name.

    Ctrl-C deletes what was asked for, and so does whatever goes wrong.
    """
    from fray.backend.tpu._display import WaitDisplay

    if no_wait and request.at_once and len(request.choices) > 1:
        raise InvalidValueError("--no-wait: with --at-once all choices could be granted, and nobody would cancel any")
    with _provisioner(project, None, fake) as provisioner, WaitDisplay() as display:
        with _told_on_interrupt(request.name, display, _where(project, fake)):
            try:
                group = provisioner.create(request)
                if not no_wait:
                    group = provisioner.wait_ready(request.name, display)
            except BaseException:
                provisioner.delete_created()  # an interrupt may come between the two
                raise
        display.stop()
        _show_new(group, _where(project, fake), as_json)


@app.command("wait")
def wait(name: Name, project: Project = None, fake: Fake = False, as_json: AsJson = False) -> None:
    """Wait until what `up --no-wait` asked for is ready, and print its name.

    Ctrl-C deletes it, and so does whatever goes wrong.
    """
    from fray.backend.tpu._display import WaitDisplay

    with _provisioner(project, None, fake) as provisioner, WaitDisplay() as display:
        with _told_on_interrupt(name, display, _where(project, fake)):
            group = provisioner.wait_ready(name, display)
        display.stop()
        _show_new(group, _where(project, fake), as_json)


@app.command("plan")
@asks
def plan(
    request: SliceRequest,
    *,
    script: Annotated[bool, typer.Option("--script", help="Print the hosts' startup script instead.")] = False,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Show what `up` would ask for and what it costs an hour. Nothing is called, and nothing is made."""
    from fray.backend.tpu._display import print_request, request_as_plain

    if script:
        if request.startup_script is None:
            raise InvalidValueError("--script: nothing that was asked for needs one; see --join-ray and --setup")
        if as_json:
            print_json({"startup_script": request.startup_script})
        else:
            write_out(request.startup_script.encode())
    elif as_json:
        print_json(request_as_plain(request))
    else:
        print_request(request)


@app.command("list")
def list_groups(
    all_owners: AllOwners = False,
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """List what there is, with what it costs."""
    from fray.backend.tpu._display import group_as_plain, print_groups

    with _provisioner(project, zone, fake) as provisioner:
        groups = provisioner.list(all_owners=all_owners)
    if as_json:
        print_json([group_as_plain(group) for group in groups])
    elif groups or not sys.stdout.isatty():
        print_groups(groups, with_owner=all_owners)
    else:
        say("there are no slices" if all_owners else "there are no slices of yours; --all-owners shows others'")


@app.command("describe")
def describe(
    name: Name,
    all_owners: AllOwners = False,
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Show all that is known of a group of slices."""
    from fray.backend.tpu._display import group_as_plain, print_group

    with _provisioner(project, zone, fake) as provisioner:
        group = provisioner.describe(name, all_owners=all_owners)
    if as_json:
        print_json(group_as_plain(group))
    else:
        print_group(group)


@app.command("ssh")
def ssh(
    name: Name,
    command: Annotated[list[str] | None, typer.Argument(metavar="[COMMAND]", help="A shell unless given.")] = None,
    rank: Annotated[int, typer.Option("--rank", "-r", metavar="N", min=0, help="Which host, as in describe.")] = 0,
    print_only: Annotated[bool, typer.Option("--print", help="Print the ssh command and do not run it.")] = False,
    user: User = None,
    identity: Identity = None,
    internal_ip: Internal = False,
    all_owners: AllOwners = False,
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Open a shell on one host, or run a command there, by OpenSSH. The exit code is ssh's."""
    from fray.backend.tpu._ssh import ssh_command

    with _provisioner(project, zone, fake) as provisioner:
        workers = _workers(provisioner.describe(name, all_owners=all_owners), internal_ip)
    if rank >= len(workers):
        raise InvalidValueError(f"--rank: {name} has the hosts 0 to {len(workers) - 1}")
    line = ssh_command(workers[rank], _joined(command), _ssh_options(user, identity), batch=False)
    if as_json:
        print_json({"command": line})
    elif print_only:
        print_lines([shlex.join(line)])
    else:
        _check_ssh(fake)
        os.execvp(line[0], line)


@app.command("exec")
def exec_everywhere(
    name: Name,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND",
            help="What to run, behind `--`; a single argument is a shell command.",
            show_default=False,
        ),
    ],
    timeout: Annotated[
        str | None, typer.Option("--timeout", metavar="DURATION", help="What still runs then is stopped.")
    ] = None,
    keep_going: Annotated[bool, typer.Option("--keep-going", help="Let the others go on when one fails.")] = False,
    user: User = None,
    identity: Identity = None,
    internal_ip: Internal = False,
    all_owners: AllOwners = False,
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Run a command on every host at once, over SSH, each line behind the host's number.

    The first that fails stops the others, and its exit code is this one's; 69 where a host cannot be reached, 124
    where the time is over. Ctrl-C stops all.
    """
    from fray.backend.tpu._ssh import run_on_workers

    _check_ssh(fake)
    with _provisioner(project, zone, fake) as provisioner:
        workers = _workers(provisioner.describe(name, all_owners=all_owners), internal_ip)
    width = len(str(len(workers) - 1))

    def show(line: WorkerLine) -> None:
        # With --json standard output is the document's.
        write = write_error if line.is_error or as_json else write_out
        write(f"[{line.rank:>{width}}] ".encode() + line.content + b"\n")

    ends = run_on_workers(
        workers,
        _joined(command) or "",
        _ssh_options(user, identity),
        timeout_seconds=None if timeout is None else parse_duration("--timeout", timeout),
        on_line=show,
        may_go_on=keep_going,
    )
    for end in ends:
        if end.has_failed:
            say(f"host {end.rank}: {_end_text(end)}")
    if any(end.exit_code is None and "Permission denied (publickey" in end.message for end in ends):
        say(
            "the hosts do not know the key: --identity names one that they know; `fray tpu up --metadata` can tell them"
        )
    code = _exit_code(ends)
    if code == EXIT_TIMEOUT:
        say(f"the time is over: {sum(end.was_stopped for end in ends)} of {len(ends)} hosts were stopped")
    if as_json:
        print_json(
            [
                {
                    "rank": end.rank,
                    "exit_code": end.exit_code,
                    "was_stopped": end.was_stopped,
                    "message": end.message,
                }
                for end in ends
            ]
        )
    raise typer.Exit(code)


@app.command("renew")
def renew(
    name: Name,
    ttl: Annotated[str, typer.Option("--ttl", metavar="DURATION", help="From now; never shorter than it was.")] = "4h",
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Make a lease run longer, and print when it ends. Hosts that joined Ray do so by themselves while in use."""
    seconds = parse_duration("--ttl", ttl)
    with _provisioner(project, zone, fake) as provisioner:
        until = provisioner.renew(name, seconds).until
    if as_json:
        print_json({"name": name, "lease_until": until.timestamp() if until else None})
    else:
        print_lines([until.isoformat() if until else "unknown"])


@app.command("down")
def down(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="The groups' names.", show_default=False)],
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Delete slices of yours, wait until they are gone, and print their names."""
    with _provisioner(project, zone, fake) as provisioner:
        provisioner.delete(*names)
    if as_json:
        print_json({"deleted": names})
    else:
        print_lines(names)


@app.command("gc")
def gc(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete it.")] = False,
    all_owners: AllOwners = False,
    project: Project = None,
    zone: Zones = None,
    fake: Fake = False,
    as_json: AsJson = False,
) -> None:
    """Show what was left behind, and with --yes delete it.

    That is slices whose lease has ended, and requests of clients that are gone. Only what Fray made, and only yours
    unless --all-owners.
    """
    from fray.backend.tpu._display import doomed_as_plain, gc_as_plain, print_doomed

    with _provisioner(project, zone, fake) as provisioner:
        planned = provisioner.plan_gc(all_owners=all_owners)
        for problem in planned.unreadable:
            say(problem)
        report = provisioner.gc(planned) if yes else None
    failures = [] if report is None else [f"{one.name}: {reason}" for one, reason in report.failed]
    if as_json:
        shown = {"doomed": [doomed_as_plain(one) for one in planned.doomed], "unreadable": list(planned.unreadable)}
        print_json(shown if report is None else {**shown, **gc_as_plain(report)})
        if failures:  # they are in the document
            raise typer.Exit(EXIT_PLATFORM)
    elif report is None:
        if planned.doomed:
            print_doomed(planned.doomed, with_owner=all_owners)
            say("nothing was deleted: --yes deletes it")
        else:
            say("nothing was left behind")
    else:
        print_lines(one.name for one in report.deleted)
        if not planned.doomed:
            say("nothing was left behind")
        for one in report.spared:
            say(f"{one.name} is spared: its lease was renewed, or somebody looks after it")
    if failures:
        raise ProvisioningError("; ".join(failures))


@app.command("types")
def types(
    generation: Annotated[
        list[str] | None, typer.Argument(metavar="[GENERATION]...", help="Such as v5e; all unless given.")
    ] = None,
    region: Annotated[
        str, typer.Option("--region", metavar="REGION", help="Where prices are for; a zone will do.")
    ] = "us-central1",
    as_json: AsJson = False,
) -> None:
    """List the types there are, with chips, hosts, runtime version and price."""
    from fray.backend.tpu._display import print_types, type_as_plain
    from fray.tpu import tpu_types

    kinds = tpu_types()
    known = list(dict.fromkeys(kind.generation for kind in kinds))
    for wanted in generation or ():
        if wanted not in known:
            raise InvalidValueError(f"there is no generation {wanted!r}; there are {', '.join(known)}")
    chosen = [kind for kind in kinds if not generation or kind.generation in generation]
    if as_json:
        print_json([type_as_plain(kind, region) for kind in chosen])
    else:
        print_types(chosen, region)


def _where(project: str | None, fake: bool) -> str:
    """Return the options by which another command finds what this one made."""
    return (f" --project {shlex.quote(project)}" if project else "") + (" --fake" if fake else "")


def _show_new(group: SliceGroup, where: str, as_json: bool) -> None:
    from fray.backend.tpu._display import group_as_plain, group_cost

    if as_json:
        print_json(group_as_plain(group))
        return
    if group.state is not SliceState.READY:
        takes_up = f"`fray tpu wait {group.name}{where}` takes it up"
        say(f"{group.name} is {group.state}: {takes_up}; until then `gc` may delete it")
        print_lines([group.name])
        return
    cost = group_cost(group)
    until = f" until {group.lease.until:%Y-%m-%d %H:%M} UTC" if group.lease and group.lease.until else ""
    say(f"{group.name} is {group.state}: {group.num_slices} x {group.accelerator_type} in {group.zone}{until}")
    say(f"it costs {cost} an hour ({cost.note}); `fray tpu down {group.name}{where}` ends that")
    print_lines([group.name])


@contextmanager
def _provisioner(project: str | None, zones: list[str] | None, fake: bool) -> Iterator[TpuProvisioner]:
    """Give a provisioner, which is closed at the end and deletes nothing then."""
    from fray.backend.tpu.provisioner import TpuProvisioner

    if fake:
        from fray.backend.tpu._stand_in import stand_in
        from fray.backend.tpu.testing import ImpatientClock

        found = stand_in()
        provisioner = TpuProvisioner(
            project or found.project,
            zones,
            endpoint=found.address,
            clock=ImpatientClock(),
            state_directory=found.directory / "requests",
            command_options=_where(project, fake),
        )
    else:
        provisioner = TpuProvisioner(project, zones)
    try:
        yield provisioner
    finally:
        provisioner.close()


@contextmanager
def _told_on_interrupt(name: str, display: Any, where: str) -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and a closed terminal end this the same way: with everything deleted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        with suppress(OSError):  # the terminal may be gone
            display.stop()
            say(
                f"interrupted: {name} is being deleted, for ten minutes at most; should that be interrupted too: "
                f"`fray tpu gc --yes{where}`"
            )
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as interrupt:
        if not getattr(interrupt, "__notes__", []):
            with suppress(OSError):
                say(f"nothing is left of {name}")
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(group: SliceGroup, internal: bool) -> list[Worker]:
    """Return where the group's hosts are reached, in rank order."""
    from fray.backend.tpu._ssh import Worker

    if not group.hosts:
        raise SliceNotFoundError(f"{group.name} is {group.state} and has no hosts that could be reached")
    workers: list[Worker] = []
    for one in group.slices:
        # A slice that is made again has other keys, maybe under the same name and address.
        made = f"{one.created:%Y%m%d%H%M%S}" if one.created else "unknown"
        for host in one.hosts:
            address = host.internal_ip if internal else host.external_ip
            if not address:
                raise UnsupportedError(
                    f"host {len(workers)} of {group.name} has no external address: use --internal-ip from inside its "
                    "network"
                )
            workers.append(Worker(len(workers), address, host_key_alias=f"{one.name}-{made}-w{host.worker_id}"))
    return workers


def _ssh_options(user: str | None, identity: Path | None) -> SshOptions:
    from fray.backend.tpu._intents import default_directory
    from fray.backend.tpu._ssh import SshOptions

    usual = _GCLOUD_KEY.expanduser()
    known_hosts = default_directory() / "known_hosts"
    known_hosts.parent.mkdir(parents=True, exist_ok=True)
    program = tuple(shlex.split(os.environ.get("FRAY_TPU_SSH", "ssh")))
    return SshOptions(
        user=user,
        identity_file=identity or (usual if usual.is_file() else None),
        known_hosts=known_hosts,
        program=program,
    )


def _check_ssh(fake: bool) -> None:
    if fake and "FRAY_TPU_SSH" not in os.environ:
        raise UnsupportedError("--fake: the stand-in's hosts have no SSH; `fray tpu ssh --print` shows the command")


def _joined(command: list[str] | None) -> str | None:
    """Return what the far side's shell is given: one argument as it stands, several quoted."""
    if not command:
        return None
    return command[0] if len(command) == 1 else shlex.join(command)


def _end_text(end: WorkerEnd) -> str:
    return end.message if end.exit_code is None else f"ended with {end.exit_code}"


def _exit_code(ends: list[WorkerEnd]) -> int:
    for end in ends:
        if end.has_failed:
            return EXIT_PLATFORM if end.exit_code is None else end.exit_code
    return EXIT_TIMEOUT if any(end.was_stopped for end in ends) else 0
