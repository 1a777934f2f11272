"""TLS: certificates replaced while serving, handshakes that stall, and back-pressure through the record layer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.e2e.harness import Node
from tests.e2e.robustness import Held, assert_at_rest, assert_same_fds, baseline, chat, fake_node, fake_profile, report


def write_certificate(directory: Path, *, days: float = 365, serial: int = 1) -> tuple[Path, Path]:
    """Write a self-signed certificate for 127.0.0.1 and its key, each in one rename."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mesh test")])
    end = datetime.now(UTC) + timedelta(days=days)
    begin = min(datetime.now(UTC) - timedelta(days=1), end - timedelta(days=1))
    names = x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial, begin, end).add_extension(names, False)
    certificate = builder.sign(key, hashes.SHA256())
    cert_path, key_path = directory / "cert.pem", directory / "key.pem"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    directory.mkdir(parents=True, exist_ok=True)
    for path, data in (
        (key_path, key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)),
        (cert_path, certificate.public_bytes(pem)),
    ):
        path.with_suffix(".new").write_bytes(data)
        path.with_suffix(".new").replace(path)
    return cert_path, key_path


@contextmanager
def tls_node(directory: Path, *, faults: dict[str, Any] | None = None, **http: Any) -> Iterator[Node]:
    """Run a node that speaks TLS; its client trusts the certificate of this moment."""
    with new_tls_node(directory, faults=faults, **http) as node:
        yield node
        node._close_client()  # which else, idle, lets the node wait 5 s for the end of its TLS session


def new_tls_node(directory: Path, *, days: float = 365, faults: dict[str, Any] | None = None, **http: Any) -> Node:
    """Return a node that speaks TLS, not started."""
    cert, key = write_certificate(directory, days=days)
    tls = {"enabled": True, "cert_path": str(cert), "key_path": str(key)}
    node = fake_node(directory, {"m": fake_profile(**(faults or {}))}, {"server_tls": tls, "http": http})
    node.url = f"https://127.0.0.1:{node.port}"
    node._client = httpx.Client(base_url=node.url, verify=trusting(cert), timeout=30, trust_env=False)
    return node


def trusting(cert: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(cert))


