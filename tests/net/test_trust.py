"""Whom a node trusts: every rule of `mesh.net.trust`, its messages, and what a reload says."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.config.diagnostics import ConfigErrors
from mesh.config.settings import Noise
from mesh.core.node_state import PeerKey
from mesh.errors import UntrustedPeerError
from mesh.net import known_peers, trust
from mesh.net.keys import Identity, fingerprint, key_text, rotated_from
from mesh.net.known_peers import Entry, KnownPeers, Standing
from mesh.net.trust import Trust, load_trust

A, B, C, D = (PeerKey(bytes([i]) * 32) for i in range(4))
DAY = "2026-11-27"

#: A node's keys one after the other: each with the statement of the one before.
FIRST = Identity.of_seed(b"1" * 32)
SECOND = Identity.of_seed(b"2" * 32, b"1" * 32)
THIRD = Identity.of_seed(b"3" * 32, b"2" * 32)
#: What a thief of the first key makes: another successor of it.
THIEF = Identity.of_seed(b"t" * 32, b"1" * 32)

Make = Callable[..., Trust]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "known_peers"


@pytest.fixture
def make(path: Path) -> Make:
    def make(
        *lines: str,
        allowed: tuple[PeerKey, ...] = (),
        tofu: bool = True,
        node_id: str | None = None,
        key: PeerKey | None = None,
    ) -> Trust:
        if lines:
            path.write_text("".join(f"{line}\n" for line in lines))
        return Trust(path, allowed=allowed, tofu=tofu, node_id=node_id, key=key, today=lambda: DAY)

    return make


def line(node_id: str, key: PeerKey, *more: str) -> str:
    return " ".join([node_id, key_text(key), *more])


def entries(path: Path) -> tuple[Entry, ...]:
    return known_peers.read(path)[0].entries


def refusal(trust: Trust, key: PeerKey, node_id: str, rotation: bytes | None = None) -> str:
    with pytest.raises(UntrustedPeerError) as caught:
        trust.admit(key, node_id, rotation)
    return caught.value.message


def command_in(message: str) -> str:
    found = re.search(r"llama-mesh keys trust \S+ \S+", message)
    assert found is not None, message
    return found[0]


# --- trust on first use


def test_an_unknown_node_is_remembered(make: Make, path: Path) -> None:
    trust = make()
    trust.admit(A, "gpu1")
    assert entries(path) == (Entry("gpu1", A, since=DAY),)
    trust.admit(A, "gpu1")
    make().admit(A, "gpu1")


def test_another_key_for_a_known_node_is_refused_with_all_that_is_needed(make: Make) -> None:
    trust = make(line("gpu1", A))
    message = refusal(trust, B, "gpu1")
    assert fingerprint(A) in message
    assert fingerprint(B) in message
    assert command_in(message) == f"llama-mesh keys trust gpu1 {key_text(B)}"
    trust.admit(A, "gpu1")


def test_a_name_is_quoted_in_the_command(make: Make) -> None:
    """A peer chooses its name, and somebody may paste the command into a shell."""
    name = "x;rm~-rf$(id)"
    trust = make(line(name, A))
    assert f"keys trust '{name}' " in refusal(trust, B, name)


def test_a_renamed_node_keeps_its_key(make: Make, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trust = make(line("old", A, "trusted", "2020-01-01"))
    trust.admit(A, "new")
    assert entries(path) == (Entry("new", A, since="2020-01-01"),)
    assert "peer has a new name" in caplog.text
    trust.admit(B, "old")


def test_a_known_node_cannot_take_anothers_name(make: Make) -> None:
    trust = make(line("gpu1", A), line("gpu2", B))
    assert fingerprint(A) in refusal(trust, B, "gpu1")
    trust.admit(B, "gpu2")


def test_without_tofu_only_known_keys_are_let_in(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), tofu=False)
    trust.admit(A, "gpu1")
    message = refusal(trust, B, "gpu2")
    assert "cluster.noise.tofu is false" in message
    assert command_in(message) == f"llama-mesh keys trust gpu2 {key_text(B)}"
    assert entries(path) == (Entry("gpu1", A),)


def test_without_tofu_and_without_anything_all_are_refused_with_the_hint(make: Make, path: Path) -> None:
    trust = make(tofu=False)
    assert command_in(refusal(trust, A, "gpu1"))
    assert not path.exists()


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 600, "ß" * 100, "\x1b[2J", "-"])
def test_names_that_would_spoil_file_or_terminal_are_refused(make: Make, path: Path, name: str) -> None:
    assert refusal(make(), A, name) == "a node without a sane name"
    assert not path.exists()


@pytest.mark.parametrize("name", [fingerprint(B), fingerprint(B).upper(), key_text(B), "ed25519-box"])
def test_a_name_that_would_be_taken_for_a_key_is_refused(make: Make, path: Path, name: str) -> None:
    """Somebody who revokes a key by its fingerprint must not hit the node that is called so."""
    assert "called like a key or a fingerprint" in refusal(make(), A, name)
    assert not path.exists()


# --- this node's own name


@pytest.mark.parametrize("allowed", [(), (A, B)])
def test_nobody_else_is_called_like_this_node(make: Make, path: Path, allowed: tuple[PeerKey, ...]) -> None:
    """Two fresh boxes are both called 'ubuntu': neither would be told from the other."""
    trust = make(allowed=allowed, node_id="ubuntu", key=A)
    message = refusal(trust, B, "ubuntu")
    assert "this node is called 'ubuntu', too: give one of them another node_id" in message
    assert fingerprint(B) in message
    assert not trust.allows(B, "ubuntu")
    assert trust.allows(A, "ubuntu")
    assert not path.exists()
    trust.admit(B, "debian")
    assert "too: give one" in refusal(trust, B, "ubuntu"), "nor by a new name"


def test_nobody_takes_this_nodes_name_by_rotating(make: Make) -> None:
    trust = make(line("gpu1", FIRST.key), node_id="ubuntu", key=A)
    assert "too: give one" in refusal(trust, SECOND.key, "ubuntu", SECOND.rotation)


def test_whoever_has_the_token_cannot_fill_the_disk(make: Make, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "MOST_PEERS", 2)
    mine = make(line("a", A), line("b", B))
    assert "has 2 keys" in refusal(mine, C, "c")
    mine.admit(A, "a")
    assert len(entries(path)) == 2


# --- revocation


@pytest.mark.parametrize("state", ["revoked", "rotated"])
@pytest.mark.parametrize("allowed", [(), (A,)])
def test_a_refused_key_stays_refused(make: Make, state: str, allowed: tuple[PeerKey, ...]) -> None:
    """By whatever name, and in allowed_keys too."""
    trust = make(line("gpu1", A, state, "2026-01-02"), allowed=allowed)
    for name in ("gpu1", "other"):
        message = refusal(trust, A, name)
        assert "since 2026-01-02" in message
        assert command_in(message) == f"llama-mesh keys trust {name} {key_text(A)}"
        assert not trust.allows(A, name)


def test_revocation_is_told_once_so_that_links_are_dropped(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), line("gpu2", B))
    assert trust.reload() == frozenset()
    known_peers.update(path, partial(known_peers.revoke, key=A, today=DAY))
    assert trust.reload() == {A}
    assert trust.reload() == frozenset()
    refusal(trust, A, "gpu1")
    trust.admit(B, "gpu2")


def test_a_key_that_was_never_seen_can_be_revoked_too(make: Make, path: Path) -> None:
    """With allowed_keys there are links of keys that the file may not have."""
    trust = make(allowed=(A, B))
    known_peers.update(path, partial(known_peers.revoke, key=A, today=DAY))
    assert trust.reload() == {A}


def test_the_name_of_a_revoked_key_is_not_free(make: Make, path: Path) -> None:
    """Whoever has the token could come back under it with a key that was just made."""
    trust = make(line("gpu1", A, "revoked"))
    message = refusal(trust, B, "gpu1")
    assert fingerprint(A) in message
    assert command_in(message) == f"llama-mesh keys trust gpu1 {key_text(B)}"
    assert not trust.allows(B, "gpu1")
    trust.admit(B, "gpu2")
    assert "which is revoked" in refusal(trust, B, "gpu1"), "nor by a new name"
    known_peers.update(path, partial(known_peers.trust, node_id="gpu1", key=B, today=DAY))
    trust.reload()
    trust.admit(B, "gpu1")


def test_the_name_of_a_revoked_key_is_not_taken_by_rotating(make: Make) -> None:
    trust = make(line("gpu1", A, "revoked"), line("gpu2", FIRST.key))
    assert "which is revoked" in refusal(trust, SECOND.key, "gpu1", SECOND.rotation)
    trust.admit(SECOND.key, "gpu2", SECOND.rotation)


def test_allowed_keys_are_enough_for_the_name_of_a_revoked_key(make: Make) -> None:
    """A machine was set up anew: the operator has decided who may be called so."""
    trust = make(line("gpu1", A, "revoked"), allowed=(B,))
    assert trust.allows(B, "gpu1")
    trust.admit(B, "gpu1")


def test_refusals_outlive_the_file(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A, "revoked"), line("gpu2", B))
    path.unlink()
    for _ in range(3):
        trust.reload()
    refusal(trust, A, "gpu9")
    refusal(make(), A, "gpu9")


async def test_a_refresh_says_what_a_reload_says(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), line("gpu2", B))
    known_peers.update(path, partial(known_peers.revoke, key=A, today=DAY))
    assert await trust.refresh() == {A}
    assert await trust.refresh() == frozenset()
    await trust.close()


async def test_a_name_that_changes_is_known_at_once_and_written_later(make: Make, path: Path) -> None:
    trust = make(line("old", A))
    trust.admit(A, "new")
    await trust.refresh()
    assert set(trust.known.by_name) == {"new"}
    assert set(known_peers.read(path)[0].by_name) == {"old"}
    await trust.close()
    assert set(known_peers.read(path)[0].by_name) == {"new"}


def test_trust_by_hand_drops_the_nodes_other_key(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A))
    known_peers.update(path, partial(known_peers.trust, node_id="gpu1", key=B, today=DAY))
    assert trust.reload() == {A}
    trust.admit(B, "gpu1")
    refusal(trust, A, "gpu1")


def test_a_key_that_is_exchanged_in_an_editor_is_dropped(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A))
    path.write_text(line("gpu1", B) + "\n")
    assert trust.reload() == {A}


def test_a_line_that_is_removed_is_only_forgotten(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), line("gpu2", B))
    path.write_text(line("gpu2", B) + "\n")
    assert trust.reload() == frozenset()
    trust.admit(C, "gpu1")


def test_a_line_that_is_removed_drops_the_key_without_tofu(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), line("gpu2", B), tofu=False)
    path.write_text(line("gpu2", B) + "\n")
    assert trust.reload() == {A}


# --- allowed_keys


def test_with_allowed_keys_only_these(make: Make, path: Path) -> None:
    trust = make(allowed=(A, B))
    trust.admit(A, "gpu1")
    message = refusal(trust, C, "gpu3")
    assert "cluster.noise.allowed_keys" in message
    assert key_text(C) in message
    assert [entry.key for entry in entries(path)] == [A]


def test_allowed_keys_do_not_need_tofu(make: Make) -> None:
    make(allowed=(A,), tofu=False).admit(A, "gpu1")


def test_what_was_known_before_does_not_help_against_allowed_keys(make: Make) -> None:
    trust = make(line("gpu1", A), allowed=(B,))
    refusal(trust, A, "gpu1")
    assert not trust.allows(A, "gpu1")


def test_an_allowed_key_takes_its_name_from_one_that_is_not(make: Make, path: Path) -> None:
    """A machine was set up anew: the operator has changed allowed_keys, and that is enough."""
    trust = make(line("gpu1", A), allowed=(B,))
    assert trust.allows(B, "gpu1")
    trust.admit(B, "gpu1")
    assert entries(path) == (Entry("gpu1", B, since=DAY),)


def test_two_allowed_keys_do_not_share_a_name(make: Make) -> None:
    trust = make(allowed=(A, B))
    trust.admit(A, "gpu1")
    assert "two nodes have this node_id" in refusal(trust, B, "gpu1")
    assert not trust.allows(B, "gpu1")
    trust.admit(B, "gpu2")


# --- rotation


def test_a_new_key_that_the_known_one_signed_is_accepted(
    make: Make, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A rotated while B was offline; B accepts it later, drops the old key's links and refuses it from now on."""
    caplog.set_level("INFO")
    trust = make(line("gpu1", FIRST.key, "# mine"))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    assert "peer replaced its key" in caplog.text
    assert trust.reload() == {FIRST.key}
    assert entries(path) == (
        Entry("gpu1", FIRST.key, Standing.ROTATED, DAY, SECOND.key, "# mine"),
        Entry("gpu1", SECOND.key, since=DAY),
    )
    message = refusal(trust, FIRST.key, "gpu1")
    assert f"was replaced by {fingerprint(SECOND.key)}" in message
    refusal(trust, FIRST.key, "another-name")


