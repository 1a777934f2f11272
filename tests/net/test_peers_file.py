"""The file `peers`: addresses to dial, edited by commands and by people."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mesh.config.address import split_address
from mesh.net.peers_file import add_peer, normal_address, read_peers, remove_peer


def test_addresses_are_added_once_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "state/peers"
    assert read_peers(path) == ()
    assert add_peer(path, "gpu1:8080")
    assert add_peer(path, "[FD00::20]:8080")
    assert not add_peer(path, "GPU1:8080")
    assert read_peers(path) == ("gpu1:8080", "[fd00::20]:8080")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert remove_peer(path, "gpu1:8080")
    assert not remove_peer(path, "gpu1:8080")
    assert read_peers(path) == ("[fd00::20]:8080",)


def test_what_people_wrote_stays(tmp_path: Path) -> None:
    path = tmp_path / "peers"
    path.write_text("# rack 1\n\n  gpu1:8080   # the big one\ngpu2:8080")
    add_peer(path, "gpu3:8080")
    remove_peer(path, "gpu2:8080")
    assert path.read_text() == "# rack 1\n\n  gpu1:8080   # the big one\ngpu3:8080\n"
    assert read_peers(path) == ("gpu1:8080", "gpu3:8080")


def test_a_mistake_costs_its_own_line_and_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "peers"
    path.write_text("gpu1:8080\ngpu2\ngpu3:0\ngpu1:8080\n")
    assert read_peers(path) == read_peers(path) == ("gpu1:8080",)
    assert caplog.text.count("is no address and is skipped") == 2
    assert f"{path}:2" in str(caplog.records[0].__dict__["fields"])


@pytest.mark.parametrize("address", ["gpu1", "gpu1:0", "gpu1:99999", ":8080", "::1:8080", ""])
def test_what_cannot_be_dialled_is_not_written(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError):
        add_peer(tmp_path / "peers", address)
    assert not (tmp_path / "peers").exists()


@given(st.binary(max_size=100))
@example(b"gpu1:80\xff\n")
@example(b"\0:80\n")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_bytes_give_addresses_that_are_some(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "peers"
    path.write_bytes(content)
    for address in read_peers(path):
        assert split_address(address)
        assert normal_address(address) == address
    if add_peer(path, "gpu1:1"):
        end = b"" if content.endswith(b"\n") or not content else b"\n"
        assert path.read_bytes() == content + end + b"gpu1:1\n"
    assert "gpu1:1" in read_peers(path)
