"""All links of this node: takes those that others begin, begins those to others, and watches over both.

Owns the set of live links and of handshakes under way, so that nothing is left when it is closed (trap 63), and the one
timer that looks after silence. A handshake costs about 0.45 ms of CPU here, which anybody who can reach the port could
make us spend; so each source has a rate, all of them together a number of handshakes that may be under way, and each
handshake 5 s. Loopback, and where a peer has come from before, have a generous rate: a burst of requests to a node is a
burst of links. Knows no HTTP and decides nothing about trust.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from mesh.config.address import join_address
from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import LinkError
from mesh.logs import Log
from mesh.net.link import Link
from mesh.net.link_dial import address_text, connect, why
from mesh.net.link_handshake import LinkHandshake
from mesh.net.link_log import FailureLog
from mesh.net.noise import Session
from mesh.net.noise_hello import Binding, SelfDialError, Signer, encode_hello, verify_hello
from mesh.net.noise_records import Control
from mesh.net.rate_limit import Rate, RateLimiter, is_loopback, source_of

_log = Log(__name__)

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)

_TICK_S = 1.0
_RATE = Rate(per_s=20.0, burst=40)
_KNOWN_RATE = Rate(per_s=1000.0, burst=2000)
_STRANGERS_RATE = Rate(per_s=200.0, burst=400)
_MAX_KNOWN = 4096


class Admission(Protocol):
    """Who is trusted (``mesh.net.trust.Trust``)."""

    def admit(self, key: PeerKey, node_id: str, rotation: bytes | None) -> None: ...


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """For links that others begin."""

    handshake_s: float = 5.0
    half_open: int = 512  #: handshakes of strangers under way at once; more are closed unheard
    half_open_per_source: int = 32
    per_source: Rate = _RATE
    strangers: Rate = _STRANGERS_RATE  #: of all sources together that are not known: one may have many addresses
    known: Rate = _KNOWN_RATE  #: of this machine, and of sources from which somebody with the token has come


class Links:
    """See the module. Of one event loop."""

    def __init__(
        self,
        *,
        identity: Signer,
        psk: bytes,
        trust: Admission,
        node_id: str,
        version: str,
        serve: Callable[[], asyncio.Protocol],
        check_version: Callable[[PeerIdentity], None] = lambda peer: None,
        limits: LinkLimits = LinkLimits(),
    ) -> None:
        """*serve* makes the protocol of each accepted link. *check_version* may raise ``LinkError``."""
        self.identity = identity
        self.trust = trust
        self.node_id = node_id
        self.version = version
        self.serve = serve
        self.check_version = check_version
        self.limits = limits
        self._psk = psk
        self._links: set[Link] = set()
        self._handshakes: set[LinkHandshake] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self._empty.set()
        self.failures = FailureLog()
        self._accepting = _Accepting(self)
        self.closed = False

    @property
    def links(self) -> frozenset[Link]:
        """Those that are open, or closing with something left to send."""
        return frozenset(self._links)

    def accept(self) -> asyncio.Protocol:
        """Return what takes a TCP connection that begins a link: ``Listener(noise=links.accept)``."""
        return LinkHandshake(self._accepting, self.limits.handshake_s)

    async def dial(
        self,
        host: str,
        port: int,
        factory: Callable[[], ProtocolT],
        *,
        timeout_s: float,
        expect: PeerKey | None = None,
    ) -> tuple[Link, ProtocolT]:
        """Return a new link to *host* and its protocol, made by *factory*, once the other end is proven and trusted.

        Raise ``LinkError``: ``UntrustedPeerError`` if it is not trusted, ``SelfDialError`` if it is this node. With
        *expect*, whoever has another key is refused. *timeout_s* is for all of it. If this is cancelled, nothing stays.
        """
        where = join_address(host, port)
        if self.closed:
            raise LinkError(f"{where}: this node is stopping")
        dialing = _Dialing(self, factory, expect)
        handshake = LinkHandshake(dialing, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                tcp = await connect(host, port)
                tcp.set_protocol(handshake)  # nothing has come: the other side does not speak first
                handshake.connection_made(tcp)
                return await dialing.wait()
        except LinkError as error:
            raise type(error)(f"{where}: {error.message}") from error
        except TimeoutError as error:
            what = "cannot be reached" if handshake.tcp is None else "accepts but does not speak"
            raise LinkError(f"{where}: {what}, gave up after {timeout_s:g} s") from error
        except OSError as error:
            raise LinkError(f"{where}: cannot be reached: {why(error)}") from error
        finally:
            dialing.leave(handshake)

    def drop(self, key: PeerKey) -> int:
        """Abort every link with *key*, which is not trusted any more. Return how many there were."""
        dropped = [link for link in self._links if link.peer.key == key]
        for link in dropped:
            link.fail("this node does not trust its key any more")
        return len(dropped)

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Begin and accept no more, and end all there are. Idempotent.

        With *grace_s*, links get a goodbye and so long to send what they have; without, they end as if cut, which is
        what a peer has to see whose answer is not complete.
        """
        self.closed = True
        for handshake in tuple(self._handshakes):
            handshake.abort(LinkError("this node is stopping"))
        if grace_s > 0:
            for link in tuple(self._links):
                link.close()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._empty.wait()
        for link in tuple(self._links):
            link.fail("this node is stopping")
        await self._empty.wait()

    # --- what the handshakes need

    def session(self, handshake: LinkHandshake, *, initiator: bool, expect: PeerKey | None) -> Session:
        """Register *handshake* and return its session."""
        if self.closed:
            raise LinkError("this node is stopping")
        session = Session(
            initiator=initiator,
            psk=self._psk,
            static_private=self.identity.noise_private,
            hellos=_Hellos(self, expect),
        )
        self._handshakes.add(handshake)
        self._empty.clear()
        return session

    @property
    def half_open(self) -> int:
        return len(self._handshakes)

    def establish(
        self,
        handshake: LinkHandshake,
        session: Session,
        factory: Callable[[], ProtocolT],
        arrived: list[bytes | Control],
    ) -> tuple[Link, ProtocolT]:
        """Make the link that *handshake* has become, and the protocol on it."""
        assert handshake.tcp is not None
        link = Link(handshake.tcp, session, handshake.address, self._lost)
        self._links.add(link)
        self.forget(handshake)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        protocol = factory()  # if this or the next fails, the loop closes the connection, and so the link is lost
        link.start(protocol, arrived)
        return link, protocol

    def forget(self, handshake: LinkHandshake) -> None:
        self._handshakes.discard(handshake)
        self._note_if_empty()

    # --- watching

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        self._note_if_empty()

    def _note_if_empty(self) -> None:
        if self._links or self._handshakes:
            return
        self._empty.set()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        for link in tuple(self._links):
            link.tick()


