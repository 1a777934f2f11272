"""A large form that a node passes on: only that node keeps its file, and nothing is lost with an instance."""

from __future__ import annotations

import asyncio
import gc
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.api import client as client_module
from mesh.api import upstream as upstream_module
from mesh.api.form_reader import FormParser, FormReader
from mesh.api.form_stream import MAX_BEFORE_BYTES, MAX_TAGS_BYTES, MIN_FILE_BYTES, FormStream, file_last
from mesh.api.sender import BodySender, StreamedBody, StreamSender
from mesh.core.audio_format import HEAD_BYTES
from mesh.errors import CapacityError, RequestError, UnsupportedAudioError
from tests.api.forms import BOUNDARY, FakeAdapter, adapter, field, file, form, form_head, post_form, whisper
from tests.api.loopback import post
from tests.api.mesh_pair import MeshNode, mesh_node, met
from tests.api.test_form_exchange import MEBIBYTE, SEES, error_of, noise, nothing_stays_open, uploads_open
from tests.fakes import die, hang, json_reply

__all__ = ["adapter", "nothing_stays_open"]

KIND = f"multipart/form-data; boundary={BOUNDARY}"
AUDIO = noise(20 * MEBIBYTE)
FIRST = post_form(file(AUDIO), field("model", "tiny"), field("a", "b"))


def stalls(writer: Any) -> None:
    writer.transport.pause_reading()


def learn(front: MeshNode, *others: MeshNode) -> None:
    """Tell *front* what they have in truth."""
    for other in others:
        front.forgets(other)
        front.knows(other, *(other.own.profile(p) for p in other.admission.catalog.profiles))


async def sent(node: MeshNode, request: bytes = FIRST) -> Any:
    client = await node.client()
    client.send(request)
    return client


def audio_of(node: MeshNode, number: int = -1) -> bytes:
    fields, _, audio = node.instance.requests[number].body.partition(b"\n")
    assert json.loads(fields)["fields"] == [["model", "tiny"], ["a", "b"]]
    return audio


async def nothing_open(node: MeshNode) -> None:
    gc.collect()
    await node.until(lambda: uploads_open() == 0)


# --- one file for two nodes


async def test_only_the_node_that_was_asked_keeps_the_file(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, json_reply(b"hey"), profiles=(whisper(),))) as (front, back):
        learn(front, back)
        back.admission.hold = True
        client = await sent(front)
        ticket = await back.admission.ticket()
        assert uploads_open() == 1  # both nodes are in this process
        heard = len(back.heard)
        await front.turn(50)
        assert len(back.heard) == heard < 2 * MEBIBYTE  # the rest is not read before there is an instance for it
        assert [upload.path for upload in adapter.uploads] == [b"/native"]
        back.instance.on_connect = stalls
        ticket.admit()
        await back.until(lambda: bool(back.instance.writers))
        (connection,) = back.admission.endpoint.pool.open
        await back.until(lambda: connection.bytes_sent > 0)
        await asyncio.sleep(0.05)
        assert connection.transport.get_write_buffer_size() < MEBIBYTE // 2
        assert 0 < connection.bytes_sent < 15 * MEBIBYTE
        assert uploads_open() == 1
        back.instance.writers[0].transport.resume_reading()  # type: ignore[attr-defined]
        answer = await client.answer()
        assert (answer.status, answer.body) == (200, b"<hey>")
        assert audio_of(back) == AUDIO
        assert uploads_open() == 0
        back.admission.hold, back.instance.on_connect = False, None
        assert (await (await sent(front)).answer()).status == 200  # the link and all is in order
        assert len(front.dials) == 1
        await back.settled()
        assert {line["bytes_in"] for line in back.access.lines} == {len(back.instance.requests[0].body)}


async def test_a_llama_server_gets_the_parts_as_they_came_with_the_file_last() -> None:
    parts = field("a", "1"), file(AUDIO, filename="ä.wav"), field("model", "sees"), field("b", b"\r\n--\xff")
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(SEES,))) as (front, back):
        learn(front, back)
        for _ in range(2):  # on a new connection, and on a kept one
            assert (await (await sent(front, post_form(*parts))).answer()).status == 200
            assert back.instance.requests[-1].body == form(parts[0], parts[2], parts[3], parts[1])
            assert back.instance.requests[-1].field(b"content-type") == [KIND.encode()]
        assert back.instance.connections == len(front.dials) == 1