def test_the_statement_comes_with_every_hello_and_changes_nothing_more(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    before = path.stat()
    later = Trust(path, today=lambda: "2027-01-01")
    later.admit(SECOND.key, "gpu1", SECOND.rotation)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert later.reload() == frozenset()


def test_rotating_again_and_again(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    trust.admit(THIRD.key, "gpu1", THIRD.rotation)
    assert [entry.standing for entry in entries(path)] == [Standing.ROTATED, Standing.ROTATED, Standing.TRUSTED]
    refusal(trust, SECOND.key, "gpu1", SECOND.rotation)


def test_who_missed_a_rotation_needs_a_hand(make: Make) -> None:
    trust = make(line("gpu1", FIRST.key))
    assert command_in(refusal(trust, THIRD.key, "gpu1", THIRD.rotation))


def test_somebody_elses_statement_is_of_no_use(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key))
    refusal(trust, B, "gpu1", SECOND.rotation)
    assert entries(path) == (Entry("gpu1", FIRST.key),)


def test_a_statement_of_another_nodes_key_takes_no_name(make: Make) -> None:
    trust = make(line("gpu1", A), line("gpu2", FIRST.key))
    refusal(trust, SECOND.key, "gpu1", SECOND.rotation)
    trust.admit(SECOND.key, "gpu2", SECOND.rotation)


def test_a_stolen_key_that_was_replaced_cannot_name_another_successor(make: Make) -> None:
    """Also not under a name of which nothing is known, where trust on first use would take it."""
    trust = make(line("gpu1", FIRST.key))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    refusal(trust, THIEF.key, "gpu1", THIEF.rotation)
    assert "takes the place of" in refusal(trust, THIEF.key, "new-name", THIEF.rotation)


def test_a_revoked_node_does_not_come_back_by_rotating(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key, "revoked"))
    message = refusal(trust, SECOND.key, "gpu1", SECOND.rotation)
    assert command_in(message) == f"llama-mesh keys trust gpu1 {key_text(SECOND.key)}"
    known_peers.update(path, partial(known_peers.trust, node_id="gpu1", key=SECOND.key, today=DAY))
    trust.reload()
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)


