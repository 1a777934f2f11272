"""Requests and models that are wrong get one clear error, with the cause and the fix; everything else goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.harness import TINY_ARGS, Models, Node, cookbook, eventually, profile
from tests.e2e.wire import CHAT

QUICK = {"head_read_timeout_ms": 700, "body_read_timeout_ms": 700, "protocol_detect_timeout_ms": 700}


@pytest.fixture(scope="module")
def node(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One node, with one healthy model and broken ones of every kind."""
    broken = tmp_path_factory.mktemp("broken")
    whole = models.beta.read_bytes()
    (broken / "truncated.gguf").write_bytes(whole[: len(whole) // 2])
    (broken / "header.gguf").write_bytes(whole[:100])
    (broken / "corrupt.gguf").write_bytes(whole[:24] + os.urandom(4096) + whole[4120:])
    (broken / "text.gguf").write_text("this is not a model\n" * 100)
    (broken / "empty.gguf").touch()
    (broken / "directory.gguf").mkdir()
    text = cookbook(
        {
            "alpha": profile(models.alpha),
            "missing": profile(broken / "missing.gguf"),
            **{name: profile(broken / f"{name}.gguf") for name in
               ("truncated", "header", "corrupt", "text", "empty", "directory")},
            "bad-flag": profile(models.beta, TINY_ARGS + " --no-such-flag"),
            "bad-value": profile(models.beta, TINY_ARGS + " -ngl banana"),
            "bad-cache": profile(models.beta, TINY_ARGS + " -ctk q99"),
            "bad-env": profile(models.beta, env={"LD_PRELOAD": "/nowhere.so"}),
        }
    )  # fmt: skip
    with Node(tmp_path_factory.mktemp("bad"), text, {"http": QUICK}) as node:
        node.prewarm("alpha")
        yield node


@pytest.fixture(autouse=True)
def nothing_else_is_disturbed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the shared node: the healthy model answers, from the same process, and nothing leaked."""
    if "node" not in request.fixturenames:
        yield
        return
    node: Node = request.getfixturevalue("node")
    pid, files = node.instance("alpha")["pid"], node.open_files()
    yield
    assert node.say("alpha") == "I am alpha"
    assert node.instance("alpha")["pid"] == pid
    eventually(lambda: node.server_pids() == [pid], what="no other process is left")
    assert node.status()["queues"] == {}
    eventually(lambda: node.metric("llama_mesh_current_requests") == 0)
    eventually(lambda: node.open_files() <= files + 3, what="descriptors are given back")


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"null", b"[]", b'"alpha"', b"17", b"\xff\xfe", b'{"model": "alpha"', b'{"model": "alpha"} x',
            b'{"model": "\xff"}', b'{"model": "\\ud800"}', b"{'model': 'alpha'}", b'{"model": alpha}', b"[" * 100_000,
            b'{"a":' * 100_000, b'{"model": "alpha", "messages": NaN, }', b"\x00" * 1000,
        ],
        ids=lambda body: repr(body[:12]),
    )  # fmt: skip
    @pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
    def test_malformed_json(self, node: Node, path: str, body: bytes) -> None:
        response = node.http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400, response.text
        assert response.json()["error"]["type"] == "invalid_request_error"
        assert response.json()["error"]["message"]

    @pytest.mark.parametrize("model", [None, 1, 1.5, True, "", [], ["alpha"], {"name": "alpha"}])
    def test_a_model_of_the_wrong_type(self, node: Node, model: Any) -> None:
        """Trap 73."""
        for path in (CHAT, "/v1/embeddings", "/v1/rerank", "/completion", "/tokenize", "/v1/messages", "/v1/responses"):
            response = node.http.post(path, json={"model": model})
            assert response.status_code == 400, (path, response.text)
            assert "model" in response.json()["error"]["message"]

    def test_no_model_at_all_without_a_default(self, node: Node) -> None:
        response = node.http.post(CHAT, json={"messages": []})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "model")
        assert node.http.get("/props").status_code == 400

    @pytest.mark.parametrize(
        "keys",
        [{"messages": "hi"}, {"messages": [1]}, {"messages": [], "max_tokens": "many"}, {"messages": None},
         {"stream": "yes", "messages": [{"role": "user", "content": "hi"}]}],
    )  # fmt: skip
    def test_other_wrong_types_are_the_childs_to_judge(self, node: Node, keys: dict[str, Any]) -> None:
        response = node.http.post(CHAT, json={"model": "alpha", **keys})
        assert response.headers["x-llama-mesh-instance"] == node.instance("alpha")["id"]
        assert response.status_code == 200 or "error" in response.json()

    @pytest.mark.parametrize(
        "path", [CHAT, "/v1/completions", "/v1/embeddings", "/v1/rerank", "/v1/messages", "/infill", "/tokenize"]
    )
    def test_unknown_models(self, node: Node, path: str) -> None:
        response = node.http.post(path, json={"model": "no/such:model", "messages": []})
        assert response.status_code == 404
        assert "no/such:model" in response.json()["error"]["message"]

    def test_a_large_body_with_its_model_at_the_end(self, node: Node) -> None:
        """Trap 72; 20 MB."""
        message = b'{"role": "user", "content": "hi"}'
        body = b'{"metadata": {"image": "%s"}, "messages": [%s], "model": "alpha"}' % (b"QUJD" * 5_000_000, message)
        response = node.http.post(CHAT, content=body)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == "I am alpha"

    def test_a_body_over_the_limit(self, node: Node) -> None:
        with node.connection() as connection:
            connection.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 67108865\r\n\r\n" % CHAT.encode())
            status, _, body = connection.answer()
            assert (status, json.loads(body)["error"]["type"]) == (413, "request_too_large")
            assert b"67108864" in body
            assert connection.rest() == b""


class TestConnections:
    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 70_000 + b"\r\n\r\n", 431),
            (b"GET /healthz HTTP/1.1\r\n" + b"X: y\r\n" * 20_000 + b"\r\n", 431),
            (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
            (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
             b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
            (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\nBad Header: 1\r\n\r\n", 400),
            (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", 400),
            (b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n", 505),
        ],
        ids=["long target", "long header", "many headers", "two lengths", "negative length", "length and coding",
             "bad chunk", "space in a name", "NUL", "version"],
    )  # fmt: skip
    def test_bad_heads(self, node: Node, sent: bytes, status: int) -> None:
        with node.connection(timeout_s=5) as connection:
            connection.send(sent)
            answered, headers, body = connection.answer()
            assert (answered, headers["connection"]) == (status, "close")
            assert json.loads(body)["error"]["message"]
            assert connection.rest() == b""

    @pytest.mark.parametrize(
        "sent", [b"\x00\x01\x02\x03", b"SSH-2.0-OpenSSH_9.2\r\n", b"\x16\x03\x01\x00\x05hello", b"", b"G", b"hello\n\n"]
    )
    def test_what_is_not_http_is_closed(self, node: Node, sent: bytes) -> None:
        with node.connection(timeout_s=5) as connection:
            connection.send(sent)
            started_at = time.monotonic()
            connection.rest()
            assert time.monotonic() - started_at < 4

    def test_http2_gets_a_clear_refusal(self, node: Node) -> None:
        with node.connection(timeout_s=5) as connection:
            connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 9)
            status, _, body = connection.answer()
            assert (status, "HTTP/1.1" in json.loads(body)["error"]["message"]) == (505, True)

    @pytest.mark.parametrize(
        "sent",
        [b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Le",
         b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
         b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
         b"POST /admin/prewarm HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"],
        ids=["head", "body", "chunk", "admin body"],
    )  # fmt: skip
    def test_too_slow(self, node: Node, sent: bytes) -> None:
        with node.connection(timeout_s=10) as connection:
            connection.send(sent)
            started_at = time.monotonic()
            status, _, body = connection.answer()
            assert (status, json.loads(body)["error"]["type"]) == (408, "request_timeout")
            assert 0.5 < time.monotonic() - started_at < 4
            assert connection.rest() == b""

    def test_a_slow_body_that_moves_is_served(self, node: Node) -> None:
        """The limit is on silence, not on the time that a large body takes."""
        messages = [{"role": "user", "content": "hi"}]
        body = json.dumps({"metadata": "x" * 200_000, "model": "alpha", "messages": messages}).encode()
        with node.connection() as connection:
            connection.send(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (CHAT.encode(), len(body)))
            for n in range(0, len(body), 30_000):
                connection.send(body[n : n + 30_000])
                time.sleep(0.25)
            assert connection.answer()[0] == 200

    def test_a_large_cookie_is_not_the_childs_problem(self, node: Node) -> None:
        """llama-server refuses headers over 8 KB; credentials and cookies do not reach it (trap 102)."""
        messages = [{"role": "user", "content": "hi"}]
        response = node.http.post(
            CHAT, json={"model": "alpha", "messages": messages}, headers={"Cookie": "a=" + "b" * 20_000}
        )
        assert response.status_code == 200


class TestModelsThatDoNotStart:
    @pytest.mark.parametrize(
        ("model", "cause"),
        [
            ("missing", "missing.gguf"), ("truncated", "truncated.gguf"), ("header", "header.gguf"),
            ("corrupt", "corrupt.gguf"), ("text", "text.gguf"), ("empty", "empty.gguf"),
            ("directory", "directory.gguf"), ("bad-flag", "--no-such-flag"), ("bad-value", "-ngl"),
            ("bad-cache", "q99"),
        ],
    )  # fmt: skip
    def test_the_client_is_told_why(self, node: Node, model: str, cause: str) -> None:
        """Traps 19, 21, 24: at once, with the child's own words."""
        started_at = time.monotonic()
        response = node.chat(model)
        assert time.monotonic() - started_at < 10
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["source"]) == (503, "instance_failed", "instance")
        assert cause in error["message"], error["message"]
        failure = node.status()["failures"][f"{model}:default"]
        assert failure["count"] == 1
        assert cause in json.dumps([failure["reason"], *failure["log_tail"]])
        assert cause in node.cli("ps").stdout or failure["reason"] in node.cli("ps", "--json").stdout

    def test_streamed_it_is_a_real_503_too(self, node: Node) -> None:
        """Trap 36, 109: before any event."""
        response = node.chat("bad-env", stream=True)  # the loader complains about LD_PRELOAD and goes on
        assert response.status_code == 200
        node.unload("bad-env")
        response = node.chat("missing", stream=True)
        assert (response.status_code, response.headers["content-type"]) == (503, "application/json")

    def test_prewarming_says_it_too(self, node: Node) -> None:
        response = node.http.post("/admin/prewarm", json={"model": "text"})
        assert (response.status_code, response.json()["status"]) == (503, "error")
        assert node.cli("prewarm", "text").returncode == 1

    def test_it_backs_off(self, node: Node) -> None:
        """Trap 25: a crash loop does not start a process per request."""
        spawned = node.metric("llama_mesh_instance_spawns_total")
        answers = [node.chat("empty") for _ in range(20)]
        assert {a.status_code for a in answers} == {503}
        assert node.metric("llama_mesh_instance_spawns_total") - spawned <= 4
        assert int(answers[-1].headers["retry-after"]) >= 1
