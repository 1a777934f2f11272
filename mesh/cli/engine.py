"""The llama-server that a node would run here, and what of a cookbook it could not do. Starts nothing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from mesh.config.diagnostics import Diagnostic
from mesh.config.llama_args import HF_FLAGS, OTHER_SOURCE_FLAGS, flag_value, has_flag
from mesh.config.loader import Loaded
from mesh.config.profile import Profile
from mesh.engine.locate import find_engine
from mesh.errors import EngineMissingError

#: See ``mesh.engine.embedded``: elsewhere llama.cpp's own download cannot be called.
_DOWNLOADS_ON = "x86_64"
_GPU_LAYER_FLAGS = ("-ngl", "--gpu-layers", "--n-gpu-layers")


def engine_summary(loaded: Loaded) -> dict[str, Any]:
    """Return which llama-server would be run, or why none."""
    try:
        engine = find_engine(loaded.settings.llama_cpp)
    except EngineMissingError as error:
        return {"found": False, "reason": error.message}
    if not os.access(engine.argv[0], os.X_OK):
        reason = f"llama_cpp.binary_path {engine.argv[0]} is not executable; run: chmod +x {engine.argv[0]}"
        return {"found": False, "reason": reason}
    return {"found": True, "source": engine.source, "version": engine.version, "command": list(engine.argv)}


def label(engine: dict[str, Any]) -> str:
    """Return a found engine in words."""
    cpu_only = " (CPU only)" if _is_cpu_only(engine) else ""
    return f"{engine['source']}{cpu_only} llama-server, {engine['version'] or 'unknown version'}"


def engine_warnings(loaded: Loaded, engine: dict[str, Any]) -> list[Diagnostic]:
    """Return what the profiles ask for and *engine* cannot do."""
    if engine.get("source") != "embedded":
        return []
    file = str(loaded.cookbook_path)
    return [
        Diagnostic(file, None, profile.id, message)
        for profile in loaded.catalog.profiles
        for message in _beyond_embedded(profile, engine)
    ]


def _beyond_embedded(profile: Profile, engine: dict[str, Any]) -> Iterator[str]:
    named = profile.hf_repo or has_flag(profile.args, HF_FLAGS + OTHER_SOURCE_FLAGS)
    if named and platform.machine() != _DOWNLOADS_ON:
        yield (
            "the embedded engine cannot download models on this machine;"
            " use model_path, or a llama-server of your own (llama_cpp.binary_path)"
        )
    layers = flag_value(profile.args, _GPU_LAYER_FLAGS)
    if layers is not None and _is_cpu_only(engine) and (layers == "all" or (layers.isdecimal() and int(layers) > 0)):
        yield (
            f"{layers} GPU layers have no effect: the embedded engine is CPU only;"
            " for the GPU set llama_cpp.binary_path to a llama-server of your own"
        )


def _is_cpu_only(engine: dict[str, Any]) -> bool:
    return engine.get("source") == "embedded" and sys.platform != "darwin"  # there the wheel has Metal
