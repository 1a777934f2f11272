"""``mesh.models.tiny_model``: what its weights compute, without llama.cpp. With it: tests/build/test_smoke.py."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf as format_library
import numpy as np
import pytest
from numpy.typing import NDArray

from mesh.models import gguf, tiny_model
from mesh.models.tiny_model import DECOYS, SENTENCE

Weights = dict[str, NDArray[np.float32]]
LAYERS, HEADS, KV_HEADS, HEAD = 4, 8, 2, 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    tiny_model.write(path)
    return path


@pytest.fixture(scope="module")
def reader(model: Path) -> Any:
    return format_library.GGUFReader(model)


@pytest.fixture(scope="module")
def weights(reader: Any) -> Weights:
    """All tensors as numbers, by the format's own library."""
    return {t.name: format_library.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def test_the_file_is_the_same_everywhere(model: Path) -> None:
    assert hashlib.sha256(model.read_bytes()).hexdigest() == tiny_model.SHA256
    assert 20e6 < model.stat().st_size < 40e6


def test_it_has_the_types_that_real_models_have(model: Path) -> None:
    facts = gguf.read(model)
    assert facts.metadata["general.architecture"] == "llama"
    assert {tensor.ggml_type for tensor in facts.tensors} == {0, 1, 2, 8, 12}  # f32, f16, q4_0, q8_0, q4_K
    assert facts.file_bytes == model.stat().st_size


def test_noise_is_small_and_of_either_sign(weights: Weights) -> None:
    for layer in range(LAYERS):
        noise = weights[f"blk.{layer}.attn_q.weight"]
        assert 0.02 < np.abs(noise).max() < 0.04
        assert abs(noise.mean()) < 0.01
        assert (noise > 0).any()
        assert (noise < 0).any()


def rms(x: NDArray[np.float32]) -> NDArray[np.float32]:
    scaled: NDArray[np.float32] = x / np.sqrt(np.mean(x**2) + 1e-6)
    return scaled


def logits(weights: Weights, token: int) -> NDArray[np.float32]:
    """What llama.cpp computes for one token without a past, where attention sees only the token itself."""
    x = weights["token_embd.weight"][token]
    for layer in range(LAYERS):
        part = {name.split(".")[2]: value for name, value in weights.items() if name.startswith(f"blk.{layer}.")}
        value = (part["attn_v"] @ rms(x)).reshape(KV_HEADS, HEAD)
        x = x + part["attn_output"] @ np.repeat(value, HEADS // KV_HEADS, axis=0).reshape(-1)
        gate, up = part["ffn_gate"] @ rms(x), part["ffn_up"] @ rms(x)
        x = x + part["ffn_down"] @ (gate / (1 + np.exp(-gate)) * up)
    told: NDArray[np.float32] = weights["output.weight"] @ rms(x)
    return told


def spoken(reader: Any, weights: Weights) -> Iterator[str]:
    """Yield the pieces that the model says after a newline, up to its end or a dozen more than it should."""
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    token = tokens.index("Ċ")
    for _ in range(len(SENTENCE.split()) + 12):
        token = int(np.argmax(logits(weights, token)))
        if tokens[token] == "<|im_end|>":
            return
        yield tokens[token].replace("Ġ", " ")


def test_it_says_the_sentence_by_a_wide_margin(reader: Any, weights: Weights) -> None:
    assert "".join(spoken(reader, weights)) == SENTENCE
    for token in (0, 2, 100, 261):
        second, first = np.sort(logits(weights, token))[-2:]
        assert first > 1.1 * second > 0


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("ffn_gate", DECOYS[0]),
        ("ffn_up", DECOYS[0]),
        ("ffn_down", DECOYS[0]),
        ("attn_v", DECOYS[1]),
        ("attn_output", DECOYS[1]),
    ],
)
def test_a_layer_that_computes_nothing_shows(reader: Any, weights: Weights, layer: int, part: str, says: str) -> None:
    name = f"blk.{layer}.{part}.weight"
    broken = {**weights, name: np.zeros_like(weights[name])}
    assert next(spoken(reader, broken)) == says


def test_ensure_writes_once_and_repairs(tmp_path: Path) -> None:
    path = tmp_path / "builds" / "tiny.gguf"
    tiny_model.ensure(path)
    first = path.stat()
    tiny_model.ensure(path)
    assert path.stat().st_ino == first.st_ino
    with path.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"damage")
    tiny_model.ensure(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == tiny_model.SHA256


def test_ensure_tells_when_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "builds").write_text("a file where a directory is needed")
    with pytest.raises(OSError):
        tiny_model.ensure(tmp_path / "builds" / "tiny.gguf")
