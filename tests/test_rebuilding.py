"""What ties a node's builds to its instances."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mesh.config.profile import Engine
from mesh.errors import UnknownModelError
from mesh.rebuilding import Trials
from tests.engine.supervised import World, profile

USUAL = profile("a")
OTHER = replace(profile("b"), engine_build="vulkan")


@pytest.mark.parametrize(
    ("name", "build", "answer"),
    [
        ("a:default", "default", True),
        ("a:default", "vulkan", False),
        ("b:default", "vulkan", True),
        ("b:default", "default", False),
        ("none", "vulkan", True),  # the trial tells
    ],
)
async def test_which_build_a_profile_runs_with(name: str, build: str, answer: bool) -> None:
    assert Trials(World(USUAL, OTHER).sup).runs_by_default(name, build) is answer


async def test_what_another_engine_runs_is_no_canary() -> None:
    """Else whisper-server would be asked for a completion, and its 404 taken for a failure of the new build."""
    trials = Trials(World(replace(USUAL, engine=Engine.WHISPER)).sup)
    for binary in (None, Path("/new/llama-server")):
        with pytest.raises(UnknownModelError, match="a is run by whisper-server: no canary"):
            async with trials.trial("a:default", binary):
                pass
