"""Old and new side by side: whose loss counts, whose failure counts, and what is only noted."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mesh.build import canary
from mesh.build.canary import compare_tiny, compare_trial
from mesh.build.measuring import measure, speed_of
from mesh.build.rejected import RejectedError
from mesh.build.server_under_test import Connection, Line, ServerFailedError, ServerUnderTest
from mesh.build.smoke import CPU_NOTE
from mesh.build.status import Comparison, Speed
from mesh.core.exits import Cause
from mesh.errors import BuildError, CapacityError, EngineMissingError, InstanceError, MeshError, UnknownModelError
from tests.build import servers

ENV = {"PATH": os.environ["PATH"]}
FAST, SLOW = Speed(1000, 100), Speed(1000, 50)


@dataclass
class Scripted:
    """Rounds as a test wants them: each server's speeds in turn, the last one for ever. Errors are raised."""

    old: Sequence[Speed | MeshError]
    new: Sequence[Speed | MeshError]
    order: list[str] = field(default_factory=list)

    async def tiny_round(self, server: Any, number: int) -> Speed:
        return self.next(Path(server._argv[0]).name)

    def next(self, name: str) -> Speed:
        script = self.old if name == "old" else self.new
        step = script[min(self.order.count(name), len(script) - 1)]
        self.order.append(name)
        if isinstance(step, MeshError):
            raise step
        return step


async def tiny(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: Scripted, **changes: Any
) -> tuple[Comparison, tuple[str, ...]]:
    """Compare two fake servers, whose rounds *script* tells."""
    monkeypatch.setattr(canary, "_tiny_round", script.tiny_round)
    monkeypatch.setattr(canary, "TINY_ROUNDS", (2, 4))
    arguments: dict[str, Any] = {
        "old": servers.fake(tmp_path / "old"),
        "new": servers.fake(tmp_path / "new"),
        "model": Path("unread.gguf"),
        "max_slowdown": 0.3,
        "env": ENV,
        "say": lambda line: None,
        "progress": lambda done, total: None,
    }
    return await compare_tiny(**arguments | changes)


async def test_the_best_of_both_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([Speed(900, 100), Speed(1000, 80)], [Speed(1100, 70), Speed(800, 90)])
    comparison, notes = await tiny(tmp_path, monkeypatch, script)
    assert comparison == Comparison("tiny model", Speed(1000, 100), Speed(1100, 90))
    assert notes == ()
    assert script.order == ["old", "new", "new", "old"]


async def test_a_loss_is_measured_again_before_it_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    script = Scripted([FAST], [SLOW, SLOW, FAST])
    comparison, _ = await tiny(tmp_path, monkeypatch, script, progress=lambda *step: seen.append(step))
    assert comparison.new == FAST
    assert script.order.count("new") == 6
    assert (seen[0], seen[-1]) == ((0, 2), (6, 6))


async def test_a_loss_that_stays_rejects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([FAST], [SLOW])
    with pytest.raises(
        RejectedError, match=r"'tiny model' \(best of 6 rounds\): decode lost 50%: 100 tok/s before, 50"
    ) as e:
        await tiny(tmp_path, monkeypatch, script)
    assert e.value.comparisons == (Comparison("tiny model", FAST, SLOW),)


async def test_a_loss_may_be_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, _ = await tiny(tmp_path, monkeypatch, Scripted([FAST], [SLOW]), max_slowdown=0.6)
    assert comparison.new == SLOW


async def test_without_an_old_one_the_speed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([], [SLOW])
    assert await tiny(tmp_path, monkeypatch, script, old=None) == (Comparison("tiny model", None, SLOW), ())
    assert script.order == ["new", "new"]


