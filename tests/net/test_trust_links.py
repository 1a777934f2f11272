"""Keys and trust under real links on loopback: what a revocation and a rotation do to them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from mesh.errors import LinkError
from mesh.net import known_peers
from mesh.net.keys import Identity, psk_of
from mesh.net.link import Link
from mesh.net.links import Links
from mesh.net.trust import Trust

PSK = psk_of(b"0123456789abcdef")
A = Identity.of_seed(b"a" * 32)
A_ROTATED = Identity.of_seed(b"r" * 32, b"a" * 32)
B = Identity.of_seed(b"b" * 32)


class Lost(asyncio.Protocol):
    """Notes that its link is gone."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()


@asynccontextmanager
async def node(identity: Identity, name: str, directory: Path) -> AsyncIterator[tuple[Links, Trust]]:
    trust = Trust(directory / f"known_peers.{name}")
    links = Links(identity=identity, psk=PSK, trust=trust, node_id=name, version="1.0", serve=asyncio.Protocol)
    try:
        yield links, trust
    finally:
        await links.close()
        await trust.close()


@asynccontextmanager
async def listening(links: Links) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(links.accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def dial(links: Links, port: int) -> tuple[Link, Lost]:
    return await links.dial("127.0.0.1", port, Lost, timeout_s=10.0)


async def test_a_revocation_cuts_the_links_there_are_and_lets_in_no_more(tmp_path: Path) -> None:
    async with node(A, "a", tmp_path) as (a, _), node(B, "b", tmp_path) as (b, trust_b), listening(b) as port:
        _, lost = await dial(a, port)
        await trust_b.close()  # what it learnt is in the file now
        known_peers.update(tmp_path / "known_peers.b", partial(known_peers.revoke, key=A.key, today="2026-11-27"))
        assert trust_b.reload() == {A.key}
        assert b.drop(A.key) == 1
        await lost.gone.wait()
        with pytest.raises(LinkError, match="refused this node"):
            await dial(a, port)


async def test_a_node_that_comes_back_with_a_new_key_is_let_in_and_the_old_key_is_not(tmp_path: Path) -> None:
    async with (
        node(B, "b", tmp_path) as (b, trust_b),
        listening(b) as port,
        node(A, "a", tmp_path) as (before, trust_a),
    ):
        _, lost = await dial(before, port)
        await trust_a.close()
        async with node(A_ROTATED, "a", tmp_path) as (after, _):
            await dial(after, port)
            assert trust_b.reload() == {A.key}
            assert b.drop(A.key) == 1
            await lost.gone.wait()
            assert trust_b.known.by_name["a"].key == A_ROTATED.key
            with pytest.raises(LinkError, match="refused this node"):
                await dial(before, port)
            await dial(after, port)
