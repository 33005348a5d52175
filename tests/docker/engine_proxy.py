"""A way to an engine (or to a registry) that a test can break or hold up, and one by TLS."""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

JOIN_SECONDS = 10.0


class Proxy:
    """Hands connections to a loopback port on to another address, until it is told to cut them off.

    Each direction ends by itself, as hijacked connections want it: the client's "no more" reaches the engine, whose
    answer still comes back.

    Args:
        target: `unix:///path` or `tcp://host:port`.
        is_held: Called with what a client sends; True holds it, and all that follows in this connection, until
            `release` is called.
    """

    def __init__(self, target: str, *, is_held: Callable[[bytes], bool] = lambda data: False) -> None:
        self._target = target
        self._is_held = is_held
        self._released = threading.Event()
        self.has_held = threading.Event()
        self._is_cut = False
        self._left: int | None = None
        self._is_silent = threading.Event()
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.host = f"tcp://{self.address}"
        self._start(self._accept)

    @contextmanager
    def cut_off(self) -> Iterator[None]:
        """Break every connection, and each new one at once while the context is open."""
        with self._lock:
            self._is_cut = True
            self._break()
        try:
            yield
        finally:
            self._is_cut = False

    @contextmanager
    def silent(self, after_bytes: int) -> Iterator[threading.Event]:
        """Hand no more of the answers on than so much while the context is open, and break nothing.

        The event it gives is set when somebody waits for more.
        """
        is_silent = threading.Event()
        with self._lock:
            self._left, self._is_silent = after_bytes, is_silent
        try:
            yield is_silent
        finally:
            with self._lock:
                self._left = None
            self._flows.set()

    def release(self) -> None:
        """Let through what is held, and hold nothing any more."""
        self._released.set()

    def close(self) -> None:
        """End it; returns when all its threads have ended."""
        with self._lock:
            self._is_cut = True
            self._break()
        self._released.set()
        self._flows.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join(JOIN_SECONDS)
            assert not thread.is_alive(), f"{thread.name} of the proxy to {self._target} does not end"
        self._listener.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self, run: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=self._run, args=(run, *arguments), daemon=True)
        with self._lock:
            self._threads.add(thread)
        thread.start()
        return thread

    def _run(self, run: Callable[..., None], *arguments: Any) -> None:
        try:
            run(*arguments)
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())

    def _break(self) -> None:
        for each in self._open:
            with suppress(OSError):  # closed
                socket.socket.shutdown(each, socket.SHUT_RDWR)  # below TLS, where there is any

    def _accept(self) -> None:
        while True:
            try:
                here, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._start(self._serve, here)

    def _serve(self, here: socket.socket) -> None:
        try:
            with (
                here,
                self._connect() as there,
                self._kept(here, there),
                self._greet(here) as greeted,
                self._kept(greeted),
            ):
                client, engine = self._end_of(greeted), _Plain(there)
                back = self._start(self._hand_on, engine, client)
                self._hand_on(client, engine, self._is_held)
                back.join()
        except OSError:  # no engine, no TLS, or cut off: the client's connection is closed
            return

    @contextmanager
    def _kept(self, *connections: socket.socket) -> Iterator[None]:
        """Have connections within the reach of `cut_off`."""
        with self._lock:
            if self._is_cut:
                raise ConnectionAbortedError
            self._open.update(connections)
        try:
            yield
        finally:
            with self._lock:
                self._open.difference_update(connections)

    def _connect(self) -> socket.socket:
        scheme, _, address = self._target.partition("://")
        if scheme == "tcp":
            host, _, port = address.rpartition(":")
            return socket.create_connection((host, int(port)), 10)
        there = socket.socket(socket.AF_UNIX)
        try:
            there.connect(address)
        except OSError:
            there.close()
            raise
        return there

    def _greet(self, here: socket.socket) -> socket.socket:
        return here

    def _end_of(self, here: socket.socket) -> _Plain | _Tls:
        return _Plain(here)

    def _hand_on(
        self, source: _Plain | _Tls, target: _Plain | _Tls, is_held: Callable[[bytes], bool] | None = None
    ) -> None:
        try:
            while data := source.receive():
                if is_held is not None and not self._released.is_set() and is_held(data):
                    self.has_held.set()
                    self._released.wait()
                if is_held is None:
                    self._wait_for_flow(len(data))
                target.send(data)
        except OSError:  # broken: by the other side, or by us
            source.break_off()
            target.break_off()
        else:
            with suppress(OSError):
                target.end()

    def _wait_for_flow(self, size: int) -> None:
        with self._lock:
            if self._left is not None:
                self._left -= size
                if self._left < 0:
                    self._flows.clear()
                    self._is_silent.set()
        self._flows.wait()


