"""Field types of both files: whole numbers, durations and sizes, as numbers in the key's unit or as text with one.

Errors are ``ValueError``s that say what is accepted; the loader adds the place and the value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

_SECONDS: Mapping[str, float] = {"us": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
#: Memory is counted in powers of 1024, also as "GB": a "24GB" card has 24576 MiB.
_BYTES: Mapping[str, int] = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_WITH_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([a-zA-Z]*)\s*")
_SIZE_UNIT = re.compile(r"([kmgt]?)i?b?")

DURATIONS = "a number or text such as '30s', '500ms' or '5m'"
SIZES = "a number or text such as '24GB' or '512MB'"
SHARES = "a share above 0 and up to 1, such as 0.3 or '30%'"


def _number(value: object, unit: Callable[[str], float | None], accepted: str) -> float:
    """Return *value* in the key's unit; *unit* gives the factor of a unit's name, None for an unknown one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {accepted}")
    if isinstance(value, str):
        found = _WITH_UNIT.fullmatch(value)
        factor = unit(found[2].lower()) if found else None
        if found is None or factor is None:
            raise ValueError("must not be negative" if value.strip().startswith("-") else f"expected {accepted}")
        value = float(found[1]) * factor if factor != 1 or "." in found[1] else int(found[1])
    if not math.isfinite(value):
        raise ValueError(f"expected {accepted}")
    if value < 0:
        raise ValueError("must not be negative")
    if value > 2**53:
        raise ValueError("the number is too large")
    return value


def _whole(number: float, smallest: str) -> int:
    if 0 < number < 1:
        # Rounding it to 0 would turn the limit off.
        raise ValueError(f"is less than {smallest}, the smallest step of this key")
    return round(number)


def parse_count(value: object) -> int:
    """Return a whole number >= 0."""
    number = _number(value, lambda unit: 1 if unit == "" else None, "a whole number")
    if number != int(number):
        raise ValueError("expected a whole number")
    return int(number)


def parse_seconds(value: object) -> float:
    """Return a duration in seconds; a number without unit is seconds."""
    return _number(value, lambda unit: _SECONDS.get(unit or "s"), DURATIONS)


def parse_milliseconds(value: object) -> int:
    """Return a duration in milliseconds; a number without unit is milliseconds."""
    return _whole(_number(value, lambda unit: _per(_SECONDS.get(unit or "ms"), 1e-3), DURATIONS), "1 ms")


def parse_megabytes(value: object) -> int:
    """Return a size in MiB; a number without unit is MiB."""
    return _whole(_number(value, lambda unit: _per(_bytes(unit or "mb"), 1024**2), SIZES), "1 MB")


def parse_bytes(value: object) -> int:
    """Return a size in bytes; a number without unit is bytes."""
    return _whole(_number(value, _bytes, SIZES), "1 byte")


def _bytes(unit: str) -> float | None:
    found = _SIZE_UNIT.fullmatch(unit)
    return 1024 ** _BYTES[found[1]] if found else None


def _per(factor: float | None, unit: float) -> float | None:
    return None if factor is None else factor / unit


def parse_budget(value: object) -> int | str:
    """Return MiB, or ``"auto"``."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        return "auto"
    try:
        return parse_megabytes(value)
    except ValueError as error:
        raise ValueError(str(error).replace(SIZES, SIZES + ", or 'auto'")) from None


def parse_share(value: object) -> float:
    """Return a share above 0 and up to 1, given as that or as text with %."""
    text = value.strip() if isinstance(value, str) else ""
    found = _number(text.removesuffix("%") if text else value, lambda unit: 1 if unit == "" else None, SHARES)
    share = found / 100 if text.endswith("%") else found
    if not 0 < share <= 1:
        raise ValueError(f"expected {SHARES}")
    return share


def _schema(type_name: str, description: str) -> WithJsonSchema:
    return WithJsonSchema(
        {"anyOf": [{"type": type_name, "minimum": 0}, {"type": "string"}], "description": description}
    )


Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema({"type": "integer", "minimum": 0})]
Seconds = Annotated[float, BeforeValidator(parse_seconds), _schema("number", "Seconds, or text such as 30s")]
Milliseconds = Annotated[
    int, BeforeValidator(parse_milliseconds), _schema("integer", "Milliseconds, or text such as 30s")
]
Megabytes = Annotated[int, BeforeValidator(parse_megabytes), _schema("integer", "MiB, or text such as 24GB")]
Bytes = Annotated[int, BeforeValidator(parse_bytes), _schema("integer", "Bytes, or text such as 64MB")]
Budget = Annotated[Any, BeforeValidator(parse_budget), _schema("integer", "MiB, text such as 24GB, or auto")]
Share = Annotated[
    float,
    BeforeValidator(parse_share),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1}, {"type": "string"}]}),
]
