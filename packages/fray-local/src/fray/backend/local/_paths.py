"""Every file and directory that the local backend makes, named here and nowhere else."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from fray.state import machine_digest

__all__ = ["JobPaths", "StorePaths", "default_cache", "default_root"]


@dataclass(frozen=True)
class JobPaths:
    """One job's directory.

    `lock` is held (flock) by whoever supervises the job, from before the job is accepted until the last of its
    processes is gone: a free lock means that nobody does.
    """

    directory: Path

    @property
    def record(self) -> Path:
        """What was submitted, written once."""
        return self.directory / "record.json"

    @property
    def journal(self) -> Path:
        """What has happened since, appended by the supervisor."""
        return self.directory / "journal"

    @property
    def log(self) -> Path:
        """The job's output."""
        return self.directory / "log"

    @property
    def lock(self) -> Path:
        """Held by the supervisor."""
        return self.directory / "lock"

    @property
    def setup(self) -> Path:
        """What is to be prepared before the command can start."""
        return self.directory / "setup.json"

    @property
    def setup_log(self) -> Path:
        """What uv said; in the job's own log only where the set-up failed."""
        return self.directory / "setup.log"

    @property
    def trouble(self) -> Path:
        """What the supervisor said of its own trouble."""
        return self.directory / "supervisor.log"

    @property
    def outputs(self) -> Path:
        """`$FRAY_OUTPUT_DIR`."""
        return self.directory / "outputs"

    def permit(self, nonce: str) -> Path:
        """There as long as the job may run. Removing it asks for a stop, and needs no space on a full disk."""
        return self.directory / f"permit-{nonce}"


@dataclass(frozen=True)
class StorePaths:
    """The store of one machine's jobs."""

    root: Path

    @property
    def jobs(self) -> Path:
        """A directory for each accepted job."""
        return self.root / "jobs"

    @property
    def index(self) -> Path:
        """An empty file for each job, named by submission time, so that the newest are found without reading all."""
        return self.root / "index"

    @property
    def staging(self) -> Path:
        """Jobs that are not accepted yet."""
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        """Jobs that are being removed."""
        return self.root / "trash"

    @property
    def light(self) -> Path:
        """The light part of Fray, for the jobs' `PYTHONPATH`."""
        return self.root / "light"

    @property
    def shims(self) -> Path:
        """`python` and `python3` for the jobs' `PATH`."""
        return self.root / "shims"

    @property
    def runners(self) -> Path:
        """The compiled runner."""
        return self.root / "runners"

    @property
    def interpreters(self) -> Path:
        """What interpreters said about themselves."""
        return self.root / "interpreters"

    @property
    def admission(self) -> Path:
        """The queue of the jobs that ask for resources."""
        return self.root / "admission"

    def job(self, job_id: str) -> JobPaths:
        """The paths of one accepted job."""
        return JobPaths(self.jobs / job_id)

    def make(self) -> None:
        """Make what is missing, private to the user."""
        for directory in (
            self.root,
            self.jobs,
            self.index,
            self.staging,
            self.trash,
            self.light,
            self.shims,
            self.runners,
            self.interpreters,
            self.admission,
        ):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def default_root() -> Path:
    """The store of this machine and user."""
    return platformdirs.user_state_path("fray") / "local" / machine_digest()


def default_cache() -> Path:
    """Where prepared environments are kept."""
    return platformdirs.user_cache_path("fray") / "environments"


def boot_id() -> str:
    """What changes when the machine restarts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import psutil

        return f"{os.uname().nodename}-{int(psutil.boot_time())}"
