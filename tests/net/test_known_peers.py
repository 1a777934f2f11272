"""The file `known_peers`: what is read, what is refused with its line, and that edits by several do not get lost."""

from __future__ import annotations

import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mesh.config.diagnostics import ConfigErrors
from mesh.core.node_state import PeerKey
from mesh.errors import ConfigError
from mesh.net import known_peers
from mesh.net.keys import key_text
from mesh.net.known_peers import Change, Entry, KnownPeers, Standing, decode_name, encode_name, parse

A, B, C, D = (PeerKey(bytes([i]) * 32) for i in range(4))
DAY = "2026-11-27"


def text_of(key: PeerKey) -> str:
    return key_text(key)


def parsed(*lines: str) -> KnownPeers:
    return parse("".join(f"{line}\n" for line in lines).encode(), "known_peers")


# --- reading


def test_the_format() -> None:
    known = parsed(
        "# made by hand",
        f"gpu1 {text_of(A)}",
        "",
        f"\tgpu2   {text_of(B)} revoked 2026-01-02   # stolen",
        f"gpu2 {text_of(C)} TRUSTED 2026-01-02T03:04:05Z\r",
        f"gpu1 {text_of(D)} rotated {DAY} {text_of(A)}",
    )
    assert known.entries == (
        Entry("gpu1", A),
        Entry("gpu2", B, Standing.REVOKED, "2026-01-02", comment="# stolen"),
        Entry("gpu2", C, since="2026-01-02T03:04:05Z"),
        Entry("gpu1", D, Standing.ROTATED, DAY, A),
    )
    assert {name: entry.key for name, entry in known.by_name.items()} == {"gpu1": A, "gpu2": C}
    assert [known.refused(key) for key in (A, B, C, D)] == [False, True, False, True]
    assert not known.refused(PeerKey(b"\x09" * 32))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("gpu3", "expected a node's name and its key"),
        (f"gpu3 {key_text(C)[:-2]}", "is not a key"),
        (f"{key_text(C)} gpu3", "is not a key"),
        ("gpu3 ed25519-seed:" + "A" * 44, "PRIVATE"),
        (f"gpu3 {key_text(C)} perhaps", "'perhaps' is not understood"),
        (f"gpu3 {key_text(C)} trusted yesterday", "'yesterday' is not understood"),
        (f"gpu3 {key_text(C)} trusted {DAY} {key_text(D)}", "is not understood"),
        (f"gpu3 {key_text(C)} revoked {DAY} nobody", "is not a key"),
        (f"gpu3 {key_text(C)} rotated {DAY} nobody", "is not a key"),
        (f"gpu3 {key_text(A)}", "this key is in line 1 already"),
        (f"gpu3 {key_text(A)} revoked", "this key is in line 1 already"),
        (f"gpu1 {key_text(C)}", "line 1 trusts another key of this node"),
        (f"%ff {key_text(C)}", "'%ff' is not a node's name"),
    ],
)
def test_broken_lines_are_named(line: str, said: str) -> None:
    with pytest.raises(ConfigErrors, match=said) as caught:
        parsed(f"gpu1 {text_of(A)}", "# comment", line, f"gpu2 {text_of(B)}")
    (diagnostic,) = caught.value.diagnostics
    assert (diagnostic.file, diagnostic.line) == ("known_peers", 3)


def test_all_broken_lines_are_named_at_once() -> None:
    with pytest.raises(ConfigErrors) as caught:
        parsed("x", f"gpu1 {text_of(A)}", "y", "z z z")
    assert [diagnostic.line for diagnostic in caught.value.diagnostics] == [1, 3, 4]


@given(st.binary(max_size=300))
@example(b"gpu \xff")
@example(b"\xff# comment")
@example(b"a " + key_text(A).encode() + b" # \xff")
@example(b"\0 " + key_text(A).encode())
@example(b"gpu\xc2\xa01 " + key_text(A).encode())
def test_any_bytes_load_or_are_refused_with_their_lines(content: bytes) -> None:
    try:
        rendered, lines = parse(content, "f").render(), []
    except ConfigErrors as refusal:
        rendered, lines = content, [diagnostic.line or 0 for diagnostic in refusal.diagnostics]
    assert rendered.rstrip(b"\n") == content.rstrip(b"\n")
    assert all(1 <= line <= content.count(b"\n") + 1 for line in lines)


