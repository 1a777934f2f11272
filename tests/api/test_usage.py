"""Token counts off the passing bytes: usage wins, pieces and pings do not matter (traps 76, 95)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api.usage import UsageMeter, read_timings, read_usage

DELTA = b'data: {"choices":[{"delta":{"reasoning_content":"say \\"usage\\": \\"completion_tokens\\": 99"}}]}\n\n'
LAST = b'data: {"choices":[],"usage":{"completion_tokens":12,"prompt_tokens":34},"timings":{"predicted_n":1}}\n\n'
STREAM = b":\n\n" + DELTA * 5 + b":\n\n" + LAST + b"data: [DONE]\n\n"


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_any_pieces_of_a_stream(cuts: list[int]) -> None:
    meter = UsageMeter()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, stop in pairwise(edges):
        meter.event_bytes(STREAM[start:stop])
    assert meter.tokens() == (34, 12)
    assert meter.events == 6


def test_a_stream_without_figures_is_counted_by_events() -> None:
    meter = UsageMeter()
    for _ in range(3):
        meter.event_bytes(DELTA)
    meter.event_bytes(b":\n\ndata: [DONE]\n\n")
    assert meter.tokens() == (0, 3)


def test_bodies() -> None:
    assert read_usage(b'{"choices":[],"usage":{"prompt_tokens": 5,"completion_tokens" : 6}}') == (5, 6)
    assert read_usage(b'{"content":"x","tokens_predicted":2,"tokens_evaluated":3,"timings":{"prompt_n":1}}') == (3, 2)
    assert read_usage(b'{"usage":null,"timings":{"prompt_n":1,"predicted_n":2}}') == (1, 2)
    assert read_usage(b'{"type":"message","usage":{"input_tokens":5,"output_tokens":6}}') == (5, 6)
    assert read_usage(b'{"content":"no figures"}') == (0, 0)
    assert read_usage(b"") == (0, 0)


def test_a_body_in_pieces() -> None:
    """Figures at the beginning (embeddings) or cut in two at the end."""
    early = UsageMeter()
    for piece in (b'{"usage":{"prompt_tokens":5},"data":[', b"1,2,", b"3]", b"}"):
        early.body_bytes(piece)
    assert early.tokens() == (5, 0)
    late = UsageMeter()
    for piece in (b'{"choices":[', b"1", b'],"usage":{"completion_to', b'kens":7}}'):
        late.body_bytes(piece)
    assert late.tokens() == (0, 7)


def test_anthropic_events() -> None:
    meter = UsageMeter()
    meter.event_bytes(b'event: message_start\ndata: {"message":{"usage":{"input_tokens":9,"output_tokens":1}}}\n\n')
    meter.event_bytes(b'event: message_delta\ndata: {"usage":{"output_tokens":4}}\n\n')
    assert meter.tokens() == (9, 4)


# --- what llama-server measured

TIMINGS = (
    b'"timings":{"cache_n":236,"prompt_n":10,"prompt_ms":30.958,"prompt_per_token_ms":3.0,"prompt_per_second":323.0,'
    b'"predicted_n":35,"predicted_ms":661.064,"predicted_per_token_ms":18.887,"predicted_per_second":52.9}'
)


def test_timings() -> None:
    told = read_timings(b'{"choices":[],' + TIMINGS + b"}")
    assert told is not None
    assert (told.prompt_tokens, told.generated) == (10, 35)
    assert told.prompt_s == pytest.approx(0.030958)
    assert told.decode_s == pytest.approx(0.661064)


@pytest.mark.parametrize(
    "piece",
    [
        b"",
        b'{"timings":null}',
        b'{"timings":{}}',
        b'{"timings":{"prompt_n":10}}',
        b'{"content":"\\"timings\\":{\\"prompt_n\\":1,\\"prompt_ms\\":1,\\"predicted_n\\":1,\\"predicted_ms\\":1}"}',
        TIMINGS.replace(b"10,", b"-1,"),
        TIMINGS.replace(b"10,", b'"x",'),
        TIMINGS[:-90],
    ],
)
def test_timings_that_are_not_there(piece: bytes) -> None:
    """What a model generates is never mistaken for them: its quotes are escaped."""
    assert read_timings(piece) is None


def test_the_last_timings_count() -> None:
    """llama-server can tell them with every event (timings_per_token)."""
    earlier = TIMINGS.replace(b'"predicted_n":35', b'"predicted_n":34')
    told = read_timings(b"data: {" + earlier + b"}\n\ndata: {" + TIMINGS + b"}\n\n")
    assert told is not None
    assert told.generated == 35


@given(st.lists(st.integers(0, 2000), max_size=30))
def test_timings_of_any_pieces_of_a_stream(cuts: list[int]) -> None:
    stream = (
        DELTA * 5 + b'data: {"choices":[],"usage":{"completion_tokens":35,"prompt_tokens":246},' + TIMINGS + b"}\n\n"
    )
    stream += b"data: [DONE]\n\n"
    meter = UsageMeter()
    for start, stop in pairwise([0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]):
        meter.event_bytes(stream[start:stop])
    told = read_timings(meter.end)
    assert told is not None
    assert (told.prompt_tokens, told.generated) == (10, 35)


@given(st.integers(0, 400), st.integers(0, 400))
def test_timings_of_a_body_in_pieces(first: int, second: int) -> None:
    """They stand at its end, which is one piece or two."""
    body = b'{"choices":[{"message":{"content":"abc"}}],' + TIMINGS + b"}"
    meter = UsageMeter()
    cuts = sorted(min(cut, len(body)) for cut in (first, second))
    for start, stop in pairwise([0, *cuts, len(body)]):
        if stop > start:
            meter.body_bytes(body[start:stop])
    told = read_timings(meter.end)
    assert told is None or told.generated == 35


@given(st.binary(max_size=80))
def test_any_bytes_are_no_timings_or_some(data: bytes) -> None:
    read_timings(data)
    read_timings(TIMINGS[:60] + data + TIMINGS[60:])
