"""What a node of a small mesh answers on /cluster/nodes and /admin/route."""

from __future__ import annotations

from typing import Any

OWN: dict[str, Any] = {
    "node_id": "gpu2",
    "address": "0.0.0.0:8080",
    "version": "0.5.0",
    "llama_cpp_version": "b123",
    "started_at_unix": 1_700_000_000,
    "ready": True,
    "draining": False,
    "supported_models": ["qwen3", "smol"],
    "loaded_models": ["smol"],
    "active_instances": 1,
    "current_requests": 3,
    "queue_length": 1,
    "llamesh_vram_mb": 13000,
    "llamesh_sysmem_mb": 0,
    "max_vram_mb": 24000,
    "max_sysmem_mb": None,
    "self": True,
    "status": "alive",
    "fingerprint": "aaaaa-bbbbb",
}
PEER: dict[str, Any] = {
    **OWN,
    "node_id": "gpu1",
    "address": "192.168.1.20:8080",
    "loaded_models": [],
    "current_requests": 0,
    "queue_length": 0,
    "llamesh_vram_mb": 0,
    "llamesh_sysmem_mb": 512,
    "max_vram_mb": None,
    "self": False,
    "circuit": "half_open",
    "rejected": None,
    "rtt_ms": 1.234,
    "record_age_s": 75.0,
    "forwards_in_flight": 0,
    "forwards_total": 7,
    "forward_failures_total": 1,
    "forward_refusals_total": 0,
}


def nodes(**changes: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of gpu2, which knows gpu1; *changes* are what is different, by node."""
    entries = {"gpu1": PEER, "gpu2": OWN}
    for name, change in changes.items():
        entries[name] = {**entries.get(name, PEER), "node_id": name, **change}
    return {"nodes": entries}


def candidate(node: str, cost_s: float | None = None, **changes: Any) -> dict[str, Any]:
    terms = {} if cost_s is None else {"queue": 0.0, "load": cost_s - 1.5, "decode": 1.5}
    return {
        "node": node,
        "self": False,
        "cost_s": cost_s,
        "terms_s": terms,
        "excluded": None,
        "reasons": [],
        **changes,
    }


def route(*candidates: dict[str, Any], max_tokens: int | None = None) -> dict[str, Any]:
    return {
        "model": "qwen3",
        "node_id": "gpu2",
        "assumed": {"prompt_tokens": 1000, "max_tokens": max_tokens},
        "candidates": list(candidates),
    }
