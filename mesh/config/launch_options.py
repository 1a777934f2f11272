"""Reads a llama-server command line and its ``LLAMA_ARG_*`` variables into ``LaunchOptions``.

Knows every spelling of the options that decide about memory, as ``llama-server --help`` (b11549) lists them, and a few
that older builds still have. Never judges: a value that cannot be read leaves the default, llama-server refuses it
itself. As there, an argument beats a variable and the last argument wins.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mesh.config.llama_args import expand
from mesh.core.launch_options import DraftOptions, LaunchOptions

#: More layers than any model has: ``--cpu-moe`` means all.
ALL_LAYERS = 2**31 - 1

#: What llama-server takes for n_parallel when it may choose.
AUTO_SLOTS = 4

_LEADING_NUMBER = re.compile(r"\s*[+-]?\d{1,18}")
_TRUE = frozenset({"on", "enabled", "true", "1"})
_FALSE = frozenset({"off", "disabled", "false", "0"})


def parse(args: Sequence[str], env: Mapping[str, str] | None = None) -> LaunchOptions:
    """Return what *args* (after ``llama_args.launch_args``) and the variables *env* ask for."""
    found = _Found()
    for option in _OPTIONS:
        if option.variable and (value := (env or {}).get(option.variable)) is not None:
            found.take(option, value)
    for switch in _SWITCHES:
        if switch.variable and (state := _switched(switch, env or {})) is not None:
            switch.apply(found.values, state)
    tokens = expand(args)
    position = 0
    while position < len(tokens):
        position += found.read(tokens, position)
    return found.options()


class _Option(NamedTuple):
    """An option with a value; ``read`` raises ValueError for one that means nothing; ``variable`` may be empty."""

    key: str
    read: Callable[[str], Any]
    variable: str
    names: tuple[str, ...]


class _Switch(NamedTuple):
    key: str
    variable: str
    on: tuple[str, ...]
    off: tuple[str, ...] = ()

    def apply(self, values: dict[str, Any], state: bool) -> None:
        if self.key == "all_moe":  # the same setting as --n-cpu-moe, without a number
            values.update({"cpu_moe_layers": ALL_LAYERS} if state else {})
        else:
            values[self.key] = state


class _Found:
    """The settings read so far, by field name; those of the draft model begin with ``draft.``."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def read(self, tokens: Sequence[str], position: int) -> int:
        """Read what stands at *position*; return how many tokens that was."""
        token = tokens[position]
        if token in _STATES:
            switch, state = _STATES[token]
            switch.apply(self.values, state)
        option = _BY_NAME.get(token)
        if option is None or position + 1 == len(tokens):
            return 1
        self.take(option, tokens[position + 1])
        return 2

    def take(self, option: _Option, text: str) -> None:
        try:
            value = option.read(text)
        except ValueError:
            return
        if option.key in _LISTS:
            value = (*self.values.get(option.key, ()), *value)
        self.values[option.key] = value

    def options(self) -> LaunchOptions:
        values = dict(self.values)
        draft = {key.removeprefix("draft."): values.pop(key) for key in list(values) if key.startswith("draft.")}
        per_slot, ffn_layers = values.pop("slot_context", 0), values.pop("cpu_ffn_layers", 0)
        load_mode = values.pop("load_mode", None)
        if load_mode is not None:
            values["mmap"], values["mlock"] = load_mode in ("auto", "mmap", "mmap+mlock"), "mlock" in load_mode
        if not values.pop("mmproj_auto", True):
            values.pop("mmproj", None)
        if per_slot and "context" not in values:  # -c 0 is a context too
            values["context"] = per_slot * (values.get("slots") or AUTO_SLOTS)
        if ffn_layers:
            values["overrides"] = (*values.get("overrides", ()), _dense_ffn(ffn_layers))
        return LaunchOptions(**values, draft=DraftOptions(**draft) if "path" in draft else None)


