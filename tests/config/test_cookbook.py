"""Profiles of a cookbook: defaults, names, and what is refused with its line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.cookbook import build_catalog
from mesh.config.cookbook_file import CookbookFile
from mesh.config.diagnostics import ConfigErrors
from mesh.config.llama_args import args_hash
from mesh.config.profile import Catalog, Engine, Profile
from mesh.config.settings import Settings
from mesh.errors import UnknownModelError
from tests.config.files import Files

CONCURRENT = "max_concurrent_requests_per_instance"


def only(files: Files, profile: str, *, defaults: str = "", config: str = "") -> Profile:
    """Return the one profile of a cookbook with *profile*, a flow mapping's inside."""
    text = f"{defaults}\nmodels: [{{name: M, profiles: [{{{profile}}}]}}]\n"
    (found,) = files.load(config, text).catalog.profiles
    return found


def errors(files: Files, *models: str) -> list[str]:
    return files.errors(None, "models:\n" + "".join(f"  - {model}\n" for model in models))


def names(files: Files, *models: str) -> dict[str, str]:
    text = "models:\n" + "".join(f"  - {model}\n" for model in models)
    return {name: profile.key for name, profile in files.load(None, text).catalog.names.items()}


def test_a_bare_profile_has_every_default(files: Files) -> None:
    profile = only(files, "model_path: /m.gguf")
    assert profile == Profile(
        key="m:default",
        id="M",
        model="M",
        profile="default",
        args=(),
        model_path="/m.gguf",
        max_queue=1024,
        args_hash=args_hash(["-m", "/m.gguf", "-c", "0", "--fit", "off"]),
    )


def test_every_key_reaches_the_profile(files: Files) -> None:
    profile = only(
        files,
        "id: Big, description: d, hf_repo: u/r, hf_file: f, llama_server_args: '-c 9 --alias \"a b\"', env: {A: 1},"
        "engine: llama, aliases: [gpt], pinned: true, devices: [0, GPU-1], estimated_vram_mb: 2GB,"
        "estimated_sysmem_mb: 3, idle_timeout_seconds: 5m, max_instances: 0, max_concurrent_requests_per_instance: 0,"
        "max_queue_size: 7, max_wait_in_queue_ms: 0, max_request_duration_ms: 2500, min_eviction_tenure_secs: 0,"
        "startup_timeout_seconds: 90, download_timeout_seconds: 1h, drain_on_disconnect: true",
    )
    assert (profile.key, profile.id, profile.description) == ("m:big", "M:Big", "d")
    assert (profile.model_path, profile.hf_repo, profile.hf_file) == (None, "u/r", "f")
    assert profile.args == ("-c", "9", "--alias", "a b")
    assert (profile.env, profile.engine, profile.aliases) == ({"A": "1"}, Engine.LLAMA, ("gpt",))
    assert (profile.pinned, profile.devices, profile.drain_on_disconnect) == (True, ("0", "GPU-1"), True)
    assert profile.estimate.mib == {"vram": 2048, "ram": 3}
    assert (profile.idle_timeout_s, profile.max_instances, profile.max_concurrent, profile.max_queue) == (300, 0, 0, 7)
    assert (profile.max_wait_s, profile.max_request_s, profile.min_tenure_s) == (None, 2.5, 0)
    assert (profile.startup_timeout_s, profile.download_timeout_s) == (90, 3600)


@pytest.mark.parametrize(
    ("key", "attribute", "built_in", "limit", "default", "own"),
    [
        ("max_instances", "max_instances", 1, "max_instances_per_model: 2", 3, 0),
        ("max_queue_size", "max_queue", 1024, "max_queue_size_per_model: 2", 3, 0),
        ("min_eviction_tenure_secs", "min_tenure_s", 15, "min_eviction_tenure_secs: 2", 3, 0),
        ("max_wait_in_queue_ms", "max_wait_s", 60, "max_wait_in_queue_ms: 2000", 3000, 0),
        ("max_request_duration_ms", "max_request_s", None, "max_request_duration_ms: 2000", 3000, 0),
        (CONCURRENT, "max_concurrent", None, f"{CONCURRENT}: 2", 3, 0),
    ],
)  # fmt: skip
def test_an_explicit_value_is_never_shadowed(
    files: Files, key: str, attribute: str, built_in: object, limit: str, default: int, own: int
) -> None:
    """model_defaults < the cookbook's defaults < the profile; 0 is a value."""
    source, config, common = "model_path: /m", f"model_defaults: {{{limit}}}", f"defaults: {{{key}: {default}}}"
    assert getattr(only(files, source), attribute) == built_in
    assert getattr(only(files, source, config=config), attribute) == 2
    assert getattr(only(files, source, config=config, defaults=common), attribute) == 3
    explicit = only(files, f"{source}, {key}: {own}", config=config, defaults=common)
    assert getattr(explicit, attribute) == (None if key.endswith("_ms") else 0)


