"""SPEC.md says what the code does: its generated parts are current, and no trap is forgotten."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def spec() -> ModuleType:
    found = importlib.util.spec_from_file_location("spec_script", ROOT / "scripts" / "spec.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_generated_parts_are_current(spec: ModuleType) -> None:
    text = (ROOT / "SPEC.md").read_text()
    assert spec.filled(text) == text, "run: make spec"


def test_every_trap_has_a_test_or_a_reason(spec: ModuleType) -> None:
    text = (ROOT / "SPEC.md").read_text()
    cited, explained = spec.citations(), spec.explained(text)
    assert [n for n in spec.TRAPS if n not in cited and n not in explained] == []
