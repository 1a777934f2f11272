"""The one port: what each first byte leads to, slow and silent clients, TLS, full tables, addresses."""

from __future__ import annotations

import asyncio
import errno
import json
import select
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest

from mesh.errors import ConfigError
from mesh.net import listener as listener_module
from mesh.net.listener import Listener
from mesh.net.tls import ServerCertificate
from tests.net.certificates import write_certificate

REQUEST = b"GET / HTTP/1.1\r\nHost: n\r\n\r\n"


class Echo(asyncio.Protocol):
    """Answers with everything that it got, so that a byte lost in sniffing shows."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@asynccontextmanager
async def listening(host: str = "127.0.0.1", **options: Any) -> AsyncIterator[Listener]:
    options = {"detect_timeout_s": 5.0} | options
    listener = Listener(host, options.pop("port", 0), Echo, **options)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.close()
        await asyncio.sleep(0.01)


@asynccontextmanager
async def connected(
    listener: Listener, host: str = "127.0.0.1", **options: Any
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(host, listener.port, **options)
    try:
        async with asyncio.timeout(5):
            yield reader, writer
    finally:
        writer.transport.abort()
        with suppress(OSError):
            await writer.wait_closed()
        await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  # conditions of code that signals nobody
            await asyncio.sleep(0.001)


async def test_http_whole_and_byte_by_byte() -> None:
    """No byte is lost or misread however the first ones come (trap 71)."""
    async with listening() as listener:
        async with connected(listener) as (reader, writer):
            writer.write(REQUEST)
            assert await reader.readexactly(len(REQUEST)) == REQUEST
        async with connected(listener) as (reader, writer):
            for i in range(len(REQUEST)):
                writer.write(REQUEST[i : i + 1])
                await asyncio.sleep(0.001)
            assert await reader.readexactly(len(REQUEST)) == REQUEST


@pytest.mark.parametrize("first", [b"\xff\xff", b"get / ", b"\x00\x01", b"\x16\x03\x01\x00"])
async def test_what_nobody_speaks_is_closed(first: bytes) -> None:
    async with listening() as listener, connected(listener) as (reader, writer):
        writer.write(first)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""


@pytest.mark.parametrize("first", [b"", b"P"])
async def test_silence_ends_in_time_and_holds_up_nobody(first: bytes) -> None:
    async with (
        listening(detect_timeout_s=0.1) as listener,
        connected(listener) as (reader, writer),
        connected(listener) as (reader2, writer2),
    ):
        writer.write(first)
        writer2.write(REQUEST)
        assert await reader2.readexactly(len(REQUEST)) == REQUEST
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        assert not listener._sniffing


async def test_clients_that_leave_before_a_word() -> None:
    async with listening() as listener:
        for _ in range(50):
            async with connected(listener):
                pass
        await until(lambda: not listener._sniffing)


@pytest.mark.skipif(not hasattr(select, "POLLRDHUP"), reason="only Linux tells of an end behind unread bytes")
async def test_clients_that_leave_within_a_word() -> None:
    """What they sent stays unread, yet they keep no descriptor for the whole timeout (trap 2)."""
    async with listening(detect_timeout_s=60) as listener:
        for _ in range(50):
            _, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(b"PO")
            writer.close()
            await writer.wait_closed()
        await until(lambda: not listener._sniffing)


async def test_a_half_prefix_does_not_spin() -> None:
    """The unread bytes keep the socket readable; only a timer looks again."""
    async with listening() as listener, connected(listener) as (_, writer):
        writer.write(b"P")
        await until(lambda: len(listener._sniffing) == 1)
        sniffing = next(iter(listener._sniffing))
        looks = 0
        look = sniffing.sock

        class Counting:
            def recv(self, size: int, flags: int) -> bytes:
                nonlocal looks
                looks += 1
                return look.recv(size, flags)

            def __getattr__(self, name: str) -> Any:
                return getattr(look, name)

        sniffing.sock = cast(Any, Counting())
        await asyncio.sleep(0.3)
        assert 1 <= looks <= 12
        sniffing.sock = look


async def test_tls_and_the_refusal_of_plain_http(tmp_path: Path) -> None:
    certificate = ServerCertificate(*write_certificate(tmp_path))
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with listening(certificate=certificate) as listener:
        async with connected(listener, ssl=context, server_hostname="localhost") as (reader, writer):
            writer.write(REQUEST)
            assert await reader.readexactly(len(REQUEST)) == REQUEST
            assert writer.get_extra_info("ssl_object").selected_alpn_protocol() is None
        async with connected(listener) as (reader, writer):
            writer.write(REQUEST)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"HTTPS only" in answer


async def test_tls_and_plain_http_side_by_side(tmp_path: Path) -> None:
    certificate = ServerCertificate(*write_certificate(tmp_path))
    async with listening(certificate=certificate, allow_plain_http=True) as listener:  # noqa: SIM117
        async with connected(listener) as (reader, writer):
            writer.write(REQUEST)
            assert await reader.readexactly(len(REQUEST)) == REQUEST


async def test_the_next_connection_sees_a_renewed_certificate(tmp_path: Path) -> None:
    certificate = ServerCertificate(*write_certificate(tmp_path))
    async with listening(certificate=certificate) as listener:
        for _ in range(2):
            write_certificate(tmp_path)
            context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
            async with connected(listener, ssl=context, server_hostname="localhost") as (reader, writer):
                writer.write(REQUEST)
                assert await reader.readexactly(len(REQUEST)) == REQUEST


async def test_a_handshake_that_stalls_or_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = ServerCertificate(*write_certificate(tmp_path))
    async with listening(certificate=certificate, detect_timeout_s=0.1) as listener:
        for first in (b"\x16\x03\x01\x00\x10", b"\x16\x03\x01\x00\x02hi"):
            async with connected(listener) as (reader, writer):
                writer.write(first)
                with suppress(ConnectionError):
                    await reader.read()
        await until(lambda: not listener._starting)
    assert "failed" not in caplog.text


@pytest.mark.parametrize("host", ["::1", "localhost", "::"])
async def test_ipv6_and_names(host: str) -> None:
    """trap 68; [::] takes IPv4 too."""
    async with listening(host) as listener:
        for target in {"::1": ["::1"], "localhost": ["127.0.0.1"], "::": ["::1", "127.0.0.1"]}[host]:
            async with connected(listener, host=target) as (reader, writer):
                writer.write(REQUEST)
                assert await reader.readexactly(len(REQUEST)) == REQUEST


async def test_addresses_that_cannot_be_used() -> None:
    """trap 28: a second node on the port refuses to start, with the cause and the fix."""
    async with listening() as listener:
        with pytest.raises(ConfigError, match="another process uses the port"):
            await Listener("127.0.0.1", listener.port, Echo, detect_timeout_s=1).start()
    with pytest.raises(ConfigError, match="no such address"):
        await Listener("192.0.2.1", 0, Echo, detect_timeout_s=1).start()
    with pytest.raises(ConfigError, match="cannot resolve"):
        await Listener("no-such-host.invalid", 0, Echo, detect_timeout_s=1).start()


class Full:
    """A listening socket while the table of files is full: accepts end as *answers* says, and then as ever."""

    def __init__(self, sock: socket.socket, answers: str) -> None:
        self.sock = sock
        self.answers = list(answers)  # x: no descriptor is left; o: one is

    def accept(self) -> object:
        if self.answers and self.answers.pop(0) == "x":
            raise OSError(errno.EMFILE, "Too many open files")
        return self.sock.accept()

    def fileno(self) -> int:
        return self.sock.fileno()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sock, name)


def fill(listener: Listener, answers: str) -> Full:
    loop = asyncio.get_running_loop()
    real = listener.sockets[0]
    full = Full(real, answers)
    loop.remove_reader(real)
    listener.sockets[0] = cast(Any, full)
    loop.add_reader(full.fileno(), listener._accept, cast(Any, full))
    return full


async def test_no_file_descriptor_left(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Accepting pauses instead of spinning, says so once, and goes on by itself."""
    monkeypatch.setattr("mesh.net.listener._ACCEPT_PAUSE_S", 0.02)
    async with listening() as listener:
        full = fill(listener, "xxx")
        began = asyncio.get_running_loop().time()
        async with connected(listener) as (reader, writer):
            writer.write(REQUEST)
            assert await reader.readexactly(len(REQUEST)) == REQUEST
        assert not full.answers
        assert asyncio.get_running_loop().time() - began > 3 * 0.02
        assert caplog.text.count("cannot accept connections") == 1