@pytest.mark.parametrize("fault", ["does not start", "is gone", "breaks"])
async def test_an_old_one_that_fails_rejects_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    old = tmp_path / "old"
    if fault != "is gone":
        servers.fake(old, "exit 3" if fault == "does not start" else "")
    script = Scripted([FAST, ServerFailedError("it broke")], [SLOW])
    comparison, (note,) = await tiny(tmp_path, monkeypatch, script, old=old)
    assert comparison == Comparison("tiny model", None, SLOW)
    assert note.startswith("nothing to compare with: the llama-server in use failed")


async def direct(old: Path | None, new: Path, **changes: Any) -> tuple[Comparison, tuple[str, ...]]:
    """Compare fake servers by their own answers."""
    arguments: dict[str, Any] = {"max_slowdown": 0.3, "env": ENV}
    arguments |= {"say": lambda line: None, "progress": lambda done, total: None}
    return await compare_tiny(old, new, Path("unread.gguf"), **arguments | changes)


async def test_a_new_one_that_crashes_is_rejected(tmp_path: Path) -> None:
    old, new = servers.fake(tmp_path / "old"), servers.fake(tmp_path / "new", crash_after=1, tokens_per_s=2000)
    with pytest.raises(RejectedError, match=r"measuring its speed.*aborted") as caught:
        await direct(old, new)
    assert caught.value.exit_status == 134
    assert caught.value.log_tail


async def test_a_new_one_that_is_ten_times_slower_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TINY_ROUNDS", (1, 1))
    old = servers.fake(tmp_path / "old", tokens_per_s=1000, prefill_s=0.01)
    new = servers.fake(tmp_path / "new", tokens_per_s=50, prefill_s=0.01)
    with pytest.raises(RejectedError, match="decode lost"):
        await direct(old, new)


async def test_where_two_have_no_room_on_the_gpus_both_leave_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "TINY_ROUNDS", (1, 1))
    full = 'if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "E CUDA error: out of memory" >&2; exit 1; fi'
    old, new = servers.fake(tmp_path / "old"), servers.fake(tmp_path / "new", full)
    comparison, notes = await direct(old, new, max_slowdown=1.0)
    assert comparison.old is not None
    assert notes == (CPU_NOTE,)


async def test_a_new_one_without_memory_is_not_rejected(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="for lack of memory") as caught:
        await direct(None, servers.fake(tmp_path / "new", 'echo "E out of memory" >&2; exit 1'))
    assert not isinstance(caught.value, RejectedError)


async def test_an_old_one_without_memory_is_no_fault_of_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "TINY_ROUNDS", (1, 1))
    old = servers.fake(tmp_path / "old", 'echo "E out of memory" >&2; exit 1')
    comparison, notes = await direct(old, servers.fake(tmp_path / "new"))
    assert comparison.old is None
    assert "out of memory" in notes[-1]


# -- what an answer tells


def events(*pieces: dict[str, Any]) -> list[Line]:
    """One event each second."""
    return [Line(float(n), json.dumps(piece)) for n, piece in enumerate(pieces, start=1)]


def test_the_servers_own_figures_are_preferred() -> None:
    last = {"content": "", "stop": True, "timings": {"prompt_per_second": 500.5, "predicted_per_second": 20}}
    assert speed_of(events({"content": "a"}, {"content": "b"}, last), 0.0, 10) == Speed(500.5, 20)


@pytest.mark.parametrize("timings", [{}, {"prompt_per_second": 0}, {"predicted_per_second": 20}, {"x": None}])
def test_else_the_clock_tells(timings: dict[str, Any]) -> None:
    answer = events({"content": "a"}, {"content": "b"}, {"content": "c"}, {"content": "", "timings": timings})
    assert speed_of(answer, 0.5, 10) == Speed(20, 1)


@pytest.mark.parametrize(
    "answer",
    [[], events({"content": "a"}), events({"error": {"message": "no"}}), [Line(1.0, "{")], [Line(1.0, "[DONE]")]],
)
def test_an_answer_that_tells_nothing(answer: list[Line]) -> None:
    assert speed_of(answer, 0.0, 10) is None