class TlsProxy(Proxy):
    """A proxy that speaks TLS with its clients, and only with those that have a certificate of its CA.

    Args:
        target: As for `Proxy`.
        folder: An empty folder for the certificates. Its `client` is what `DOCKER_CERT_PATH` wants to name.
    """

    def __init__(self, target: str, folder: Path) -> None:
        self.certificates = folder / "client"
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        make_certificates(folder)
        self._context.load_cert_chain(folder / "server" / "cert.pem", folder / "server" / "key.pem")
        self._context.load_verify_locations(folder / "client" / "ca.pem")
        self._context.verify_mode = ssl.CERT_REQUIRED
        super().__init__(target)

    def environment(self) -> dict[str, str]:
        """The variables by which clients find it."""
        return {"DOCKER_HOST": self.host, "DOCKER_TLS_VERIFY": "1", "DOCKER_CERT_PATH": str(self.certificates)}

    def create_context(self, name: str, config: Path) -> None:
        """Write a docker context of this name into a folder that `DOCKER_CONFIG` is to name."""
        files = ",".join(f"{key}={self.certificates / key}.pem" for key in ("ca", "cert", "key"))
        command = ["docker", "--config", str(config), "context", "create", name]
        subprocess.run([*command, "--docker", f"host={self.host},{files}"], check=True, capture_output=True)

    def _greet(self, here: socket.socket) -> socket.socket:
        here.settimeout(JOIN_SECONDS)
        return self._context.wrap_socket(here, server_side=True)

    def _end_of(self, here: socket.socket) -> _Plain | _Tls:
        assert isinstance(here, ssl.SSLSocket)
        return _Tls(here)


class _Plain:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def receive(self) -> bytes:
        return self._connection.recv(1 << 16)

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def end(self) -> None:
        self._connection.shutdown(socket.SHUT_WR)

    def break_off(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class _Tls:
    """One end of a TLS connection that two threads use: OpenSSL wants them to take turns."""

    def __init__(self, connection: ssl.SSLSocket) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._lock = threading.Lock()

    def receive(self) -> bytes:
        while True:
            try:
                with self._lock:
                    return self._connection.recv(1 << 16)
            except ssl.SSLWantReadError:
                select.select([self._connection], [], [])

    def send(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                with self._lock:
                    left = left[self._connection.send(left) :]
            except ssl.SSLWantWriteError:
                select.select([], [self._connection], [])

    def end(self) -> None:
        # Says "no more" and does not wait for the other side to say so too.
        with self._lock, suppress(ssl.SSLWantReadError):
            self._connection.unwrap()

    def break_off(self) -> None:
        with suppress(OSError):
            socket.socket.shutdown(self._connection, socket.SHUT_RDWR)


def make_certificates(folder: Path) -> None:
    """Make `server/cert.pem` and `key.pem` for 127.0.0.1, and `client/ca.pem`, `cert.pem` and `key.pem`."""
    for name in ("ca", "server", "client"):
        (folder / name).mkdir(parents=True)
    new: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
    ]
    new += ["-days", "2"]
    ca_key, ca = folder / "ca" / "key.pem", folder / "client" / "ca.pem"
    extensions = ["-addext", "keyUsage=critical,keyCertSign"]
    _run([*new, "-subj", "/CN=tests", *extensions, "-keyout", ca_key, "-out", ca])
    for name, usage in (("server", "serverAuth"), ("client", "clientAuth")):
        key, certificate = folder / name / "key.pem", folder / name / "cert.pem"
        issue = [*new, "-subj", f"/CN={name}", "-CA", ca, "-CAkey", ca_key, "-keyout", key, "-out", certificate]
        issue += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost", "-addext", f"extendedKeyUsage={usage}"]
        _run([*issue, "-addext", "basicConstraints=critical,CA:FALSE"])


def _run(command: list[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
