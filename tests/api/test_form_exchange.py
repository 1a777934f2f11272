"""Forms end to end over sockets: as they came or adapted, and given back once whatever happens."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.api import spool
from mesh.engine.kind import Answer
from mesh.errors import InstanceError, RequestError
from tests.api.forms import PATH, FakeAdapter, adapter, field, file, form, form_head, post_form, whisper
from tests.api.loopback import LoopbackNode, get, loopback, post, profile
from tests.api.mesh_pair import MeshNode, mesh_node, met
from tests.fakes import ScriptedUpstream, die, hang, json_reply, reply, then_hang

__all__ = ["adapter"]

SEES = profile("sees", args=("--mmproj", "x.gguf"))
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def nothing_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No upload is left, neither as a file nor as an open one."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield
    if spool.spool_directory().exists():
        assert list(spool.spool_directory().iterdir()) == []
    assert uploads_open() == 0


def uploads_open() -> int:
    """Return how many descriptors of uploads this process has, those of mappings included."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "llama-mesh-" in os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def ask(node: LoopbackNode, request: bytes) -> Any:
    client = await node.client()
    client.send(request)
    return await client.answer()


def error_of(answer: Any) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.body)["error"]
    return error


# --- as it came


@pytest.mark.parametrize("size", [10, 300_000, 3 * MEBIBYTE])
@pytest.mark.parametrize("last", [True, False])
async def test_a_llama_server_gets_the_form_as_it_came(size: int, last: bool) -> None:
    parts = (file(noise(size)), field("model", "sees"))
    parts = parts if last else parts[::-1]
    async with ScriptedUpstream(json_reply(b'{"text":"hi"}')) as upstream, loopback(upstream, profiles=(SEES,)) as node:
        answer = await ask(node, post_form(*parts, extra=b"Authorization: Bearer secret\r\n"))
        assert (answer.status, answer.body) == (200, b'{"text":"hi"}')
        assert (answer.field(b"x-llama-mesh-node"), answer.field(b"x-llama-mesh-instance")) == (b"node-1", b"tiny-1")
        (request,) = upstream.requests
        assert request.body == form(*parts)
        assert request.request_line == b"POST /v1/audio/transcriptions HTTP/1.1"
        assert request.field(b"content-type")[0].startswith(b"multipart/form-data; boundary=")
        assert request.field(b"authorization") == []
        await node.settled()
        line = node.access.lines[0]
        assert (line["status"], line["bytes_in"], line["error"]) == (200, len(request.body), None)


async def test_a_chunked_form_in_small_reads() -> None:
    body = form(file(noise(2 * MEBIBYTE)), field("model", "sees"))
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream, profiles=(SEES,)) as node:
        client = await node.client()
        client.send(form_head(None))
        for start in range(0, len(body), 100_001):
            piece = body[start : start + 100_001]
            client.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await client.writer.drain()
        client.send(b"0\r\n\r\n")
        assert (await client.answer()).status == 200
        assert upstream.requests[0].body == body


