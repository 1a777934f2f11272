"""Tiny but real GGUF models that the unmodified llama-server loads in milliseconds.

Nothing is trained: the weights are written by hand so that each model does something a test can assert on.

- ``write_chat``    a llama-architecture Markov chain: says one sentence, then EOS; with ``ignore_eos`` again and again
- ``write_embed``   a BERT with mean pooling, a bag of words: texts that share words are close
- ``write_rerank``  a BERT with rank pooling: lexical overlap of query and document, by attention

Needs ``gguf`` and ``numpy`` (the ``dev`` extra).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]

SENTENCE = "Hello from the tiny model: one two three four five six seven eight nine ten."
EOS, FIRST_BYTE = 2, 3  # ids in the chat vocabulary: three control tokens, then the 256 bytes
CLS, SEP = 2, 3  # ids in the BERT vocabulary
CONTENT_DIMS, OTHER_DIMS = 100, 120  # reranker: codes of content words in 0..99, of all other tokens in 100..119
F_CLS, F_RATIO, F_MEAN = 120, 121, 122  # reranker: the dimensions that carry its computation

#: ChatML with Hermes tool calls, which llama.cpp parses into ``tool_calls``
TEMPLATE = (
    "{%- if tools %}{{ '<|im_start|>system\\n' }}"
    "{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{%- endif %}"
    "{{ '# Tools\\n<tools>' }}{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{%- endfor %}"
    "{{ '\\n</tools>\\nFor each function call, return a json object within <tool_call></tool_call> XML tags:\\n"
    '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n\' }}'
    "{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- elif message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if message.content %}{{ message.content + '\\n' }}{%- endif %}"
    "{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + tool_call.name + \'", "arguments": \' }}'
    "{%- if tool_call.arguments is string %}{{ tool_call.arguments }}"
    "{%- else %}{{ tool_call.arguments | tojson }}{%- endif %}{{ '}\\n</tool_call>' }}"
    "{%- endfor %}{{ '<|im_end|>\\n' }}"
    "{%- elif not (message.role == 'system' and tools and loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)

_STOP_TEXT = (
    "the a an of to in is are was and or not for with on at by from as it this that these those be have has do does "
    "did what who where when why how which"
)
_WORD_TEXT = (
    "cat cats dog dogs animal animals pet pets fish bird horse king queen man woman boy girl child person people car "
    "cars truck road drive vehicle engine train plane ship bicycle city town country house home street paris london "
    "france england berlin germany capital europe america world computer server program code software python machine "
    "model data network proxy mesh node food bread apple apples fruit banana cook kitchen eat dinner water coffee tea "
    "music song guitar piano sing dance weather rain sunny snow cloud hot cold summer winter day night morning happy "
    "sad angry love hate good bad big small fast slow hello goodbye yes no panda bear bamboo china list table chair "
    "book read write"
)
STOP_WORDS = frozenset(_STOP_TEXT.split())
WORDS = (*_STOP_TEXT.split(), *_WORD_TEXT.split())


def write_chat(path: Path | str, say: str = SENTENCE, *, name: str = "tiny-chat", context: int = 32768) -> None:
    """Write a model that answers *say* to everything.

    The embedding is one-hot (its width is at least the vocabulary's), the output matrix is the chain's logits. A *say*
    that is a Hermes ``<tool_call>`` becomes a parsed tool call; grammars and JSON schemas end quickly.
    """
    tokens, chain, merges = _chat_vocabulary(say)
    types = [gguf.TokenType.CONTROL] * FIRST_BYTE + [gguf.TokenType.NORMAL] * (len(tokens) - FIRST_BYTE)
    width = (len(tokens) + 31) // 32 * 32
    out = np.zeros((len(tokens), width))
    out[:, : len(tokens)] = _next_token_logits(chain, len(tokens)).T / np.sqrt(width)  # RMSNorm makes sqrt(width) of 1
    writer = gguf.GGUFWriter(str(path), "llama")
    _llama_header(writer, name, context, width, len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", _f16(np.eye(len(tokens), width)))
    writer.add_tensor("output_norm.weight", _f32(np.ones(width)))
    writer.add_tensor("output.weight", _f16(out))
    _silent_llama_blocks(writer, width)
    _finish(writer)


def _byte_to_piece() -> dict[int, str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in printable}
    others = (byte for byte in range(256) if byte not in table)
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def _chat_vocabulary(say: str) -> tuple[list[str], list[int], list[str]]:
    """Return the tokens, the ids that spell *say*, and the merges."""
    piece_of = _byte_to_piece()
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(piece_of[byte] for byte in range(256))]
    pieces: list[str] = []
    for n, word in enumerate(say.split(" ")):
        piece = (" " if n else "") + word
        while piece in pieces:  # a BPE vocabulary is a set: a word that comes again joins its predecessor
            piece = pieces.pop() + piece
        pieces.append(piece)
    chain = []
    for piece in pieces:
        token = "".join(piece_of[byte] for byte in piece.encode())
        if token not in tokens:  # a single ASCII character is there already
            tokens.append(token)
        chain.append(tokens.index(token))
    q = piece_of[ord("q")]
    if q + q not in tokens:
        tokens.append(q + q)  # the one merge that the format insists on
    return tokens, chain, [f"{q} {q}"]


def _next_token_logits(chain: Sequence[int], size: int) -> Matrix:
    """Return logits[current, next] of the Markov chain."""
    logits = np.zeros((size, size))
    logits[:, chain[0]] = 20.0  # after anything: begin to speak
    logits[:, EOS] = 5.0
    after_json = np.zeros(size)  # only a grammar gets there: close soon, say little
    favour = {'"': 16, "}": 15, "]": 14, ":": 12, "{": 11, "[": 10, "1": 8, "t": 7, "n": 6.5, ",": 6, " ": 3, "\n": 2}
    for character, logit in favour.items():
        after_json[FIRST_BYTE + ord(character)] = logit
    for character in '"{}[]:,0123456789':
        logits[FIRST_BYTE + ord(character)] = after_json
    for current, following in zip(chain, [*chain[1:], EOS], strict=True):
        logits[current, following] = 40.0
    return logits


def _llama_header(writer: gguf.GGUFWriter, name: str, context: int, width: int, vocabulary: int) -> None:
    writer.add_name(name)
    writer.add_size_label("tiny")
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(8)
    writer.add_value_length(8)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def _silent_llama_blocks(writer: gguf.GGUFWriter, width: int) -> None:
    """Two layers whose attention and FFN run, so that there is a KV cache, and add nothing."""
    rng = np.random.default_rng(0)
    for prefix in ("blk.0.", "blk.1."):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{prefix}{norm}.weight", _f32(np.ones(width)))
        for part, rows in {"attn_q": 8, "attn_k": 8, "attn_v": 8, "ffn_gate": 32, "ffn_up": 32}.items():
            writer.add_tensor(f"{prefix}{part}.weight", _f16(rng.standard_normal((rows, width)) * 0.02))
        writer.add_tensor(f"{prefix}attn_output.weight", _f16(np.zeros((width, 8))))
        writer.add_tensor(f"{prefix}ffn_down.weight", _f16(np.zeros((width, 32))))


def write_embed(path: Path | str, *, name: str = "tiny-embed", width: int = 64) -> None:
    """Write an embedding model (start it with ``--embedding``): the mean of its words' random vectors."""
    rng = np.random.default_rng(1)
    tokens = _wordpiece_vocabulary()
    embedding = rng.standard_normal((len(tokens), width))
    embedding[[CLS, SEP]] = 0.0
    for n, token in enumerate(tokens):
        if token.lstrip("\u2581") in STOP_WORDS:
            embedding[n] *= 0.05
    zero = np.zeros((width, width))
    small = rng.standard_normal((width, width)) * 0.02
    writer = _bert(path, name, tokens, embedding, heads=2, layers=1, pooling=gguf.PoolingType.MEAN)
    _bert_block(writer, 0, width, query=small, query_bias=np.zeros(width), key=small, value=small, output=zero)
    _finish(writer)


def write_rerank(path: Path | str, *, name: str = "tiny-rerank") -> None:
    """Write a cross-encoder (start it with ``--reranking``): the more words query and document share, the higher.

    Layer 1: each word attends to its own copies and, as strongly, to [CLS]; the weight that falls on [CLS] is
    1/(1 + copies): 1/2 for a word seen once, 1/3 for one seen twice. Layer 2: [CLS] averages that over the whole
    input. Score = a - b * average.
    """
    width, match, ratio_scale = 128, 12.0, 4.0
    root = np.sqrt(width)  # what LayerNorm makes of a unit vector with mean about 0
    tokens = _wordpiece_vocabulary()
    embedding = _rerank_embedding(tokens, width, ratio_scale)
    cls_size = root * embedding[CLS, F_CLS]
    same = np.sqrt(match * root) / root  # (same * root)^2 / sqrt(width) = match
    query, key, value, output = (np.zeros((width, width)) for _ in range(4))
    content = np.arange(CONTENT_DIMS)
    query[content, content] = key[content, content] = same
    query_bias = np.zeros(width)
    query_bias[F_CLS] = np.sqrt(match * root)
    key[F_CLS, F_CLS] = np.sqrt(match * root) / cls_size
    value[F_RATIO, F_CLS] = 1.0 / cls_size
    output[F_RATIO, F_RATIO] = ratio_scale
    zero, mean_value, mean_output = (np.zeros((width, width)) for _ in range(3))
    mean_value[F_MEAN, F_RATIO] = mean_output[F_MEAN, F_MEAN] = 1.0
    writer = _bert(path, name, tokens, embedding, heads=1, layers=2, pooling=gguf.PoolingType.RANK)
    _bert_block(writer, 0, width, query=query, query_bias=query_bias, key=key, value=value, output=output)
    flat = np.zeros(width)
    _bert_block(writer, 1, width, query=zero, query_bias=flat, key=zero, value=mean_value, output=mean_output)
    score = np.zeros((1, width))
    score[0, F_MEAN] = -20.0
    writer.add_tensor("cls.output.weight", _f32(score))
    writer.add_tensor("cls.output.bias", _f32(np.array([40.0])))
    _finish(writer)


def _rerank_embedding(tokens: Sequence[str], width: int, ratio_scale: float) -> Matrix:
    rng = np.random.default_rng(2)
    embedding = np.zeros((len(tokens), width))
    for n, token in enumerate(tokens):
        word = token.lstrip("\u2581")
        content = n >= 5 and token.startswith("\u2581") and len(word) > 1 and word not in STOP_WORDS
        low, high = (0, CONTENT_DIMS) if content else (CONTENT_DIMS, OTHER_DIMS)
        code = rng.standard_normal(high - low)
        code -= code.mean()
        embedding[n, low:high] = code / np.linalg.norm(code)
        if not content:  # it only ever sees [CLS], with weight about 1: shift that to 1/2
            embedding[n, F_RATIO] = -0.5 * ratio_scale / np.sqrt(width)
    embedding[CLS] = 0.0
    embedding[CLS, [F_CLS, CONTENT_DIMS]] = np.array([1.0, -1.0]) / np.sqrt(2.0)
    return embedding


def _wordpiece_vocabulary() -> list[str]:
    """Five special tokens, single characters, ``WORDS``; in llama.cpp's form a word start carries U+2581."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    punctuation = ".,;:!?'\"-_()[]{}/\\@#$%^&*+=<>|~`"
    starts = [*letters, *punctuation]
    words = [word for word in WORDS if word not in starts]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*specials, *("\u2581" + c for c in starts), *letters, *("\u2581" + word for word in words)]


def _bert(
    path: Path | str,
    name: str,
    tokens: Sequence[str],
    embedding: Matrix,
    *,
    heads: int,
    layers: int,
    pooling: gguf.PoolingType,
) -> gguf.GGUFWriter:
    """Begin a BERT file: everything but its blocks."""
    width, context = embedding.shape[1], 512
    control, unknown, normal = gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_name(name)
    writer.add_context_length(context)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(32)
    writer.add_head_count(heads)
    writer.add_layer_norm_eps(1e-6)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooling)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(2)
    writer.add_token_list(tokens)
    writer.add_token_types([control, unknown, control, control, control] + [normal] * (len(tokens) - 5))
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(1)
    writer.add_bos_token_id(CLS)
    writer.add_eos_token_id(SEP)
    writer.add_sep_token_id(SEP)
    writer.add_mask_token_id(4)
    writer.add_tensor("token_embd.weight", _f32(embedding))
    writer.add_tensor("position_embd.weight", _f16(np.zeros((context, width))))
    writer.add_tensor("token_types.weight", _f32(np.zeros((2, width))))
    _layer_norm(writer, "token_embd_norm", width)
    return writer


def _bert_block(
    writer: gguf.GGUFWriter,
    index: int,
    width: int,
    *,
    query: Matrix,
    query_bias: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
) -> None:
    """One layer with the given attention and an FFN that adds nothing."""
    prefix, zero, feed_forward = f"blk.{index}.", np.zeros(width), 32
    parts = {"attn_q": query, "attn_k": key, "attn_v": value, "attn_output": output}
    parts |= {"ffn_up": np.zeros((feed_forward, width)), "ffn_down": np.zeros((width, feed_forward))}
    biases = {"attn_q": query_bias, "ffn_up": np.zeros(feed_forward)}
    for part, weight in parts.items():
        writer.add_tensor(f"{prefix}{part}.weight", _f16(weight))
        writer.add_tensor(f"{prefix}{part}.bias", _f32(biases.get(part, zero)))
    _layer_norm(writer, f"{prefix}attn_output_norm", width)
    _layer_norm(writer, f"{prefix}layer_output_norm", width)


def _layer_norm(writer: gguf.GGUFWriter, name: str, width: int) -> None:
    writer.add_tensor(f"{name}.weight", _f32(np.ones(width)))
    writer.add_tensor(f"{name}.bias", _f32(np.zeros(width)))


def _f16(values: Matrix) -> NDArray[np.float16]:
    return np.ascontiguousarray(values, np.float16)


def _f32(values: Matrix) -> NDArray[np.float32]:
    return np.ascontiguousarray(values, np.float32)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
