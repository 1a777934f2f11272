"""What a client may ask of whisper-server, field by field: OpenAI's on its paths, whisper.cpp's own on ``/inference``.

whisper-server trusts its fields: it takes the first digits of a number and no range, falls back to English for a
language that it does not know, and never ends for some (``temperature_inc``). So each is checked, brought into its
range, and written anew; what is not listed here does not reach it. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from mesh.config.diagnostics import suggestion
from mesh.config.llama_args import flag_value, has_flag
from mesh.config.profile import Profile
from mesh.core.form import Form
from mesh.core.whisper_languages import AUTO, LANGUAGES, language_code
from mesh.errors import RequestError

#: only Whisper's last 224 tokens of it count, and the time to read one without blanks grows with its square
PROMPT_CHARACTERS: Final = 1000
_WORD_CHARACTERS: Final = 200
#: a segment is cut after so many bytes; unset it would be 60, in the middle of a word or of a character
WHOLE_SEGMENTS: Final = "100000"
_SHOWN_CHARACTERS = 60


class Format(StrEnum):
    JSON = "json"
    TEXT = "text"
    SRT = "srt"
    VERBOSE_JSON = "verbose_json"
    VTT = "vtt"


#: without times in them these are nonsense, or lack what they are for
_TIMED: Final = frozenset({Format.SRT, Format.VTT, Format.VERBOSE_JSON})

Pairs = list[tuple[str, str]]


def asked_format(form: Form) -> Format:
    """Return the format of the answer; raise ``RequestError`` for one that there is not."""
    given = (form.get("response_format") or Format.JSON).strip().lower()
    try:
        return Format(given)
    except ValueError:
        known = ", ".join(Format)
        hint = suggestion(given[:_SHOWN_CHARACTERS], Format)
        raise _refused("response_format", given, f"it can be {known}{hint}") from None


def asked_granularities(form: Form, wanted: Format) -> frozenset[str]:
    """Return which of ``word`` and ``segment`` the client wants times for."""
    given = {text.strip().lower() for name, text in form.fields if _GRANULARITIES.fullmatch(name)}
    for text in sorted(given - {"word", "segment"}):
        raise _refused("timestamp_granularities[]", text, "it can be word or segment")
    if given and wanted is not Format.VERBOSE_JSON:
        message = "'timestamp_granularities[]' needs response_format=verbose_json: no other format has a place for them"
        raise RequestError(message, param="timestamp_granularities[]")
    return frozenset(given)


_GRANULARITIES = re.compile(r"timestamp_granularities(?:\[\d{0,3}\])?")


def check_no_stream(form: Form) -> None:
    """Refuse what whisper-server cannot do: it answers when it is done."""
    if _truth("stream", form.get("stream") or "false"):
        message = "'stream' is not supported: whisper-server sends its answer whole, when it is done; leave it out"
        raise RequestError(message, param="stream")


# -- OpenAI's fields


def openai_fields(form: Form, profile: Profile, wanted: Format, *, translate: bool) -> Pairs:
    """Return what whisper-server has to be told for OpenAI's answer. The profile's flags decide what is not asked."""
    fields: Pairs = [("response_format", wanted), ("max_len", WHOLE_SEGMENTS), ("no_language_probabilities", "true")]
    if wanted in _TIMED:
        fields.append(("no_timestamps", "false"))
    if translate:
        fields.append(("translate", "true"))
    if (language := _language(form)) is not None:
        fields.append(("language", language))
    elif not has_flag(profile.args, ("-l", "--language")):
        fields.append(("language", AUTO))
    if prompt := form.get("prompt"):
        fields.append(("prompt", _prompt(prompt)))
    if (temperature := form.get("temperature")) is not None:
        number = _number("temperature", temperature)
        if not 0 <= number <= 1:
            raise _refused("temperature", temperature, "it is a number from 0 to 1")
        fields.append(("temperature", _decimal(number)))
    return fields


_LONG_WORDS = re.compile(rf"\S+(?=\S{{{_WORD_CHARACTERS}}})")


def _prompt(text: str) -> str:
    """Return as much of the end of it as can count. What has no blank in it for long is cut like the whole."""
    return _LONG_WORDS.sub("", text[-PROMPT_CHARACTERS:])


def _language(form: Form) -> str | None:
    """Return the code for what the client asked for; None if it left that open."""
    given = (form.get("language") or "").strip()
    if not given or given.lower() == AUTO:
        return AUTO if given else None
    if (code := language_code(given)) is not None:
        return code
    hint = suggestion(given[:_SHOWN_CHARACTERS], (*LANGUAGES, *LANGUAGES.values()), cutoff=0.7)
    known = ", ".join(LANGUAGES)
    raise _refused("language", given, f"Whisper knows {AUTO} and {known}{hint}")


# -- whisper.cpp's own fields


@dataclass(frozen=True, slots=True)
class _Range:
    """Numbers from ``least`` to ``most``, whole ones if both are whole; others are brought into it."""

    least: float
    most: float

    def clean(self, name: str, text: str) -> str:
        number = min(max(_number(name, text), self.least), self.most)
        return str(int(number)) if isinstance(self.most, int) else _decimal(number)


_WEEK_MS = 7 * 24 * 3600 * 1000
_RANGES: Final = {
    "offset_t": _Range(0, _WEEK_MS),
    "offset_n": _Range(0, 10**9),
    "duration": _Range(0, _WEEK_MS),
    "max_context": _Range(-1, 10**6),
    "max_len": _Range(-1, int(WHOLE_SEGMENTS)),
    "audio_ctx": _Range(0, 1500),
    "word_thold": _Range(0.0, 1.0),
    "entropy_thold": _Range(-100.0, 100.0),
    "logprob_thold": _Range(-100.0, 100.0),
    "no_speech_thold": _Range(0.0, 1.0),
    "temperature": _Range(0.0, 1.0),
    "vad_threshold": _Range(0.0, 1.0),
    "vad_min_speech_duration_ms": _Range(0, _WEEK_MS),
    "vad_min_silence_duration_ms": _Range(0, _WEEK_MS),
    "vad_max_speech_duration_s": _Range(1.0, 1e6),
    "vad_speech_pad_ms": _Range(0, 10_000),
    "vad_samples_overlap": _Range(0.0, 10.0),
}
#: each step is one more attempt, with memory of its own; 0 means none
_LEAST_TEMPERATURE_STEP = 0.1
#: not ``debug_mode``: it writes files
_SWITCHES: Final = (
    "translate",
    "diarize",
    "tinydiarize",
    "split_on_word",
    "no_timestamps",
    "token_timestamps",
    "detect_language",
    "carry_initial_prompt",
    "suppress_non_speech",
    "suppress_nst",
    "vad",
    "no_language_probabilities",
)
_DEFAULT_DECODERS, _MOST_DECODERS = 2, 8


def native_fields(form: Form, profile: Profile, wanted: Format) -> Pairs:
    """Return what the client asked for in whisper.cpp's own words, each once."""
    fields: Pairs = [("response_format", wanted)]
    if (language := _language(form)) is not None:
        fields.append(("language", language))
    if prompt := form.get("prompt"):
        fields.append(("prompt", _prompt(prompt)))
    fields += _numbers(form, profile)
    fields += _switches(form, profile, wanted)
    return fields


