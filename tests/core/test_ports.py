"""Free ports: found in turn, each given once."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from fray import ports
from fray.errors import PlatformError
from fray.ports import free_ports, is_free


def test_nobody_is_given_what_another_was() -> None:
    with ThreadPoolExecutor(8) as pool:
        given = [port for each in pool.map(free_ports, [25] * 8) for port in each]
    assert len(set(given)) == 200
    assert all(20_000 <= port < 32_000 for port in given)


@pytest.mark.parametrize("is_held", [False, True], ids=["at rest", "while another thread chooses"])
def test_a_forked_process_has_an_order_of_its_own(is_held: bool) -> None:
    program = f"""
import os, threading
from fray import ports
ports.free_ports(1)
if {is_held}:
    held = threading.Event()
    threading.Thread(target=lambda: (ports._lock.acquire(), held.set(), threading.Event().wait()), daemon=True).start()
    held.wait()
if os.fork() == 0:
    print(*ports.free_ports(20), flush=True)
    os._exit(0)
os.wait()
if {is_held}:
    ports._lock.release()
print(*ports.free_ports(20))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    child, parent = (line.split() for line in done.stdout.splitlines())
    assert len(child) == len(parent) == 20
    assert child != parent


def test_a_program_that_seeds_its_random_numbers_keeps_them() -> None:
    random.seed(5)
    numbers = [random.random(), random.random()]
    random.seed(5)
    ports._begin_anew()
    free_ports(1)
    assert [random.random(), random.random()] == numbers


@pytest.mark.parametrize("address", ["127.0.0.1", ""], ids=["loopback", "all addresses"])
def test_a_port_at_which_something_listens_is_not_free(address: str) -> None:
    with socket.create_server((address, 0)) as taken:
        assert not is_free(taken.getsockname()[1])


def test_a_machine_without_free_ports_is_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(PlatformError, match="no 2 free ports between 20000 and 31999"):
        free_ports(2)
    monkeypatch.setattr(ports, "is_free", lambda port: True)
    assert sorted(free_ports(12_000)) == list(range(20_000, 32_000))
    with pytest.raises(PlatformError):
        free_ports(12_001)
