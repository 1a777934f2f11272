"""What ties a node's builds to its instances."""

from __future__ import annotations

from dataclasses import replace

import pytest

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
