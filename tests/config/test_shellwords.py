"""``llama_server_args`` is split as the Rust crate shlex does it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.shellwords import ShellSyntaxError, join, quote, split

#: The crate's own test table, then its documented rules.
CASES = [
    ("foo$baz", ["foo$baz"]),
    ("foo baz", ["foo", "baz"]),
    ('foo"bar"baz', ["foobarbaz"]),
    ('foo "bar"baz', ["foo", "barbaz"]),
    ("   foo \nbar", ["foo", "bar"]),
    ("foo\\\nbar", ["foobar"]),
    ('"foo\\\nbar"', ["foobar"]),
    ("'baz\\$b'", ["baz\\$b"]),
    ("foo #bar\nbaz", ["foo", "baz"]),
    ("foo #bar", ["foo"]),
    ("foo#bar", ["foo#bar"]),
    ("'\\n'", ["\\n"]),
    ("'\\\\n'", ["\\\\n"]),
    ("", []),
    (" \t\n", []),
    ("''", [""]),
    ("a ''", ["a", ""]),
    (r'"\$ \` \" \\ \n"', [r'$ ` " \ \n']),
    (r"\$ \  \#x", ["$", " ", "#x"]),
    ("a\rb", ["a\rb"]),
    ("a\r\nb", ["a\r", "b"]),
    ("# only a comment", []),
    ("-c 4096 \\\n  -ngl 99 \\\n", ["-c", "4096", "-ngl", "99"]),
    (
        "--override-tensor 'a=b' --chat-template-kwargs '{\"x\": 1}'",
        ["--override-tensor", "a=b", "--chat-template-kwargs", '{"x": 1}'],
    ),
]


@pytest.mark.parametrize(("text", "words"), CASES)
def test_splits_as_the_crate_does(text: str, words: list[str]) -> None:
    assert split(text) == words


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("'baz\\''", "single quote at character 7"),
        ("\\", "backslash at the end"),
        ('"\\', "double quote at character 1"),
        ("'\\", "single quote at character 1"),
        ('"', "double quote at character 1"),
        ("a '", "single quote at character 3"),
        ('foo"#bar', "double quote at character 4"),
        ("-c 4096 \\", "backslash at the end"),
    ],
)
def test_an_open_quote_is_named(text: str, what: str) -> None:
    with pytest.raises(ShellSyntaxError, match=what):
        split(text)


@given(st.lists(st.text()))
def test_quoting_round_trips(words: list[str]) -> None:
    assert split(join(words)) == words


@given(st.text(alphabet=" \t\n\r'\"\\#$ab"))
def test_any_text_splits_or_is_refused(text: str) -> None:
    try:
        words = split(text)
    except ShellSyntaxError:
        return
    assert split(join(words)) == words


def test_plain_words_are_not_quoted() -> None:
    assert quote("--model=/models/a.gguf") == "--model=/models/a.gguf"
    assert quote("") == "''"
