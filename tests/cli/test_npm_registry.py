"""Files of an npm registry: where they are asked for, and what an error advises."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mesh.cli.failure import CliError
from mesh.cli.npm_registry import Registry, registry_url
from mesh.cli.package_index import PinnedFile
from tests.cli.file_server import serve_file

CONTENT = os.urandom(300_000)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, "https://registry.npmjs.org"),
        ({"npm_config_registry": "https://mirror.example/npm/"}, "https://mirror.example/npm"),
        ({"NPM_CONFIG_REGISTRY": "https://mirror.example"}, "https://mirror.example"),
        ({"npm_config_registry": ""}, "https://registry.npmjs.org"),
    ],
)
def test_which_registry(environ: dict[str, str], expected: str) -> None:
    assert registry_url(environ) == expected


def test_fetches_and_continues_like_a_package_index(tmp_path: Path) -> None:
    with serve_file(CONTENT) as server:
        server.cut_after = [100_000]
        registry = Registry({"npm_config_registry": f"{server.url}/files/"}, retry_pause_s=0)
        registry.fetch(PinnedFile("thing-1.0", "thing.tgz", server.sha256, len(CONTENT)), tmp_path / "thing.tgz")
    assert (tmp_path / "thing.tgz").read_bytes() == CONTENT
    path = "/files/thing-1.0/-/thing.tgz"
    assert server.requests == [(path, None), (path, "bytes=100000-")]


def test_advice_names_the_setting_of_npm(tmp_path: Path) -> None:
    with serve_file(CONTENT) as server:
        registry = Registry({"npm_config_registry": server.url}, retry_pause_s=0)
        with pytest.raises(CliError, match="HTTP 404") as caught:
            registry.fetch(PinnedFile("nothing", "nothing.tgz", server.sha256, len(CONTENT)), tmp_path / "nothing")
    assert "npm_config_registry" in (caught.value.fix or "")
    assert "PIP" not in (caught.value.fix or "")
