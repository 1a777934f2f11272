"""The three handshake messages of Noise_XXpsk3_25519_ChaChaPoly_SHA256, done by noiseprotocol. Sans-io.

Knows their sizes, turns whatever noiseprotocol raises into ``LinkError``, and gives the keys that come out of it. It is
the only file that touches noiseprotocol; that a handshake here is the published one is checked with published vectors.
"""

from __future__ import annotations

from typing import Any

from cryptography.exceptions import InvalidTag
from noise.backends.default.keypairs import KeyPair25519  # type: ignore[import-untyped]
from noise.connection import Keypair, NoiseConnection  # type: ignore[import-untyped]

from mesh.errors import LinkError
from mesh.net.noise_records import TAG_BYTES, Opener, Sealer

NOISE_NAME = b"Noise_XXpsk3_25519_ChaChaPoly_SHA256"
MESSAGES = 3

_KEY_BYTES = 32
_SEALED_KEY_BYTES = _KEY_BYTES + TAG_BYTES
#: Without payload. That is sealed already in the first one: a handshake with a pre-shared key has a key from there on.
_SIZES = (_KEY_BYTES + TAG_BYTES, _KEY_BYTES + _SEALED_KEY_BYTES + TAG_BYTES, _SEALED_KEY_BYTES + TAG_BYTES)
_NOT_OURS = "this is not the handshake of a llama-mesh link"


class Handshake:
    """One side of it. ``number`` is the message that comes next, either way."""

    def __init__(
        self,
        *,
        initiator: bool,
        psk: bytes,
        static_private: bytes,
        prologue: bytes,
        ephemeral_private: bytes | None = None,
        payloads: tuple[bytes, bytes, bytes] = (b"", b"", b""),
    ) -> None:
        """*ephemeral_private* and *payloads* (of both sides) are for published test vectors, and for nothing else."""
        noise = NoiseConnection.from_name(NOISE_NAME)
        noise.set_psks(psk)
        noise.set_prologue(prologue)
        noise.set_keypair_from_private_bytes(Keypair.STATIC, static_private)
        if initiator:
            noise.set_as_initiator()
        else:
            noise.set_as_responder()
        noise.start_handshake()
        self._noise = noise
        self._state: Any = noise.noise_protocol.handshake_state  # noiseprotocol forgets it at the end; we need its keys
        if ephemeral_private is not None:
            self._state.e = KeyPair25519.from_private_bytes(ephemeral_private)
        self._payloads = payloads
        self.number = 0

    @property
    def done(self) -> bool:
        return self.number == MESSAGES

    @property
    def next_size(self) -> int:
        """How many bytes the next message has; any other number cannot be right."""
        return _SIZES[self.number] + len(self._payloads[self.number])

    def write(self) -> bytes:
        """Return this side's next message. Raise ``LinkError`` if what the other side sent admits none."""
        try:
            message = bytes(self._noise.write_message(self._payloads[self.number]))
        except ValueError as error:  # its ephemeral key is a point of low order, with which there is no secret
            raise LinkError(_NOT_OURS) from error
        self.number += 1
        return message

    def read(self, message: bytes) -> None:
        """Take the other side's next message. Raise ``LinkError`` if it is not one, or not for this handshake."""
        try:
            payload = self._noise.read_message(message)
        except InvalidTag as error:
            raise LinkError(self._why_unreadable()) from error
        except ValueError as error:  # a public key that is none
            raise LinkError(_NOT_OURS) from error
        if payload != self._payloads[self.number]:
            raise LinkError(_NOT_OURS)
        self.number += 1

    def _why_unreadable(self) -> str:
        if self.number == 0:  # only the names and the prologue are mixed in so far
            return "it speaks another version of the link protocol, or none"
        if self.number == 1:
            return "its answer to the handshake was changed on its way"
        return "its cluster token is not the one of this node (its proof does not decrypt)"

    # --- what comes out of it

    @property
    def own_static(self) -> bytes:
        static: bytes = self._state.s.public_bytes
        return static

    @property
    def remote_static(self) -> bytes:
        """Proven, once its message has been read."""
        static: bytes = self._state.rs.public_bytes
        return static

    @property
    def hash(self) -> bytes:
        """What is the same on both sides of this handshake and of no other; once it is done."""
        digest: bytes = self._noise.get_handshake_hash()
        return digest

    def split(self) -> tuple[Sealer, Opener]:
        protocol = self._noise.noise_protocol
        return Sealer(protocol.cipher_state_encrypt.k), Opener(protocol.cipher_state_decrypt.k)
