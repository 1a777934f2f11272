"""Downloads against a real HTTP server: whole or not at all, continued where they stopped, never the wrong content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.cli.failure import CliError
from mesh.cli.package_index import Index, PinnedFile
from tests.cli.file_server import FileServer, serve_file

CONTENT = os.urandom(600_000)


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serve_file(CONTENT) as files:
        yield files


@pytest.fixture
def index(server: FileServer) -> Index:
    return _index(f"{server.url}/simple/")


def _index(url: str) -> Index:
    return Index({"PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull}, retry_pause_s=0)


@pytest.fixture
def pinned(server: FileServer) -> PinnedFile:
    return PinnedFile("Thing", "thing-1.0.bin", server.sha256, len(CONTENT))


def _leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_fetches_the_file_and_reports_progress(index: Index, pinned: PinnedFile, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    index.fetch(pinned, tmp_path / "sub" / "thing", lambda done, total: seen.append((done, total)))
    assert (tmp_path / "sub" / "thing").read_bytes() == CONTENT
    assert _leftovers(tmp_path / "sub") == ["thing"]
    assert seen[0] == (0, len(CONTENT))
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_connection_is_continued_not_repeated(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.cut_after = [100_000, 50_000]
    index.fetch(pinned, tmp_path / "thing")
    assert (tmp_path / "thing").read_bytes() == CONTENT
    assert server.fetches == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_run_continues_what_the_last_one_left(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.cut_after = [100_000, 0, 0, 0]
    with pytest.raises(CliError, match=r"ended after 100,000 of 600,000 bytes, 4 times") as caught:
        index.fetch(pinned, tmp_path / "thing")
    assert "again" in (caught.value.fix or "")
    assert not (tmp_path / "thing").exists()
    index.fetch(pinned, tmp_path / "thing")
    assert (tmp_path / "thing").read_bytes() == CONTENT
    assert server.fetches[-1] == "bytes=100000-"


def test_an_interrupted_download_keeps_what_it_has(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done > 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.fetch(pinned, tmp_path / "thing", interrupt)
    assert not (tmp_path / "thing").exists()
    index.fetch(pinned, tmp_path / "thing")
    assert (tmp_path / "thing").read_bytes() == CONTENT
    assert server.fetches[-1] is not None


def test_a_server_without_ranges_starts_over(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.honours_range = False
    server.cut_after = [100_000]
    index.fetch(pinned, tmp_path / "thing")
    assert (tmp_path / "thing").read_bytes() == CONTENT


def test_wrong_content_is_refused_and_leaves_nothing(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.content = bytes(len(CONTENT))
    with pytest.raises(CliError, match="expected " + pinned.sha256):
        index.fetch(pinned, tmp_path / "thing")
    assert _leftovers(tmp_path) == []


def test_a_spoilt_beginning_is_thrown_away_and_fetched_again(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    (tmp_path / f"thing.{pinned.sha256[:12]}.part").write_bytes(bytes(1000))
    index.fetch(pinned, tmp_path / "thing")
    assert (tmp_path / "thing").read_bytes() == CONTENT
    assert server.fetches == ["bytes=1000-", None]


def test_a_body_longer_than_pinned_is_not_written_for_ever(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.content = CONTENT * 20
    seen: list[int] = []
    with pytest.raises(CliError, match="sha256"):
        index.fetch(replace(pinned, sha256="0" * 64), tmp_path / "thing", lambda done, total: seen.append(done))
    assert max(seen) < 2 * len(CONTENT)
    assert _leftovers(tmp_path) == []


def test_a_passing_server_error_is_retried_and_a_refusal_is_not(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    server.statuses = [503, 502]
    index.fetch(pinned, tmp_path / "thing")
    assert len(server.fetches) == 3
    server.statuses = [403, 403]
    with pytest.raises(CliError, match="HTTP 403"):
        index.fetch(pinned, tmp_path / "other")
    assert len(server.fetches) == 4


def test_a_full_disk_is_named(index: Index, pinned: PinnedFile, tmp_path: Path) -> None:
    part = tmp_path / f"thing.{pinned.sha256[:12]}.part"
    part.symlink_to("/dev/full")
    with pytest.raises(CliError, match="no room") as caught:
        index.fetch(pinned, tmp_path / "thing")
    assert "LLAMA_MESH_CACHE" in (caught.value.fix or "")


def test_unknown_files_and_unreachable_indexes_say_what_to_do(
    index: Index, server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    with pytest.raises(CliError, match=r"does not list thing-2\.0"):
        index.fetch(replace(pinned, filename="thing-2.0.bin"), tmp_path / "thing")
    with pytest.raises(CliError, match="HTTP 404"):
        index.fetch(replace(pinned, project="other"), tmp_path / "thing")
    with pytest.raises(CliError, match="cannot read") as caught:
        _index("http://127.0.0.1:1/simple").fetch(pinned, tmp_path / "thing")
    assert "PIP_INDEX_URL" in (caught.value.fix or "")


def test_credentials_in_the_index_url_are_sent_and_never_shown(
    server: FileServer, pinned: PinnedFile, tmp_path: Path
) -> None:
    index = _index(server.url.replace("http://", "http://me:p%40ss@") + "/simple")
    index.fetch(pinned, tmp_path / "thing")
    assert set(server.authorizations) == {"Basic bWU6cEBzcw=="}
    with pytest.raises(CliError, match="HTTP 404") as caught:
        index.fetch(replace(pinned, project="other"), tmp_path / "other")
    assert "p%40ss" not in caught.value.message
    server.content = bytes(len(CONTENT))
    with pytest.raises(CliError, match="sha256") as caught:
        index.fetch(pinned, tmp_path / "other")
    assert "p%40ss" not in caught.value.message


def test_pips_own_configuration_is_honoured(tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://mirror.example/simple/\n")
    environ = {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "HOME": str(tmp_path)}
    assert Index(environ).url == "https://mirror.example/simple"
    assert Index({**environ, "PIP_INDEX_URL": "http://other/s"}).url == "http://other/s"
    assert Index({"PIP_CONFIG_FILE": os.devnull}).url == "https://pypi.org/simple"
    (tmp_path / "pip.conf").write_text("not an ini file")
    assert Index(environ).url == "https://pypi.org/simple"
