"""What a node says of its memory, as a client sees it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.e2e.harness import Node, eventually


def budget(node: Node) -> dict[str, Any]:
    """Return /admin/budget."""
    answer: dict[str, Any] = node.http.get("/admin/budget").raise_for_status().json()
    return answer


def holder(node: Node, model: str) -> dict[str, Any]:
    """Return who holds memory for *model*."""
    (found,) = [h for h in budget(node)["held_by"] if h["model"] == model]
    return dict(found)


def fits(node: Node) -> dict[str, dict[str, Any]]:
    """Return /modelFits, by model."""
    models = node.http.get("/modelFits").raise_for_status().json()["models"]
    return {entry["model"]: entry for entry in models}


def wait_learned(node: Node, model: str) -> dict[str, Any]:
    """Wait for the sample that follows the first request of an instance of *model*; return what it then holds."""
    found = eventually(
        lambda: [h for h in budget(node)["held_by"] if h["model"] == model and h["source"] == "learned"],
        what=f"{model} is learned",
    )
    return dict(found[0])


def on_gpus(amounts: Mapping[str, int] | None) -> dict[str, int]:
    """Return what of *amounts* is memory of single GPUs."""
    return {kind: mib for kind, mib in (amounts or {}).items() if kind.startswith("gpu")}