async def test_a_small_form_and_one_with_two_files_go_as_they_came() -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(SEES,))) as (front, back):
        learn(front, back)
        model = field("model", "sees")
        for parts in ((file(noise(MEBIBYTE // 2)), model), (file(AUDIO), file(b"x", name="other"), model)):
            assert (await (await sent(front, post_form(*parts))).answer()).status == 200
            assert back.instance.requests[-1].body == form(*parts)
        assert b"X-Llama-Mesh-Form" not in back.heard


async def test_a_node_that_does_not_know_the_field_keeps_the_form(
    adapter: FakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "form_stream", lambda head, length, owner: None)
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        back.admission.hold = True
        client = await sent(front)
        ticket = await back.admission.ticket()
        assert b"X-Llama-Mesh-Form: " in back.heard
        assert uploads_open() == 2
        ticket.admit()
        assert (await client.answer()).status == 200
        assert audio_of(back) == AUDIO


async def test_a_client_may_not_say_that_its_file_is_last(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=(whisper(),))) as (node,):
        extra = b"X-Llama-Mesh-Hops: 0\r\nX-Llama-Mesh-Form: 100\r\n"
        answer = await (await sent(node, post_form(file(AUDIO), field("model", "tiny"), extra=extra))).answer()
        assert answer.status == 200
        assert node.instance.requests[0].body.endswith(b"\n" + AUDIO)


# --- refused


@pytest.mark.parametrize("error", [RequestError("no", param="file"), UnsupportedAudioError("no", param="file")])
async def test_what_the_engine_cannot_read_is_not_even_queued(
    adapter: FakeAdapter, monkeypatch: pytest.MonkeyPatch, error: RequestError
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        with monkeypatch.context() as patched:
            patched.setattr(adapter, "upload", refuse)
            client = await sent(front)
            answer = await client.answer()
        assert (answer.status, error_of(answer)["type"]) == (error.status, error.type)
        assert back.admission.tickets == []
        client.send(FIRST)
        assert (await client.answer()).status == 200
        assert audio_of(back) == AUDIO
        await nothing_open(front)


async def test_a_full_node_is_asked_again(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        back.admission.refusal = CapacityError("full")
        client = await sent(front)
        await back.admission.ticket()
        back.admission.refusal = None
        front.late += 5
        assert (await client.answer()).status == 200
        assert audio_of(back) == AUDIO


async def test_it_is_not_passed_on_once_more(adapter: FakeAdapter) -> None:
    """A record may be old: who has the model no more says so, and the next one is asked."""
    nodes = mesh_node(1, profiles=()), mesh_node(2, profiles=()), mesh_node(3, profiles=(whisper(),))
    async with met(*nodes) as (front, middle, back):
        front.forgets(back)
        front.knows(middle, back.own.profile(whisper()))
        learn(middle, back)
        answer = await (await sent(front)).answer()
        assert answer.status == 404
        assert middle.dials == []
        await nothing_open(front)


# --- lost


async def test_an_instance_that_dies_with_the_file_is_replaced(adapter: FakeAdapter) -> None:
    for script, reads in ((die, True), (json_reply(b"hey"), False)):
        scripts = (script, json_reply(b"hey"))
        async with met(mesh_node(1, profiles=()), mesh_node(2, *scripts, profiles=(whisper(),))) as (front, back):
            learn(front, back)
            if not reads:  # it dies when it has got but a part
                back.instance.on_connect = stalls
            client = await sent(front)
            if not reads:
                await back.until(lambda back=back: bool(back.instance.writers))  # type: ignore[misc]
                await asyncio.sleep(0.02)
                back.instance.on_connect = None
                back.instance.writers[0].transport.abort()
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"<hey>")
            assert audio_of(back) == AUDIO
            assert [lease.ended for lease in back.admission.leases] == [["release"], ["release"]]
            assert (front.ctx.metrics.upstream_retries_total, back.ctx.metrics.upstream_retries_total) == (1, 0)
            await nothing_open(front)


async def test_a_kept_connection_that_breaks_with_the_file() -> None:
    request = post_form(field("model", "sees"), file(AUDIO))
    scripts = (json_reply(b"{}"), die, json_reply(b"{}"))
    async with met(mesh_node(1, profiles=()), mesh_node(2, *scripts, profiles=(SEES,))) as (front, back):
        learn(front, back)
        for _ in range(2):
            assert (await (await sent(front, request)).answer()).status == 200
        assert [r.connection for r in back.instance.requests] == [1, 1, 2]
        assert [r.body for r in back.instance.requests] == [form(field("model", "sees"), file(AUDIO))] * 3
        assert (front.ctx.metrics.upstream_retries_total, back.ctx.metrics.upstream_retries_total) == (1, 0)


async def test_it_is_sent_again_only_once(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, die, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        answer = await (await sent(front)).answer()
        assert (answer.status, error_of(answer)["type"]) == (502, "upstream_error")
        assert "closed the connection before it answered" in error_of(answer)["message"]
        assert len(back.instance.requests) == 2
        await nothing_open(front)


async def test_another_node_is_asked_then(adapter: FakeAdapter) -> None:
    nodes = mesh_node(1, profiles=()), mesh_node(2, die, profiles=(whisper(),)), mesh_node(3, profiles=(whisper(),))
    async with met(*nodes) as (front, bad, good):
        learn(front, bad)
        front.forgets(good)

        def known_from_now_on(writer: Any) -> None:
            front.knows(good, good.own.profile(whisper()))
            front.knows(bad, bad.own.profile(whisper()), draining=True)

        bad.instance.on_connect = known_from_now_on
        answer = await (await sent(front)).answer()
        assert (answer.status, answer.field(b"x-llama-mesh-node")) == (200, b"node-3")
        assert audio_of(good) == AUDIO
        assert len(bad.instance.requests) == 1


async def test_a_link_that_breaks_in_the_middle(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        back.instance.on_connect = stalls
        client = await sent(front)
        await back.until(lambda: bool(back.instance.writers))
        back.links_to(front)[0].abort()
        assert (await client.answer()).status == 502
        await back.until(lambda: back.admission.leases[0].ended == ["abandon"])
        await nothing_open(front)


async def test_a_connection_that_cannot_be_made_costs_nothing_of_the_file(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        port, back.admission.endpoint.port = back.admission.endpoint.port, 1
        client = await sent(front)
        await back.admission.until(lambda: len(back.admission.leases) == 1)
        back.admission.endpoint.port = port
        assert (await client.answer()).status == 200
        assert audio_of(back) == AUDIO
        assert front.ctx.metrics.upstream_retries_total == 0


# --- left


@pytest.mark.parametrize("queued", [True, False])
@pytest.mark.parametrize("shielded", [True, False])
async def test_a_client_that_leaves_is_noticed_though_nobody_reads(
    adapter: FakeAdapter, queued: bool, shielded: bool
) -> None:
    profiles = (whisper(drain_on_disconnect=shielded),)
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=profiles)) as (front, back):
        learn(front, back)
        back.admission.hold = queued
        back.instance.on_connect = stalls
        client = await sent(front)
        ticket = await back.admission.ticket()
        if not queued:
            await back.until(lambda: bool(back.instance.writers))
        client.abort()
        if queued:
            await back.until(lambda: ticket.cancelled)
        else:
            await back.until(lambda: back.admission.leases[0].ended == ["abandon"])
            assert not back.admission.endpoint.pool.open
        assert back.ctx.metrics.client_disconnects_total == 1
        await nothing_open(front)


async def test_a_client_that_leaves_while_the_instance_works(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(whisper(),))) as (front, back):
        learn(front, back)
        client = await sent(front)
        await back.instance.until(lambda: bool(back.instance.requests))
        client.abort()
        await back.instance.until(lambda: back.instance.lost == 1)
        assert back.admission.leases[0].ended == ["abandon"]
        await nothing_open(front)


# --- early, late


async def test_an_answer_before_the_file_was_read(adapter: FakeAdapter) -> None:
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(SEES,))) as (front, back):
        learn(front, back)
        back.instance.on_connect = lambda writer: writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        for _ in range(2):
            client = await sent(front, post_form(file(noise(40 * MEBIBYTE)), field("model", "sees")))
            answer = await client.answer()
            assert (answer.status, answer.body) == (413, b"no")
        await back.until(lambda: not back.admission.endpoint.pool.open)
        await nothing_open(front)


class _Node(asyncio.Protocol):
    """Another node, by hand."""

    def __init__(self) -> None:
        self.heard = b""
        self.lost = False

    def data_received(self, data: bytes) -> None:
        self.heard += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True


async def test_what_comes_after_an_early_answer_is_read_for_a_while_and_then_cut_off() -> None:
    head = form(field("model", "sees"), file(b""))[: -len(BOUNDARY) - 8]
    extra = b"X-Llama-Mesh-Hops: 1\r\nX-Llama-Mesh-Form: %d\r\n" % len(head)
    async with met(mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(SEES,))) as (front, back):
        back.instance.on_connect = lambda writer: writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        link, node = await front.links.dial("127.0.0.1", back.port, _Node, timeout_s=5, expect=back.identity.key)
        link.write(form_head(50 * MEBIBYTE, extra=extra) + head + AUDIO[:MEBIBYTE])
        await front.until(lambda: node.heard.endswith(b"\r\n\r\nno"))
        assert b"\r\nConnection: close\r\n" in node.heard
        link.write(AUDIO[:MEBIBYTE])
        await front.turn(20)
        assert not node.lost  # else it might not get to read the answer
        back.late += 3
        await front.until(lambda: node.lost)
        assert len(back.instance.requests) == 0


async def test_a_node_that_stops_sending_is_not_waited_for(
    adapter: FakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[BodySender] = []

    class Stops(BodySender):
        def __init__(self, transport: asyncio.Transport, body: Any) -> None:
            super().__init__(transport, body)
            made.append(self)

        def _write(self) -> None:
            if self.bytes_sent < MEBIBYTE:
                super()._write()

    monkeypatch.setattr(upstream_module, "BodySender", Stops)
    settings = {"http": {"body_read_timeout_ms": 300}, "upstream_read_timeout_ms": 100}  # the instance is not to blame
    nodes = mesh_node(1, profiles=()), mesh_node(2, hang, profiles=(whisper(),), settings=settings)
    async with met(*nodes) as (front, back):
        learn(front, back)
        answer = await (await sent(front)).answer()
        assert (answer.status, error_of(answer)["type"]) == (408, "request_timeout")
        assert made[0].bytes_sent < len(AUDIO)
        await back.until(lambda: back.admission.leases[0].ended == ["abandon"])
        await nothing_open(front)


async def test_json_on_the_same_link(adapter: FakeAdapter) -> None:
    nodes = mesh_node(1, profiles=()), mesh_node(2, profiles=(whisper(), SEES))
    async with met(*nodes) as (front, back):
        learn(front, back)
        for _ in range(2):
            assert (await (await sent(front)).answer()).status == 200
            client = await sent(front, post(b'{"model":"sees"}'))
            assert (await client.answer()).status == 200
        assert len(front.dials) == 1


# --- the order of parts

_texts = st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=20)), max_size=4)


