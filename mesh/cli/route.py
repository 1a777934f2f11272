"""`llama-mesh route MODEL`: which node would serve a request now, and why."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from rich.text import Text

from mesh.cli import node
from mesh.cli.failure import OK
from mesh.cli.output import fitted_table, print_json, stdout_console


def route(arguments: argparse.Namespace) -> int:
    """Show GET /admin/route: the candidates in the order in which they would be asked, and what they would cost."""
    asked = {
        "model": arguments.model,
        "prompt_tokens": arguments.prompt_tokens,
        "max_tokens": arguments.max_tokens,
    }
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    answer = node.find(arguments).get(f"/admin/route?{query}")
    if arguments.json:
        print_json(answer)
    else:
        _print(answer)
    return OK


def _print(answer: Mapping[str, Any]) -> None:
    candidates: Sequence[Mapping[str, Any]] = answer["candidates"]
    console = stdout_console()
    if not candidates:
        console.print(f"No node has {answer['model']}.", markup=False)
        return
    terms = list(dict.fromkeys(name for entry in candidates for name in entry["terms_s"]))
    columns = ["NODE", "COST", *(name.upper() for name in terms)]
    if any(entry["excluded"] for entry in candidates):
        columns.append("EXCLUDED")
    rows = [_row(entry, terms, len(columns)) for entry in candidates]
    dim = [i for i, entry in enumerate(candidates) if entry["excluded"]]
    right = frozenset(columns[1 : 2 + len(terms)])
    optional = [name.upper() for name in reversed(terms)]
    console.print(fitted_table(console, columns, rows, right=right, optional=optional, dim=dim), soft_wrap=False)
    _print_reasons(answer, candidates[0])


def _row(entry: Mapping[str, Any], terms: Sequence[str], width: int) -> list[str]:
    name = f"{entry['node']} (this)" if entry["self"] else entry["node"]
    row = [name, _seconds(entry["cost_s"]), *(_seconds(entry["terms_s"].get(term)) for term in terms)]
    if len(row) < width:
        row.append(entry["excluded"] or "-")
    return row


def _seconds(amount: float | None) -> str:
    """Return *amount* with what of it can be trusted: estimates have no microseconds."""
    if amount is None:
        return "-"
    return f"{amount:.0f} s" if amount >= 100 else f"{amount:.1f} s" if amount >= 10 else f"{amount:.2f} s"


def _print_reasons(answer: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    console = stdout_console()
    if first["excluded"]:
        console.print(Text(f"\nNo node can serve {answer['model']} now.", style="red"))
        return
    console.print(Text(f"\n{first['node']} would serve {answer['model']}:", style="bold"))
    for reason in first["reasons"]:
        console.print(Text(f"  {reason}"))
    assumed = answer.get("assumed") or {}
    limit = assumed.get("max_tokens")
    console.print(
        Text(
            f"for a prompt of {assumed.get('prompt_tokens', '?')} tokens"
            + (f" and an answer of at most {limit}" if limit is not None else ""),
            style="dim",
        )
    )
