"""`keys show`, `trust`, `revoke` and `rotate`: they edit files, and a running node's trust follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mesh.cli.main import run
from mesh.config.settings import Noise
from mesh.core.node_state import PeerKey
from mesh.errors import UntrustedPeerError
from mesh.net import known_peers
from mesh.net.keys import Identity, fingerprint, key_text, load_identity
from mesh.net.trust import load_trust

A, B = (PeerKey(bytes([i]) * 32) for i in range(2))


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NODE_PRIVATE_KEY", raising=False)
    return tmp_path / ".llama-mesh"


def standings(home: Path) -> dict[str, str]:
    entries = known_peers.read(home / "known_peers")[0].entries
    return {f"{entry.node_id} {entry.key.hex()[:2]}": str(entry.standing) for entry in entries}


def test_show_makes_this_nodes_key(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "show"]) == 0
    out = capsys.readouterr().out
    identity = load_identity(Noise(), {})
    assert key_text(identity.key) in out
    assert fingerprint(identity.key) in out
    assert "No other node's key is known yet" in out


def test_show_lists_the_others(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(mode=0o700)
    (home / "known_peers").write_text(f"gpu1 {key_text(A)} revoked 2026-01-02\ngpu2%20x {key_text(B)}\n")
    assert run(["keys", "show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].split() == ["gpu2%20x", "trusted", fingerprint(B), "-", key_text(B)]
    assert lines[-1].split() == ["gpu1", "revoked", fingerprint(A), "2026-01-02", key_text(A)]
    assert run(["keys", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["peers"] == [
        {"node_id": "gpu1", "key": key_text(A), "fingerprint": fingerprint(A), "state": "revoked",
         "since": "2026-01-02", "replaced_by": None},
        {"node_id": "gpu2 x", "key": key_text(B), "fingerprint": fingerprint(B), "state": "trusted", "since": None,
         "replaced_by": None},
    ]  # fmt: skip
    assert shown["replaces"] is None
    assert shown["tofu"] is True
    assert (shown["allowed_keys"], shown["source"]) == ([], str(home / "node.key"))


def test_show_never_shows_the_secret(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trap 101."""
    run(["keys", "show"])
    run(["keys", "rotate"])
    run(["keys", "show", "--json"])
    said = capsys.readouterr()
    for name in ("node.key", "node.key.previous"):
        secret = (home / name).read_text().splitlines()[-1].partition(":")[2]
        assert secret not in said.out + said.err


def test_a_broken_file_is_named_with_its_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(mode=0o700)
    (home / "known_peers").write_text("gpu1 oops\n")
    for command in (["show"], ["trust", "gpu1", key_text(A)], ["revoke", key_text(A)]):
        assert run(["keys", *command]) == 1
        assert "known_peers:1: " in capsys.readouterr().err.replace("\n", "")
    assert (home / "known_peers").read_text() == "gpu1 oops\n"


def test_the_command_that_a_refusal_names_does_what_it_says(home: Path) -> None:
    """From the refusal of a running node to its acceptance, word for word, with an awkward name."""
    import shlex

    trust = load_trust(Noise())
    trust.admit(A, "gpu 1;%")
    with pytest.raises(UntrustedPeerError) as caught:
        trust.admit(B, "gpu 1;%")
    words = shlex.split(caught.value.message.partition("llama-mesh ")[2])
    assert run(words) == 0
    assert trust.reload() == {A}
    trust.admit(B, "gpu 1;%")


