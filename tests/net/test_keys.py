"""Identity: text forms, the file and the variable, derivation, rotation statements, and that secrets do not show."""

from __future__ import annotations

import base64
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mesh.config.settings import Noise
from mesh.core.node_state import PeerKey
from mesh.errors import ConfigError
from mesh.net.cluster_files import cluster_files
from mesh.net.keys import (
    Identity,
    fingerprint,
    key_text,
    load_identity,
    looks_like_key,
    parse_key,
    rotate_key,
    rotated_from,
    verify,
)

SEED = bytes(range(32))


def noise_in(directory: Path, **settings: object) -> Noise:
    return Noise(config_dir=str(directory), **settings)


# --- text


@given(st.binary(min_size=32, max_size=32), st.sampled_from(["", " ", "\n", "\t "]))
def test_a_key_survives_its_text(raw: bytes, space: str) -> None:
    key = PeerKey(raw)
    text = key_text(key)
    assert parse_key(f"{space}{text}{space}") == key
    assert parse_key(text.removesuffix("=")) == key
    assert text.isascii()
    assert " " not in text


@given(st.text() | st.text(alphabet="ed25519:+/=AQg").map("ed25519:".__add__))
@example("ed25519:" + "A" * 44)
@example("ed25519:" + "A" * 42 + "\n=")
@example("ed25519:" + "Ａ" * 43)
def test_any_text_is_a_key_or_refused(text: str) -> None:
    """Whatever is accepted is 32 bytes; whatever is refused is a ValueError that does not repeat it."""
    try:
        length = len(parse_key(text))
    except ValueError as refusal:
        length, message = 32, str(refusal)
        repeated = len(text) >= 20 and text in message
    else:
        repeated = False
    assert (length, repeated) == (32, False)


def test_a_private_key_in_the_wrong_place_is_told_and_not_repeated() -> None:
    """Trap 101."""
    secret = "ed25519-seed:" + base64.b64encode(SEED).decode()
    with pytest.raises(ValueError, match="is a PRIVATE key") as caught:
        parse_key(secret)
    assert secret[20:] not in str(caught.value)


def test_a_fingerprint_is_short_and_stable() -> None:
    key = Identity.of_seed(SEED).key
    assert fingerprint(key) == "kzdvv-j2umn-duyau-f35o3"
    assert len({fingerprint(PeerKey(bytes([i]) * 32)) for i in range(256)}) == 256


# --- derivation and signatures


def test_what_follows_from_a_seed_never_changes() -> None:
    """Other nodes know these; RFC 8032 gives the public key, HKDF with our labels the Noise key."""
    identity = Identity.of_seed(SEED)
    assert identity.key.hex() == "03a107bff3ce10be1d70dd18e74bc09967e4d6309ba50d5f1ddc8664125531b8"
    assert identity.noise_private.hex() == "7ea0e27172567135b08509fb8d891c178a9f5eeea304b0c270d27fd7134cdac1"
    assert identity.noise_private != SEED


def test_signatures() -> None:
    identity, other = Identity.of_seed(SEED), Identity.of_seed(b"x" * 32)
    signature = identity.sign(b"message")
    assert verify(identity.key, signature, b"message")
    assert not verify(identity.key, signature, b"massage")
    assert not verify(other.key, signature, b"message")
    assert not verify(identity.key, signature[:-1], b"message")
    assert not verify(PeerKey(b"short"), signature, b"message")


@given(st.binary(max_size=64), st.binary(max_size=80))
def test_what_is_no_key_and_no_signature_verifies_nothing(key: bytes, signature: bytes) -> None:
    assert not verify(PeerKey(key), signature, b"message")


def test_secrets_do_not_show() -> None:
    """Trap 101."""
    identity = Identity.of_seed(SEED)
    for text in (repr(identity), str(identity), f"{identity}"):
        assert text == f"Identity({fingerprint(identity.key)})"
    with pytest.raises(AttributeError):
        identity.key = PeerKey(b"")  # type: ignore[misc]


# --- rotation statements


def test_a_statement_names_the_key_that_it_replaces() -> None:
    old, new = Identity.of_seed(SEED), Identity.of_seed(b"x" * 32, SEED)
    assert new.rotation is not None
    assert rotated_from(new.rotation, new.key) == old.key


