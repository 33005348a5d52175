"""The program that Ray runs as a job's entrypoint: it has the job's command run by Fray's runner, and reports on it.

Started as `python3 -I -S fray_entrypoint.py COMMAND` (a file that is shipped with each job and imports this module
without the packages above it). It takes the job's secrets from the head's store, sees to it that a job that was deleted
before it started does not start, gives it a directory of its own, and writes the runner's journal into the metadata of
Ray's record of the job, where every client reads it. Killed, it takes the job with it: the runner is on its leash.

Any Python from 3.8 on, the standard library only: each import is paid for by each job.
"""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import sys
import time

from fray.backend.ray._internals import JOB_NAMESPACE, KvError, PlainKv, RayKv, connect_kv, job_key, package_key

__all__ = ["JOURNAL_KEY", "SUBMISSION_KEY", "main"]

SUBMISSION_KEY = "fray"
"""Under this key of a job's metadata is what Fray stored when it was submitted, as JSON."""

JOURNAL_KEY = "fray_journal"
"""Under this key is the runner's journal so far."""

# How long a report that cannot be delivered is tried again before the job's end is left to Ray to tell.
_PATIENCE_SECONDS = 600.0
_REPORTED = (b'"started"', b'"exited"', b'"stopping"', b'"ended"')


class _SetupFailed(Exception):
    """The command cannot be started."""


