"""What a client may ask, and what whisper-server is told then."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.form import Form
from mesh.engine.whisper_fields import (
    Format,
    asked_format,
    asked_granularities,
    check_no_stream,
    native_fields,
    openai_fields,
)
from mesh.errors import RequestError
from tests.engine.forms import whisper_profile

PROFILE = whisper_profile()
ALWAYS = {"max_len": "100000", "no_language_probabilities": "true"}
WORDS = ("timestamp_granularities[]", "word")


def openai(*fields: tuple[str, str], args: tuple[str, ...] = (), translate: bool = False) -> dict[str, str]:
    form = Form(fields)
    return dict(openai_fields(form, whisper_profile(*args), asked_format(form), translate=translate))


def native(*fields: tuple[str, str], args: tuple[str, ...] = ()) -> dict[str, str]:
    form = Form(fields)
    return dict(native_fields(form, whisper_profile(*args), asked_format(form)))


def test_openai_needs_nothing() -> None:
    assert openai() == {"response_format": "json", "language": "auto", **ALWAYS}


def test_all_of_openai_s_fields() -> None:
    asked = (
        ("model", "whisper-1"),
        ("language", "EN"),
        ("prompt", "Names: Ödön"),
        ("response_format", "verbose_json"),
        ("temperature", "0.25"),
        ("stream", "false"),
        ("include[]", "logprobs"),
        WORDS,
    )
    assert openai(*asked, translate=True) == {
        "response_format": "verbose_json",
        "language": "en",
        "prompt": "Names: Ödön",
        "temperature": "0.250000",
        "translate": "true",
        "no_timestamps": "false",
        **ALWAYS,
    }


def test_the_last_of_a_name_counts() -> None:
    assert openai(("response_format", "srt"), ("response_format", "text"))["response_format"] == "text"


def test_whisper_cpp_s_own_fields_belong_to_its_own_path() -> None:
    assert openai(("beam_size", "8"), ("no_timestamps", "true"), ("max_len", "1")).keys() == openai().keys()


def test_the_profile_s_language_holds_unless_one_is_asked_for() -> None:
    assert "language" not in openai(args=("-l", "de"))
    assert "language" not in openai(("language", " "), args=("--language", "de"))
    assert openai(("language", "auto"), args=("-l", "de"))["language"] == "auto"
    assert openai(("language", "french"), args=("-l", "de"))["language"] == "fr"


def test_a_prompt_keeps_its_end() -> None:
    for ask in (openai, native):
        assert ask(("prompt", "a " * 5000 + "b " * 499))["prompt"] == "a " + "b " * 499


def test_what_has_no_blank_in_it_is_cut_shorter() -> None:
    for ask in (openai, native):
        assert ask(("prompt", "x " + "漢" * 5000 + "字" * 199))["prompt"] == "漢" + "字" * 199
        assert ask(("prompt", f"a {'x' * 201} b {'y' * 300} {'z' * 200}"))["prompt"] == (
            f"a {'x' * 200} b {'y' * 200} {'z' * 200}"
        )


@pytest.mark.parametrize("text", ["-0.1", "1.01", "9", "", "hot", "nan", "inf", "1e999", "0x1", "0.2abc", "0,5", "٠"])
def test_a_temperature_is_a_number_from_0_to_1(text: str) -> None:
    with pytest.raises(RequestError, match="'temperature' cannot be") as refused:
        openai(("temperature", text))
    assert refused.value.param == "temperature"


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("1", 1), (" 0.7 ", 0.7), ("1e-40", 0), (".5", 0.5), ("+1.", 1)]
)
def test_temperatures(text: str, number: float) -> None:
    assert float(openai(("temperature", text))["temperature"]) == number


@pytest.mark.parametrize(
    ("language", "hint"),
    [("xx", "Whisper knows auto and en, zh"), ("klingon", "haw, ln"), ("germann", "did you mean 'german'")],
)
def test_an_unknown_language_is_refused_with_those_that_there_are(language: str, hint: str) -> None:
    for ask in (openai, native):
        with pytest.raises(RequestError, match=re.escape(hint)) as refused:
            ask(("language", language))
        assert refused.value.param == "language"


@pytest.mark.parametrize("text", ["diarized_json", "xml", "x" * 60_000])
def test_an_unknown_format_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="json, text, srt, verbose_json, vtt") as refused:
        asked_format(Form((("response_format", text),)))
    assert refused.value.param == "response_format"
    assert len(refused.value.message) < 300


def test_formats_may_be_in_capitals() -> None:
    assert asked_format(Form((("response_format", "VTT"),))) is Format.VTT
    assert asked_format(Form()) is asked_format(Form((("response_format", ""),))) is Format.JSON


def test_granularities() -> None:
    both = Form((WORDS, ("timestamp_granularities[]", "segment"), ("timestamp_granularities_x", "y")))
    assert asked_granularities(both, Format.VERBOSE_JSON) == {"word", "segment"}
    assert asked_granularities(Form((("timestamp_granularities[0]", "Word"),)), Format.VERBOSE_JSON) == {"word"}
    assert asked_granularities(Form(), Format.JSON) == frozenset()
    with pytest.raises(RequestError, match="word or segment"):
        asked_granularities(Form((WORDS, ("timestamp_granularities", "phoneme"))), Format.VERBOSE_JSON)
    with pytest.raises(RequestError, match="needs response_format=verbose_json"):
        asked_granularities(Form((WORDS,)), Format.JSON)


@pytest.mark.parametrize(
    ("text", "allowed"), [("true", False), ("1", False), ("false", True), ("", True), ("No", True)]
)
def test_streams_are_refused(text: str, allowed: bool) -> None:
    form = Form((("stream", text),))
    if allowed:
        check_no_stream(form)
    else:
        with pytest.raises(RequestError, match="'stream' is not supported"):
            check_no_stream(form)


def test_its_own_path_adds_nothing() -> None:
    assert native(("model", "w"), ("debug_mode", "true"), ("n_threads", "99")) == {"response_format": "json"}


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("max_len", "20", "20"),
        ("max_len", "1e3", "1000"),
        ("offset_t", "-5", "0"),
        ("duration", "99999999999999", "604800000"),
        ("audio_ctx", "99999", "1500"),
        ("word_thold", "0.5", "0.500000"),
        ("temperature", "9", "1.000000"),
        ("temperature_inc", "0.000001", "0.100000"),
        ("temperature_inc", "0", "0.000000"),
        ("temperature_inc", "-1", "0.000000"),
        ("beam_size", "100", "2"),
        ("best_of", "100", "2"),
        ("translate", "True", "true"),
        ("no_timestamps", "1", "true"),
        ("suppress_nst", "off", "false"),
        ("language", "French", "fr"),
    ],
)
def test_its_own_fields_are_brought_into_range(name: str, given: str, told: str) -> None:
    assert native((name, given))[name] == told


@pytest.mark.parametrize(
    ("name", "given"),
    [("max_len", "x"), ("max_len", ""), ("temperature_inc", "nan"), ("diarize", "maybe"), ("vad", "?")],
)
def test_its_own_fields_have_types(name: str, given: str) -> None:
    with pytest.raises(RequestError, match=f"'{name}' cannot be") as refused:
        native((name, given))
    assert refused.value.param == name


def test_no_more_decoders_than_the_profile_was_charged_for() -> None:
    assert native(("beam_size", "100"), args=("-bs", "5"))["beam_size"] == "5"
    assert native(("best_of", "100"), args=("--best-of", "50"))["best_of"] == "8"
    assert native(("best_of", "100"), args=("--best-of", "x"))["best_of"] == "2"


@pytest.mark.parametrize("wanted", ["srt", "vtt", "verbose_json"])
def test_what_has_times_is_never_asked_for_without_them(wanted: str) -> None:
    assert "no_timestamps" not in native(("response_format", wanted), ("no_timestamps", "true"))
    assert openai(("response_format", wanted), args=("-nt",))["no_timestamps"] == "false"


def test_voice_detection_needs_its_model() -> None:
    assert native(("vad", "true"), args=("-vm", "/vad.bin"))["vad"] == "true"
    assert native(("vad", "false"))["vad"] == "false"
    with pytest.raises(RequestError, match="--vad-model"):
        native(("vad", "true"))


NAMES = (
    "language",
    "prompt",
    "temperature",
    "max_len",
    "temperature_inc",
    "vad",
    "response_format",
    "stream",
    "offset_t",
)


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=30) | st.floats().map(str)), max_size=5))
def test_any_fields_are_taken_or_refused(fields: list[tuple[str, str]]) -> None:
    for ask in (openai, native):
        with contextlib.suppress(RequestError):
            assert all(isinstance(text, str) for text in ask(*fields).values())
