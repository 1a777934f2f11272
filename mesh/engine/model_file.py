"""What the loader of an instance asks about its model's file."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mesh.config.profile import Profile
from mesh.engine.kinds import kind_of


def other_model(profile: Profile, info: Mapping[str, Any]) -> str | None:
    """Return the model that the server says it has, if it is not *profile*'s; None if it is, or nobody can tell."""
    expected, actual = kind_of(profile).expected_model(profile), info.get("model_path")
    if expected is None or not isinstance(actual, str) or not actual or actual == expected:
        return None
    with contextlib.suppress(OSError):
        if Path(actual).resolve() == Path(expected).resolve():
            return None
    return actual


def model_bytes(profile: Profile) -> int:
    """Return the model's size, all shards about as large as the first; 0 if it is unknown.

    One ``stat``: cheap enough for the loop.
    """
    path = kind_of(profile).expected_model(profile)
    if path is None:
        return 0
    shards = re.search(r"-00001-of-(\d{5})\.gguf$", path)
    try:
        return Path(path).stat().st_size * (int(shards[1]) if shards else 1)
    except OSError:
        return 0
