"""What a Noise link costs: ``python -m benchmarks.link_micro`` (``--json``: the last line is one JSON object).

Both ends are in this one process, on uvloop and loopback, so a figure of work is that of both sides together and a
figure of speed is what one core does for both. The same traffic over plain TCP is measured right beside it: what a link
adds is the difference. Every figure is the best of five rounds; the machine's other work only makes them worse.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from collections.abc import Callable

import msgspec
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.net.links import LinkLimits, Links
from mesh.net.noise import Session
from mesh.net.noise_hello import Binding, encode_hello, verify_hello
from mesh.net.noise_records import Opener, Sealer
from mesh.net.rate_limit import Rate

_ROUNDS = 5
_EVENT = os.urandom(200)
_BLOCK = os.urandom(65536)
_PSK = os.urandom(32)
_BACKLOG_BYTES = 262144  # what the writer lets pile up before it waits


class Figures(msgspec.Struct):
    """Times are CPU time."""

    handshake_initiator_us: float
    handshake_responder_us: float
    record_200_us: float  #: sealed and opened
    record_64k_us: float
    link_mb_per_s: float  #: 64 KiB writes
    tcp_mb_per_s: float
    link_events_per_s: float  #: 200 bytes, one write each
    tcp_events_per_s: float
    link_event_cpu_us: float
    tcp_event_cpu_us: float
    paced_link_event_cpu_us: float  #: one event in each turn of the loop, so one system call each to write and read
    paced_tcp_event_cpu_us: float


class _Key:
    """An identity that is on no disk."""

    rotation = None

    def __init__(self) -> None:
        self._private = Ed25519PrivateKey.generate()
        self.key = PeerKey(self._private.public_key().public_bytes_raw())
        self.noise_private = X25519PrivateKey.generate().private_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


class _Hellos:
    def __init__(self, identity: _Key) -> None:
        self._identity = identity

    def make(self, binding: Binding) -> bytes:
        return encode_hello(self._identity, "bench", "1.0", binding)

    def check(self, content: bytes, binding: Binding) -> PeerIdentity:
        return verify_hello(content, binding)[0]


class _Everybody:
    def admit(self, key: PeerKey, node_id: str, rotation: bytes | None) -> None:
        pass


def _best(round_: Callable[[], float], rounds: int) -> float:
    return min(round_() for _ in range(rounds))


# --- without a network


def _handshake(count: int) -> tuple[float, float]:
    """Return the seconds that *count* handshakes take the initiator and the responder."""
    keys = _Key(), _Key()
    spent = [0.0, 0.0]

    def make(number: int) -> Session:
        key = keys[number]
        hellos = _Hellos(key)
        return Session(initiator=number == 0, psk=_PSK, static_private=key.noise_private, hellos=hellos)

    for _ in range(count):
        sessions = []
        for number in (0, 1):
            began = time.process_time()
            sessions.append(make(number))
            spent[number] += time.process_time() - began
        for number in (1, 0, 1, 0):  # who receives
            data = sessions[1 - number].data_to_send()
            began = time.process_time()
            sessions[number].receive_data(data)
            spent[number] += time.process_time() - began
    return spent[0], spent[1]


def _records(content: bytes, count: int) -> float:
    """Return the seconds that it takes to seal and open *content* *count* times."""
    key = os.urandom(32)
    sealer, opener = Sealer(key), Opener(key)
    seal_all, open_ = sealer.seal_all, opener.open
    seal = sealer.seal if len(content) < 65000 else None
    began = time.process_time()
    for _ in range(count):
        for record in seal_all(content) if seal is None else (seal(content),):
            open_(record)
    return time.process_time() - began


# --- over loopback


class _Sink(asyncio.Protocol):
    """Counts what arrives."""

    def __init__(self) -> None:
        self.received = 0
        self.wanted = 0
        self.done: asyncio.Future[None] | None = None

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.done is not None and self.received >= self.wanted and not self.done.done():
            self.done.set_result(None)

    async def expect(self, size: int) -> None:
        """Wait until *size* bytes more are here."""
        self.wanted += size
        self.done = asyncio.get_running_loop().create_future()
        if self.received < self.wanted:
            await self.done


class _Source(asyncio.Protocol):
    def __init__(self) -> None:
        self._free = asyncio.Event()
        self._free.set()
        self.pause_writing = self._free.clear  # type: ignore[method-assign]
        self.resume_writing = self._free.set  # type: ignore[method-assign]

    async def send(self, transport: asyncio.Transport, content: bytes, count: int, per_turn: int) -> None:
        write, is_free, free = transport.write, self._free.is_set, self._free.wait
        for number in range(count):
            write(content)
            if not is_free():
                await free()
            elif number % per_turn == 0:
                await asyncio.sleep(0)


async def _run(
    transport: asyncio.Transport, source: _Source, sink: _Sink, content: bytes, count: int, per_turn: int
) -> tuple[float, float]:
    """Return wall and CPU seconds until all is there."""
    wall, cpu = time.perf_counter(), time.process_time()
    arrival = asyncio.get_running_loop().create_task(sink.expect(len(content) * count))
    await asyncio.sleep(0)
    await source.send(transport, content, count, per_turn)
    await arrival
    return time.perf_counter() - wall, time.process_time() - cpu


async def _traffic(
    transport: asyncio.Transport, source: _Source, sink: _Sink, scale: float, rounds: int
) -> tuple[float, ...]:
    """Return MB/s, events/s, CPU us per event, and that of paced events."""
    transport.set_write_buffer_limits(high=_BACKLOG_BYTES)
    blocks, events, paced = max(20, int(3000 * scale)), max(100, int(100_000 * scale)), max(50, int(20_000 * scale))
    best = [0.0, 0.0, 1e9, 1e9]
    for _ in range(rounds):
        wall, _ = await _run(transport, source, sink, _BLOCK, blocks, 4)
        best[0] = max(best[0], blocks * len(_BLOCK) / 1e6 / wall)
        wall, cpu = await _run(transport, source, sink, _EVENT, events, 32)
        best[1] = max(best[1], events / wall)
        best[2] = min(best[2], cpu / events * 1e6)
        _, cpu = await _run(transport, source, sink, _EVENT, paced, 1)
        best[3] = min(best[3], cpu / paced * 1e6)
    return tuple(best)


async def _over_links(scale: float, rounds: int) -> tuple[float, ...]:
    sink = _Sink()
    unlimited = LinkLimits(known=Rate(1e9, 1e9))

    def links(node_id: str) -> Links:
        return Links(
            identity=_Key(),
            psk=_PSK,
            trust=_Everybody(),
            node_id=node_id,
            version="1.0",
            serve=lambda: sink,
            limits=unlimited,
        )

    one, two = links("one"), links("two")
    server = await asyncio.get_running_loop().create_server(two.accept, "127.0.0.1", 0)
    try:
        link, source = await one.dial("127.0.0.1", server.sockets[0].getsockname()[1], _Source, timeout_s=5)
        return await _traffic(link, source, sink, scale, rounds)
    finally:
        server.close()
        await one.close()
        await two.close()


async def _over_tcp(scale: float, rounds: int) -> tuple[float, ...]:
    sink, loop = _Sink(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: sink, "127.0.0.1", 0)
    address: tuple[str, int] = server.sockets[0].getsockname()
    transport, source = await loop.create_connection(_Source, *address)
    try:
        return await _traffic(transport, source, sink, scale, rounds)
    finally:
        transport.abort()
        server.close()
        await asyncio.sleep(0.01)


def measure(scale: float = 1.0, rounds: int = _ROUNDS) -> Figures:
    """Return the figures; *scale* below 1 measures less and so worse."""
    handshakes = max(5, int(300 * scale))
    both = [_handshake(handshakes) for _ in range(rounds)]
    small, large = max(100, int(50_000 * scale)), max(10, int(1000 * scale))
    record_200 = _best(lambda: _records(_EVENT, small), rounds) / small
    record_64k = _best(lambda: _records(_BLOCK, large), rounds) / large
    link = uvloop.run(_over_links(scale, rounds))
    tcp = uvloop.run(_over_tcp(scale, rounds))
    return Figures(
        handshake_initiator_us=min(each[0] for each in both) / handshakes * 1e6,
        handshake_responder_us=min(each[1] for each in both) / handshakes * 1e6,
        record_200_us=record_200 * 1e6,
        record_64k_us=record_64k * 1e6,
        link_mb_per_s=link[0],
        tcp_mb_per_s=tcp[0],
        link_events_per_s=link[1],
        tcp_events_per_s=tcp[1],
        link_event_cpu_us=link[2],
        tcp_event_cpu_us=tcp[2],
        paced_link_event_cpu_us=link[3],
        paced_tcp_event_cpu_us=tcp[3],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link_micro", description="What a Noise link costs.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="measure X times as much (default 1)")
    options = parser.parse_args(arguments)
    figures = measure(options.scale)
    rounded = {name: round(value, 2) for name, value in msgspec.structs.asdict(figures).items()}
    if options.json:
        print(msgspec.json.encode(rounded).decode())
    else:
        for name, value in rounded.items():
            print(f"{name:26}{value:>14,.2f}")


if __name__ == "__main__":
    main()
