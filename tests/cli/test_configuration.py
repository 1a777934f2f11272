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


def test_files_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win; an empty variable names nothing."""
    arguments = argparse.Namespace(config=None, cookbook=None, secrets=None)
    for name, text in {
        "c": "max_hops: 3",
        "other": "max_hops: 4",
        "b": "models: [{name: m, profiles: [{hf_repo: a/b}]}]",
        "s": "auth: {enabled: true, allowed_keys: [k]}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    for name, file in {"CONFIG": "c.yaml", "COOKBOOK": "b.yaml", "SECRETS": "s.yaml"}.items():
        monkeypatch.setenv(f"LLAMESH_{name}", file)
    loaded = load_from(arguments)
    assert (loaded.settings.max_hops, loaded.settings.auth.allowed_keys) == (3, ("k",))
    assert (str(loaded.config_path), str(loaded.cookbook_path)) == ("c.yaml", "b.yaml")
    arguments.config = Path("other.yaml")
    assert load_from(arguments).settings.max_hops == 4
    monkeypatch.setenv("LLAMESH_COOKBOOK", "")
    assert load_from(arguments).cookbook_path is None
    monkeypatch.setenv("LLAMESH_SECRETS", "gone.yaml")
    with pytest.raises(ConfigErrors, match=r"gone\.yaml: the file does not exist"):
        load_from(arguments)
