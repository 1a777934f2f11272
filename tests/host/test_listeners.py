"""Who listens on a port, which SO_REUSEPORT lets several do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mesh.host.listeners import holders, is_crowded, other_sockets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

JOIN = """
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind((sys.argv[2], int(sys.argv[1])))
s.listen()
print("listening", flush=True)
sys.stdin.read()
"""


@contextmanager
def another(port: int, address: str = "127.0.0.1") -> Iterator[int]:
    command = [sys.executable, "-I", "-S", "-c", JOIN, str(port), address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"listening\n"
        yield process.pid
        process.stdin.close()


def listening(address: str = "127.0.0.1") -> socket.socket:
    own = socket.socket()
    own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    own.bind((address, 0))
    own.listen()
    return own


def test_another_on_the_same_port_is_seen() -> None:
    with listening() as own:
        port = own.getsockname()[1]
        assert not other_sockets(port, [os.getpid()])
        assert other_sockets(port, [])
        assert not is_crowded(port)
        with another(port) as pid:
            assert is_crowded(port)
            assert holders(other_sockets(port, [os.getpid()])) == (pid,)
            assert holders(other_sockets(port, [pid])) == (os.getpid(),)
            assert other_sockets(port, [os.getpid()])
            assert other_sockets(port, [pid])
            assert not other_sockets(port, [pid, os.getpid()])


@pytest.mark.parametrize(
    ("own_address", "address", "shared"),
    [
        ("127.0.0.1", "127.0.0.2", False),
        ("127.0.0.1", "0.0.0.0", False),
        ("0.0.0.0", "0.0.0.0", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.2", False),
    ],
)
def test_only_what_can_get_the_same_connections_counts(own_address: str, address: str, shared: bool) -> None:
    """As the kernel delivers them: asked for by connecting."""
    with listening(own_address) as own, another(port := own.getsockname()[1], address):
        assert bool(other_sockets(port, [os.getpid()])) is shared
        own.setblocking(False)
        reached = 0
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port)):
                try:
                    own.accept()[0].close()
                    reached += 1
                except BlockingIOError:
                    pass
        assert (reached < 20) is shared


def test_addresses_of_both_families_are_read(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    line = " 0: {} 0:0 0A 0:0 0:0 0 0 0 {}\n"
    mapped = "0000000000000000FFFF00000100007F:1F90" if sys.byteorder == "little" else "0" * 20 + "FFFF7F000001:1F90"
    local = "0100007F:1F90" if sys.byteorder == "little" else "7F000001:1F90"
    (tmp_path / "net/tcp").write_text("head\n" + line.format(local, 7))
    (tmp_path / "net/tcp6").write_text("head\n" + line.format("0" * 32 + ":1F90", 8))
    (tmp_path / "1/fd").mkdir(parents=True)
    (tmp_path / "1/fd/3").symlink_to("socket:[7]")
    assert not other_sockets(8080, [1], tmp_path), "on every address of the other family"
    (tmp_path / "net/tcp6").write_text("head\n" + line.format(mapped, 8))
    assert other_sockets(8080, [1], tmp_path), "an IPv4 address in an IPv6 socket"


def test_on_every_address_is_the_same_port() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as own:
        assert other_sockets(own.getsockname()[1], [])


def test_a_connection_is_no_listener() -> None:
    with listening() as own, socket.create_connection(own.getsockname()) as client:
        assert not other_sockets(client.getsockname()[1], [])


def test_where_nothing_can_be_read_nothing_is_known(tmp_path: Path) -> None:
    assert not other_sockets(1, [], tmp_path)
    assert not is_crowded(1, tmp_path)
    assert holders({"1"}, tmp_path / "none") == ()
