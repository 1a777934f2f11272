"""A new llama-server's first test: each way to fail is told apart, and nothing is left running."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.build import server_under_test, smoke
from mesh.build.rejected import RejectedError
from mesh.build.server_under_test import Line, ServerUnderTest
from mesh.build.smoke import CPU_NOTE, DONE_NOTE, Smoked
from mesh.errors import BuildError
from mesh.host.ports import PortAllocator
from mesh.models import tiny_model
from mesh.models.tiny_model import SENTENCE
from tests.build import servers

ENV = {"PATH": os.environ["PATH"]}


async def outcome(binary: Path, env: Mapping[str, str] = ENV, model: Path = Path("unread.gguf")) -> Smoked:
    return await smoke.smoke(binary, model, env=env, say=lambda line: None)


async def refused(binary: Path) -> RejectedError:
    with pytest.raises(RejectedError) as caught:
        await outcome(binary)
    return caught.value


@pytest.mark.e2e
async def test_a_real_llama_server_says_the_sentence(tmp_path: Path) -> None:
    model, lines = tmp_path / "tiny.gguf", list[str]()
    tiny_model.ensure(model)
    env = {**ENV, "LLAMA_ARG_CTX_SIZE": "16", "LLAMA_API_KEY": "an operator's", "LLAMA_ARG_N_PREDICT": "1"}
    binary = servers.real(tmp_path / "llama-server")
    assert await smoke.smoke(binary, model, env=env, say=lines.append, args=("-t", "1")) == Smoked()
    assert "version: " in lines[0]


@pytest.mark.e2e
async def test_a_real_llama_server_without_a_model_is_explained(tmp_path: Path) -> None:
    error = await refused(servers.real(tmp_path / "llama-server"))
    assert error.exit_status == 1
    assert "(loading a tiny model)" in error.message
    assert "No such file" in error.message
    assert error.log_tail


async def test_one_that_works(tmp_path: Path) -> None:
    assert await outcome(servers.fake(tmp_path / "llama-server", say=SENTENCE)) == Smoked()


@pytest.mark.parametrize(
    ("faults", "step", "what", "status"),
    [
        ({"crash_at_load": 1}, "loading a tiny model", "error loading model: fake", 1),
        ({"crash_after": 0}, "a chat completion", "aborted", 134),
        ({"crash_after": 0, "crash_code": -11}, "a chat completion", "segmentation fault", -11),
        ({"crash_after": 1}, "a streamed chat completion", "aborted", 134),
        ({"error_status": 500}, "a chat completion", "was answered 500", None),
        ({"say": "GGGGGGG"}, "a chat completion", 'it said "GGGGGGG" instead of', None),
        ({"error_event_after": 2}, "a streamed chat completion", "ended too early", None),
        ({"half_event_after": 2}, "a streamed chat completion", "was not answered", None),
    ],
)
async def test_one_that_fails(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: dict[str, Any],
    step: str,
    what: str,
    status: int | None,
) -> None:
    if status is None:
        monkeypatch.setattr(server_under_test, "CRASH_LIMIT_S", 0.05)  # it lives on, and we need not wait for that
    error = await refused(servers.fake(tmp_path / "llama-server", **{"say": SENTENCE, **faults}))
    assert f"({step})" in error.message
    assert what in error.message
    assert error.exit_status == status
    assert 0 < len(error.log_tail) <= 40


@pytest.mark.parametrize(
    ("text", "status", "what"),
    [
        (
            'echo "llama-server: error while loading shared libraries: libggml.so: cannot open shared object" >&2; '
            "exit 127",
            127,
            "install the package",
        ),
        ("kill -ILL $$", -4, "-DGGML_NATIVE=OFF"),
        ('echo "/lib/libc.so.6: version \\`GLIBC_2.99\' not found" >&2; exit 1', 1, "newer libraries"),
        ("exit 3", 3, "exit code 3"),
    ],
)
async def test_one_that_does_not_even_tell_its_version(tmp_path: Path, text: str, status: int, what: str) -> None:
    error = await refused(servers.script(tmp_path / "llama-server", text))
    assert "(--version)" in error.message
    assert what in error.message
    assert error.exit_status == status


async def test_one_that_hangs_at_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "VERSION_LIMIT_S", 0.2)
    error = await refused(servers.script(tmp_path / "llama-server", "exec sleep 600"))
    assert "it did not end within" in error.message


async def test_one_that_cannot_be_executed(tmp_path: Path) -> None:
    path = tmp_path / "llama-server"
    assert "no such file" in (await refused(path)).message
    path.write_bytes(b"\x7fELF, but not of this machine")
    path.chmod(0o644)
    assert "not executable" in (await refused(path)).message
    path.chmod(0o755)
    error = await refused(path)
    assert "Exec format error" in error.message
    assert "another kind of machine" in error.message


async def test_one_that_ignores_sigterm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_under_test, "STOP_LIMIT_S", 0.3)
    pid_file = tmp_path / "pid"
    binary = servers.fake(tmp_path / "llama-server", f"echo $$ >{pid_file}", say=SENTENCE, ignore_sigterm=True)
    error = await refused(binary)
    assert "(stopping)" in error.message
    assert not psutil.pid_exists(int(pid_file.read_text()))


async def test_one_that_is_never_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_under_test, "READY_LIMIT_S", 0.2)
    error = await refused(servers.fake(tmp_path / "llama-server", never_listen=True))
    assert "it was not ready within" in error.message


async def test_full_gpus_are_left_out(tmp_path: Path) -> None:
    full = 'if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "E CUDA error: out of memory" >&2; exit 1; fi'
    assert await outcome(servers.fake(tmp_path / "llama-server", full, say=SENTENCE)) == Smoked(
        (CPU_NOTE,), on_cpu=True
    )


async def test_full_memory_is_no_fault_of_the_build(tmp_path: Path) -> None:
    """Somebody else may have it: the commit is not held, and tried again."""
    with pytest.raises(BuildError, match=r"for lack of memory: .*out of memory") as caught:
        await outcome(servers.fake(tmp_path / "llama-server", 'echo "E out of memory" >&2; exit 1'))
    assert not isinstance(caught.value, RejectedError)
    assert (caught.value.exit_status, len(caught.value.log_tail)) == (1, 1)


async def test_a_crash_at_the_end_is_only_noted(tmp_path: Path) -> None:
    crash = "trap 'kill $!; exit 5' TERM"
    run = servers.fake(tmp_path / "inner", say=SENTENCE)
    binary = servers.script(
        tmp_path / "llama-server", f'[ "$1" = --version ] && exit 0\n{crash}\n{run} "$@" &\nwait\nexit 5\n'
    )
    assert (await outcome(binary)).notes == (
        "the new llama-server works, but ended with exit status 5 when it was told to stop",
    )


async def test_streams_without_done_are_only_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = ServerUnderTest.post

    async def post(self: ServerUnderTest, path: str, body: Mapping[str, Any], limit_s: float) -> list[Line]:
        return [line for line in await answered(self, path, body, limit_s) if "[DONE]" not in line.text]

    monkeypatch.setattr(ServerUnderTest, "post", post)
    assert (await outcome(servers.fake(tmp_path / "llama-server", say=SENTENCE))).notes == (DONE_NOTE,)


async def test_a_cancelled_test_leaves_nothing(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    os.mkfifo(pid_file)
    binary = servers.fake(tmp_path / "llama-server", f"echo $$ >{pid_file}", load_s=600)
    test = asyncio.ensure_future(outcome(binary))
    pid = int(await asyncio.to_thread(pid_file.read_text))
    assert psutil.pid_exists(pid)
    test.cancel()
    with pytest.raises(asyncio.CancelledError):
        await test
    assert not psutil.pid_exists(pid)


async def test_a_port_that_somebody_takes_is_no_fault_of_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    ports = iter([taken.sockets[0].getsockname()[1], PortAllocator().reserve()])
    monkeypatch.setattr(PortAllocator, "reserve", lambda self: next(ports))
    async with taken, ServerUnderTest((str(servers.fake(tmp_path / "llama-server")),), Path("m"), env=ENV) as server:
        assert await server.post("/tokenize", {"content": "a"}, 10.0)


async def test_nothing_of_the_operators_gets_to_the_server(tmp_path: Path) -> None:
    dump = tmp_path / "env"
    env = {**ENV, "LLAMA_ARG_PORT": "1", "LLAMA_API_KEY": "secret", "LLAMA_CACHE": "/cache"}
    await outcome(servers.fake(tmp_path / "llama-server", f"env >{dump}", say=SENTENCE), env)
    names = {line.split("=")[0] for line in dump.read_text().splitlines()}
    assert {"LLAMA_CACHE", "OMP_WAIT_POLICY"} <= names
    assert not {"LLAMA_ARG_PORT", "LLAMA_API_KEY"} & names
