"""Reserving ports for children."""

from __future__ import annotations

import socket
from collections.abc import Set

import pytest

from mesh.errors import CapacityError, ConfigError
from mesh.host.ports import COOL_DOWN_S, DEFAULT_PORTS, PortAllocator, is_free


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def allocator(configured: list[int] | None, clock: Clock | None = None, taken: Set[int] = frozenset()) -> PortAllocator:
    return PortAllocator(configured, is_free=lambda port, reuses: port not in taken, clock=clock or Clock())


def test_configured_ports_in_their_order_skipping_foreign_ones() -> None:
    ports = allocator([9003, 9001, 9002], taken={9001})
    assert [ports.reserve(), ports.reserve()] == [9003, 9002]
    with pytest.raises(CapacityError, match="No available ports"):
        ports.reserve()


def test_a_released_port_rests_before_it_is_used_again() -> None:
    """trap 26"""
    clock = Clock()
    ports = allocator([9001, 9002], clock)
    assert ports.reserve() == 9001
    ports.release(9001)
    assert ports.reserve() == 9002
    ports.release(9002)
    clock.now += COOL_DOWN_S
    assert ports.reserve() == 9001


def test_a_single_configured_port_is_used_again_at_once_rather_than_not_at_all() -> None:
    clock = Clock()
    ports = allocator([9001, 9002], clock)
    for port in (ports.reserve(), ports.reserve()):
        ports.release(port)
        clock.now += 1
    assert ports.reserve() == 9001, "the one that has rested longest"


def test_without_configured_ports_a_resting_one_is_never_reused() -> None:
    ports = allocator(None, taken=set(DEFAULT_PORTS) - {10007})
    assert ports.reserve() == 10007
    ports.release(10007)
    with pytest.raises(CapacityError):
        ports.reserve()


def test_a_port_nobody_listened_on_need_not_rest() -> None:
    """trap 25: a start that failed leaks nothing."""
    ports = allocator(None, taken=set(DEFAULT_PORTS) - {10007})
    ports.release(ports.reserve(), rest=False)
    assert ports.reserve() == 10007


def test_a_fixed_port_is_given_once() -> None:
    ports = allocator([9001], taken={9005})
    assert ports.reserve_fixed(9004) == 9004
    with pytest.raises(CapacityError, match="9004 already in use by another instance"):
        ports.reserve_fixed(9004)
    with pytest.raises(CapacityError, match="9005 already in use by another process"):
        ports.reserve_fixed(9005)
    with pytest.raises(ConfigError, match="1-65535"):
        ports.reserve_fixed(70000)
    ports.release(9004)
    ports.release(9004)
    assert ports.reserve_fixed(9004) == 9004


def test_a_port_with_a_listener_is_not_free_and_one_in_time_wait_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert not is_free(port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            server.close()  # the side that closes first keeps the port in TIME_WAIT
            assert client.recv(1) == b""
    assert is_free(port)
    assert not is_free(port, reuses=False)  # whisper-server could not listen on it


def test_who_cannot_have_a_port_in_time_wait_gets_another_one_if_there_is_one() -> None:
    resting = {9001, 9002}
    free = lambda port, reuses: reuses or port not in resting  # noqa: E731
    ports = PortAllocator([9001, 9002, 9003], is_free=free)
    assert [ports.reserve(reuses=False), ports.reserve(reuses=False), ports.reserve()] == [9003, 9001, 9002]
    with pytest.raises(CapacityError):
        PortAllocator(is_free=lambda port, reuses: reuses).reserve(reuses=False)


def test_a_listener_that_shares_its_port_is_seen() -> None:
    """A second server could join a SO_REUSEPORT listener and steal half of its connections (trap 26)."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not is_free(listener.getsockname()[1])
