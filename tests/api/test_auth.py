"""Keys: either header, admin apart, constant time by construction, digests only (traps 99, 101, 103)."""

from __future__ import annotations

from mesh.api.auth import Authenticator, bearer_token
from mesh.config.settings import Auth


def _authenticator(**fields: object) -> Authenticator:
    return Authenticator(Auth.model_validate({"enabled": True, **fields}))


def test_either_credential_is_enough() -> None:
    auth = _authenticator(allowed_keys=["one", "two"])
    assert auth.allows(b"one", None)
    assert auth.allows(None, b"two")
    assert auth.allows(b"wrong", b"two")
    assert not auth.allows(b"wrong", b"on")
    assert not auth.allows(None, None)
    assert not auth.allows(b"", b"")


def test_admin_keys_are_apart_and_may_do_all_else() -> None:
    auth = _authenticator(allowed_keys=["user"], admin_keys=["boss"])
    assert auth.allows(b"user", None)
    assert not auth.allows(b"user", None, admin=True)
    assert auth.allows(b"boss", None)
    assert auth.allows(b"boss", None, admin=True)


def test_without_admin_keys_every_key_is_one() -> None:
    assert _authenticator(allowed_keys=["user"]).allows(b"user", None, admin=True)


def test_auth_off_allows_everybody() -> None:
    assert Authenticator(Auth()).allows(None, None, admin=True)


def test_llamesh_keys_with_the_scheme_inside() -> None:
    """llamesh compares the whole value of Authorization; such a key goes on working."""
    auth = Authenticator(
        Auth.model_construct(enabled=True, required_header="Authorization", allowed_keys=("Bearer x",))
    )
    assert auth.header == b"authorization"
    assert auth.allows(b"x", b"Bearer x")


def test_no_key_is_kept_in_the_clear() -> None:
    auth = _authenticator(allowed_keys=["very-secret"])
    assert "very-secret" not in repr([getattr(auth, name) for name in auth.__slots__])


def test_bearer_token() -> None:
    assert bearer_token(b"Bearer  abc") == b"abc"
    assert bearer_token(b"bearer abc") == b"abc"
    assert bearer_token(b"Basic abc") is None
