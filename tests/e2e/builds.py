"""A node that builds its own llama-server from the stand-in repository, and what tests ask of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.build_project import Repository
from tests.e2e.conftest import StartNode
from tests.e2e.harness import Models, Node, cookbook, eventually, profile

ARGS = "-c 4096 -np 2"
ENDED_S = 90.0


class Traffic:
    """Requests one after the other, from several clients, while something happens."""

    def __init__(self, node: Node, clients: int = 3) -> None:
        self.statuses: list[int] = []
        self._node = node
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self) -> None:
        while not self._over.is_set():
            self.statuses.append(self._node.chat("alpha", max_tokens=4).status_code)


def settings(repository: Repository, at: Path, **keys: Any) -> dict[str, Any]:
    """Return ``llama_cpp:`` for a node that builds in *at*."""
    paths = {"repo_path": at / "repo", "build_path": at / "build", "binary_path": at / "bin" / "llama-server"}
    return {
        "repo_url": repository.url,
        "branch": "master",
        "build_args": [],
        **{name: str(path) for name, path in paths.items()},
        **keys,
    }


def start(
    start_node: StartNode, models: Models, repository: Repository, at: Path, config: dict[str, Any] | None = None
) -> Node:
    """Return a node with one model, once the build at its start has ended."""
    llama_cpp = settings(repository, at)
    text = cookbook({"alpha": profile(models.alpha, ARGS)})
    node = start_node(text, {"llama_cpp": llama_cpp, **(config or {})})
    assert ended(node)["outcome"] == "installed", build(node)
    return node


def build(node: Node, name: str = "default") -> dict[str, Any]:
    """Return what GET /admin/builds says of one build."""
    builds = node.http.get("/admin/builds").raise_for_status().json()["builds"]
    (found,) = (entry for entry in builds if entry["name"] == name)
    assert isinstance(found, dict)
    return found


def ended(node: Node, after: int = 0, name: str = "default") -> dict[str, Any]:
    """Wait until an attempt later than number *after* has ended, and return it."""

    def last() -> dict[str, Any] | None:
        attempt = build(node, name)["last"]
        return attempt if attempt is not None and attempt["id"] > after else None

    found = eventually(last, within_s=ENDED_S, every_s=0.1, what="the build ends")
    assert found is not None
    return found


def order(node: Node, **keys: Any) -> dict[str, Any]:
    """POST a rebuild and return the attempt that it began."""
    response = node.http.post("/admin/rebuild-llama", json=keys)
    assert response.status_code == 202, response.text
    attempt = response.json()["attempt"]
    assert isinstance(attempt, dict)
    return attempt


def rebuild(node: Node, **keys: Any) -> dict[str, Any]:
    """Rebuild, and return the attempt once it has ended."""
    attempt = order(node, **keys)
    return ended(node, attempt["id"] - 1, keys.get("build", "default"))


def runs(node: Node, commit: str, model: str = "alpha") -> bool:
    """Whether the one instance of *model* that serves runs *commit*."""
    ready = node.instances(model, "ready")
    return len(node.instances(model)) == len(ready) == 1 and commit.startswith(ready[0]["engine"]["version"])


def replaced(node: Node, commit: str, model: str = "alpha") -> dict[str, Any]:
    """Wait until *model* is served by *commit* alone; return its instance."""
    eventually(lambda: runs(node, commit, model), within_s=30, what=f"{model} runs {commit[:9]}")
    return node.instance(model)


def stopped_in_the_middle(at: Path) -> int:
    """Wait for a compile step that sleeps (``wait_for``, ``sleep_s``), and return its process id."""

    def pid() -> int | None:
        texts = (file.read_text().strip() for file in at.glob("build*/sleeping.pid"))
        return next((int(text) for text in texts if text), None)

    found = eventually(pid, within_s=60, what="a compile step that sleeps")
    assert found is not None
    return found


def is_over(pid: int) -> bool:
    """Whether the process has ended, though perhaps nobody has reaped it yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def refused(response: httpx.Response) -> dict[str, Any]:
    """Return the body of a refusal by a build that is busy."""
    assert response.status_code == 409, response.text
    body = response.json()
    assert isinstance(body, dict)
    return body