def test_a_revoked_successor_does_not_come_back(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key), allowed=(FIRST.key,))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    known_peers.update(path, partial(known_peers.revoke, key=SECOND.key, today=DAY))
    assert SECOND.key in trust.reload()
    refusal(trust, SECOND.key, "gpu1", SECOND.rotation)
    refusal(trust, FIRST.key, "gpu1")


def test_rotation_and_a_new_name_at_once(make: Make, path: Path) -> None:
    trust = make(line("gpu1", FIRST.key))
    trust.admit(SECOND.key, "gpu9", SECOND.rotation)
    assert [(entry.node_id, entry.standing) for entry in entries(path)] == [
        ("gpu1", Standing.ROTATED),
        ("gpu9", Standing.TRUSTED),
    ]


@pytest.mark.parametrize("tofu", [True, False])
def test_allowed_keys_stand_for_their_successors(make: Make, path: Path, tofu: bool) -> None:
    """Without touching the configuration, also after a restart, and over several rotations."""
    trust = make(allowed=(FIRST.key,), tofu=tofu)
    refusal(trust, SECOND.key, "gpu1")
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    assert not trust.allows(FIRST.key, "gpu1")
    again = make(allowed=(FIRST.key,), tofu=tofu)
    again.admit(SECOND.key, "gpu1")
    assert again.allows(SECOND.key, "gpu1")
    again.admit(THIRD.key, "gpu1", THIRD.rotation)
    assert make(allowed=(FIRST.key,)).allows(THIRD.key, "gpu1")
    refusal(again, FIRST.key, "gpu1")