async def test_the_default_model_and_a_continue() -> None:
    body = form(file(b"x"))
    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=(SEES,), default_model="sees") as node,
    ):
        client = await node.client()
        client.send(form_head(len(body), extra=b"Expect: 100-continue\r\n"))
        assert await client.reader.readexactly(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(body)
        assert (await client.answer()).status == 200
        client.send(post_form(file(b"y")) + get(b"/app"))
        assert (await client.answer()).status == 200
        assert (await client.answer()).body == b"GET /app 0"


# --- adapted


@pytest.mark.parametrize("size", [10, 2 * MEBIBYTE])
async def test_a_whisper_server_gets_what_its_adapter_makes(adapter: FakeAdapter, size: int) -> None:
    native = b"HTTP/1.1 200 OK\r\nContent-Type: a/b\r\nContent-Length: 4\r\n\r\n"
    async with (
        ScriptedUpstream(reply(native, b"te", b"xt")) as upstream,
        loopback(upstream, profiles=(whisper(),)) as node,
    ):
        client = await node.client()
        for _ in range(2):
            client.send(post_form(field("model", "tiny"), file(noise(size)), field("a", "b"), extra=b"Accept: x\r\n"))
            answer = await client.answer()
            assert (answer.status, answer.body, answer.field(b"content-type")) == (200, b"<text>", b"text/plain")
            assert answer.field(b"x-llama-mesh-instance") == b"tiny-1"
            assert answer.field(b"connection") is None
        request = upstream.requests[1]
        fields, _, audio = request.body.partition(b"\n")
        assert json.loads(fields) == {"path": PATH.decode(), "fields": [["model", "tiny"], ["a", "b"]]}
        assert audio == noise(size)
        assert request.request_line == b"POST /native HTTP/1.1"
        assert request.field(b"content-type") == [b"x/y"]
        assert request.field(b"connection") == [b"close"]
        assert request.field(b"accept") == []
        assert upstream.connections == 2
        assert not node.admission.endpoint.pool.open
        assert adapter.answers[0] == (200, "a/b", b"text", [])
        await node.settled()
        assert [lease.ended for lease in node.admission.leases] == [["release"]] * 2


async def test_an_error_is_told_from_what_the_instance_logged_since(adapter: FakeAdapter) -> None:
    log = ["old"]

    async def fail(request: Any, reader: Any, writer: Any) -> None:
        log.extend(["why", "because"])
        await json_reply(b"Invalid request", b"500 Oops")(request, reader, writer)

    async with (
        ScriptedUpstream(fail) as upstream,
        loopback(upstream, profiles=(whisper(),)) as node,
    ):
        endpoint = node.admission.endpoint
        endpoint.log_lines = lambda: len(log)
        endpoint.log_tail = lambda count: log[max(0, len(log) - count) :]
        client = await node.client()
        client.send(post_form(field("model", "tiny"), file(b"x")))
        answer = await client.answer()
        assert (answer.status, error_of(answer)["source"]) == (503, "instance")
        assert error_of(answer)["message"] == "it failed: ['why', 'because']"
        adapter.answered = RequestError("cannot be decoded")
        client.send(post_form(field("model", "tiny"), file(b"x")))
        answer = await client.answer()
        assert (answer.status, error_of(answer)["message"]) == (400, "cannot be decoded")
        adapter.answered = Answer(418, b"a/b", b"")
        client.send(post_form(field("model", "tiny"), file(b"x")))
        answer = await client.answer()
        assert (answer.status, answer.body, answer.field(b"content-type")) == (418, b"", b"a/b")


async def test_a_form_that_its_adapter_refuses_is_never_queued(adapter: FakeAdapter) -> None:
    async with loopback(profiles=(whisper(),)) as node:
        client = await node.client()
        client.send(post_form(field("model", "tiny")) + get(b"/app"))
        answer = await client.answer()
        assert (answer.status, error_of(answer)["message"]) == (400, "no file")
        assert (await client.answer()).status == 200
        assert node.admission.tickets == []


async def test_an_adapter_with_a_bug_is_a_500(adapter: FakeAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Any:
        del args  # pytest keeps what was logged, and with it this frame
        raise ZeroDivisionError

    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=(whisper(),)) as node,
    ):
        monkeypatch.setattr(adapter, "answer", fail)
        answer = await ask(node, post_form(field("model", "tiny"), file(b"x")))
        assert (answer.status, error_of(answer)["type"]) == (500, "internal_error")
        monkeypatch.setattr(adapter, "upload", fail)
        answer = await ask(node, post_form(field("model", "tiny"), file(noise(2 * MEBIBYTE))))
        assert (answer.status, error_of(answer)["type"]) == (500, "internal_error")


async def test_an_answer_that_ends_with_the_connection(adapter: FakeAdapter) -> None:
    async with (
        ScriptedUpstream(reply(b"HTTP/1.1 200 OK\r\n\r\n", b"abc", close=True)) as upstream,
        loopback(upstream, profiles=(whisper(),)) as node,
    ):
        assert (await ask(node, post_form(field("model", "tiny"), file(b"x")))).body == b"<abc>"


