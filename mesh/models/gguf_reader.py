"""Reads GGUF's primitive values off a file, in chunks, and never more than the file holds.

Every length in the file is checked against what is left of it before anything is allocated or looped over, so a corrupt
one is an error and neither a MemoryError nor a hang (trap 48). Plain reads and no mmap: a file that is cut short while
it is looked at (a download that starts anew) would kill a process that has it mapped.
"""

from __future__ import annotations

import struct
from typing import BinaryIO, Final

from mesh.core.model_facts import Value
from mesh.errors import ConfigError

_CHUNK_BYTES: Final = 1 << 20
#: the largest known headers, with 260,000 tokens and merges, have 16 MiB
_MAX_HEADER_BYTES: Final = 256 << 20
#: whoever claims more than this was not cut short but damaged
_MAX_FILE_BYTES: Final = 1 << 50
_MAX_TEXT_BYTES: Final = 64 << 10
_MAX_ARRAY: Final = 4096

_STRING, _ARRAY = 8, 9
#: GGUF's value types of a fixed size: u8 i8 u16 i16 u32 i32 f32 bool, and u64 i64 f64
_FIXED: Final = {
    number: struct.Struct(f"<{code}") for number, code in [*enumerate("BbHhIif?"), (10, "Q"), (11, "q"), (12, "d")]
}
_U32: Final = _FIXED[4]
_U64: Final = _FIXED[10]


class GgufError(ConfigError):
    """A model file cannot be read as GGUF. The message names the file and what is wrong with it."""


class GgufReader:
    """A cursor over the header of one file."""

    def __init__(self, file: BinaryIO, name: str, file_bytes: int) -> None:
        self.name = name
        self.file_bytes = file_bytes
        self._file = file
        self._chunk = b""
        self._chunk_at = 0  # where in the file the chunk begins
        self._offset = 0  # of the cursor within the chunk; may lie beyond it after a skip

    @property
    def position(self) -> int:
        """The cursor, in bytes from the start of the file."""
        return self._chunk_at + self._offset

    def error(self, problem: str) -> GgufError:
        """Return the error that says *problem* of this file."""
        return GgufError(f"{self.name}: {problem}")

    def truncated(self, what: str, end: int) -> GgufError:
        """Return the error for a file that should have reached *end*."""
        if end > _MAX_FILE_BYTES:
            return self.error(f"is corrupt: {what} would end at byte {end}, the file has {self.file_bytes}")
        ends = f"{what} ends at byte {end}, the file has {self.file_bytes}"
        return self.error(f"is truncated: {ends}; is the download complete?")

    def take(self, count: int, what: str) -> bytes:
        """Return the next *count* bytes."""
        self._need(count, what)
        start = self._offset
        self._offset += count
        return self._chunk[start : self._offset]

    def u32(self, what: str) -> int:
        """Return the next unsigned 32-bit number."""
        return int(_U32.unpack(self.take(4, what))[0])

    def u64(self, what: str) -> int:
        """Return the next unsigned 64-bit number."""
        return int(_U64.unpack(self.take(8, what))[0])

    def count(self, what: str, each_bytes: int) -> int:
        """Return the next 64-bit count of things that take at least *each_bytes* in the file."""
        number = self.u64(what)
        # "the number of tensors, 7, ends at byte ...": the count, and where the last one would end at the least
        self._check(number * each_bytes, f"{what}, {number},")
        return number

    def text(self, what: str) -> str:
        """Return the next string, which names something."""
        length = self.count(f"the length of {what}", 1)
        if length > _MAX_TEXT_BYTES:
            raise self.error(f"is corrupt: {what} is {length} bytes long")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"is corrupt: {what} is not UTF-8 (before byte {self.position})") from error

    def value(self, key: str) -> tuple[Value | None, int | None]:
        """Return the next metadata value, None if it is not worth keeping, and its length if it is cut or a list."""
        kind = self.u32(f"the type of {key}")
        if kind in _FIXED:
            number = _FIXED[kind]
            return number.unpack(self.take(number.size, key))[0], None
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        raise self.error(f"is corrupt: {key} has the unknown type {kind}")

    def _string(self, key: str) -> tuple[str | None, int | None]:
        length = self.count(f"the length of {key}", 1)
        if length > _MAX_TEXT_BYTES:
            self._offset += length
            return None, length
        # llama.cpp does not look at what is in a text, so a stray byte must not make the model unusable
        return self.take(length, key).decode(errors="replace"), None

    def _array(self, key: str) -> tuple[Value | None, int | None]:
        kind = self.u32(f"the type of {key}")
        if kind == _STRING:
            length = self.count(key, 8)
            self._skip_strings(length, key)
            return None, length
        if kind not in _FIXED:
            raise self.error(f"is corrupt: {key} is an array of the unsupported type {kind}")
        one = _FIXED[kind]
        length = self.count(key, one.size)
        if length > _MAX_ARRAY:
            self._offset += length * one.size
            return None, length
        items = struct.unpack(f"<{length}{one.format[1:]}", self.take(length * one.size, key))
        return items, length

    def _skip_strings(self, count: int, key: str) -> None:
        """Move behind *count* strings; a vocabulary has 100,000s, hence the inner loop without calls of ours."""
        unpack = _U64.unpack_from
        while count:
            self._need(8, key)
            chunk, offset, last = self._chunk, self._offset, len(self._chunk) - 8
            while count and offset <= last:
                offset += 8 + unpack(chunk, offset)[0]
                count -= 1
            self._offset = offset
            self._check(0, key)

    def _check(self, count: int, what: str) -> None:
        """Raise if the file has no *count* bytes from here on."""
        end = self.position + count
        if end > self.file_bytes:
            raise self.truncated(what, end)
        if end > _MAX_HEADER_BYTES:
            raise self.error(f"is corrupt: {what} would end at byte {end} of the header, far more than any model has")

    def _need(self, count: int, what: str) -> None:
        """Have *count* bytes at the cursor in the chunk."""
        if self._offset + count <= len(self._chunk):
            return
        self._check(count, what)
        start = self.position
        self._file.seek(start)
        self._chunk = self._file.read(max(count, _CHUNK_BYTES))
        self._chunk_at, self._offset = start, 0
        if len(self._chunk) < count:  # it shrank while we read
            raise self.truncated(what, start + count)
