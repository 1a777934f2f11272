"""What is held until the end of a turn is written in order, once, and never to a transport that is closing."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from mesh.api.outbox import _MAX_HELD, Outbox
from tests.api.loopback import loopback


class Wire:
    """A transport that notes what it is given."""

    def __init__(self, written: list[tuple[str, bytes]], name: str) -> None:
        self._written = written
        self._name = name
        self.closing = False
        self.error: Exception | None = None
        self.aborted = False

    def is_closing(self) -> bool:
        return self.closing

    def write(self, data: bytes) -> None:
        if self.error is not None:
            raise self.error
        self._written.append((self._name, data))

    def abort(self) -> None:
        self.aborted = True


class Wires:
    def __init__(self) -> None:
        self.written: list[tuple[str, bytes]] = []
        self.outbox = Outbox(asyncio.get_running_loop())
        self.wires = {name: Wire(self.written, name) for name in "ab"}

    def write(self, name: str, data: bytes) -> None:
        self.outbox.write(cast(asyncio.Transport, self.wires[name]), data)


async def test_everything_is_written_in_order_before_the_loop_waits() -> None:
    wires = Wires()
    sent = [("a", b"1"), ("b", b"2"), ("a", b"3")]
    for name, data in sent:
        wires.write(name, data)
    assert wires.written == []
    await asyncio.sleep(0)
    assert wires.written == sent
    wires.write("b", b"4")
    wires.outbox.flush()
    wires.write("b", b"5")
    await asyncio.sleep(0)
    assert wires.written[3:] == [("b", b"4"), ("b", b"5")]


async def test_no_more_than_some_are_held() -> None:
    wires = Wires()
    for _ in range(_MAX_HELD):
        wires.write("a", b"x")
    assert len(wires.written) == _MAX_HELD


async def test_a_transport_that_is_closing_or_fails_does_not_concern_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wires = Wires()
    wires.write("a", b"1")
    wires.wires["a"].closing = True
    wires.write("b", b"2")
    await asyncio.sleep(0)
    assert wires.written == [("b", b"2")]
    wires.wires["a"].closing = False
    wires.wires["a"].error = RuntimeError("the handler is closed")
    wires.write("a", b"3")
    wires.write("b", b"4")
    await asyncio.sleep(0)
    assert wires.written[1:] == [("b", b"4")]
    assert wires.wires["a"].aborted
    assert "a write failed unexpectedly" in caplog.text


class Recorder:
    """A client's transport that notes what happens to it, in order."""

    def __init__(self) -> None:
        self.story: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.story.append(data)

    def abort(self) -> None:
        self.story.append("abort")

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> None:
        return None


async def test_what_was_answered_goes_out_before_the_connection_is_cut() -> None:
    async with loopback() as node:
        transport, connection = Recorder(), node.plane.protocol()
        connection.connection_made(cast(asyncio.Transport, transport))
        connection.write(b"half an answer")
        connection.cut_off(b"")
        assert transport.story == [b"half an answer", "abort"]
        connection.connection_lost(None)


async def test_what_is_large_goes_at_once_after_what_came_before() -> None:
    """Held back, it would hide from the reader's side that the transport has enough (back-pressure)."""
    wires = Wires()
    small, large = b"s", b"l" * 20_000
    wires.outbox.write(cast(asyncio.Transport, wires.wires["a"]), small)
    assert wires.written == []
    wires.outbox.write(cast(asyncio.Transport, wires.wires["b"]), large)
    assert wires.written == [("a", small), ("b", large)]
