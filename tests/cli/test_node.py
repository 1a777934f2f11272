"""Finding a node and its key; every failure says what to do next."""

from __future__ import annotations

import argparse
import json
import os
import socket
from pathlib import Path

import pytest

from mesh.cli.main import run
from mesh.cli.node import find, local_url
from mesh.config.settings import ServerTls, Settings
from tests.cli.fake_node import FakeNode

MODELS = (200, {"object": "list", "data": []})


def _address(url: str) -> str:
    return url.removeprefix("http://")


def test_a_flag_beats_the_environment_beats_the_configuration(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node.answers["GET /v1/models"] = MODELS
    monkeypatch.setenv("LLAMESH_URL", "http://127.0.0.1:1")
    assert run(["models", "--url", node.url]) == 0
    assert run(["models", "--url", _address(node.url)]) == 0
    assert run(["models", "--url", f"{node.url}/v1/"]) == 0
    assert run(["models"]) == 1
    monkeypatch.delenv("LLAMESH_URL")
    config = tmp_path / "config.yaml"
    config.write_text(f"listen_addr: '{_address(node.url).replace('127.0.0.1', '0.0.0.0')}'\n")
    assert run(["models"]) == 0
    assert run(["models", "--config", str(config)]) == 0


def test_the_key_comes_from_flag_environment_or_secrets(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node.answers["GET /v1/models"] = MODELS
    secrets = tmp_path / "secrets.yaml"
    secrets.write_text("auth: {enabled: true, allowed_keys: [from-file], admin_keys: [admin-file]}\n")
    assert run(["models"]) == 0
    monkeypatch.setenv("LLAMESH_API_KEY", "from-environment")
    assert run(["models"]) == 0
    assert run(["models", "--key", "from-flag"]) == 0
    sent = [asked.authorization for asked in node.asked]
    assert sent == ["Bearer admin-file", "Bearer from-environment", "Bearer from-flag"]


def test_the_configured_key_is_for_this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trap 102: a mistyped --url must not receive an admin key."""
    monkeypatch.chdir(tmp_path)
    Path("secrets.yaml").write_text("auth: {enabled: true, allowed_keys: [k], admin_keys: [admin]}\n")
    for url, key in (
        ("http://gpu1.example:8080", None),
        ("http://127.0.0.1:8080", "admin"),
        ("localhost:8080", "admin"),
    ):
        arguments = argparse.Namespace(url=url, key=None, config=None, secrets=None, cookbook=None, ca=None)
        assert find(arguments).key == key


def test_without_a_key_none_is_sent(node: FakeNode) -> None:
    node.answers["GET /v1/models"] = MODELS
    assert run(["models"]) == 0
    assert node.asked[-1].authorization is None


@pytest.mark.parametrize(
    ("listen_addr", "tls", "expected"),
    [
        ("0.0.0.0:8080", False, "http://127.0.0.1:8080"),
        ("[::]:9000", False, "http://[::1]:9000"),
        ("[fe80::1]:9000", False, "http://[fe80::1]:9000"),
        ("gpu1.lan:443", True, "https://gpu1.lan:443"),
    ],
)
def test_where_a_configured_node_is_reached(listen_addr: str, tls: bool, expected: str) -> None:
    """Trap 68: IPv6 addresses keep their brackets."""
    settings = Settings(listen_addr=listen_addr, server_tls=ServerTls(enabled=tls))
    assert local_url(settings) == expected


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert run(["ps", "--url", f"http://127.0.0.1:{unused.getsockname()[1]}"]) == 1
    error = capsys.readouterr().err
    assert "no node answers at http://127.0.0.1:" in error
    assert "llama-mesh serve" in error


def test_https_on_a_plain_node_is_told_http(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ps", "--url", node.url.replace("http:", "https:")]) == 1
    assert f"It may speak plain HTTP: try --url {node.url}." in capsys.readouterr().err


def test_a_missing_or_wrong_key(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /admin/instances"] = node.error(401, "authentication_error", "Unauthorized")
    assert run(["ps"]) == 1
    error = capsys.readouterr().err
    assert "Unauthorized" in error
    assert "LLAMESH_API_KEY" in error


def test_a_busy_node_says_when_to_come_back(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["POST /admin/prewarm"] = node.error(503, "no_capacity", "Insufficient resources")
    node.retry_after = "30"
    assert run(["prewarm", "x"]) == 1
    assert "Try again in 30 s." in capsys.readouterr().err


def test_a_model_that_is_too_large_points_to_fit(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["POST /admin/prewarm"] = node.error(503, "model_too_large", "'big' needs 40000 MiB")
    assert run(["prewarm", "big"]) == 1
    assert "'llama-mesh fit big' shows" in capsys.readouterr().err


def test_something_else_on_the_port(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    node.answers["GET /v1/models"] = (200, "<html>hello</html>")
    assert run(["models"]) == 1
    assert "is this a llama-mesh node?" in capsys.readouterr().err
    node.answers["GET /v1/models"] = (500, "<html>oops</html>")
    assert run(["models"]) == 1
    assert "HTTP 500 <html>oops" in capsys.readouterr().err
    assert run(["ps"]) == 1
    assert "does not know /admin/instances" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:99999", "http://x:0"])
def test_a_url_that_is_none_is_wrong_usage(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--url", url]) == 2
    assert "http://127.0.0.1:8080" in capsys.readouterr().err


def test_errors_are_json_on_stderr_when_asked(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["error"]["fix"]


def test_a_proxy_is_not_asked_for_this_machine(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    node.answers["GET /v1/models"] = MODELS
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert run(["models"]) == 0


def test_a_broken_configuration_matters_only_when_it_is_needed(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node.answers["GET /v1/models"] = MODELS
    (tmp_path / "config.yaml").write_text("listen_adr: '127.0.0.1:1'\n")
    assert run(["models"]) == 0
    assert run(["models", "--config", "config.yaml"]) == 1
    monkeypatch.delenv("LLAMESH_URL")
    assert run(["models"]) == 1
    assert "config.yaml:1: listen_adr" in capsys.readouterr().err


def test_a_broken_cookbook_does_not_hide_a_running_node(
    node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.answers["GET /v1/models"] = MODELS
    monkeypatch.delenv("LLAMESH_URL")
    (tmp_path / "config.yaml").write_text(f"listen_addr: '{_address(node.url)}'\n")
    (tmp_path / "cookbook.yaml").write_text("models: {this is: not a list\n")
    assert run(["models"]) == 0


def test_the_environment_is_not_changed() -> None:
    assert not [name for name in os.environ if name.startswith("LLAMESH_")]
