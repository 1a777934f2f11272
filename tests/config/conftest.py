from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.files import Files


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return Files(tmp_path)