def test_a_whisper_profile(files: Files) -> None:
    files.write("m.bin", "lmgg")
    loaded = files.load(None, "models: [{name: M, profiles: [{engine: whisper, model_path: m.bin, convert: true}]}]")
    assert not loaded.warnings
    (profile,) = loaded.catalog.profiles
    assert (profile.engine, profile.convert, profile.args) == (Engine.WHISPER, True, ())
    assert profile.args_hash == args_hash(["-m", "m.bin"]), "its own arguments, and none of llama-server's"
    assert only(files, "model_path: m.bin, engine: whisper, llama_server_args: --convert").convert


def test_arguments_for_one_engine_are_not_for_another(files: Files) -> None:
    common = "defaults: {llama_server_args: --jinja}"
    assert only(files, "model_path: /m, engine: whisper", defaults=common).args == ()
    assert only(files, "model_path: /m", defaults=common).args == ("--jinja",)
    common = "defaults: {llama_server_args: -t 2, engine: whisper}"
    assert only(files, "model_path: /m", defaults=common).args == ("-t", "2")
    assert only(files, "model_path: /m, engine: llama", defaults=common).args == ()


def test_a_key_that_the_arguments_overrule_is_told(files: Files) -> None:
    (files.directory / "w.bin").write_bytes(b"lmgg")
    profile = "{engine: whisper, model_path: w.bin, convert: false, llama_server_args: --convert}"
    (warning,) = files.warnings("", f"models: [{{name: M, profiles: [{profile}]}}]")
    assert warning.endswith("convert: has no effect: llama_server_args have --convert")


def test_a_default_for_one_engine_does_not_touch_another(files: Files) -> None:
    """It would make another launch, and restart what runs."""
    builds = "builds: {two: {}}"
    for engine, key in (("llama", "convert: true"), ("whisper", "engine_build: two")):
        bare = f"model_path: /m, engine: {engine}"
        plain = only(files, bare, config=builds)
        assert only(files, bare, config=builds, defaults=f"defaults: {{{key}}}") == plain
        assert only(files, f"{bare}, {key}", config=builds) == plain, "nor does it have an effect of its own"


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("hf_repo: a/b", "hf_repo: whisper-server downloads nothing; give 'model_path', a ggml whisper file"),
        ("llama_server_args: -t 2", "profile M:default has no model: give 'model_path', a ggml whisper file"),
    ],
)
def test_a_whisper_profile_needs_a_file(files: Files, profile: str, expected: str) -> None:
    assert expected in errors(files, f"{{name: M, profiles: [{{engine: whisper, {profile}}}]}}")[0]


def test_defaults_reach_profiles_that_say_nothing(files: Files) -> None:
    common = "defaults: {llama_server_args: --jinja, env: {A: x, B: y}, pinned: true, devices: [1], engine: whisper}"
    bare = only(files, "model_path: /m", defaults=common)
    assert (bare.args, bare.env, bare.pinned, bare.devices) == (("--jinja",), {"A": "x", "B": "y"}, True, ("1",))
    own = only(files, "model_path: /m, llama_server_args: '', env: {B: z}, pinned: false, devices: []", defaults=common)
    assert (own.args, own.env, own.pinned, own.devices) == ((), {"A": "x", "B": "z"}, False, ())


def test_zero_instances_by_default_count_as_one(files: Files) -> None:
    assert only(files, "model_path: /m", config="model_defaults: {max_instances_per_model: 0}").max_instances == 1