async def test_a_shortage_ends_when_nobody_waits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A descriptor that comes free and is gone with the next client is the same shortage: one line in the log."""
    monkeypatch.setattr("mesh.net.listener._ACCEPT_PAUSE_S", 0.02)

    async def two_clients(listener: Listener) -> None:
        async with connected(listener) as first, connected(listener) as second:
            for reader, writer in (first, second):
                writer.write(REQUEST)
                assert await reader.readexactly(len(REQUEST)) == REQUEST

    async with listening() as listener:
        full = fill(listener, "xxoxx")
        await two_clients(listener)
        assert not full.answers
        assert caplog.text.count("cannot accept connections") == 1
        full.answers = list("x")
        await two_clients(listener)
        assert caplog.text.count("cannot accept connections") == 2


async def test_closing_leaves_nothing_behind() -> None:
    """Not handed over yet: dropped. Handed over: goes on."""
    listener = Listener("127.0.0.1", 0, Echo, detect_timeout_s=5)
    await listener.start()
    async with connected(listener) as (reader, writer), connected(listener) as (silent, _):
        writer.write(REQUEST)
        assert await reader.readexactly(len(REQUEST)) == REQUEST
        await until(lambda: len(listener._sniffing) == 1)
        await listener.close()
        await listener.close()
        with suppress(ConnectionResetError):
            assert await silent.read() == b""
        writer.write(b"more")
        assert await reader.readexactly(4) == b"more"


async def test_a_connection_that_the_kernel_accepted_before_the_close_gets_its_answer() -> None:
    """Closing the listening socket would reset what still waits in its backlog."""
    async with listening() as listener:
        with socket.create_connection(("127.0.0.1", listener.port), timeout=5) as client:
            client.sendall(REQUEST)
            listener.close_listening()  # the loop has not had a turn since the client connected
            client.setblocking(False)
            answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1000), 5)
            assert answer == REQUEST


async def test_all_that_the_kernel_accepted_before_the_close_get_their_answer() -> None:
    """More than are accepted at once, and even when everything else is closed right after."""
    async with listening() as listener:
        clients = [socket.create_connection(("127.0.0.1", listener.port), timeout=5) for _ in range(150)]
        try:
            for client in clients:
                client.sendall(REQUEST)
                client.setblocking(False)
            await listener.close()
            for client in clients:
                answer = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 1000), 5)
                assert answer == REQUEST
        finally:
            for client in clients:
                client.close()


async def test_an_empty_line_before_the_first_request() -> None:
    async with listening() as listener, connected(listener) as (reader, writer):
        writer.write(b"\r\n" + REQUEST)
        assert await reader.readexactly(len(REQUEST) + 2) == b"\r\n" + REQUEST


# --- clients of this machine only

NOISE = b"\x00\x30" + bytes(48)


def _own_address() -> str | None:
    """Return an address of this machine that is not loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        address: str = probe.getsockname()[0]
        return None if address.startswith(("127.", "0.")) else address
    return None