class _Job:
    def __init__(self, command: str) -> None:
        self._command = command
        config = json.loads(os.environ["RAY_JOB_CONFIG_JSON_ENV_VAR"])
        self._id: str = config["metadata"]["job_submission_id"]
        self._submission = json.loads(config["metadata"][SUBMISSION_KEY])
        self._supervisor = os.getppid()
        self._kv: PlainKv | RayKv | None = None
        self._runner: int | None = None
        self._is_asked_to_stop = False
        self._journal = b""
        self._reported = b""
        # Beside Ray's own log of the job, in the folder that Ray's log service gives files from.
        log_folder = os.path.dirname(os.readlink("/proc/self/fd/1")) if os.path.exists("/proc/self/fd/1") else ""
        self._folder = os.path.join(log_folder or os.getcwd(), "fray", f"{self._id}.{self._submission['nonce']}")

    def run(self) -> int:
        """Run the job to its end; return the exit code by which Ray is to judge it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        try:
            record = self._record()
            if record is None:
                return 1  # deleted meanwhile
            secrets = self._take_secrets()
            if self._is_deleted() or self._is_asked_to_stop:
                return self._end("STOPPED_BY_USER")
            submitted = record["start_time"] / 1000
            directory = self._make_directories()
            journal, leash_end = self._start_runner(directory, submitted, secrets)
        except _SetupFailed as error:
            return self._end("SETUP_FAILED", str(error))
        except OSError as error:
            return self._end("SETUP_FAILED", f"the job cannot be set up on its node: {error}")
        code = self._follow(journal)
        os.close(leash_end)
        self._remove(os.path.join(self._folder, "work"))
        return code

    # Before the command

    def _store(self) -> PlainKv | RayKv:
        if self._kv is None:
            self._kv = connect_kv(os.environ["RAY_ADDRESS"], plain=self._submission["plain"])
        return self._kv

    def _record(self) -> dict | None:  # type: ignore[type-arg]
        found = self._store().get(job_key(self._id), JOB_NAMESPACE)
        return json.loads(found) if found else None

    def _take_secrets(self) -> bytes:
        name = self._submission.get("secrets")
        if not name:
            return b""
        key = package_key(name)
        value = self._store().get(key)
        self._store().delete(key)
        if value is None:
            raise _SetupFailed("the job's secrets are not in the head's store any more: submit it again")
        return value

    def _is_deleted(self) -> bool:
        key = package_key(self._submission["stop"])
        if self._store().get(key) is None:
            return False
        self._store().delete(key)
        return True

    def _make_directories(self) -> str:
        """Make the job's own directories; return the one that the command is to run in."""
        for name in ("log", "outputs"):
            os.makedirs(os.path.join(self._folder, name), mode=0o700)
        work = os.path.join(self._folder, "work")
        # A copy: Ray gives one unpacked directory to all jobs with the same content, and what one of them writes there
        # would be in the others' way.
        self._spawn_and_wait(["cp", "-RPp", f"{os.getcwd()}/.", work])
        return work

    def _variables(self, work: str) -> dict[str, str]:
        variables = dict(os.environ)
        paths = variables.get("PYTHONPATH", "").split(os.pathsep)
        variables["PYTHONPATH"] = os.pathsep.join(work if path == os.getcwd() else path for path in paths if path)
        variables["PWD"] = work
        variables.update(self._submission.get("exact") or {})
        if not any(os.access(os.path.join(folder, "python"), os.X_OK) for folder in os.get_exec_path()):
            variables["PATH"] = os.pathsep.join([self._python_shim(), variables.get("PATH", os.defpath)])
        variables["FRAY_JOB_ID"] = self._id
        variables["FRAY_OUTPUT_DIR"] = os.path.join(self._folder, "outputs")
        variables["FRAY_JOB_CONTEXT"] = "ray"
        dashboard = self._store().get(b"dashboard", b"dashboard")
        variables["FRAY_CLUSTER"] = f"ray:http://{(dashboard or b'').decode()}"
        return variables

    def _python_shim(self) -> str:
        """A folder with a `python`, for nodes that know it by `python3` alone."""
        folder = os.path.join(self._folder, "bin")
        os.makedirs(folder, mode=0o700)
        with open(os.open(os.path.join(folder, "python"), os.O_WRONLY | os.O_CREAT, 0o700), "w") as script:
            script.write(f"#!/bin/sh\nexec '{sys.executable}' \"$@\"\n")
        return folder

    def _start_runner(self, work: str, submitted: float, secrets: bytes) -> tuple[int, int]:
        """Start the runner; return the journal to read, and the end of the leash to hold."""
        journal, journal_end = os.pipe()
        leash, leash_end = os.pipe()
        handover, handover_end = os.pipe()
        trouble = os.open(os.path.join(self._folder, "runner.log"), os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        copy = os.dup(1)  # Ray's own log of the job, which its dashboard shows
        for fd in (journal_end, leash, copy):
            os.set_inheritable(fd, True)
        runner = [sys.executable, "-I", "-S", os.path.join(_package_root(), "fray", "_runner.py")]
        runner += ["--journal", f"fd:{journal_end}", "--output", f"{self._folder}/log/", "--copy", f"fd:{copy}"]
        runner += ["--directory", work, "--leash", str(leash), "--handover", "stdin", "--detach", "yes"]
        runner += ["--not-before", f"{submitted:.6f}", *self._submission["runner"], "--", self._command]
        streams = [
            (os.POSIX_SPAWN_DUP2, handover, 0),
            (os.POSIX_SPAWN_OPEN, 1, "/dev/null", os.O_WRONLY, 0),
            (os.POSIX_SPAWN_DUP2, trouble, 2),
        ]
        # A session of its own: Ray's signals for this process, and for its group, are not meant for the runner.
        launcher = os.posix_spawn(runner[0], runner, self._variables(work), file_actions=streams, setsid=True)
        for fd in (journal_end, leash, handover, copy, trouble):
            os.close(fd)
        pairs = b"%d\n%s" % (len(secrets), secrets)
        while pairs:
            pairs = pairs[os.write(handover_end, pairs) :]
        os.close(handover_end)
        os.waitpid(launcher, 0)
        return journal, leash_end

    def _spawn_and_wait(self, command: list[str]) -> None:
        quiet = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1)]
        status = os.waitpid(os.posix_spawnp(command[0], command, os.environ, file_actions=quiet), 0)[1]
        if status:
            raise _SetupFailed(f"{' '.join(command)} failed; its words are in Ray's own log of the job")

    # While it runs

    def _follow(self, journal: int) -> int:
        """Report what the runner writes down, until it and all of the job are gone."""
        pending = False
        while True:
            waiting = select.select([journal], [], [], 1.0 if pending else None)[0]
            if waiting:
                chunk = os.read(journal, 65536)
                self._journal += chunk
                self._heed_stop()
                if not chunk:
                    break
                pending = pending or any(event in chunk for event in _REPORTED)
            if pending and b'"ended"' not in self._journal:
                pending = not self._report(self._journal, patience=0.0)
        lines = self._journal[: self._journal.rfind(b"\n") + 1].splitlines()
        last = json.loads(lines[-1]) if lines else {}
        if last.get("event") != "ended":
            return self._end("LOST", "the job's runner was killed, and the job with it")
        self._report(self._journal, _PATIENCE_SECONDS)
        return _exit_code(last)

    def _heed_stop(self) -> None:
        """Hand a request to stop on to the runner, once it is known."""
        if self._runner is None and b"\n" in self._journal:
            self._runner = json.loads(self._journal.split(b"\n", 1)[0])["pid"]
        if self._is_asked_to_stop and self._runner is not None:
            try:
                os.kill(self._runner, signal.SIGTERM)
            except ProcessLookupError:
                pass  # it has just ended by itself

    def _on_stop(self, number: int, frame: object) -> None:
        self._is_asked_to_stop = True
        self._heed_stop()

    # What is told of it

    def _end(self, reason: str, message: str = "") -> int:
        """Report an end that the runner could not."""
        event = {"event": "ended", "time": time.time(), "reason": reason, "message": message}
        self._journal = self._journal[: self._journal.rfind(b"\n") + 1] + json.dumps(event).encode() + b"\n"
        self._report(self._journal, _PATIENCE_SECONDS)
        return 1

    def _report(self, journal: bytes, patience: float) -> bool:
        """Put the journal into Ray's record of the job; say whether that was done, or is not to be done any more."""
        give_up = time.monotonic() + patience
        while True:
            # Whoever reads, changes and writes may undo what another wrote in between. Ray writes to this record when
            # the supervisor above this process does, which waits for it; or when that is dead.
            if os.getppid() != self._supervisor:
                return True
            try:
                record = self._record()
                if record is None:
                    return True  # purged, or the head has forgotten it
                record["metadata"] = {**(record.get("metadata") or {}), JOURNAL_KEY: journal.decode()}
                self._store().put(job_key(self._id), json.dumps(record).encode(), JOB_NAMESPACE)
                return True
            except OSError:
                if time.monotonic() >= give_up:
                    return False
                time.sleep(0.5)

    def _remove(self, directory: str) -> None:
        if os.path.isdir(directory):
            try:
                self._spawn_and_wait(["rm", "-rf", "--", directory])
            except (OSError, _SetupFailed):
                pass  # it goes with the session's folder


def _exit_code(ended: dict) -> int:  # type: ignore[type-arg]
    if not ended.get("reason"):
        return 0
    return ended.get("exit_code") or 1


def _package_root() -> str:
    """The folder that all of this was unpacked to."""
    here = os.path.abspath(__file__)
    for _ in ("fray", "backend", "ray", "_entrypoint.py"):
        here = os.path.dirname(here)
    return here


def main() -> None:
    """Run the job whose command is the one argument, as Ray's own environment variables describe it."""
    try:
        code = _Job(sys.argv[1]).run()
    except KvError as error:
        sys.stderr.write(f"fray: the head's store cannot be used: {error}\n")
        code = os.EX_UNAVAILABLE
    except BrokenPipeError:
        code = errno.EPIPE
    sys.stdout.flush()
    os._exit(code)