def anyone() -> ssl.SSLContext:
    """Return a context that accepts every certificate."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def serial_of(sock: ssl.SSLSocket) -> int:
    der = sock.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der).serial_number


def current_serial(node: Node) -> int:
    with socket.create_connection(("127.0.0.1", node.port), 5) as plain, anyone().wrap_socket(plain) as sock:
        return serial_of(sock)


def test_https_serves_all_that_http_does(tmp_path: Path) -> None:
    """A verified connection carries the app, plain and streamed answers; plain HTTP gets a reason."""
    with tls_node(tmp_path) as node:
        assert node.say("m") == "hello from fake.gguf"
        with node.http.stream("POST", "/v1/chat/completions", json={"model": "m", "stream": True}) as response:
            assert response.read().endswith(b"data: [DONE]\n\n")
        assert node.http.get("/readyz").json()["status"] == "ready"
        with node.connection() as raw:
            raw.send(chat("m"))
            status, _, body = raw.answer()
            assert (status, b"https" in body.lower()) == (400, True)
            assert raw.rest() == b""
        with pytest.raises(httpx.ConnectError):
            httpx.get(node.url, trust_env=False)  # nobody vouches for it


def test_a_new_certificate_is_used_for_new_connections(tmp_path: Path) -> None:
    """Running connections keep theirs; a broken file changes nothing and is told once (trap 81)."""
    with tls_node(tmp_path) as node:
        plain = socket.create_connection(("127.0.0.1", node.port), 5)
        with anyone().wrap_socket(plain) as old:
            assert serial_of(old) == 1
            write_certificate(tmp_path, serial=2)
            assert current_serial(node) == 2
            old.sendall(b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n")
            assert old.recv(4096).startswith(b"HTTP/1.1 200")
        (tmp_path / "cert.pem").write_text("not a certificate")
        assert [current_serial(node) for _ in range(5)] == [2] * 5
        assert len(node.wait_log("not reloaded")) == 1
        write_certificate(tmp_path, days=-1, serial=3)
        assert current_serial(node) == 2, "an expired one is not taken either"
        write_certificate(tmp_path, serial=4)
        assert current_serial(node) == 4
        node._close_client()
        node._client = httpx.Client(
            base_url=node.url, verify=trusting(tmp_path / "cert.pem"), timeout=30, trust_env=False
        )
        assert node.say("m")


@pytest.mark.parametrize("damage", ["expired", "missing", "other key", "not PEM"])
def test_a_bad_certificate_at_the_start_is_one_clear_error(tmp_path: Path, damage: str) -> None:
    """Exit 1 and a line that names the key of config.yaml."""
    node = new_tls_node(tmp_path, days=-1 if damage == "expired" else 365)
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    if damage == "missing":
        cert.unlink()
    elif damage == "other key":
        kept = key.read_bytes()
        write_certificate(tmp_path)
        key.write_bytes(kept)
    elif damage == "not PEM":
        cert.write_text("x")
    status, text = node.run_to_end()
    assert status == 1
    assert "server_tls" in text
    assert "Traceback" not in text


def test_tls_clients_that_stall_vanish_or_babble(tmp_path: Path) -> None:
    """Handshakes that stop anywhere end in time and leave nothing; others are served (traps 2, 71)."""
    with tls_node(tmp_path, protocol_detect_timeout_ms=1500) as node:
        node.prewarm("m")
        before = baseline(node)
        hello = _client_hello()
        stalled = [socket.create_connection(("127.0.0.1", node.port), 5) for _ in range(120)]
        for number, sock in enumerate(stalled):
            sock.sendall((hello[: number % 100 + 1], hello, b"\x16\x03\x01\x00\x05hello")[number % 3])
            if number % 4 == 0:
                sock.close()
        assert node.say("m")
        start = time.monotonic()
        for sock in stalled:
            if sock.fileno() >= 0:
                with contextlib.suppress(ConnectionResetError):
                    while sock.recv(65536):
                        pass
                sock.close()
        report(stalled_s=time.monotonic() - start)
        assert time.monotonic() - start < 6
        assert_at_rest(node)
        assert_same_fds(node, before)
        with socket.create_connection(("127.0.0.1", node.port), 5) as sock:  # byte by byte is still TLS
            incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
            session = anyone().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
            with contextlib.suppress(ssl.SSLWantReadError):
                session.do_handshake()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for byte in outgoing.read():
                sock.sendall(bytes([byte]))
                time.sleep(0.002)
            incoming.write(sock.recv(65536))
            with contextlib.suppress(ssl.SSLWantReadError):
                session.do_handshake()
            assert session.version() in ("TLSv1.2", "TLSv1.3")


def _client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        anyone().wrap_bio(incoming, outgoing).do_handshake()
    return outgoing.read()


def test_back_pressure_reaches_through_tls(tmp_path: Path) -> None:
    """The node's memory stays flat below 60 MB that a TLS client does not read; all of it arrives in the end."""
    with tls_node(tmp_path, faults={"reply_bytes": 60 * 10**6}) as node:
        node.prewarm("m")

        async def scenario() -> None:
            before = baseline(node)
            reader, writer = await asyncio.open_connection("127.0.0.1", node.port, ssl=anyone(), limit=2**16)
            writer.write(chat("m"))
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(1.5)
            during = Held.by(node)
            report(before=before, during=during)
            assert during.rss_mib < before.rss_mib + 25
            received = 0
            while received < 60 * 10**6:
                data = await asyncio.wait_for(reader.read(2**18), 5)
                assert data
                received += len(data)
            writer.transport.abort()

        asyncio.run(scenario())
        assert_at_rest(node)
