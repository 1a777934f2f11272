"""The table of `llama-mesh fit`: a line for the GPU memory and one for the main memory of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mesh.cli.bars import charged, print_memory
from mesh.cli.output import print_table, stdout_console
from mesh.core.lifecycle import State

_PLAIN = ("weights", "kv", "compute")
_OTHER = ("recurrent", "output", "draft", "projector")
_COLUMNS = ["MODEL", "MEMORY", "WEIGHTS", "KV", "COMPUTE", "OTHER", "TOTAL", "CHARGED", "SOURCE", "FITS"]
_RIGHT = frozenset({"WEIGHTS", "KV", "COMPUTE", "OTHER", "TOTAL", "CHARGED"})
_OPTIONAL = ["SOURCE", "OTHER", "COMPUTE", "TOTAL", "KV", "WEIGHTS"]


def print_fits(answer: Mapping[str, Any], *, where: str, remarks: Sequence[str] = ()) -> None:
    """Print what ``--json`` says, for people. All figures are MiB; *where* names the memory that was looked at."""
    models: Sequence[Mapping[str, Any]] = answer["models"]
    budget: Mapping[str, Any] | None = answer["budget"]
    if not models:
        print("There are no models: name a .gguf file, or add models to cookbook.yaml.")
    else:
        rows = [row for entry in models for row in _rows(entry, budget)]
        print_table(_COLUMNS, rows, right=_RIGHT, optional=_OPTIONAL)
    console = stdout_console()
    for note, names in _notes(models).items():
        console.print(f"{', '.join(names)}: {note}", markup=False, style="dim")
    for entry in models:
        if bad := entry["problem"] or _failure(entry):
            console.print(f"{entry['model']}: {bad}", markup=False, style="red")
    if budget is not None:
        print_memory(budget["memory"])
    console.print(f"\nall in MiB, for {where}{_machine(budget)}", markup=False, style="dim")
    for remark in remarks:
        console.print(remark, markup=False, style="dim")


def _notes(models: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the models of each note."""
    names: dict[str, list[str]] = {}
    for entry in models:
        for note in entry["notes"]:
            names.setdefault(note, []).append(entry["model"])
    return names


def _failure(entry: Mapping[str, Any]) -> str | None:
    """Return why the node could not start it; an older node does not say."""
    reason = entry.get("failure")
    return f"fails to start: {reason}" if reason else None


def _machine(budget: Mapping[str, Any] | None) -> str:
    """Return what the machine has, budget or not."""
    devices = (budget or {}).get("devices")
    if not devices:
        return ""
    gpus = [f"{gpu['kind']} {gpu['name']} {gpu['total_mib']:,} MiB" for gpu in devices["gpus"]]
    ram = f"{devices['ram_total_mib']:,} MiB RAM of which {devices['ram_available_mib']:,} are available"
    return f"\nit has {', '.join([ram, *gpus]) if gpus else f'{ram}, and no GPU that can be read'}"


