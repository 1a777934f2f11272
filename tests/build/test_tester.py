"""``BuildTester``: the steps in their order, with real servers and with what the node gives it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.build import canary, pipeline
from mesh.build.canary import Served
from mesh.build.rejected import RejectedError
from mesh.build.smoke import CPU_NOTE
from mesh.build.spec import BuildSpec
from mesh.build.status import Comparison, Stage
from mesh.build.tester import MODEL_NAME, BuildTester
from mesh.errors import BuildError, EngineMissingError, InstanceError, MeshError, UnknownModelError
from mesh.host.process import Process
from mesh.host.warden import Warden
from mesh.models import tiny_model
from mesh.models.tiny_model import SENTENCE
from tests.build import servers

ENV = {"PATH": os.environ["PATH"]}


def spec_in(directory: Path, canary_profile: str | None = None) -> BuildSpec:
    return BuildSpec(
        name="default",
        enabled=True,
        repo_url="file:///nowhere",
        repo_path=directory / "repo",
        build_path=directory / "builds" / "build",
        binary_path=directory / "bin" / "llama-server",
        ref="master",
        max_slowdown=0.9,  # other tests run beside this one
        canary_profile=canary_profile,
    )


class Report:
    """What a test tells its admin."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stages: list[tuple[Stage, int | None, int | None]] = []

    def stage(self, stage: Stage, done: int | None, total: int | None) -> None:
        self.stages.append((stage, done, total))


async def tried(
    tester: pipeline.Tester, new: Path, old: Path | None, spec: BuildSpec, report: Report | None = None
) -> tuple[tuple[Comparison, ...], tuple[str, ...]]:
    report = report or Report()
    return await tester.test(new, old, spec=spec, say=report.lines.append, stage=report.stage)


class NoModels:
    """A cookbook without models; or one whose models the new build cannot load."""

    def __init__(self, new: MeshError | None = None) -> None:
        self.asked: list[str] = []
        self.binaries: list[Path | None] = []
        self.new = new

    def runs_by_default(self, profile_name: str, build: str) -> bool:
        return build == "default"

    @asynccontextmanager
    async def trial(self, profile_name: str, binary: Path | None) -> AsyncIterator[Served]:
        self.asked.append(profile_name)
        self.binaries.append(binary)
        if self.new is not None:
            raise self.new if binary else EngineMissingError("there is no old one")
        raise UnknownModelError(f"no profile {profile_name}")
        yield


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canary, "TINY_ROUNDS", (1,))


@pytest.mark.e2e
async def test_a_real_build_beside_a_real_one(tmp_path: Path) -> None:
    old, new = servers.real(tmp_path / "old"), servers.real(tmp_path / "new")
    spec, report = spec_in(tmp_path), Report()
    (comparison,), notes = await tried(BuildTester(lambda: ENV), new, old, spec, report)
    assert comparison.model == "tiny model"
    assert comparison.old is not None
    assert min(comparison.new.prefill_tps, comparison.new.decode_tps) > 1
    assert notes == ()
    assert report.stages[0] == (Stage.TESTING, None, None)
    assert report.stages[-1] == (Stage.COMPARING, canary.TINY_ROUNDS[0], canary.TINY_ROUNDS[0])
    assert "tok/s" in report.lines[-1]
    written = (spec.build_path.parent / MODEL_NAME).read_bytes()
    assert hashlib.sha256(written).hexdigest() == tiny_model.SHA256


@pytest.mark.e2e
async def test_a_real_build_that_lost_half_of_its_prefill_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "TINY_ROUNDS", (12,))  # among these, both have a quiet moment on a busy machine
    old, new = servers.real(tmp_path / "old"), servers.real(tmp_path / "new", "-b 2 -ub 2")  # hardly any batching
    with pytest.raises(RejectedError, match=r"too slow with 'tiny model' .*: prefill lost"):
        await tried(BuildTester(lambda: ENV), new, old, replace(spec_in(tmp_path), max_slowdown=0.2))


async def test_a_build_that_fails_its_test_is_not_compared(tmp_path: Path, quick: None) -> None:
    report = Report()
    with pytest.raises(RejectedError, match="instead of"):
        await tried(BuildTester(lambda: ENV), servers.fake(tmp_path / "new", say="no"), None, spec_in(tmp_path), report)
    assert {stage for stage, _, _ in report.stages} == {Stage.TESTING}