_names = st.text(min_size=1, max_size=12) | st.text(alphabet="%#-. aß\n\t\u00a0\U0001f999", min_size=1, max_size=6)
_keys = st.sampled_from([A, B, C, D])
_entries = st.builds(
    Entry,
    _names,
    st.binary(min_size=32, max_size=32).map(PeerKey),
    st.sampled_from(Standing),
    st.sampled_from(["", DAY, "2026-11-27T10:00:00+00:00"]),
    st.none(),
    st.sampled_from(["", "# why", "#"]),
)


@given(_names.filter(lambda name: name.isprintable() or not any("\ud800" <= c <= "\udfff" for c in name)))
@example("%41")
@example("#")
def test_names_are_one_word_of_ascii(name: str) -> None:
    word = encode_name(name)
    assert decode_name(word) == name
    assert word.isascii()
    assert word.isprintable()
    assert " " not in word
    assert not word.startswith("#")


@given(st.text(alphabet=[chr(code) for code in range(0x21, 0x7F) if chr(code) not in "%#"], min_size=1))
def test_ordinary_names_stay_readable(name: str) -> None:
    assert encode_name(name) == name


@given(st.lists(_entries, max_size=8, unique_by=(lambda entry: entry.key, lambda entry: entry.node_id)))
def test_what_is_written_is_read_again(entries: list[Entry]) -> None:
    known = KnownPeers()
    for entry in entries:
        known = known.with_entry(entry)
    again = parse(known.render(), "f")
    assert again.entries == tuple(entries)
    assert again.render() == known.render()


_changes = st.one_of(
    st.builds(lambda n, k: partial(known_peers.learn, node_id=n, key=k, today=DAY), st.sampled_from("nm"), _keys),
    st.builds(
        lambda n, k, i: partial(known_peers.learn, node_id=n, key=k, today=DAY, instead_of=i),
        st.sampled_from("nm"), _keys, _keys,
    ),
    st.builds(lambda n, k: partial(known_peers.trust, node_id=n, key=k, today=DAY), st.sampled_from("nm"), _keys),
    st.builds(lambda k: partial(known_peers.revoke, key=k, today=DAY), _keys),
    st.builds(
        lambda n, o, k: partial(known_peers.rotate, old=o, new=k, node_id=n, today=DAY),
        st.sampled_from("nm"), _keys, _keys,
    ).filter(lambda change: change.keywords["old"] != change.keywords["new"]),
)  # fmt: skip


@given(st.lists(_changes, max_size=12))
def test_whatever_happens_the_file_stays_valid_and_a_change_made_twice_is_made_once(changes: list[Change]) -> None:
    known = parsed("# people wrote this", f"z {text_of(PeerKey(b'z' * 32))}   # and this")
    for change in changes:
        before, known = known, change(known)
        assert parse(known.render(), "f").entries == known.entries
        assert change(known) is known
        if change(before) is before:
            assert known is before
    assert known.render().startswith(b"# people wrote this\nz ")
    assert b"   # and this\n" in known.render()


@given(st.lists(_changes, max_size=12), _keys)
def test_only_people_take_a_refusal_back(changes: list[Change], key: PeerKey) -> None:
    known = known_peers.revoke(KnownPeers(), key, DAY)
    for change in changes:
        known = change(known)
        by_hand = change.func is known_peers.trust and change.keywords["key"] == key  # type: ignore[attr-defined]
        if by_hand:
            return
        assert known.refused(key)


# --- changes


def test_comments_and_untouched_lines_stay_as_they_are() -> None:
    known = parsed("# head", f"gpu1    {text_of(A)}  # mine", "", f"gpu2 {text_of(B)}")
    known = known_peers.revoke(known, A, DAY)
    assert known.render().decode().splitlines() == [
        "# head",
        f"gpu1 {text_of(A)} revoked {DAY} # mine",
        "",
        f"gpu2 {text_of(B)}",
    ]


def test_a_renamed_node_keeps_its_line_and_its_date() -> None:
    known = known_peers.learn(parsed(f"old {text_of(A)} trusted 2020-01-01"), "new", A, DAY)
    assert known.entries == (Entry("new", A, since="2020-01-01"),)


def test_learning_takes_nobodys_name() -> None:
    known = parsed(f"n {text_of(A)}")
    assert known_peers.learn(known, "n", B, DAY) is known
    assert known_peers.learn(known, "n", B, DAY, instead_of=A).entries == (Entry("n", B, since=DAY),)
    assert known_peers.learn(known, "n", B, DAY, instead_of=C) is known, "somebody changed it meanwhile"


