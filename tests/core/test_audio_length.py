"""How long files are by their heads."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.audio_length import length_s
from tests.real_whisper import silence


def flac(samples: int, rate_hz: int = 16_000) -> bytes:
    packed = rate_hz << 44 | 15 << 36 | samples
    return b"fLaC\x80\x00\x00\x22" + bytes(10) + packed.to_bytes(8) + bytes(16)


def wav(*, rate_hz: int, channels: int = 1, bits: int = 16, order: str = "<", before: bytes = b"") -> bytes:
    name = b"RIFF" if order == "<" else b"RIFX"
    form = struct.pack(f"{order}HHIIHH", 1, channels, rate_hz, rate_hz * 2, 2, bits)
    return name + bytes(4) + b"WAVE" + before + b"fmt " + struct.pack(f"{order}I", 16) + form + b"data"


def test_flac_says_how_many_samples_it_has() -> None:
    assert length_s(flac(16_000 * 7200), 32_770) == 7200
    assert length_s(flac(1 << 35, rate_hz=1), 100) == 1 << 35


def test_wav_is_as_long_as_its_size() -> None:
    file = silence(3)
    found = length_s(file[:100], len(file))
    assert found is not None
    assert 3 <= found < 3.01
    assert length_s(wav(rate_hz=8000, channels=2), 320_000) == 10
    assert length_s(wav(rate_hz=8000, order=">"), 160_000) == 10
    assert length_s(wav(rate_hz=8000, bits=4), 40_000) == 10
    assert length_s(wav(rate_hz=1, before=b"JUNK" + struct.pack("<I", 3) + bytes(4)), 20_000) == 10_000


@pytest.mark.parametrize(
    "head",
    [b"", b"fLaC", flac(0), flac(5, rate_hz=0), wav(rate_hz=0), wav(rate_hz=8000)[:30], b"\xff\xfb\x90\x00" * 20],
)
def test_who_does_not_say(head: bytes) -> None:
    assert length_s(head, 1000) is None


@given(st.sampled_from((b"fLaC", b"RIFF....WAVE", b"RIFX....WAVEfmt ")), st.binary(max_size=200))
def test_any_head_is_read(start: bytes, rest: bytes) -> None:
    found = length_s(start + rest, 10**6)
    assert found is None or found > 0
