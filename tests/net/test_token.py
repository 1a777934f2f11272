"""The cluster token: where it comes from, what is refused, and that it does not show."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mesh.config.settings import Noise
from mesh.errors import ConfigError
from mesh.net.token import Token, find_token, load_token, new_token, parse_token, psk_of, weakness

GOOD = b"correct horse battery staple"


@pytest.fixture
def noise(tmp_path: Path) -> Noise:
    return Noise(config_dir=str(tmp_path))


def write(directory: Path, content: bytes, mode: int = 0o600) -> None:
    path = directory / "cluster.token"
    path.write_bytes(content)
    path.chmod(mode)


@pytest.mark.parametrize("content", [GOOD, GOOD + b"\n", GOOD + b"\r\n", b"  " + GOOD + b"\n\n"])
def test_from_the_file_without_its_newline(noise: Noise, tmp_path: Path, content: bytes) -> None:
    write(tmp_path, content)
    found = find_token(noise, {})
    assert found is not None
    assert (bytes(found.token), found.source) == (GOOD, str(tmp_path / "cluster.token"))


def test_the_variable_wins(noise: Noise, tmp_path: Path) -> None:
    write(tmp_path, b"the token of the file")
    found = find_token(noise, {"CLUSTER_TOKEN": GOOD.decode() + "\n"})
    assert found is not None
    assert (bytes(found.token), found.source) == (GOOD, "CLUSTER_TOKEN")


def test_a_variable_that_is_set_to_nothing_counts_as_not_set(noise: Noise, tmp_path: Path) -> None:
    assert load_token(noise, {"CLUSTER_TOKEN": " "}) is None
    write(tmp_path, GOOD)
    assert load_token(noise, {"CLUSTER_TOKEN": ""}) == GOOD


def test_a_file_that_others_may_read_is_refused(noise: Noise, tmp_path: Path) -> None:
    """Trap 103."""
    write(tmp_path, GOOD, 0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {tmp_path}/cluster.token"):
        load_token(noise, {})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no token in it"),
        (b"\n", "no token in it"),
        (b"fifteen letters", "has 15 characters, it needs at least 16"),
        (b"two lines of it\nare one too many", "must be one line"),
        (b"with a zero byte\0 in it", "must be one line"),
        (b"x" * 5000, "longer than 4096"),
    ],
)
def test_what_is_refused_and_never_repeated(noise: Noise, tmp_path: Path, content: bytes, said: str) -> None:
    """Trap 101."""
    write(tmp_path, content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_token(noise, {})
    assert caught.value.message.startswith(str(tmp_path / "cluster.token"))
    if content.strip():
        assert content.decode().strip()[:10] not in caught.value.message


def test_sixteen_characters_will_do() -> None:
    assert parse_token(b"sixteen letters!", "x") == b"sixteen letters!"


@given(st.binary(max_size=100))
@example(b"\xff" * 20)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_any_content_is_a_token_or_a_config_error(noise: Noise, tmp_path: Path, content: bytes) -> None:
    write(tmp_path, content)
    try:
        token = load_token(noise, {})
    except ConfigError:
        return
    assert token is not None
    assert len(token) >= 16
    assert content.strip() == token


def test_it_does_not_show() -> None:
    """Trap 101."""
    token = Token(GOOD)
    for text in (repr(token), str(token), f"{token}", f"{token!r:>30}", repr([token]), repr({"t": token})):
        assert "horse" not in text
    assert bytes(token) == GOOD


def test_the_key_of_it_is_scrypt_with_our_salt() -> None:
    """Nodes of all versions must agree on it, and a guess of the token must cost whoever listens 32 MiB."""
    salt = b"llama-mesh cluster token to noise psk v2"
    expected = hashlib.scrypt(GOOD, salt=salt, n=2**15, r=8, p=1, maxmem=2**26, dklen=32)
    assert psk_of(Token(GOOD)) == psk_of(GOOD) == expected
    assert psk_of(GOOD + b"x") != expected


@pytest.mark.parametrize(
    ("token", "said"),
    [
        (b"homelab-cluster-1", "only 17 characters"),
        (b"x" * 21, "only 21 characters"),
        (b"password" * 4, "only 7 different characters"),
        (b"0123456789abcdef012345", None),
        (GOOD, None),
    ],
)
def test_what_does_not_look_random(token: bytes, said: str | None) -> None:
    weak = weakness(token)
    assert (weak is None) == (said is None)
    if weak is not None and said is not None:
        assert said in weak
        assert "'llama-mesh token new' makes a good one" in weak
        assert token.decode() not in weak


def test_one_that_can_be_guessed_is_used_and_told_once(
    noise: Noise, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trap 101."""
    write(tmp_path, b"homelab-cluster-1")
    assert load_token(noise, {}) == load_token(noise, {}) == b"homelab-cluster-1"
    assert caplog.text.count("does not look random") == 1
    assert "homelab" not in caplog.text


def test_one_that_nobody_guesses_is_told_nothing_of(
    noise: Noise, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, bytes(new_token()))
    load_token(noise, {})
    assert caplog.text == ""


def test_new_ones_are_long_and_different_and_safe_in_a_shell() -> None:
    tokens = {bytes(new_token()) for _ in range(50)}
    assert len(tokens) == 50
    for token in tokens:
        assert parse_token(token, "x") == token
        assert weakness(token) is None
        assert len(token) == 48
        assert token.isalnum()