def _rows(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> list[list[str]]:
    """GPU memory first, where there is any; the verdict stands on the first line."""
    need = _charged(entry, budget)
    kinds = [("gpu", "vram", "GPU"), ("cpu", "ram", "RAM")]
    shown = [k for k in kinds if _part(entry, "total", k[0]) or need.get(k[1])] or kinds[1:]
    head = [[entry["model"], entry["source"] or "-", verdict(entry, budget)], *[["", "", ""]] * (len(shown) - 1)]
    return [
        [name, label, *_figures(entry, side), _mib(need.get(kind)), source, fits]
        for (name, source, fits), (side, kind, label) in zip(head, shown, strict=True)
    ]


def _charged(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> Mapping[str, int]:
    """Return what is held for a model that is loaded, by all its instances; else what one would be charged."""
    if entry["fit"] != "loaded":
        return entry["need_mib"] or {}
    held = [holder["memory_mib"] for holder in _loaded(entry, budget)] or [entry["placement_mib"] or {}]
    return {kind: sum(mib.get(kind, 0) for mib in held) for kind in sorted({kind for mib in held for kind in mib})}


def _loaded(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the instances of the model that serve it, or will."""
    held = (budget or {}).get("held_by") or ()
    return [h for h in held if h["key"] == entry["key"] and h["state"] in (State.SPAWNING, State.READY)]


def _figures(entry: Mapping[str, Any], side: str) -> list[str]:
    if entry["total"] is None:
        return ["-"] * 5
    other = sum(_part(entry, name, side) for name in _OTHER)
    return [*(_mib(_part(entry, name, side)) for name in _PLAIN), _mib(other), _mib(_part(entry, "total", side))]


def _part(entry: Mapping[str, Any], name: str, side: str) -> float:
    amount: float = (entry[name] or {}).get(side, 0.0)
    return amount


def _mib(amount: float | None) -> str:
    return f"{amount:,.0f}" if amount else "-"


def verdict(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> str:
    """Return in words whether the model of *entry* fits."""
    if entry["problem"]:
        return "no: see below"
    if entry["fit"] == "loaded":
        count = len(_loaded(entry, budget))
        return f"loaded{f' {count} times' if count > 1 else ''}{_gpus(_charged(entry, budget))}"
    if entry.get("failure"):
        return "fails to start: see below"
    if entry["source"] == "unknown" and not entry["need_mib"]:
        return "unknown"  # a model that is downloaded first, for one, is charged nothing
    if (total_mib := lacking_ram_mib(entry, budget)) is not None:
        return f"no: the machine has {total_mib:,} MiB of RAM"
    where = _gpus(entry["placement_mib"])
    match entry["fit"]:
        case "now":
            return f"yes{where}"
        case "after_eviction":
            return f"yes{where}, after {_victims(entry)} {'stops' if len(entry['evict']) == 1 else 'stop'}"
        case "waits":
            return f"not now: {_obstacle(entry, budget)}"
        case "never":
            return "no: more than the whole budget"
        case _:
            return "unknown"


def lacking_ram_mib(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> int | None:
    """Return how much main memory the machine has if that is too little for one more and no budget says so."""
    total_mib: int | None = ((budget or {}).get("devices") or {}).get("ram_total_mib")
    too_large = bool(total_mib) and (entry["need_mib"] or {}).get("ram", 0) > (total_mib or 0)
    return total_mib if too_large and entry["fit"] in ("now", "after_eviction", "waits") else None


def _obstacle(entry: Mapping[str, Any], budget: Mapping[str, Any] | None) -> str:
    """Return who is in the way: of those that would have to go, the ones that cannot."""
    held = {holder["instance"]: holder for holder in (budget or {}).get("held_by") or ()}
    reasons = [
        f"{victim['model'] or victim['instance']} is {why}"
        for victim in entry["evict"]
        if (why := _why_it_stays(held.get(victim["instance"])))
    ]
    if reasons:
        return ", ".join(dict.fromkeys(reasons))
    if entry["evict"]:
        return f"{_victims(entry)} in the way"
    if budget is None:
        return "the memory is taken"
    foreign = any(figures.get("foreign_mib") for figures in budget["memory"].values())
    return "other programs use the memory" if foreign else "the memory is not free yet"


def _why_it_stays(holder: Mapping[str, Any] | None) -> str | None:
    if holder is None or holder["evictable"]:
        return None
    if holder["pinned"]:
        return "pinned"
    if holder["state"] == State.SPAWNING:
        return "loading"
    return "busy" if holder["active"] else str(holder["state"])


def _victims(entry: Mapping[str, Any]) -> str:
    return ", ".join(victim["model"] or victim["instance"] for victim in entry["evict"])


def _gpus(placement: Mapping[str, int] | None) -> str:
    gpus = {kind: mib for kind, mib in (placement or {}).items() if kind.startswith("gpu")}
    return f" ({charged(gpus)})" if gpus else ""