def _dense_ffn(layers: int) -> tuple[str, str]:
    """Return ``--n-cpu-ffn`` as the ``--override-tensor`` that it is."""
    numbers = "|".join(str(layer) for layer in range(min(layers, 512)))
    return rf"blk\.({numbers})\.ffn_(gate|up|gate_up|down)\.", "CPU"


def _switched(switch: _Switch, env: Mapping[str, str]) -> bool | None:
    """Return the state that *env* gives *switch*; LLAMA_ARG_NO_X, whatever its value, turns X off."""
    if switch.off and switch.variable.replace("LLAMA_ARG_", "LLAMA_ARG_NO_") in env:
        return False
    value = env.get(switch.variable)
    if value in _TRUE:
        return True
    return False if value in _FALSE and switch.off else None


def _number(text: str) -> int:
    """Return the number at the start of *text*, as C++'s stoi does."""
    found = _LEADING_NUMBER.match(text)
    if found is None:
        raise ValueError
    return int(found[0])


def _natural(text: str) -> int:
    if (number := _number(text)) < 0:
        raise ValueError
    return number


def _slots(text: str) -> int | None:
    number = _number(text)
    if number == 0:
        raise ValueError
    return number if number > 0 else None


def _gpu_layers(text: str) -> int | None:
    if text in ("auto", "all"):
        return None
    number = _number(text)
    return number if number >= 0 else None


def _flash_attn(text: str) -> bool | None:
    if text in ("auto", "-1"):
        return None
    if text not in _TRUE | _FALSE:
        raise ValueError
    return text in _TRUE


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError
        return text

    return read


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _scaled_words(text: str) -> tuple[str, ...]:
    return tuple(word.rpartition(":")[0] or word for word in _words(text))


def _shares(text: str) -> tuple[float, ...]:
    shares = tuple(float(word) for word in re.split("[,/]", text))
    if not all(math.isfinite(share) and share >= 0 for share in shares):
        raise ValueError(f"{text!r} is no list of proportions")
    return shares


def _overrides(text: str) -> tuple[tuple[str, str], ...]:
    pairs = (word.rpartition("=") for word in _words(text))
    return tuple((pattern, buffer) for pattern, _, buffer in pairs if pattern)


