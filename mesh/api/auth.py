"""Who may call: API keys, compared in constant time. Holds digests only; never logs or forwards a key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from hmac import compare_digest
from typing import Protocol


class AuthSettings(Protocol):
    """The ``auth:`` section."""

    @property
    def enabled(self) -> bool: ...
    @property
    def required_header(self) -> str: ...
    @property
    def allowed_keys(self) -> Sequence[str]: ...
    @property
    def admin_keys(self) -> Sequence[str]: ...


class Authenticator:
    """Decides from a request's credentials. With auth off everybody is allowed everything."""

    __slots__ = ("_admin", "_all", "enabled", "header")

    def __init__(self, settings: AuthSettings) -> None:
        self.enabled: bool = settings.enabled
        #: lower-case name of the header that may carry a key beside ``Authorization: Bearer``
        self.header: bytes = settings.required_header.lower().encode("latin-1")
        self._all = _digests([*settings.allowed_keys, *settings.admin_keys])
        #: with no admin keys configured, every allowed key is one
        self._admin = _digests(settings.admin_keys) if settings.admin_keys else self._all

    def allows(self, bearer: bytes | None, header_value: bytes | None, *, admin: bool = False) -> bool:
        """Whether either credential is an allowed key (an admin key, if *admin*)."""
        if not self.enabled:
            return True
        return self.allows_digests(credential_digests(bearer, header_value), admin=admin)

    def allows_digests(self, presented: tuple[bytes, ...], *, admin: bool = False) -> bool:
        """The same for credentials that were digested before, as those of a repeated head are.

        Each is compared with every key, so that the time tells neither which one matched nor how much of it.
        """
        if not self.enabled:
            return True
        found = False
        for digest in presented:
            for known in self._admin if admin else self._all:
                found |= compare_digest(digest, known)
        return found


def bearer_token(authorization: bytes) -> bytes | None:
    """Return the token of an ``Authorization`` header's value, None if it is of another scheme."""
    scheme, _, token = authorization.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def credential_digests(*credentials: bytes | None) -> tuple[bytes, ...]:
    """Return what ``allows_digests`` takes; None stands for a credential that was not sent."""
    return tuple(hashlib.sha256(credential).digest() for credential in credentials if credential is not None)
