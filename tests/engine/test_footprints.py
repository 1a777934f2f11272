"""The book of footprints over real files: look-ups on the loop, reading in threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh.config.builds import LlamaCpp
from mesh.config.profile import Profile
from mesh.core.devices import Devices, Gpu
from mesh.core.footprint import Footprint, Source
from mesh.core.model_facts import ModelFacts
from mesh.core.resources import Resources
from mesh.engine import examine as examine_module
from mesh.engine import footprints as module
from mesh.engine import llama
from mesh.engine.footprints import FootprintBook
from mesh.engine.locate import EngineBinary, Engines
from mesh.errors import EngineMissingError
from tests.engine.children import FAKE, make_profile
from tests.synthetic_models import write

ENGINE = EngineBinary(("/opt/llama-server",), None, "configured")
EMBEDDED = EngineBinary(("python",), "b11549", "embedded")
GPUS = tuple(Gpu(f"gpu{i}", f"GPU-{i}", "A100", 80_000, 10, index=i) for i in range(2))
BOX = Devices("nvml", GPUS, 64_000, 60_000)


class Book:
    """A book over a machine that the test may change, and a way to wait for its answers."""

    def __init__(self, path: Path | None = None) -> None:
        self.engine: Callable[[], EngineBinary] = lambda: ENGINE
        self.devices: Devices | None = Devices()
        self.ram_limit_mib: int | None = None
        self.environ: dict[str, str] = {}
        self.told = 0
        self._news = asyncio.Event()
        self.book = FootprintBook(
            engine=lambda profile: self.engine(),
            ram_limit_mib=lambda: self.ram_limit_mib,
            devices=lambda: self.devices,
            path=path,
            changed=self._changed,
            environ=self.environ,
        )

    def _changed(self) -> None:
        self.told += 1
        self._news.set()

    async def of(self, profile: Profile) -> Footprint:
        """Ask as the supervisor does: again once it was told that there is news."""
        async with asyncio.timeout(10):
            while (found := self.book.of(profile)) is None or not self.book.fresh(profile):
                self._news.clear()
                await self._news.wait()
        return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "dense.gguf"
    write("dense", path)
    return path


def profile(model: Path | str, *args: str, **fields: Any) -> Profile:
    return make_profile("-c", "4096", *args, model_path=str(model), **fields)


def ram(footprint: Footprint | None) -> int:
    assert footprint is not None
    return footprint.need.fixed.mib["ram"]


async def test_the_first_answer_comes_later_and_then_at_once(model: Path) -> None:
    book = Book()
    assert book.book.peek(profile(model)) is None
    assert book.book.of(profile(model)) is None
    assert book.told == 0
    found = await book.of(profile(model))
    assert (book.told, found.source) == (1, Source.ESTIMATED)
    assert found.estimate is not None
    assert ram(found) > found.estimate.total.cpu // 2**20 > 0
    assert book.book.of(profile(model)) is found, "the same object, for the scheduler compares"
    assert book.book.peek(profile(model)) is found


async def test_reading_never_happens_on_the_loop(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 108"""
    threads: list[int] = []
    real = examine_module.examine

    def watched(*args: Any) -> Any:
        threads.append(threading.get_ident())
        return real(*args)

    monkeypatch.setattr(module, "examine", watched)
    await Book().of(profile(model))
    assert threads
    assert threading.get_ident() not in threads


