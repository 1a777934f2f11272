"""`llama-mesh models` and `ps`: what a node serves, and what runs right now."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mesh.cli import node
from mesh.cli.bars import charged, print_memory
from mesh.cli.failure import OK
from mesh.cli.output import duration, print_json, print_table, stdout_console
from mesh.config.builds import DEFAULT_BUILD
from mesh.core.budget import INSTANCES


def models(arguments: argparse.Namespace) -> int:
    """List the models of GET /v1/models."""
    answer = node.find(arguments).get("/v1/models")
    if arguments.json:
        print_json(answer)
        return OK
    rows = [_model_row(model) for model in answer["data"]]
    if not rows:
        print("This node serves no models yet: add some to its cookbook.yaml.")
        return OK
    print_table(["MODEL", "ALIASES", "NODE", "DESCRIPTION"], rows, optional=["DESCRIPTION", "NODE"])
    return OK


def _model_row(model: Mapping[str, Any]) -> list[str]:
    metadata = model.get("metadata") or {}
    described = metadata.get("profile_description") or metadata.get("model_description")
    aliases = ", ".join(metadata.get("aliases") or ())
    return [model["id"], aliases or "-", model.get("owned_by") or "-", described or "-"]


def ps(arguments: argparse.Namespace) -> int:
    """Show GET /admin/instances: instances, then requests that wait, recent failures, and the memory budget."""
    answer = node.find(arguments).get("/admin/instances")
    if arguments.json:
        print_json(answer)
        return OK
    queues: dict[str, int] = dict(answer.get("queues") or {})
    rows = [_instance_row(instance, queues) for instance in answer["instances"]]
    rows += [_waiting_row(key, count) for key, count in sorted(queues.items()) if count]
    if rows:
        columns = ["MODEL", "STATE", "PID", "PORT", "SLOTS", "QUEUED", "MEMORY", "SOURCE", "LIVE", "ENGINE", "IDLE"]
        right = frozenset({"PID", "PORT", "SLOTS", "QUEUED", "IDLE"})
        optional = ["PORT", "PID", "SOURCE", "LIVE", "ENGINE", "IDLE", "MEMORY", "QUEUED", "SLOTS"]
        print_table(columns, rows, right=right, optional=optional)
    else:
        print("Nothing is loaded. The first request for a model loads it, 'llama-mesh prewarm MODEL' does so now.")
    _print_failures(answer.get("failures") or {})
    _print_budget(answer.get("budget") or {})
    return OK


def _instance_row(instance: Mapping[str, Any], queues: dict[str, int]) -> list[str]:
    """Show one instance; a profile's queue is shown with its first instance and taken out of *queues*."""
    queued = queues.pop(instance["key"], 0)
    state = instance["state"] + (" (old)" if instance.get("stale") else "")
    return [
        instance.get("model_id") or instance["key"],
        state,
        _or_dash(instance.get("pid")),
        _or_dash(instance.get("port")),
        f"{instance.get('active') or 0}/{_or_dash(instance.get('slots'))}",
        str(queued),
        charged(instance.get("memory") or {}),
        _or_dash(instance.get("source")),
        charged(instance.get("live") or {}),
        _engine(instance),
        "-" if instance.get("active") else duration(instance.get("last_used_s_ago")),
    ]


def _waiting_row(key: str, count: int) -> list[str]:
    return [_model_id(key), "waiting", "-", "-", "-", str(count), "-", "-", "-", "-", "-"]


def _engine(instance: Mapping[str, Any]) -> str:
    """Return the version that really runs, and which build that is if there are several."""
    engine = instance.get("engine") or {}  # an older node does not say
    build = engine.get("build") or DEFAULT_BUILD
    shown = _or_dash(engine.get("version")) + ("" if build == DEFAULT_BUILD else f" {build}")
    return f"{shown} (old)" if instance.get("superseded") else shown


def _model_id(key: str) -> str:
    """Return what clients call the profile *key*."""
    return key.removesuffix(":default")


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def _print_failures(failures: Mapping[str, Mapping[str, Any]]) -> None:
    console = stdout_console()
    for key, failure in sorted(failures.items()):
        retry = failure.get("retry_in_s")
        again = f"; next try in {duration(retry)}" if retry and retry >= 1 else ""
        times = f" ({failure['count']} times)" if failure.get("count", 1) > 1 else ""
        console.print(f"\n{_model_id(key)} failed{times}: {failure.get('reason')}{again}", style="red", markup=False)


def _print_budget(budget: Mapping[str, Mapping[str, Any]]) -> None:
    capacity, used = budget.get("capacity") or {}, budget.get("used") or {}
    memory = budget.get("memory")
    if memory is None:  # an older node
        kinds = {*capacity, *used} - {INSTANCES}
        memory = {kind: _figures(capacity.get(kind), used.get(kind, 0)) for kind in kinds}
    limit = capacity.get(INSTANCES)
    print_memory(memory, instances=None if limit is None else (used.get(INSTANCES, 0), limit))


def _figures(capacity_mib: int | None, used_mib: int) -> dict[str, int | None]:
    free_mib = None if capacity_mib is None else max(0, capacity_mib - used_mib)
    return {"capacity_mib": capacity_mib, "used_mib": used_mib, "free_mib": free_mib}