@pytest.fixture
def _from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second machine is at hand: every client is taken for one of it."""
    monkeypatch.setattr(listener_module, "_from_here", lambda sock: False)


@pytest.mark.usefixtures("_from_elsewhere")
@pytest.mark.parametrize(
    "first", [REQUEST, b"POST /v1/chat/completions HTTP/1.1\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
)
async def test_clients_of_other_machines_are_told_why_they_are_refused(first: bytes) -> None:
    """Nobody chose to serve them: the node listens for other nodes only."""
    async with (
        listening("0.0.0.0", http_from_here_only=True, noise=Echo) as listener,
        connected(listener) as (reader, writer),
    ):
        writer.write(first)
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    error = json.loads(body)["error"]
    assert error["type"] == "permission_error"
    assert "listen_addr" in error["message"]


@pytest.mark.usefixtures("_from_elsewhere")
async def test_nodes_of_other_machines_are_let_in() -> None:
    async with (
        listening("0.0.0.0", http_from_here_only=True, noise=Echo) as listener,
        connected(listener) as (reader, writer),
    ):
        writer.write(NOISE)
        assert await reader.readexactly(len(NOISE)) == NOISE


@pytest.mark.usefixtures("_from_elsewhere")
async def test_tls_does_not_make_a_client_of_another_machine_welcome(tmp_path: Path) -> None:
    """It is refused before the handshake: there is no certificate for it to see."""
    certificate = ServerCertificate(*write_certificate(tmp_path))
    context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    async with listening(http_from_here_only=True, certificate=certificate) as listener:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection("127.0.0.1", listener.port, ssl=context, server_hostname="localhost")


@pytest.mark.usefixtures("_from_elsewhere")
async def test_without_the_switch_everybody_is_served() -> None:
    async with listening() as listener, connected(listener) as (reader, writer):
        writer.write(REQUEST)
        assert await reader.readexactly(len(REQUEST)) == REQUEST


@pytest.mark.parametrize(
    ("host", "target"), [("0.0.0.0", "127.0.0.1"), ("::", "127.0.0.1"), ("::", "::1"), ("0.0.0.0", "own")]
)
async def test_clients_of_this_machine_are_served_whatever_address_they_use(host: str, target: str) -> None:
    """trap 68: [::] sees IPv4 clients as ::ffff:127.0.0.1."""
    address = _own_address() if target == "own" else target
    if address is None:
        pytest.skip("this machine has no address but loopback")
    async with (
        listening(host, http_from_here_only=True, noise=Echo) as listener,
        connected(listener, host=address) as (reader, writer),
    ):
        writer.write(REQUEST)
        assert await reader.readexactly(len(REQUEST)) == REQUEST


class _Between:
    """A connection between two addresses."""

    def __init__(self, peer: str | None, own: str) -> None:
        self._peer, self._own = peer, own

    def getpeername(self) -> tuple[object, ...]:
        if self._peer is None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        return self._peer, 40000

    def getsockname(self) -> tuple[object, ...]:
        return self._own, 8080


@pytest.mark.parametrize(
    ("peer", "own", "here"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.8.8.8", "127.0.0.1", True),
        ("::1", "::1", True),
        ("::ffff:127.0.0.1", "::ffff:127.0.0.1", True),
        ("::ffff:127.0.0.2", "::ffff:127.0.0.1", True),
        ("192.0.2.7", "192.0.2.7", True),
        ("fe80::1%eth0", "fe80::1%eth0", True),
        ("192.0.2.7", "192.0.2.8", False),
        ("::ffff:192.0.2.7", "::ffff:192.0.2.8", False),
        ("2001:db8::1", "2001:db8::2", False),
        ("fe80::1%eth0", "fe80::2%eth0", False),
        ("10.0.0.1", "127.0.0.1", False),
        (None, "127.0.0.1", False),
    ],
)
def test_who_is_on_this_machine(peer: str | None, own: str, here: bool) -> None:
    assert listener_module._from_here(cast(Any, _Between(peer, own))) is here