async def test_an_answer_that_comes_slowly_is_not_silence(adapter: FakeAdapter) -> None:
    async def slow(request: Any, reader: Any, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n")
        for _ in range(30):
            await asyncio.sleep(0.05)
            writer.write(b"x")

    async with (
        ScriptedUpstream(slow) as upstream,
        loopback(upstream, profiles=(whisper(),), settings={"upstream_read_timeout_ms": 700}) as node,
    ):
        answer = await ask(node, post_form(field("model", "tiny"), file(b"x")))
        assert (answer.status, answer.body) == (200, b"<%b>" % (b"x" * 30))


async def test_a_form_of_two_kinds_is_refused() -> None:
    async with loopback(profiles=(SEES,)) as node:
        answer = await ask(node, post_form(file(b"x"), extra=b"content-Type: text/plain\r\n"))
        assert (answer.status, "more than one Content-Type" in error_of(answer)["message"]) == (400, True)


# --- who can do what


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        (post_form(field("model", "text"), file(b"x")), 404, "takes no audio.*engine: whisper"),
        (post_form(field("model", "what"), file(b"x")), 404, "not found"),
        (post_form(field("model", ""), file(b"x")), 400, "non-empty string"),
        (post_form(file(b"x")), 400, "names no 'model'"),
        (post(b'{"model":"tiny"}'), 400, "'tiny' is for audio: /v1/audio/transcriptions"),
        (post(b'{"model":"tiny"}', path=b"/tokenize"), 400, "is for audio"),
        (post(b'{"model":"tiny"}', path=b"/v1/embeddings"), 404, "not configured for embeddings"),
        (post(b'{"model":"tiny"}', path=PATH), 415, "multipart/form-data.*is application/json"),
        (form_head(0), 400, "the body is empty"),
    ],
)
async def test_what_cannot_be_served(request_: bytes, status: int, text: str) -> None:
    async with loopback(profiles=(whisper(), profile("text"))) as node:
        client = await node.client()
        client.send(request_ + get(b"/app"))
        answer = await client.answer()
        assert answer.status == status
        assert re.search(text, error_of(answer)["message"])
        assert (await client.answer()).body == b"GET /app 0"


async def test_limits_of_forms_are_their_own() -> None:
    limits = {"request_body_limit_bytes": 1000, "upload_limit_bytes": 5000}
    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=(SEES,), http=limits) as node,
    ):
        assert (await ask(node, post_form(field("model", "sees"), file(b"x" * 3000)))).status == 200
        answer = await ask(node, form_head(5001))
        assert (answer.status, error_of(answer)["type"]) == (413, "request_too_large")
        assert "http.upload_limit_bytes (5000)" in error_of(answer)["message"]
        assert (await ask(node, post(b" " * 1001))).status == 413
        answer = await ask(node, form_head(None) + b"1400\r\n" + b"x" * 5120)
        assert answer.status in (400, 413)


async def test_a_form_limit_below_the_others() -> None:
    async with loopback(profiles=(SEES,), http={"upload_limit_bytes": 100}) as node:
        assert (await ask(node, form_head(101))).status == 413
        assert (await ask(node, post(b'{"model":"%b"}' % (b"x" * 200)))).status == 404


# --- what goes wrong


async def test_no_room_for_an_upload_is_a_507(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=(SEES,)) as node,
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", full)
            for size in (MEBIBYTE + 1, 8 * MEBIBYTE):
                client = await node.client()
                client.send(post_form(field("model", "sees"), file(noise(size))))
                answer = await client.answer()
                assert (answer.status, error_of(answer)["type"]) == (507, "insufficient_storage")
                assert "no room for this upload" in error_of(answer)["message"]
        assert (await ask(node, post_form(field("model", "sees"), file(noise(2 * MEBIBYTE))))).status == 200


async def test_a_client_that_leaves_in_the_middle_of_its_upload() -> None:
    async with loopback(profiles=(SEES,)) as node:
        client = await node.client()
        client.send(form_head(50 * MEBIBYTE) + form(file(noise(3 * MEBIBYTE)))[:-10])
        await node.until(lambda: uploads_open() == 1)
        client.abort()
        await node.until(lambda: uploads_open() == 0)
        await node.until(lambda: not node.plane.connections)
        assert node.admission.tickets == []


