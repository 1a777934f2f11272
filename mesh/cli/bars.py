"""A node's memory for people: a line for each kind, on a terminal with a bar of what is used, foreign and free."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from mesh.cli.output import stdout_console
from mesh.core.budget import INSTANCES

_BAR_CELLS = 30
_SHORT_BAR_CELLS = 10
#: On narrower terminals the bar is the short one, so that the numbers stay on its line.
_WIDE = 100
_GPU = re.compile(r"gpu(\d+)")


def print_memory(memory: Mapping[str, Mapping[str, Any]], *, instances: tuple[int, int] | None = None) -> None:
    """Print each kind of *memory* (as in GET /admin/budget), and the *instances* that run, and may run, at most."""
    rows = [(kind, figures) for kind, figures in sorted(memory.items(), key=_order) if _matters(figures)]
    if not rows and instances is None:
        return
    console = stdout_console()
    width = max(len(name) for name in [*(kind for kind, _ in rows), *([INSTANCES] if instances else [])])
    console.print("\nbudget", style="bold")
    for kind, figures in rows:
        console.print(_line(console, kind.ljust(width), figures))
    if instances is not None:
        console.print(f"  {INSTANCES.ljust(width)}  {instances[0]} of {instances[1]}", markup=False)


def charged(mib: Mapping[str, int]) -> str:
    """Return the memory of one model in words; the sum "vram" only where the single GPUs are not told."""
    kinds = [kind for kind, amount in mib.items() if amount and kind != INSTANCES]
    if any(_GPU.fullmatch(kind) for kind in kinds):
        kinds = [kind for kind in kinds if kind != "vram"]
    return ", ".join(f"{kind} {mib[kind]:,} MiB" for kind in sorted(kinds, key=_kind_order)) or "-"


def _matters(figures: Mapping[str, Any]) -> bool:
    return figures.get("capacity_mib") is not None or bool(figures.get("used_mib"))


def _line(console: Console, name: str, figures: Mapping[str, Any]) -> Text:
    total, used, foreign = figures.get("capacity_mib"), figures.get("used_mib") or 0, figures.get("foreign_mib") or 0
    others = f", {foreign:,} foreign" if foreign else ""
    if total is None:
        return Text(f"  {name}  {used:,} MiB used{others}, not limited")
    free = figures.get("free_mib") or 0
    line = Text(f"  {name}  ")
    if console.is_terminal:
        line.append_text(bar(total, used, free, _BAR_CELLS if console.width >= _WIDE else _SHORT_BAR_CELLS,
                             plain=not console.encoding.startswith("utf"))).append("  ")  # fmt: skip
    return line.append(f"{used:,} used{others}, {free:,} free of {total:,} MiB")


def bar(total: int, used: int, free: int, cells: int, *, plain: bool = False) -> Text:
    """Return a bar of *cells*: used, then what others took away, then free. What is there at all gets a cell."""
    marks = "#x." if plain else "█▒░"
    used_cells = _share(used, total, cells)
    free_cells = min(_share(free, total, cells), cells - used_cells)
    if total - used - free <= 0:  # nobody else: rounding must not look like somebody
        free_cells = cells - used_cells
    text = Text(marks[0] * used_cells, style="cyan")
    text.append(marks[1] * (cells - used_cells - free_cells), style="magenta")
    return text.append(marks[2] * free_cells, style="bright_black")


def _share(part: int, total: int, cells: int) -> int:
    if part <= 0 or total <= 0:
        return 0
    return min(cells, max(1, round(cells * part / total)))


def _order(item: tuple[str, Any]) -> tuple[int, int]:
    return _kind_order(item[0])


def _kind_order(kind: str) -> tuple[int, int]:
    """Main memory, then the sum of the GPUs, then each of them by number."""
    match = _GPU.fullmatch(kind)
    return (2, int(match[1])) if match else ({"ram": 0, "vram": 1}.get(kind, 3), 0)
