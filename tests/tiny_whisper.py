"""A tiny but real speech model that whisper-server loads in milliseconds: it hears the same in any audio.

Nothing is trained. The decoder is a Markov chain over the words of one sentence. Every token has a direction of its
own, and the two halves of the only layer's MLP turn the direction of each word into that of the next one. All control
tokens and timestamps share one direction, which leads to the first word; after the last word come the timestamp of 30
seconds and the end. Attention runs and adds nothing, so the audio has no say: each window of 30 seconds yields the
sentence once.

The file is in whisper.cpp's own ggml format (``models/convert-pt-to-ggml.py`` there), not GGUF. Needs ``numpy``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]

SENTENCE = "Hello from the tiny whisper model."

MAGIC = 0x67676D6C  # "ggml"
VOCABULARY = 51_865  # this very number makes whisper.cpp take the model for a multilingual one
END_OF_TEXT = 50_257  # where such a vocabulary has it; languages, tasks and timestamps follow
AUDIO_CONTEXT, TEXT_CONTEXT, MELS, FFT_BINS = 1500, 448, 80, 201
MOSTLY_F16 = 1
LOGIT = 40.0  # of the token that comes next, 0 for all others; from 90 on the timestamps' sum would underflow to 0
LONGEST = TEXT_CONTEXT // 2 - 4  # whisper.cpp gives a window half of the text context
LAST_TIMESTAMP = VOCABULARY - 1  # <|30.00|>; without it whisper.cpp takes a full window for a failure and tries again


def write_whisper(path: Path | str, say: str | Sequence[bytes] = SENTENCE) -> None:
    """Write a model that hears *say* in everything: a sentence, or the very tokens, which may break characters."""
    tokens = list(_words(say)) if isinstance(say, str) else list(say)
    if not 0 < len(tokens) <= LONGEST:
        raise ValueError(f"{len(tokens)} tokens; 1 to {LONGEST} fit")
    width = (len(tokens) + 4 + 31) // 32 * 32
    with Path(path).open("wb") as file:
        _write_header(file, width)
        _write_mel_filters(file)
        _write_vocabulary(file, tokens)
        for name, tensor in {**_encoder(width), **_decoder(len(tokens), width)}.items():
            _write_tensor(file, name, tensor)


def _words(say: str) -> Iterator[bytes]:
    """Whisper's tokens bring the space before a word with them, also the first."""
    return (f" {word}".encode() for word in say.split())


def _write_header(file: BinaryIO, width: int) -> None:
    """One layer and one head on both sides."""
    audio = (AUDIO_CONTEXT, width, 1, 1)
    text = (TEXT_CONTEXT, width, 1, 1)
    file.write(struct.pack("<I11i", MAGIC, VOCABULARY, *audio, *text, MELS, MOSTLY_F16))


def _write_mel_filters(file: BinaryIO) -> None:
    file.write(struct.pack("<2i", MELS, FFT_BINS))
    file.write(_f32(np.full((MELS, FFT_BINS), 0.005)).tobytes())


def _write_vocabulary(file: BinaryIO, tokens: Sequence[bytes]) -> None:
    """Token 0 is the space, which whisper.cpp looks up by name; what is not listed gets a name from whisper.cpp."""
    file.write(struct.pack("<i", 1 + len(tokens)))
    for token in (b" ", *tokens):
        file.write(struct.pack("<I", len(token)) + token)


def _write_tensor(file: BinaryIO, name: str, tensor: Matrix) -> None:
    file.write(struct.pack("<3i", tensor.ndim, len(name), int(tensor.dtype == np.float16)))
    file.write(struct.pack(f"<{tensor.ndim}i", *reversed(tensor.shape)))
    file.write(name.encode() + tensor.tobytes())