async def test_a_client_that_stops_in_the_middle_of_its_upload() -> None:
    async with loopback(profiles=(SEES,), http={"body_read_timeout_ms": 50}) as node:
        client = await node.client()
        client.send(form_head(50 * MEBIBYTE) + form(file(noise(3 * MEBIBYTE)))[:-10])
        answer = await client.answer()
        assert answer.status == 408
        await node.until(lambda: uploads_open() == 0)


@pytest.mark.parametrize("adapted", [True, False])
async def test_a_client_that_leaves_while_the_form_waits_or_is_sent(adapter: FakeAdapter, adapted: bool) -> None:
    async def stall(request: Any, reader: Any, writer: Any) -> None:
        raise AssertionError

    profiles = (whisper(),) if adapted else (profile(args=("--mmproj", "x")),)
    async with ScriptedUpstream(stall) as upstream, loopback(upstream, profiles=profiles) as node:
        node.admission.hold = True
        upload = post_form(field("model", "tiny"), file(noise(30 * MEBIBYTE)))
        client = await node.client()
        client.send(upload)
        await node.admission.ticket()
        client.abort()
        await node.until(lambda: node.admission.tickets[0].cancelled and uploads_open() == 0)
        client = await node.client()
        upstream.on_connect = lambda writer: writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(upload)
        (await node.admission.ticket(1)).admit()
        await node.until(lambda: upstream.connections == 1)
        await asyncio.sleep(0.05)
        (connection,) = node.admission.endpoint.pool.open
        # never much more than one piece beyond what the kernel takes
        assert connection.transport.get_write_buffer_size() < MEBIBYTE
        assert 0 < connection.bytes_sent < 20 * MEBIBYTE
        client.abort()
        await node.until(lambda: node.admission.leases[0].ended == ["abandon"])
        await node.until(lambda: uploads_open() == 0)


async def test_a_form_is_sent_again_after_a_crash_and_let_go_when_the_answer_begins(adapter: FakeAdapter) -> None:
    gate = asyncio.Event()
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"

    async def slow(request: Any, reader: Any, writer: Any) -> None:
        writer.write(head + b"o")
        await gate.wait()
        writer.write(b"k")

    async with ScriptedUpstream(die, slow) as upstream, loopback(upstream, profiles=(whisper(),)) as node:
        client = await node.client()
        client.send(post_form(field("model", "tiny"), file(noise(2 * MEBIBYTE))))
        await upstream.until(lambda: len(upstream.requests) == 2)
        assert upstream.requests[0].body == upstream.requests[1].body
        await node.until(lambda: uploads_open() == 0)
        gate.set()
        assert (await client.answer()).body == b"<ok>"
        assert node.ctx.metrics.upstream_retries_total == 1


