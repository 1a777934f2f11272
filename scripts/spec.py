"""Fills the generated parts of SPEC.md from the code and the tests: `python scripts/spec.py [--check]`.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``: the lifecycle diagram, the route table, and
which tests cite which trap of shared/traps.md. ``make test`` runs the check.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from mesh.api.routes import ROUTES
from mesh.core.lifecycle import diagram

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "SPEC.md"
#: The traps that this release must answer for: A to J and L of shared/traps.md.
TRAPS = (*range(1, 105), *range(108, 112))
_CITED = re.compile(r"[Tt]raps?((?:[ ,]|and|\d)+)")


def lifecycle() -> str:
    return f"```mermaid\n{diagram()}\n```"


def routes() -> str:
    lines = ["| method | path | model in | kind | takes a slot |", "|---|---|---|---|---|"]
    for r in ROUTES:
        slot = "yes" if r.needs_slot else "no"
        lines.append(f"| {r.method} | `{r.path}` | {r.model_in.value} | {r.capability.value} | {slot} |")
    return "\n".join(lines)


def citations() -> dict[int, list[str]]:
    """Return the test files that cite each trap, as ``trap 9`` or ``traps 9, 10`` in a docstring or comment."""
    found: dict[int, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for numbers in _CITED.findall(path.read_text()):
            for number in re.findall(r"\d+", numbers):
                found.setdefault(int(number), set()).add(str(path.relative_to(ROOT / "tests")))
    return {number: sorted(files) for number, files in found.items()}


def explained(spec: str) -> dict[int, str]:
    """Return the traps that SPEC.md explains by hand: lines like ``- trap 31: not tested, because ...``."""
    return {int(n): why for n, why in re.findall(r"^- trap (\d+): (.+)$", spec, re.MULTILINE)}


def traps(spec: str) -> str:
    cited, why = citations(), explained(spec)
    lines = ["| trap | tests (under `tests/`) |", "|---|---|"]
    for number in TRAPS:
        where = ", ".join(f"`{name}`" for name in cited.get(number, [])) or (
            "see below" if number in why else "MISSING"
        )
        lines.append(f"| {number} | {where} |")
    return "\n".join(lines)


def filled(spec: str) -> str:
    """Return *spec* with every generated part made anew."""
    for name, text in (("lifecycle", lifecycle()), ("routes", routes()), ("traps", traps(spec))):
        pattern = re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(spec), f"SPEC.md has no generated part {name}"
        spec = pattern.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", spec)  # type: ignore[misc]
    return spec


def main() -> int:
    spec = SPEC.read_text()
    new = filled(spec)
    if "--check" in sys.argv[1:]:
        return int(new != spec)
    SPEC.write_text(new)
    missing = [n for n in TRAPS if f"| {n} | MISSING |" in new]
    print(f"SPEC.md written; traps without a test or a reason: {missing or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
