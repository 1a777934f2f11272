"""`known_peers` of a running node: written behind, re-read, never lost, never a half edit in force."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mesh.core.node_state import PeerKey
from mesh.net import known_peers, peer_store
from mesh.net.keys import key_text
from mesh.net.known_peers import Change, KnownPeers, Stamp
from mesh.net.peer_store import PeerStore

A, B, C, D = (PeerKey(bytes([i]) * 32) for i in range(4))
DAY = "2026-11-27"


def learning(node_id: str, key: PeerKey) -> Change:
    return partial(known_peers.learn, node_id=node_id, key=key, today=DAY)


def line(node_id: str, key: PeerKey) -> str:
    return f"{node_id} {key_text(key)}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "known_peers"


@pytest.fixture
def store(path: Path) -> PeerStore:
    path.write_text(line("gpu1", A))
    return PeerStore(path, lambda before: None)


def edit(path: Path, content: str) -> None:
    path.write_text(content)


def names(path: Path) -> set[str]:
    return set(known_peers.read(path)[0].by_name)


class Gate:
    """Stands in for `known_peers.update`: waits in its thread until it is opened, then does the real thing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.calls = 0
        self._real = known_peers.update
        monkeypatch.setattr(known_peers, "update", self._update)

    def _update(self, path: Path, change: Change) -> tuple[KnownPeers, Stamp]:
        self.calls += 1
        self.opened.wait()
        return self._real(path, change)


# --- writing


def test_without_a_loop_the_file_is_written_at_once(store: PeerStore, path: Path) -> None:
    store.apply("b", learning("gpu2", B))
    assert names(path) == {"gpu1", "gpu2"}


