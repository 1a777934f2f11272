"""A body in pieces, as fast as it is taken."""

from __future__ import annotations

import asyncio
from typing import cast

from mesh.api.sender import ONE_PIECE_BYTES, BodySender


class _Transport:
    """Keeps what is written; ``takes`` writes later it says that it has enough."""

    def __init__(self, takes: int = 10**9) -> None:
        self.written: list[bytes] = []
        self.takes = takes
        self.sender: BodySender | None = None
        self.closing = False

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.takes -= 1
        if self.takes == 0 and self.sender is not None:
            self.sender.pause()

    def is_closing(self) -> bool:
        return self.closing


def sender(transport: _Transport, *parts: bytes | memoryview) -> BodySender:
    made = transport.sender = BodySender(cast(asyncio.Transport, transport), parts)
    return made


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_is_cut_into_pieces_and_some_go_out_in_each_turn() -> None:
    transport = _Transport()
    body = bytes(range(256)) * (ONE_PIECE_BYTES // 256) * 9 + b"end"
    sending = sender(transport, b"first", memoryview(body))
    sending.resume()
    assert len(transport.written) == 4
    assert not sending.done
    await turns()
    assert b"".join(transport.written) == b"first" + body
    assert max(map(len, transport.written)) == ONE_PIECE_BYTES
    assert {type(piece) for piece in transport.written} == {bytes}
    assert (sending.done, sending.bytes_sent) == (True, len(body) + 5)


async def test_nothing_is_written_while_the_transport_has_enough() -> None:
    transport = _Transport(takes=2)
    sending = sender(transport, b"x" * ONE_PIECE_BYTES * 6)
    sending.resume()
    await turns()
    assert len(transport.written) == 2
    transport.takes = 1
    sending.resume()
    await turns()
    assert len(transport.written) == 3
    sending.resume()
    await turns()
    assert len(transport.written) == 6
    assert sending.done


async def test_resumed_twice_it_writes_nothing_twice() -> None:
    transport = _Transport()
    sending = sender(transport, b"x" * ONE_PIECE_BYTES * 20)
    sending.resume()
    sending.resume()
    assert len(transport.written) == 4
    await turns()
    assert len(transport.written) == 20


async def test_stopped_or_closed_it_writes_nothing_more() -> None:
    for stop in (True, False):
        transport = _Transport()
        sending = sender(transport, b"x" * ONE_PIECE_BYTES * 20)
        sending.resume()
        if stop:
            sending.stop()
        transport.closing = True
        await turns()
        assert len(transport.written) == 4
        assert not sending.done