async def test_an_old_look_is_looked_at_again_before_it_counts(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Book()
    first = await book.of(profile(model))
    monkeypatch.setattr(module, "FRESH_S", -1.0)
    assert book.book.of(profile(model)) is first, "a plan for one that waits must not change for this"
    assert not book.book.fresh(profile(model)), "but nothing is started"
    monkeypatch.undo()
    assert await book.of(profile(model)) is first


async def test_a_replaced_file_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 47"""
    book, path = Book(), tmp_path / "m.gguf"
    write("dense", path)
    small = await book.of(profile(path))
    book.book.learn(profile(path), 5, None, first=True)
    write("dense", path, layers=9)
    monkeypatch.setattr(module, "FRESH_S", -1.0)
    assert book.book.of(profile(path)) is not None
    monkeypatch.undo()
    assert not book.book.fresh(profile(path)), "it is being looked at"
    large = await book.of(profile(path))
    assert (large.source, large.identity == small.identity) == (Source.ESTIMATED, False)
    assert ram(large) > ram(small)


@pytest.mark.parametrize("content", [None, b"", b"GGUF\x03\x00\x00\x00 and the download broke off"])
async def test_a_file_that_is_missing_or_broken_is_named(tmp_path: Path, content: bytes | None) -> None:
    """trap 48"""
    path = tmp_path / "broken.gguf"
    if content is not None:
        path.write_bytes(content)
    found = await Book().of(profile(path))
    assert found.problem is not None
    assert str(path) in found.problem
    assert found.source is Source.UNKNOWN


async def test_a_problem_is_over_when_the_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book, path = Book(), tmp_path / "late.gguf"
    assert (await book.of(profile(path))).problem is not None
    write("dense", path)
    monkeypatch.setattr(module, "FRESH_S", -1.0)
    book.book.of(profile(path))
    monkeypatch.undo()
    assert (await book.of(profile(path))).problem is None


async def test_a_disk_that_stumbles_once_is_asked_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(path: str, identity: str | None) -> ModelFacts:
        raise OSError(5, "Input/output error", path)

    book = Book()
    monkeypatch.setattr(llama, "_read", stumble)
    found = await book.of(profile(model))
    assert found.problem is not None
    assert "Input/output error" in found.problem
    monkeypatch.undo()
    monkeypatch.setattr(module, "FRESH_S", -1.0)
    book.book.of(profile(model))
    monkeypatch.undo()
    assert (await book.of(profile(model))).problem is None


async def test_what_is_loaded_beside_the_model_must_be_there_too(model: Path, tmp_path: Path) -> None:
    for flag in ("-md", "--mmproj", "--lora"):
        found = await Book().of(profile(model, flag, str(tmp_path / "none.gguf")))
        assert found.problem is not None
        assert "none.gguf" in found.problem
    drafted = await Book().of(profile(model, "-md", str(model)))
    assert drafted.estimate is not None
    assert drafted.estimate.draft.cpu > 0


def test_files_beside_a_model_that_the_child_downloads_tell_launches_apart(tmp_path: Path) -> None:
    path = tmp_path / "projector.gguf"
    fetching = make_profile("-hfr", "a/b", "--mmproj", str(path), model_path=None)

    def look() -> examine_module.Look:
        return examine_module.examine(fetching, {}, lambda of: ENGINE)

    path.write_bytes(b"one")
    before = look()
    assert (before.problem, look().identity) == (None, before.identity)
    path.write_bytes(b"another")
    assert look().identity != before.identity
    write("dense", path)
    assert (look().with_gpus, look().file_bytes, look().problem) == (None, 0, None), "it is not the model"


async def test_a_model_that_the_child_downloads_is_no_problem(tmp_path: Path) -> None:
    for fields in ({"hf_repo": "a/b"}, {"args": ("-mu", "http://x/m.gguf", "-m", str(tmp_path / "none.gguf"))}):
        found = await Book().of(replace(make_profile(model_path=None), **fields))
        assert (found.problem, found.source) == (None, Source.UNKNOWN)


async def test_a_model_that_cannot_be_estimated_may_run(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    write("dense", path, heads=0, heads_kv=0)
    found = await Book().of(profile(path))
    assert (found.problem, found.source) == (None, Source.UNKNOWN)
    assert ram(found) >= path.stat().st_size // 2**20


async def test_a_bug_in_looking_keeps_nobody_waiting(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "examine", broken)
    book = Book()
    found = await book.of(profile(model))
    assert (found.problem, found.source) == (None, Source.UNKNOWN)
    assert "failed unexpectedly" in caplog.text
    book.book.learn(profile(model), 5, None, first=True)
    assert (await book.of(profile(model))).source is Source.UNKNOWN, "nobody knows what was measured"


async def test_the_machine_decides_where_memory_is_needed(model: Path) -> None:
    book = Book()
    on_cpu = await book.of(profile(model))
    book.devices = BOX
    on_gpu = await book.of(profile(model))
    assert (on_cpu.need.gpu_mib, on_gpu.need.gpu_mib > 0) == (0, True)
    assert on_gpu.estimate is not None
    assert on_gpu.need.grain_mib >= on_gpu.estimate.largest_layer_bytes // 2**20
    book.devices = Devices("nvml", tuple(replace(gpu, used_mib=5000) for gpu in GPUS), 64_000, 9)
    assert await book.of(profile(model)) is on_gpu, "what others use is not our need"
    book.devices = Devices("nvml", (replace(GPUS[0], unified=True),), 64_000, 9)
    assert (await book.of(profile(model))).need.gpu_mib == 0


async def test_nothing_is_said_before_the_first_sample(model: Path) -> None:
    book = Book()
    book.devices = None
    await book.book.look([profile(model)])
    assert book.book.of(profile(model)) is None
    assert book.book.peek(profile(model)) is None
    book.devices = Devices()
    assert book.book.of(profile(model)) is not None


async def test_a_driver_that_hangs_stops_nobody_for_ever(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """trap 44"""
    monkeypatch.setattr(module, "FIRST_SAMPLE_LIMIT_S", 0.02)
    book = Book()
    book.devices = None
    assert (await book.of(profile(model))).need.gpu_mib == 0
    assert caplog.text.count("as if it had no GPU") == 1
    book.devices = BOX
    assert (await book.of(profile(model))).need.gpu_mib > 0, "better late than never"


async def test_the_embedded_engine_uses_no_gpu(model: Path) -> None:
    book = Book()
    book.engine, book.devices = (lambda: EMBEDDED), BOX
    assert (await book.of(profile(model))).need.gpu_mib == 0


@pytest.mark.parametrize(
    ("environ", "fields", "gpus"),
    [
        ({}, {}, None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {}, ("gpu1",)),
        ({"CUDA_VISIBLE_DEVICES": "1"}, {"devices": ("gpu0",)}, ("gpu0",)),
        ({}, {"env": {"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-0"}}, ("gpu1", "gpu0")),
    ],
)
async def test_who_may_use_which_gpus(
    model: Path, environ: dict[str, str], fields: Mapping[str, Any], gpus: tuple[str, ...] | None
) -> None:
    book = Book()
    book.devices = BOX
    book.environ.update(environ)
    need = (await book.of(profile(model, **fields))).need
    assert (need.gpus, need.all_gpus) == (gpus, "env" in fields)


async def test_variables_of_the_node_reach_the_child_and_the_estimate(model: Path) -> None:
    book = Book()
    plain = await book.of(make_profile(model_path=str(model)))
    book.environ["LLAMA_ARG_CACHE_TYPE_K"] = "q8_0"
    other = await book.of(replace(make_profile(model_path=str(model)), key="other:default"))
    assert plain.estimate is not None
    assert other.estimate is not None
    assert other.estimate.kv.total < plain.estimate.kv.total
    assert other.identity != plain.identity


async def test_learned_figures_take_over_and_are_kept(model: Path, tmp_path: Path) -> None:
    """trap 47"""
    book = Book(tmp_path / "f.json")
    book.ram_limit_mib = 16_000
    before = await book.of(profile(model))
    assert before.estimate is not None
    assert before.prompt_cache_mib == -(-4 * before.estimate.kv.total // 2**20), "less than 1/16 of the limit"
    book.book.learn(profile(model), 300, None, first=True)
    book.book.learn(profile(model), 5000, None, first=False)
    learned = await book.of(profile(model))
    assert (learned.source, ram(learned)) == (Source.LEARNED, 5000)
    assert await book.book.save()
    again = Book(tmp_path / "f.json")
    again.book.restore()
    assert (await again.of(profile(model))).source is Source.LEARNED


@pytest.mark.parametrize(
    "change",
    [
        {"args": ("-c", "8192")},
        {"env": {"LLAMA_ARG_N_PARALLEL": "9"}},
    ],
)
async def test_another_launch_has_learned_nothing(model: Path, change: Mapping[str, Any]) -> None:
    """trap 47"""
    book = Book()
    await book.of(profile(model))
    book.book.learn(profile(model), 300, None, first=True)
    assert (await book.of(profile(model))).source is Source.LEARNED
    edited = replace(profile(model), **change)
    assert book.book.peek(edited) is None
    assert (await book.of(edited)).source is Source.ESTIMATED


async def test_another_engine_has_learned_nothing(model: Path, tmp_path: Path) -> None:
    """trap 47"""
    binary = tmp_path / "llama-server"
    sources = []
    book = Book()
    book.engine = Engines({"default": LlamaCpp(binary_path=str(binary))}).named
    for content in ("one", "another"):
        binary.write_text(content)
        await book.book.look([profile(model)])
        book.book.survey([])
        sources.append((await book.of(profile(model))).source)
        book.book.learn(profile(model), 300, None, first=True)
    assert sources == [Source.ESTIMATED, Source.ESTIMATED]


async def test_what_was_learned_on_a_gpu_says_nothing_without_one(model: Path) -> None:
    book = Book()
    book.devices = BOX
    await book.of(profile(model))
    book.book.learn(profile(model), 300, {"gpu0": 900}, first=True)
    assert (await book.of(profile(model))).need.gpu_mib == 900
    book.devices = Devices()
    assert (await book.of(profile(model))).source is Source.ESTIMATED


async def test_a_figure_goes_to_what_the_instance_was_started_with(tmp_path: Path) -> None:
    """The file may be replaced while it runs."""
    book, path = Book(), tmp_path / "m.gguf"
    write("dense", path)
    written_ns = path.stat().st_mtime_ns
    started = await book.of(profile(path))
    write("dense", path, layers=9)
    book.book.survey([])
    await book.of(profile(path))
    book.book.learn(profile(path), 300, None, first=True, identity=started.identity)
    assert (await book.of(profile(path))).source is Source.ESTIMATED
    write("dense", path)
    os.utime(path, ns=(written_ns, written_ns))
    book.book.survey([])
    assert (await book.of(profile(path))).source is Source.LEARNED


async def test_new_figures_of_the_cookbook_count_at_once(model: Path) -> None:
    book = Book()
    await book.of(profile(model))
    figure = replace(profile(model), estimate=Resources.of(ram_mib=77))
    assert (ram(book.book.peek(figure)), ram(book.book.of(figure))) == (77, 77)


async def test_a_survey_warms_the_cache_and_forgets_what_is_gone(model: Path) -> None:
    book = Book()
    kept, gone = profile(model), replace(profile(model), key="gone:default")
    await book.of(gone)
    book.book.survey([kept])
    assert book.book.peek(gone) is None
    await book.of(kept)
    await book.book.look([kept, gone])
    assert book.book.peek(gone) is not None
    assert book.told == 2, "only who asked is told"


async def test_a_missing_engine_prevents_no_estimate(model: Path) -> None:
    def none() -> EngineBinary:
        raise EngineMissingError("none")

    book = Book()
    book.engine = none
    assert (await book.of(profile(model))).source is Source.ESTIMATED


def fake_engine(path: Path) -> Callable[[], EngineBinary]:
    path.write_text(f'#!/bin/sh\nexec {" ".join(FAKE.argv)} "$@"\n')
    path.chmod(0o755)
    return Engines({"default": LlamaCpp(binary_path=str(path))}).named


async def test_flags_that_the_engine_does_not_know_are_a_problem_and_told_once(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Before anybody asks for it; an edit, or another engine, is told of anew."""
    book, wrong = Book(), profile(model, "--bogus")
    book.engine = fake_engine(tmp_path / "llama-server")
    for _ in range(2):
        book.book.survey([wrong])
        found = await book.of(wrong)
        book.book._entries.clear()
    said = "llama-server (build default) does not know --bogus"
    assert found.problem == said
    assert found.source is Source.ESTIMATED, "what it would take is known all the same"
    assert caplog.messages == [f"m will not start: {said}"]
    assert (await book.of(profile(model, "--jinja"))).problem is None
    await book.of(wrong)
    assert caplog.messages == [f"m will not start: {said}"] * 2


async def test_only_a_node_writes_of_flags_into_its_log(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A command that asks for a footprint says it itself."""
    book = Book()
    book.engine = fake_engine(tmp_path / "llama-server")
    await book.book.look([wrong := profile(model, "--bogus")])
    found = book.book.peek(wrong)
    assert found is not None
    assert found.problem is not None
    assert caplog.messages == []


async def test_flags_and_files_are_told_together(tmp_path: Path) -> None:
    book = Book()
    book.engine = fake_engine(tmp_path / "llama-server")
    found = await book.of(profile(tmp_path / "gone.gguf", "--bogus"))
    assert found.problem is not None
    assert found.problem.startswith("llama-server (build default) does not know --bogus; ")
    assert found.problem.endswith("there is no such file")


async def test_each_profile_is_looked_at_with_its_own_engine(model: Path) -> None:
    asked: list[str] = []

    def engine(profile: Profile) -> EngineBinary:
        asked.append(profile.key)
        return EMBEDDED if profile.key == "small:default" else ENGINE

    book = FootprintBook(
        engine=engine, ram_limit_mib=lambda: None, devices=lambda: BOX, path=None, changed=lambda: None, environ={}
    )
    small = replace(profile(model), key="small:default")
    await book.look([profile(model), small])
    assert sorted(asked) == ["m:default", "small:default"]
    needs = [found.need.gpu_mib for p in (profile(model), small) if (found := book.peek(p)) is not None]
    assert needs[0] > needs[1] == 0, "the embedded one uses no GPU"


async def test_after_an_engine_was_replaced_what_was_seen_a_moment_ago_does_not_count(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what is being seen at the moment: it may be of the old one."""
    book, mine = Book(), profile(model)
    book.engine = lambda: replace(ENGINE, identity="one")
    before = await book.of(mine)
    book.engine = lambda: replace(ENGINE, identity="two")
    await book.book.look([mine])
    assert book.book.fresh(mine)
    book.book.forget_looks()
    assert not book.book.fresh(mine)
    await book.book.look([mine])
    after = book.book.peek(mine)
    assert after is not None
    assert after.identity != before.identity
    book.book.forget_looks()
    looking = asyncio.create_task(book.book.look([mine]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    book.book.forget_looks()
    await looking
    assert not book.book.fresh(mine)
