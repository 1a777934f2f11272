"""Reading YAML: 1.2 values, a line for every key, one clear error for everything else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.yaml_source import parse_yaml, read_yaml

#: 9 ** 9 values in ten lines.
BOMB = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))


def parse(text: str, **options: bool) -> Any:
    source = parse_yaml(text.encode(), "f.yaml", **options)
    assert not source.problems
    return source.data


def problem(content: str | bytes) -> str:
    source = parse_yaml(content.encode() if isinstance(content, str) else content, "f.yaml")
    assert source.problems
    return "\n".join(map(str, source.problems))


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("Off", "Off"),
        ("true", True),
        ("False", False),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("1_000", "1_000"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("0b1", "0b1"),
        ("1e3", 1000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("~", None),
        ("null", None),
        ("", None),
        ("'true'", "true"),
        ('"1"', "1"),
        ("!!str 1", "1"),
        ("!!int 1", 1),
        ("! 1", "1"),
        ("=", "="),
    ],
)
def test_scalars_are_yaml_1_2(scalar: str, value: object) -> None:
    data = parse(f"k: {scalar}\n")
    assert data == {"k": value}
    assert type(data["k"]) is type(value)


def test_every_key_and_item_has_its_line() -> None:
    source = parse_yaml(b"a: 1\n\nb:\n  c: 2\n  d:\n    - x\n    - e: 3\n", "f.yaml")
    assert source.data == {"a": 1, "b": {"c": 2, "d": ["x", {"e": 3}]}}
    lines = {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "d"): 5,
        ("b", "d", 0): 6,
        ("b", "d", 1): 7,
        ("b", "d", 1, "e"): 7,
    }
    assert source.lines == lines
    assert source.line(("b", "d", 9, "zz")) == 5
    assert source.line(("zz",)) is None


def test_without_libyaml_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a: [1, {b: yes}]\nc: &x 0x10\nd: *x\n"
    with_c = parse_yaml(text.encode(), "f")
    monkeypatch.setattr("mesh.config.yaml_source._Loader", yaml.SafeLoader)
    assert parse_yaml(text.encode(), "f") == with_c
    assert "line is indented with a tab" in problem("a:\n\tb: 1\n")


def test_aliases_are_values() -> None:
    assert parse("a: &x [1, {b: 2}]\nc: *x\n") == {"a": [1, {"b": 2}], "c": [1, {"b": 2}]}


def test_keys_can_be_folded() -> None:
    assert parse("Cluster:\n  ENABLED: True\n", fold_keys=True) == {"cluster": {"enabled": True}}


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "---\n...\n", "~"])
def test_an_empty_file_is_an_empty_mapping(text: str) -> None:
    assert parse(text) == {}


def test_a_byte_order_mark_is_no_content() -> None:
    assert parse("\ufeffa: 1") == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: a: the key occurs twice; it is first set in line 1"),
        ("a: 1\nx:\n  - b: 1\n    b: 1\n", r"f.yaml:4: x\[0\].b: the key occurs twice"),
        ("a:\n\tb: 1\n", "f.yaml:2: YAML syntax error: .*tab"),
        ("a: 1\n---\nb: 2\n", "f.yaml:2: a second document starts here"),
        ("a: b: c\n", "f.yaml:1: YAML syntax error: .*quote a value that contains ': '"),
        ("a: 1\nb: @x\n", "f.yaml:2: YAML syntax error: .*starts with '@'"),
        ("a: [1,\n  2\nb: 3\n", r"f.yaml:3: YAML syntax error: .*starts in line 1"),
        ('a: "x\nb: 1\n', "f.yaml:[23]: YAML syntax error: .*unexpected end"),
        ("a: *nope\n", "f.yaml:1: alias '\\*nope' has no anchor"),
        ("a: &x [*x]\n", "alias '\\*x' has no anchor"),
        ("- 1\n", "f.yaml:1: the file must be a mapping of keys, not a list"),
        ("hello\n", "not the single value 'hello'"),
        ("a: 1\nb: \x07\n", r"f.yaml:2: control character U\+0007"),
        (b"a: 1\nb: \xe9\n", "f.yaml:2: byte 0xe9 is not UTF-8"),
        ("a: 1".encode("utf-16"), "f.yaml:1: byte 0xff is not UTF-8"),
        ("? [a]\n: 1\n", "f.yaml:1: a key must be plain text"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n", "f.yaml:3: y: merge keys"),
        ("a: !!python/object:os.system x\n", "f.yaml:1: 'x' does not fit its tag"),
        ("a: !!int x\n", "f.yaml:1: 'x' does not fit its tag !!int"),
        ("a: " + "9" * 50, "f.yaml:1: the number has 50 digits"),
        ("a: " + "[" * 100_000, "f.yaml:1: nested deeper than 64 levels"),
        (BOMB, "holds more than"),
    ],
)
def test_errors_have_file_line_and_cause(content: str | bytes, message: str) -> None:
    """Trap 84."""
    text = problem(content)
    assert re.search(message, text, re.DOTALL), text


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    missing = read_yaml(tmp_path / "x.yaml")
    assert f"does not exist (looked in {tmp_path})" in str(missing.problems[0])
    directory = read_yaml(tmp_path)
    assert "this is a directory" in str(directory.problems[0])


_text = st.text(st.characters(codec="ascii", exclude_characters="<"), max_size=12)
_scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(-1e300, 1e300) | _text
_values = _scalars | st.lists(_scalars, max_size=3) | st.dictionaries(_text, st.lists(_scalars, max_size=2), max_size=3)


@given(st.dictionaries(_text, _values, max_size=4))
def test_json_is_read_as_it_was_written(data: dict[str, Any]) -> None:
    """JSON is YAML 1.2, so a JSON writer is an independent oracle."""
    text = json.dumps(data)
    source = parse_yaml(text.encode(), "f")
    assert not source.problems
    assert source.data == data


@given(st.binary() | st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,?~ \n\t\x00\xe9").map(str.encode))
def test_any_bytes_give_data_or_a_problem(content: bytes) -> None:
    source = parse_yaml(content, "f")
    assert isinstance(source.data, dict)
    for found in source.problems:
        assert found.message
        assert found.line is None or 1 <= found.line <= len(content) + 2


@given(
    st.lists(st.sampled_from("abcdef"), unique=True, min_size=1), st.lists(st.integers(0, 3), min_size=6, max_size=6)
)
def test_lines_survive_blank_lines_and_comments(keys: list[str], gaps: list[int]) -> None:
    text, expected = "", {}
    for key, gap in zip(keys, gaps, strict=False):
        text += "# note\n" * gap
        expected[(key,)] = text.count("\n") + 1
        text += f"{key}: 1\n"
    assert parse_yaml(text.encode(), "f").lines == expected
