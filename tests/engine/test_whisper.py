"""whisper-server's command line, its flags (``HELP`` is the real one's) and its memory, without running it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from mesh.config.profile import Engine, Profile
from mesh.config.settings import Settings
from mesh.core.footprint import Known, Learned, Machine, build
from mesh.core.gpu_choice import Choice
from mesh.core.launch_options import LaunchOptions
from mesh.core.resources import Resources
from mesh.core.whisper_estimate import PROCESS_RAM_MIB, WhisperOptions
from mesh.engine import flags, whisper
from mesh.engine.examine import examine
from mesh.engine.flags import unknown_flags
from mesh.engine.instances import Instance, launch_identity
from mesh.engine.kind import Capability, Option
from mesh.engine.kinds import KINDS, engines, kind_of
from mesh.engine.lease import Endpoint
from mesh.engine.locate import EngineBinary
from mesh.engine.vetting import complaint
from mesh.engine.whisper import known_flags, last_words, options_of
from mesh.errors import ConfigError, EngineMissingError
from tests.engine.children import make_profile
from tests.engine.supervised import FakeRunner
from tests.tiny_whisper import write_whisper

ENGINE = EngineBinary(("/opt/whisper-server",), "1.8.5", "configured", build="", program="whisper-server")
MIB = 1024 * 1024
HELP = """
usage: /opt/whisper-server [options] 

options:
  -h,        --help                      [default] show this help message and exit
  -t N,      --threads N                 [2      ] number of threads to use during computation
  -d  N,     --duration N                [0      ] duration of audio to process in milliseconds
  -sow,      --split-on-word             [false  ] split on word rather than on token
  -bo N,     --best-of N                 [2      ] number of best candidates to keep
  -l LANG,   --language LANG             [en     ] spoken language ('auto' for auto-detect)
             --prompt PROMPT             [       ] initial prompt
             --carry-initial-prompt      [false  ] always prepend initial prompt
  -m FNAME,  --model FNAME               [models/ggml-base.en.bin] model path
  -dtw MODEL --dtw MODEL                 [       ] compute token-level timestamps
  --host HOST,                           [127.0.0.1] Hostname/ip-adress for the server
  --port PORT,                           [8080   ] Port number for the server
  --inference-path PATH,                 [/inference] Inference path for all requests
  --convert,                             [false  ] Convert audio to WAV, requires ffmpeg on the server
  --tmp-dir,                             [.      ] Temporary directory for ffmpeg transcoded files

Voice Activity Detection (VAD) options:
             --vad                           [false  ] enable Voice Activity Detection (VAD)
  -vspd N,   --vad-min-speech-duration-ms  N [250    ] VAD min speech duration (0.0-1.0)
