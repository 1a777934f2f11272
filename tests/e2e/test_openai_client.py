"""The clients that people use, against the real llama-server: OpenAI's own library, and HTTP for the other dialects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.e2e.conftest import StartNode
from tests.e2e.harness import Models, Node, cookbook, eventually, profile
from tests.e2e.wire import child_busy

HI: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
WEATHER: list[ChatCompletionToolParam] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}},
    "required": ["ok"],
    "additionalProperties": False,
}
ENDLESS = {"ignore_eos": True, "n_predict": -1}


@pytest.fixture(scope="module")
def node(family: Node) -> Node:
    return family


@pytest.fixture(scope="module")
def client(node: Node) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def locked(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    auth = {"enabled": True, "required_header": "X-My-Key", "allowed_keys": ["sk-user"], "admin_keys": ["sk-admin"]}
    text = cookbook({"alpha": profile(models.alpha)})
    with Node(tmp_path_factory.mktemp("locked"), text, {"auth": auth}, key="sk-admin") as node:
        yield node


class TestChat:
    def test_answers(self, client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(model="alpha", messages=HI, temperature=0)
        completion = raw.parse()
        assert completion.choices[0].message.content == "I am alpha"
        assert completion.choices[0].finish_reason == "stop"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 4
        assert raw.headers["x-llama-mesh-node"] == "e2e"
        assert raw.headers["x-llama-mesh-instance"].startswith("alpha.default-")
        assert raw.headers["x-request-id"]

    @pytest.mark.parametrize("name", ["alpha:default", "ALPHA", "gpt-4o-mini", "alpha:endless"])
    def test_every_name_of_a_model_reaches_it(self, client: OpenAI, name: str) -> None:
        completion = client.chat.completions.create(model=name, messages=HI, temperature=0)
        assert completion.choices[0].message.content == "I am alpha"

    def test_streams_with_usage(self, client: OpenAI) -> None:
        stream = client.chat.completions.create(
            model="alpha", messages=HI, temperature=0, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "I am alpha"
        assert len(chunks) >= 5, "word by word"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4

    def test_the_request_id_of_the_client_comes_back(self, client: OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            model="alpha", messages=HI, extra_headers={"X-Request-Id": "mine-1"}
        )
        assert raw.headers["x-request-id"] == "mine-1"

    def test_json_schema(self, client: OpenAI) -> None:
        completion = client.chat.completions.create(
            model="alpha",
            messages=HI,
            temperature=0,
            max_tokens=64,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}},
        )
        assert isinstance(json.loads(completion.choices[0].message.content or "")["ok"], bool)

    def test_grammar(self, client: OpenAI) -> None:
        completion = client.chat.completions.create(
            model="alpha", messages=HI, temperature=0, extra_body={"grammar": 'root ::= "never" | "always"'}
        )
        assert completion.choices[0].message.content in ("never", "always")

    def test_a_broken_grammar_is_the_childs_own_400(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="alpha", messages=HI, extra_body={"grammar": "root ::= ("})


class TestTools:
    def test_a_tool_is_called(self, client: OpenAI) -> None:
        completion = client.chat.completions.create(model="tool", messages=HI, tools=WEATHER, temperature=0)
        choice = completion.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls is not None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Paris"}

    def test_streamed(self, node: Node, client: OpenAI) -> None:
        """The deltas of a tool call are counted as tokens too (trap 95)."""
        name, arguments, ends = "", "", []
        for chunk in client.chat.completions.create(
            model="tool", messages=HI, tools=WEATHER, temperature=0, stream=True, extra_headers={"X-Request-Id": "tool"}
        ):
            for call in chunk.choices[0].delta.tool_calls or ():
                assert call.function is not None
                name += call.function.name or ""
                arguments += call.function.arguments or ""
            ends.append(chunk.choices[0].finish_reason)
        assert (name, json.loads(arguments), ends[-1]) == ("get_weather", {"city": "Paris"}, "tool_calls")
        (line,) = node.wait_log('"request_id":"tool"')
        assert line["fields"]["tokens"] > 0

    def test_the_result_of_a_tool_goes_back(self, client: OpenAI) -> None:
        call: Any = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":"P"}'}}
        messages: list[ChatCompletionMessageParam] = [
            *HI,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
        completion = client.chat.completions.create(model="tool", messages=messages, tools=WEATHER, temperature=0)
        assert completion.choices[0].finish_reason == "tool_calls"  # it never says anything else


class TestOtherEndpoints:
    def test_completions(self, client: OpenAI) -> None:
        completion = client.completions.create(model="alpha", prompt="hi", temperature=0)
        assert completion.choices[0].text == "I am alpha"
        words = [c.choices[0].text for c in client.completions.create(model="alpha", prompt="hi", stream=True)]
        assert "".join(words) == "I am alpha"

    def test_responses(self, client: OpenAI) -> None:
        response = client.responses.create(model="alpha", input="hi", temperature=0)
        assert response.output_text == "I am alpha"
        events = list(client.responses.create(model="alpha", input="hi", temperature=0, stream=True))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "I am alpha"
        assert events[-1].type == "response.completed"

    def test_embeddings_as_floats_and_base64(self, client: OpenAI) -> None:
        texts = ["the cat is a pet", "cats are pets", "guitar music"]
        floats = client.embeddings.create(model="embed", input=texts, encoding_format="float")
        packed = client.embeddings.create(model="embed", input=texts, encoding_format="base64")
        unasked = client.embeddings.create(model="embed", input=texts)  # the library asks for base64 and decodes it
        assert [len(d.embedding) for d in floats.data] == [64, 64, 64]
        assert [d.index for d in floats.data] == [0, 1, 2]
        assert all(isinstance(d.embedding, str) for d in packed.data)
        for one, other in zip(floats.data, unasked.data, strict=True):
            assert one.embedding == pytest.approx(other.embedding, abs=1e-6)

    def test_stream_is_taken_out_of_an_embedding_request(self, node: Node) -> None:
        """Trap 4, as the client sees it: one JSON answer (what the child gets is a test of the data plane)."""
        response = node.http.post("/v1/embeddings", json={"model": "embed", "input": "cat", "stream": True})
        assert response.headers["content-type"].startswith("application/json")
        assert len(response.json()["data"]) == 1

    @pytest.mark.parametrize("path", ["/v1/rerank", "/v1/reranking", "/rerank", "/reranking"])
    def test_rerank(self, node: Node, path: str) -> None:
        documents = ["the car drives on the road", "pandas eat bamboo in china", "music is a song"]
        body = {"model": "rerank", "query": "panda bamboo", "documents": documents, "stream": True}
        response = node.http.post(path, json=body)
        assert response.status_code == 200, response.text
        results = response.json()["results"]
        assert max(results, key=lambda r: r["relevance_score"])["index"] == 1
        assert len(results) == 3


class TestErrors:
    def test_an_unknown_model(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="alpah", messages=HI)
        assert caught.value.type == "model_not_found"
        assert "alpah" in str(caught.value)

    def test_the_wrong_kind_of_model(self, client: OpenAI) -> None:
        with pytest.raises(openai.BadRequestError, match="restricted to embeddings"):
            client.chat.completions.create(model="embed", messages=HI)
        with pytest.raises(openai.NotFoundError, match="not configured for embeddings"):
            client.embeddings.create(model="alpha", input="cat")

    def test_a_prompt_that_does_not_fit_is_the_childs_own_400(self, node: Node, client: OpenAI) -> None:
        """Also when streamed: the status is real, not a 200 with an error in it (trap 109)."""
        long: list[ChatCompletionMessageParam] = [{"role": "user", "content": "0123456789 " * 500}]
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="alpha", messages=long)
        assert caught.value.type == "exceed_context_size_error"
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="alpha", messages=long, stream=True)
        assert node.instance("alpha:default")["active"] == 0

    def test_an_unknown_path_and_a_wrong_method(self, node: Node) -> None:
        """Trap 74: the envelope everywhere."""
        missing = node.http.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
        wrong = node.http.get("/v1/chat/completions")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
        assert wrong.json()["error"]["source"] == "mesh"

    def test_a_timeout_of_the_client_frees_the_place(self, node: Node, client: OpenAI) -> None:
        """Traps 1, 9."""
        node.prewarm("alpha:endless")
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(
                model="alpha:endless", messages=HI, extra_body=ENDLESS
            )
        eventually(lambda: node.instance("alpha:endless")["busy"] == 0, what="the place is free")
        assert node.say("alpha:endless") == "I am alpha"

    def test_leaving_a_stream_frees_the_slot(self, node: Node, client: OpenAI) -> None:
        instance = node.prewarm("alpha:endless")
        before = node.metric("llama_mesh_client_disconnects_total")
        stream = client.chat.completions.create(model="alpha:endless", messages=HI, stream=True, extra_body=ENDLESS)
        with stream:
            for n, _ in enumerate(stream):
                if n == 20:
                    break
            assert child_busy(instance) == 1
        eventually(lambda: child_busy(instance) == 0, within_s=3, every_s=0.2, what="the child's slot is idle")
        eventually(lambda: node.instance("alpha:endless")["busy"] == 0, within_s=5)
        assert node.metric("llama_mesh_client_disconnects_total") == before + 1
        assert node.instance("alpha:endless")["pid"] == instance["pid"]


class TestKeys:
    def test_a_good_key(self, locked: Node) -> None:
        with OpenAI(base_url=f"{locked.url}/v1", api_key="sk-user", max_retries=0) as client:
            completion = client.chat.completions.create(model="alpha", messages=HI, temperature=0)
            assert completion.choices[0].message.content == "I am alpha"
            assert [m.id for m in client.models.list()] == ["alpha"]

    @pytest.mark.parametrize("key", ["sk-wrong", "sk-use", "sk-user-and-more", "sk-user,sk-admin", "ключ"])
    def test_a_bad_key(self, locked: Node, key: str) -> None:
        headers = {b"Authorization": f"Bearer {key}".encode()}
        response = httpx.post(f"{locked.url}/v1/chat/completions", json={"model": "alpha"}, headers=headers)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")

    def test_a_bad_key_in_the_library(self, locked: Node) -> None:
        with OpenAI(base_url=f"{locked.url}/v1", api_key="sk-wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(model="alpha", messages=HI)
            with pytest.raises(openai.AuthenticationError):
                client.models.list()

    def test_every_route_is_denied_but_the_public_ones(self, locked: Node) -> None:
        """Trap 99."""
        closed = ["/v1/models", "/v1/models/alpha", "/metrics", "/metrics/json", "/cluster/nodes", "/admin/instances"]
        closed += ["/admin/logs?model=alpha", "/props?model=alpha", "/slots", "/nothing", "/"]
        for path in closed:
            assert httpx.get(locked.url + path).status_code == 401, path
        for path in ("/health", "/healthz", "/readyz", "/version"):
            assert httpx.get(locked.url + path).status_code == 200, path

    def test_the_configured_header_and_the_admin_key(self, locked: Node) -> None:
        user, admin = {"X-My-Key": "sk-user"}, {"X-My-Key": "sk-admin"}
        assert httpx.get(f"{locked.url}/v1/models", headers=user).status_code == 200
        assert httpx.get(f"{locked.url}/admin/instances", headers=user).status_code in (401, 403)
        assert httpx.get(f"{locked.url}/admin/instances", headers=admin).status_code == 200

    def test_no_key_shows_anywhere(self, locked: Node) -> None:
        """Traps 101, 102: not in argument lists, logs, status, nor in what the child is sent or given."""
        assert locked.say("alpha") == "I am alpha"
        said = [locked.stdout(), locked.stderr(), json.dumps(locked.status())]
        for process in locked.servers():
            said += [" ".join(process.cmdline()), *process.environ().values()]
        assert not [text for text in said if "sk-user" in text or "sk-admin" in text]


class TestModels:
    def test_list_and_retrieve(self, client: OpenAI) -> None:
        """Trap 80: the order and ``created`` are stable."""
        first, second = client.models.list(), client.models.list()
        assert first.data == second.data
        ids = [model.id for model in first]
        assert {"org/Beta.Q4_1", "alpha", "embed"} <= set(ids)
        for model in first:
            assert client.models.retrieve(model.id) == model

    @pytest.mark.parametrize("path", ["org/Beta.Q4_1", "org%2FBeta.Q4_1", "ORG%2fbeta%2Eq4_1", "gpt-4o-mini"])
    def test_slashes_and_percent_encoding(self, node: Node, path: str) -> None:
        """Trap 78."""
        response = node.http.get(f"/v1/models/{path}")
        assert response.status_code == 200, response.text
        assert response.json()["id"] in ("org/Beta.Q4_1", "alpha", "alpha:default")

    def test_an_unknown_one(self, client: OpenAI) -> None:
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("org/nothing")

    def test_a_model_with_a_slash_answers(self, client: OpenAI) -> None:
        completion = client.chat.completions.create(model="org/beta.q4_1", messages=HI, temperature=0)
        assert completion.choices[0].message.content == "I am beta"


def test_smollm2_through_the_openai_client(smollm2: Path, start_node: StartNode) -> None:
    """A real model once: it answers, streams, and keeps to a schema."""
    node = start_node(cookbook({"smollm2": profile(smollm2, "-t 1 -c 1024 -np 1 --no-warmup")}))
    question: list[ChatCompletionMessageParam] = [
        {"role": "user", "content": "What is the capital city of France? Answer in English."}
    ]
    with OpenAI(base_url=f"{node.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        stream = client.chat.completions.create(
            model="smollm2", messages=question, temperature=0, max_tokens=24, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "Paris" in "".join(pieces)
        assert len(pieces) > 5
        whole = client.chat.completions.create(model="smollm2", messages=question, temperature=0, max_tokens=24)
        assert whole.choices[0].message.content == "".join(pieces)
        schema = client.chat.completions.create(
            model="smollm2",
            messages=question,
            temperature=0,
            max_tokens=40,
            response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
        )
        assert set(json.loads(schema.choices[0].message.content or "")) == {"ok"}
