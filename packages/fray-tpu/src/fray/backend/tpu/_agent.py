"""What runs on every host of a slice, from boot to end: keeps Ray joined, the lease renewed, and the bill short.

The startup script (`_startup.py`) writes this file to the host as it stands and runs it with the host's own Python. So
it imports the standard library only, nothing of Fray's, and runs on Python 3.8. What it does:

- starts Ray, joined to the head, and starts it again when it ends, after a pause that doubles up to a minute;
- leaves on a preemption notice: Ray is told to drain, and is not started again;
- on worker 0, renews the lease as long as Ray runs something on this host. A slice that idles is not renewed, nor one
  whose head is gone; `fray tpu gc` takes it when the lease has ended;
- deletes the whole group when its time to live is over, where that was asked for. Any worker does it, worker 0 first;
- fetches Ray's token from Secret Manager, where one is named, and keeps it in a file that only root reads.

`agent.py SETTINGS` reads a JSON file, beside which Ray's environment is, and the token is kept. The environment can
replace what it talks to, for tests and simulations:
`GCE_METADATA_HOST` (Google's own name for that), `FRAY_TPU_API`, `FRAY_SECRETS_API`, `FRAY_RAY` (the `ray` command),
`FRAY_RAY_OPTIONS` (more options for it), `FRAY_TPU_CHIPS` (where there is no TPU to be found: a number, or `by-type`).
"""

from __future__ import annotations

import base64
import calendar
import contextlib
import glob
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, Callable, NamedTuple, NoReturn  # noqa: UP035  # collections.abc.Callable[…] is 3.9's

LEASE_UNTIL = "fray-lease-until"
LEASE_FORM = "%Y%m%dt%H%M%Sz"
# Written by the startup script when all is installed.
PREPARED = "prepared"
TPU_API = "https://tpu.googleapis.com"
SECRETS_API = "https://secretmanager.googleapis.com"

_REQUEST_SECONDS = 20
_FIRST_PAUSE_SECONDS = 1.0
_PREPARED_LOOK_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 60.0
# Ray that ran for so long was well: the next pause is a short one again.
_WELL_AFTER_SECONDS = 120.0
# Google gives 30 seconds between the notice and the end.
_LEAVE_SECONDS = 25.0
# Of which Ray may take so many to let what runs come to an end; its own default is all 30.
_DRAIN_SECONDS = "12"
_PREEMPTION_POLL_SECONDS = 60
# How often it is looked whether the slice is in use.
_LOOK_SECONDS = 60.0
# One worker after the other tries to delete the group, should the first ones be dead.
_NEXT_WORKER_SECONDS = 60.0
# Ray's own processes; a worker's title is `ray::` and what it runs.
_IDLE_TITLES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::SpillWorker", "ray::RestoreWorker")


class Host(NamedTuple):
    """What the metadata server says about this host."""

    project: str
    zone: str
    node: str
    worker_id: int
    accelerator_type: str
    topology: str

    @property
    def path(self) -> str:
        """Return the node's full name in the Cloud TPU API."""
        return f"projects/{self.project}/locations/{self.zone}/nodes/{self.node}"

    def variables(self) -> dict[str, str]:
        """Return what Ray makes a TPU host's resources and labels of."""
        return {
            "TPU_NAME": self.node,
            "TPU_WORKER_ID": str(self.worker_id),
            "TPU_ACCELERATOR_TYPE": self.accelerator_type,
            "TPU_TOPOLOGY": self.topology,
        }


class Refused(Exception):
    """An answer that will not change by asking again."""


def say(message: str) -> None:
    """Write to the log: the journal, or the serial console."""
    sys.stderr.write(f"fray: {message}\n")
    sys.stderr.flush()


