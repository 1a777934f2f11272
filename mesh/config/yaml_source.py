"""Reads one YAML 1.2 file into plain data and remembers the line of every key.

Works on libyaml's event stream and builds the values itself, because PyYAML's own resolver is YAML 1.1 (``no`` is
False, ``1:30`` is 90), merges duplicate keys without a word and recurses without a limit. Whatever the bytes are, the
result is a ``Source``; what is wrong with them stands in its ``problems``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mesh.config.diagnostics import Diagnostic, KeyPath, dotted

#: The C parser when the wheel has it: a cookbook of 1,000 profiles takes 20 ms instead of a second.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_MAX_DEPTH = 64
#: Values in a file once aliases are expanded; a few lines of nested aliases can otherwise mean billions.
_MAX_VALUES = 200_000

_TAG = "tag:yaml.org,2002:"
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL: Mapping[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), float("inf")),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), float("-inf")),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
}


@dataclass(frozen=True, slots=True)
class Source:
    """What a file says. With ``problems`` the data is what could still be read."""

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)
    problems: tuple[Diagnostic, ...] = ()

    def line(self, path: KeyPath) -> int | None:
        """Return the line of *path*, or of its nearest parent that the file has; None for the whole file."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)

    def at(self, path: KeyPath, message: str) -> Diagnostic:
        """Return *message* placed at *path* of this file."""
        return Diagnostic(self.name, self.line(path), dotted(path), message)


def read_yaml(path: Path, *, fold_keys: bool = False) -> Source:
    """Read and parse *path*; a file that cannot be read becomes a ``Source`` with that problem."""
    try:
        content = path.read_bytes()
    except OSError as error:
        return Source(str(path), problems=(Diagnostic(str(path), None, "", _unreadable(path, error)),))
    return parse_yaml(content, str(path), fold_keys=fold_keys)


