"""The format of the hand-made whisper model; that whisper-server loads it and says the sentence is an e2e test."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests import tiny_whisper
from tests.tiny_whisper import LONGEST, VOCABULARY, write_whisper


def _tensors(content: bytes) -> tuple[list[bytes], dict[str, tuple[int, ...]]]:
    """Return the tokens and the shapes; whatever is too much or too little is an error."""
    assert content[:4] == b"lmgg"
    mels, bins = struct.unpack_from("<2i", content, 48)
    position = 56 + 4 * mels * bins
    (count,) = struct.unpack_from("<i", content, position)
    position += 4
    tokens = []
    for _ in range(count):
        (length,) = struct.unpack_from("<I", content, position)
        tokens.append(content[position + 4 : position + 4 + length])
        position += 4 + length
    shapes: dict[str, tuple[int, ...]] = {}
    while position < len(content):
        dimensions, length, kind = struct.unpack_from("<3i", content, position)
        shape = struct.unpack_from(f"<{dimensions}i", content, position + 12)
        position += 12 + 4 * dimensions
        size = (4, 2)[kind]
        for extent in shape:
            size *= extent
        shapes[content[position : position + length].decode()] = shape
        position += length + size
    assert position == len(content)
    return tokens, shapes


def test_a_sentence_becomes_words_with_their_spaces(tmp_path: Path) -> None:
    write_whisper(tmp_path / "model.bin", "Say this.")
    tokens, shapes = _tensors((tmp_path / "model.bin").read_bytes())
    assert tokens == [b" ", b" Say", b" this."]
    assert shapes["decoder.token_embedding.weight"] == (32, VOCABULARY)
    assert shapes["encoder.conv1.weight"] == (3, 80, 32)
    assert len(shapes) == 11 + 15 + 24  # what whisper.cpp asks for with one layer on each side


def test_the_longest_sentence_makes_a_wider_model(tmp_path: Path) -> None:
    write_whisper(tmp_path / "model.bin", [b" x"] * LONGEST)
    tokens, shapes = _tensors((tmp_path / "model.bin").read_bytes())
    assert len(tokens) == LONGEST + 1
    assert shapes["decoder.ln.weight"] == (LONGEST + 4 + (-LONGEST - 4) % 32,)


@pytest.mark.parametrize("say", ["", " ", [], [b"x"] * (LONGEST + 1)], ids=["empty", "blank", "no token", "too many"])
def test_what_does_not_fit_is_refused(tmp_path: Path, say: str | list[bytes]) -> None:
    with pytest.raises(ValueError, match="tokens; 1 to 220 fit"):
        write_whisper(tmp_path / "model.bin", say)


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_whisper(tmp_path / name, tiny_whisper.SENTENCE)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