@pytest.mark.parametrize(
    "script",
    [
        reply(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", close=True),
        then_hang(b"nonsense\r\n\r\n"),
        reply(b"HTTP/1.1 200 O", close=True),
    ],
)
async def test_an_adapted_answer_that_breaks_is_a_502(adapter: FakeAdapter, script: Any) -> None:
    async with ScriptedUpstream(script) as upstream, loopback(upstream, profiles=(whisper(),)) as node:
        answer = await ask(node, post_form(field("model", "tiny"), file(b"x")))
        assert (answer.status, error_of(answer)["type"]) == (502, "upstream_error")
        assert len(upstream.requests) == 1


async def test_a_form_that_takes_too_long(adapter: FakeAdapter) -> None:
    async with ScriptedUpstream(hang) as upstream, loopback(upstream, profiles=(whisper(max_request_s=0.1),)) as node:
        answer = await ask(node, post_form(field("model", "tiny"), file(noise(2 * MEBIBYTE))))
        assert (answer.status, error_of(answer)["type"]) == (502, "request_timeout")
        assert node.admission.leases[0].ended == ["abandon"]


class Told:
    """What an instance is told of the uploads that it gets: ``begins`` and ``ends`` of each."""

    def __init__(self, node: LoopbackNode) -> None:
        self.events: list[tuple[str, int]] = []
        self.leases = node.admission.leases
        self.open_leases: list[int] = []  #: how many there were at each end
        self.granted: list[int] = []  #: how many there had been
        node.admission.endpoint.begin_upload = self.begin

    def begin(self) -> Callable[[], None]:
        number = len(self.events)
        self.events.append(("begins", number))
        return lambda: self.end(number)

    def end(self, number: int) -> None:
        self.events.append(("ends", number))
        self.granted.append(len(self.leases))
        self.open_leases.append(sum(not lease.ended for lease in self.leases))


OK = json_reply(b"{}")


@pytest.mark.parametrize(
    ("scripts", "uploads"),
    [
        ((OK,), 1),
        ((json_reply(b"no", b"400 Bad"),), 1),
        ((json_reply(b"no", b"500 Oops"),), 1),
        ((reply(b"HTTP/1.1 200 OK\r\n\r\nabc", close=True),), 1),
        ((reply(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", close=True),), 1),
        ((then_hang(b"nonsense\r\n\r\n"),), 1),
        ((hang,), 1),
        ((die, OK), 2),
        ((die, die), 2),
    ],
)
async def test_an_instance_is_told_of_the_end_of_each_upload(
    adapter: FakeAdapter, scripts: tuple[Any, ...], uploads: int
) -> None:
    """Answered, refused, broken off, too slow, and lost: once each, and the next one begins after it."""
    profiles = (whisper(max_request_s=1),)
    async with ScriptedUpstream(*scripts) as upstream, loopback(upstream, profiles=profiles) as node:
        told = Told(node)
        await ask(node, post_form(field("model", "tiny"), file(noise(2 * MEBIBYTE))))
        await node.settled()
        assert [event for event, _ in told.events] == ["begins", "ends"] * uploads
        assert told.granted == [*range(1, uploads + 1)], "not only when it is with the next one"
        assert all(first == second for (_, first), (_, second) in zip(*[iter(told.events)] * 2, strict=True))


async def test_an_upload_ends_with_the_whole_answer_before_another_request_may_begin(adapter: FakeAdapter) -> None:
    gate = asyncio.Event()

    async def slow(request: Any, reader: Any, writer: Any) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no")
        await gate.wait()
        writer.write(b"k")

    async with ScriptedUpstream(slow) as upstream, loopback(upstream, profiles=(whisper(),)) as node:
        told = Told(node)
        client = await node.client()
        client.send(post_form(field("model", "tiny"), file(b"x")))
        await node.until(lambda: bool(upstream.requests))
        await asyncio.sleep(0.05)
        assert told.events == [("begins", 0)]
        gate.set()
        await client.answer()
        assert told.open_leases == [1]


@pytest.mark.parametrize("shielded", [False, True])
async def test_an_upload_of_a_client_that_left_ends_when_the_instance_is_let_go(
    adapter: FakeAdapter, shielded: bool
) -> None:
    gate = asyncio.Event()

    async def slow(request: Any, reader: Any, writer: Any) -> None:
        await gate.wait()
        await OK(request, reader, writer)

    profiles = (whisper(drain_on_disconnect=shielded),)
    async with ScriptedUpstream(slow) as upstream, loopback(upstream, profiles=profiles) as node:
        told = Told(node)
        client = await node.client()
        client.send(post_form(field("model", "tiny"), file(b"x")))
        await node.until(lambda: bool(upstream.requests))
        client.abort()
        await node.until(lambda: node.ctx.metrics.client_disconnects_total == 1)
        assert (told.open_leases == []) is shielded
        gate.set()
        await node.settled()
        assert [event for event, _ in told.events] == ["begins", "ends"]


async def test_an_instance_that_reads_slowly_is_not_silent() -> None:
    async def slow(writer: asyncio.StreamWriter) -> None:
        for _ in range(8):
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.05)
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)

    tasks = set()
    settings = {"upstream_read_timeout_ms": 200}
    async with (
        ScriptedUpstream(json_reply(b"{}")) as upstream,
        loopback(upstream, profiles=(SEES,), settings=settings) as node,
    ):
        upstream.on_connect = lambda writer: tasks.add(asyncio.ensure_future(slow(writer)))
        assert (await ask(node, post_form(field("model", "sees"), file(noise(40 * MEBIBYTE))))).status == 200
        await asyncio.gather(*tasks)


async def test_large_json_goes_in_pieces_too() -> None:
    body = b'{"model":"tiny","x":"%b"}' % (b"y" * 3 * MEBIBYTE)
    async with ScriptedUpstream(json_reply(b"{}")) as upstream, loopback(upstream) as node:
        client = await node.client()
        for _ in range(2):
            client.send(post(body))
            assert (await client.answer()).status == 200
            assert upstream.requests[-1].body == body
        assert upstream.connections == 1


# --- in a mesh


async def test_a_peer_gets_the_form_as_it_came_and_adapts_it(adapter: FakeAdapter) -> None:
    upload = form(file(noise(5 * MEBIBYTE)), field("model", "tiny"))
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"hey"), profiles=(whisper(),))) as (front, back):
        front.knows(back, back.own.profile(whisper()))
        client = await front.client()
        client.send(form_head(len(upload)) + upload)
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"<hey>")
        assert answer.field(b"x-llama-mesh-node") == b"node-2"
        assert back.instance.requests[0].body.endswith(b"\n" + noise(5 * MEBIBYTE))
        assert len(adapter.uploads) == 1
        await front.settled()
        await back.settled()
        assert uploads_open() == 0