@given(before=_texts, after=_texts, preamble=st.sampled_from([b"", b"\r\n"]), epilogue=st.sampled_from([b"", b"x--y"]))
def test_the_file_moves_to_the_end_and_nothing_else_changes(
    before: list[tuple[str, bytes]], after: list[tuple[str, bytes]], preamble: bytes, epilogue: bytes
) -> None:
    content = noise(MIN_FILE_BYTES + 1)
    texts = [field(name, text) for name, text in (*before, *after)]
    body = preamble + form(*texts[: len(before)], file(content), *texts[len(before) :]) + epilogue
    reader = FormReader(KIND, len(body), limit_bytes=len(body), memory_bytes=len(body))
    reader.feed(body, 0)
    received = reader.finish()
    moved = file_last(received.form, received.body.view, BOUNDARY.encode())
    assert moved is not None
    assert b"".join(moved) == preamble + form(*texts, file(content))
    assert moved[1] == content


@pytest.mark.parametrize("parts", [
    (file(b"x" * MIN_FILE_BYTES),), (field("a", "b"),), (file(AUDIO), file(b"")),
    (file(AUDIO), *(field("a", b"x" * 60_000) for _ in range(MAX_BEFORE_BYTES // 60_000 + 1))),
])  # fmt: skip
def test_what_is_passed_on_as_it_came(parts: tuple[bytes, ...]) -> None:
    body = form(*parts)
    parser = FormParser(KIND)
    parser.feed(body)
    assert file_last(parser.form, memoryview(body), BOUNDARY.encode()) is None


# --- as it comes


class _Owner:
    def __init__(self) -> None:
        self.told: list[str] = []

    def form_begins(self, stream: FormStream) -> None:
        self.told.append("begins")

    def pause_form(self) -> None:
        self.told.append("pause")

    def resume_form(self) -> None:
        self.told.append("resume")


class _Transport:
    def __init__(self) -> None:
        self.written = bytearray()

    def write(self, data: bytes) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


@pytest.mark.parametrize("step", [1000, 16384, 300_000, 10**9])
def test_the_file_is_given_away_as_it_comes(step: int) -> None:
    content, head = noise(MIN_FILE_BYTES + 100), form(field("a", "b"), file(b""))[: -len(BOUNDARY) - 8]
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    owner, transport = _Owner(), _Transport()
    stream = FormStream(KIND, BOUNDARY.encode(), len(head), len(body), owner)
    at = 0
    sender = None
    while at < len(body):
        at = stream.feed(body[: at + step] + b"next"[: max(0, at + step - len(body))], at)
        if sender is None and (stream.begun or stream.body_complete):
            found = stream.received()
            assert found.form.fields == (("a", "b"),)
            assert [(f.name, f.filename, f.end - f.start) for f in found.form.files] == [
                ("file", "a.wav", len(content))
            ]
            assert bytes(found.body.view)[len(head) :] == content[:16384]
            sender = StreamSender(transport, StreamedBody(b"<", stream, b">"))  # type: ignore[arg-type]
            sender.resume()
    assert at == len(body)
    assert transport.written == b"<" + content + b">"
    assert stream.body_complete
    assert owner.told == (["pause", "begins", "resume"] if step < len(body) else [])


def tagged(tag_bytes: int, content: bytes) -> bytes:
    """Return *content* behind an ID3 tag of *tag_bytes* in all, such as a picture of the cover makes."""
    size = tag_bytes - 10
    return b"ID3\x04\0\0" + bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0)) + bytes(size) + content


@pytest.mark.parametrize("step", [16384, 250_000, 10**9])
@pytest.mark.parametrize(("tag_bytes", "seen_bytes"), [(300_000, 300_000), (MAX_TAGS_BYTES + 9, MAX_TAGS_BYTES)])
def test_what_stands_behind_tags_is_waited_for(step: int, tag_bytes: int, seen_bytes: int) -> None:
    """Whoever sends tags that are too long has not asked: of these so much is seen and no more."""
    content, head = tagged(tag_bytes, noise(2 * MIN_FILE_BYTES)), form(file(b""))[: -len(BOUNDARY) - 8]
    body = head + content + f"\r\n--{BOUNDARY}--\r\n".encode()
    owner, at = _Owner(), 0
    stream = FormStream(KIND, BOUNDARY.encode(), len(head), len(body), owner)
    while not stream.begun and not stream.body_complete:
        at = stream.feed(body[: at + step], at)
    assert at >= seen_bytes + HEAD_BYTES
    assert bytes(stream.received().body.view)[len(head) :] == content[: seen_bytes + HEAD_BYTES]
    assert owner.told == (["pause", "begins"] if step < len(body) else [])


def test_tags_that_are_too_long_stay_where_they_are() -> None:
    for tag_bytes, moves in ((MAX_TAGS_BYTES, True), (MAX_TAGS_BYTES + 1, False)):
        body = form(file(tagged(tag_bytes, noise(MIN_FILE_BYTES))))
        parser = FormParser(KIND)
        parser.feed(body)
        assert (file_last(parser.form, memoryview(body), BOUNDARY.encode()) is not None) is moves


def test_no_more_is_asked_for_than_the_instance_takes() -> None:
    class Full(_Transport):
        def write(self, data: bytes) -> None:
            super().write(data)
            sender.pause()

    content, head = noise(MIN_FILE_BYTES + 100), form(file(b""))[: -len(BOUNDARY) - 8]
    owner = _Owner()
    stream = FormStream(KIND, BOUNDARY.encode(), len(head), len(head) + len(content) + len(BOUNDARY) + 8, owner)
    sender = StreamSender(Full(), StreamedBody(b"<", stream, b">"))  # type: ignore[arg-type]
    stream.feed(head + content[:20_000], 0)
    sender.resume()
    assert owner.told == ["pause", "begins", "pause", "pause"]
    sender.resume()
    assert owner.told[4:] == ["resume"]
    sender.stop()
    stream.feed(content[20_000:], 0)
    assert sender.bytes_sent == 20_000


@pytest.mark.parametrize("wrong", [-1, 1, -60, "field"])
def test_a_file_that_is_not_where_it_was_said_to_be(wrong: int | str) -> None:
    parts = (file(b""), field("a", "b")) if wrong == "field" else (field("a", "b"), file(b""))
    head = form(*parts)[: -len(BOUNDARY) - 8] + b"more"[: int(wrong == 1)]
    if isinstance(wrong, int) and wrong < 0:
        head = head[:wrong]
    stream = FormStream(KIND, BOUNDARY.encode(), len(head), len(head) + 2 * MEBIBYTE, _Owner())
    stream.feed(head + bytes(MEBIBYTE), 0)
    assert stream.begun
    with pytest.raises(RequestError, match="malformed multipart form"):
        stream.received()