async def test_a_build_in_the_place_of_the_old_one_is_compared_with_nothing(tmp_path: Path, quick: None) -> None:
    new, link = servers.fake(tmp_path / "new", say=SENTENCE, tokens_per_s=2000), tmp_path / "link"
    link.symlink_to(new)
    (comparison,), notes = await tried(BuildTester(lambda: ENV), new, link, spec_in(tmp_path))
    assert comparison.old is None
    assert notes == ()


async def test_gpus_that_were_full_stay_out_of_the_comparison(tmp_path: Path, quick: None) -> None:
    full = 'if [ -z "${CUDA_VISIBLE_DEVICES+set}" ]; then echo "E CUDA error: out of memory" >&2; exit 1; fi'
    new = servers.fake(tmp_path / "new", full, say=SENTENCE, tokens_per_s=2000)
    _, notes = await tried(BuildTester(lambda: ENV), new, None, spec_in(tmp_path))
    assert notes == (CPU_NOTE,)


async def test_the_canary_profile_is_asked_for(tmp_path: Path, quick: None) -> None:
    new, models = servers.fake(tmp_path / "new", say=SENTENCE, tokens_per_s=2000), NoModels()
    spec = spec_in(tmp_path, canary_profile="big")
    comparisons, notes = await tried(BuildTester(lambda: ENV, models), new, None, spec)
    assert len(comparisons) == 1
    assert models.asked == ["big"]
    assert notes == ("big could not be compared: no profile big",)


async def test_a_rejection_by_the_canary_profile_keeps_what_was_measured_before(tmp_path: Path, quick: None) -> None:
    new, models = servers.fake(tmp_path / "new", say=SENTENCE, tokens_per_s=2000), NoModels(InstanceError("it died"))
    with pytest.raises(RejectedError, match="cannot run big: it died") as caught:
        await tried(BuildTester(lambda: ENV, models), new, None, spec_in(tmp_path, canary_profile="big"))
    assert [comparison.model for comparison in caught.value.comparisons] == ["tiny model"]


@pytest.mark.parametrize("name", ["default", "vulkan"])
async def test_a_profile_of_another_build_is_compared_with_the_old_binary(
    tmp_path: Path, quick: None, name: str
) -> None:
    """Its own engine is of another kind: that it is faster says nothing."""
    new = servers.fake(tmp_path / "new", say=SENTENCE, tokens_per_s=2000)
    old = servers.fake(tmp_path / "old", say=SENTENCE, tokens_per_s=2000)
    models = NoModels()
    await tried(BuildTester(lambda: ENV, models), new, old, replace(spec_in(tmp_path, "big"), name=name))
    assert models.binaries == [None if name == "default" else old]


async def test_arguments_and_environment_are_passed_on(tmp_path: Path, quick: None) -> None:
    dump = tmp_path / "seen"
    new = servers.fake(tmp_path / "new", f'echo "$@" "$MARK" >{dump}', say=SENTENCE, tokens_per_s=2000)
    tester = BuildTester(lambda: {**ENV, "MARK": "a mark"}, args=("--verbose",))
    await tried(tester, new, None, spec_in(tmp_path))
    assert "--verbose --host 127.0.0.1 --port" in dump.read_text()
    assert dump.read_text().strip().endswith("a mark")


async def test_the_warden_knows_every_process(tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then none is left if the node is killed in the middle of it."""
    start, wardens = Process.start, list[object]()

    def started(argv: Sequence[str], **options: Any) -> Process:
        wardens.append(options.get("warden"))
        return start(argv, **options)

    monkeypatch.setattr(Process, "start", started)
    old, new = (servers.fake(tmp_path / name, say=SENTENCE, tokens_per_s=2000) for name in ("old", "new"))
    warden = Warden()
    await tried(BuildTester(lambda: ENV, warden=warden), new, old, replace(spec_in(tmp_path), max_slowdown=1.0))
    warden.close()
    assert wardens == [warden] * 4, "its version, its test, and both beside each other"


async def test_a_disk_that_takes_no_model_says_nothing_of_the_build(tmp_path: Path, quick: None) -> None:
    (tmp_path / "builds").write_text("a file where a directory is needed")
    with pytest.raises(BuildError, match="cannot write the tiny model") as caught:
        await tried(BuildTester(lambda: ENV), servers.fake(tmp_path / "new"), None, spec_in(tmp_path))
    assert not isinstance(caught.value, RejectedError)


def test_it_is_a_tester() -> None:
    tester: pipeline.Tester = BuildTester(lambda: ENV)
    assert callable(tester.test)
