"""Commands that need the settings only are not stopped by a cookbook in the middle of an edit."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mesh.cli.configuration import NO_COOKBOOK, load_from
from mesh.config.loader import ConfigErrors


def test_a_broken_cookbook_stops_only_those_who_read_it(tmp_path: Path) -> None:
    (tmp_path / "cookbook.yaml").write_text("models: 7\n")
    arguments = argparse.Namespace(config=None, cookbook=None, secrets=None)
    with pytest.raises(ConfigErrors, match=r"cookbook\.yaml:1: models"):
        load_from(arguments)
    loaded = load_from(arguments, cookbook=NO_COOKBOOK)
    assert loaded.catalog.profiles == ()
    assert loaded.warnings == ()
