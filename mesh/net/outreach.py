"""Reaching other nodes: gossip, requests and operators' calls go to the first address of a peer that works.

Knows which addresses to try and what the outcome says of a peer; never who is a member or who should serve.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any, Final, TypeVar

import msgspec

from mesh.config.address import split_address
from mesh.core.breaker import Phase
from mesh.core.gossip_message import Message, encode_message
from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError, PeerError, PeerRefusalError
from mesh.logs import Log
from mesh.net.gossip import Target
from mesh.net.link_client import LinkClient
from mesh.net.link_http import Answer
from mesh.net.links import Links
from mesh.net.noise_hello import SelfDialError
from mesh.net.peer import Peer
from mesh.net.peers import Peers

_log = Log(__name__)

ProtocolT = TypeVar("ProtocolT", bound=asyncio.Protocol)
T = TypeVar("T")

DIAL_S: Final = 3.0  #: for one address of a peer
DIAL_ALL_S: Final = 6.0  #: for all of them: a request waits that could be served elsewhere
#: The longest that an operator's call may take, if he sets no limit.
LONGEST_CALL_S: Final = 86_400.0
_SECONDS: Final = re.compile("[0-9]{1,9}")


class Outreach:
    """Of one event loop."""

    def __init__(self, links: Links, client: LinkClient, peers: Peers, now: Callable[[], float]) -> None:
        self._links = links
        self._client = client
        self._peers = peers
        self._now = now

    async def exchange(self, target: Target, body: bytes) -> tuple[PeerIdentity, bytes]:
        """Carry a gossip message and its answer. Also the probe of an open circuit, with no client about (trap 52)."""
        peer = None if target.key is None else self._peers.get(target.key)
        probing = peer is not None and peer.breaker.phase is not Phase.CLOSED
        permit = peer.breaker.allows(self._now()) if peer is not None and probing else None
        try:
            answer = await self._ask(peer, target, body)
            if peer is not None:
                peer.succeeded(permit)
            return answer.peer, answer.body
        except PeerError as failure:
            if peer is not None:
                peer.failed(permit, counts=False)
            if target.key is None and isinstance(failure, SelfDialError):
                return self._myself(failure)
            raise
        finally:
            if peer is not None and permit is not None:
                peer.breaker.dropped(permit)  # which is nothing, but if neither happened

    def _myself(self, failure: SelfDialError) -> tuple[PeerIdentity, bytes]:
        """Answer for this node: a contact led to it, so that gossip knows and does not try it again."""
        _log.info("a contact is not another node", reason=failure.message)
        links = self._links
        return PeerIdentity(links.identity.key, links.node_id, links.version), encode_message(Message())

    async def _ask(self, peer: Peer | None, target: Target, body: bytes) -> Answer:
        async def ask(address: str) -> Answer:
            return await self._client.request(address, "POST", "/cluster/gossip", body, expect=target.key)

        known = target.addresses if peer is None else tuple(dict.fromkeys((*peer.addresses(), *target.addresses)))
        address, answer = await self._first_that_works("it", known, ask)
        found = self._peers.get(answer.peer.key)
        if found is not None:
            found.good_address = address
            found.measured(answer.rtt_s)
        if answer.status != 200:
            raise PeerError(f"{address}: {_message(answer)}")
        return answer

    async def dial(self, peer: Peer, factory: Callable[[], ProtocolT]) -> ProtocolT:
        """Return a connection for a request, by the first of its addresses that works; raise ``PeerError``."""
        give_up_at = self._now() + DIAL_ALL_S

        async def dial(address: str) -> ProtocolT:
            try:
                host, port = split_address(address)
                limit_s = min(DIAL_S, give_up_at - self._now())
                _, connection = await self._links.dial(host, port, factory, timeout_s=limit_s, expect=peer.key)
            except ValueError as error:  # it is the peer that says what its addresses are
                raise LinkError(f"'{address}' {error}") from error
            return connection

        in_time = takewhile(lambda _: self._now() < give_up_at, peer.addresses())
        address, connection = await self._first_that_works(f"node {peer.node_id}", in_time, dial)
        peer.good_address = address
        return connection

    async def call(self, peer: Peer, path: str, body: Mapping[str, Any], *, timeout_s: float | None) -> Any:
        """POST *body* to *peer* and return its JSON. Raise ``PeerRefusalError`` in its words, or ``PeerError``."""
        limit_s = LONGEST_CALL_S if timeout_s is None else timeout_s
        content = msgspec.json.encode(body)

        async def post(address: str) -> Answer:
            return await self._client.request(
                address,
                "POST",
                path,
                content,
                headers=(("Content-Type", "application/json"),),
                expect=peer.key,
                first_byte_s=limit_s,
                total_s=limit_s,
            )

        _, answer = await self._first_that_works(f"node {peer.node_id}", peer.addresses(), post)
        return _json_of(peer.node_id, answer)

    async def _first_that_works(
        self, whose: str, addresses: Iterable[str], attempt: Callable[[str], Awaitable[T]]
    ) -> tuple[str, T]:
        """Return the first of *addresses* at which *attempt* found a link, and its outcome; raise the last error."""
        error: LinkError = LinkError(f"no address of {whose} is known")
        for address in addresses:
            try:
                return address, await attempt(address)
            except LinkError as failure:
                error = failure
        raise error


def _json_of(node_id: str, answer: Answer) -> Any:
    """Return what a node answered; raise its refusal."""
    if answer.status >= 300:
        waits = (value for name, value in answer.headers if name.lower() == "retry-after")
        raise PeerRefusalError(
            f"node {node_id}: {_message(answer)}",
            status=answer.status if answer.status in (400, 403, 404, 408, 409, 502, 503) else 502,
            type=_error_type(answer),
            retry_after_s=next((int(wait) for wait in waits if _SECONDS.fullmatch(wait)), None),
        )
    try:
        return msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PeerError(f"node {node_id} did not answer in JSON") from error


def _error_of(answer: Answer) -> Mapping[str, Any]:
    try:
        error = msgspec.json.decode(answer.body)["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _message(answer: Answer) -> str:
    return str(_error_of(answer).get("message") or f"HTTP {answer.status}")


def _error_type(answer: Answer) -> str:
    return str(_error_of(answer).get("type") or "peer_error")