def _numbers(form: Form, profile: Profile) -> Iterator[tuple[str, str]]:
    most = _decoders(profile)  # the memory was reckoned for as many
    for name, allowed in (*_RANGES.items(), ("best_of", _Range(1, most)), ("beam_size", _Range(-1, most))):
        if (text := form.get(name)) is not None:
            yield name, allowed.clean(name, text)
    if (text := form.get("temperature_inc")) is not None:
        step = _number("temperature_inc", text)
        yield "temperature_inc", _decimal(min(max(step, _LEAST_TEMPERATURE_STEP), 1.0) if step > 0 else 0.0)


def _decoders(profile: Profile) -> int:
    given = (flag_value(profile.args, names) for names in (("-bo", "--best-of"), ("-bs", "--beam-size")))
    numbers = (int(text) for text in given if text is not None and re.fullmatch(r"\d{1,9}", text))
    return min(max((_DEFAULT_DECODERS, *numbers)), _MOST_DECODERS)


def _switches(form: Form, profile: Profile, wanted: Format) -> Iterator[tuple[str, str]]:
    for name in _SWITCHES:
        if (text := form.get(name)) is None or (name == "no_timestamps" and wanted in _TIMED):
            continue
        on = _truth(name, text)
        if on and name == "vad" and not has_flag(profile.args, ("-vm", "--vad-model")):
            message = "'vad' needs a model for voice detection: none of this model's arguments is '--vad-model'"
            raise RequestError(message, param="vad")
        yield name, "true" if on else "false"


# -- values

_NUMBER = re.compile(r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,2})?")
_TRUTHS = {"true": True, "1": True, "yes": True, "y": True, "on": True,
           "false": False, "0": False, "no": False, "n": False, "off": False, "": False}  # fmt: skip


def _number(name: str, text: str) -> float:
    if not _NUMBER.fullmatch(text.strip()) or not text.isascii():
        raise _refused(name, text, "it is a number")
    return float(text)


def _decimal(number: float) -> str:
    """Return *number* in digits: whisper-server fails at one that is too small for a float."""
    return f"{number:.6f}"


def _truth(name: str, text: str) -> bool:
    if (truth := _TRUTHS.get(text.strip().lower())) is None:
        raise _refused(name, text, "it is true or false")
    return truth


def _refused(name: str, text: str, what_it_is: str) -> RequestError:
    shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
    return RequestError(f"'{name}' cannot be {shown!r}: {what_it_is}", param=name)
