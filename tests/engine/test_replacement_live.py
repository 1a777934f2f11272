"""Real processes: the engine is replaced under traffic, and no request is lost (issue item 3, trap 93)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from mesh.config.builds import LlamaCpp
from mesh.config.profile import Profile
from mesh.core.budget import BudgetLimits
from mesh.core.resources import Resources
from mesh.engine.locate import Engines
from mesh.engine.runner import Launcher
from mesh.engine.supervisor import Limits, Supervisor
from mesh.metrics import Metrics
from tests.engine.children import faults, make_profile
from tests.engine.supervised import catalog

SERVER = Path(__file__).parents[1] / "fake_llama_server.py"


def build(directory: Path, commit: str) -> Path:
    binary = directory / f"build-{commit}" / "bin" / "llama-server"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {SERVER} "$@"\n')
    binary.chmod(0o755)
    return binary


def install(link: Path, binary: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(binary)
    new.replace(link)


class House:
    """A node without its API: a supervisor over real processes, and clients that ask all the time."""

    def __init__(self, tmp_path: Path, *, vram_mib: int) -> None:
        self.tmp_path, self.link = tmp_path, tmp_path / "llama-server"
        install(self.link, build(tmp_path, "aaaaaaa1"))
        env = faults(tokens_per_s=40, load_s=0.1)
        self.profile = make_profile(
            "-np", "2", max_concurrent=2, env=env, estimate=Resources.of(vram_mib=6), max_wait_s=30
        )
        made = LlamaCpp(binary_path=str(self.link), repo_url="https://example.invalid/llama.cpp")
        self.launcher = Launcher(Engines({"default": made}))
        self.sup = Supervisor(
            catalog=catalog(self.profile),
            launcher=self.launcher,
            limits=Limits(BudgetLimits(None, vram_mib)),
            metrics=Metrics("test"),
        )
        self.served: list[str] = []  #: the engine of each answer

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def ask(self, profile: Profile, http: httpx.AsyncClient) -> None:
        async with self.sup.trial(profile, None) as lease:
            endpoint = lease.endpoint
            url = f"http://{endpoint.host}:{endpoint.port}/v1/chat/completions"
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
            answer = (await http.post(url, json=body)).raise_for_status()
            assert answer.json()["choices"][0]["message"]["content"]
            engines = {i.id: i.engine_version or "" for i in self.sup.instances()}
            self.served.append(engines[endpoint.instance_id])

    @asynccontextmanager
    async def traffic(self) -> AsyncIterator[None]:
        """Four clients that ask one request after the other; each must be answered."""
        over = asyncio.Event()

        async def client() -> None:
            async with httpx.AsyncClient(trust_env=False, timeout=30) as http:
                while not over.is_set():
                    await self.ask(self.profile, http)

        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(client())
            await self.until(lambda: len(self.served) > 4)
            yield
            over.set()

    def versions(self) -> list[str | None]:
        return [i.engine_version for i in self.sup.instances()]


@asynccontextmanager
async def house(tmp_path: Path, vram_mib: int) -> AsyncIterator[House]:
    here = House(tmp_path, vram_mib=vram_mib)
    try:
        yield here
    finally:
        await here.sup.close(5)
        await here.launcher.close()


@pytest.mark.parametrize("vram_mib", [14, 10], ids=["room for both", "no room for both"])
async def test_no_request_is_lost_while_the_engine_is_replaced(tmp_path: Path, vram_mib: int) -> None:
    async with house(tmp_path, vram_mib) as node, node.traffic():
        most = 1
        install(node.link, build(tmp_path, "bbbbbbb2"))
        node.sup.engines_changed()

        def replaced() -> bool:
            nonlocal most
            most = max(most, len(node.versions()))
            return node.versions() == ["bbbbbbb2"] and node.served[-1] == "bbbbbbb2"

        await node.until(replaced)
        assert most == vram_mib // 6
    assert {"aaaaaaa1", "bbbbbbb2"} == set(node.served)
    switched = node.served.index("bbbbbbb2")
    assert node.served[switched:].count("aaaaaaa1") <= 2  # its two slots were still answering


async def test_a_binary_replaced_in_place_is_noticed_and_the_same_one_is_not(tmp_path: Path) -> None:
    async with house(tmp_path, 10) as node, httpx.AsyncClient(trust_env=False) as http:
        await node.ask(node.profile, http)
        (before,) = node.sup.instances()
        node.sup.engines_changed()
        install(node.link, Path(before.engine_path))  # the same again
        node.sup.engines_changed()
        assert [(i.pid, i.superseded) for i in node.sup.instances()] == [(before.pid, False)]
        os.utime(before.engine_path, (1, 1))
        node.sup.engines_changed()
        await node.until(lambda: before.pid not in {i.pid for i in node.sup.instances()})
        await node.ask(node.profile, http)


@pytest.mark.parametrize("vram_mib", [14, 10], ids=["room for both", "no room for both"])
async def test_a_new_binary_that_does_not_start_leaves_the_old_one_in_service(tmp_path: Path, vram_mib: int) -> None:
    """Whether or not both fit: without room it is asked first whether it accepts the arguments."""
    async with house(tmp_path, vram_mib) as node, node.traffic():
        broken = build(tmp_path, "bbbbbbb2")
        broken.write_text('#!/bin/sh\necho "error: invalid argument: -np" >&2\nexit 1\n')
        install(node.link, broken)
        node.sup.engines_changed()
        await node.until(lambda: bool(node.sup.failures()))
        number = len(node.served)
        await node.until(lambda: len(node.served) > number + 4)
        assert set(node.served) == {"aaaaaaa1"}


async def test_a_binary_that_is_gone_for_a_moment_stops_nothing(tmp_path: Path) -> None:
    """The default build falls back on the embedded engine; that is good for a start only."""
    async with house(tmp_path, 10) as node, httpx.AsyncClient(trust_env=False) as http:
        await node.ask(node.profile, http)
        node.link.unlink()
        assert node.launcher.engine(node.profile).source == "embedded"
        node.sup.engines_changed()
        for _ in range(3):
            await node.sup.look_at_engines()
        assert [i.superseded for i in node.sup.instances()] == [False]


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"#!/bin/sh\nexit 127\n", b"#!/bin/sh\nkill -SEGV $$\n"])
async def test_what_cannot_run_at_all_is_nobodys_successor(tmp_path: Path, content: bytes) -> None:
    """And where both do not fit, it is found out before the old one stops."""
    async with house(tmp_path, 10) as node, httpx.AsyncClient(trust_env=False) as http:
        await node.ask(node.profile, http)
        broken = build(tmp_path, "bbbbbbb2")
        broken.write_bytes(content)
        install(node.link, broken)
        node.sup.engines_changed()
        await node.until(lambda: bool(node.sup.failures()))
        await node.ask(node.profile, http)
    assert set(node.served) == {"aaaaaaa1"}
