"""Asking the real engine, and the fake one, whether a profile's arguments are any good."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mesh.engine import vetting
from mesh.engine.locate import EngineBinary
from mesh.engine.vetting import complaint
from mesh.errors import ConfigError, InstanceError
from tests.engine.children import FAKE, REAL, make_profile
from tests.host.deaths import wait_for_death


@pytest.mark.parametrize(
    ("args", "answer"),
    [
        (("-np", "2", "-c", "8192", "-ctk", "q8_0", "-fa", "on", "-ot", "exps=CPU"), None),
        (("--no-such-flag",), "error: invalid argument: --no-such-flag"),
        (("-c", "lots"), 'error while handling argument "-c": stoi'),
        (("-ctk", "q9"), 'error while handling argument "-ctk": Unsupported cache type: q9'),
        (("-dev", "CUDA9"), 'error while handling argument "-dev": invalid device: CUDA9'),
    ],
)
async def test_the_real_engine_judges_arguments_without_loading_anything(
    args: tuple[str, ...], answer: str | None
) -> None:
    """trap 46: the model does not even exist."""
    assert await complaint(make_profile(*args, model_path="/no/such.gguf"), REAL) == answer


async def test_a_flag_without_its_value_cannot_swallow_the_question() -> None:
    """Else the engine would take --version for a file name, and load the model."""
    answer = await complaint(make_profile("--mmproj", model_path=None, hf_repo="a/b"), REAL)
    assert answer is not None
    assert answer.startswith("error: invalid argument")


async def test_variables_are_judged_too() -> None:
    answer = await complaint(make_profile(env={"LLAMA_ARG_CTX_SIZE": "lots"}), REAL)
    assert answer == 'error while handling environment variable "LLAMA_ARG_CTX_SIZE": stoi'


def script(tmp_path: Path, text: str) -> EngineBinary:
    path = tmp_path / "llama-server"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return EngineBinary((str(path),), None, "configured")


@pytest.mark.parametrize(
    "text",
    [
        "exit 0",
        "echo 'error: invalid argument: --version'; exit 1",
        "echo 'error: cannot reach the licence server'; exit 1",
    ],
)
async def test_only_a_clear_refusal_counts(tmp_path: Path, text: str) -> None:
    assert await complaint(make_profile(), script(tmp_path, text)) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("kill -ILL $$", "illegal instruction"),
        ("kill -SEGV $$", "segmentation fault"),
        ("exit 139", "exit code 139"),
        ("echo 'llama-server: error while loading shared libraries: libggml.so'; exit 1", "libggml.so"),
        ("exec /no/such/program", "exit code 127"),
    ],
)
async def test_a_program_that_cannot_run_accepts_nothing(tmp_path: Path, text: str, answer: str) -> None:
    """A file that was half copied, or made for another machine: nobody goes for it."""
    told = await complaint(make_profile(), script(tmp_path, text))
    assert told is not None
    assert answer in told


def copy(program: Path, file: Path, share: float) -> None:
    whole = program.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])


@pytest.mark.parametrize("share", [0.0, 0.5], ids=["empty", "half copied"])
async def test_a_file_that_is_no_program_accepts_nothing(tmp_path: Path, share: float) -> None:
    engine = script(tmp_path, "")
    copy(Path("/bin/sh"), Path(engine.argv[0]), share)
    assert await complaint(make_profile(), engine) is not None


async def test_an_engine_that_does_not_know_the_question() -> None:
    assert await complaint(make_profile("-np", "2"), FAKE) is None
    assert await complaint(make_profile("--no-such-flag"), FAKE) == "error: invalid argument: --no-such-flag"


async def test_an_engine_that_does_something_else_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "LIMIT_S", 0.5)
    assert await complaint(make_profile(), script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")) is None
    if (tmp_path / "pid").exists():  # else it was killed even before that
        await asyncio.to_thread(wait_for_death, int((tmp_path / "pid").read_text()))


async def test_who_no_longer_wants_to_know_leaves_nothing_behind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pid")  # opening it waits for the engine to write its pid
    engine = script(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600")
    judging = asyncio.ensure_future(complaint(make_profile(), engine))
    pid = int(await asyncio.to_thread((tmp_path / "pid").read_text))
    judging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await judging
    await asyncio.to_thread(wait_for_death, pid)


async def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    with pytest.raises(InstanceError, match="no such file"):
        await complaint(make_profile(), EngineBinary((str(tmp_path / "none"),), None, "configured"))
    with pytest.raises(ConfigError, match="names no model"):
        await complaint(make_profile(model_path=None), REAL)