"""  # noqa: W291


def profile(*args: str, **fields: Any) -> Profile:
    return make_profile(*args, **{"model_path": "/m/ggml.bin", "engine": Engine.WHISPER, **fields})


def argv(of: Profile, directory: Path | None = None, environ: dict[str, str] | None = None) -> list[str]:
    return list(whisper.command(of, ENGINE, 10001, environ or {}, directory=directory).argv)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_whisper(tmp_path / "tiny.bin")
    return tmp_path / "tiny.bin"


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# -- the command line


def test_the_users_arguments_come_first_and_the_nodes_win(tmp_path: Path) -> None:
    made = whisper.command(profile("-t", "2", "--language=de"), ENGINE, 10001, {"A": "b"}, directory=tmp_path)
    place = ["--host", "127.0.0.1", "--port", "10001", "--inference-path", "/inference"]
    assert list(made.argv) == ["/opt/whisper-server", "-t", "2", "--language", "de", "-m", "/m/ggml.bin", *place]
    assert (made.host, made.port, made.api_key, made.cwd) == ("127.0.0.1", 10001, None, tmp_path)
    assert made.env == {"A": "b", "OMP_WAIT_POLICY": "passive"}


def test_what_would_hide_it_from_the_node_is_left_out() -> None:
    words = argv(profile("--request-path", "/pre", "--inference-path=/v1", "--port", "9", "--host", "0.0.0.0"))
    assert words.count("--port") == words.count("--inference-path") == 1
    assert words[words.index("--host") + 1] == "0.0.0.0"
    assert "/pre" not in words
    assert "/v1" not in words
    assert "9" not in words


def test_files_are_found_from_its_own_directory_too() -> None:
    words = argv(profile("-vm", "vad.bin", "--prompt", "a/b", model_path="m.bin"))
    assert words[words.index("-m") + 1] == os.path.abspath("m.bin")
    assert words[words.index("-vm") + 1] == os.path.abspath("vad.bin")
    assert words[words.index("--prompt") + 1] == "a/b", "no file"


def test_a_model_in_the_arguments_wins() -> None:
    assert argv(profile("--model", "/other.bin")).count("/other.bin") == 1
    assert "/m/ggml.bin" not in argv(profile("--model", "/other.bin"))
    with pytest.raises(ConfigError, match="names no model"):
        argv(profile(model_path=None))


def test_conversion_needs_ffmpeg_and_has_a_place_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs ffmpeg, and there is none on PATH"):
        argv(profile(convert=True), tmp_path, {"PATH": str(tmp_path)})
    program(tmp_path / "bin/ffmpeg")
    environ = {"PATH": str(tmp_path / "bin")}
    words = argv(profile("--convert", convert=True), tmp_path, environ)
    assert words.count("--convert") == 1
    assert words[words.index("--tmp-dir") + 1] == str(tmp_path)
    own = argv(profile("--tmp-dir", "/big", convert=True), tmp_path, environ)
    assert own.count("--tmp-dir") == 1
    assert own[own.index("--tmp-dir") + 1] == str(tmp_path), "which is on that disk"
    assert "/big" not in own
    assert "--convert" not in argv(profile(), tmp_path, environ)


# -- what its help says


def test_its_help_is_read() -> None:
    known = known_flags(HELP)
    bare = {flag for flag, option in known.items() if not option.values}
    assert bare == {"-h", "--help", "-sow", "--split-on-word", "--carry-initial-prompt", "--convert", "--vad"}
    for flag in ("-t", "-d", "-l", "--prompt", "-m", "-dtw", "--dtw", "--host", "--tmp-dir", "-vspd", "-fp"):
        assert known[flag] == Option(1), flag
    assert unknown_flags(["-t", "2", "--ngl", "99", "--font-path", "-x", "-sow", "--vad"], known) == ("--ngl",)


def test_the_help_of_something_else_says_nothing() -> None:
    assert known_flags("  -m FNAME,  --model FNAME  [x] model\n  --port N,  [1] port\n") == {}
    assert known_flags("") == {}


def test_its_last_words_are_those_before_its_help() -> None:
    assert last_words(["error: unknown argument: -x", "", *HELP.splitlines()]) == ["error: unknown argument: -x"]
    assert last_words(["a", "b"]) == ["a", "b"]


# -- where it is


def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **keys: str) -> EngineBinary:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("LLAMA_MESH_CACHE", str(tmp_path / "cache"))
    return engines(Settings.model_validate({"whisper_cpp": keys})).of(profile())


def test_it_is_the_configured_one_else_that_on_path_else_the_one_that_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineMissingError, match=r"whisper_cpp\.binary_path.*on PATH.*make one"):
        find(tmp_path, monkeypatch)
    made = program(tmp_path / "cache/whisper-server-1.8.5-abc/whisper-server")
    old = program(tmp_path / "cache/whisper-server-1.8.4-abc/whisper-server")
    os.utime(old, (1, 1))
    found = find(tmp_path, monkeypatch)
    assert (found.argv, found.version, found.source, found.uses_gpus) == ((str(made),), "1.8.5", "cache", False)
    assert found.label == "whisper-server 1.8.5"
    on_path = program(tmp_path / "bin/whisper-server")
    found = find(tmp_path, monkeypatch)
    assert (found.argv, found.source, found.uses_gpus) == ((str(on_path),), "path", True)
    own = program(tmp_path / "own")
    assert find(tmp_path, monkeypatch, binary_path=str(own)).argv == (str(own),)
    before = found.identity
    on_path.write_text("#!/bin/sh\nexit\n")
    assert find(tmp_path, monkeypatch).identity != before, "replaced in place"


@pytest.mark.parametrize(("name", "wrong"), [("none", "does not exist"), ("bin", "is a directory")])
def test_a_configured_one_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, wrong: str) -> None:
    program(tmp_path / "bin/whisper-server")
    with pytest.raises(EngineMissingError, match=wrong):
        find(tmp_path, monkeypatch, binary_path=str(tmp_path / name))


# -- what it takes


def test_the_arguments_that_decide_about_memory() -> None:
    assert options_of(()) == WhisperOptions()
    words = ("-bo", "5", "--beam-size", "x", "-p", "2", "-nfa", "-ng")
    assert options_of(words) == WhisperOptions(best_of=5, processors=2, flash_attn=False, gpu=False)


@pytest.mark.parametrize(
    ("args", "env", "devices"),
    [
        ((), {}, None),
        (("-ng",), {}, ("none",)),
        (("-dev", "1"), {}, ("CUDA1",)),
        ((), {"WHISPER_ARG_DEVICE": "2"}, ("CUDA2",)),
        (("-dev", "x"), {}, None),
    ],
)
def test_it_takes_one_gpu_at_most(args: tuple[str, ...], env: dict[str, str], devices: tuple[str, ...] | None) -> None:
    options = whisper.launch(profile(*args), env).options
    assert options == LaunchOptions("/m/ggml.bin", split_mode="none", devices=devices, mmap=False, prompt_cache_mib=0)


def test_its_model_is_estimated(model: Path) -> None:
    look = examine(profile(model_path=str(model)), {}, lambda profile: ENGINE)
    assert look.problem is None
    assert look.with_gpus is not None
    assert look.without_gpus is not None
    assert look.with_gpus.weights.gpu == look.without_gpus.weights.cpu > 0
    assert look.process_ram_mib == PROCESS_RAM_MIB
    assert examine(profile(model_path=str(model)), {}, lambda profile: ENGINE, look) is look
    larger = examine(profile("-bo", "8", model_path=str(model)), {}, lambda profile: ENGINE)
    assert larger.identity != look.identity
    assert larger.without_gpus is not None
    assert larger.without_gpus.total.cpu > look.without_gpus.total.cpu


def test_what_was_learned_leaves_room_for_longer_audio(model: Path) -> None:
    """What is seen after a short request says nothing of what ten minutes of audio will take."""
    look = examine(profile(model_path=str(model)), {}, lambda profile: ENGINE)
    assert look.without_gpus is not None
    audio_mib = look.without_gpus.output.cpu // MIB
    assert audio_mib > 100
    learned = Learned(ready_ram_mib=60, peak_ram_mib=70, samples=1)
    known = Known(look.options, learned=learned, estimate=look.without_gpus, request_bytes=look.request_bytes)
    need = build(known, Machine(ram_limit_mib=10_000), Choice()).need
    assert 60 + audio_mib < need.fixed.mib["ram"] < look.without_gpus.total.cpu // MIB * 2
    assert build(known, Machine(ram_limit_mib=10_000), Choice()).prompt_cache_mib is None, "llama-server's"


@pytest.mark.parametrize("ready_mib", [0, 60])
def test_one_long_upload_is_not_charged_for_ever(model: Path, ready_mib: int) -> None:
    look = examine(profile(model_path=str(model)), {}, lambda profile: ENGINE)
    assert look.without_gpus is not None

    def charged(peak_mib: int) -> int:
        learned = Learned(ready_ram_mib=ready_mib, peak_ram_mib=peak_mib, samples=1)
        known = Known(look.options, learned=learned, estimate=look.without_gpus, request_bytes=look.request_bytes)
        return build(known, Machine(ram_limit_mib=100_000), Choice()).need.fixed.mib["ram"]

    assert charged(70) <= charged(631) == charged(3_700) < 2 * (look.without_gpus.total.cpu // MIB + 200)


def test_what_cannot_be_loaded_is_a_problem(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))

    def problem(*args: str, path: Path = model, **fields: Any) -> str:
        look = examine(profile(*args, model_path=str(path), **fields), {"PATH": ""}, lambda profile: ENGINE)
        assert look.problem is not None
        return look.problem

    assert "GGUF, for llama-server; whisper-server reads ggml models" in problem(path=tmp_path / "a.gguf")
    assert "there is no such file" in problem(path=tmp_path / "none")
    assert "vad.bin" in problem("-vm", str(tmp_path / "vad.bin"))
    assert "needs ffmpeg" in problem(convert=True)


def test_a_prompt_may_look_like_a_flag() -> None:
    place = ["-m", "/m/ggml.bin", "--host", "127.0.0.1", "--port", "10001", "--inference-path", "/inference"]
    for text in ("--port", "-x=y", "-m", "--convert"):
        assert argv(profile("-t", "2", "--prompt", text)) == [*ENGINE.argv, "--prompt", text, "-t", "2", *place]
    assert argv(profile("--prompt=--port")) == [*ENGINE.argv, "--prompt", "--port", *place]
    assert argv(profile("--prompt")) == [*ENGINE.argv, "--prompt", *place], "it says itself what is wrong"


async def test_it_is_asked_about_itself_where_nothing_of_the_nodes_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It loads libraries that it finds in its working directory, before it reads an argument."""
    monkeypatch.chdir(tmp_path)
    server = program(tmp_path / "whisper-server")
    server.write_text(f"#!/bin/sh\npwd >>{tmp_path}/where\n" + "\n".join(f"echo '{line}'" for line in (
        "  --model FNAME [x] m", "  --port PORT, [1] p", "  --inference-path PATH, [/] i")))  # fmt: skip
    engine = EngineBinary((str(server),), None, "path", build="", identity=str(server), program="whisper-server")
    flags.refused(("--bogus",), engine, {}, whisper.KIND)
    await complaint(profile("-t", "1"), engine)
    assert (tmp_path / "where").read_text().splitlines() == ["/", "/", "/"]


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LLAMA_MESH_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(EngineMissingError, match="no whisper-server found"):
        whisper.find(Settings())


