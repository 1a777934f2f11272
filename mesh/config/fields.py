"""The base of every section and the small field types that config.yaml and cookbook.yaml share.

Messages are written for the person who made the typo; the loader puts file, line, key and value around them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    WithJsonSchema,
    model_validator,
)

_TOKEN = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Section(BaseModel):
    """A mapping of known keys. Immutable; an unknown key is an error; a key without a value is as if not written."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=False)

    @model_validator(mode="before")
    @classmethod
    def _forget_nulls(cls, data: Any) -> Any:
        if isinstance(data, dict):
            return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return {} if data is None else data


def key(default: Any, description: str, **extra: Any) -> Any:
    """Return a key's field: its default, and its comment in the example file and in the schema."""
    return Field(default, description=description, **extra)


def _as_text(value: object) -> object:
    """Let ``node_id: 7`` be text. Not so a fraction, whose text is lost: 1.20 is already 1.2 here."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else value


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def _one_line(text: str) -> str:
    if text != text.strip() or not text.isprintable():
        raise ValueError("must be one line without spaces at its ends or control characters")
    return text


def _header_name(text: str) -> str:
    if not _TOKEN.fullmatch(text):
        raise ValueError("is not an HTTP header name; use letters, digits and '-', for example X-Api-Key")
    return text


def _header_value(text: str) -> str:
    if not text.isascii() or " " in text:
        raise ValueError("must be printable ASCII without spaces: it is sent in HTTP headers")
    return text


def _without_scheme(key: str) -> str:
    """Let llamesh's way of writing a key for the Authorization header be the key that clients send in it."""
    scheme, space, token = key.partition(" ")
    return token.strip() if space and scheme.lower() == "bearer" else key


def _port(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip().isdecimal():
        raise ValueError("expected a port number, 1 to 65535")
    if not 1 <= int(value) <= 65535:
        raise ValueError("is not a port; use 1 to 65535")
    return int(value)


def not_zero(why: str) -> AfterValidator:
    """Return a check that refuses 0, which would silently disable or break the subsystem (trap 85)."""

    def check(number: float) -> float:
        if number == 0:
            raise ValueError(f"is 0; {why}")
        return number

    return AfterValidator(check)


Text = Annotated[str, BeforeValidator(_as_text), AfterValidator(_not_blank), WithJsonSchema({"type": "string"})]
Line = Annotated[Text, AfterValidator(_one_line)]
#: Text as written: numbers must be quoted, because 007 and 7 are the same number and not the same key.
StrictLine = Annotated[str, Strict(), AfterValidator(_not_blank), AfterValidator(_one_line)]
HeaderName = Annotated[Text, AfterValidator(_header_name)]
HeaderValue = Annotated[Line, AfterValidator(_header_value)]
HeaderKey = Annotated[Line, AfterValidator(_without_scheme), AfterValidator(_header_value)]
Port = Annotated[int, BeforeValidator(_port), WithJsonSchema({"type": "integer", "minimum": 1, "maximum": 65535})]
