"""Reads numbers out of a model file's metadata, each checked when it is asked for.

Whatever a file holds, the outcome is a number that makes sense or an ``EstimateError``.
"""

from __future__ import annotations

from collections.abc import Mapping

from mesh.core.model_facts import Value

#: Larger than any real dimension; it keeps the numbers of a malformed file from growing without bound.
MAX_NUMBER = 2**40


class EstimateError(ValueError):
    """The file does not describe a model whose memory can be known."""


class Metadata:
    """The metadata below one architecture's prefix, each value checked when it is asked for."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = values
        name = values.get("general.architecture")
        if not isinstance(name, str) or not name:
            raise EstimateError("the file does not say which architecture the model has (general.architecture)")
        self.architecture = name

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._values

    def number(self, key: str, default: int | None = None) -> int:
        """Return a number that is not negative, of an array the largest; *default* if there is none."""
        value = self._values.get(f"{self.architecture}.{key}")
        if isinstance(value, tuple) and value:
            return max(self._checked(key, entry) for entry in value)
        if value is None or value == ():
            return self._or_missing(key, default)
        return self._checked(key, value)

    def numbers(self, key: str, count: int, default: int | None = None) -> tuple[int, ...]:
        """Return *count* numbers: an array's, or the one that holds for every layer."""
        value = self._values.get(f"{self.architecture}.{key}")
        if not isinstance(value, tuple):
            return (self.number(key, default),) * count
        if len(value) < count:
            raise EstimateError(f"{self.architecture}.{key} has {len(value)} entries for {count} layers")
        return tuple(self._checked(key, entry) for entry in value[:count])

    def flags(self, key: str, count: int) -> tuple[bool, ...] | None:
        """Return an array of *count* yes or no; None if the key holds no array."""
        value = self._values.get(f"{self.architecture}.{key}")
        if not isinstance(value, tuple) or len(value) < count:
            return None
        return tuple(bool(entry) for entry in value[:count])

    def _or_missing(self, key: str, default: int | None) -> int:
        if default is None:
            raise EstimateError(f"the metadata has no {self.architecture}.{key}; is this a language model?")
        return default

    def _checked(self, key: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_NUMBER:
            raise EstimateError(f"{self.architecture}.{key} is {str(value)[:40]!r}, not a number that makes sense")
        return value
