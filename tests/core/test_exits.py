"""From exit code and last words to a reason."""

from __future__ import annotations

import pytest

from mesh.core.exits import MAX_REASON_CHARACTERS, Cause, classify, describe_exit, first_complaint

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


NO_ROOM = """\
0.00.160.846 W llama_context: n_ctx_seq (100096) > n_ctx_train (8192) -- possible training context overflow
0.00.163.159 E ggml_aligned_malloc: insufficient memory (attempted to allocate 2199.38 MB)
0.00.163.190 E ggml_backend_cpu_buffer_type_alloc_buffer: failed to allocate buffer of size 2306211840
0.00.163.191 E ggml_backend_buft_alloc_buffer_n_default: failed to allocate CPU buffer of size 2306211840
0.00.163.518 E llama_init_from_model: failed to initialize the context: failed to allocate buffer for kv cache
0.00.163.545 E cmn  common_init_: failed to create context with model 'a.gguf'
0.00.164.268 E srv          init: exiting due to model loading error
error: Failed to init server, please check the input params.""".splitlines()
NOT_LOCKED = """\
0.00.147.057 W warning: failed to mlock 96579584-byte buffer (after previously locking 0 bytes): Cannot allocate memory
Try increasing RLIMIT_MEMLOCK ('ulimit -l' as root).""".splitlines()


def test_no_room_in_main_memory() -> None:
    """trap 46: said by the real b11549 under ulimit -v."""
    assert classify(1, NO_ROOM) is Cause.MEMORY
    assert classify(1, NO_ROOM, asked=True) is Cause.OTHER


@pytest.mark.parametrize(
    "line",
    [
        "0.00.152.916 E llama_model_load: error loading model: mmap failed: Cannot allocate memory",
        "0.00.221.721 E ggml_gallocr_reserve_n_impl: failed to allocate CPU buffer of size 2810413088",
        "0.00.225.873 E llama_init_from_model: failed to initialize the context: failed to allocate compute pp buffers",
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 9.00 MiB on device 0: cudaMalloc failed: out of memory",
        "llama_model_load: error loading model: unable to allocate CUDA0 buffer",
        "CUDA error: out of memory",
        "CUDA error: the resource allocation failed",
        "ggml_vulkan: Device memory allocation of size 1073741824 failed.",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
        "  what():  std::bad_alloc",
        "Native API failed. Native API returns: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
        "ggml_metal_buffer_type_alloc_buffer: error: failed to allocate buffer, size =  8192.00 MiB",
    ],
)
def test_every_backend_has_its_words_for_no_room(line: str) -> None:
    """trap 46"""
    assert classify(1, ["0.00.1 I srv load_model: loading model 'a.gguf'", line]) is Cause.MEMORY


@pytest.mark.parametrize("code", [-9, 137])
def test_a_kill_that_nobody_asked_for_is_the_systems_out_of_memory_killer(code: int) -> None:
    assert classify(code, []) is Cause.MEMORY
    assert classify(code, [], asked=True) is Cause.OTHER


@pytest.mark.parametrize(
    "line",
    [
        "error: invalid argument: --no-such-flag",
        'error while handling argument "-c": stoi',
        'error while handling argument "-ctk": Unsupported cache type: q9_0',
        "error while handling argument \"-fa\": error: unknown value for --flash-attn: 'banana'",
        'error while handling environment variable "LLAMA_ARG_CTX_SIZE": stoi',
        "0.00.155.959 E llama_init_from_model: quantized V cache requires flash_attn to be enabled",
    ],
)
def test_arguments_that_only_an_edit_corrects(line: str) -> None:
    """trap 46: all said by the real b11549."""
    assert classify(1, [line, "", "usage:", "-c, --ctx-size N   size of the prompt context"]) is Cause.USAGE


@pytest.mark.parametrize(
    "lines",
    [
        MISSING,
        [],
        [*NOT_LOCKED, *MISSING],
        ["0.00.1 W ggml_backend_x_init: failed to allocate a staging buffer, copying without", *MISSING],
        ["ggml_cuda_host_malloc: failed to allocate 512.00 MiB of pinned memory: out of memory", *MISSING],
        [
            "0.00.2 E ggml_gallocr_reserve_n_impl: failed to allocate CUDA0 buffer of size 123456789",
            "0.00.2 W llama_context: compute buffer allocation failed, retrying without pipeline parallelism",
            *MISSING,
        ],
        [
            "terminate called after throwing an instance of 'std::system_error'",
            "  what():  Resource temporarily unavailable",
        ],
    ],
)
def test_what_is_not_the_reason_does_not_mislead(lines: list[str]) -> None:
    """A warning about memory, or a failure that was got over, says nothing about the end."""
    assert classify(1, lines) is Cause.OTHER


def test_a_warning_is_not_told_as_the_reason() -> None:
    cause = "gguf_init_from_file: failed to open GGUF file 'nope.gguf' (No such file or directory)"
    assert first_complaint([*NOT_LOCKED, *MISSING]) == cause
    assert first_complaint(NOT_LOCKED) is not None, "better than nothing"


@pytest.mark.parametrize(
    "line",
    [
        "couldn't bind to server socket: hostname=127.0.0.1 port=17062",
        "0.00.123.456 E srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8099",
        "main: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 8099",
    ],
)
def test_a_port_that_somebody_else_has(line: str) -> None:
    assert classify(1, ["loading", line, "exiting"]) is Cause.PORT
