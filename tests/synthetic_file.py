"""One synthetic GGUF file under construction: its sizes, metadata and tensor table, and a hole for the data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Quant = gguf.GGMLQuantizationType


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as real ones have them."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    heads_kv: int = 8
    head_dim: int = 64
    ff: int = 1536
    vocab: int = 8192
    context: int = 16384
    tied: bool = False
    quant: Any = Quant.F16  #: of all matrices
    window: int = 0  #: tokens that a sliding-window layer sees
    experts: int = 8
    experts_used: int = 2
    ff_expert: int = 512
    kv_rank: int = 256  #: MLA
    rope_dim: int = 32  #: MLA
    conv: int = 4  #: recurrent: convolution kernel
    state: int = 16  #: recurrent
    groups: int = 1  #: mamba2
    inner: int = 1024  #: mamba
    attention_every: int = 2  #: hybrid: each so many-th layer has attention


@dataclass
class Model:
    """One file under construction."""

    arch: str
    shape: Shape
    path: Path
    tensors: list[tuple[str, tuple[int, ...], Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.writer = gguf.GGUFWriter(str(self.path), self.arch)

    def key(self, name: str, value: Any) -> None:
        """Add ``<arch>.<name>``; whole numbers as u32, as llama.cpp wants nearly all of them."""
        key = f"{self.arch}.{name}"
        match value:
            case bool():
                self.writer.add_bool(key, value)
            case int():
                self.writer.add_uint32(key, value)
            case float():
                self.writer.add_float32(key, value)
            case str():
                self.writer.add_string(key, value)
            case _:
                self.writer.add_array(key, value)

    def keys(self, **values: Any) -> None:
        """Add several; ``__`` in a name stands for a dot."""
        for name, value in values.items():
            self.key(name.replace("__", "."), value)

    def matrix(self, name: str, *shape: int) -> None:
        """A ``.weight``, ne0 first, quantized if its rows are whole blocks: llama-quantize does the same."""
        block, _ = gguf.GGML_QUANT_SIZES[self.shape.quant]
        self.tensors.append((f"{name}.weight", shape, Quant.F16 if shape[0] % block else self.shape.quant))

    def plain(self, name: str, *shape: int) -> None:
        """A tensor that stays f32: a norm, a bias."""
        self.tensors.append((name, shape, Quant.F32))

    def norms(self, prefix: str, names: Iterable[str], width: int) -> None:
        for name in names:
            self.plain(f"{prefix}{name}.weight", width)

    def normed(self, name: str, width: int) -> None:
        """A norm with a bias."""
        self.plain(f"{name}.weight", width)
        self.plain(f"{name}.bias", width)

    def close(self) -> None:
        """Write header and tensor table, and leave a hole for the data."""
        total = 0
        for name, shape, kind in self.tensors:
            block, size = gguf.GGML_QUANT_SIZES[kind]
            n_bytes = int(np.prod(shape)) // block * size
            row_bytes = shape[0] // block * size  # gguf takes the shape of a quantized tensor in bytes
            stored = (*reversed(shape[1:]), row_bytes if block > 1 else shape[0])
            dtype = np.dtype(np.float32 if kind == Quant.F32 else np.float16 if kind == Quant.F16 else np.uint8)
            self.writer.add_tensor_info(name, stored, dtype, n_bytes, raw_dtype=kind)
            total += -(-n_bytes // 32) * 32
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()
        self.writer.close()
        end = -(-self.path.stat().st_size // 32) * 32
        with open(self.path, "r+b") as file:
            file.truncate(end + total)

    def vocabulary(self) -> None:
        """The 256 bytes in GPT-2's spelling, three control tokens, and filler."""
        printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        table = {byte: chr(byte) for byte in printable}
        others = (byte for byte in range(256) if byte not in table)
        table |= {byte: chr(256 + n) for n, byte in enumerate(others)}
        tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *table.values(), "qq"]
        tokens += [f"q{n}" for n in range(len(tokens), self.shape.vocab)]
        self.writer.add_tokenizer_model("gpt2")
        self.writer.add_tokenizer_pre("gpt-2")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
        self.writer.add_token_merges(["q q"])
        self.writer.add_bos_token_id(0)
        self.writer.add_eos_token_id(2)
        self.writer.add_pad_token_id(0)
        self.writer.add_add_bos_token(False)