def test_prompts_differ_from_their_first_letter_on() -> None:
    prompts = [canary._prompt(number, 192) for number in range(26)]
    assert len({prompt[0] for prompt in prompts}) == 26
    assert {len(prompt) for prompt in prompts} == {192}


# -- on a model of the cookbook


@dataclass(frozen=True)
class Instance:
    base_url: str
    api_key: str | None = None


@dataclass
class Lender:
    """Lends instances as a script wants; counts those that are lent and those that were given back.

    What it refuses it lends *willing* times before.
    """

    script: Scripted
    refusals: Mapping[str, MeshError] = field(default_factory=dict)
    lent: list[str] = field(default_factory=list)
    given_back: int = 0
    willing: int = 0

    def runs_by_default(self, profile_name: str, build: str) -> bool:
        return True

    @asynccontextmanager
    async def trial(self, profile_name: str, binary: Path | None) -> AsyncIterator[Instance]:
        name = "old" if binary is None else binary.name
        if name in self.refusals and self.lent.count(name) >= self.willing:
            raise self.refusals[name]
        self.lent.append(name)
        try:
            yield Instance(f"http://{name}")
        finally:
            self.given_back += 1


async def trial(
    monkeypatch: pytest.MonkeyPatch,
    script: Scripted,
    refusals: Mapping[str, MeshError] | None = None,
    *,
    rounds: tuple[int, ...] = (2, 3),
    has_old: bool = True,
    willing: int = 0,
) -> tuple[Comparison | None, tuple[str, ...], Lender]:
    lender = Lender(script, refusals or {}, willing=willing)

    async def measured(server: Any, prompt: str, tokens: int, limit_s: float) -> Speed:
        return script.next(server._client.base_url.host)

    monkeypatch.setattr(canary, "measure", measured)
    monkeypatch.setattr(canary, "TRIAL_ROUNDS", rounds)
    result = await compare_trial(
        lender,
        "big",
        Path("new"),
        has_old=has_old,
        max_slowdown=0.3,
        say=lambda line: None,
        progress=lambda done, total: None,
    )
    assert lender.given_back == len(lender.lent)
    return *result, lender


async def test_a_model_is_measured_with_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([FAST], [FAST])
    comparison, notes, lender = await trial(monkeypatch, script)
    assert (comparison, notes) == (Comparison("big", FAST, FAST), ())
    assert lender.lent == ["old", "new"]
    assert script.order == ["old", "old", "new", "new"]


async def test_the_first_build_of_all_need_only_run_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, notes, lender = await trial(monkeypatch, Scripted([FAST], [SLOW]), has_old=False)
    assert (comparison, notes) == (Comparison("big", None, SLOW), ())
    assert lender.lent == ["new"]


async def test_a_loss_on_a_model_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, _, lender = await trial(monkeypatch, Scripted([FAST], [SLOW, SLOW, FAST]))
    assert comparison == Comparison("big", FAST, FAST)
    assert lender.lent == ["old", "new", "old", "new"]


async def test_a_loss_on_a_model_that_stays_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RejectedError, match=r"too slow with 'big' \(best of 5 rounds\): decode lost 50%"):
        await trial(monkeypatch, Scripted([FAST], [SLOW]))


@pytest.mark.parametrize(
    ("side", "error", "why"),
    [
        ("old", CapacityError("requests need the place"), "requests need the place"),
        ("new", CapacityError("no room"), "no room"),
        ("new", ServerFailedError("it ended", cause=Cause.MEMORY), "there was no memory for the new llama-server"),
        ("old", InstanceError("it did not start"), "the llama-server in use failed: it did not start"),
    ],
)
async def test_a_loss_that_cannot_be_measured_again_is_no_verdict_and_no_leave(
    monkeypatch: pytest.MonkeyPatch, side: str, error: MeshError, why: str
) -> None:
    """It must not come into use, but another time it may prove itself: so nobody remembers it against the commit."""
    with pytest.raises(BuildError, match=r"too slow with 'big', and could not be measured again") as caught:
        await trial(monkeypatch, Scripted([FAST], [SLOW]), {side: error}, willing=1)
    assert not isinstance(caught.value, RejectedError)
    assert f"({why}" in caught.value.message
    assert "decode lost 50%: 100 tok/s before, 50 now. It is not put in force" in caught.value.message


