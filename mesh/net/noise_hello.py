"""What the two ends of a link tell each other first, and the proof that it is theirs. Pure.

The hello binds the node's Ed25519 identity to this very handshake: the signature covers its final hash, the sender's
role and its Noise static key, so no hello can be used again, elsewhere, or by who only relays it.
"""

from __future__ import annotations

from typing import Protocol

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from mesh.core.node_state import PROTOCOL, PeerIdentity, PeerKey
from mesh.errors import LinkError

#: A longer hello is none.
MAX_HELLO = 8192

_DOMAIN = b"llama-mesh hello v1"
_LONGEST_NAME = 512


class SelfDialError(LinkError):
    """Both ends have the same key: this node reached itself, or a machine with a copy of its key file."""


class Signer(Protocol):
    """This node's identity (``mesh.net.keys.Identity``)."""

    @property
    def key(self) -> PeerKey: ...
    @property
    def noise_private(self) -> bytes: ...
    @property
    def rotation(self) -> bytes | None: ...
    def sign(self, message: bytes) -> bytes: ...


class Binding(msgspec.Struct, frozen=True):
    """What a hello is signed for: one side of one handshake."""

    initiator: bool
    handshake_hash: bytes
    static: bytes  #: the signer's X25519 public key

    def message(self) -> bytes:
        return b"|".join((_DOMAIN, b"initiator" if self.initiator else b"responder", self.handshake_hash, self.static))


class Hello(msgspec.Struct, frozen=True, omit_defaults=True):
    """MessagePack with field names; unknown fields are ignored and new ones have defaults (trap 66)."""

    node_id: str
    version: str
    protocol: int
    key: bytes
    signature: bytes
    rotation: bytes | None = None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Hello)


def encode_hello(identity: Signer, node_id: str, version: str, binding: Binding) -> bytes:
    """Return this node's hello for *binding*."""
    signature = identity.sign(binding.message())
    return _encoder.encode(Hello(node_id, version, PROTOCOL, identity.key, signature, identity.rotation))


def verify_hello(content: bytes, binding: Binding) -> tuple[PeerIdentity, bytes | None]:
    """Return who said *content*, and its rotation statement, not verified. Raise ``LinkError`` if it proves nothing."""
    try:
        hello = _decoder.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise LinkError(f"its hello cannot be read: {error}") from error
    if hello.protocol != PROTOCOL:
        raise LinkError(
            f"it speaks protocol {hello.protocol} (llama-mesh {hello.version[:40]!r}), this node protocol {PROTOCOL}; "
            "run versions that speak the same"
        )
    if not hello.node_id or max(len(hello.node_id), len(hello.version)) > _LONGEST_NAME:
        raise LinkError("its hello has no sane name or version")
    if not (hello.node_id + hello.version).isprintable():
        raise LinkError("its hello has a name or version that cannot be printed")
    try:
        Ed25519PublicKey.from_public_bytes(hello.key).verify(hello.signature, binding.message())
    except (InvalidSignature, ValueError) as error:
        raise LinkError("its hello is not signed by the key that it shows") from error
    return PeerIdentity(PeerKey(hello.key), hello.node_id, hello.version), hello.rotation