class Google:
    """The few calls to the metadata server, the Cloud TPU API and Secret Manager."""

    def __init__(self) -> None:
        self._metadata = (
            f"http://{os.environ.get('GCE_METADATA_HOST') or 'metadata.google.internal'}/computeMetadata/v1"
        )
        self._api = os.environ.get("FRAY_TPU_API", TPU_API)
        self._secrets = os.environ.get("FRAY_SECRETS_API", SECRETS_API)
        # Only the host itself can reach the metadata server, so no proxy can.
        self._direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def metadata(self, key: str, *, timeout: float = _REQUEST_SECONDS, **query: str) -> tuple[str, str]:
        """Return a value, and the tag by which a change of it can be waited for."""
        url = f"{self._metadata}/{key}" + (f"?{urllib.parse.urlencode(query)}" if query else "")
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with self._direct.open(request, timeout=timeout) as answer:
            return answer.read().decode().strip(), answer.headers.get("ETag", "")

    def host(self) -> Host:
        """Return which host this is."""
        try:
            environment, _ = self.metadata("instance/attributes/tpu-env")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise Refused("this is no TPU VM: its metadata has no tpu-env") from error
            raise
        said = dict(re.findall(r"^(\w+): '?(.*?)'?$", environment, re.MULTILINE))
        return Host(
            project=self._first("project/project-id") or said["CONSUMER_PROJECT_ID"],
            zone=said.get("ZONE") or self._first("instance/zone").rpartition("/")[2],
            node=self._first("instance/attributes/instance-id") or said["NODE_ID"],
            worker_id=int(self._first("instance/attributes/agent-worker-number") or said["WORKER_ID"]),
            accelerator_type=self._first("instance/attributes/accelerator-type") or said["ACCELERATOR_TYPE"],
            topology=said.get("TOPOLOGY", "").lower(),
        )

    def wait_for_preemption(self, tag: str) -> tuple[bool, str]:
        """Return whether this host is being preempted, once that changed or after a while."""
        query = (
            {"wait_for_change": "true", "timeout_sec": str(_PREEMPTION_POLL_SECONDS), "last_etag": tag} if tag else {}
        )
        timeout = _PREEMPTION_POLL_SECONDS + _REQUEST_SECONDS
        value, tag = self.metadata("instance/preempted", timeout=timeout, **query)
        return value.upper() == "TRUE", tag

    def node(self, path: str) -> dict[str, Any]:
        """Return the node as the API has it."""
        return self._call("GET", f"{self._api}/v2/{path}", "tpu.nodes.get")

    def set_labels(self, path: str, labels: dict[str, str]) -> None:
        """Give the node these labels and no others."""
        self._call("PATCH", f"{self._api}/v2/{path}?updateMask=labels", "tpu.nodes.update", {"labels": labels})

    def delete(self, path: str) -> bool:
        """Delete a queued resource with its nodes, or a node; return whether it was there."""
        is_node = "/nodes/" in path
        permission = "tpu.nodes.delete" if is_node else "tpu.queuedResources.delete and tpu.nodes.delete"
        try:
            self._call("DELETE", f"{self._api}/v2/{path}" + ("" if is_node else "?force=true"), permission)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            return False
        return True

    def secret(self, name: str) -> str:
        """Return the value of a secret's version."""
        url = f"{self._secrets}/v1/{name}:access"
        answer = self._call("GET", url, "secretmanager.versions.access")
        return base64.b64decode(answer["payload"]["data"]).decode().strip()

    def _first(self, key: str) -> str:
        try:
            return self.metadata(key)[0]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return ""
            raise

    def _call(self, method: str, url: str, permission: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        token = json.loads(self.metadata("instance/service-accounts/default/token")[0])["access_token"]
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=content, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
                parsed: dict[str, Any] = json.loads(answer.read() or b"{}")
                return parsed
        except urllib.error.HTTPError as error:
            if error.code == 403:
                said = error.read().decode(errors="replace")
                raise Refused(f"{url} is refused; the VM's service account needs {permission}: {said}") from error
            raise


class Agent:
    """This host's part in the slice, from boot to end."""

    def __init__(self, directory: Path, settings: dict[str, Any], google: Google) -> None:
        self._directory = directory
        self._settings = settings
        self._google = google
        self._leaves = threading.Event()
        self._ray: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Do it all; return when the host leaves."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.leave("stopped"))
        host = self._insist("find out which host this is", self._google.host)
        if host is None:
            return 0
        say(f"this is worker {host.worker_id} of {host.node} ({host.accelerator_type}) in {host.zone}")
        duties: list[Callable[[Host], None]] = [self._watch_for_preemption]
        if self._settings.get("time_to_live_seconds"):
            duties.append(self._end_in_time)
        if self._settings.get("ray_address") and self._settings.get("lease_seconds") and host.worker_id == 0:
            duties.append(self._renew_lease)
        for duty in duties:
            threading.Thread(target=duty, args=(host,), daemon=True).start()
        if self._settings.get("ray_address"):
            self._keep_ray(host)
        else:
            while not self._leaves.wait(3600):
                pass
        return 0

    def leave(self, why: str) -> None:
        """Stop Ray and do not start it again."""
        if not self._leaves.is_set():
            say(f"leaving: {why}")
            self._leaves.set()
            self._stop_ray()

    def _stop_ray(self) -> None:
        ray = self._ray
        if ray is not None and ray.poll() is None:
            ray.terminate()  # `ray start --block` then drains this node, and ends with all its processes
            last_resort = threading.Timer(_LEAVE_SECONDS, ray.kill)
            last_resort.daemon = True
            last_resort.start()

    def _keep_ray(self, host: Host) -> None:
        while not (self._directory / PREPARED).exists():
            if self._leaves.wait(_PREPARED_LOOK_SECONDS):
                return
        variables = dict(os.environ)
        # Ray asks Google's metadata server by itself, and these, inherited by what Ray runs, could mislead libtpu: they
        # are set only where that server is another one's.
        if os.environ.get("GCE_METADATA_HOST"):
            variables.update(host.variables())
        # By itself Ray refuses a Python of another patch version than the head's, which nobody can choose everywhere.
        variables.setdefault("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
        variables.setdefault("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", _DRAIN_SECONDS)
        variables["RAY_AUTH_MODE"] = "disabled"
        if secret := self._settings.get("token_secret"):
            token = self._insist(f"read the secret {secret}", lambda: self._google.secret(secret))
            if token is None:
                return
            variables["RAY_AUTH_MODE"] = "token"
            variables["RAY_AUTH_TOKEN_PATH"] = self._keep_token(token)
        chips = self._insist("see the TPU", lambda: self._chips(host))
        if chips is None:
            return
        command = [
            os.environ.get("FRAY_RAY") or str(self._directory / "ray/bin/ray"),
            "start",
            f"--address={self._settings['ray_address']}",
            "--resources=" + json.dumps({"TPU": chips}),
            "--disable-usage-stats",
            "--block",
            *shlex.split(os.environ.get("FRAY_RAY_OPTIONS", "")),
        ]
        pause = _FIRST_PAUSE_SECONDS
        while not self._leaves.is_set():
            say(f"joins Ray: {shlex.join(command)}")
            began = time.monotonic()
            self._ray = subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL)
            if self._leaves.is_set():
                self._stop_ray()  # told to leave in the very moment of the start
            code = self._ray.wait()
            if self._leaves.is_set():
                return
            if time.monotonic() - began > _WELL_AFTER_SECONDS:
                pause = _FIRST_PAUSE_SECONDS
            # By chance a little sooner: hosts that failed together are not to try again together.
            wait = pause * random.uniform(0.5, 1.0)
            say(f"Ray ended with {code}; it is started again in {wait:.1f} s")
            self._leaves.wait(wait)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _chips(self, host: Host) -> int:
        said = os.environ.get("FRAY_TPU_CHIPS", "")
        if said.isdecimal():
            return int(said)
        found = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
        if not found and said != "by-type":
            raise OSError("waiting for the TPU: neither /dev/accel* nor /dev/vfio/* is there")
        chips: int = self._settings["chips"].get(host.accelerator_type, len(found))
        return chips

    def _keep_token(self, token: str) -> str:
        path = self._directory / "ray-token"
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token)
        return str(path)

    def _watch_for_preemption(self, host: Host) -> None:
        tag, pause = "", _FIRST_PAUSE_SECONDS
        while not self._leaves.is_set():
            try:
                is_preempted, tag = self._google.wait_for_preemption(tag)
                pause = _FIRST_PAUSE_SECONDS
            except (OSError, ValueError) as error:
                if isinstance(error, urllib.error.HTTPError) and error.code == 404:
                    say("no preemption notices here")
                    return
                self._leaves.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                continue
            if is_preempted:
                self.leave(f"worker {host.worker_id} of {host.node} is being preempted")

    def _renew_lease(self, host: Host) -> None:
        seconds = float(self._settings["lease_seconds"])
        was_used, due = False, 0.0
        while not self._leaves.wait(min(_LOOK_SECONDS, seconds / 8)):
            was_used = was_used or self._is_in_use()
            if not was_used or time.monotonic() < due:
                continue
            try:
                self.renew(host, seconds)
                was_used = False
            except (Refused, OSError, ValueError) as error:
                say(f"the lease is not renewed, and tried again later: {error}")
            due = time.monotonic() + seconds / 8

    def renew(self, host: Host, seconds: float) -> None:
        """Make the lease end that many seconds from now at the earliest."""
        labels = self._google.node(host.path).get("labels", {})
        until = time.strftime(LEASE_FORM, time.gmtime(time.time() + seconds))
        if labels.get(LEASE_UNTIL, "") < until:  # the form sorts as the times do
            self._google.set_labels(host.path, {**labels, LEASE_UNTIL: until})
            say(f"in use: the lease now ends {until}")

    def _is_in_use(self) -> bool:
        ray = self._ray
        return ray is not None and ray.poll() is None and bool(busy_workers(ray.pid))

    def _end_in_time(self, host: Host) -> None:
        seconds = float(self._settings["time_to_live_seconds"])
        node = self._insist("read when this slice was made", lambda: self._google.node(host.path))
        if node is None:
            return
        made = calendar.timegm(time.strptime(node["createTime"][:19], "%Y-%m-%dT%H:%M:%S"))
        ends = made + seconds + host.worker_id * _NEXT_WORKER_SECONDS
        say(f"the time to live ends {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(made + seconds))} UTC")
        while (left := ends - time.time()) > 0:
            time.sleep(min(left, 3600))  # not one long sleep: the clock may be set meanwhile
        queued = node.get("queuedResource")
        say(f"the time to live is over: {queued or host.path} is deleted")
        # Again and again: the deletion ends this host too, unless it fails.
        pause = _FIRST_PAUSE_SECONDS
        while not self._leaves.is_set():
            if not (queued and self._delete(queued)):
                self._delete(host.path)
            self._leaves.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _delete(self, path: str) -> bool:
        """Ask for a deletion; return whether it is under way."""
        try:
            return self._google.delete(path)
        except (Refused, OSError, ValueError, KeyError) as error:
            say(f"cannot delete {path}: {error or type(error).__name__}")
            return False

    def _insist(self, what: str, call: Callable[[], Any]) -> Any:
        """Make a call until it succeeds; None where the host leaves first."""
        pause, said = _FIRST_PAUSE_SECONDS, ""
        while not self._leaves.is_set():
            try:
                return call()
            except (Refused, OSError, ValueError, KeyError) as error:
                message = f"cannot {what}: {error or type(error).__name__}"
                if message != said:
                    say(message)
                    said = message
            self._leaves.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        return None


def busy_workers(pid: int) -> list[str]:
    """Return the titles of the Ray workers below a process that run something."""
    parents: dict[int, int] = {}
    for status in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # The name, in brackets, may have anything in it.
            number, _, rest = Path(status).read_text(errors="replace").rpartition(")")
            parents[int(number.split(" ", 1)[0])] = int(rest.split()[1])
    titles = []
    for each in parents:
        above, seen = parents.get(each), set()
        while above is not None and above != pid and above not in seen:
            seen.add(above)
            above = parents.get(above)
        if above == pid:
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace").strip()
                if title.startswith("ray::") and not title.startswith(_IDLE_TITLES):
                    titles.append(title)
    return sorted(titles)


def main() -> NoReturn:
    """Run the agent."""
    path = Path(sys.argv[1]).resolve()
    sys.exit(Agent(path.parent, json.loads(path.read_text()), Google()).run())


if __name__ == "__main__":
    main()
