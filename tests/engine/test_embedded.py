"""The real llama-server (the embedded wheel) with tiny real models, on both event loops."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvloop

from mesh.engine import embedded
from mesh.engine.locate import EngineBinary, _embedded_wheel
from mesh.engine.runner import Runner
from tests import tiny_models
from tests.engine.children import REAL, Node, line_of
from tests.engine.hugging_face import hub
from tests.host.deaths import wait_for_death

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(_embedded_wheel() is None, reason="needs the engine extra: pip install 'llama-mesh[engine]'"),
]

Run = Callable[[Coroutine[Any, Any, None]], None]
ARGS = ("-t", "1", "-np", "2", "-c", "4096")


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    def run_it(test: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(test, 40))

    return run_it


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    tiny_models.write_chat(directory / "chat.gguf", "alpha says I am alpha")
    tiny_models.write_embed(directory / "embed.gguf")
    tiny_models.write_rerank(directory / "rerank.gguf")
    (directory / "truncated.gguf").write_bytes((directory / "chat.gguf").read_bytes()[:20000])
    (directory / "corrupt.gguf").write_bytes(b"not a GGUF file at all" * 100)
    return directory


async def post(runner: Runner, path: str, body: dict[str, Any]) -> Any:
    url = f"http://127.0.0.1:{runner.endpoint.port}{path}"
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        response = await client.post(url, json=body)
        assert response.status_code == 200, response.text
        return response.json()


def test_start_answer_and_stop(run: Run, models: Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with Node(REAL) as node:
            started_at = loop.time()
            runner, reports = node.start(*ARGS, model_path=str(models / "chat.gguf"))
            healthy = await reports.healthy()
            print(f"ready after {(loop.time() - started_at) * 1000:.0f} ms")
            assert healthy.slots == 2
            chat = await post(runner, "/v1/chat/completions", {"messages": [{"role": "user", "content": "who?"}]})
            assert chat["choices"][0]["message"]["content"] == "alpha says I am alpha"
            assert await runner.busy_slots() == 0
            stopped_at = loop.time()
            runner.terminate()
            exited = await reports.exited()
            print(f"stopped after {(loop.time() - stopped_at) * 1000:.0f} ms")
            assert exited.returncode == 0
            assert exited.reason == "llama-server stopped: exit code 0"

    run(test())


@pytest.mark.parametrize(
    ("model", "args", "cause"),
    [
        ("none.gguf", (), "failed to open GGUF file"),
        ("corrupt.gguf", (), "invalid magic characters"),
        ("truncated.gguf", (), "data is not within the file bounds, model is corrupted or incomplete"),
        ("chat.gguf", ("--bad-flag",), "error: invalid argument: --bad-flag"),
        ("chat.gguf", ("-ngl", "many"), 'error while handling argument "-ngl"'),
    ],
    ids=["missing", "corrupt", "truncated", "flag", "value"],
)
async def test_a_load_that_fails_says_why(models: Path, model: str, args: tuple[str, ...], cause: str) -> None:
    async with Node(REAL) as node:
        _, reports = node.start(*ARGS, *args, model_path=str(models / model))
        exited = await reports.exited()
        assert exited.returncode == 1
        assert cause in exited.reason
        assert cause in "\n".join(exited.log_tail)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="downloads need x86-64")
async def test_a_model_is_downloaded_from_hugging_face_once(models: Path, tmp_path: Path) -> None:
    """Also through the cache when the hub is gone."""
    with hub((models / "chat.gguf").read_bytes()) as url:
        env = {"MODEL_ENDPOINT": url, "LLAMA_CACHE": str(tmp_path)}
        for _ in range(2):
            async with Node(REAL) as node:
                runner, reports = node.start(*ARGS, model_path=None, hf_repo="me/tiny:Q4_0", env=env)
                await reports.healthy()
                chat = await post(runner, "/v1/chat/completions", {"messages": [{"role": "user", "content": "who?"}]})
                assert chat["choices"][0]["message"]["content"] == "alpha says I am alpha"
            env["MODEL_ENDPOINT"] = "http://127.0.0.1:1"


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="downloads need x86-64")
@pytest.mark.parametrize(
    ("repo", "args", "cause"),
    [("me/other", (), "GET failed (404)"), (None, ("-mu", "{url}/none.gguf"), "failed with status code: 404")],
    ids=["repository", "url"],
)
async def test_a_download_that_fails_says_why(
    tmp_path: Path, repo: str | None, args: tuple[str, ...], cause: str
) -> None:
    with hub(b"") as url:
        async with Node(REAL) as node:
            env = {"MODEL_ENDPOINT": url, "LLAMA_CACHE": str(tmp_path)}
            given = [arg.format(url=url) for arg in args]
            _, reports = node.start(*ARGS, *given, model_path=None, hf_repo=repo, env=env)
            assert cause in (await reports.exited()).reason


def test_a_machine_on_which_nothing_can_be_downloaded_says_so(tmp_path: Path) -> None:
    script = tmp_path / "embedded.py"
    script.write_text(Path(embedded.__file__).read_text().replace('"x86_64"', '"another"'))
    command = [sys.executable, "-I", "-S", str(script), "-hf", "me/tiny"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the embedded engine cannot download models on this machine; use model_path" in done.stderr


def test_sigterm_while_it_loads(run: Run, models: Path) -> None:
    """trap 16"""

    async def test() -> None:
        async with Node(REAL) as node:
            runner, reports = node.start(*ARGS, model_path=str(models / "chat.gguf"))
            await line_of(runner, "init")
            runner.terminate()
            assert (await reports.exited()).returncode in (-signal.SIGTERM, 0)

    run(test())


def test_stop_with_a_request_in_progress(run: Run, models: Path) -> None:
    """llama.cpp alone may wait for ever for a request that nobody reads; terminate closes connections first."""

    async def test() -> None:
        async with Node(REAL) as node:
            runner, reports = node.start(*ARGS, model_path=str(models / "chat.gguf"))
            await reports.healthy()
            writer = await _endless_request(runner)
            runner.endpoint.closers.append(writer.transport.abort)
            runner.terminate()
            exited = await reports.exited()
            assert exited.returncode in (0, -signal.SIGALRM)

    run(test())


def test_kill_with_a_request_in_progress(run: Run, models: Path) -> None:
    async def test() -> None:
        async with Node(REAL) as node:
            runner, reports = node.start(*ARGS, model_path=str(models / "chat.gguf"))
            await reports.healthy()
            writer = await _endless_request(runner)
            runner.terminate()  # the client stays: it hangs
            runner.kill()
            assert (await reports.exited()).returncode == -signal.SIGKILL
            writer.transport.abort()

    run(test())


def test_a_crash_under_load_is_an_event(run: Run, models: Path) -> None:
    async def test() -> None:
        loop = asyncio.get_running_loop()
        async with Node(REAL) as node:
            runner, reports = node.start(*ARGS, model_path=str(models / "chat.gguf"))
            await reports.healthy()
            writer = await _endless_request(runner)
            assert runner._process is not None
            assert runner._process._pidfd is not None
            assert runner.pid is not None
            killed_at = loop.time()
            os.kill(runner.pid, signal.SIGKILL)
            exited = await reports.exited()
            print(f"crash detected after {(loop.time() - killed_at) * 1000:.1f} ms")
            assert exited.returncode == -signal.SIGKILL
            writer.transport.abort()

    run(test())


async def test_its_api_key_works_though_it_is_not_in_its_arguments(models: Path) -> None:
    """traps 101, 104"""
    async with Node(REAL) as node:
        runner, reports = node.start(*ARGS, "--api-key", "sesame,other", model_path=str(models / "chat.gguf"))
        assert (await reports.healthy()).slots == 2
        assert b"sesame" not in _command_line(runner)
        async with httpx.AsyncClient(trust_env=False) as client:
            url = f"http://127.0.0.1:{runner.endpoint.port}/v1/models"
            assert (await client.get(url)).status_code == 401
            assert (await client.get(url, headers={"Authorization": "Bearer other"})).status_code == 200


async def test_the_tiny_embedding_model_and_reranker_do_their_work(models: Path) -> None:
    async with Node(REAL) as node:
        embed, embed_reports = node.start(*ARGS, "--embedding", model_path=str(models / "embed.gguf"))
        rerank, rerank_reports = node.start(*ARGS, "--reranking", model_path=str(models / "rerank.gguf"))
        await embed_reports.healthy()
        await rerank_reports.healthy()
        texts = ["the cat eat the fish", "cat and fish", "paris capital france"]
        data = (await post(embed, "/v1/embeddings", {"input": texts}))["data"]
        first, near, far = (entry["embedding"] for entry in data)
        assert _dot(first, near) > _dot(first, far) + 0.2
        query = {"query": "what does a panda eat", "documents": ["paris is a city", "a panda eat bamboo"]}
        results = (await post(rerank, "/v1/rerank", query))["results"]
        assert max(results, key=lambda result: float(result["relevance_score"]))["index"] == 1


NODE = """
import asyncio, sys
from tests.engine.children import REAL, Node
from tests.engine.test_embedded import wrapped
from mesh.engine.runner import Healthy

