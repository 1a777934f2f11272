"""A model that says one known sentence, by which a new build of llama.cpp is tested and timed.

Nothing is trained: the weights are written by hand, with the standard library alone, the same bytes everywhere. It has
the shape of a real model (grouped attention, heads of 128, four layers, each of another ggml type), so that the kernels
that real models need run at real width. Most of its weights are noise whose results are multiplied by zero.

The rest tests those kernels. The residual stream holds the current token, one-hot, in its first part, and in its
second what the output matrix reads. Each layer's feed-forward adds a bit of the next token there. The embedding has put
two *decoys* there before: one stays, and outweighs three of the four feed-forwards; one outweighs everything until the
attention of all four layers has taken it away. So the sentence comes out only if every layer computed what it should,
up to some 12 % in all, which the rounding of no type and no device comes near to. Else the answer says what is wrong.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Final

from mesh import files
from mesh.core.ggml_types import NUMBERS, TYPES, tensor_bytes

SENTENCE: Final = "The new llama computes, counts one two three four five, and says goodbye."
#: what it says where a kind of kernel computes nonsense
DECOYS: Final = (" [the feed-forward layers compute nonsense]", " [the attention layers compute nonsense]")
SHA256: Final = "9e3fce39e368285b17fe551ce554e636de770536bf5816840d3f481cfb4da65b"
CONTEXT: Final = 4096

_WIDTH, _HIDDEN, _HEADS, _KV_HEADS, _HEAD = 1024, 2048, 8, 2, 128
_LAYER_TYPES: Final = ("q4_0", "q8_0", "q4_K", "f16")
_EOS, _FIRST_BYTE = 2, 3  # the vocabulary: three control tokens, the 256 bytes, words, decoys

#: where in the residual stream things are: the current token from 0 on, the next one from here on, a constant of -1
_NEXT: Final = 512
_CONSTANT: Final = _WIDTH - 1
#: what each layer adds to the next token, and takes from the second decoy
_STEP: Final = 0.25
_LAYERS: Final = len(_LAYER_TYPES)
_DECOY_STAYS: Final = (_LAYERS - 0.5) * _STEP
_DECOY_GOES: Final = (2 * _LAYERS - 0.6) * _STEP
#: weights that carry the computation; SiLU of what the gate gives is nearly the identity
_GATE, _UP, _VALUE, _OUTPUT = 0.5, 0.5, 0.25, 2.0
_EPSILON: Final = 1e-6
_ALIGNMENT: Final = 32
#: rows of noise that differ; more of them would only take longer to make
_NOISE_ROWS: Final = 32

#: ChatML, in the words by which llama.cpp knows it, also where it does not run templates
TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def ensure(path: Path) -> None:
    """Make *path* the model, unless it is. Raise ``OSError`` if it cannot be written. Blocks for a moment.

    Safe beside others who do the same; a damaged file is written again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.locked(path):
        if not _is_whole(path):
            write(path)


def write(path: Path) -> None:
    """Put the model, some 38 MB, in the place of *path*, whole or not at all. Raise ``OSError`` if that fails."""
    files.replace_file(path, content())


def content() -> bytes:
    """Return the whole file."""
    tokens, following = _vocabulary()
    entries = list(_metadata(tokens))
    tensors = list(_tensors(len(tokens), following))
    table, offset = [], 0
    for name, tensor in tensors:
        count, number = len(tensor.shape), NUMBERS[tensor.type]
        table.append(_text(name) + struct.pack(f"<I{count}QIQ", count, *tensor.shape, number, offset))
        offset += _padded(len(tensor.data))
    magic = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries))
    parts = (b"".join([magic, *entries, *table]), *(tensor.data for _, tensor in tensors))
    return b"".join(part.ljust(_padded(len(part)), b"\0") for part in parts)


def _is_whole(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == SHA256
    except FileNotFoundError:
        return False


def _padded(size: int) -> int:
    return size + -size % _ALIGNMENT


# -- the vocabulary


def _vocabulary() -> tuple[list[str], list[int]]:
    """Return the tokens, and for each the one that follows it."""
    piece_of = _byte_to_piece()
    words = [(" " if n else "") + word for n, word in enumerate(SENTENCE.split(" "))]
    spelled = ["".join(piece_of[byte] for byte in word.encode()) for word in (*words, *DECOYS)]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(piece_of[byte] for byte in range(256)), "qq", *spelled]
    first = len(tokens) - len(spelled)
    following = [first] * len(tokens)  # after anything: begin to speak
    for place in range(len(words)):
        following[first + place] = first + place + 1
    following[first + len(words) - 1] = _EOS
    return tokens, following


def _byte_to_piece() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