def test_learning_leaves_a_refused_key_alone() -> None:
    known = parsed(f"n {text_of(A)} revoked 2020-01-01")
    assert known_peers.learn(known, "m", A, DAY) is known


@pytest.mark.parametrize("state", ["revoked", f"rotated {DAY} {key_text(C)}"])
def test_a_refused_key_has_no_other_successor(state: str) -> None:
    known = parsed(f"n {text_of(A)} {state}")
    assert known_peers.rotate(known, A, B, "n", DAY) is known


def test_trust_taken_back_keeps_the_comment() -> None:
    known = known_peers.trust(parsed(f"n {text_of(A)} revoked 2020-01-01 # rack 1"), "n", A, DAY)
    assert known.entries == (Entry("n", A, since=DAY, comment="# rack 1"),)


def test_trust_by_hand_revokes_the_other_key_of_the_node() -> None:
    known = known_peers.trust(parsed(f"n {text_of(A)}"), "n", B, DAY)
    assert known.entries == (Entry("n", A, Standing.REVOKED, DAY), Entry("n", B, since=DAY))
    back = known_peers.trust(known, "n", A, DAY)
    assert back.by_name["n"].key == A
    assert back.refused(B)


def test_a_replaced_key_that_is_revoked_keeps_its_successor() -> None:
    """It was stolen, and is in allowed_keys: the key that took its place must not lose its trust."""
    known = known_peers.revoke(parsed(f"n {text_of(A)} rotated 2020-01-01 {text_of(B)}"), A, DAY)
    assert known.entries == (Entry("n", A, Standing.REVOKED, DAY, B),)
    assert parse(known.render(), "f").entries == known.entries
    assert known_peers.trust(known, "n", A, DAY).entries == (Entry("n", A, since=DAY),)


def test_the_name_of_a_revoked_key_is_reserved() -> None:
    known = parsed(f"n {text_of(A)} revoked", f"m {text_of(B)} revoked {DAY} {text_of(C)}", f"- {text_of(D)} revoked")
    assert known.reserved("n") == Entry("n", A, Standing.REVOKED)
    assert [known.reserved(name) for name in ("m", "-", "x")] == [None, None, None]
    assert known_peers.trust(known, "n", C, DAY).reserved("n") is None


def test_a_key_that_is_not_known_can_be_revoked() -> None:
    assert known_peers.revoke(KnownPeers(), A, DAY).entries == (Entry("-", A, Standing.REVOKED, DAY),)


# --- the file


def test_a_change_makes_the_file_and_its_directory_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "state/known_peers"
    known, stamp = known_peers.update(path, partial(known_peers.learn, node_id="n", key=A, today=DAY))
    assert stamp == known_peers.stamp(path)
    assert known_peers.read(path)[0].entries == known.entries == (Entry("n", A, since=DAY),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_change_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "known_peers"
    change = partial(known_peers.learn, node_id="n", key=A, today=DAY)
    known_peers.update(path, change)
    before = path.stat()
    assert known_peers.update(path, change)[1] == known_peers.stamp(path)
    assert path.stat().st_ino == before.st_ino


def test_a_broken_file_is_never_written_over(tmp_path: Path) -> None:
    path = tmp_path / "known_peers"
    path.write_text("gpu1 oops\n")
    with pytest.raises(ConfigErrors, match="known_peers:1: "):
        known_peers.update(path, partial(known_peers.learn, node_id="n", key=A, today=DAY))
    assert path.read_text() == "gpu1 oops\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    path = tmp_path / "known_peers"
    path.symlink_to(tmp_path / "real/peers")
    known_peers.update(path, partial(known_peers.learn, node_id="n", key=A, today=DAY))
    assert path.is_symlink()
    assert known_peers.read(tmp_path / "real/peers")[0].entries == (Entry("n", A, since=DAY),)


def test_a_file_that_cannot_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        known_peers.read(tmp_path)
    assert known_peers.read(tmp_path / "none")[1] is None


_ADD = """
import sys
from functools import partial
from pathlib import Path
from mesh.core.node_state import PeerKey
from mesh.net import known_peers
number = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    key = PeerKey(bytes([number, i]) * 16)
    change = partial(known_peers.learn, node_id=f"{number}-{i}", key=key, today="2026-11-27")
    known_peers.update(Path(sys.argv[1]), change)
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "known_peers"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ADD, str(path), str(number)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    expected = {f"{number}-{i}" for number in range(3) for i in range(20)}
    assert set(known_peers.read(path)[0].by_name) == expected
