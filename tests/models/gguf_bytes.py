"""GGUF files byte by byte, right or wrong as a test wants them. The format's own writer refuses to write wrong ones."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    """A length and the bytes."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    """One metadata entry."""
    return text(key) + struct.pack("<I", kind) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, struct.pack("<I", value))


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    """The value of an array entry, with whatever *count* it claims."""
    return struct.pack("<IQ", kind, count) + items


def tensor(name: str, shape: Sequence[int], kind: int = 0, offset: int = 0, *, dimensions: int | None = None) -> bytes:
    """One line of the tensor table."""
    count = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, kind, offset)


def model(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A whole file: header, entries, tensor table, and *data* zero bytes behind the padding."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join([*entries, *tensors])
    return head + b"\0" * (-len(head) % 32 + data) if data else head
