"""Words out of tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.engine.whisper_words import Token, Word, words

#: half a character
H = "\ufffd"


def made(*texts: str, text: str, spaced: bool = True) -> list[tuple[str, float, float]]:
    """Return the words of tokens of one second each."""
    tokens = [Token(said, number, number + 1) for number, said in enumerate(texts)]
    return [(word.text, word.start, word.end) for word in words(tokens, text, spaced=spaced)]


@pytest.mark.parametrize(
    ("tokens", "text", "expected"),
    [
        ((" And", " so"), " And so", [("And", 0, 1), ("so", 1, 2)]),
        ((" trans", "crip", "tion", ","), " transcription,", [("transcription,", 0, 4)]),
        (("Hello", " you"), "Hello you", [("Hello", 0, 1), ("you", 1, 2)]),
        ((f" na{H}", f"{H}ve", " a"), " naïve a", [("naïve", 0, 2), ("a", 2, 3)]),
        ((f" {H}", H, f" {H}", H, " b"), " ä ö b", [("ä", 0, 2), ("ö", 2, 4), ("b", 4, 5)]),
        ((" a", " ", " b"), " a  b", [("a", 0, 1), ("b", 2, 3)]),
        ((" a", f" {H}"), "other", [("a", 0, 1), (H, 1, 2)]),
        ((), " nothing", []),
    ],
)
def test_words_begin_with_blanks(tokens: tuple[str, ...], text: str, expected: list[tuple[str, float, float]]) -> None:
    assert made(*tokens, text=text) == expected


def test_some_languages_have_no_blanks() -> None:
    said = made("你好", "，", "世", "界", "。", text="你好，世界。", spaced=False)
    assert said == [("你好，", 0, 2), ("世", 2, 3), ("界。", 3, 5)]


def test_a_character_in_three_tokens_is_one() -> None:
    assert made("世", H, H, H, "界", text="世饕界", spaced=False) == [
        ("世", 0, 1), ("饕", 1, 4), ("界", 4, 5),
    ]  # fmt: skip


@given(st.lists(st.text("ab ä,")), st.booleans())
def test_nothing_that_was_said_is_lost(texts: list[str], spaced: bool) -> None:
    text = "".join(texts)
    said = made(*texts, text=text, spaced=spaced)
    assert "".join(word for word, _, _ in said).replace(" ", "") == text.replace(" ", "")


@given(st.lists(st.text(f"ab {H}")), st.text(f"abä {H}"), st.booleans())
def test_any_tokens_make_words(texts: list[str], text: str, spaced: bool) -> None:
    tokens = [Token(said, 0, 1) for said in texts]
    assert all(isinstance(word, Word) and word.text for word in words(tokens, text, spaced=spaced))