def test_arguments_may_be_a_list(files: Files) -> None:
    profile = only(files, "llama_server_args: [-m, /a b.gguf, -c, 4096, --temp, 0.7, --mlock]")
    assert profile.args == ("-m", "/a b.gguf", "-c", "4096", "--temp", "0.7", "--mlock")


def test_a_tilde_in_model_path_is_the_home_directory(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert only(files, "model_path: ~/m.gguf").model_path == "/home/x/m.gguf"


@pytest.mark.parametrize("args", ["-m /x", "--model /x", "--model=/x", "-hfr a/b", "--hf-repo=a/b", "-hf a/b", "-mu u"])
def test_a_model_may_be_named_in_the_arguments(files: Files, args: str) -> None:
    assert only(files, f"llama_server_args: {args}").model_path is None


@pytest.mark.parametrize("profile", ["id: p", "id: p, llama_server_args: -c 9", "id: p, enabled: false"])
def test_a_profile_without_a_model_is_refused(files: Files, profile: str) -> None:
    """Trap 30: llama-server without a model would start as a router of its own. Disabled ones too, as in llamesh."""
    (error,) = errors(files, f"{{name: m, profiles: [{{{profile}}}]}}")
    assert error.startswith("cookbook.yaml:2: models[0].profiles[0]: profile m:p has no model: give 'model_path'")


def test_names_lead_to_profiles(files: Files) -> None:
    found = names(
        files,
        "{name: Qwen, profiles: [{model_path: /a}, {id: Long, model_path: /a, aliases: [GPT-4, 'llama3:8b']}]}",
        "{name: solo, profiles: [{id: only, model_path: /b}, {id: off, enabled: false, model_path: /b}]}",
        "{name: pair, profiles: [{id: x, model_path: /c}, {id: y, model_path: /c}]}",
        "{name: org/gone, enabled: false, profiles: [{model_path: /c}]}",
    )
    assert found == {
        "qwen:default": "qwen:default",
        "qwen:long": "qwen:long",
        "qwen": "qwen:default",
        "gpt-4": "qwen:long",
        "llama3:8b": "qwen:long",
        "solo:only": "solo:only",
        "solo": "solo:only",
        "pair:x": "pair:x",
        "pair:y": "pair:y",
    }


def test_duplicates_are_refused_whatever_their_case(files: Files) -> None:
    """Trap 84."""
    (error,) = errors(
        files,
        "{name: Qwen, profiles: [{id: a, model_path: /m}]}",
        "{name: other, profiles: [{model_path: /m}]}",
        "{name: qwen, profiles: [{id: A, model_path: /m}]}",
    )
    assert error.startswith("cookbook.yaml:4: models[2].profiles[0].id: duplicate model:profile identifier:")
    assert "'Qwen:a' and 'qwen:A' both resolve to 'qwen:a'" in error
    assert "the other is in line 2" in error


def test_duplicates_that_are_disabled_do_not_matter(files: Files) -> None:
    names(files, "{name: m, profiles: [{model_path: /a}, {enabled: false, model_path: /b}]}")


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("{name: 'a:b', profiles: [{model_path: /m}]}", "models[0].name: 'a:b' contains ':'"),
        ("{name: a, profiles: [{id: 'x:y', model_path: /m}]}", "models[0].profiles[0].id: 'x:y' contains ':'"),
    ],
)
def test_colons_in_names_are_refused(files: Files, model: str, expected: str) -> None:
    """Trap 84."""
    (error,) = errors(files, model)
    assert error.startswith(f"cookbook.yaml:2: {expected}")


@pytest.mark.parametrize("alias", ["other", "OTHER:default", "taken"])
def test_an_alias_that_is_taken_is_refused(files: Files, alias: str) -> None:
    (error,) = errors(
        files,
        "{name: other, profiles: [{model_path: /m, aliases: [taken]}]}",
        f"{{name: m, profiles: [{{model_path: /m, aliases: [fine, '{alias}']}}]}}",
    )
    assert error.startswith(f"cookbook.yaml:3: models[1].profiles[0].aliases[1]: '{alias}' is already")
    assert "the other is in line 2" in error