@pytest.mark.parametrize("side", ["old", "new"])
@pytest.mark.parametrize("error", [UnknownModelError("no such model"), CapacityError("no room")])
async def test_a_model_that_cannot_be_had_is_noted(
    monkeypatch: pytest.MonkeyPatch, side: str, error: MeshError
) -> None:
    comparison, (note,), _ = await trial(monkeypatch, Scripted([FAST], [FAST]), {side: error})
    assert comparison is None
    assert note == f"big could not be compared: {error}"


@pytest.mark.parametrize("old", [None, EngineMissingError("none was there before")])
async def test_a_new_one_that_does_not_load_a_model_is_rejected(
    monkeypatch: pytest.MonkeyPatch, old: MeshError | None
) -> None:
    refusals: dict[str, MeshError] = {"new": InstanceError("unknown model architecture")} | (
        {"old": old} if old else {}
    )
    with pytest.raises(RejectedError, match="cannot run big: unknown model architecture"):
        await trial(monkeypatch, Scripted([FAST], [FAST]), refusals)


@pytest.mark.parametrize(
    "failure",
    [
        ServerFailedError("it ended", cause=Cause.MEMORY),
        InstanceError("llama-server ended by itself: exit code 1\nE ggml_cuda: cudaMalloc failed: out of memory"),
        InstanceError(
            "llama-server ended: killed by SIGKILL; if nobody did that on purpose, the system ran out of memory"
        ),
    ],
)
async def test_a_new_one_whose_memory_somebody_took_is_noted(
    monkeypatch: pytest.MonkeyPatch, failure: MeshError
) -> None:
    comparison, (note,), _ = await trial(monkeypatch, Scripted([FAST], [FAST]), {"new": failure})
    assert comparison is None
    assert "big could not be compared: there was no memory for the new llama-server" in note


async def test_a_new_one_that_crashes_on_a_model_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RejectedError, match="cannot run big: it broke"):
        await trial(monkeypatch, Scripted([FAST], [FAST, ServerFailedError("it broke")]))


async def test_a_model_that_neither_runs_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = InstanceError("the file is gone")
    comparison, (note,), _ = await trial(monkeypatch, Scripted([], []), {"old": failed, "new": failed})
    assert comparison is None
    assert "neither the old nor the new" in note


async def test_an_old_one_that_fails_on_a_model_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison, (note,), _ = await trial(monkeypatch, Scripted([ServerFailedError("it broke")], [SLOW]))
    assert comparison == Comparison("big", None, SLOW)
    assert note == "big: nothing to compare with: it broke"


async def test_a_slow_model_gets_two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TRIAL_BUDGET_S", 0.0)
    script = Scripted([FAST], [FAST])
    await trial(monkeypatch, script, rounds=(9,))
    assert script.order == ["old", "old", "new", "new"]


async def test_a_lent_instance_is_asked_with_its_key(tmp_path: Path) -> None:
    binary = servers.fake(tmp_path / "llama-server", tokens_per_s=2000)
    async with ServerUnderTest((str(binary),), Path("m.gguf"), args=("--api-key", "k"), env=ENV) as server:
        assert server._connection is not None
        url = str(server._connection._client.base_url)
        with pytest.raises(ServerFailedError, match="401") as caught:
            await server.post("/completion", {"prompt": "a"}, 10.0)
        assert caught.value.http_status == 401
        connection = Connection(url, "k")
        assert (await measure(connection, "a b c", 4, 10.0)).decode_tps > 0
        await connection.close()
