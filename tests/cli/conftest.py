"""Every test runs in an empty directory without LLAMESH_ variables, against a node of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.build_node import BuildNode, serve_builds
from tests.cli.fake_node import FakeNode, serve_node


@pytest.fixture(autouse=True)
def _nothing_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper().startswith("LLAMESH_"):
            monkeypatch.delenv(name)


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNode]:
    """A node that LLAMESH_URL points to."""
    with serve_node() as fake:
        monkeypatch.setenv("LLAMESH_URL", fake.url)
        yield fake


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Iterator[BuildNode]:
    """A node that builds by script, that LLAMESH_URL points to."""
    with serve_builds() as fake:
        monkeypatch.setenv("LLAMESH_URL", fake.url)
        yield fake
