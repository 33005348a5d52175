"""Free ports: found in turn, each given once."""

from __future__ import annotations

import os
import socket
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


def test_a_child_process_has_an_order_of_its_own() -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, repr(free_ports(20)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with open(reading) as said:
        assert said.read() != repr(free_ports(20))


@pytest.mark.parametrize("address", ["127.0.0.1", ""], ids=["loopback", "all addresses"])
def test_a_port_at_which_something_listens_is_not_free(address: str) -> None:
    with socket.create_server((address, 0)) as taken:
        assert not is_free(taken.getsockname()[1])


def test_a_machine_without_free_ports_is_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "is_free", lambda port: False)
    with pytest.raises(PlatformError, match="no 2 free ports between 20000 and 31999"):
        free_ports(2)