async def test_what_a_peer_can_do_is_known(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(SEES, whisper(), profile("text")))) as (
        front,
        back,
    ):
        front.knows(back, *(back.own.profile(p) for p in back.admission.catalog.profiles))
        for name, path, status in ((b"text", PATH, 404), (b"tiny", b"/v1/chat/completions", 400), (b"sees", PATH, 200)):
            form_ = post_form(field("model", name), file(b"x"))
            client = await front.client()
            client.send(form_ if path == PATH else post(b'{"model":"%b"}' % name))
            assert (await client.answer()).status == status
        assert [request.body for request in back.instance.requests] == [form(field("model", "sees"), file(b"x"))]


async def test_an_error_of_the_adapter_at_a_peer_is_the_answer(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        front.knows(back, back.own.profile(whisper()))
        client = await front.client()
        client.send(post_form(field("model", "tiny")))
        answer = await client.answer()
        assert (answer.status, error_of(answer)["message"]) == (400, "no file")


async def test_a_client_that_leaves_while_a_peer_has_its_form(adapter: FakeAdapter) -> None:
    async def left(front: MeshNode, back: MeshNode) -> None:
        client = await front.client()
        client.send(post_form(field("model", "tiny"), file(noise(20 * MEBIBYTE))))
        await back.instance.until(lambda: bool(back.instance.requests))
        client.abort()
        await front.until(lambda: not front.links_to(back))
        await back.settled()
        await front.settled()

    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(whisper(),))) as (front, back):
        front.knows(back, back.own.profile(whisper()))
        await left(front, back)
        gc.collect()
        await back.until(lambda: uploads_open() == 0)
        assert back.admission.leases[0].ended == ["abandon"]


async def test_an_instance_error_of_a_peer_keeps_its_words(adapter: FakeAdapter) -> None:
    adapter.answered = InstanceError("the audio is odd")
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        front.knows(back, back.own.profile(whisper(max_wait_s=0.1)))
        front.stand_in_wait_s = 0.1
        client = await front.client()
        client.send(post_form(field("model", "tiny"), file(b"x")))
        answer = await client.answer()
        assert answer.status == 503
        assert "the audio is odd" in error_of(answer)["message"]


async def test_an_instance_that_answers_before_it_has_read_all_is_not_used_again() -> None:
    """What it has not read would be taken for the next request."""
    async with ScriptedUpstream(hang) as upstream, loopback(upstream, profiles=(SEES,)) as node:
        upstream.on_connect = lambda writer: writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        for number in range(1, 3):
            node.admission.hold = True
            client = await node.client()
            client.send(post_form(field("model", "sees"), file(noise(30 * MEBIBYTE))))
            (await node.admission.ticket(number - 1)).admit()
            answer = await client.answer()
            assert (answer.status, answer.body) == (413, b"no")
            assert not node.admission.endpoint.pool.idle
            assert upstream.connections == number
