"""The builds of llama-server: what a named one takes from llama_cpp, and which ones cannot stand beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.config.builds import LlamaCpp
from mesh.config.settings import Settings
from tests.config.files import Files

BUILDS = """
llama_cpp: {repo_url: https://x/y, binary_path: /opt/bin/llama-server, build_path: b/build/, keep_builds: 7,
            auto_update_interval_seconds: 1h, canary_profile: qwen3, max_slowdown: 20%, branch: b1}
builds:
  cuda-b1234: {branch: b1234, build_args: [-DX=1], build_command_args: []}
  Own:
    enabled: false
    binary_path: /opt/own
    build_path: elsewhere
    keep_builds: 0
    canary_profile: small
    max_slowdown: 1
  same:
"""


def test_a_named_build_is_llama_cpps_where_it_says_nothing(files: Files) -> None:
    builds = files.load(BUILDS).settings.build_settings()
    assert list(builds) == ["default", "cuda-b1234", "own", "same"]
    default = builds["default"]
    assert (default.max_slowdown, default.canary_profile) == (0.2, "qwen3")
    assert default == files.load(BUILDS).settings.llama_cpp
    assert builds["cuda-b1234"].model_dump() == {
        **default.model_dump(),
        "branch": "b1234",
        "build_args": ("-DX=1",),
        "build_path": "b/build-cuda-b1234",
        "binary_path": "/opt/bin/cuda-b1234/llama-server",
        "canary_profile": None,
    }
    assert builds["own"].model_dump() == {
        **default.model_dump(),
        "enabled": False,
        "binary_path": "/opt/own",
        "build_path": "elsewhere",
        "keep_builds": 0,
        "canary_profile": "small",
        "max_slowdown": 1,
    }
    assert builds["same"].branch == "b1"
    assert [build.is_made for build in builds.values()] == [True, True, False, True]


def test_without_any_there_is_the_default_one() -> None:
    assert Settings().build_settings() == {"default": LlamaCpp()}
    assert not LlamaCpp().is_made


def test_builds_may_come_from_the_environment(files: Files) -> None:
    environ = {
        "LLAMESH_BUILDS__CUDA__BRANCH": "b7",
        "LLAMESH_BUILDS__CUDA__BUILD_ARGS": "-DA=1,-DB=2",
        "LLAMESH_BUILDS__OWN__BRANCH": "b2",
        "LLAMESH_LLAMA_CPP__MAX_SLOWDOWN": "0.5",
    }
    builds = files.load("builds: {own: {branch: b1, keep_builds: 1}}", environ=environ).settings.build_settings()
    assert (builds["cuda"].branch, builds["cuda"].build_args) == ("b7", ("-DA=1", "-DB=2"))
    assert (builds["own"].branch, builds["own"].keep_builds, builds["own"].max_slowdown) == ("b2", 1, 0.5)


def test_a_lone_default_path_is_not_a_choice() -> None:
    assert not LlamaCpp().model_fields_set
    assert LlamaCpp(binary_path="/x").model_fields_set == {"binary_path"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("builds: {Default: {}}", "1: builds.default: is what llama_cpp is called"),
        ("builds:\n  a: {}\n  a b: {}", "3: builds.a b: is no name for a build; use letters"),
        ("builds: {.a: {}}", "1: builds..a: is no name for a build"),
        (f"builds: {{{'a' * 65}: {{}}}}", f"1: builds.{'a' * 65}: is no name"),
        ("builds: [a]", "1: builds: expected a mapping of keys, got a list"),
        ("builds: {a: 1}", "1: builds.a: expected a mapping of keys"),
        ("builds:\n  a:\n    brunch: x", "3: builds.a.brunch: unknown key; did you mean 'branch'?"),
        ("llama_cpp: {max_slowdown: 0}", "1: llama_cpp.max_slowdown: expected a share above 0 and up to 1"),
        ("repo_url: x", "1: repo_url: unknown key at this place; it belongs at llama_cpp.repo_url or builds.NAME.repo"),
        ("builds:\n  a:\n    binary_path: llama.cpp/x/../bin/llama-server", "3: builds.a.binary_path: /"),
        ("builds:\n  a: {build_path: /x}\n  b: {build_path: /x/}", "3: builds.b.build_path: /x is that of build 'a'"),
    ],
)
def test_what_cannot_be_is_refused_at_its_place(files: Files, config: str, expected: str) -> None:
    (error,) = files.errors(config)
    assert error.startswith(f"config.yaml:{expected}")


def test_builds_never_replace_what_is_no_symlink(files: Files, tmp_path: Path) -> None:
    """llamesh's own files have a symlink there; anything else is somebody's binary."""
    mine = tmp_path / "llama-server"
    mine.write_text("precious")
    made = f"llama_cpp:\n  repo_url: https://x/y\n  binary_path: {mine}\n"
    (error,) = files.errors(made)
    assert error == (
        f"config.yaml:3: llama_cpp.binary_path: {mine} is a file, and builds put a symlink there; move it away,"
        " or set enabled: false to run what is there as it is"
    )
    files.load(made + "  enabled: false")
    files.load(f"llama_cpp: {{binary_path: {mine}}}")
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    files.load(made.replace(str(mine), str(link)))
    (error,) = files.errors(made.replace(str(mine), str(tmp_path)))
    assert f"{tmp_path} is a directory, and" in error
    derived = f"llama_cpp: {{repo_url: https://x/y, binary_path: {link}}}\nbuilds:\n  a:\n  b: {{branch: b1}}"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "llama-server").write_text("precious")
    (error,) = files.errors(derived)
    assert error.startswith("config.yaml:4: builds.b.binary_path: ")


def test_updates_of_nothing_are_warned_of(files: Files) -> None:
    config = "llama_cpp: {auto_update_interval_seconds: 1h}\nbuilds:\n  a: {repo_url: https://x/y}\n  b: {}"
    (warning,) = files.warnings(config)
    assert warning.startswith("config.yaml:1: llama_cpp.auto_update_interval_seconds: has no effect: without repo_url")
    (warning,) = files.warnings("builds:\n  b: {auto_update_interval_seconds: 1h}")
    assert warning.startswith("config.yaml:2: builds.b.auto_update_interval_seconds: has no effect")
    assert files.warnings("llama_cpp: {repo_url: https://x/y, auto_update_interval_seconds: 1h}") == []


COOKBOOK = "models: [{name: Qwen3, profiles: [{llama_server_args: -hf a/b}]}]"


def test_a_canary_that_is_not_in_the_cookbook_is_warned_of(files: Files) -> None:
    config = "llama_cpp: {canary_profile: qwen}\nbuilds:\n  a: {canary_profile: QWEN3:default}"
    (warning,) = files.warnings(config, COOKBOOK)
    assert warning == (
        "config.yaml:1: llama_cpp.canary_profile: 'qwen' is not in the cookbook; did you mean 'qwen3'?;"
        " new builds are compared with the old on a tiny model only"
    )


def test_a_canary_that_another_engine_runs_is_warned_of(files: Files) -> None:
    (files.directory / "w.bin").write_bytes(b"lmgg")
    cookbook = "models: [{name: w, profiles: [{engine: whisper, model_path: w.bin}]}]"
    config = "llama_cpp: {canary_profile: W}\nbuilds:\n  a: {canary_profile: 'w:default'}"
    assert files.warnings(config, cookbook) == [
        f"config.yaml:{line}: {key}.canary_profile: '{name}' is run by whisper-server, not by a build of llama.cpp;"
        " new builds are compared with the old on a tiny model only"
        for line, key, name in ((1, "llama_cpp", "W"), (3, "builds.a", "w:default"))
    ]


@pytest.mark.parametrize(
    ("profile", "defaults", "expected"),
    [
        ("", "", None),
        ("engine_build: cuda", "", "cuda"),
        ("engine_build: CUDA", "", "cuda"),
        ("engine_build: default", "engine_build: cuda", None),
        ("engine_build: null", "engine_build: cuda", "cuda"),
        ("", "engine_build: cuda", "cuda"),
    ],
)
def test_a_profile_names_its_build(files: Files, profile: str, defaults: str, expected: str | None) -> None:
    text = f"defaults: {{{defaults}}}\nmodels: [{{name: m, profiles: [{{model_path: /m, {profile}}}]}}]"
    (found,) = files.load("builds: {Cuda: {}}", text).catalog.profiles
    assert (found.engine_build, found.engine_path) == (expected, None)


def test_a_build_that_does_not_exist_is_refused_at_its_line(files: Files) -> None:
    text = """defaults:
  engine_build: vulcan
models:
  - name: m
    profiles:
      - model_path: /m
        engine_build: cuba
      - {id: off, enabled: false, model_path: /m, engine_build: default}
"""
    first, second = files.errors("builds: {cuda: {}}", text)
    assert first == "cookbook.yaml:2: defaults.engine_build: there is no build 'vulcan'; config.yaml has: default, cuda"
    assert second == (
        "cookbook.yaml:7: models[0].profiles[0].engine_build: there is no build 'cuba'; did you mean 'cuda'?;"
        " config.yaml has: default, cuda"
    )
    (error,) = files.errors("{}", "models: [{name: m, profiles: [{model_path: /m, engine_path: /x}]}]")
    assert "engine_path: unknown key" in error, "only trials may name a binary"
