"""Clients that send too much, too slowly or too early."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest

from tests.e2e.harness import Node
from tests.e2e.robustness import (
    CHAT,
    Client,
    Held,
    assert_at_rest,
    assert_same_fds,
    baseline,
    chat,
    client,
    content,
    fake_node,
    fake_profile,
    report,
    request,
)

LIMIT = 64 * 2**20


# -- bodies


def _padded(size: int) -> bytes:
    """Return a chat body of exactly *size* bytes whose last key is the model."""
    start, end = b'{"messages":[{"role":"user","content":"', b'"}],"model":"m"}'
    return start + b"a" * (size - len(start) - len(end)) + end


def _chunked(body: bytes, piece: int = 2**20) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces = [body[at : at + piece] for at in range(0, len(body), piece)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("framing", ["counted", "chunked"])
def test_bodies_up_to_the_limit_and_not_one_byte_more(tmp_path: Path, framing: str) -> None:
    """64 MiB with ``model`` as the last key is served; one byte more is a 413, and neither leaks (trap 72)."""
    make = (lambda body: request(CHAT, body)) if framing == "counted" else _chunked

    async def send(node: Node, size: int) -> tuple[int, bytes]:
        async with client(node) as one:
            one.send(make(_padded(size)))
            return await asyncio.wait_for(one.answer(), 60)

    with fake_node(tmp_path, {"m": fake_profile()}) as node:
        node.prewarm("m")
        before = baseline(node)
        start = time.monotonic()
        status, _ = asyncio.run(send(node, LIMIT))
        took_s = time.monotonic() - start
        assert status == 200
        status, body = asyncio.run(send(node, LIMIT + 1))
        assert status == 413, body
        assert json.loads(body)["error"]["type"] == "request_too_large"
        assert_at_rest(node)
        assert_same_fds(node, before)
        report(framing=framing, took_s=took_s, before=before, after=Held.by(node))
        assert Held.by(node).rss_mib < before.rss_mib + 150


def test_a_refused_body_is_not_read_to_its_end(tmp_path: Path) -> None:
    """What is too large by its own word is refused on its head; the client need not send a byte of it."""
    with fake_node(tmp_path, {"m": fake_profile()}) as node, node.connection() as raw:
        raw.send(f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Length: {LIMIT + 1}\r\n\r\n".encode())
        assert raw.answer()[0] == 413
        assert raw.rest() == b""


# -- slow senders


def test_slow_heads_and_bodies_end_with_408(tmp_path: Path) -> None:
    """A drip of bytes holds a connection no longer than the limits say, and 300 of them disturb nobody."""
    limits = {"head_read_timeout_ms": 1500, "body_read_timeout_ms": 1500, "protocol_detect_timeout_ms": 1500}
    with fake_node(tmp_path, {"m": fake_profile()}, {"http": limits}) as node:
        node.prewarm("m")
        before = baseline(node)

        async def drip(kind: int) -> tuple[int, float]:
            one = await Client.connect(node)
            start = time.monotonic()
            body_at = {0: 8, 1: -30, 2: 0}[kind]  # in the head, in the body, before the method is whole
            whole = chat("m")
            one.send(whole[:body_at])
            answer = asyncio.ensure_future(one.rest())
            for byte in whole[body_at:]:
                one.send(bytes([byte]))
                await asyncio.wait((answer,), timeout=0.3 if kind < 2 else 1.0)
                if answer.done():
                    break
            text = await answer
            took_s = time.monotonic() - start
            await one.close()
            return int(text.split()[1]) if text else 0, took_s

        async def scenario() -> list[tuple[int, float]]:
            drips = [asyncio.ensure_future(drip(n % 3)) for n in range(300)]
            await asyncio.sleep(0.5)
            async with client(node) as other:
                assert (await other.ask(chat("m")))[0] == 200
            return await asyncio.gather(*drips)

        results = asyncio.run(scenario())
        assert {status for status, _ in results[0::3]} == {408}
        assert {status for status, _ in results[1::3]} == {408}
        assert {status for status, _ in results[2::3]} == {0}, "not HTTP yet: closed without a word"
        assert max(took_s for _, took_s in results) < 6
        assert_at_rest(node)
        assert_same_fds(node, before)


def test_a_slow_body_that_moves_is_not_cut(tmp_path: Path) -> None:
    """``body_read_timeout_ms`` is a silence: an upload over a slow line may take many times as long."""
    with fake_node(tmp_path, {"m": fake_profile()}, {"http": {"body_read_timeout_ms": 1000}}) as node:
        body = _padded(400_000)

        async def scenario() -> int:
            async with client(node) as one:
                one.send(request(CHAT, body)[: -len(body)])
                for at in range(0, len(body), 40_000):
                    await asyncio.sleep(0.25)
                    one.send(body[at : at + 40_000])
                status, _ = await asyncio.wait_for(one.answer(), 10)
                return status

        assert asyncio.run(scenario()) == 200


# -- early senders


def test_an_answer_that_overtakes_the_body_keeps_the_connection(tmp_path: Path) -> None:
    """Most clients write head and body apart; an answer before the body must not cost them their connection."""
    body = json.dumps({"model": "m", "content": "a" * 100_000}).encode()
    chunks = _chunked(body).partition(b"\r\n\r\n")[2]
    framings = (f"Content-Length: {len(body)}", body), ("Transfer-Encoding: chunked", chunks)
    with fake_node(tmp_path, {"m": fake_profile()}) as node:
        for path in ("/healthz", "/nowhere", "/version", "/v1/models", "/admin/unload", "/tokenize"):
            with node.connection(timeout_s=5) as raw:
                for framing, coded in framings:
                    raw.send(f"POST {path} HTTP/1.1\r\nHost: t\r\n{framing}\r\n\r\n".encode())
                    time.sleep(0.05)
                    for at in range(0, len(coded), 30_000):
                        raw.send(coded[at : at + 30_000])
                        time.sleep(0.01)
                    status, headers, _ = raw.answer()
                    assert status in (200, 404, 405, 415), path
                    assert "connection" not in headers, path
                    raw.send(b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n")
                    assert raw.answer()[0] == 200, path


def test_pipelined_requests_are_answered_in_order(tmp_path: Path) -> None:
    """Inference, app routes and errors in one write; each answer once, in order, on one connection."""
    with fake_node(tmp_path, {"m": fake_profile(say="one two three four five six seven eight")}) as node:
        node.prewarm("m")
        rounds = 40
        get = b"GET %b HTTP/1.1\r\nHost: t\r\n\r\n"
        parts = [
            part
            for n in range(rounds)
            for part in (
                chat("m", max_tokens=n % 8 + 1),
                get % b"/version",
                chat("m", max_tokens=n % 8 + 1, stream=True),
                chat("nope"),
                get % b"/nowhere",
                request(CHAT, b"{"),
            )
        ]

        async def scenario() -> list[tuple[int, bytes]]:
            async with client(node) as one:
                one.send(b"".join(parts))
                return [await asyncio.wait_for(one.answer(), 20) for _ in parts]

        answers = asyncio.run(scenario())
        assert [status for status, _ in answers] == [200, 200, 200, 404, 404, 400] * rounds
        for n in range(rounds):
            words = " ".join(["one", "two", "three", "four", "five", "six", "seven", "eight"][: n % 8 + 1])
            assert json.loads(answers[6 * n][1])["choices"][0]["message"]["content"] == words
            assert content(answers[6 * n + 2][1]) == words
        assert_at_rest(node)


def test_a_pipeliner_that_never_reads_cannot_fill_the_node(tmp_path: Path) -> None:
    """What is sent ahead is read up to a bound, and answers that nobody takes stop the reading (back-pressure)."""
    with fake_node(tmp_path, {"m": fake_profile(reply_bytes=20_000)}) as node:
        node.prewarm("m")
        before = baseline(node)

        async def scenario() -> None:
            one = await Client.connect(node, limit=2**10)
            get = b"GET /v1/models HTTP/1.1\r\nHost: t\r\n\r\n"
            one.send((chat("m") + get * 3) * 20_000)
            await asyncio.sleep(2)
            assert Held.by(node).rss_mib < before.rss_mib + 20
            one.vanish(reset=True)

        asyncio.run(scenario())
        assert_at_rest(node)
        assert_same_fds(node, before)
