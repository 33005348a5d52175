"""Real SSH servers on loopback, each with its own port and host key: the workers of a slice, as ssh sees them."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.requirements import missing

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def require_openssh() -> None:
    if SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None:
        missing("openssh", "apt install openssh-server openssh-client")


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path


class Server:
    """One sshd in the foreground; it serves until it is closed, its sessions then end too."""

    def __init__(self, directory: Path, authorized_key: Path) -> None:
        require_openssh()
        assert SSHD is not None
        directory.mkdir(parents=True)
        self.directory = directory
        host_key = make_key(directory / "host_key")
        self.public_key = host_key.with_suffix(".pub").read_text().split()[1]
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        for attempt in range(20):
            self.port = _free_port()
            config = directory / "config"
            config.write_text(
                f"ListenAddress 127.0.0.1:{self.port}\n"
                f"HostKey {host_key}\n"
                f"AuthorizedKeysFile {authorized_key.with_suffix('.pub')}\n"
                f"PidFile {directory / 'pid'}\n"
                "StrictModes no\n"
                "UsePAM no\n"
                "PasswordAuthentication no\n"
                "KbdInteractiveAuthentication no\n"
                "PermitRootLogin prohibit-password\n"
                "AcceptEnv NOTHING\n"
                # Not the user's own: what their shell does when it starts is killed in the middle by some tests.
                f"SetEnv HOME={directory}\n"
            )
            self.process = subprocess.Popen(
                [SSHD, "-D", "-e", "-f", str(config)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            if self._listens():
                return
            self.close()
            assert attempt < 19, "sshd does not start"

    @property
    def user(self) -> str:
        return getpass.getuser()

    def close(self) -> None:
        self.process.terminate()
        self.process.communicate()

    def end_sessions(self) -> None:
        """Cut every connection, as a machine does that is switched off."""
        for child in _descendants(self.process.pid):
            try:
                os.kill(child, 9)
            except ProcessLookupError:
                continue

    def _listens(self) -> bool:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("Server listening"):
                return True
        self.process.wait()
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _descendants(pid: int) -> list[int]:
    """The processes that a server started: those that serve connections, not the commands in them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children]
