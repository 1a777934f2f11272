"""Example files and schemas: complete, valid, and equal to the code (trap 87)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from mesh.config import schema
from mesh.config.cookbook import build_catalog
from mesh.config.cookbook_file import CookbookFile, Inheritable, ModelEntry, ProfileEntry
from mesh.config.explain import section_in
from mesh.config.loader import load
from mesh.config.settings import Settings
from mesh.config.yaml_source import read_yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "config.example.yaml"
COOKBOOK = ROOT / "cookbook.example.yaml"


@pytest.mark.parametrize("path", list(schema.files()), ids=str)
def test_generated_files_are_up_to_date(path: Path) -> None:
    """Run ``python -m mesh.config.schema`` after a change of the models."""
    assert (ROOT / path).read_text(encoding="utf-8") == schema.files()[path]


def test_examples_pass_the_real_validator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 87. The only warnings are of the model files that are not there."""
    monkeypatch.chdir(ROOT)
    loaded = load(config=CONFIG, cookbook=COOKBOOK, secrets=None, environ={})
    assert {"no such file" in warning.message for warning in loaded.warnings} == {True}
    assert not any(profile.hf_repo for profile in loaded.catalog.profiles), "the default engine may not download"
    assert {"smollm2", "qwen3", "qwen3:long", "gpt-4o-mini"} <= set(loaded.catalog.names)


def test_the_config_example_states_every_default() -> None:
    """Trap 87: with the example as config.yaml a node runs as without any."""
    data = dict(read_yaml(CONFIG).data)
    assert Settings.model_validate(data) == Settings()
    assert set(_keys(data)) == set(_fields(Settings))


def test_the_cookbook_example_states_every_default() -> None:
    """Trap 87: stated defaults change nothing, and no key is missing."""
    data = dict(read_yaml(COOKBOOK).data)
    stated = build_catalog(CookbookFile.model_validate(data), Settings())
    assert stated == build_catalog(CookbookFile.model_validate({**data, "defaults": {}}), Settings())
    assert set(data["defaults"]) == set(Inheritable.model_fields)
    full = next(model for model in data["models"] if model["name"] == "every-key")
    (profile,) = full["profiles"]
    assert set(full) == set(ModelEntry.model_fields)
    assert set(profile) == set(ProfileEntry.model_fields)
    bare = {"name": full["name"], "profiles": [{"model_path": profile["model_path"]}]}
    (expected,) = build_catalog(CookbookFile.model_validate({"models": [bare]}), Settings()).profiles
    assert stated.names["every-key"] == expected


def test_every_key_has_a_meaning() -> None:
    models: list[type[BaseModel]] = [Settings, CookbookFile]
    while models:
        for name, field in (model := models.pop()).model_fields.items():
            inner = section_in(field.annotation)
            models += [inner] if inner else []
            assert field.description or model.__name__ == "PortRange", f"{model.__name__}.{name}"


def test_schemas_accept_what_the_validator_accepts() -> None:
    """Spot checks by hand: no JSON Schema validator is among the dependencies."""
    made = json.loads((ROOT / schema.CONFIG_SCHEMA).read_text())
    assert made["additionalProperties"] is False
    assert "default" not in made["properties"]["node_id"]
    assert {"type": "null"} in made["properties"]["max_hops"]["anyOf"]
    assert {"type": "string"} in made["properties"]["max_vram_mb"]["anyOf"][0]["anyOf"]
    breaker = made["$defs"]["CircuitBreaker"]["properties"]["failure_threshold"]
    assert breaker["default"] == 5
    cookbook = json.loads((ROOT / schema.COOKBOOK_SCHEMA).read_text())
    assert cookbook["$defs"]["ModelEntry"]["required"] == ["name"]


def _keys(data: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner = section_in(field.annotation)
        if inner is not None and isinstance(field.default, BaseModel):
            yield from _fields(inner, f"{prefix}{name}.")