def test_an_alias_of_its_own_name_is_harmless(files: Files) -> None:
    assert names(files, "{name: m, profiles: [{model_path: /m, aliases: [m, 'M:default']}]}")["m"] == "m:default"


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("model_path: /m, hf_repo: a/b", "has both 'model_path' and 'hf_repo'"),
        ('model_path: /m, llama_server_args: "-c \'9"', "single quote at character 4 is never closed"),
        ("model_path: /m, llama_server_args: 3", "llama_server_args: expected text as in a shell, or a list"),
        ("model_path: /m, llama_server_args: [[a]]", "holds plain words and numbers only"),
        ('model_path: /m, llama_server_args: ["a\\0"]', "NUL character"),
        ("model_path: 7", "model_path: expected text, got 7; put it in quotes"),
        ("model_path: ''", "model_path: is empty"),
        ("model_path: /m, enabled: yes", "enabled: expected true or false, got 'yes'; write true"),
        ("model_path: /m, enabled: 1", "enabled: expected true or false, got 1"),
        ("model_path: /m, engine: lama", "expected one of: llama, whisper, got 'lama'; did you mean 'llama'?"),
        ("model_path: /m, max_instances: many", "max_instances: expected a whole number, got 'many'"),
        ("model_path: /m, max_instances: -1", "max_instances: must not be negative, got -1"),
        ("model_path: /m, startup_timeout_seconds: 0", "startup_timeout_seconds: is 0; every load"),
        ("model_path: /m, download_timeout_seconds: 0", "download_timeout_seconds: is 0; every download"),
        (
            "model_path: /m, idle_timeout_seconds: later",
            "idle_timeout_seconds: expected a number or text such as '30s'",
        ),
        ("model_path: /m, env: [A=1]", "env: expected a mapping of variables"),
        ("model_path: /m, env: {A: true}", "the value of A must be text or a number, got true; put it in quotes"),
        ("model_path: /m, env: {A: {B: 1}}", "the value of A must be text or a number, got a mapping"),
        ("model_path: /m, env: {A: ~}", "the value of A must be text or a number, got nothing; write ''"),
        ("model_path: /m, env: {'A=B': 1}", "'A=B' is not a variable's name"),
        ("model_path: /m, devices: {a: 1}", "devices: expected a list of GPUs"),
        ("model_path: /m, aliases: gpt", "aliases: expected a list"),
        ("model_path: /m, id: ' '", "id: is empty"),
        ("model_path: /m, id: 7", "id: expected text, got 7; put it in quotes"),
        ("model_pth: /m", "model_pth: unknown key; did you mean 'model_path'?"),
        ("model_path: /m, idle-timeout-seconds: 7", "did you mean 'idle_timeout_seconds'?"),
        ("model_path: /m, name: x", "unknown key at this place; it belongs at models[].name"),
        ("model_path: /m, bananas: 7", "unknown key; known here: llama_server_args, env, engine,"),
    ],
)
def test_one_error_for_one_mistake(files: Files, profile: str, expected: str) -> None:
    """Trap 84."""
    (error,) = errors(files, f"{{name: m, profiles: [{{{profile}}}]}}")
    assert error.startswith("cookbook.yaml:2: models[0].profiles[0]")
    assert expected in error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("models:\n  - profiles: []\n", "cookbook.yaml:2: models[0].name: is required"),
        ("models: {a: 1}\n", "cookbook.yaml:1: models: expected a list"),
        ("models: [a]\n", "cookbook.yaml:1: models[0]: expected a mapping of keys, got 'a'"),
        ("model: []\n", "cookbook.yaml:1: model: unknown key; did you mean 'models'?"),
        ("models:\n  - name: m\n    model_path: /x\n", "it belongs at models[].profiles[].model_path"),
        ("defaults: {pined: true}\n", "cookbook.yaml:1: defaults.pined: unknown key; did you mean 'pinned'?"),
        (
            "models:\n  - name: m\n    profiles: {model_path: /m}\n",
            "cookbook.yaml:3: models[0].profiles: expected a list",
        ),
    ],
)
def test_a_wrong_shape_is_one_error(files: Files, text: str, expected: str) -> None:
    (error,) = files.errors(None, text)
    assert expected in error


