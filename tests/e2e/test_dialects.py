"""Anthropic's and llama.cpp's own routes, and the proof that what the child says is what the client gets."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

import pytest

from tests.e2e.harness import Node
from tests.e2e.wire import child_get, child_post

HI = [{"role": "user", "content": "hi"}]
WEATHER = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
#: what differs between two answers to the same question
VARIABLE = re.compile(
    rb'"(?:id|item_id|response_id|msg_id)":"[^"]*"|"(?:created|created_at|completed_at)":\d+|"timings":\{[^}]*\}'
)


@pytest.fixture(scope="module")
def node(family: Node) -> Node:
    return family


class TestAnthropic:
    BODY: ClassVar[dict[str, Any]] = {"model": "alpha", "max_tokens": 16, "messages": HI, "temperature": 0}

    def test_a_message(self, node: Node) -> None:
        response = node.http.post("/v1/messages", json=self.BODY, headers={"anthropic-version": "2023-06-01"})
        answer = response.json()
        assert (answer["type"], answer["role"]) == ("message", "assistant")
        assert [block["text"] for block in answer["content"] if block["type"] == "text"] == ["I am alpha"]
        assert answer["usage"]["output_tokens"] == 4

    def test_streamed(self, node: Node) -> None:
        with node.http.stream("POST", "/v1/messages", json={**self.BODY, "stream": True}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        kinds = [event["type"] for event in events]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        deltas = [e["delta"].get("text", "") for e in events if e["type"] == "content_block_delta"]
        assert "".join(deltas) == "I am alpha"

    def test_count_tokens(self, node: Node) -> None:
        response = node.http.post("/v1/messages/count_tokens", json={"model": "alpha", "messages": HI})
        assert response.json()["input_tokens"] > 3

    def test_errors_are_in_its_own_envelope(self, node: Node) -> None:
        """Trap 74."""
        for path in ("/v1/messages", "/v1/messages/count_tokens"):
            response = node.http.post(path, json={**self.BODY, "model": "nothing"}, headers={"X-Request-Id": "r1"})
            assert response.status_code == 404
            answer = response.json()
            assert (answer["type"], answer["error"]["type"]) == ("error", "not_found_error")
            assert answer["request_id"] == "r1"
        response = node.http.post("/v1/messages", content=b"{", headers={"Content-Type": "application/json"})
        assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


class TestNative:
    """llama.cpp's own routes."""

    def test_tokenize_and_back(self, node: Node) -> None:
        tokens = node.http.post("/tokenize", json={"model": "alpha", "content": "I am alpha"}).json()["tokens"]
        assert tokens
        back = node.http.post("/detokenize", json={"model": "alpha", "tokens": tokens})
        assert back.json()["content"] == "I am alpha"

    def test_apply_template(self, node: Node) -> None:
        prompt = node.http.post("/apply-template", json={"model": "alpha", "messages": HI}).json()["prompt"]
        assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"

    def test_completion(self, node: Node) -> None:
        body = {"model": "alpha", "prompt": "hi", "temperature": 0}
        assert node.http.post("/completion", json=body).json()["content"] == "I am alpha"
        with node.http.stream("POST", "/completion", json={**body, "stream": True}) as response:
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]
        assert "".join(event["content"] for event in events) == "I am alpha"
        assert events[-1]["stop"] is True

    def test_embedding(self, node: Node) -> None:
        response = node.http.post("/embedding", json={"model": "embed", "content": "cat"})
        assert len(response.json()[0]["embedding"][0]) == 64

    @pytest.mark.parametrize("path", ["/props", "/slots", "/lora-adapters"])
    def test_what_only_reads_takes_the_model_from_the_query(self, node: Node, path: str) -> None:
        instance = node.prewarm("org/Beta.Q4_1")
        through, direct = node.http.get(f"{path}?model=org%2FBeta.Q4_1"), child_get(instance, path)
        assert through.status_code == 200
        assert through.content == direct.content
        assert through.headers["x-llama-mesh-instance"] == instance["id"]

    def test_without_a_model_the_default_one_answers(self, node: Node) -> None:
        assert node.http.get("/props").json()["model_path"].endswith("alpha.gguf")
        response = node.http.post("/completion", json={"prompt": "hi", "temperature": 0})
        assert response.json()["content"] == "I am alpha"

    def test_the_childs_own_errors_are_relayed_verbatim(self, node: Node) -> None:
        instance = node.prewarm("alpha")
        for path, body in (
            ("/infill", {"input_prefix": "a", "input_suffix": "b"}),  # this model has no infill tokens
            ("/lora-adapters", [{"id": 7, "scale": 1.0}]),
            ("/v1/chat/completions", {"model": "alpha", "messages": "hi"}),
            ("/tokenize", {"model": "alpha", "content": 1.5, "add_special": "x"}),
        ):
            query = "?model=alpha" if isinstance(body, list) else ""
            asked = {"model": "alpha", **body} if isinstance(body, dict) else body
            through, direct = node.http.post(path + query, json=asked), child_post(instance, path, asked)
            assert (through.status_code, through.content) == (direct.status_code, direct.content), path


class TestVerbatim:
    """What the child says is what the client gets, byte for byte, except for what differs between any two answers."""

    CHAT: ClassVar[dict[str, Any]] = {
        "model": "alpha",
        "messages": [{"role": "user", "content": "Grüße, 世界 🦙"}],
        "temperature": 0,
        "seed": 1,
        "cache_prompt": False,
        "max_tokens": 32,
    }
    CASES: ClassVar[tuple[tuple[str, dict[str, Any]], ...]] = (
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 3, "ignore_eos": True}),
        ("/v1/chat/completions", {**CHAT, "model": "tool", "tools": WEATHER, "stream": True}),
        ("/v1/chat/completions", {**CHAT, "response_format": {"type": "json_object"}}),
        ("/v1/completions", {"model": "alpha", "prompt": ["a", "b"], "temperature": 0, "cache_prompt": False}),
        ("/v1/responses", {"model": "alpha", "input": "hi", "temperature": 0, "stream": True, "cache_prompt": False}),
        ("/v1/messages", {**CHAT, "stream": True}),
        ("/v1/messages", CHAT),
        ("/v1/embeddings", {"model": "embed", "input": ["cat", "dog"]}),
        ("/v1/rerank", {"model": "rerank", "query": "cat", "documents": ["cat", "dog"]}),
    )

    @pytest.mark.parametrize(("path", "body"), CASES, ids=[f"{n}{path}" for n, (path, _) in enumerate(CASES)])
    def test_bodies_and_content_types_are_the_childs(self, node: Node, path: str, body: dict[str, Any]) -> None:
        instance = node.prewarm(body["model"])
        through, direct = node.http.post(path, json=body), child_post(instance, path, body)
        assert direct.status_code == 200, direct.text
        assert through.status_code == 200
        assert VARIABLE.sub(b"", through.content) == VARIABLE.sub(b"", direct.content)
        for name in ("content-type", "x-accel-buffering", "transfer-encoding"):
            assert through.headers.get(name) == direct.headers.get(name)
