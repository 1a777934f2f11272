"""The cluster token: the secret that all nodes of a mesh share, and the pre-shared key of links that is made of it.

``CLUSTER_TOKEN`` in the environment wins over ``<config_dir>/cluster.token``. Never logged, never in a ``repr``
(trap 101).
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from mesh.config.settings import Noise
from mesh.errors import ConfigError
from mesh.files import read_private
from mesh.logs import Log
from mesh.net.cluster_files import cluster_files

_log = Log(__name__)

TOKEN_VARIABLE = "CLUSTER_TOKEN"

SHORTEST = 16
_LONGEST = 4096
_NEW_TOKEN_BYTES = 24

#: 128 random bits in base64 are 22 characters. Fewer distinct ones than this are a pattern or a repeated word; of 22
#: random hexadecimal digits, one in a thousand has so few.
_RANDOM_LENGTH = 22
_RANDOM_DISTINCT = 8

#: Parts of the protocol: nodes whose values differ cannot speak with each other. Whoever a node dials can test guesses
#: of the token at home (against the third handshake message), so each guess has to cost something: here
#: 32 MiB of memory and about 60 ms of a core. The salt is the same for all: what the nodes share is the token alone.
_SALT = b"llama-mesh cluster token to noise psk v2"
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**15, 8, 1


class Token(bytes):
    """A token. It does not show itself: ``bytes(token)`` does."""

    def __repr__(self) -> str:
        return "Token([redacted])"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)


@dataclass(frozen=True, slots=True)
class FoundToken:
    """A token and where it was found: the variable's name, or the file's."""

    token: Token
    source: str


def load_token(noise: Noise, environ: Mapping[str, str]) -> Token | None:
    """Return the cluster's token, None if there is none. Raise ``ConfigError`` if it must not be used.

    Warn of one that can be guessed, once.
    """
    found = find_token(noise, environ)
    if found is None:
        return None
    if weak := weakness(found.token):
        _warn_of_weak_token(found.source, weak)
    return found.token


def find_token(noise: Noise, environ: Mapping[str, str]) -> FoundToken | None:
    """Return the token and its source; a variable that is set to nothing counts as not set."""
    if (text := environ.get(TOKEN_VARIABLE, "")).strip():
        return FoundToken(parse_token(os.fsencode(text), TOKEN_VARIABLE), TOKEN_VARIABLE)
    path = cluster_files(noise).token
    try:
        content = read_private(path)
    except FileNotFoundError:
        return None
    return FoundToken(parse_token(content, str(path)), str(path))


def parse_token(content: bytes, source: str) -> Token:
    """Return the token in *content*: one line, whose ends do not matter. *source* is for the ``ConfigError``."""
    token = content.strip()
    if not token:
        raise ConfigError(f"{source}: there is no token in it; make one with 'llama-mesh token new --force'")
    if any(byte < 0x20 or byte == 0x7F for byte in token):
        raise ConfigError(f"{source}: the cluster token must be one line without control characters")
    if len(token) < SHORTEST:
        raise ConfigError(
            f"{source}: the cluster token has {len(token)} characters, it needs at least {SHORTEST};"
            " 'llama-mesh token new' makes one that cannot be guessed"
        )
    if len(token) > _LONGEST:
        raise ConfigError(f"{source}: the cluster token is longer than {_LONGEST} characters; is this the right file?")
    return Token(token)


def weakness(token: bytes) -> str | None:
    """Return why *token* does not look random, in words for its owner; None if it does."""
    if len(token) < _RANDOM_LENGTH:
        reason = f"it has only {len(token)} characters"
    elif len(set(token)) < _RANDOM_DISTINCT:
        reason = f"it has only {len(set(token))} different characters"
    else:
        return None
    return (
        f"the cluster token does not look random ({reason}), and whoever is in reach of a node's network can test"
        " guesses; 'llama-mesh token new' makes a good one"
    )


@cache  # once is enough
def _warn_of_weak_token(source: str, weak: str) -> None:
    _log.warning(weak, source=source)


def new_token() -> Token:
    """Return a token that nobody can guess: 192 random bits, in letters that every shell leaves alone."""
    return Token(secrets.token_hex(_NEW_TOKEN_BYTES).encode())


def psk_of(token: bytes) -> bytes:
    """Return the 32-byte pre-shared key of Noise that *token* stands for. Slow on purpose: once, at the start."""
    return Scrypt(salt=_SALT, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P).derive(bytes(token))