def test_secrets_in_arguments_are_not_shown(files: Files) -> None:
    """Trap 101."""
    (error,) = errors(files, "{name: m, profiles: [{model_path: /m, llama_server_args: '--api-key \"s3cret'}]}")
    assert "s3cret" not in error


def test_one_broken_profile_hides_nothing_else(files: Files) -> None:
    found = errors(
        files,
        "{name: a, profiles: [{id: x, pinned: 1}, {id: y, model_path: /m, hf_repo: r}, {id: z, model_path: /m}]}",
        "{name: b, nonsense: 1, profiles: [{id: x}]}",
        "{name: A, profiles: [{id: Z, model_path: /m}]}",
    )
    assert [error.split(": ")[1] for error in found] == [
        "models[0].profiles[0].pinned",
        "models[0].profiles[1]",
        "models[1].nonsense",
        "models[2].profiles[0].id",
    ]


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ("model_path: /nope.gguf", "model_path: there is no such file: '/nope.gguf'"),
        ("llama_server_args: -m m.gguf, hf_file: f", "hf_file: has no effect without 'hf_repo'"),
        ("model_path: /nope, llama_server_args: -m m.gguf", "model_path: has no effect"),
        ("llama_server_args: -m /nope.gguf", "llama_server_args: there is no such file: '/nope.gguf'"),
        ("llama_server_args: --model=/nope.gguf", "llama_server_args: there is no such file: '/nope.gguf'"),
        ("model_path: .", "model_path: '.' is a directory; name the GGUF file"),
        ("model_path: page.html", "model_path: 'page.html' is not a GGUF file; is the download complete?"),
        ("model_path: m.gguf, llama_server_args: --port 99999", "'--port 99999' is not a port (1 to 65535)"),
        ("model_path: m.gguf, llama_server_args: -c 9 --host", "'--host' has no value; it will not start"),
        ("model_path: page.html, engine: whisper", "'page.html' is not a ggml whisper file; is the download complete?"),
        (
            "model_path: m.gguf, engine: whisper",
            "'m.gguf' is a GGUF file, for llama-server; whisper-server reads ggml whisper files",
        ),
        ("model_path: m.bin", "'m.bin' is a ggml whisper file, for whisper-server; llama-server reads GGUF files"),
        ("model_path: m.gguf, convert: true", "convert: has no effect: llama-server reads no audio through ffmpeg"),
        (
            "model_path: m.bin, engine: whisper, max_concurrent_requests_per_instance: 4",
            "max_concurrent_requests_per_instance: has no effect: whisper-server works on one request at a time",
        ),
        (
            "model_path: m.bin, engine: whisper, engine_build: default",
            "engine_build: has no effect: builds are of llama.cpp, not of whisper-server",
        ),
        ("hf_repo: a/b, llama_server_args: ['-c 4096']", "'-c' and its value together; in a list these are two items"),
        ("hf_repo: a/b, estimated_vram_mb: 30GB", "estimated_vram_mb: 30720 is more than all of max_vram_mb, 24576"),
    ],
)
def test_what_is_probably_not_meant_is_a_warning(files: Files, profile: str, expected: str) -> None:
    files.write("m.gguf", "GGUF")
    files.write("m.bin", "lmgg")
    files.write("page.html", "<html>")
    (warning,) = files.warnings("max_vram_mb: 24GB", f"models:\n  - {{name: m, profiles: [{{{profile}}}]}}\n")
    assert warning.startswith("cookbook.yaml:2: models[0].profiles[0].")
    assert expected in warning


def test_an_existing_model_file_is_no_warning(files: Files, tmp_path: Path) -> None:
    model = files.write("m.gguf", "GGUF")
    assert files.warnings(None, f"models: [{{name: m, profiles: [{{model_path: {model}}}]}}]") == []


def test_a_pipe_as_model_is_not_waited_for(files: Files) -> None:
    os.mkfifo(files.directory / "pipe")
    (warning,) = files.warnings(None, "models: [{name: m, profiles: [{model_path: pipe}]}]")
    assert "'pipe' is no file; name the GGUF file" in warning


