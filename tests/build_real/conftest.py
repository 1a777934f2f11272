"""Tests with a llama-server that was built from the real sources: minutes the first time, seconds afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from tests import real_llama_cpp
from tests.e2e.conftest import smollm2, start_node
from tests.real_llama_cpp import RealLlamaCpp

__all__ = ["smollm2", "start_node"]  # fixtures

HERE = Path(__file__).parent
COLD = "needs llama.cpp built from source; `make test-build` does that once (4 to 9 minutes) and keeps it in the cache"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what lies below this directory, and skip it where it would compile for minutes unasked."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    skip = bool(ours) and os.environ.get("MESH_BUILD_REAL") != "1" and not real_llama_cpp.is_warm(os.environ)
    for item in ours:
        item.add_marker(pytest.mark.e2e)
        item.add_marker(pytest.mark.slow)
        if skip:
            item.add_marker(pytest.mark.skip(reason=COLD))


@pytest.fixture(scope="session")
def real_llama_cpp_sources() -> RealLlamaCpp:
    """The repository, and where in the cache it is to be built: nothing is compiled there if it was before."""
    return real_llama_cpp.ensure(os.environ, Console(stderr=True))
