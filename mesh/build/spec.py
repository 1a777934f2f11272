"""What is to be built and where: one frozen value per configured build, with absolute paths. Looks at no file."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class LlamaCppLike(Protocol):
    """The configuration that a build is made from: ``mesh.config.settings.LlamaCpp``, resolved whole."""

    @property
    def enabled(self) -> bool: ...
    @property
    def repo_url(self) -> str | None: ...
    @property
    def repo_path(self) -> str: ...
    @property
    def build_path(self) -> str: ...
    @property
    def binary_path(self) -> str: ...
    @property
    def branch(self) -> str: ...
    @property
    def build_args(self) -> Sequence[str]: ...
    @property
    def build_command_args(self) -> Sequence[str]: ...
    @property
    def auto_update_interval_seconds(self) -> float: ...
    @property
    def keep_builds(self) -> int: ...
    @property
    def max_slowdown(self) -> float: ...
    @property
    def canary_profile(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class BuildSpec:
    """One configured build. Two builds never share ``build_path`` or ``binary_path``; they may share ``repo_path``."""

    name: str
    enabled: bool
    repo_url: str | None
    repo_path: Path
    build_path: Path
    binary_path: Path  #: a symlink to the binary in use
    ref: str  #: branch, tag or commit
    build_args: tuple[str, ...] = ()
    build_command_args: tuple[str, ...] = ()
    auto_update_interval_s: float = 0.0
    keep_builds: int = 3
    max_slowdown: float = 0.3
    canary_profile: str | None = None

    @property
    def made(self) -> bool:
        """Whether this node makes it from source at all."""
        return self.enabled and self.repo_url is not None


def specs_of(builds: Mapping[str, LlamaCppLike]) -> tuple[BuildSpec, ...]:
    """Return what ``Settings.build_settings()`` describes, in its order."""
    return tuple(_spec_of(name, settings) for name, settings in builds.items())


def _spec_of(name: str, settings: LlamaCppLike) -> BuildSpec:
    return BuildSpec(
        name=name,
        enabled=settings.enabled,
        repo_url=_url(settings.repo_url),
        repo_path=_absolute(settings.repo_path),
        build_path=_absolute(settings.build_path),
        binary_path=_absolute(settings.binary_path),
        ref=settings.branch,
        build_args=tuple(settings.build_args),
        build_command_args=tuple(settings.build_command_args),
        auto_update_interval_s=settings.auto_update_interval_seconds,
        keep_builds=settings.keep_builds,
        max_slowdown=settings.max_slowdown,
        canary_profile=settings.canary_profile,
    )


def _url(text: str | None) -> str | None:
    """Return *text*; a local path means the same wherever git runs."""
    return str(_absolute(text)) if text is not None and text.startswith(("./", "../", "~/")) else text


def _absolute(path: str) -> Path:
    """Return *path* with ``~`` expanded, from the node's working directory; symlinks stay: one of them is ours."""
    return Path(os.path.abspath(os.path.expanduser(path)))
