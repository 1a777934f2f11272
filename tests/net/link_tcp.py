"""A TCP transport that goes nowhere."""

from __future__ import annotations

import asyncio
from typing import Any


class FakeTcp(asyncio.Transport):
    """The TCP transport below a link, without a loop: what it was told, and what was written."""

    def __init__(self) -> None:
        super().__init__(extra={"peername": ("192.0.2.1", 4711)})
        self.written = b""
        self.writes = 0
        self.reading = True
        self.ended: str | None = None
        self.protocol: Any = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def write(self, data: Any) -> None:
        self.written += data
        self.writes += 1

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def pause_reading(self) -> None:
        assert self.reading
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.reading
        self.reading = True

    def close(self) -> None:
        self.ended = self.ended or "close"

    def abort(self) -> None:
        self.ended = "abort"

    def is_closing(self) -> bool:
        return self.ended is not None

    def take(self) -> bytes:
        written, self.written = self.written, b""
        return written
