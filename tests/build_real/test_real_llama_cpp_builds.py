"""llama.cpp itself: built by a node that serves meanwhile, tested, installed; and commits that do not compile.

The first run compiles for minutes (``make test-build``); later ones find the finished build in the cache.
"""

from __future__ import annotations

import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import real_llama_cpp
from tests.build_project import commit_all, git
from tests.e2e import builds
from tests.e2e.builds import build, ended, order, replaced
from tests.e2e.conftest import StartNode
from tests.e2e.harness import Node, cookbook, eventually, profile
from tests.real_llama_cpp import RealLlamaCpp

ARGS = "-c 2048 -np 2 -t 2"
COMPILED_S = 1800.0


def settings(sources: RealLlamaCpp, at: Path, repo_url: str | None = None) -> dict[str, Any]:
    """Return ``llama_cpp:`` of a node that builds in *at*."""
    return {
        "repo_url": repo_url or sources.repo_url,
        "repo_path": str(at / "repo"),
        "build_path": str(at / "build"),
        "binary_path": str(at / "bin" / "llama-server"),
        "branch": "master",
        "build_args": list(sources.build_args),
        "build_command_args": list(sources.build_command_args),
    }


@pytest.fixture(scope="session")
def compiled(real_llama_cpp_sources: RealLlamaCpp, smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build of ours; compiled by a node that goes on serving, if the cache has none."""
    sources = real_llama_cpp_sources
    if not real_llama_cpp.is_warm(os.environ):
        llama_cpp = settings(sources, tmp_path_factory.mktemp("compile")) | {"build_path": str(sources.build_path)}
        text = cookbook({"smollm2": profile(smollm2, ARGS)})
        with Node(tmp_path_factory.mktemp("builder"), text, {"llama_cpp": llama_cpp}) as node:
            with Steps(node) as steps:
                assert node.say("smollm2", text="What is 2+2?")  # the embedded engine's, while the compilers run
                built = partial(eventually, within_s=COMPILED_S, every_s=2, what="llama.cpp is built")
                attempt = built(lambda: build(node)["last"])
            assert attempt["outcome"] == "installed", attempt
            assert steps.seen, "progress was told"
            assert steps.seen[-1]["total"] > 100
            assert steps.seen[-1]["done"] > 0.9 * steps.seen[-1]["total"]
    return sources.build_path


class Steps:
    """What the compiler has done, looked at twice a second from another thread."""

    def __init__(self, node: Node) -> None:
        self.seen: list[dict[str, Any]] = []
        self._url = f"{node.url}/admin/builds"
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Steps:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(10)

    def _follow(self) -> None:
        with httpx.Client(trust_env=False) as client:
            while not self._over.wait(0.5):
                now = client.get(self._url).json()["builds"][0]["current"]
                if now is not None and now["stage"] == "compiling" and now["total"]:
                    self.seen.append(now)


@pytest.fixture
def fork(real_llama_cpp_sources: RealLlamaCpp, tmp_path: Path) -> Path:
    """A repository of our own, to make commits in."""
    path = tmp_path / "fork"
    git(tmp_path, "clone", "--quiet", real_llama_cpp_sources.repo_url, str(path))
    return path


def served_by_it(start_node: StartNode, sources: RealLlamaCpp, smollm2: Path, at: Path, repo_url: str) -> Node:
    """Return a node whose SmolLM2 runs on the finished build."""
    at.mkdir()
    real_llama_cpp.copy_finished(os.environ, at / "build")
    node = start_node(cookbook({"smollm2": profile(smollm2, ARGS)}), {"llama_cpp": settings(sources, at, repo_url)})
    assert ended(node)["outcome"] == "installed", build(node)
    node.prewarm("smollm2")
    return node


def test_what_was_built_serves(
    compiled: Path, start_node: StartNode, real_llama_cpp_sources: RealLlamaCpp, smollm2: Path, tmp_path: Path
) -> None:
    """It passed its test on the tiny model, answers for SmolLM2, and is shown as what runs."""
    sources = real_llama_cpp_sources
    node = served_by_it(start_node, sources, smollm2, tmp_path / "made", sources.repo_url)
    instance = replaced(node, sources.commit, "smollm2")
    assert sources.commit.startswith(instance["engine"]["version"])
    assert "4" in node.say("smollm2", text="What is 2+2?", max_tokens=24)
    (tiny,) = build(node)["last"]["comparisons"]
    assert tiny["new"]["decode_tps"] > 10
    with node.connection() as stream:
        assert stream.start_stream("smollm2", max_tokens=40, ignore_eos=True) == 200
        assert builds.rebuild(node)["outcome"] == "unchanged"
        assert stream.read_until(b"data: [DONE]")
    assert node.instance("smollm2")["pid"] == instance["pid"]


def test_a_commit_that_does_not_compile(
    compiled: Path,
    start_node: StartNode,
    real_llama_cpp_sources: RealLlamaCpp,
    fork: Path,
    smollm2: Path,
    tmp_path: Path,
) -> None:
    sources = real_llama_cpp_sources
    node = served_by_it(start_node, sources, smollm2, tmp_path / "made", str(fork))
    pid = node.instance("smollm2")["pid"]
    source = fork / "ggml" / "src" / "ggml.c"
    source.write_text(source.read_text() + "\nint broken(void) { return as_asked; }\n")
    broken = commit_all(fork, "break it")
    result = node.cli("rebuild", within_s=300)
    assert result.returncode == 1
    assert "as_asked" in result.stdout + result.stderr
    assert build(node)["last"]["commit"] == broken
    assert build(node)["live_commit"] == sources.commit
    assert node.say("smollm2", text="What is 2+2?")
    assert node.instance("smollm2")["pid"] == pid


def test_a_build_that_is_cancelled_and_a_node_that_is_killed(
    compiled: Path,
    start_node: StartNode,
    real_llama_cpp_sources: RealLlamaCpp,
    fork: Path,
    smollm2: Path,
    tmp_path: Path,
) -> None:
    """Compilers end with what started them, and the old engine serves before and after."""
    sources = real_llama_cpp_sources
    node = served_by_it(start_node, sources, smollm2, tmp_path / "made", str(fork))
    readme = fork / "README.md"
    readme.write_text(readme.read_text() + "\nOne more line.\n")
    commit_all(fork, "say more")
    first = order(node)
    eventually(lambda: (build(node)["current"] or {}).get("done"), within_s=120, what="some steps are done")
    assert node.http.post("/admin/rebuild-llama/cancel", json={}).status_code == 200
    assert ended(node, first["id"] - 1)["outcome"] == "cancelled"
    assert node.say("smollm2", text="What is 2+2?")
    order(node)
    eventually(lambda: (build(node)["current"] or {}).get("done"), within_s=120, what="some steps are done")
    node.sigkill()
    eventually(lambda: not node.marked(), what="compilers and servers of the killed node end")
    node.start()
    assert node.say("smollm2", text="What is 2+2?")
    assert sources.commit.startswith(node.instance("smollm2")["engine"]["version"])
    assert node.http.post("/admin/rebuild-llama/cancel", json={}).status_code == 200
