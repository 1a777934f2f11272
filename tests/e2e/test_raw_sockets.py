"""HTTP/1.1 byte by byte, between raw sockets and the real llama-server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.wire import CHAT, RawConnection

BODY = json.dumps(
    {"model": "alpha", "messages": [{"role": "user", "content": "hi"}], "temperature": 0, "max_tokens": 16}
).encode()


@pytest.fixture(scope="module")
def node(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    text = cookbook({"alpha": profile(models.alpha, "-t 1 -tb 1 -c 16384 -np 1 --no-warmup")})
    with Node(tmp_path_factory.mktemp("raw"), text) as node:
        node.prewarm("alpha")
        yield node


def head(*fields: str, path: str = CHAT, version: str = "1.1") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/{version}", "Host: t", *fields, "", ""]).encode()


def said(connection: RawConnection) -> str:
    status, _, body = connection.answer()
    assert status == 200, body
    content: str = json.loads(body)["choices"][0]["message"]["content"]
    return content


REQUEST = head(f"Content-Length: {len(BODY)}") + BODY


def test_one_connection_for_everything(node: Node) -> None:
    """More requests than llama-server allows per connection (100), and both kinds of route in turn."""
    with node.connection() as connection:
        for n in range(130):
            connection.send(REQUEST)
            assert said(connection) == "I am alpha"
            if n % 10 == 0:
                connection.send(b"GET /healthz HTTP/1.1\r\nHost: t\r\n\r\n")
                assert connection.answer()[0] == 200
    errors = [line for line in node.log('"message":"request"') if line["fields"]["status"] != 200]
    assert errors == []


def test_pipelined(node: Node) -> None:
    with node.connection() as connection:
        connection.send(REQUEST + b"GET /version HTTP/1.1\r\nHost: t\r\n\r\n" + REQUEST)
        assert said(connection) == "I am alpha"
        assert "version" in json.loads(connection.answer()[2])
        assert said(connection) == "I am alpha"


def test_byte_by_byte(node: Node) -> None:
    """Trap 71."""
    with node.connection() as connection:
        for n in range(len(REQUEST)):
            connection.send(REQUEST[n : n + 1])
        assert said(connection) == "I am alpha"


def test_chunked_and_expecting(node: Node) -> None:
    with node.connection() as connection:
        connection.send(head("Transfer-Encoding: chunked", "Expect: 100-continue"))
        assert connection.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        half = len(BODY) // 2
        for part in (BODY[:half], BODY[half:], b""):
            connection.send(b"%x\r\n%b\r\n" % (len(part), part))
        assert said(connection) == "I am alpha"


def test_http_1_0_ends_with_the_connection(node: Node) -> None:
    with node.connection() as connection:
        connection.send(head(f"Content-Length: {len(BODY)}", version="1.0") + BODY)
        answer = connection.rest()
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"chunked" not in answer.lower().partition(b"\r\n\r\n")[0]
        assert b"I am alpha" in answer


def test_headers_that_are_not_utf_8(node: Node) -> None:
    with node.connection() as connection:
        connection.send(b"POST %b HTTP/1.1\r\nHost: t\r\nX-Odd: \xff\xfe\r\n" % CHAT.encode())
        connection.send(b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY))
        assert said(connection) == "I am alpha"


def test_the_first_event_does_not_wait_for_the_second(node: Node) -> None:
    """Trap 77, on a stream of thousands of events; the reader's slowness is felt by the child, not stored here."""
    with node.connection() as connection:
        before = node.status()["instances"][0]["busy"]
        assert connection.start_stream("alpha", ignore_eos=True, max_tokens=5000) == 200
        assert node.status()["instances"][0]["busy"] == before + 1, "it still runs while we have its beginning"
        time.sleep(0.5)
        rest = connection.read_until(b"data: [DONE]\n\n")
        assert rest.count(b"data: ") >= 5000
        connection.read_until(b"0\r\n\r\n")
    eventually(lambda: node.instance("alpha")["busy"] == 0)


def test_a_connection_to_the_child_that_went_stale(node: Node) -> None:
    """llama-server closes idle connections after 5 s; nobody notices."""
    assert node.say("alpha") == "I am alpha"
    time.sleep(5.3)
    with node.connection() as connection:
        connection.send(REQUEST)
        assert said(connection) == "I am alpha"