def _encoder(width: int) -> dict[str, Matrix]:
    small = _small_numbers()
    block = "encoder.blocks.0"
    return {
        "encoder.positional_embedding": _f32(small((AUDIO_CONTEXT, width))),
        "encoder.conv1.weight": _f16(small((width, MELS, 3))),
        "encoder.conv1.bias": _f32(np.zeros((width, 1))),
        "encoder.conv2.weight": _f16(small((width, width, 3))),
        "encoder.conv2.bias": _f32(np.zeros((width, 1))),
        **_layer_norm("encoder.ln_post", width),
        **_attention(f"{block}.attn", width),
        **_mlp(block, small((4 * width, width)), np.zeros(4 * width), small((width, 4 * width))),
    }


def _decoder(count: int, width: int) -> dict[str, Matrix]:
    """Lay the chain start, token 1 ... token *count*, 30 seconds, end into embedding (also the output) and MLP."""
    codes = _orthonormal(count + 3, width)
    embedding = np.zeros((VOCABULARY, width))
    embedding[1 : count + 1] = codes[1:-2]
    embedding[END_OF_TEXT] = codes[-1]
    embedding[END_OF_TEXT + 1 :] = codes[0]
    embedding[LAST_TIMESTAMP] = codes[-2]
    block = "decoder.blocks.0"
    return {
        "decoder.positional_embedding": _f32(np.zeros((TEXT_CONTEXT, width))),
        "decoder.token_embedding.weight": _f16(embedding),
        **_layer_norm("decoder.ln", width, scale=LOGIT / np.sqrt(width)),
        **_attention(f"{block}.attn", width),
        **_attention(f"{block}.cross_attn", width),
        **_chain_mlp(block, codes),
    }


def _chain_mlp(block: str, codes: Matrix) -> dict[str, Matrix]:
    """Let unit n add code n + 1 when it sees code n: it is at 20 before its GELU then, and at -20 for all others."""
    steps, width = len(codes) - 1, codes.shape[1]
    fire = 20.0
    up, bias, down = np.zeros((4 * width, width)), np.full(4 * width, -fire), np.zeros((width, 4 * width))
    up[:steps] = 2 * fire * codes[:-1] / np.sqrt(width)  # LayerNorm made sqrt(width) of a length of 1
    down[:, :steps] = codes[1:].T * 30.0 / fire  # 30 times what stood there: it decides the final LayerNorm
    return _mlp(block, up, bias, down)


def _orthonormal(count: int, width: int) -> Matrix:
    """Return *count* unit vectors, at right angles to each other and to (1, ..., 1): LayerNorm does not turn them."""
    columns = np.eye(width)
    columns[:, 0] = 1.0
    basis, _ = np.linalg.qr(columns)
    return basis.T[1 : count + 1]


def _mlp(block: str, up: Matrix, bias: Matrix, down: Matrix) -> dict[str, Matrix]:
    return {
        **_layer_norm(f"{block}.mlp_ln", len(down)),
        f"{block}.mlp.0.weight": _f16(up),
        f"{block}.mlp.0.bias": _f32(bias),
        f"{block}.mlp.2.weight": _f16(down),
        f"{block}.mlp.2.bias": _f32(np.zeros(len(down))),
    }


def _attention(name: str, width: int) -> dict[str, Matrix]:
    """Attention that looks around and says nothing: its output matrix is zero."""
    small, tensors = _small_numbers(), _layer_norm(f"{name}_ln", width)
    for part in ("query", "key", "value", "out"):
        matrix = np.zeros((width, width)) if part == "out" else small((width, width))
        tensors[f"{name}.{part}.weight"] = _f16(matrix)
        if part != "key":
            tensors[f"{name}.{part}.bias"] = _f32(np.zeros(width))
    return tensors


def _layer_norm(name: str, width: int, scale: float = 1.0) -> dict[str, Matrix]:
    return {f"{name}.weight": _f32(np.full(width, scale)), f"{name}.bias": _f32(np.zeros(width))}


def _small_numbers() -> Any:
    """Return a function that makes an array of the given shape, the same at each start."""
    rng = np.random.default_rng(4)
    return lambda shape: rng.standard_normal(shape) * 0.02


def _f16(values: Matrix) -> NDArray[np.float16]:
    return np.ascontiguousarray(values, np.float16)


def _f32(values: Matrix) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)
