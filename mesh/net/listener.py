"""The node's one port: accepts, looks at the first bytes of each connection, and gives it to who speaks that.

Each connection is on its own from the moment it is accepted: one that says nothing, or says it byte by byte, holds up
nobody and is closed after ``detect_timeout_s``. The bytes are peeked, never consumed, so the protocol that takes over
sees the connection from its beginning; TLS is begun on the accepted socket itself. Knows no HTTP beyond one refusal.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
from collections.abc import Callable, Sequence

from mesh.core.sniff import Protocol
from mesh.errors import ConfigError
from mesh.logs import Log
from mesh.net.sniffing import Sniffing
from mesh.net.tls import ServerCertificate
from mesh.tasks import spawn

_log = Log(__name__)

_BACKLOG = 2048
_ACCEPTS_PER_WAKE = 64  # then others on the loop have their turn
_ACCEPT_PAUSE_S = 0.5  # when no file descriptor or memory is left
#: An HTTP/2 preface is a request that HTTP/1.1 refuses in words, which is more than closing the connection says.
_PLAIN_HTTP = {Protocol.HTTP1, Protocol.HTTP2}
_FOR_CLIENTS = _PLAIN_HTTP | {Protocol.TLS}
_NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_HAND_OVER_S = 0.1  # for what close finds on its way: a plain connection needs a turn or two of the loop

_TLS_ONLY = b"This port speaks HTTPS only. Use https://, or set server_tls.allow_plain_http.\n"
_LOCAL_ONLY = (
    b'{"error": {"message": "this node serves clients of its own machine only, since nobody said otherwise: set'
    b" listen_addr (0.0.0.0:8080) in its config.yaml, and auth.enabled unless everybody may use it"
    b'", "type": "permission_error", "param": null, "code": null, "source": "mesh"}}\n'
)


def _closing_response(status: bytes, content_type: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    return head % (status, content_type, len(body)) + body


_TLS_ONLY_RESPONSE = _closing_response(b"400 Bad Request", b"text/plain", _TLS_ONLY)
_LOCAL_ONLY_RESPONSE = _closing_response(b"403 Forbidden", b"application/json", _LOCAL_ONLY)


class Listener:
    """Listens on one address (all that a name stands for). ``port`` is known after ``start``."""

    def __init__(
        self,
        host: str,
        port: int,
        http: Callable[[], asyncio.Protocol],
        *,
        detect_timeout_s: float,
        certificate: ServerCertificate | None = None,
        allow_plain_http: bool = False,
        noise: Callable[[], asyncio.Protocol] | None = None,
        http_from_here_only: bool = False,
    ) -> None:
        """*http_from_here_only* refuses clients of other machines, with or without TLS; nodes are let in."""
        self._host = host
        self._wanted_port = port
        self._http = http
        self._noise = noise
        self._certificate = certificate
        self._allow_plain_http = allow_plain_http or certificate is None
        self._detect_timeout_s = detect_timeout_s
        self._http_from_here_only = http_from_here_only
        self._sniffing: set[Sniffing] = set()
        self._starting: set[asyncio.Task[None]] = set()  # connections whose transport is being made
        self._resume_timers: dict[socket.socket, asyncio.TimerHandle] = {}
        self._out_of_room = False
        self.sockets: list[socket.socket] = []

    async def start(self) -> None:
        """Bind and accept from now on; raise ``ConfigError`` if the address cannot be used."""
        self._loop = asyncio.get_running_loop()
        for family, address in await self._addresses():
            self.sockets.append(self._bind(family, address))
        for sock in self.sockets:
            self._loop.add_reader(sock, self._accept, sock)

    async def _addresses(self) -> Sequence[tuple[int, tuple[object, ...]]]:
        try:
            found = await self._loop.getaddrinfo(
                self._host, self._wanted_port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except OSError as error:
            raise ConfigError(f"listen_addr: cannot resolve '{self._host}': {error.strerror or error}") from error
        return list(dict.fromkeys((family, address) for family, _, _, _, address in found))

    def _bind(self, family: int, address: tuple[object, ...]) -> socket.socket:
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:  # [::] means every address, IPv4 too, as on most servers
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            if self.sockets and self._wanted_port == 0:  # a name with several addresses gets one port on all
                address = (address[0], self.port, *address[2:])
            sock.setblocking(False)
            sock.bind(address)
            sock.listen(_BACKLOG)
        except OSError as error:
            sock.close()
            self.close_listening()
            raise ConfigError(self._bind_failure(error)) from error
        return sock

    def _bind_failure(self, error: OSError) -> str:
        where = f"listen_addr: cannot listen on {self._host} port {self._wanted_port}"
        if error.errno == errno.EADDRINUSE:
            return f"{where}: another process uses the port; stop it or choose another port"
        if error.errno == errno.EACCES:
            return f"{where}: not permitted; ports below 1024 need privileges, choose a higher one"
        if error.errno == errno.EADDRNOTAVAIL:
            return f"{where}: this machine has no such address"
        return f"{where}: {error.strerror or error}"

    @property
    def host(self) -> str:
        """The address as it was asked for."""
        return self._host

    @property
    def port(self) -> int:
        port: int = self.sockets[0].getsockname()[1]
        return port

    # --- accepting

    def _accept(self, listening: socket.socket) -> bool:
        """Return whether there may be more to accept."""
        for _ in range(_ACCEPTS_PER_WAKE):
            try:
                sock, _ = listening.accept()
            except BlockingIOError:
                self._out_of_room = (
                    False  # nobody waits any more; a place that comes and goes is no end of the shortage
                )
                return False
            except (InterruptedError, ConnectionAbortedError):
                return False
            except OSError as error:
                if error.errno not in _NO_ROOM:
                    raise
                self._pause(listening, error)
                return False
            self._begin(sock)
        return True

    def _pause(self, listening: socket.socket, error: OSError) -> None:
        """Stop accepting for a moment: the socket stays readable, and asking again at once would spin."""
        if not self._out_of_room:
            self._out_of_room = True
            _log.error("cannot accept connections, trying again", reason=error.strerror, fix="raise ulimit -n")
        self._loop.remove_reader(listening)
        self._resume_timers[listening] = self._loop.call_later(_ACCEPT_PAUSE_S, self._resume, listening)

    def _resume(self, listening: socket.socket) -> None:
        del self._resume_timers[listening]
        self._loop.add_reader(listening, self._accept, listening)

    def _begin(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sniffing = Sniffing(sock, self._loop, self._detect_timeout_s, self._decided)
        self._sniffing.add(sniffing)
        sniffing.look()

    # --- handing over

    def _decided(self, sniffing: Sniffing, protocol: Protocol | None) -> None:
        """*protocol* is None if the connection said nothing that we know, in time."""
        self._sniffing.discard(sniffing)
        sock = sniffing.sock
        if self._http_from_here_only and protocol in _FOR_CLIENTS and not _from_here(sock):
            _refuse(sock, _LOCAL_ONLY_RESPONSE)
        elif protocol is Protocol.TLS and self._certificate is not None:
            self._hand_over(sock, self._http, self._certificate)
        elif protocol in _PLAIN_HTTP and self._allow_plain_http:
            self._hand_over(sock, self._http, None)
        elif protocol in _PLAIN_HTTP:
            _refuse(sock, _TLS_ONLY_RESPONSE)
        elif protocol is Protocol.NOISE and self._noise is not None:
            self._hand_over(sock, self._noise, None)
        else:
            sock.close()

    def _hand_over(
        self, sock: socket.socket, factory: Callable[[], asyncio.Protocol], certificate: ServerCertificate | None
    ) -> None:
        task = spawn(self._connect(sock, factory, certificate), "begin connection")
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _connect(
        self, sock: socket.socket, factory: Callable[[], asyncio.Protocol], certificate: ServerCertificate | None
    ) -> None:
        try:
            if certificate is None:
                await self._loop.connect_accepted_socket(factory, sock)
            else:
                await self._loop.connect_accepted_socket(
                    factory, sock, ssl=certificate.context(), ssl_handshake_timeout=self._detect_timeout_s
                )
        except OSError as error:  # ssl.SSLError and timeouts included: the client's trouble, not ours
            _log.debug("a connection ended in its handshake", reason=str(error))
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise

    # --- the end

    def close_listening(self) -> None:
        """Accept no more; connections that are open go on. Idempotent.

        What the kernel accepted already is taken first: closing the socket would reset it, and it deserves an answer.
        """
        open_sockets = [sock for sock in self.sockets if sock.fileno() >= 0]
        for sock in open_sockets:
            if sock not in self._resume_timers:
                with contextlib.suppress(OSError):
                    for _ in range(_BACKLOG // _ACCEPTS_PER_WAKE):  # clients that keep coming must not hold it up
                        if not self._accept(sock):
                            break
        for timer in self._resume_timers.values():
            timer.cancel()
        self._resume_timers.clear()
        for sock in open_sockets:
            self._loop.remove_reader(sock)
            sock.close()

    async def close(self) -> None:
        """Accept no more, and drop connections that have not been handed over yet. Idempotent."""
        self.close_listening()
        for sniffing in tuple(self._sniffing):
            sniffing.stop()
            sniffing.sock.close()
        self._sniffing.clear()
        if self._starting:
            await asyncio.wait(self._starting, timeout=_HAND_OVER_S)
        for task in tuple(self._starting):
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)


def has_ipv6() -> bool:
    """Whether this machine lets us listen on IPv6, and thereby on both."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as sock:
            sock.bind(("::", 0))
    except OSError:
        return False
    return True


def _from_here(sock: socket.socket) -> bool:
    """Whether the client runs on this machine."""
    try:
        peer, own = sock.getpeername()[0], sock.getsockname()[0]
    except OSError:
        return False
    return bool(peer == own) or ipaddress.ip_address(peer.partition("%")[0].removeprefix("::ffff:")).is_loopback


def _refuse(sock: socket.socket, response: bytes) -> None:
    """Say what is wrong. What was sent is read first: closing over unread bytes would reset the answer away."""
    with contextlib.suppress(OSError):
        sock.recv(65536)
        sock.send(response)
        sock.shutdown(socket.SHUT_WR)
    sock.close()