@pytest.mark.parametrize("allowed", [(), (FIRST.key,)])
def test_a_replaced_key_that_is_revoked_does_not_drag_its_successor_along(
    make: Make, path: Path, allowed: tuple[PeerKey, ...]
) -> None:
    """The old key was found on a disk that was sold."""
    trust = make(line("gpu1", FIRST.key), allowed=allowed)
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    trust.reload()
    known_peers.update(path, partial(known_peers.revoke, key=FIRST.key, today=DAY))
    assert trust.reload() == frozenset()
    for each in (trust, make(allowed=allowed)):
        assert each.allows(SECOND.key, "gpu1")
        each.admit(SECOND.key, "gpu1", SECOND.rotation)
        refusal(each, FIRST.key, "gpu1")
        refusal(each, THIEF.key, "gpu1", THIEF.rotation)


def test_a_successor_in_allowed_mode_takes_its_name_from_who_is_not_allowed(make: Make) -> None:
    trust = make(line("gpu1", A), allowed=(FIRST.key,))
    trust.admit(SECOND.key, "gpu1", SECOND.rotation)
    assert trust.known.by_name["gpu1"].key == SECOND.key


def test_a_rotation_from_a_key_that_is_not_allowed_is_none(make: Make) -> None:
    trust = make(line("gpu1", FIRST.key), allowed=(A,))
    refusal(trust, SECOND.key, "gpu1", SECOND.rotation)