def test_a_statement_is_of_no_use_to_others() -> None:
    """Replayed by somebody else, changed in any byte, cut, or signed by the wrong key: it proves nothing."""
    new, thief = Identity.of_seed(b"x" * 32, SEED), Identity.of_seed(b"y" * 32)
    statement = new.rotation
    assert statement is not None
    assert rotated_from(statement, thief.key) is None
    for i in range(len(statement)):
        broken = statement[:i] + bytes([statement[i] ^ 1]) + statement[i + 1 :]
        assert rotated_from(broken, new.key) is None
    assert rotated_from(statement[:-1], new.key) is None
    assert rotated_from(statement + b"\0", new.key) is None
    forged = Identity.of_seed(SEED).key + thief.sign(b"llama-mesh key rotation v1\0" + statement[:32] + new.key)
    assert rotated_from(forged, new.key) is None


def test_a_plain_signature_over_two_keys_is_no_statement() -> None:
    """The domain keeps what was signed for one purpose from serving another."""
    old, new = Identity.of_seed(SEED), Identity.of_seed(b"x" * 32)
    assert rotated_from(old.key + old.sign(old.key + new.key), new.key) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_statement_or_none(statement: bytes) -> None:
    assert rotated_from(statement, Identity.of_seed(SEED).key) is None


def test_a_key_does_not_replace_itself() -> None:
    """What a crash in the middle of a rotation leaves."""
    assert Identity.of_seed(SEED, SEED).rotation is None


# --- the file


def test_the_first_start_makes_the_key_and_the_next_one_finds_it(tmp_path: Path) -> None:
    noise = noise_in(tmp_path / "state")
    before = os.umask(0)
    try:
        identity = load_identity(noise, {})
    finally:
        os.umask(before)
    path = tmp_path / "state/node.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    again = load_identity(noise, {})
    assert (again.key, again.noise_private) == (identity.key, identity.noise_private)
    assert identity.rotation is None
    comment, line = path.read_text().splitlines()
    assert comment.startswith("#")
    assert line.startswith("ed25519-seed:")
    assert len(base64.b64decode(line.partition(":")[2])) == 32


_START = """
import sys
from mesh.config.settings import Noise
from mesh.net.keys import key_text, load_identity
print("ready", flush=True)
sys.stdin.readline()
print(key_text(load_identity(Noise(config_dir=sys.argv[1]), {}).key))
"""


