"""This node's identity: an Ed25519 key, made on first use and kept in a file that only its user can read (trap 103).

The Noise static key is derived from the same seed, so that there is one secret to keep. A key that replaces another
carries a *rotation statement*: the old key's signature over both, by which nodes that know the old one accept the new.
Whom to trust is ``mesh.net.trust``'s business.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from mesh.config.settings import Noise
from mesh.core.node_state import PeerKey
from mesh.errors import ConfigError
from mesh.files import PRIVATE, create_file, locked, private_directory, read_private, replace_file
from mesh.logs import Log
from mesh.net.cluster_files import ClusterFiles, cluster_files
from mesh.net.token import Token, load_token, psk_of

__all__ = [
    "Identity", "Token", "fingerprint", "key_text", "load_identity", "load_token", "looks_like_key", "parse_key",
    "psk_of", "rotate_key", "rotated_from", "verify",
]  # fmt: skip

_log = Log(__name__)

KEY_VARIABLE = "NODE_PRIVATE_KEY"

_KEY = "ed25519:"
_SEED = "ed25519-seed:"
_SEED_COMMENT = "# The private key of this llama-mesh node. Whoever has it is this node: keep it to yourself.\n"
#: 32 bytes; the "=" at the end gets lost when a word is selected with the mouse.
_BASE64 = re.compile(r"[A-Za-z0-9+/]{43}=?")
_HEX = re.compile(r"[0-9A-Fa-f]{64}")
_FINGERPRINT = re.compile(r"[a-z2-7]{5}(-[a-z2-7]{5}){3}")

#: Parts of the protocol, as the labels of ``mesh.net.token`` are. Each use of a key has a label of its own, so that
#: nothing made for one purpose can serve another.
_SALT = b"llama-mesh"
_NOISE_INFO = b"llama-mesh ed25519 seed to noise x25519 static key v1"
_ROTATION = b"llama-mesh key rotation v1\x00"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Identity:
    """This node's key. It does not show its secrets (trap 101)."""

    key: PeerKey
    noise_private: bytes  #: X25519, 32 bytes
    rotation: bytes | None  #: by which the previous key names this one, if there was one
    _private: Ed25519PrivateKey

    @classmethod
    def of_seed(cls, seed: bytes, previous_seed: bytes | None = None) -> Self:
        """Return the identity that *seed* is, the successor of that of *previous_seed*."""
        private = Ed25519PrivateKey.from_private_bytes(seed)
        key = PeerKey(private.public_key().public_bytes_raw())
        noise_private = HKDF(algorithm=SHA256(), length=32, salt=_SALT, info=_NOISE_INFO).derive(seed)
        rotation = None
        if previous_seed is not None and not secrets.compare_digest(previous_seed, seed):
            rotation = _rotation(Ed25519PrivateKey.from_private_bytes(previous_seed), key)
        return cls(key, noise_private, rotation, private)

    def sign(self, message: bytes) -> bytes:
        """Return the signature (64 bytes) of this node over *message*."""
        return self._private.sign(message)

    def __repr__(self) -> str:
        return f"Identity({fingerprint(self.key)})"


def verify(key: PeerKey, signature: bytes, message: bytes) -> bool:
    """Whether *signature* is *key*'s over *message*; whatever is no key and no signature is not."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def fingerprint(key: PeerKey) -> str:
    """Return 100 bits of the key's SHA-256 as four groups of five letters and digits, to compare by eye."""
    text = base64.b32encode(hashlib.sha256(key).digest()).decode().lower()
    return "-".join(text[i : i + 5] for i in range(0, 20, 5))


def key_text(key: PeerKey) -> str:
    """Return *key* as files, messages and commands spell it."""
    return _KEY + base64.b64encode(key).decode()


def looks_like_key(text: str) -> bool:
    """Whether *text* is spelled like a key or a fingerprint, so that as a name it would be mistaken for one."""
    word = text.strip().lower()
    return word.startswith("ed25519") or _FINGERPRINT.fullmatch(word) is not None


def parse_key(text: str) -> PeerKey:
    """Return the key that *text* spells; raise ``ValueError``, which does not repeat it: it may be a secret."""
    word = text.strip()
    if word.startswith(_SEED):
        raise ValueError("is a PRIVATE key; a public one, as 'llama-mesh keys show' prints it, begins with ed25519:")
    if not word.startswith(_KEY) or not _BASE64.fullmatch(word.removeprefix(_KEY)):
        raise ValueError("is not a key; expected 'ed25519:' and 44 characters, as 'llama-mesh keys show' prints it")
    return PeerKey(_decoded(word.removeprefix(_KEY)))