@pytest.mark.parametrize("junk", [b"", b"x", b"\0" * 96, b"\xff" * 96, b"y" * 10_000])
def test_a_broken_statement_counts_as_none(make: Make, junk: bytes) -> None:
    trust = make(line("gpu1", A))
    trust.admit(A, "gpu1", junk)
    refusal(trust, B, "gpu1", junk)


# --- whatever happens

_NODES = (FIRST, SECOND, THIRD, THIEF, Identity.of_seed(b"x" * 32))
_by_network = st.tuples(st.just("admit"), st.sampled_from(_NODES), st.sampled_from(["n", "m"]), st.booleans())
_by_hand = st.tuples(
    st.sampled_from(["trust", "revoke"]), st.sampled_from(_NODES), st.sampled_from(["n", "m"]), st.just(True)
)


@given(
    st.lists(_by_network | _by_hand, max_size=10),
    st.sampled_from([(), (FIRST.key,), (FIRST.key, THIEF.key)]),
    st.booleans(),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_what_holds_whatever_nodes_and_people_do(
    path: Path, make: Make, steps: list[tuple[str, Identity, str, bool]], allowed: tuple[PeerKey, ...], tofu: bool
) -> None:
    path.unlink(missing_ok=True)
    trust = make(allowed=allowed, tofu=tofu)
    told: set[PeerKey] = set()
    let_in: set[PeerKey] = set()
    for action, node, name, with_statement in steps:
        before = trust.known
        if action == "admit":
            if _admits(trust, node, name, with_statement):
                let_in.add(node.key)
                assert trust.allows(node.key, name)
                assert not before.refused(node.key)
                _check_holder(before, node, name, with_statement, allowed)
            else:
                assert trust.known is before
        elif action == "trust":
            known_peers.update(path, partial(known_peers.trust, node_id=name, key=node.key, today=DAY))
        else:
            known_peers.update(path, partial(known_peers.revoke, key=node.key, today=DAY))
        dropped = trust.reload()
        told = (told | dropped) - {key for key in trust.known.by_key if not trust.known.refused(key)}
        refused_now = {key for key in let_in if trust.known.refused(key)}
        assert refused_now <= told, "links of a key that is refused were not dropped"
        assert trust.known.entries == entries(path) == make(allowed=allowed, tofu=tofu).known.entries


def _admits(trust: Trust, node: Identity, name: str, with_statement: bool) -> bool:
    try:
        trust.admit(node.key, name, node.rotation if with_statement else None)
    except UntrustedPeerError:
        return False
    return True


def _check_holder(
    before: KnownPeers, node: Identity, name: str, with_statement: bool, allowed: tuple[PeerKey, ...]
) -> None:
    """A name changes its key by a statement of that key, or because allowed_keys say so, and in no other way."""
    holder = before.by_name.get(name)
    if holder is None or holder.key == node.key or allowed:
        return
    assert with_statement
    assert node.rotation is not None
    assert rotated_from(node.rotation, node.key) == holder.key


# --- what others say


def test_what_others_say_is_judged_and_not_learnt(make: Make, path: Path) -> None:
    trust = make(line("gpu1", A), line("gpu2", B, "revoked"))
    assert trust.allows(A, "gpu1")
    assert trust.allows(A, "a new name")
    assert trust.allows(C, "gpu3")
    assert not trust.allows(C, "gpu1")
    assert not trust.allows(B, "gpu2")
    assert C not in trust.known.by_key
    path.unlink()
    assert trust.allows(A, "gpu1"), "no look at the disk"


def test_what_others_say_without_tofu(make: Make) -> None:
    trust = make(line("gpu1", A), tofu=False)
    assert trust.allows(A, "gpu1")
    assert not trust.allows(C, "gpu3")


def test_what_others_say_with_allowed_keys(make: Make) -> None:
    trust = make(allowed=(A,))
    assert trust.allows(A, "gpu1")
    assert not trust.allows(B, "gpu2")


# --- settings


def test_the_settings_are_used(tmp_path: Path) -> None:
    noise = Noise(config_dir=str(tmp_path), allowed_keys=(f"{key_text(A)}",), tofu=False)
    trust = load_trust(noise, node_id="own", key=B)
    assert "this node is called 'own', too" in refusal(trust, A, "own")
    trust.admit(A, "gpu1")
    assert entries(tmp_path / "known_peers")
    refusal(trust, B, "gpu2")


def test_keys_that_are_none_are_all_named() -> None:
    noise = Noise(allowed_keys=("nope", key_text(A), "ed25519:short"))
    with pytest.raises(ConfigErrors) as caught:
        trust.allowed_keys(noise)
    assert [d.path for d in caught.value.diagnostics] == [
        "cluster.noise.allowed_keys[0]",
        "cluster.noise.allowed_keys[2]",
    ]


def test_a_file_that_is_broken_at_the_start_stops_the_start(make: Make, path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"known_peers:1: "):
        make("oops")
    assert path.read_text() == "oops\n"
