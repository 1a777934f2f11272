"""llama-server's start-up output, in the forms that it has had (trap 94)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mesh.core.load_log import KEYS, parse_load_log

SMOL_LOG = """\
llama_model_loader: loaded meta data with 38 key-value pairs
print_info: arch             = llama
print_info: n_ctx_train      = 8192
print_info: n_embd           = 576
print_info: n_layer          = 30
print_info: n_head           = 9
print_info: n_head_kv        = 3
print_info: n_ff             = 1536
print_info: rope type        = 0
print_info: freq_base_train  = 100000.0
print_info: n_ctx_orig_yarn  = 8192
print_info: model type       = 256M
print_info: model params     = 134.52 M
print_info: general.name     = Smollm2 135M 8k Lc100K Mix1 Ep2
print_info: file type   = Q4_1
print_info: n_vocab          = 49152
0.00.123 I srv    load_model: initializing slots, n_slots = 4
slot   load_model: id  0 | task -1 | new slot, n_ctx = 2048
""".splitlines()


def test_a_real_log_gives_all_parameters_it_tells() -> None:
    params = parse_load_log(SMOL_LOG)
    assert params is not None
    assert tuple(params) == KEYS
    assert params == {
        "n_ctx_train": 8192,
        "n_ctx": 2048,
        "n_slots": 4,
        "n_batch": None,
        "n_ubatch": None,
        "arch": "llama",
        "n_layer": 30,
        "n_embd": 576,
        "n_head": 9,
        "n_head_kv": 3,
        "n_vocab": 49152,
        "n_ff": 1536,
        "model_name": "Smollm2 135M 8k Lc100K Mix1 Ep2",
        "model_type": "256M",
        "model_params": "134.52 M",
        "file_type": "Q4_1",
        "rope_type": "0",
        "n_ctx_orig_yarn": 8192,
        "freq_base_train": 100000.0,
    }


def test_a_log_that_says_nothing_about_a_model_is_none() -> None:
    assert parse_load_log(["main: starting", "print_info: file type = Q4_1"]) is None


def test_a_number_that_is_none_is_skipped() -> None:
    """trap 94: models with a list per layer print "n_head = [9, 9, 3]"."""
    params = parse_load_log(["print_info: arch = x", "print_info: n_head = [9, 9, 3]"])
    assert params is not None
    assert params["n_head"] is None


def test_the_trained_context_of_a_warning_fills_in_only() -> None:
    line = "llama_context: n_ctx_seq (2048) < n_ctx_train (8192) -- the full capacity will not be utilized"
    assert (parse_load_log([line]) or {})["n_ctx_train"] == 8192
    assert (parse_load_log(["print_info: n_ctx_train = 4096", line]) or {})["n_ctx_train"] == 4096


@given(st.lists(st.text() | st.sampled_from(SMOL_LOG)))
def test_no_output_breaks_it(lines: list[str]) -> None:
    """trap 94"""
    params = parse_load_log(lines)
    assert params is None or tuple(params) == KEYS
