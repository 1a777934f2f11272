"""Reads llama-server's start-up output for what it says about the model. Best effort: unknown lines are skipped.

The format belongs to llama.cpp and drifts; a line that no longer matches costs one fact, never an instance (trap 94).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

#: All keys of llamesh's ``parsed_model_params``; those that the output did not tell are null.
KEYS: Final = (
    "n_ctx_train",
    "n_ctx",
    "n_slots",
    "n_batch",
    "n_ubatch",
    "arch",
    "n_layer",
    "n_embd",
    "n_head",
    "n_head_kv",
    "n_vocab",
    "n_ff",
    "model_name",
    "model_type",
    "model_params",
    "file_type",
    "rope_type",
    "n_ctx_orig_yarn",
    "freq_base_train",
)

_TOLD_AS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    **{name: (name, int) for name in ("n_ctx_train", "n_layer", "n_embd", "n_head", "n_head_kv", "n_vocab", "n_ff")},
    "n_ctx_orig_yarn": ("n_ctx_orig_yarn", int),
    "freq_base_train": ("freq_base_train", float),
    "arch": ("arch", str),
    "general.name": ("model_name", str),
    "model type": ("model_type", str),
    "file type": ("file_type", str),
    "rope type": ("rope_type", str),
    "model params": ("model_params", str),
}
_PRINT_INFO: Final = re.compile(r"print_info:\s+([a-z_. ]+?)\s*=\s*(.*\S)")
_SLOT_CONTEXT: Final = re.compile(r"new slot, n_ctx = (\d+)")
_TRAINED_CONTEXT: Final = re.compile(r"n_ctx_train \((\d+)\)")
_SLOTS: Final = re.compile(r"initializing slots, n_slots = (\d+)")
_ENOUGH: Final = ("n_ctx", "n_slots", "n_ctx_train", "arch", "model_name")


def parse_load_log(lines: Iterable[str]) -> dict[str, Any] | None:
    """Return all of ``KEYS`` as far as *lines* tell them, or ``None`` if they say nothing about a model."""
    found: dict[str, Any] = {}
    for line in lines:
        _read(line, found)
    if not any(name in found for name in _ENOUGH):
        return None
    return {name: found.get(name) for name in KEYS}


def _read(line: str, found: dict[str, Any]) -> None:
    if (told := _PRINT_INFO.search(line)) and told[1] in _TOLD_AS:
        name, convert = _TOLD_AS[told[1]]
        with suppress(ValueError):
            found[name] = convert(told[2])
    elif slot := _SLOT_CONTEXT.search(line):
        found["n_ctx"] = int(slot[1])
    elif slots := _SLOTS.search(line):
        found["n_slots"] = int(slots[1])
    elif trained := _TRAINED_CONTEXT.search(line):
        found.setdefault("n_ctx_train", int(trained[1]))