# -- the header


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _metadata(tokens: Sequence[str]) -> Iterator[bytes]:
    def entry(key: str, kind: int, value: bytes) -> bytes:
        return _text(key) + struct.pack("<I", kind) + value

    def u32(key: str, value: int) -> bytes:
        return entry(key, 4, struct.pack("<I", value))

    def f32(key: str, value: float) -> bytes:
        return entry(key, 6, struct.pack("<f", value))

    def text(key: str, value: str) -> bytes:
        return entry(key, 8, _text(value))

    def array(key: str, kind: int, items: Sequence[bytes]) -> bytes:
        return entry(key, 9, struct.pack("<IQ", kind, len(items)) + b"".join(items))

    types = [3] * _FIRST_BYTE + [1] * (len(tokens) - _FIRST_BYTE)  # control, normal
    yield text("general.architecture", "llama")
    yield text("general.name", "llama-mesh's tiny model")
    yield u32("general.file_type", 1)  # mostly F16; only shown
    yield u32("llama.context_length", CONTEXT)
    yield u32("llama.embedding_length", _WIDTH)
    yield u32("llama.block_count", _LAYERS)
    yield u32("llama.feed_forward_length", _HIDDEN)
    yield u32("llama.attention.head_count", _HEADS)
    yield u32("llama.attention.head_count_kv", _KV_HEADS)
    yield u32("llama.rope.dimension_count", _HEAD)
    yield u32("llama.vocab_size", len(tokens))
    yield f32("llama.attention.layer_norm_rms_epsilon", _EPSILON)
    yield f32("llama.rope.freq_base", 10000.0)
    yield text("tokenizer.ggml.model", "gpt2")
    yield text("tokenizer.ggml.pre", "gpt-2")
    yield array("tokenizer.ggml.tokens", 8, [_text(token) for token in tokens])
    yield array("tokenizer.ggml.token_type", 5, [struct.pack("<i", kind) for kind in types])
    yield array("tokenizer.ggml.merges", 8, [_text("q q")])  # the format insists on one
    yield u32("tokenizer.ggml.bos_token_id", 0)
    yield u32("tokenizer.ggml.eos_token_id", _EOS)
    yield u32("tokenizer.ggml.padding_token_id", 0)
    yield entry("tokenizer.ggml.add_bos_token", 7, b"\0")
    yield text("tokenizer.chat_template", TEMPLATE)


# -- the weights


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor; *shape* begins with the length of a row."""

    type: str
    shape: tuple[int, ...]
    data: bytes

    def __post_init__(self) -> None:
        assert len(self.data) == tensor_bytes(NUMBERS[self.type], self.shape), (self.type, self.shape, len(self.data))


@dataclass(slots=True)
class _Stream:
    """The sizes in the residual stream while a token passes: the same for every token, so they can be known."""

    following: float = 0.0
    goes: float = _DECOY_GOES

    @property
    def scale(self) -> float:
        """What RMSNorm makes of 1 now."""
        squares = 1.0 + 1.0 + self.following**2 + _DECOY_STAYS**2 + self.goes**2
        return 1.0 / sqrt(squares / _WIDTH + _EPSILON)


def _tensors(vocabulary: int, following: Sequence[int]) -> Iterator[tuple[str, _Tensor]]:
    """Yield names and tensors in the order of the file."""
    stays, goes = _NEXT + vocabulary - 2, _NEXT + vocabulary - 1
    yield "token_embd.weight", _embedding(vocabulary, stays, goes)
    yield "output_norm.weight", _ones()
    current = {token: (_NEXT + token,) for token in range(vocabulary)}
    yield "output.weight", _matrix("q8_0", _WIDTH, vocabulary, current, _OUTPUT)
    stream = _Stream()
    for layer, kind in enumerate(_LAYER_TYPES):
        for name, tensor in (*_attention(kind, goes, stream), *_feed_forward(kind, following, stream)):
            yield f"blk.{layer}.{name}.weight", tensor


def _embedding(vocabulary: int, stays: int, goes: int) -> _Tensor:
    rows = []
    for token in range(vocabulary):
        row = [0.0] * _WIDTH
        row[token], row[stays], row[goes], row[_CONSTANT] = 1.0, _DECOY_STAYS, _DECOY_GOES, -1.0
        rows.append(struct.pack(f"<{_WIDTH}e", *row))
    return _Tensor("f16", (_WIDTH, vocabulary), b"".join(rows))


def _attention(kind: str, goes: int, stream: _Stream) -> Iterator[tuple[str, _Tensor]]:
    """Yield a layer's attention, which looks anywhere and finds the same everywhere: the constant.

    The softmax sums to one, so whatever it looks at, each head gives what one value vector holds.
    """
    each = -_VALUE * stream.scale  # the first element of each head's result
    weight = -_STEP / (each * _HEADS)
    kv_width = _KV_HEADS * _HEAD
    yield "attn_norm", _ones()
    yield "attn_q", _matrix(kind, _WIDTH, _HEADS * _HEAD, {}, 1.0, noise_from=0)
    yield "attn_k", _matrix(kind, _WIDTH, kv_width, {}, 1.0, noise_from=0)
    constants = {head * _HEAD: (_CONSTANT,) for head in range(_KV_HEADS)}
    yield "attn_v", _matrix(kind, _WIDTH, kv_width, constants, _VALUE, noise_from=0)
    heads = tuple(head * _HEAD for head in range(_HEADS))
    yield "attn_output", _matrix(kind, _HEADS * _HEAD, _WIDTH, {goes: heads}, weight)
    stream.goes -= _STEP


def _feed_forward(kind: str, following: Sequence[int], stream: _Stream) -> Iterator[tuple[str, _Tensor]]:
    """Yield a layer's feed-forward: one hidden unit for each token, and noise up to the full width."""
    gate = _GATE * stream.scale
    hidden = gate / (1.0 + exp(-gate)) * _UP * stream.scale
    tokens = len(following)
    current = {token: (token,) for token in range(tokens)}
    preceding: dict[int, list[int]] = {}
    for token, successor in enumerate(following):
        preceding.setdefault(_NEXT + successor, []).append(token)
    yield "ffn_norm", _ones()
    yield "ffn_gate", _matrix(kind, _WIDTH, _HIDDEN, current, _GATE, noise_from=tokens)
    yield "ffn_up", _matrix(kind, _WIDTH, _HIDDEN, current, _UP, noise_from=tokens)
    yield "ffn_down", _matrix(kind, _HIDDEN, _WIDTH, preceding, _STEP / hidden)
    stream.following += _STEP


