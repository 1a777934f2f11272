"""Whole nodes in one loop, but for processes and models: gossip, links, listener and app are real, on 127.0.0.1.

Started and stopped as ``mesh.app`` does it. News that is not urgent takes an hour here unless a test says otherwise, so
what arrives sooner was told at once.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mesh.api.dataplane import DataPlane
from mesh.api.server import build_app
from mesh.config.profile import Profile
from mesh.core.node_state import PeerKey
from mesh.engine.memory_report import Fit, ModelFit
from mesh.member import MeshMember
from mesh.net.listener import Listener
from mesh.net.peer import Peer
from tests.api.node import Node

AN_HOUR_S = 3600.0
_PATIENCE_S = 30.0


async def until(condition: Callable[[], object]) -> None:
    """Wait until *condition* holds: of what several nodes do together, nobody is told."""
    async with asyncio.timeout(_PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class MemberNode:
    """One node. It listens from the beginning, so that others can be told where, and is in the mesh once started."""

    member: MeshMember

    def __init__(self, name: str, directory: Path, *profiles: Profile) -> None:
        self.name = name
        self.directory = directory
        self.profiles = profiles
        self.plane: DataPlane
        self.running = False
        self.listener = Listener(
            "127.0.0.1",
            0,
            lambda: self.plane.protocol(),
            detect_timeout_s=5.0,
            noise=lambda: self.member.accept(),
        )

    def make(self, *peers: str, interval_s: float = AN_HOUR_S, noise: dict[str, Any] | None = None) -> None:
        """Make its parts; raise ``ConfigError`` as a node would."""
        cluster = {
            "enabled": True,
            "peers": peers,
            "gossip_interval_seconds": interval_s,
            "discovery": {"mdns": False},
            "noise": {"config_dir": str(self.directory), **(noise or {})},
        }
        metrics = self.directory.with_name(f"{self.name}.json")
        self.node = Node(*self.profiles, cluster=cluster, metrics_path=str(metrics))
        self.ctx = self.node.ctx
        self.ctx.node_id = self.name
        self.supervisor = self.node.supervisor
        self.supervisor.fits = tuple(ModelFit(p.key, p.id, Fit.NOW) for p in self.supervisor.catalog.profiles)
        self.plane = DataPlane(self.ctx, build_app(self.ctx))
        self.member = MeshMember(self.ctx, self.plane)

    async def start(self) -> None:
        await self.member.start(self.listener.host, self.listener.port)
        self.running = True

    def begin_drain(self) -> None:
        """The first half of a stop."""
        self.ctx.draining = True
        self.listener.close_listening()
        self.plane.begin_drain()
        self.member.begin_drain()

    async def stop(self) -> None:
        if not self.running:
            return
        self.running = False
        self.begin_drain()
        await self.listener.close()
        await self.plane.close(5.0)
        await self.member.close()

    async def kill(self) -> None:
        """End it without a word, as a crash does."""
        self.running = False
        await self.listener.close()
        for task in self.member._tasks:
            task.cancel()
        await asyncio.gather(*self.member._tasks, return_exceptions=True)
        await self.member._links.close()  # cuts them
        await self.plane.close()
        self.member._gossip._core.leave()  # nobody hears of that
        await self.member.close()

    # --- looking

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.listener.port}"

    @property
    def key(self) -> PeerKey:
        return self.member._identity.key

    @property
    def known_peers(self) -> Path:
        return self.directory / "known_peers"

    def peer(self, other: MemberNode) -> Peer | None:
        return self.member.peers.get(other.key)

    def sees(self, other: MemberNode) -> Peer:
        peer = self.peer(other)
        assert peer is not None, f"{self.name} does not know {other.name}"
        return peer

    def links_with(self, other: MemberNode) -> int:
        return sum(link.peer.key == other.key for link in self.member._links.links)


def know_each_other(*nodes: MemberNode) -> bool:
    """Whether each has exactly the others as live peers."""
    return all(
        {peer.key for peer in one.member.peers if peer.status == "alive"} == {n.key for n in nodes} - {one.key}
        for one in nodes
    )


class Nodes:
    """Makes nodes in one directory, and stops them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.made: list[MemberNode] = []

    async def listening(self, name: str, *profiles: Profile, directory: str | None = None) -> MemberNode:
        """Return a node that listens and does nothing else yet."""
        node = MemberNode(name, self._directory / (directory or name), *profiles)
        await node.listener.start()
        self.made.append(node)
        return node

    async def started(self, name: str, *profiles: Profile, peers: Sequence[MemberNode] = (), **options: Any
                      ) -> MemberNode:  # fmt: skip
        """Return a node that is in the mesh with *peers*, or soon will be."""
        node = await self.listening(name, *profiles, directory=options.pop("directory", None))
        node.make(*(peer.address for peer in peers), **options)
        await node.start()
        return node

    async def met(self, *names: str, profiles: dict[str, Sequence[Profile]] | None = None, **options: Any
                  ) -> list[MemberNode]:  # fmt: skip
        """Return nodes that have each other in ``cluster.peers``, and have met."""
        nodes = [await self.listening(name, *(profiles or {}).get(name, ())) for name in names]
        for node in nodes:
            node.make(*(other.address for other in nodes if other is not node), **options)
        for node in nodes:
            await node.start()
        await until(lambda: know_each_other(*nodes))
        return nodes

    async def close(self) -> None:
        for node in self.made:
            await node.stop()
            await node.listener.close()


@asynccontextmanager
async def nodes_in(directory: Path) -> AsyncIterator[Nodes]:
    """Stop all nodes at the end, and make sure that nothing of them stays (trap 63)."""
    before = asyncio.all_tasks()
    nodes = Nodes(directory)
    try:
        yield nodes
    finally:
        await nodes.close()
    assert not [timer for timer in timers() if "MeshMember" in timer]
    for node in nodes.made:
        if hasattr(node, "member"):
            assert not node.member._links.links
            assert not node.member._links.half_open
            assert node.member._sync_timer is None
    before |= {task for task in (asyncio.current_task(),) if task is not None}  # a fixture's end is another task
    await until(lambda: not asyncio.all_tasks() - before)
    await until(lambda: not timers())
    gc.collect()  # what was forgotten is complained about here, not in somebody else's test


def timers() -> list[str]:
    """Return what the loop will still call, as far as it can be asked (uvloop cannot).

    Limits of ``asyncio.timeout`` are the matter of the tasks that have them.
    """
    scheduled = [handle for handle in getattr(asyncio.get_running_loop(), "_scheduled", []) if not handle.cancelled()]
    return [repr(h) for h in scheduled if not isinstance(getattr(h._callback, "__self__", None), asyncio.Timeout)]
