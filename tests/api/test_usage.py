"""Token counts off the passing bytes: usage wins, pieces and pings do not matter (traps 76, 95)."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mesh.api.usage import UsageMeter, read_usage

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