@pytest.mark.parametrize("profiles", ["", ", profiles: null", ", profiles: []"])
def test_a_model_without_profiles_is_warned_of(files: Files, profiles: str) -> None:
    (warning,) = files.warnings(None, f"models:\n  - {{name: off, enabled: false}}\n  - {{name: m{profiles}}}\n")
    assert warning.startswith("cookbook.yaml:3: models[1]: 'm' has no profiles and is not served")


def test_two_profiles_without_an_id_are_told_to_have_one(files: Files) -> None:
    (error,) = errors(files, "{name: m, profiles: [{model_path: /a}, {model_path: /b}]}")
    assert "give each profile an id" in error


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("two", "; profiles: two:a, two:b"),
        ("TWO:c", "; profiles: two:a, two:b"),
        ("qwen3-8", "; did you mean 'Qwen3-8b'?"),
        ("gpt-4o-min", "; did you mean 'gpt-4o-mini'?"),
        ("mistral", ""),
        ("qwen3-8b" * 100, ""),
    ],
)
def test_an_unknown_model_says_what_may_have_been_meant(files: Files, name: str, hint: str) -> None:
    """The sentence is llamesh's, clients may look for it; the hint comes after it."""
    models = (
        "{name: two, profiles: [{id: a, model_path: /m}, {id: b, model_path: /m}]}",
        "{name: Qwen3-8b, profiles: [{model_path: /m, aliases: [gpt-4o-mini]}]}",
    )
    catalog = files.load(None, "models:\n" + "".join(f"  - {model}\n" for model in models)).catalog
    with pytest.raises(UnknownModelError) as caught:
        catalog.resolve(name)
    assert caught.value.message == f"Model '{name}' not found in local cookbook or any peer{hint}"


def test_the_list_of_profiles_is_short() -> None:
    profiles = tuple(Profile(f"m:p{i}", f"m:p{i}", "m", f"p{i}", ()) for i in range(12))
    with pytest.raises(UnknownModelError, match=r"; profiles: m:p0, .*m:p9, \.\.\.$"):
        Catalog(profiles, {profile.key: profile for profile in profiles}).resolve("m")


def test_build_catalog_refuses_contradictions() -> None:
    twice = {"name": "m", "profiles": [{"model_path": "/m"}]}
    with pytest.raises(ConfigErrors, match="duplicate model:profile"):
        build_catalog(CookbookFile.model_validate({"models": [twice, twice]}), Settings())
    assert build_catalog(CookbookFile.model_validate({"models": [twice]}), Settings(), 4).version == 4


_names = st.sampled_from(["a", "A", "b", "B", "c"])
_profiles = st.fixed_dictionaries(
    {"id": _names, "model_path": st.just("/m")}, optional={"aliases": st.lists(_names), "enabled": st.booleans()}
)
_models = st.fixed_dictionaries({"name": _names, "profiles": st.lists(_profiles, max_size=3)})


@given(st.lists(_models, max_size=4))
def test_a_catalog_is_unambiguous_or_refused(models: list[dict[str, object]]) -> None:
    file = CookbookFile.model_validate({"models": models})
    try:
        catalog = build_catalog(file, Settings())
    except ConfigErrors as refused:
        assert refused.diagnostics  # noqa: PT017
        return
    keys = [profile.key for profile in catalog.profiles]
    assert len(keys) == len(set(keys))
    for profile in catalog.profiles:
        assert catalog.names[profile.key] is profile
        assert catalog.resolve(profile.id.upper()) is profile
        assert all(catalog.names[alias.lower()] is profile for alias in profile.aliases)


def test_speech_may_wait_longer_unless_somebody_said(files: Files) -> None:
    """One file after the other, minutes each: what is enough for chats is not for ten files."""
    speech, config = "engine: whisper, model_path: /m", "model_defaults: {max_wait_in_queue_ms: 2000}"
    assert only(files, speech).max_wait_s == 600
    assert only(files, speech, config="model_defaults: {max_wait_in_queue_ms: null}").max_wait_s == 600
    assert only(files, speech, config=config).max_wait_s == 2
    assert only(files, speech, defaults="defaults: {max_wait_in_queue_ms: 0}").max_wait_s is None
    assert only(files, f"{speech}, max_wait_in_queue_ms: 5").max_wait_s == 0.005