_cache_type = _one_of("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_load_mode = _one_of("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
_split_mode = _one_of("none", "layer", "row", "tensor")

#: Each occurrence adds to the ones before.
_LISTS = frozenset({"overrides", "loras"})

_OPTIONS = (
    _Option("model", str, "LLAMA_ARG_MODEL", ("-m", "--model")),
    _Option("context", _natural, "LLAMA_ARG_CTX_SIZE", ("-c", "--ctx-size")),
    _Option("slots", _slots, "LLAMA_ARG_N_PARALLEL", ("-np", "--parallel")),
    _Option("slot_context", _natural, "LLAMA_ARG_KV_UNIFIED_PER_SLOT", ("--kv-unified-per-slot",)),
    _Option("batch", _natural, "LLAMA_ARG_BATCH", ("-b", "--batch-size")),
    _Option("ubatch", _natural, "LLAMA_ARG_UBATCH", ("-ub", "--ubatch-size")),
    _Option("type_k", _cache_type, "LLAMA_ARG_CACHE_TYPE_K", ("-ctk", "--cache-type-k")),
    _Option("type_v", _cache_type, "LLAMA_ARG_CACHE_TYPE_V", ("-ctv", "--cache-type-v")),
    _Option("flash_attn", _flash_attn, "LLAMA_ARG_FLASH_ATTN", ("-fa", "--flash-attn")),
    _Option("gpu_layers", _gpu_layers, "LLAMA_ARG_N_GPU_LAYERS", ("-ngl", "--gpu-layers", "--n-gpu-layers")),
    _Option("cpu_moe_layers", _natural, "LLAMA_ARG_N_CPU_MOE", ("-ncmoe", "--n-cpu-moe")),
    _Option("cpu_ffn_layers", _natural, "LLAMA_ARG_N_CPU_FFN", ("-ncffn", "--n-cpu-ffn")),
    _Option("overrides", _overrides, "LLAMA_ARG_OVERRIDE_TENSOR", ("-ot", "--override-tensor")),
    _Option("mmproj", str, "LLAMA_ARG_MMPROJ", ("-mm", "--mmproj")),
    _Option("loras", _words, "", ("--lora",)),
    _Option("loras", _scaled_words, "", ("--lora-scaled",)),
    _Option("load_mode", _load_mode, "LLAMA_ARG_LOAD_MODE", ("-lm", "--load-mode")),
    _Option("prompt_cache_mib", _number, "LLAMA_ARG_CACHE_RAM", ("-cram", "--cache-ram")),
    _Option("split_mode", _split_mode, "LLAMA_ARG_SPLIT_MODE", ("-sm", "--split-mode")),
    _Option("tensor_split", _shares, "LLAMA_ARG_TENSOR_SPLIT", ("-ts", "--tensor-split")),
    _Option("main_gpu", _natural, "LLAMA_ARG_MAIN_GPU", ("-mg", "--main-gpu")),
    _Option("devices", _words, "LLAMA_ARG_DEVICE", ("-dev", "--device")),
    _Option("draft.path", str, "LLAMA_ARG_SPEC_DRAFT_MODEL", ("-md", "--model-draft", "--spec-draft-model")),
    _Option("draft.context", _natural, "LLAMA_ARG_CTX_SIZE_DRAFT", ("-cd", "--ctx-size-draft")),
    _Option(
        "draft.gpu_layers",
        _gpu_layers,
        "LLAMA_ARG_N_GPU_LAYERS_DRAFT",
        ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"),
    ),
    _Option(
        "draft.type_k",
        _cache_type,
        "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_K",
        ("-ctkd", "--cache-type-k-draft", "--spec-draft-type-k"),
    ),
    _Option(
        "draft.type_v",
        _cache_type,
        "LLAMA_ARG_SPEC_DRAFT_CACHE_TYPE_V",
        ("-ctvd", "--cache-type-v-draft", "--spec-draft-type-v"),
    ),
)

_SWITCHES = (
    _Switch("kv_unified", "LLAMA_ARG_KV_UNIFIED", ("-kvu", "--kv-unified"), ("-no-kvu", "--no-kv-unified")),
    _Switch("kv_offload", "LLAMA_ARG_KV_OFFLOAD", ("-kvo", "--kv-offload"), ("-nkvo", "--no-kv-offload")),
    _Switch("op_offload", "", ("--op-offload",), ("--no-op-offload",)),
    _Switch("all_moe", "LLAMA_ARG_CPU_MOE", ("-cmoe", "--cpu-moe")),
    _Switch("swa_full", "LLAMA_ARG_SWA_FULL", ("--swa-full",)),
    _Switch("embedding", "LLAMA_ARG_EMBEDDINGS", ("--embedding", "--embeddings")),
    _Switch("rerank", "LLAMA_ARG_RERANKING", ("--rerank", "--reranking")),
    _Switch("mmproj_offload", "LLAMA_ARG_MMPROJ_OFFLOAD", ("--mmproj-offload",), ("--no-mmproj-offload",)),
    _Switch("mmproj_auto", "LLAMA_ARG_MMPROJ_AUTO", ("--mmproj-auto",), ("--no-mmproj", "--no-mmproj-auto")),
    _Switch("mmap", "LLAMA_ARG_MMAP", ("--mmap",), ("--no-mmap",)),
    _Switch("mlock", "LLAMA_ARG_MLOCK", ("--mlock",)),
)

_BY_NAME = {name: option for option in _OPTIONS for name in option.names}
_STATES = {
    **{name: (switch, True) for switch in _SWITCHES for name in switch.on},
    **{name: (switch, False) for switch in _SWITCHES for name in switch.off},
}
