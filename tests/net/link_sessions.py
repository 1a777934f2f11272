"""Two sessions joined by a wire that the test holds, and what they need."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from mesh.core.node_state import PeerIdentity, PeerKey
from mesh.errors import LinkError
from mesh.net.noise import Session
from mesh.net.noise_hello import Binding, encode_hello, verify_hello
from mesh.net.noise_records import Control

PSK = bytes(range(32))


class FakeIdentity:
    """A node's key, the same for the same seed."""

    def __init__(self, seed: int = 1) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.key = PeerKey(self._private.public_key().public_bytes_raw())
        self.noise_private = X25519PrivateKey.from_private_bytes(bytes([seed + 100]) * 32).private_bytes_raw()
        self.rotation: bytes | None = None

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


@dataclass
class SignedHellos:
    """As ``Links`` has them, without trust; *refusal* is what trust would say."""

    identity: FakeIdentity
    node_id: str = "node"
    refusal: LinkError | None = None
    seen: list[tuple[PeerIdentity, bytes | None]] = field(default_factory=list)
    bindings: list[Binding] = field(default_factory=list)

    def make(self, binding: Binding) -> bytes:
        self.bindings.append(binding)
        return encode_hello(self.identity, self.node_id, "1.0", binding)

    def check(self, content: bytes, binding: Binding) -> PeerIdentity:
        self.seen.append(verify_hello(content, binding))
        if self.refusal is not None:
            raise self.refusal
        return self.seen[-1][0]


def initiator(seed: int = 1, **more: object) -> Session:
    return session(seed, initiator=True, **more)


def responder(seed: int = 2, **more: object) -> Session:
    return session(seed, initiator=False, **more)


def session(seed: int, **more: object) -> Session:
    identity = FakeIdentity(seed)
    options: dict[str, object] = {
        "psk": PSK,
        "static_private": identity.noise_private,
        "hellos": SignedHellos(identity, f"node{seed}"),
    }
    return Session(**(options | more))  # type: ignore[arg-type]


def shake_hands(one: Session, two: Session) -> tuple[list[bytes], list[bytes]]:
    """Let *one*, the initiator, and *two* come to terms; return what each wrote, write by write."""
    written: tuple[list[bytes], list[bytes]] = ([], [])
    while True:
        quiet = True
        for number, (sender, receiver) in enumerate(((one, two), (two, one))):
            if data := sender.data_to_send():
                quiet = False
                written[number].append(data)
                assert receiver.receive_data(data) == []
        if quiet:
            return written


def established() -> tuple[Session, Session]:
    one, two = initiator(), responder()
    shake_hands(one, two)
    return one, two


def contents(opened: list[bytes | Control]) -> bytes:
    return b"".join(item for item in opened if isinstance(item, bytes))
