"""JSON Schemas for editors and the text of config.example.yaml, both made from the models.

``python -m mesh.config.schema`` writes them into a checkout; a test compares them with what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mesh.config.cookbook_file import CookbookFile
from mesh.config.explain import section_in
from mesh.config.fields import Section
from mesh.config.settings import Auth, ClusterTls, ServerTls, Settings

CONFIG_SCHEMA = Path("docs/schema/config.schema.json")
COOKBOOK_SCHEMA = Path("docs/schema/cookbook.schema.json")
SECRETS_SCHEMA = Path("docs/schema/secrets.schema.json")
CONFIG_EXAMPLE = Path("config.example.yaml")

_EXAMPLE_HEAD = f"""\
# yaml-language-server: $schema={CONFIG_SCHEMA}
#
# Every key of config.yaml with its default: a node without this file runs exactly like this. Keep what you change.
# Any key can also come from the environment: cluster.enabled is LLAMESH_CLUSTER__ENABLED.
# Durations are numbers in the unit that the key names, or text: 30s, 500ms, 5m, 1h. Sizes likewise: 512MB, 24GB
# (1 GB = 1024 MB). Booleans are true and false. Relative paths start in the working directory.
# `llama-mesh check` says what is wrong, all of it at once. Made by `python -m mesh.config.schema`.
"""

_PORTS_NOTE = """\
# llama_cpp_ports:
#   ports: [9000, 9005]
#   ranges:
#     - {start: 10000, end: 10099}
"""

_BUILDS_NOTE = """\
# builds:
#   cuda-b1234:                # its llama-server: ./llama.cpp/bin/cuda-b1234/llama-server
#     branch: b1234            # everything that is not set here is as in llama_cpp
#   vulkan:
#     build_args: [-DGGML_VULKAN=ON]
#     canary_profile: qwen3    # the new build must not be much slower at this model either
#   patched:                   # not built here: one that you made yourself
#     enabled: false
#     binary_path: /opt/llama.cpp-patched/bin/llama-server
"""
_NOTES = {"llama_cpp_ports": _PORTS_NOTE, "builds": _BUILDS_NOTE}


class SecretsFile(Section):
    """secrets.yaml: these sections of config.yaml, kept in a file of mode 0600."""

    auth: Auth = Auth()
    server_tls: ServerTls = ServerTls()
    cluster_tls: ClusterTls = ClusterTls()


def schema(model: type[BaseModel], title: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a file. An empty value is a key that is not set, so null is accepted."""
    made = model.model_json_schema(mode="validation")
    for part in (made, *made.get("$defs", {}).values()):
        for name, field in part.get("properties", {}).items():
            if name not in part.get("required", ()):
                part["properties"][name] = _or_null(field)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": title}


def _or_null(field: Mapping[str, Any]) -> dict[str, Any]:
    notes = {key: field[key] for key in ("description", "default", "title") if key in field}
    rest = {key: value for key, value in field.items() if key not in notes}
    choices = rest["anyOf"] if set(rest) == {"anyOf"} else [rest]
    if {"type": "null"} not in choices:
        choices = [*choices, {"type": "null"}]
    return {**notes, "anyOf": choices}


def config_example() -> str:
    """Return the text of config.example.yaml."""
    return "\n".join([_EXAMPLE_HEAD, *_section_lines(Settings, 0)]) + "\n"


def _section_lines(model: type[BaseModel], depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, field in model.model_fields.items():
        inner = section_in(field.annotation)
        if inner is None or not isinstance(field.default, BaseModel):
            yield from ("",) if inner else ()
            yield f"{indent}{name}: {_value(field.get_default())}  # {field.description}"
            if depth == 0 and name in _NOTES:
                yield _NOTES[name].rstrip()
            continue
        doc = inner.__dict__.get("__doc__") or field.description
        yield from ("",) if depth == 0 else ()
        yield f"{indent}# {' '.join(str(doc).split())}"
        yield f"{indent}{name}:"
        yield from _section_lines(inner, depth + 1)


def _value(value: Any) -> str:
    """Return a default as YAML in one line; a default that is made at run time is null."""
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, float) and value == int(value):
        value = int(value)
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=10_000).removesuffix("...\n").strip()


def files() -> dict[Path, str]:
    """Return every generated file and its text."""
    schemas = {
        CONFIG_SCHEMA: schema(Settings, "llama-mesh config.yaml"),
        COOKBOOK_SCHEMA: schema(CookbookFile, "llama-mesh cookbook.yaml"),
        SECRETS_SCHEMA: schema(SecretsFile, "llama-mesh secrets.yaml"),
    }
    texts = {path: json.dumps(made, indent=2) + "\n" for path, made in schemas.items()}
    return {**texts, CONFIG_EXAMPLE: config_example()}


def main() -> None:
    """Write the generated files into the working directory."""
    for path, text in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
