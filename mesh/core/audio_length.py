"""How long a recording will be once it is decoded, where its head says so: a few bytes may hold hours. Pure.

No more than what the head of FLAC and WAV says: who lies there, or sends another format, gets by.
"""

from __future__ import annotations

import struct

_WAV_HEADER_BYTES = 12
_CHUNK_HEADER_BYTES = 8
_FMT_BYTES = 16
_LEAST_BITS = 4  # of a sample, as in ADPCM

_STREAMINFO_AT = 8
_STREAMINFO_BYTES = 34


def length_s(head: bytes, size: int) -> float | None:
    """Return the seconds that a file of *size* bytes that begins with *head* holds at most, if that is known."""
    if head.startswith(b"fLaC"):
        return _flac_s(head[_STREAMINFO_AT : _STREAMINFO_AT + _STREAMINFO_BYTES])
    if head[8:_WAV_HEADER_BYTES] == b"WAVE":
        return _wav_s(head, size, ">" if head.startswith(b"RIFX") else "<")
    return None


def _flac_s(info: bytes) -> float | None:
    """STREAMINFO: 20 bits of rate, 8 of channels and bits, 36 of samples (0: the encoder did not know)."""
    if len(info) < _STREAMINFO_BYTES:
        return None
    packed = int.from_bytes(info[10:18])
    rate_hz, samples = packed >> 44, packed & (1 << 36) - 1
    return samples / rate_hz if rate_hz and samples else None


def _wav_s(head: bytes, size: int, order: str) -> float | None:
    at = _WAV_HEADER_BYTES
    while at + _CHUNK_HEADER_BYTES + _FMT_BYTES <= len(head):
        name, length = struct.unpack_from(f"{order}4sI", head, at)
        at += _CHUNK_HEADER_BYTES
        if name == b"fmt ":
            _, channels, rate_hz, _, _, bits = struct.unpack_from(f"{order}HHIIHH", head, at)
            bits_per_s = rate_hz * channels * (bits if bits and bits % 8 == 0 else _LEAST_BITS)
            return size * 8 / bits_per_s if bits_per_s else None
        at += length + length % 2
    return None