def _ones() -> _Tensor:
    return _Tensor("f32", (_WIDTH,), struct.pack("<f", 1.0) * _WIDTH)


def _matrix(
    kind: str,
    columns: int,
    rows: int,
    entries: Mapping[int, Collection[int]],
    value: float,
    *,
    noise_from: int | None = None,
) -> _Tensor:
    """Return a matrix of type *kind* with *value* in the columns *entries[row]*.

    The rows that *entries* lacks are zero, or noise from row *noise_from* on.
    """
    zero, noise = _row(kind, columns, (), value), _noise(kind, columns)
    empty = rows if noise_from is None else noise_from
    data = [
        _row(kind, columns, entries[row], value)
        if row in entries
        else (zero if row < empty else noise[row % _NOISE_ROWS])
        for row in range(rows)
    ]
    return _Tensor(kind, (columns, rows), b"".join(data))


# -- ggml's types: a row of zeros and one value, and rows of noise


def _half(value: float) -> bytes:
    return struct.pack("<e", value)


def _q4_k_head(step: float) -> bytes:
    """Return the head of a block of *step* times (nibble - 8): the scales and minima of all sub-blocks are 1."""
    return _half(step) + _half(8 * step) + b"\x01" * 8 + b"\x11" * 4


def _row(kind: str, columns: int, at: Collection[int], value: float) -> bytes:
    """Return a row with *value* > 0 in the columns *at*, and zero elsewhere."""
    if kind == "f16":
        row = bytearray(2 * columns)
        for column in at:
            row[2 * column : 2 * column + 2] = _half(value)
        return bytes(row)
    _, block, size = TYPES[NUMBERS[kind]]
    if kind == "q8_0":
        row = bytearray((_half(value / 127) + bytes(32)) * (columns // block))
        for column in at:
            row[column // block * size + 2 + column % block] = 127
        return bytes(row)
    head = _half(value / 7) if kind == "q4_0" else _q4_k_head(value / 7)
    row = bytearray((head + b"\x88" * (block // 2)) * (columns // block))
    run = 16 if kind == "q4_0" else 32  # so many values are low nibbles, then as many the high ones of the same bytes
    for column in at:
        pair, place = divmod(column % block, 2 * run)
        byte = column // block * size + len(head) + pair * run + place % run
        row[byte] |= 0x0F if place < run else 0xF0
    return bytes(row)


@functools.cache
def _noise(kind: str, columns: int) -> list[bytes]:
    """Return rows of small numbers of either sign."""
    _, block, size = TYPES[NUMBERS[kind]]
    random = hashlib.shake_256(f"{kind} {columns}".encode()).digest(size * (columns // block) * _NOISE_ROWS)
    if kind == "f16":  # a sign, one of 8 bits of exponent, mantissa: 0.016 to 0.031
        small = bytes((byte & 0x83) | 0x24 for byte in range(256))
        data = bytearray(random)
        data[1::2] = random[1::2].translate(small)
        random = bytes(data)
    else:
        head = {"q8_0": _half(0.03 / 127), "q4_0": _half(0.03 / 7), "q4_K": _q4_k_head(0.03 / 7)}[kind]
        body = size - len(head)
        random = random.replace(b"\x80", b"\x81")  # -128 is no q8_0
        blocks = range(columns // block * _NOISE_ROWS)
        random = b"".join(head + random[n * body : (n + 1) * body] for n in blocks)
    length = len(random) // _NOISE_ROWS
    return [random[n * length : (n + 1) * length] for n in range(_NOISE_ROWS)]