async def main():
    node = Node(wrapped() if sys.argv[1] == "wrapped" else REAL)
    runner, reports = node.start("-t", "1", model_path=sys.argv[2])
    await reports.healthy()
    print(runner.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def wrapped() -> EngineBinary:
    """The real server as the child of a shell."""
    return EngineBinary(("bash", "-c", '"$@"; exit', "bash", *REAL.argv), None, "configured")


@pytest.mark.parametrize("kind", ["direct", "wrapped"])
def test_no_llama_server_survives_a_killed_node(models: Path, kind: str) -> None:
    """traps 13, 14: as a child, and as the child of a wrapper."""
    command = [sys.executable, "-c", NODE, kind, str(models / "chat.gguf")]
    node = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": os.getcwd()})
    with node:
        assert node.stdout is not None
        child = int(node.stdout.readline())
        servers = [child, *_children(child)]
        assert len(servers) == (2 if kind == "wrapped" else 1)
        node.kill()
    for pid in servers:
        wait_for_death(pid)


def test_the_wrong_wheel_is_refused(tmp_path: Path) -> None:
    """The shim reads a C++ layout: any other version must not even be tried."""
    script = tmp_path / "embedded.py"
    script.write_text(Path(embedded.__file__).read_text().replace(embedded.PIN, "2020.1.1"))
    done = subprocess.run([sys.executable, "-I", "-S", str(script), "-m", "x"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'xllamacpp==2020.1.1'" in done.stderr


@pytest.mark.parametrize("flags", [["-I", "-S", embedded.__file__], ["-m", "mesh.engine.embedded"]], ids=["S", "m"])
def test_both_ways_to_run_it(flags: list[str]) -> None:
    done = subprocess.run([sys.executable, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert "no model given" in done.stderr


async def _endless_request(runner: Runner) -> asyncio.StreamWriter:
    """Send a request that is never finished, and return when the child computes on it."""
    _, writer = await asyncio.open_connection("127.0.0.1", runner.endpoint.port)
    body = b'{"prompt":"go","n_predict":1000000,"ignore_eos":true}'
    writer.write(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    while await runner.busy_slots() != 1:
        pass
    return writer


def _command_line(runner: Runner) -> bytes:
    return Path(f"/proc/{runner.pid}/cmdline").read_bytes()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