async def test_with_a_loop_memory_comes_first_and_the_disk_blocks_nobody(
    store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    store.apply("b", learning("gpu2", B))
    store.apply("c", learning("gpu3", C))
    assert set(store.known.by_name) == {"gpu1", "gpu2", "gpu3"}
    assert names(path) == {"gpu1"}
    await asyncio.sleep(0)
    store.apply("d", learning("gpu4", D))  # while the first ones are being written
    gate.opened.set()
    await store.close()
    assert names(path) == {"gpu1", "gpu2", "gpu3", "gpu4"}
    assert gate.calls == 2


async def test_nothing_is_lost_when_the_node_ends_at_once(store: PeerStore, path: Path) -> None:
    store.apply("b", learning("gpu2", B))
    await store.close()
    assert names(path) == {"gpu1", "gpu2"}
    await store.close()


async def test_a_disk_that_hangs_does_not_keep_the_node_from_ending(
    store: PeerStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(peer_store, "_CLOSING_S", 0.0)
    store.apply("b", learning("gpu2", B))
    await store.close()
    gate.opened.set()
    monkeypatch.undo()
    await store.close()


def test_lines_that_others_wrote_meanwhile_stay(store: PeerStore, path: Path) -> None:
    with path.open("a") as file:
        file.write("# by hand\n" + line("gpu3", C))
    store.apply("b", learning("gpu2", B))
    assert names(path) == {"gpu1", "gpu2", "gpu3"} == set(store.known.by_name)
    assert "# by hand\n" in path.read_text()


def test_what_others_decided_meanwhile_goes_first(store: PeerStore, path: Path) -> None:
    """Somebody revoked the key in the very moment in which it is remembered."""
    known_peers.update(path, partial(known_peers.revoke, key=B, today=DAY))
    store.apply("b", learning("gpu2", B))
    assert store.known.refused(B)
    assert known_peers.read(path)[0].refused(B)


class TestADiskThatRefuses:
    @pytest.fixture(autouse=True)
    def _refusing(self, path: Path) -> None:
        path.with_name("known_peers.lock").mkdir()

    def test_is_told_once_and_memory_goes_on(
        self, store: PeerStore, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store.apply("b", learning("gpu2", B))
        store.apply("c", learning("gpu3", C))
        assert set(store.known.by_name) == {"gpu1", "gpu2", "gpu3"}
        assert caplog.text.count("known_peers cannot be written") == 1
        assert "Is a directory" in (store.unsaved or "")
        assert names(path) == {"gpu1"}

    def test_is_tried_again_with_the_next_change(
        self, store: PeerStore, path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        store.apply("b", learning("gpu2", B))
        path.with_name("known_peers.lock").rmdir()
        store.apply("c", learning("gpu3", C))
        assert names(path) == {"gpu1", "gpu2", "gpu3"}
        assert store.unsaved is None
        assert "is written again" in caplog.text

    def test_is_tried_again_now_and_then(self, store: PeerStore, path: Path) -> None:
        store.apply("b", learning("gpu2", B))
        path.with_name("known_peers.lock").rmdir()
        for _ in range(60):
            store.look()
        assert names(path) == {"gpu1"}
        store.look()
        assert names(path) == {"gpu1", "gpu2"}

    def test_is_tried_again_at_the_end(self, store: PeerStore, path: Path) -> None:
        store.apply("b", learning("gpu2", B))
        path.with_name("known_peers.lock").rmdir()
        asyncio.run(store.close())
        assert names(path) == {"gpu1", "gpu2"}

    def test_does_not_make_memory_grow(self, store: PeerStore) -> None:
        """Two machines with one key take turns in naming it."""
        for i in range(1000):
            store.apply(("key", A), learning(f"name{i % 2}", A))
        assert len(store._pending) == 1

    def test_what_is_not_written_survives_a_reload(self, store: PeerStore, path: Path) -> None:
        store.apply("b", learning("gpu2", B))
        path.write_text(line("gpu3", C))
        store.look()
        assert set(store.known.by_name) == {"gpu2", "gpu3"}


def test_a_broken_file_is_not_written_over_and_the_write_follows_its_repair(store: PeerStore, path: Path) -> None:
    path.write_text("oops\n")
    store.apply("b", learning("gpu2", B))
    store.look()
    assert path.read_text() == "oops\n"
    assert "known_peers:1: " in (store.unsaved or "")
    path.write_text("# fixed\n" + line("gpu3", C))
    store.look()
    assert names(path) == {"gpu2", "gpu3"}


# --- reading


def _in_place(path: Path, content: str) -> None:
    path.write_text(content)


def _by_rename(path: Path, content: str) -> None:
    scratch = path.with_name("new")
    scratch.write_text(content)
    scratch.replace(path)


def _anew(path: Path, content: str) -> None:
    path.unlink()
    path.write_text(content)


@pytest.mark.parametrize("save", [_in_place, _by_rename, _anew])
def test_every_way_of_saving_is_seen(store: PeerStore, path: Path, save: Callable[[Path, str], None]) -> None:
    """Trap 81."""
    for i in range(3):
        save(path, line(f"n{i}", B))
        store.look()
        assert set(store.known.by_name) == {f"n{i}"}


def test_a_file_that_did_not_change_is_not_read(store: PeerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> tuple[KnownPeers, Stamp]:
        raise AssertionError("read")

    store.apply("b", learning("gpu2", B))
    monkeypatch.setattr(known_peers, "read", fail)
    store.look()


def test_a_broken_edit_leaves_the_last_good_content_in_force(
    store: PeerStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As with the cookbook: one loud error with file and line (trap 84)."""
    path.write_text(line("gpu2", B) + "gpu3 oops\n")
    for _ in range(5):
        store.look()
    assert set(store.known.by_name) == {"gpu1"}
    assert caplog.text.count("not reloaded") == 1
    assert f"{path}:2: " in str(caplog.records[0].__dict__["fields"])
    path.write_text(line("gpu2", B))
    store.look()
    assert set(store.known.by_name) == {"gpu2"}


def test_a_file_that_comes_back_broken_is_told_once(
    store: PeerStore, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path.unlink()
    store.look()
    path.write_text("oops\n")
    for _ in range(5):
        store.look()
    assert caplog.text.count("not reloaded") == 1
    assert set(store.known.by_name) == {"gpu1"}


@pytest.mark.parametrize("emptied", [True, False])
def test_an_editor_that_empties_or_removes_the_file_first_costs_nothing(
    store: PeerStore, path: Path, emptied: bool
) -> None:
    seen: list[KnownPeers] = []
    store._on_change = seen.append
    if emptied:
        path.write_bytes(b"")
    else:
        path.unlink()
    store.look()
    assert set(store.known.by_name) == {"gpu1"}
    path.write_text(line("gpu1", A) + line("gpu2", B))
    store.look()
    assert set(store.known.by_name) == {"gpu1", "gpu2"}
    assert len(seen) == 1


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def only_a_comment(path: Path) -> None:
    path.write_text("# managed\n")


ROTATED = f"gpu3 {key_text(C)} rotated {DAY} {key_text(D)}\n"
REFUSED = f"gpu2 {key_text(B)} revoked {DAY}\n{ROTATED}"


@pytest.fixture
def refusing(path: Path) -> PeerStore:
    path.write_text(line("gpu1", A) + REFUSED)
    return PeerStore(path, lambda before: None)


def refused(path: Path) -> set[PeerKey]:
    return {entry.key for entry in known_peers.read(path)[0].refusals}


@pytest.mark.parametrize("spoil", [remove, empty, only_a_comment])
def test_a_file_that_stays_away_or_empty_takes_no_refusal_back(
    refusing: PeerStore, path: Path, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """A volume that is not mounted, a tool that puts its own version there."""
    spoil(path)
    for _ in range(3):
        refusing.look()
        assert refusing.known.refused(B)
        assert refusing.known.refused(C)
    assert refusing.known.by_key[C].successor == D
    assert not refusing.known.by_name
    assert caplog.text.count("only its refusals stay in force") == 1
    refusing.apply("d", learning("gpu4", D))
    assert refused(path) == {B, C}
    assert names(path) == {"gpu4"}


def test_a_file_that_stays_away_is_made_again_at_once(refusing: PeerStore, path: Path) -> None:
    path.unlink()
    refusing.look()
    assert not path.exists(), "an editor may be about to write it"
    refusing.look()
    assert refused(path) == {B, C}


def test_an_empty_file_is_left_alone_until_there_is_something_to_write(refusing: PeerStore, path: Path) -> None:
    path.write_bytes(b"")
    for _ in range(200):
        refusing.look()
    assert path.read_bytes() == b""
    assert refusing.known.refused(B)


@pytest.mark.parametrize("looks", [0, 1, 2])
def test_a_write_into_a_file_that_just_vanished_keeps_the_refusals(refusing: PeerStore, path: Path, looks: int) -> None:
    path.unlink()
    for _ in range(looks):
        refusing.look()
    refusing.apply("d", learning("gpu4", D))
    assert refused(path) == {B, C} == {entry.key for entry in refusing.known.refusals}


def test_a_command_that_writes_into_the_emptied_file_takes_back_only_what_it_says(
    refusing: PeerStore, path: Path
) -> None:
    path.write_bytes(b"")
    refusing.look()
    refusing.look()
    known_peers.update(path, partial(known_peers.trust, node_id="gpu2", key=B, today=DAY))
    refusing.look()
    assert refusing.known.by_name["gpu2"].key == B
    assert refusing.known.refused(C)
    path.write_text("# all over\n" + line("gpu1", A))
    refusing.look()
    assert not refusing.known.refused(B), "its line was there again, and went"


def test_a_line_that_goes_while_others_stay_is_forgotten(refusing: PeerStore, path: Path) -> None:
    path.write_text(line("gpu1", A) + ROTATED)
    refusing.look()
    assert not refusing.known.refused(B)
    path.write_text(line("gpu1", A) + line("gpu3", C))
    refusing.look()
    assert not refusing.known.refused(C)


# --- what may be written later


def rename(store: PeerStore, node_id: str) -> None:
    store.apply(("key", A), learning(node_id, A), later=True)


async def test_a_name_that_changes_all_the_time_is_written_once_a_minute(
    store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    for look in range(60):
        rename(store, f"gpu{look}")
        assert set(store.known.by_name) == {f"gpu{look}"}
        await store.refresh()
    assert gate.calls == 0
    await store.refresh()
    assert store._writer is not None
    rename(store, "later")  # while the first one is written, or before
    await store._writer
    assert gate.calls == 1
    for _ in range(60):
        await store.refresh()
    assert gate.calls == 1
    await store.close()
    assert names(path) == {"later"}


async def test_what_waits_goes_with_what_does_not(store: PeerStore, path: Path) -> None:
    rename(store, "other")
    store.apply("b", learning("gpu2", B))
    assert store._writer is not None
    await store._writer
    assert names(path) == {"other", "gpu2"}


def test_without_a_loop_nothing_waits(store: PeerStore, path: Path) -> None:
    rename(store, "other")
    assert names(path) == {"other"}


# --- looking in a thread


class Eye:
    """Stands in for `known_peers.stamp`: waits in its thread until it is opened, then does the real thing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.threads: list[threading.Thread] = []
        self._real = known_peers.stamp
        monkeypatch.setattr(known_peers, "stamp", self._stamp)

    def _stamp(self, path: Path) -> Stamp:
        self.threads.append(threading.current_thread())
        stamp = self._real(path)
        self.opened.wait()
        return stamp


async def test_a_look_takes_place_in_a_thread(store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eye = Eye(monkeypatch)
    eye.opened.set()
    edit(path, line("gpu2", B))
    await store.refresh()
    assert set(store.known.by_name) == {"gpu2"}
    assert eye.threads[0] is not threading.main_thread()


async def test_a_disk_that_hangs_costs_one_thread_and_nobodys_time(
    store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(peer_store, "_LOOK_S", 0.0)
    eye = Eye(monkeypatch)
    edit(path, line("gpu2", B))
    for _ in range(5):
        await store.refresh()
    assert len(eye.threads) <= 1
    assert caplog.text.count("its disk does not answer") == 1
    assert set(store.known.by_name) == {"gpu1"}
    eye.opened.set()
    assert store._looker is not None
    await store._looker
    assert len(eye.threads) == 1
    assert set(store.known.by_name) == {"gpu2"}


async def test_a_look_that_is_older_than_a_write_counts_for_nothing(
    store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eye = Eye(monkeypatch)
    monkeypatch.setattr(peer_store, "_LOOK_S", 0.0)
    edit(path, line("gpu3", C))
    await store.refresh()
    looker = store._looker
    assert looker is not None
    sights: list[object] = []
    monkeypatch.setattr(store, "_see", sights.append)
    store.apply("b", learning("gpu2", B))
    assert store._writer is not None
    await store._writer
    eye.opened.set()
    await looker
    assert sights == []
    assert set(store.known.by_name) == {"gpu2", "gpu3"}


async def test_a_look_under_way_does_not_outlive_the_store(store: PeerStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_store, "_LOOK_S", 0.0)
    eye = Eye(monkeypatch)
    await store.refresh()
    looker = store._looker
    await store.close()
    assert looker is not None
    assert looker.done()
    eye.opened.set()


# --- both at once


async def test_an_edit_during_a_write_is_not_missed(
    store: PeerStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    store.apply("b", learning("gpu2", B))
    edit(path, line("gpu3", C))
    store.look()
    assert set(store.known.by_name) == {"gpu2", "gpu3"}
    gate.opened.set()
    await store.close()
    store.look()
    assert set(store.known.by_name) == {"gpu2", "gpu3"} == names(path)
