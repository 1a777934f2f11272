"""The user and the password of ``repo_url``: git has them, and nobody else, neither in argv nor on disk (trap 101)."""

from __future__ import annotations

import base64
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from mesh.build.command import Surroundings
from mesh.build.remote import Remote, remote_of
from mesh.build.repository import Repository
from mesh.errors import BuildError
from tests.build.project import Project, spec_in

USER, PASSWORD = "tok3nuser", "s3cret word"


class Server(ThreadingHTTPServer):
    """Serves a repository to who knows the password, and looks around in the machine while somebody asks."""

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), lambda *args: _Handler(*args, directory=str(directory)))
        self.authorised = 0
        self.asking: set[str] = set()  #: the command lines that were seen


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        for process in psutil.Process().children(recursive=True):
            try:
                self.server.asking.add(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        if self.headers.get("Authorization") == f"Basic {expected}":
            self.server.authorised += 1
            super().do_GET()
        else:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="x"')
            self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    server = Server(directory)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def test_git_is_told_and_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an operator's credential helper store it."""
    project = Project(tmp_path / "upstream")
    commit = project.commit()
    project.git("update-server-info")
    home = tmp_path / "home"
    home.mkdir()
    (home / ".gitconfig").write_text(f"[credential]\n\thelper = store --file={home}/stored\n")
    monkeypatch.setenv("HOME", str(home))
    said: list[str] = []
    with serving(project.path / ".git") as server:
        url = f"http://{USER}:{PASSWORD.replace(' ', '%20')}@127.0.0.1:{server.server_port}/"
        spec = spec_in(tmp_path, project, repo_url=url)
        found = await Repository(spec, Surroundings(lambda: os.environ), said.append).find("master")
        assert found.commit == commit
        with pytest.raises(BuildError) as caught:
            await Repository(spec, Surroundings(lambda: os.environ), said.append).find("b1")
    assert server.authorised > 1
    assert any("remote-http" in line for line in server.asking), "git passes the URL on in argv"
    shown = [*server.asking, *said, caught.value.message, *_written(spec.repo_path), *_written(home)]
    assert not [text for text in shown if "s3cret" in text or USER in text]


def _written(directory: Path) -> list[str]:
    return [path.read_bytes().decode("latin-1") for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("url", "remote"),
    [
        ("https://example.org/x", Remote("https://example.org/x")),
        ("https://me:p%40ss@example.org:8443/x", Remote("https://example.org:8443/x", "me", "p@ss")),
        ("https://token@example.org/x", Remote("https://example.org/x", "token", "")),
        ("https://:p@[::1]:80/x", Remote("https://[::1]:80/x", "", "p")),
        ("https://example.org/x@v1", Remote("https://example.org/x@v1")),
        ("git@example.org:x", Remote("git@example.org:x")),
        ("ssh://git@example.org/x", Remote("ssh://git@example.org/x")),
        ("/srv/me:p@x", Remote("/srv/me:p@x")),
    ],
)
def test_the_parts_of_a_url(url: str, remote: Remote) -> None:
    assert remote_of(url) == remote


def test_what_the_operator_tells_git_stays() -> None:
    environ = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "http.proxy", "GIT_CONFIG_VALUE_0": "p"}
    told = Remote("https://h:1/x", "u").environment(environ, as_origin=True)
    assert told["GIT_CONFIG_COUNT"] == "5"
    assert "GIT_CONFIG_KEY_0" not in told
    assert [told[f"GIT_CONFIG_KEY_{number}"] for number in range(1, 5)] == [
        "remote.llama-mesh-source.url",
        "remote.origin.url",
        "credential.https://h:1.helper",
        "credential.https://h:1.helper",
    ]
    assert Remote("x").environment({"GIT_CONFIG_COUNT": "many"})["GIT_CONFIG_COUNT"] == "1"