def test_trust_and_revoke(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "trust", "gpu1", key_text(A)]) == 0
    assert run(["keys", "trust", "gpu1", key_text(B)]) == 0
    assert standings(home) == {"gpu1 00": "revoked", "gpu1 01": "trusted"}
    assert run(["keys", "revoke", "gpu1"]) == 0
    assert standings(home) == {"gpu1 00": "revoked", "gpu1 01": "revoked"}
    said = capsys.readouterr()
    assert "is revoked here; a running node drops its links" in said.out
    assert "this holds for this node only: run it on every other one, too" in said.err
    assert run(["keys", "trust", "gpu1", key_text(A), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["node_id"], result["state"], result["remark"]) == ("gpu1", "trusted", None)


@pytest.mark.parametrize("target", [key_text(A), fingerprint(A), "gpu1"])
def test_what_can_be_revoked(home: Path, target: str) -> None:
    run(["keys", "trust", "gpu1", key_text(A)])
    assert run(["keys", "revoke", target]) == 0
    assert standings(home) == {"gpu1 00": "revoked"}


def test_a_fingerprint_is_never_a_name(home: Path) -> None:
    """A node that is called like another's fingerprint: it came before such names were refused."""
    home.mkdir(mode=0o700)
    (home / "known_peers").write_text(f"evil {key_text(A)}\n{fingerprint(A)} {key_text(B)}\n")
    assert run(["keys", "revoke", fingerprint(A).upper()]) == 0
    assert standings(home) == {"evil 00": "revoked", f"{fingerprint(A)} 01": "trusted"}


def test_a_revoked_key_is_trusted_again_by_its_fingerprint(home: Path) -> None:
    run(["keys", "revoke", key_text(A)])
    assert run(["keys", "trust", "gpu1", fingerprint(A)]) == 0
    assert standings(home) == {"gpu1 00": "trusted"}


def test_a_node_with_several_keys_of_which_none_is_trusted(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home.mkdir(mode=0o700)
    content = f"gpu1 {key_text(A)} revoked\ngpu1 {key_text(B)} rotated\n"
    (home / "known_peers").write_text(content)
    assert run(["keys", "revoke", "gpu1"]) == 2
    error = capsys.readouterr().err
    assert f"{fingerprint(A)} (revoked)" in error
    assert f"{fingerprint(B)} (rotated)" in " ".join(error.split())
    assert (home / "known_peers").read_text() == content


def test_revoking_a_replaced_key_leaves_its_successor_and_says_so(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home.mkdir(mode=0o700)
    (home / "known_peers").write_text(f"gpu1 {key_text(A)} rotated 2026-01-02 {key_text(B)}\ngpu1 {key_text(B)}\n")
    assert run(["keys", "revoke", fingerprint(A), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["state"], result["replaced_by"]) == ("revoked", key_text(B))
    assert f"{fingerprint(B)}, is another one and stays trusted" in result["remark"]
    assert standings(home) == {"gpu1 00": "revoked", "gpu1 01": "trusted"}


def test_a_key_that_was_never_seen_can_be_revoked(home: Path) -> None:
    assert run(["keys", "revoke", key_text(A)]) == 0
    assert standings(home) == {"- 00": "revoked"}


def test_an_unknown_node_is_told_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    run(["keys", "trust", "gpu1", key_text(A)])
    assert run(["keys", "revoke", "gpu7"]) == 1
    assert "no node 'gpu7' is known here; known are: gpu1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trust", "gpu1", "nonsense"], "KEY is not a key"),
        (["trust", key_text(A), "gpu1"], "the node comes first"),
        (["trust", fingerprint(A), key_text(A)], "the node comes first"),
        (["trust", "gpu1", fingerprint(A)], "KEY is not a key"),
        (["revoke", fingerprint(A)], "KEY is not a key"),
        (["trust", "gpu1", "ed25519-seed:" + "A" * 44], "PRIVATE key"),
        (["revoke", "ed25519:short"], "KEY is not a key"),
    ],
)
def test_wrong_usage(words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", *words]) == 2
    assert said in capsys.readouterr().err
    assert not (home / "known_peers").exists()


def test_trust_does_not_help_against_allowed_keys_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(f"cluster: {{noise: {{allowed_keys: ['{key_text(B)}']}}}}\n")
    assert run(["keys", "trust", "gpu1", key_text(A)]) == 0
    assert "allowed_keys is set and has other keys only" in capsys.readouterr().err
    assert run(["keys", "trust", "gpu2", key_text(B)]) == 0
    assert capsys.readouterr().err == ""
    assert run(["keys", "show"]) == 0
    assert "the 1 of cluster.noise.allowed_keys" in capsys.readouterr().out


def test_rotate(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others accept the new key, with no configuration and no command on their side."""
    old = load_identity(Noise(), {})
    other = load_trust(Noise(config_dir=str(home.parent / "other")))
    other.admit(old.key, "gpu1", old.rotation)
    assert run(["keys", "rotate"]) == 0
    said = capsys.readouterr()
    new = load_identity(Noise(), {})
    assert new.key != old.key
    assert key_text(new.key) in said.out
    assert key_text(old.key) in said.out
    assert "Restart the node" in said.err
    other.admit(new.key, "gpu1", new.rotation)
    with pytest.raises(UntrustedPeerError, match="was replaced"):
        other.admit(old.key, "gpu1", old.rotation)
    assert run(["keys", "show"]) == 0
    assert f"replaces     {key_text(old.key)}" in capsys.readouterr().out


def test_rotating_again_needs_the_first_one_to_be_over(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(["keys", "rotate"])
    key = load_identity(Noise(), {}).key
    capsys.readouterr()
    assert run(["keys", "rotate"]) == 1
    assert "--force rotates now" in " ".join(capsys.readouterr().err.split())
    assert load_identity(Noise(), {}).key == key
    assert run(["keys", "rotate", "--force"]) == 0
    second = load_identity(Noise(), {}).key
    assert second != key
    (home / "node.key.previous").unlink()
    assert run(["keys", "rotate"]) == 0
    assert load_identity(Noise(), {}).key != second


def test_rotate_of_a_key_from_the_environment(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NODE_PRIVATE_KEY", "00" * 32)
    assert run(["keys", "rotate"]) == 1
    assert "comes from NODE_PRIVATE_KEY" in capsys.readouterr().err
    assert not home.exists()
    assert run(["keys", "show", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["source"] == "NODE_PRIVATE_KEY"
    assert shown["key"] == key_text(Identity.of_seed(bytes(32)).key)


def test_a_file_that_cannot_be_written(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "known_peers.lock").mkdir(parents=True)
    assert run(["keys", "trust", "gpu1", key_text(A)]) == 1
    assert f"cannot write {home}/known_peers: Is a directory" in capsys.readouterr().err.replace("\n", "")
