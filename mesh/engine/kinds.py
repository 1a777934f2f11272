"""The engines of this version. A further one: its file with a ``KIND``, a line here, and its name in ``Engine``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from mesh.config.profile import Engine, Profile
from mesh.config.settings import Settings
from mesh.engine import llama, whisper
from mesh.engine.kind import EngineKind
from mesh.engine.locate import Engines

KINDS: Final[Mapping[Engine, EngineKind]] = {kind.engine: kind for kind in (llama.KIND, whisper.KIND)}


def kind_of(profile: Profile) -> EngineKind:
    """Return what runs *profile*."""
    return KINDS[profile.engine]


def engines(settings: Settings) -> Engines:
    """Return what *settings* let a node run."""
    own = {kind.engine: partial(kind.find, settings) for kind in KINDS.values() if kind.find is not None}
    return Engines(settings.build_settings(), own)