class _Hellos:
    """This node's part in a session: it says who it is, and judges who the other is."""

    __slots__ = ("_expect", "_links")

    def __init__(self, links: Links, expect: PeerKey | None) -> None:
        self._links = links
        self._expect = expect

    def make(self, binding: Binding) -> bytes:
        return encode_hello(self._links.identity, self._links.node_id, self._links.version, binding)

    def check(self, content: bytes, binding: Binding) -> PeerIdentity:
        """Trust comes last: it may remember whom it sees, and should only see who is good in every other way."""
        links = self._links
        peer, rotation = verify_hello(content, binding)
        if peer.key == links.identity.key:
            raise SelfDialError(f"'{peer.node_id}' is the node itself, or one with a copy of its key")
        if self._expect is not None and peer.key != self._expect:
            raise LinkError(f"another node answers there: '{peer.node_id}', with another key")
        links.check_version(peer)
        links.trust.admit(peer.key, peer.node_id, rotation)
        return peer


class _Accepting:
    """What becomes of the handshakes that others begin."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._limiter = RateLimiter(links.limits.per_source)
        self._known_limiter = RateLimiter(links.limits.known)
        self._strangers = RateLimiter(links.limits.strangers)
        self._under_way: dict[LinkHandshake, str] = {}  # those of strangers, and their sources
        self._known: dict[str, None] = {}  # sources that a link has come from; the latest last

    def begin(self, handshake: LinkHandshake) -> Session:
        """Let *handshake* begin, or raise ``LinkError``. Strangers cannot crowd out whom this node knows."""
        source, now = source_of(handshake.host), asyncio.get_running_loop().time()
        if source in self._known or is_loopback(source):
            if not self._known_limiter.allow(source, now):
                raise LinkError("too many handshakes from there")
            return self._links.session(handshake, initiator=False, expect=None)
        limits, from_there = self._links.limits, sum(s == source for s in self._under_way.values())
        if len(self._under_way) >= limits.half_open or from_there >= limits.half_open_per_source:
            raise LinkError("too many handshakes at once")
        if not self._limiter.allow(source, now) or not self._strangers.allow("", now):
            raise LinkError("too many handshakes from there")
        self._under_way[handshake] = source
        return self._links.session(handshake, initiator=False, expect=None)

    def established(self, handshake: LinkHandshake, session: Session, arrived: list[bytes | Control]) -> None:
        source = source_of(handshake.host)
        self._under_way.pop(handshake, None)
        self._known.pop(source, None)
        self._known[source] = None
        if len(self._known) > _MAX_KNOWN:
            del self._known[next(iter(self._known))]
        self._links.failures.worked(source, handshake.address)
        self._links.establish(handshake, session, self._links.serve, arrived)

    def failed(self, handshake: LinkHandshake, error: LinkError) -> None:
        self._under_way.pop(handshake, None)
        self._links.forget(handshake)
        if isinstance(error, SelfDialError) or self._links.closed:
            return  # discovery found this node itself: nobody's fault
        now = asyncio.get_running_loop().time()
        self._links.failures.failed(source_of(handshake.host), handshake.address, error.message, now)


class _Dialing(Generic[ProtocolT]):
    """What becomes of a handshake that this node begins: ``result``, for the one who waits for it."""

    def __init__(self, links: Links, factory: Callable[[], ProtocolT], expect: PeerKey | None) -> None:
        self._links = links
        self._factory = factory
        self._expect = expect
        self._taken = False
        self._own_end = ""
        self.result: asyncio.Future[tuple[Link, ProtocolT]] = asyncio.get_running_loop().create_future()

    def begin(self, handshake: LinkHandshake) -> Session:
        assert handshake.tcp is not None
        self._own_end = address_text(handshake.tcp.get_extra_info("sockname"))
        return self._links.session(handshake, initiator=True, expect=self._expect)

    def established(self, handshake: LinkHandshake, session: Session, arrived: list[bytes | Control]) -> None:
        try:
            link, protocol = self._links.establish(handshake, session, self._factory, arrived)
        except Exception as error:
            if not self.result.done():
                self.result.set_exception(error)
            raise
        if self.result.done():  # cancelled in this very turn
            link.fail("nobody wants it any more")
        else:
            self.result.set_result((link, protocol))

    def failed(self, handshake: LinkHandshake, error: LinkError) -> None:
        self._links.forget(handshake)
        if isinstance(error, SelfDialError):
            self._links.failures.excuse(self._own_end)  # the other end is here, too, and only sees it closed
        if not self.result.done():
            self.result.set_exception(error)

    async def wait(self) -> tuple[Link, ProtocolT]:
        established = await self.result
        self._taken = True
        return established

    def leave(self, handshake: LinkHandshake) -> None:
        """Nobody waits any more: unless the link was taken, nothing of it stays."""
        handshake.abort(LinkError("nobody waits for it any more"))
        result = self.result
        if not result.done():
            result.cancel()
        elif not result.cancelled() and result.exception() is None and not self._taken:
            result.result()[0].fail("nobody wants it any more")
