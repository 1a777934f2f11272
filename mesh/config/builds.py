"""Where each llama-server is and how it is built: the keys of ``llama_cpp:`` and of each entry of ``builds:``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ConfigDict, model_validator

from mesh.config.fields import Line, Section, Text, key
from mesh.config.units import Count, Seconds, Share

#: what ``llama_cpp:`` is called where builds have names
DEFAULT_BUILD = "default"


def rebuild_command(name: str) -> str:
    """Return the command that builds *name*, or watches it being built."""
    return "llama-mesh rebuild" + ("" if name == DEFAULT_BUILD else f" {name}")


class _BuildKeys(Section):
    repo_url: Line | None = key(None, "Git repository to build llama-server from; null = build nothing")
    repo_path: Text = key("./llama.cpp", "Where the repository is cloned to")
    build_path: Text = key("./llama.cpp/build", "Build directory; the commit is appended to its name")
    binary_path: Text = key(
        "./llama.cpp/bin/llama-server",
        "The llama-server to run; builds put a symlink there. If it is not there: the installed engine, unless this is"
        " set to another path and nothing is built",
    )
    branch: Line = key("master", "Branch, tag or commit to build")
    build_args: tuple[Text, ...] = key(
        ("-DGGML_CUDA=ON", "-DGGML_CUDA_FA_ALL_QUANTS=ON"),
        "Arguments of cmake when it configures; [] = for the CPU only",
    )
    build_command_args: tuple[Text, ...] = key((), "Arguments of cmake --build")
    auto_update_interval_seconds: Seconds = key(0.0, "How often to fetch and rebuild; 0 = at the node's start only")
    enabled: bool = key(True, "Whether builds from repo_url are made")
    keep_builds: Count = key(3, "Old builds that stay on disk, beside the one in use")
    max_slowdown: Share = key(
        0.3, "Share of prefill or decode speed that a new build may lose before it is rejected; 1 = any"
    )
    canary_profile: Line | None = key(
        None, "A model of the cookbook on which old and new build are compared too; null = only on a tiny one"
    )

    @property
    def is_made(self) -> bool:
        """Whether this node makes it from source."""
        return self.enabled and self.repo_url is not None


class LlamaCpp(_BuildKeys):
    """Which llama-server runs, and how it is built from source."""

    @model_validator(mode="after")
    def _default_path_is_not_a_choice(self) -> Self:
        """Let a copied example mean the same as no file: only another binary_path must exist, the default may."""
        if self.binary_path == type(self).model_fields["binary_path"].default:
            self.__pydantic_fields_set__.discard("binary_path")
        return self


class WhisperCpp(Section):
    """Which whisper-server runs the profiles with 'engine: whisper'."""

    binary_path: Text | None = key(
        None,
        "The whisper-server to run; null = the one on PATH, else the one that llama-mesh itself has made",
    )


def _without_defaults(schema: dict[str, Any]) -> None:
    for field in schema["properties"].values():
        field.pop("default", None)


class Build(_BuildKeys):
    """A further llama-server, beside llama_cpp. A key that is not set is as in llama_cpp; the paths get the name."""

    model_config = ConfigDict(json_schema_extra=_without_defaults)

    repo_url: Line | None = key(
        None, "Git repository to build it from; not set or null = that of llama_cpp. To build nothing: enabled: false"
    )


def lower_case_names(builds: object) -> object:
    """Return *builds* with lower-case names, as the keys of config.yaml and of the environment are anyhow."""
    return {str(name).lower(): build for name, build in builds.items()} if isinstance(builds, dict) else builds


def resolved(default: LlamaCpp, builds: Mapping[str, Build]) -> Mapping[str, LlamaCpp]:
    """Return every build with all its keys, *default* first. ``model_fields_set`` of the others has the paths."""
    return {DEFAULT_BUILD: default, **{name: _resolved(name, build, default) for name, build in builds.items()}}


def _resolved(name: str, build: Build, default: LlamaCpp) -> LlamaCpp:
    named = {
        "build_path": f"{default.build_path.rstrip('/')}-{name}",
        "binary_path": str(Path(default.binary_path).parent / name / "llama-server"),
        "canary_profile": None,
    }
    own = {key: getattr(build, key) for key in build.model_fields_set}
    return default.model_copy(update=named | own)