def test_processes_that_start_at_once_get_one_key(tmp_path: Path) -> None:
    """Trap 103: they all wait for the same signal, in a directory that is not there yet."""
    command = [sys.executable, "-c", _START, str(tmp_path / "state")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    keys = [process.communicate()[0].strip() for process in processes]
    assert keys[0].startswith("ed25519:")
    assert len(set(keys)) == 1
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["node.key"]


def test_who_loses_the_race_uses_the_winners_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes the key between our look and our attempt."""
    noise = noise_in(tmp_path)
    real = os.link

    def late(source: object, target: object, **options: bool) -> None:
        monkeypatch.setattr(os, "link", real)
        winner.append(load_identity(noise, {}))
        real(source, target, **options)  # type: ignore[arg-type]

    winner: list[Identity] = []
    monkeypatch.setattr(os, "link", late)
    assert load_identity(noise, {}).key == winner[0].key


@given(st.binary(max_size=200))
@example(b"")
@example(b"# only a comment\n")
@example(b"ed25519-seed:\n")
@example(b"\xff\xfe")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_content_is_a_key_or_a_config_error_and_stays(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"node\.key: "):
        load_identity(noise_in(tmp_path), {})
    assert path.read_bytes() == content


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    """Trap 103."""
    noise = noise_in(tmp_path)
    load_identity(noise, {})
    (tmp_path / "node.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        load_identity(noise, {})


def test_a_directory_that_cannot_be_made_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"node\.key"):
        load_identity(noise_in(tmp_path / "file/state"), {})


@pytest.mark.parametrize("spelling", ["ed25519-seed:{base64}", "{base64}", "{hex}", " {base64}\n", "# c\n{base64}\n"])
def test_the_variable_wins_and_no_file_is_made(tmp_path: Path, spelling: str) -> None:
    text = spelling.format(base64=base64.b64encode(SEED).decode(), hex=SEED.hex())
    identity = load_identity(noise_in(tmp_path), {"NODE_PRIVATE_KEY": text})
    assert identity.key == Identity.of_seed(SEED).key
    assert list(tmp_path.iterdir()) == []


def test_a_variable_that_is_no_key_is_refused_without_showing_it() -> None:
    """Trap 101."""
    with pytest.raises(ConfigError, match="NODE_PRIVATE_KEY: is not a private key") as caught:
        load_identity(Noise(), {"NODE_PRIVATE_KEY": "hunter2"})
    assert "hunter2" not in caught.value.message


def test_an_empty_variable_counts_as_none(tmp_path: Path) -> None:
    load_identity(noise_in(tmp_path), {"NODE_PRIVATE_KEY": " "})
    assert (tmp_path / "node.key").exists()


def test_paths_of_the_settings(tmp_path: Path) -> None:
    key = tmp_path / "elsewhere/my.key"
    load_identity(noise_in(tmp_path / "state", private_key_path=str(key)), {})
    assert key.exists()
    assert not (tmp_path / "state").exists()
    files = cluster_files(noise_in(tmp_path, private_key_path=str(key), known_peers_path="~/peers"))
    assert files.previous_key == key.with_name("my.key.previous")
    assert files.known_peers == Path.home() / "peers"


# --- rotation


def test_rotation_needs_no_change_of_the_configuration(tmp_path: Path) -> None:
    noise = noise_in(tmp_path)
    first = load_identity(noise, {})
    assert rotate_key(cluster_files(noise)) == (first.key, load_identity(noise, {}).key)
    second = load_identity(noise, {})
    assert second.key != first.key
    assert second.rotation is not None
    assert rotated_from(second.rotation, second.key) == first.key
    for name in ("node.key", "node.key.previous"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    (tmp_path / "node.key.previous").unlink()
    rotate_key(cluster_files(noise))
    third = load_identity(noise, {})
    assert third.rotation is not None
    assert rotated_from(third.rotation, third.key) == second.key


@pytest.mark.parametrize("failing", ["node.key", "node.key.previous"])
def test_a_crash_between_the_steps_of_a_rotation_loses_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    noise = noise_in(tmp_path)
    first = load_identity(noise, {})
    real = os.replace

    def crash(source: object, target: object) -> None:
        if str(target).endswith(f"/{failing}"):
            raise OSError(5, "Input/output error")
        real(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(ConfigError, match="Input/output error"):
        rotate_key(cluster_files(noise))
    after = load_identity(noise, {})
    assert (after.key, after.rotation) == (first.key, None)


def test_a_previous_key_at_a_path_of_its_own(tmp_path: Path) -> None:
    old = load_identity(noise_in(tmp_path / "old"), {})
    noise = noise_in(tmp_path / "new", previous_key_path=str(tmp_path / "old/node.key"))
    new = load_identity(noise, {})
    assert new.rotation is not None
    assert rotated_from(new.rotation, new.key) == old.key


def test_a_previous_key_that_is_not_there_is_no_failure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    noise = noise_in(tmp_path, previous_key_path=str(tmp_path / "none"))
    assert load_identity(noise, {}).rotation is None
    assert "previous_key_path is not there" in caplog.text


def test_a_directory_that_others_may_write_to_is_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = tmp_path / "open"
    directory.mkdir()
    directory.chmod(0o777)
    load_identity(noise_in(directory), {})
    load_identity(noise_in(directory), {})
    assert caplog.text.count("other users may replace this node's key") == 1


def test_who_heard_of_neither_of_two_rotations_would_refuse_this_node(tmp_path: Path) -> None:
    noise = noise_in(tmp_path)
    load_identity(noise, {})
    rotate_key(cluster_files(noise))
    second = load_identity(noise, {})
    with pytest.raises(ConfigError, match=rf"'rm {tmp_path}/node.key.previous' and rotate again; --force rotates now"):
        rotate_key(cluster_files(noise))
    assert load_identity(noise, {}).key == second.key
    assert rotate_key(cluster_files(noise), force=True)[0] == second.key


def test_a_rotation_that_a_crash_cut_short_does_not_count(tmp_path: Path) -> None:
    noise = noise_in(tmp_path)
    first = load_identity(noise, {})
    (tmp_path / "node.key.previous").write_bytes((tmp_path / "node.key").read_bytes())
    (tmp_path / "node.key.previous").chmod(0o600)
    assert rotate_key(cluster_files(noise))[0] == first.key


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        (key_text(PeerKey(bytes(32))), True),
        ("ED25519-box", True),
        (fingerprint(PeerKey(bytes(32))), True),
        (fingerprint(PeerKey(bytes(32))).upper(), True),
        ("gpu-1", False),
        ("abcde-abcde-abcde", False),
    ],
)
def test_what_looks_like_a_key(text: str, is_one: bool) -> None:
    assert looks_like_key(text) is is_one
