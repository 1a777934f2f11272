"""Names of languages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.whisper_languages import LANGUAGES, language_code


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("de", "de"),
        (" EN ", "en"),
        ("German", "de"),
        ("haitian creole", "ht"),
        ("castilian", "es"),
        ("pt-BR", "pt"),
        ("zh_Hans_CN", "zh"),
        ("jv", "jw"),
        ("yue", "yue"),
        ("xx", None),
        ("xx-de", None),
        ("", None),
        ("-", None),
        ("auto", None),
    ],
)
def test_codes(name: str, code: str | None) -> None:
    assert language_code(name) == code


def test_there_are_a_hundred() -> None:
    assert len(LANGUAGES) == len(set(LANGUAGES.values())) == 100


@given(st.text())
def test_any_name_has_a_known_code_or_none(name: str) -> None:
    code = language_code(name)
    assert code is None or code in LANGUAGES
