"""From exit code and last words to a reason."""

from __future__ import annotations

import pytest

from mesh.engine.exits import MAX_REASON_CHARACTERS, describe_exit, first_complaint

MISSING = """\
0.00.003.620 I srv          init: loading model
0.00.004.159 E gguf_init_from_file: failed to open GGUF file 'nope.gguf' (No such file or directory)
0.00.004.164 E llama_model_load: error loading model: llama_model_loader: failed to load model from nope.gguf
0.00.004.165 E llama_model_load_from_file_impl: failed to load model
0.00.004.531 E srv          init: exiting due to model loading error
error: Failed to init server, please check the input params.""".splitlines()


def test_the_first_complaint_is_the_cause() -> None:
    cause = "gguf_init_from_file: failed to open GGUF file 'nope.gguf' (No such file or directory)"
    assert first_complaint(MISSING) == cause
    assert describe_exit(1, MISSING) == f"{cause} (llama-server ended by itself: exit code 1)"


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("error: invalid argument: --bad-flag", "error: invalid argument: --bad-flag"),
        ("/ggml/src/ggml.c:12: GGML_ASSERT(a != b) failed", "/ggml/src/ggml.c:12: GGML_ASSERT(a != b) failed"),
        (
            "0.1.2.3 E srv start: couldn't bind HTTP server socket, port: 1",
            "srv start: couldn't bind HTTP server socket, port: 1",
        ),
        ("llama-server: error while loading shared libraries: libcuda.so.1", None),
        ("0.00.1 I srv: all is well", "nothing"),
        ("exiting due to HTTP server error", "exiting due to HTTP server error"),
        ("  what():  Download 'http://x' failed", "what():  Download 'http://x' failed"),
    ],
)
def test_complaints_of_all_kinds(line: str, cause: str | None) -> None:
    assert first_complaint(["I am fine", line]) == (None if cause == "nothing" else cause or line)


def test_a_reason_stays_short() -> None:
    assert first_complaint(["error " + "x" * 9000]) == ("error " + "x" * 9000)[:MAX_REASON_CHARACTERS]


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exit code 0"),
        (-9, "ran out of memory"),
        (-15, "killed by SIGTERM"),
        (-4, "another CPU"),
        (132, "another CPU"),
        (134, "aborted"),
        (-63, "killed by signal 63"),
    ],
)
def test_exit_codes_in_words(code: int, text: str) -> None:
    assert text in describe_exit(code, [])


def test_a_stop_that_was_asked_for_is_no_failure() -> None:
    """trap 29"""
    assert describe_exit(0, MISSING, asked=True) == "llama-server stopped: exit code 0"
