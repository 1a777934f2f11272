"""Token counts, read off the bytes that pass by. Never delays, changes or decodes them.

An answer's own figures win: ``usage`` (OpenAI, Anthropic), then ``timings`` and llama.cpp's native keys. They stand at
the end of an answer, or at its beginning for embeddings; so two or three pieces are looked at, once, when it is over.
A stream that ends without any is counted by its events, one token each.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LLAMA_USAGE = re.compile(rb'"usage":\{"completion_tokens":([0-9]{1,12}),"prompt_tokens":([0-9]{1,12})[,}]')
_NUMBER = re.compile(rb"\s*:\s*([0-9]{1,12})")
_FIGURE = rb"([0-9]{1,12}(?:\.[0-9]{1,12})?)"
_TIMINGS = re.compile(
    rb'"timings":\{[^{}]*?"prompt_n":%b,"prompt_ms":%b,[^{}]*?"predicted_n":%b,"predicted_ms":%b[,}]'
    % (_FIGURE, _FIGURE, _FIGURE, _FIGURE)
)
_MAX_UNFINISHED_BYTES = 16384


class UsageMeter:
    """Watches one answer; ``tokens`` tells (prompt, generated) as far as it is known."""

    __slots__ = ("_early", "_late", "_unfinished", "events")

    def __init__(self) -> None:
        self.events = 0
        self._early = b""  # the first piece that holds figures
        self._late = b""  # the last one
        self._unfinished = b""  # an event that did not end with its piece (trap 76)

    def event_bytes(self, piece: bytes) -> None:
        """Watch the next *piece* of an event stream, cut anywhere."""
        if self._unfinished:
            piece = self._unfinished + piece
            self._unfinished = b""
        if piece[-1:] != b"\n" and len(piece) < _MAX_UNFINISHED_BYTES:
            self._unfinished = piece
            return
        self.events += piece.count(b"data: {")
        find = piece.find  # ``in`` raises and clears a TypeError for each bytes operand
        if find(b'"usage"') >= 0:
            self._keep(piece)
        elif find(b"predicted") >= 0 and (find(b'"timings"') >= 0 or find(b'"tokens_predicted"') >= 0):
            self._keep(piece)  # either holds "predicted", and hardly any other piece does

    def body_bytes(self, piece: bytes) -> None:
        """Watch the next *piece* of a JSON body: figures stand in its first or in its last two."""
        if not self._early:
            self._early = piece
        else:
            self._late = self._unfinished + piece
            self._unfinished = piece

    def _keep(self, piece: bytes) -> None:
        if not self._early:
            self._early = piece
        self._late = piece

    @property
    def end(self) -> bytes:
        """The last piece that holds figures."""
        return self._late or self._early

    def tokens(self) -> tuple[int, int]:
        """Return (prompt, generated) tokens; events stand in for generated ones that nothing tells."""
        prompt, generated = read_usage(self._early)
        if self._late and self._late is not self._early:
            late_prompt, late_generated = read_usage(self._late)
            prompt, generated = max(prompt, late_prompt), max(generated, late_generated)
        return prompt, generated or self.events


def read_usage(piece: bytes) -> tuple[int, int]:
    """Return (prompt, generated) tokens that *piece* tells, 0 where it does not.

    A quote inside a JSON string is escaped, so a quoted name can only be a key, never text that a model generated.
    """
    at = piece.rfind(b'"usage"')
    if at >= 0:
        if (usual := _LLAMA_USAGE.match(piece, at)) is not None:
            generated_digits, prompt_digits = usual.groups()
            return int(prompt_digits), int(generated_digits)
        prompt = _value(piece, b'"prompt_tokens"', at) or _value(piece, b'"input_tokens"', at)
        generated = _value(piece, b'"completion_tokens"', at) or _value(piece, b'"output_tokens"', at)
        if prompt or generated:
            return prompt, generated
    at = piece.rfind(b'"tokens_predicted"')
    if at >= 0:
        prompt = _value(piece, b'"tokens_evaluated"', piece.rfind(b'"tokens_evaluated"'))
        return prompt, _value(piece, b'"tokens_predicted"', at)
    at = piece.rfind(b'"timings"')
    if at >= 0:
        return _value(piece, b'"prompt_n"', at), _value(piece, b'"predicted_n"', at)
    return 0, 0


class Timings(NamedTuple):
    """What llama-server measured of one request."""

    prompt_tokens: int  #: that were processed; those from the cache are not among them
    prompt_s: float
    generated: int
    decode_s: float


def read_timings(piece: bytes) -> Timings | None:
    """Return the ``timings`` that *piece*, the end of an answer, tells; None if there are none."""
    found = _TIMINGS.search(piece, max(0, piece.rfind(b'"timings"')))
    if found is None:
        return None
    prompt_n, prompt_ms, predicted_n, predicted_ms = (float(figure) for figure in found.groups())
    return Timings(int(prompt_n), prompt_ms / 1000, int(predicted_n), predicted_ms / 1000)


def _value(piece: bytes, name: bytes, start: int) -> int:
    """Return the number under the first key *name* from *start* on, 0 if there is none."""
    at = piece.find(name, start) if start >= 0 else -1
    found = None if at < 0 else _NUMBER.match(piece, at + len(name))
    return 0 if found is None else int(found[1])
