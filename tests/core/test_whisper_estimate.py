"""The estimate against figures that whisper-server 1.8.5 itself logged, and memory that it was seen to use.

The models were the published tiny and base.en, and for the other shapes headers without weights: the server allocates
by the header alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core.estimate import EstimateError, Part
from mesh.core.footprint import MARGIN
from mesh.core.whisper_estimate import (
    GRAPH_BYTES,
    PROCESS_RAM_MIB,
    WhisperOptions,
    audio_bytes,
    estimate,
    graph_bytes,
    kv_bytes,
    prompt_tokens,
    weight_bytes,
)
from mesh.core.whisper_facts import WhisperFacts

MB = 1_000_000  # as the log has it
TINY = WhisperFacts(51865, 1500, 384, 6, 4, 448, 384, 6, 4, 80, 1)
BASE_EN = WhisperFacts(51864, 1500, 512, 8, 6, 448, 512, 8, 6, 80, 1)
SMALL = WhisperFacts(51865, 1500, 768, 12, 12, 448, 768, 12, 12, 80, 1)
MEDIUM = WhisperFacts(51865, 1500, 1024, 16, 24, 448, 1024, 16, 24, 80, 1)
LARGE_V3 = WhisperFacts(51866, 1500, 1280, 20, 32, 448, 1280, 20, 32, 128, 1)
TURBO = replace(LARGE_V3, text_layers=4)
HAND_MADE = WhisperFacts(51865, 64, 32, 2, 1, 32, 32, 2, 1, 80, 1)
#: the server's own name for a state that has decoded nothing yet
ONE_DECODER = WhisperOptions(best_of=1)

#: weights, all caches, and the buffers for conv, encode, cross and decode
LOGGED = [
    (TINY, True, 77.11, 14.95, (13.21, 17.72, 3.89, 95.91)),
    (TINY, False, 77.11, 14.95, (13.21, 64.81, 3.89, 95.91)),
    (replace(TINY, ftype=0), True, 151.04, 14.95, (13.21, 17.72, 3.89, 95.91)),
    (replace(TINY, ftype=2007), True, 42.96, 14.95, (13.21, 17.72, 3.89, 95.91)),
    (replace(TINY, ftype=2008), True, 29.30, 14.95, (13.21, 17.72, 3.89, 95.91)),
    (BASE_EN, True, 147.37, 28.31, (16.28, 23.09, 4.66, 96.37)),
    (SMALL, True, 487.01, 80.21, (22.42, 33.85, 6.20, 97.28)),
    (SMALL, False, 487.01, 80.21, (22.42, 128.02, 6.20, 97.28)),
    (MEDIUM, False, 1533.14, 207.61, (28.57, 170.17, 7.73, 98.20)),
    (LARGE_V3, True, 3094.36, 343.41, (36.15, 55.35, 9.27, 99.12)),
    (LARGE_V3, False, 3094.36, 343.41, (36.15, 212.31, 9.27, 99.12)),
    (TURBO, True, 1623.92, 49.81, (36.15, 55.35, 9.27, 99.12)),
    (HAND_MADE, True, 3.41, 0.09, (1.69, 1.65, 1.60, 8.24)),
]


@pytest.mark.parametrize(("facts", "flash_attn", "weights", "kv", "graphs"), LOGGED)
def test_it_agrees_with_what_whisper_server_logged(
    facts: WhisperFacts, flash_attn: bool, weights: float, kv: float, graphs: tuple[float, ...]
) -> None:
    options = replace(ONE_DECODER, flash_attn=flash_attn)
    assert weight_bytes(facts) / MB == pytest.approx(weights, abs=0.006)
    assert kv_bytes(facts, options) / MB == pytest.approx(kv, abs=0.011)  # three rounded figures
    sizes = [(size + GRAPH_BYTES) / MB for size in graph_bytes(facts, options, facts.text_context)]
    assert sizes == pytest.approx(graphs, abs=0.006)


@pytest.mark.parametrize(
    ("facts", "options", "before_mb", "after_mb"),
    [
        # RSS at rest, and the most it ever was: with ten minutes of speech, then also after each kind of request
        (TINY, WhisperOptions(), 115.7, 385.4),
        (TINY, WhisperOptions(beam_size=5), 115.7, 446.9),
    ],
)
def test_it_is_what_was_measured(
    facts: WhisperFacts, options: WhisperOptions, before_mb: float, after_mb: float
) -> None:
    found = estimate(facts, options, gpus=False)
    at_rest = found.weights.cpu + kv_bytes(facts, ONE_DECODER)
    assert at_rest / MB == pytest.approx(before_mb - 24, rel=0.01)
    charged_mb = (found.total.cpu * MARGIN + PROCESS_RAM_MIB * 1024**2) / MB
    assert after_mb <= charged_mb <= 1.2 * after_mb


def test_several_decoders_need_a_larger_cache() -> None:
    """What a text that is not sure of itself is tried again with; the log never tells."""
    cells = {count: kv_bytes(TINY, WhisperOptions(best_of=count)) for count in (1, 2, 5, 8, 99)}
    itself = 512 * 384 * 4 * 4
    assert cells[2] - cells[1] == 3 * itself
    assert cells[5] - cells[1] == 6 * itself
    assert cells[99] == cells[8] == cells[1] + 9 * itself
    assert kv_bytes(TINY, WhisperOptions(best_of=1, beam_size=5)) == cells[5]


def test_on_a_gpu() -> None:
    """All that the model computes with, in the size that is allocated; the host keeps logits and audio."""
    host, gpu = (estimate(TURBO, WhisperOptions(), gpus=gpus) for gpus in (False, True))
    assert gpu.weights == Part(gpu=host.weights.cpu)
    assert gpu.kv == Part(gpu=host.kv.cpu)
    assert gpu.output == host.output
    assert gpu.compute.gpu >= sum(graph_bytes(TURBO, WhisperOptions(), TURBO.text_context))
    assert gpu.compute.cpu == 4 * GRAPH_BYTES
    assert gpu.largest_layer_bytes == gpu.weights.gpu + gpu.kv.gpu
    assert estimate(TURBO, WhisperOptions(gpu=False), gpus=True) == host


def test_processors_have_their_own_state() -> None:
    one, two = (estimate(TINY, WhisperOptions(processors=count), gpus=False) for count in (1, 2))
    assert two.kv.cpu == 2 * one.kv.cpu
    assert two.compute.cpu == 2 * one.compute.cpu
    assert two.weights == one.weights
    assert one.output.cpu < two.output.cpu < 2 * one.output.cpu  # the audio is there once


def test_prompts_are_half_of_the_context() -> None:
    assert prompt_tokens(TINY) == 228
    assert prompt_tokens(replace(TINY, text_context=4)) == 4


def test_audio_takes_memory_by_its_length() -> None:
    """Measured: 605 s as 16-bit mono raised the peak by 139 MB, and 87 MB more of upload by 175 MB."""
    short, long = audio_bytes(TINY, 0, 0), audio_bytes(TINY, 605, 605 * 32_000)
    assert (long - short) / MB == pytest.approx(139, rel=0.03)
    assert audio_bytes(TINY, 605, 2 * 605 * 32_000) - long == 2 * 605 * 32_000
    assert audio_bytes(LARGE_V3, 605, 0) > audio_bytes(TINY, 605, 0)


@pytest.mark.parametrize(
    ("facts", "problem"),
    [
        (replace(TINY, ftype=12), "rows of 384 weights cannot be q4_K"),
        (replace(TINY, ftype=4), "of an unknown type"),
    ],
)
def test_weights_that_cannot_be(facts: WhisperFacts, problem: str) -> None:
    with pytest.raises(EstimateError, match=problem):
        estimate(facts, WhisperOptions(), gpus=False)


@pytest.mark.parametrize(("facts", "multilingual"), [(TINY, True), (BASE_EN, False), (LARGE_V3, True)])
def test_languages(facts: WhisperFacts, multilingual: bool) -> None:
    assert facts.multilingual is multilingual


NUMBERS = st.integers(1, 1 << 16)
FACTS = st.builds(
    WhisperFacts,
    st.integers(1, 1 << 20), NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS,
    st.sampled_from([0, 1, 1, 2008]) | st.integers(0, 3000),
)  # fmt: skip
OPTIONS = st.builds(
    WhisperOptions,
    st.integers(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 3]),
    flash_attn=st.booleans(),
    gpu=st.booleans(),
)


@given(FACTS, OPTIONS, st.booleans())
def test_any_numbers_are_estimated_or_refused(facts: WhisperFacts, options: WhisperOptions, gpus: bool) -> None:
    """Trap 48: an estimate that adds up, or a refusal in words."""
    try:
        found = estimate(facts, options, gpus=gpus)
    except EstimateError:
        return
    parts = (found.weights, found.kv, found.compute, found.output)
    assert all(part.gpu >= 0 and part.cpu >= 0 for part in parts)
    assert found.total == Part(sum(part.gpu for part in parts), sum(part.cpu for part in parts))
    assert bool(found.total.gpu) is (gpus and options.gpu)


@given(FACTS, OPTIONS)
def test_half_a_prompt_never_takes_more_than_the_buffer(facts: WhisperFacts, options: WhisperOptions) -> None:
    touched = graph_bytes(facts, options, prompt_tokens(facts))
    assert all(
        part <= whole for part, whole in zip(touched, graph_bytes(facts, options, facts.text_context), strict=True)
    )