def _decoded(word: str) -> bytes:
    return base64.b64decode(f"{word.removesuffix('=')}=")


def _rotation(previous: Ed25519PrivateKey, key: PeerKey) -> bytes:
    """Return the statement that *key* takes the place of *previous*: the old key and its signature over both."""
    old = previous.public_key().public_bytes_raw()
    return old + previous.sign(_ROTATION + old + key)


def rotated_from(statement: bytes, key: PeerKey) -> PeerKey | None:
    """Return the key that *key* has replaced according to *statement*, None if it does not prove that."""
    old, signature = PeerKey(statement[:32]), statement[32:]
    if len(statement) != 96 or old == key or not verify(old, signature, _ROTATION + old + key):
        return None
    return old


def load_identity(noise: Noise, environ: Mapping[str, str]) -> Identity:
    """Return this node's identity; make its key first if there is none.

    Raise ``ConfigError`` if the key is unusable, or others may read it. It is never overwritten.
    """
    files = cluster_files(noise)
    text = environ.get(KEY_VARIABLE, "")
    seed = _parse_seed(text, KEY_VARIABLE) if text.strip() else _own_seed(files.key)
    return Identity.of_seed(seed, _previous_seed(files, asked_for=noise.previous_key_path is not None))


def rotate_key(files: ClusterFiles, *, force: bool = False) -> tuple[PeerKey, PeerKey]:
    """Make a new key, keep the present one as the previous; return both, the old one first.

    Raise ``ConfigError`` if there is a previous one, unless *force* says that it may go: a statement covers one step,
    so whoever knows only the key before the last would refuse this node. A crash in between leaves the present key in
    both files, which is no rotation.
    """
    with _errors_named(files.key), locked(files.key):
        seed = secrets.token_bytes(32)
        old_seed = _parse_seed(_text(read_private(files.key)), str(files.key))
        if not force and _previous_seed(files, asked_for=False) not in (None, old_seed):
            raise ConfigError(
                f"this node's key was rotated before: {files.previous_key} is still there. Nodes that have not heard"
                " of that rotation know only that key; after another one they refuse this node until 'llama-mesh keys"
                f" trust' is run on each of them. Once all have met the present key, run 'rm {files.previous_key}' and"
                " rotate again; --force rotates now"
            )
        private_directory(files.previous_key.parent)
        replace_file(files.previous_key, _seed_file(old_seed), mode=PRIVATE)
        replace_file(files.key, _seed_file(seed), mode=PRIVATE)
    return Identity.of_seed(old_seed).key, Identity.of_seed(seed).key


@contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Say which file it was that could not be written."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise ConfigError(f"cannot keep this node's key in {path}: {place}: {error.strerror}") from error


def _own_seed(path: Path) -> bytes:
    """Return the seed in *path*; of several processes that find none, one makes it and all use that."""
    try:
        content = read_private(path)
    except FileNotFoundError:
        with _errors_named(path):
            private_directory(path.parent)
            if create_file(path, _seed_file(secrets.token_bytes(32))):
                _log.info("made this node's key", path=str(path))
            content = read_private(path)
    _warn_of_open_directory(path.parent)
    return _parse_seed(_text(content), str(path))


def _previous_seed(files: ClusterFiles, *, asked_for: bool) -> bytes | None:
    try:
        content = read_private(files.previous_key)
    except FileNotFoundError:
        if asked_for:
            _log.warning("cluster.noise.previous_key_path is not there", path=str(files.previous_key))
        return None
    return _parse_seed(_text(content), str(files.previous_key))


def _seed_file(seed: bytes) -> bytes:
    return f"{_SEED_COMMENT}{_SEED}{base64.b64encode(seed).decode()}\n".encode()


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _parse_seed(text: str, source: str) -> bytes:
    """Return the seed in *text*. Bare base64 or hex will do: 32 random bytes are a seed, whatever made them."""
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    if len(words) != 1:
        found = "has no key in it" if not words else "must hold one key, in one line"
        raise ConfigError(f"{source}: {found}; expected '{_SEED}' and 44 characters, or no such file: one is made then")
    word = words[0].removeprefix(_SEED)
    if _HEX.fullmatch(word):
        return bytes.fromhex(word)
    if _BASE64.fullmatch(word):
        return _decoded(word)
    raise ConfigError(f"{source}: is not a private key; expected '{_SEED}' and 44 characters of base64")


@cache  # once is enough
def _warn_of_open_directory(directory: Path) -> None:
    """Warn if others may exchange the files in *directory*; in containers it cannot always be helped."""
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        _log.warning("other users may replace this node's key", directory=str(directory), fix=f"chmod go-w {directory}")
