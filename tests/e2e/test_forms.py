"""The data plane with the real whisper-server behind it: real forms, real quirks, real speech."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from mesh.cli.whisper_setup import WhisperParts
from mesh.engine.lease import Endpoint
from tests.api.forms import PATH, field, file, form, form_head, post_form, whisper
from tests.api.loopback import Answer, LoopbackNode, loopback
from tests.real_whisper import WhisperServer, silence, whisper_server

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

JFK = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."


@pytest.fixture(scope="module")
def server(whisper_parts: WhisperParts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WhisperServer]:
    directory = tmp_path_factory.mktemp("server")
    with whisper_server(whisper_parts.server, whisper_parts.model, directory, "-t", "2") as running:
        yield running


@pytest.fixture
async def node(server: WhisperServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LoopbackNode]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    async with loopback(profiles=(whisper(),)) as made:
        made.admission.endpoint = Endpoint("tiny-1", whisper(), "127.0.0.1", server.port)
        made.admission.endpoint.log_tail = lambda count: server.said().splitlines()[-count or 10**9 :]
        made.admission.endpoint.log_lines = lambda: len(server.said().splitlines())
        yield made


async def ask(node: LoopbackNode, *parts: bytes, path: bytes = PATH) -> Answer:
    client = await node.client()
    client.send(post_form(field("model", "tiny"), *parts, path=path))
    head = await asyncio.wait_for(client.reader.readuntil(b"\r\n\r\n"), 120)
    answer = Answer(int(head[9:12]), head, b"", "length")
    await client._body(answer)
    return answer


def uploads_open() -> int:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum("llama-mesh-" in os.readlink(link) for link in links if os.path.lexists(link))


async def test_real_speech(node: LoopbackNode, whisper_parts: WhisperParts) -> None:
    audio = whisper_parts.speech.read_bytes()
    answer = await ask(node, file(audio, filename="jfk.wav"))
    assert (answer.status, json.loads(answer.body)) == (200, {"text": JFK})
    assert answer.field(b"x-llama-mesh-instance") == b"tiny-1"
    assert (await ask(node, file(audio), field("response_format", "text"))).body.strip() == JFK.encode()


async def test_what_it_cannot_read(node: LoopbackNode) -> None:
    answer = await ask(node, file(b"%PDF-1.7 nothing to hear"))
    assert (answer.status, json.loads(answer.body)["error"]["type"]) == (415, "unsupported_media_type")
    assert node.admission.tickets == []
    answer = await ask(node, file(b"RIFF\x00\x00\x00\x00WAVEbroken"))
    assert answer.status in (400, 415)
    assert "decode" in json.loads(answer.body)["error"]["message"]


async def test_a_long_upload_and_one_whose_client_leaves(node: LoopbackNode) -> None:
    audio = silence(60.0) + b"\0" * (30 << 20)  # what follows the samples is not read
    client = await node.client()
    upload = form(field("model", "tiny"), file(audio))
    client.send(form_head(len(upload)) + upload[: len(upload) // 2])
    await node.until(lambda: uploads_open() == 1)
    client.abort()
    await node.until(lambda: uploads_open() == 0)
    client = await node.client()
    client.send(form_head(len(upload)) + upload)
    await node.until(lambda: bool(node.admission.leases))
    await asyncio.sleep(0.2)
    client.abort()
    await node.until(lambda: bool(node.admission.leases[0].ended))
    assert node.admission.leases[0].ended == ["abandon"]
    assert uploads_open() == 0
    answer = await ask(node, file(silence(1.0)))
    assert answer.status == 200