def _unreadable(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"the file does not exist (looked in {path.absolute().parent}); create it or correct the path"
    if isinstance(error, IsADirectoryError):
        return "this is a directory; name the file in it"
    if isinstance(error, PermissionError):
        return "permission denied; make the file readable for the user that runs llama-mesh"
    return f"cannot be read: {error.strerror or error}"


def parse_yaml(content: bytes, name: str, *, fold_keys: bool = False) -> Source:
    """Parse *content*. *fold_keys* makes keys lower-case, as llamesh does in config.yaml."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        bad = content[error.start]
        message = f"byte 0x{bad:02x} is not UTF-8; save the file with the encoding UTF-8"
        return Source(name, problems=(Diagnostic(name, line, "", message),))
    builder = _Builder(text, name, fold_keys)
    try:
        data = builder.document()
    except yaml.YAMLError as error:
        return Source(name, lines=builder.lines, problems=(*builder.problems, _syntax(error, text, name)))
    return Source(name, data, builder.lines, tuple(builder.problems))


class _Unsupported(yaml.MarkedYAMLError):
    """Legal YAML that a configuration file has no use for."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Builder:
    """Builds the one document of *text*, depth first, from its events."""

    def __init__(self, text: str, name: str, fold_keys: bool) -> None:
        self._text, self._name, self._fold_keys = text, name, fold_keys
        self._events: Iterator[Any] = iter(())
        self._anchors: dict[str, tuple[Any, int]] = {}  # value and how many values it holds
        self._values = 0
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Diagnostic] = []

    def document(self) -> dict[str, Any]:
        """Return the document's mapping; an empty file is an empty mapping."""
        self._events = iter(yaml.parse(self._text, Loader=_Loader))
        next(self._events)  # StreamStart
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return {}
        event = next(self._events)
        value = self._value(event, ())
        next(self._events)  # DocumentEnd
        if not isinstance(second := next(self._events), yaml.StreamEndEvent):
            raise _Unsupported("a second document starts here; a file holds one ('---' only once)", second.start_mark)
        if value is not None and not isinstance(value, dict):
            raise _Unsupported(f"the file must be a mapping of keys, not {_kind(value)}", event.start_mark)
        return value or {}

    def _value(self, event: Any, path: KeyPath) -> Any:
        self._count(1, event)
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event)
        before = self._values
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif len(path) >= _MAX_DEPTH:
            raise _Unsupported(f"nested deeper than {_MAX_DEPTH} levels", event.start_mark)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self._sequence(path)
        else:
            value = self._mapping(path)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._values - before + 1
        return value

    def _count(self, values: int, event: Any) -> None:
        self._values += values
        if self._values > _MAX_VALUES:
            raise _Unsupported(f"the file holds more than {_MAX_VALUES} values", event.start_mark)

    def _alias(self, event: Any) -> Any:
        # An alias inside its own anchor is not yet known here, so a value can never contain itself.
        if event.anchor not in self._anchors:
            raise _Unsupported(f"alias '*{event.anchor}' has no anchor '&{event.anchor}' before it", event.start_mark)
        value, size = self._anchors[event.anchor]
        self._count(size - 1, event)
        return value

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            here = (*path, len(items))
            self.lines[here] = event.start_mark.line + 1
            items.append(self._value(event, here))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self._key(event, path)
            here = (*path, key)
            known = key in result
            first_line = self.lines.get(here)
            if not known:
                self.lines[here] = line
            value = self._value(next(self._events), here)
            if known:
                message = f"the key occurs twice; it is first set in line {first_line}. Keep one of the two"
                self.problems.append(Diagnostic(self._name, line, dotted(here), message))
            else:
                result[key] = value
        return result

    def _key(self, event: Any, path: KeyPath) -> str:
        mark: Any = event.start_mark
        if not isinstance(event, yaml.ScalarEvent):
            raise _Unsupported("a key must be plain text, not a list, mapping or alias", mark)
        if event.value == "<<" and event.implicit[0]:
            message = "merge keys ('<<') are not part of YAML 1.2; in a cookbook use 'defaults:' instead"
            self.problems.append(Diagnostic(self._name, mark.line + 1, dotted(path), message))
        key: str = event.value
        return key.lower() if self._fold_keys else key

    def _scalar(self, event: Any) -> Any:
        text: str = event.value
        if event.tag in (None, "!") or event.tag == _TAG + "str":
            plain = event.tag is None and event.implicit[0]
            return self._resolve(text, event) if plain else text
        value = self._resolve(text, event)
        if event.tag != _TAG + _TYPE_TAGS.get(type(value), ""):
            raise _Unsupported(f"'{text}' does not fit its tag {event.tag.replace(_TAG, '!!')}", event.start_mark)
        return value

    def _resolve(self, text: str, event: Any) -> Any:
        """Return the value of a plain scalar by YAML 1.2's core schema."""
        if text in _SPECIAL:
            return _SPECIAL[text]
        if _INT.fullmatch(text):
            if len(text) > 40:
                raise _Unsupported(f"the number has {len(text)} digits; quote it if it is text", event.start_mark)
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        return float(text) if _FLOAT.fullmatch(text) else text


_TYPE_TAGS = {bool: "bool", int: "int", float: "float", type(None): "null"}


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else f"the single value {value!r:.40}"


def _syntax(error: yaml.YAMLError, text: str, name: str) -> Diagnostic:
    """Return *error* with its line, and with a hint where the message alone would not help at night."""
    if isinstance(error, yaml.reader.ReaderError):
        at = _first_unprintable(text)
        message = f"control character U+{ord(text[at]):04X} is not allowed in YAML; delete it"
        return Diagnostic(name, text.count("\n", 0, at) + 1, "", message)
    assert isinstance(error, yaml.MarkedYAMLError)
    mark: Any = error.problem_mark or error.context_mark
    if isinstance(error, _Unsupported):
        return Diagnostic(name, mark.line + 1 if mark else None, "", str(error.problem))
    line = mark.line if mark else 0
    message = f"YAML syntax error: {error.problem or error.context}{_hint(error, text, line)}"
    return Diagnostic(name, line + 1, "", message)


def _first_unprintable(text: str) -> int:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    return found.start() if found else 0


def _hint(error: yaml.MarkedYAMLError, text: str, line: int) -> str:
    lines = text.splitlines()
    here = lines[line] if line < len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())]:
        return "; the line is indented with a tab, use spaces"
    problem = str(error.problem)
    if "mapping values" in problem:
        return "; quote a value that contains ': ', and check the indentation"
    if "cannot start any token" in problem and error.problem_mark is not None:
        return f"; quote the value that starts with {here[error.problem_mark.column :][:1]!r}"
    if error.context_mark is not None and error.context_mark.line != line:
        return f" ({error.context}, which starts in line {error.context_mark.line + 1})"
    return ""