# -- all engines


def test_every_engine_has_a_kind() -> None:
    assert set(KINDS) == set(Engine)
    assert all(kind.engine is engine and kind_of(profile(engine=engine)) is kind for engine, kind in KINDS.items())


@pytest.mark.parametrize("limit", [None, 0, 1, 4])
def test_it_gets_one_request_at_a_time_whatever_the_limits_say(limit: int | None) -> None:
    of = profile(max_concurrent=limit)
    endpoint = Endpoint("m-1", of, "127.0.0.1", 1)
    runner = FakeRunner("m-1", of, lambda report: None, endpoint)
    instance = Instance("m-1", of, runner, Resources(), 0.0, reported_slots=8)
    instance.adopt(of)
    assert (instance.slots, instance.limit) == (1, 1)
    assert not endpoint.keeps_alive
    assert endpoint.adapter is not None


def test_an_edit_that_concerns_the_process_makes_another_one() -> None:
    assert launch_identity(profile(convert=True)) != launch_identity(profile())
    assert launch_identity(profile(aliases=("a",))) == launch_identity(profile())


def test_who_can_do_what() -> None:
    def can(engine: Engine, *args: str, **fields: Any) -> set[str]:
        of = profile(*args, engine=engine, **fields)
        return {each.value for each in kind_of(of).capabilities(of)}

    assert can(Engine.WHISPER) == {"audio", "any"}
    assert can(Engine.LLAMA) == {"text", "any"}
    assert can(Engine.LLAMA, "--mmproj", "x") == {"text", "audio", "any"}
    assert can(Engine.LLAMA, hf_repo="a/b", model_path=None) == {"text", "any"}, "as most are"
    assert can(Engine.LLAMA, "--mmproj-auto", hf_repo="a/b", model_path=None) == {"text", "audio", "any"}
    assert can(Engine.LLAMA, env={"LLAMA_ARG_MMPROJ_URL": "x"}) == {"text", "audio", "any"}
    assert can(Engine.LLAMA, env={"LLAMA_ARG_MMPROJ": "x"}) == {"text", "audio", "any"}
    assert can(Engine.LLAMA, "--embedding") == {"embedding", "any"}
    assert can(Engine.LLAMA, "--embeddings", "--rerank") == {"embedding", "rerank", "any"}
    assert Capability("audio") is Capability.AUDIO
