"""Turns pydantic's findings into sentences that say what was written, what is accepted and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from mesh.config.diagnostics import KeyPath, Problem, dotted, suggestion

#: Keys whose values must not turn up in a terminal or a log (trap 101).
_SECRET = frozenset({"allowed_keys", "admin_keys", "env", "llama_server_args"})

_EXPECTED: Mapping[str, str] = {
    "bool_parsing": "expected true or false",
    "bool_type": "expected true or false",
    "string_type": "expected text",
    "tuple_type": "expected a list, for example [a, b]",
    "list_type": "expected a list, for example [a, b]",
    "dict_type": "expected a mapping of keys",
    "model_type": "expected a mapping of keys",
    "model_attributes_type": "expected a mapping of keys",
}


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Return what *error* found in data for *model*, in the order of the keys."""
    return [Problem(details["loc"], _sentence(details, model)) for details in error.errors(include_url=False)]


def _sentence(details: ErrorDetails, model: type[BaseModel]) -> str:
    path: KeyPath = details["loc"]
    kind = details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, model)
    if kind == "missing":
        return "is required and not there"
    if kind in ("literal_error", "enum"):
        allowed = re.findall(r"'([^']*)'", str(details.get("ctx", {}).get("expected", "")))
        close = suggestion(str(details["input"]), allowed)
        return f"expected one of: {', '.join(allowed)}{_got(details)}{close}"
    if kind == "value_error":
        message = str(details.get("ctx", {}).get("error", details["msg"]))
        whole = isinstance(details["input"], dict | list) and not message.startswith("expected")
        return message if whole or message.startswith(("is 0;", "is empty")) else message + _got(details)
    return _EXPECTED.get(kind, details["msg"]) + _got(details) + _advice(details)


def _got(details: ErrorDetails) -> str:
    """Return the value as it was written; not the value of a secret, and only the kind of a whole section."""
    value = details["input"]
    if isinstance(value, dict | list | tuple):
        return f", got a {'mapping' if isinstance(value, dict) else 'list'}"
    if any(part in _SECRET for part in details["loc"]) or details["loc"] == ("auth",):
        return ""
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return f", got {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _advice(details: ErrorDetails) -> str:
    value = details["input"]
    if details["type"] == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if details["type"].startswith("bool") and str(value).lower() in ("yes", "no", "on", "off"):
        return f"; write {str(str(value).lower() in ('yes', 'on')).lower()}"
    return ""


def _unknown_key(path: KeyPath, model: type[BaseModel]) -> str:
    key = str(path[-1])
    section = _model_at(model, path[:-1])
    known = list(section.model_fields) if section else []
    if close := suggestion(key, known):
        return f"unknown key{close}"
    if homes := [home for home in _homes(model, key) if home != dotted(path)]:
        return f"unknown key at this place; it belongs at {' or '.join(homes)}"
    return f"unknown key; known here: {', '.join(known)}"


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    parts = (part for part in path if isinstance(part, str))
    for part in parts:
        field = model.model_fields.get(part)
        inner = section_in(field.annotation) if field else None
        if field is None or inner is None:
            return None
        if has_named_sections(field.annotation):
            next(parts, None)  # the name
        model = inner
    return model


def has_named_sections(annotation: Any) -> bool:
    """Whether *annotation* is that of sections under names that the operator chooses."""
    return get_origin(annotation) is dict and section_in(annotation) is not None


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that *annotation* holds: itself, or in Optional, list, tuple or dict."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for arg in get_args(annotation) if (inner := section_in(arg))), None)


def _homes(model: type[BaseModel], key: str, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        place = f"{prefix}.{name}" if prefix else name
        if name == key:
            yield place
        if inner := section_in(field.annotation):
            single = isinstance(field.annotation, type) or "None" in str(field.annotation)
            many = ".NAME" if has_named_sections(field.annotation) else "" if single else "[]"
            yield from _homes(inner, key, place + many)
