"""Flags that a llama-server does not know: from the real one's help, and from helps of other kinds."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.builds import LlamaCpp
from mesh.engine import flags, llama
from mesh.engine.flags import known_flags, unknown_flags
from mesh.engine.kind import Option
from mesh.engine.locate import EngineBinary, Engines, find_engine
from tests.engine.children import FAKE, REAL, make_profile

HELP = """
----- common params -----

-h,    --help, --usage                  print usage and exit
-c,    --ctx-size N                     size of the context, see --no-such
-m,    --model FNAME                    model path
--port PORT                             port
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
                                        -not-a-flag: as text has it
--range START END                       two values
-fa,   --flash-attn [on|off|auto]       one
--mmap, --no-mmap                       none
-kvu,  --kv-unified, -no-kvu, --no-kv-unified
                                        none
--draft, --draft-max N                  the argument has been removed. use
                                        --spec-draft-n-max
                                        (env: LLAMA_ARG_DRAFT_MAX)
"""
KNOWN = known_flags(HELP)


@cache
def real_help() -> str:
    """Return what the embedded engine prints."""
    return subprocess.run([*REAL.argv, "--help"], capture_output=True, text=True, check=True).stdout


def test_a_help_is_read() -> None:
    assert {flag: option.values for flag, option in KNOWN.items()} == {
        "-h": 0, "--help": 0, "--usage": 0, "-c": 1, "--ctx-size": 1, "-m": 1, "--model": 1, "--port": 1, "-ot": 1,
        "--override-tensor": 1, "--range": 2, "-fa": 1, "--flash-attn": 1, "--mmap": 0, "--no-mmap": 0, "-kvu": 0,
        "--kv-unified": 0, "-no-kvu": 0, "--no-kv-unified": 0, "--draft": 1, "--draft-max": 1,
    }  # fmt: skip
    assert KNOWN["--draft"] == Option(1, "use --spec-draft-n-max")


def test_the_help_of_2023_is_read() -> None:
    text = "options:\n  -h, --help            show this\n  -m FNAME, --model FNAME\n  --port PORT           port"
    assert known_flags(text) == {
        "-h": Option(), "--help": Option(), "-m": Option(1), "--model": Option(1), "--port": Option(1)
    }  # fmt: skip


@pytest.mark.parametrize("text", ["", "usage: llama-server [options]", "--model FILE\n", "\0\xff--port --model"])
def test_what_is_no_help_says_nothing(text: str) -> None:
    assert not known_flags(text)


def test_every_flag_of_the_real_help_is_known() -> None:
    """Also those whose entry is too long for its line. Whatever looks like a flag at the margin counts."""
    known = known_flags(real_help())
    listed = {
        word.rstrip(",")
        for line in real_help().splitlines()
        if line.startswith("-") and not line.startswith("----")
        for word in line[: line.find("   ", 8) if "   " in line[8:] else None].split()
        if word.startswith("-")
    }
    assert len(listed) > 380
    assert listed <= known.keys()
    assert [known[f].values for f in ("-ngl", "-ot", "--no-kv-unified", "--control-vector-layer-range")] == [1, 1, 0, 2]


@given(st.data())
def test_no_flag_of_the_real_help_is_called_unknown(data: st.DataObject) -> None:
    """In any order, with any values, be they like flags, and spelled in each way that llama.cpp takes."""
    known = {flag: option for flag, option in known_flags(real_help()).items() if option.removed is None}
    value = st.one_of(st.just("-1"), st.just("--no-such"), st.just("-x"), st.text(max_size=9).filter(_has_no_equals))
    words: list[str] = []
    flags_given: list[str] = data.draw(st.lists(st.sampled_from(sorted(known)), max_size=9))
    for flag in flags_given:
        values = [data.draw(value) for _ in range(known[flag].values)]
        spelled = flag.replace("-", "_").replace("__", "--", 1) if flag[2:].count("-") and flag[:2] == "--" else flag
        flag = data.draw(st.sampled_from([flag, spelled]))
        glued: bool = data.draw(st.booleans())
        words += [f"{flag}={values[0]}", *values[1:]] if values and glued else [flag, *values]
    assert unknown_flags(words, known) == ()


def _has_no_equals(text: str) -> bool:
    """``expand`` splits words with "=", whatever they are."""
    return "=" not in text


@pytest.mark.parametrize(
    ("args", "unknown"),
    [
        (["--mlock", "--no-mmap", "--bogus"], ["--mlock", "--bogus"]),
        (["--bogus=3", "--bogus", "4"], ["--bogus"]),
        (["-c", "--bogus"], []),
        (["--range", "-1", "--bogus", "-z"], ["-z"]),
        (["--bogus", "-x", "-y"], ["--bogus", "-y"]),
        (["-ot=a=b", "-ot", "a=CPU", "-1", "-", "--", "", "-1.5e3", "one two", "--a b"], []),
        (["--ctx_size", "4", "--no_mmap", "-no_kvu"], ["-no_kvu"]),
        (["--draft-max", "16"], ["--draft-max"]),
    ],
)
def test_only_words_where_a_flag_can_stand_are_looked_up(args: list[str], unknown: list[str]) -> None:
    assert list(unknown_flags(args, KNOWN)) == unknown


def script(tmp_path: Path, text: str) -> EngineBinary:
    """Return a llama-server that notes how it is called, and does as *text* says."""
    path = tmp_path / "llama-server"
    path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{text}\n')
    path.chmod(0o755)
    return find_engine(LlamaCpp(binary_path=str(path)))


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def fake(more: str = "") -> str:
    return f'{more}\nexec {" ".join(FAKE.argv)} "$@"'


def refused(engine: EngineBinary, *args: str, env: Mapping[str, str] = os.environ) -> str | None:
    return flags.refused(args, engine, env, llama.KIND)


def test_the_real_engine_is_asked() -> None:
    engine = Engines({"default": LlamaCpp()}).named()
    assert refused(engine, "-c", "4096", "-fa", "on", "--jinja", "-ot", "exps=CPU") is None
    assert refused(engine, "--no-mmap", "--ctx-sizes", "4", "--draft-max", "16", "--zzzz") == (
        "llama-server b11549 (build default) does not know --no-mmap (use --load-mode none),"
        " --ctx-sizes (did you mean '--ctx-size'?),"
        " --draft-max any more (use --spec-draft-n-max or --spec-ngram-mod-n-max), --zzzz"
    )
    assert flags.refused_before(["--zzzz"], engine) is not None
    assert not flags.lacks(engine, "--fit")


def test_a_binary_is_asked_once(tmp_path: Path) -> None:
    engine = script(tmp_path, fake())
    for _ in range(2):
        assert refused(engine, "-np", "2", "--bogus") is not None
        assert refused(engine, "-np", "3") is None
    assert calls(tmp_path) == ["--help", "--bogus --version"]
    os.utime(tmp_path / "llama-server", ns=(1, 1))
    refused(find_engine(LlamaCpp(binary_path=str(tmp_path / "llama-server"))), "-np", "2")
    assert calls(tmp_path)[2:] == ["--help"], "another binary may know other flags"


def test_nothing_is_asked_where_there_is_nothing_to_ask(tmp_path: Path) -> None:
    engine = script(tmp_path, fake())
    assert refused(engine) is None
    assert refused(EngineBinary(engine.argv, None, "configured"), "--bogus") is None
    assert not (tmp_path / "calls").exists()
    assert flags.refused_before(["--bogus"], engine) is None
    assert not flags.lacks(engine, "--bogus")


def test_a_wrapper_may_have_flags_of_its_own(tmp_path: Path) -> None:
    """What no help lists is only unknown if it is refused, too."""
    engine = script(tmp_path, fake('[ "$1" = --fast ] && shift'))
    assert refused(engine, "--fast", "-np", "2") is None
    assert calls(tmp_path) == ["--help", "--fast --version"]


@pytest.mark.parametrize(
    "text",
    [
        "exit 1",
        "exit 0",
        "echo usage: me; exit 0",
        fake("[ $1 = --help ] && { printf -- '--model F\\n--port N\\n'; exit 1; }"),
        fake("[ $1 = --help ] || exec sleep 600"),
        fake("[ $1 = --help ] || { echo error: no licence for --bogus; exit 1; }"),
        "exec yes",
        "sleep 600 & exec sleep 600",
    ],
)
def test_whatever_else_it_does_nothing_is_said(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "LIMIT_S", 1.0)
    assert refused(script(tmp_path, text), "--bogus") is None
    assert calls(tmp_path), "it was asked"


def test_variables_of_the_profile_do_not_get_in_the_way(tmp_path: Path) -> None:
    """A wrong one would make ``--help`` fail; keys of the node are not passed on by ``child_env``."""
    engine = script(tmp_path, fake('[ -n "$LLAMA_ARG_CTX_SIZE" ] && exit 1'))
    assert refused(engine, "--bogus", env={**os.environ, "LLAMA_ARG_CTX_SIZE": "lots"}) is not None


def test_our_own_flags_are_left_out_for_an_engine_that_is_too_old(tmp_path: Path) -> None:
    engine = script(tmp_path, "printf -- '-m, --model F   f\\n--port N   n\\n-np N  n\\n'")
    profile = make_profile("-np", "2")
    assert "--fit" in llama.command(profile, engine, 1).argv, "not asked yet"
    assert refused(engine, *profile.args) is None
    argv = llama.command(profile, engine, 1).argv
    assert "--fit" not in argv
    assert "off" not in argv
    own = make_profile("-np", "2", "--fit", "on")
    assert tuple(a for a in llama.command(own, engine, 1).argv if a in ("--fit", "on")) == ("--fit", "on")
