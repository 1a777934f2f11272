"""How much memory a whisper-server will take, from its model's header and how it is started. Pure.

The formulas follow whisper.cpp 1.8.5, ``src/whisper.cpp``, whose functions are named below. Weights and caches are
exact. The buffers are what the largest step of each graph holds: they agree with the real server's log to its last
digit for every shape that OpenAI published, and are too large, if anything, for others.

On a CPU, memory counts once it is touched: ``whisper_init_state`` makes buffers for a prompt that fills the whole text
context, but no prompt is longer than half of it. A GPU's buffers are charged whole. Nothing is mapped: the weights are
read into memory, so all of it is private.

What a request takes besides grows with the length of the audio, without a bound: see ``audio_bytes``.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core import ggml_types
from mesh.core.estimate import Estimate, Part
from mesh.core.metadata import EstimateError
from mesh.core.whisper_facts import WhisperFacts

_F16, _F32 = 2, 4
_F32_TYPE, _F16_TYPE = 0, 1
#: Each graph keeps descriptors for WHISPER_MAX_NODES = 4096 tensors (``whisper_sched_graph_init``).
GRAPH_BYTES = 1_590_000
_GRAPHS = 4
_SAMPLES_PER_S, _FRAMES_PER_S = 16_000, 100
_WINDOW_S = 30
_PAD = 256
#: sot, language, task, no timestamps: what stands behind the text in a prompt
_PROMPT_MARKS = 4
#: WHISPER_MAX_DECODERS: more are refused
_MAX_DECODERS = 8
#: Each decoder sorts the vocabulary: three floats and a pair of double and id for each token.
_DECODER_TOKEN_BYTES = 3 * _F32 + 16
#: A whisper-server without its buffers. Measured with 1.8.5 on two CPUs: 24 MB at rest, of which the vocabulary is 10,
#: and up to 25 more that its heap keeps after many requests of every kind.
PROCESS_RAM_MIB = 48
#: the audio that a request is expected to bring at most: ten minutes, as 16-bit mono at whisper's own rate
EXPECTED_AUDIO_S = 600
_EXPECTED_BYTES_PER_S = 2 * _SAMPLES_PER_S


@dataclass(frozen=True, slots=True)
class WhisperOptions:
    """The arguments of a whisper-server that decide how much memory it takes; its own defaults."""

    best_of: int = 2  #: ``-bo``
    beam_size: int = -1  #: ``-bs``
    processors: int = 1  #: ``-p``: each has caches and buffers of its own while a request runs
    flash_attn: bool = True  #: False: ``-nfa``
    gpu: bool = True  #: False: ``-ng``

    @property
    def decoders(self) -> int:
        """How many texts are tried at once. A request may ask for more of them, to eight, in its fields."""
        return min(max(1, self.best_of, self.beam_size), _MAX_DECODERS)


def estimate(facts: WhisperFacts, options: WhisperOptions, *, gpus: bool) -> Estimate:
    """Return the memory that a server of *facts* takes; ``output`` is what a request of ten minutes of audio brings.

    With *gpus* all of the model is on one of them: whisper.cpp divides no model. Raises ``EstimateError`` if the
    numbers make no model that whisper.cpp can load.
    """
    on_gpu = gpus and options.gpu
    runs = max(1, options.processors)
    output = runs * _output_bytes(facts, options) + audio_bytes(
        facts, EXPECTED_AUDIO_S, EXPECTED_AUDIO_S * _EXPECTED_BYTES_PER_S
    )
    weights, kv = weight_bytes(facts), runs * kv_bytes(facts, options)
    tokens = facts.text_context if on_gpu else prompt_tokens(facts)
    compute = runs * (sum(graph_bytes(facts, options, tokens)) + _converted_bytes(facts, options))
    descriptors = runs * _GRAPHS * GRAPH_BYTES
    return Estimate(
        weights=_part(weights, on_gpu),
        kv=_part(kv, on_gpu),
        recurrent=Part(),
        compute=_part(compute, on_gpu) + Part(cpu=descriptors),
        output=Part(cpu=output),
        draft=Part(),
        projector=Part(),
        largest_layer_bytes=weights + kv if on_gpu else 0,
        context=facts.text_context,
        slots=1,
        notes=(f"includes {EXPECTED_AUDIO_S // 60} minutes of audio in a request; longer audio takes more",),
    )


def weight_bytes(facts: WhisperFacts) -> int:
    """Return the bytes of all tensors (``whisper_model_load``), which are also those of their data in the file."""
    state, text = facts.audio_state, facts.text_state
    conv = _F32_TYPE if facts.weight_type == _F32_TYPE else _F16_TYPE
    encoder = (
        _F32 * state * (facts.audio_context + 4)  # positions, two biases, last norm
        + _matrix(conv, 3, facts.mels * state)
        + _matrix(conv, 3, state * state)
        + facts.audio_layers * (_F32 * 12 * state + _layer_matrices(facts, state, square=4))
    )
    decoder = (
        _F32 * text * (facts.text_context + 2)
        + _matrix(facts.weight_type, text, facts.vocabulary)
        + facts.text_layers * (_F32 * 17 * text + _layer_matrices(facts, text, square=8))
    )
    return encoder + decoder


def kv_bytes(facts: WhisperFacts, options: WhisperOptions) -> int:
    """Return the bytes of the caches (``whisper_kv_cache_init``), always f16.

    The one for self-attention is made anew, larger, when a request first uses several decoders
    (``whisper_full_with_state``): a text that is not sure of itself is tried again with ``best_of`` of them.
    """
    several = options.decoders + 2 if options.decoders > 1 else 1  # two more against fragmentation
    cells = _padded(facts.text_context) * several + _padded(facts.audio_context)
    cached = facts.text_state * facts.text_layers * cells
    return 2 * _F16 * (cached + facts.audio_state * _padded(facts.audio_context))


def graph_bytes(facts: WhisperFacts, options: WhisperOptions, tokens: int) -> tuple[int, int, int, int]:
    """Return the bytes of the buffers for conv, encode, cross and decode, without the descriptors of their graphs.

    *tokens* are those of one decoder step (``whisper_build_graph_conv``, ``..._encoder``, ``..._cross``,
    ``..._decoder``); whisper-server's log tells the sizes for all of the text context, each with ``GRAPH_BYTES`` more.
    """
    positions, state, text = facts.audio_context, facts.audio_state, facts.text_state
    row = _F32 * positions * state
    scores = 0 if options.flash_attn else _F32 * facts.audio_heads * positions**2
    # the mel spectrogram and its patches; behind them the first convolution, unless it fits in their place
    conv = 20 * positions * facts.mels + (4 * row if state > facts.mels else 0)
    encode = max(7 * row, 4 * row + scores)
    return conv, encode, row, tokens * max(8 * text + _F32 * facts.vocabulary, _decoder_step(facts, options))


def prompt_tokens(facts: WhisperFacts) -> int:
    """Return how long a prompt gets: half the text context, and marks (``whisper_full_with_state``)."""
    return min(facts.text_context, facts.text_context // 2 + _PROMPT_MARKS)


def audio_bytes(facts: WhisperFacts, seconds: float, upload_bytes: int) -> int:
    """Return what *seconds* of audio take while they are worked on: 0.23 MB a second, and more if they came larger.

    That is: two copies of the upload (``examples/server/server.cpp``), the samples as floats, and either these once
    more or their energy, and the mel spectrogram (``log_mel_spectrogram``), padded by a window.
    """
    each_s = 2 * _F32 * _SAMPLES_PER_S + _F32 * _FRAMES_PER_S * facts.mels
    return 2 * upload_bytes + round((seconds + _WINDOW_S) * each_s)


def _decoder_step(facts: WhisperFacts, options: WhisperOptions) -> int:
    """Return the most for each token that a layer of the decoder holds. Real vocabularies outweigh it."""
    cells = _padded(facts.text_context)
    scores = 0 if options.flash_attn else _F32 * facts.text_heads * max(facts.audio_context, cells)
    return 7 * _F32 * facts.text_state + (_F32 + _F16) * cells + scores


def _converted_bytes(facts: WhisperFacts, options: WhisperOptions) -> int:
    """Return what the largest input of a matrix product takes, converted to its weights' type (``ggml_graph_plan``)."""
    hidden = 4 * facts.audio_state * facts.audio_context
    scores = 0 if options.flash_attn else facts.audio_heads * facts.audio_context**2
    return _F16 * max(hidden, scores)


def _output_bytes(facts: WhisperFacts, options: WhisperOptions) -> int:
    logits = _F32 * facts.vocabulary * prompt_tokens(facts)
    return logits + options.decoders * _DECODER_TOKEN_BYTES * facts.vocabulary


def _layer_matrices(facts: WhisperFacts, state: int, *, square: int) -> int:
    """Return the bytes of a layer's large matrices: its feed-forward network, and *square* of attention."""
    wide = _matrix(facts.weight_type, state, 4 * state) + _matrix(facts.weight_type, 4 * state, state)
    return wide + square * _matrix(facts.weight_type, state, state)


def _matrix(ggml_type: int | None, row: int, rows: int) -> int:
    if ggml_type is None:
        raise EstimateError("the weights are of an unknown type")
    size = ggml_types.tensor_bytes(ggml_type, (row, rows))
    if size is None:
        raise EstimateError(f"rows of {row} weights cannot be {ggml_types.TYPES[ggml_type][0]}")
    return size


def _padded(cells: int) -> int:
    return -(-cells // _PAD) * _PAD


def _part(size: int, on_gpu: bool) -> Part:
    return Part(gpu=size) if on_gpu else Part(cpu=size)
