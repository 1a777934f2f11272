"""The launch line and its hash are llamesh's (llamesh-config.md 7.8, 8.1)."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.llama_args import ADDRESS_FLAGS, args_hash, expand, flag_value, has_flag, launch_args, without_flags


@pytest.mark.parametrize(
    ("args", "model_path", "hf_repo", "hf_file", "expected"),
    [
        ([], "/m", None, None, "-m /m -c 0 --fit off"),
        ([], None, "u/r", None, "-hfr u/r -c 0 --fit off"),
        ([], None, "u/r", "f", "-hfr u/r -hff f -c 0 --fit off"),
        (["-c", "9"], "/m", None, None, "-c 9 -m /m --fit off"),
        (["--ctx-size=9", "--fit=on"], "/m", None, None, "--ctx-size 9 --fit on -m /m"),
        (["-m", "/n"], "/m", None, None, "-m /n -c 0 --fit off"),
        (["--model=/n"], "/m", None, None, "--model /n -c 0 --fit off"),
        (["-hfr", "a/b"], "/m", None, None, "-hfr a/b -c 0 --fit off"),
        (["-hf", "a/b"], "/m", None, None, "-hf a/b -m /m -c 0 --fit off"),
        (["-M", "-C"], "/m", None, None, "-M -C -m /m -c 0 --fit off"),
        (["-ot=a=b", "x=y"], "/m", None, None, "-ot a=b x=y -m /m -c 0 --fit off"),
    ],
)
def test_launch_line(
    args: list[str], model_path: str | None, hf_repo: str | None, hf_file: str | None, expected: str
) -> None:
    assert " ".join(launch_args(args, model_path, hf_repo, hf_file)) == expected


def test_hash_of_nothing_is_llameshs() -> None:
    assert args_hash([]) == "e3b0c44298fc1c14"


def test_hash_is_over_sorted_words_with_a_nul_after_each() -> None:
    assert args_hash(["b", "a"]) == hashlib.sha256(b"a\0b\0").hexdigest()[:16]


@given(st.permutations(["-c", "9", "-m", "/m", "é"]))
def test_hash_ignores_order(args: list[str]) -> None:
    assert args_hash(args) == args_hash(["-c", "9", "-m", "/m", "é"])


@pytest.mark.parametrize("extra", [["--port", "81"], ["--port=81"], ["--host", "::1", "--port", "1"], ["--host=x"]])
def test_hash_ignores_the_address(extra: list[str]) -> None:
    assert args_hash(["-m", "/m", *extra]) == args_hash(["-m", "/m"])
    assert without_flags(["-m", "/m", *extra], ADDRESS_FLAGS) == ("-m", "/m")


def test_flags_are_found_with_their_last_value() -> None:
    args = ["--api-key=a", "--api-key", "b", "-x"]
    assert flag_value(args, ("--api-key",)) == "b"
    assert flag_value(args, ("-x", "-y")) is None
    assert has_flag(args, ("-x",))
    assert not has_flag(args, ("--api",))
    assert expand(["a=b", "-a=b=c"]) == ("a=b", "-a", "b=c")
