"""A link's protocol as a sans-io session: a Noise handshake with the cluster token, then a hello from each side.

    initiator                                     responder
      e                                       ->
                                             <-   e, ee, s, es
      s, se, psk;  hello                      ->            verifies the hello, or refuses
                                             <-   hello     established
      verifies the hello; established

Everything on the wire is a record (two bytes of length, a Noise message), so a connection begins with a zero byte. Who
does not know the cluster token never gets to see a hello: message 3 mixes in the key that is derived from it, and only
a message 3 that decrypts gets an answer. A handshake costs about 0.45 ms of CPU on each side.

What a hello says and whether it is good enough are the caller's; the session says which handshake it has to be for.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Protocol

from mesh.core.node_state import PeerIdentity
from mesh.errors import LinkError
from mesh.net.noise_handshake import Handshake
from mesh.net.noise_hello import MAX_HELLO, Binding, SelfDialError
from mesh.net.noise_records import Control, Opener, Sealer

#: Both sides mix it in: a link of another name or version fails at its first message.
PROLOGUE = b"llama-mesh link 1"


class Hellos(Protocol):
    """Makes this side's hello and judges the other's."""

    def make(self, binding: Binding) -> bytes: ...
    def check(self, content: bytes, binding: Binding) -> PeerIdentity:
        """Return who said *content*; raise ``LinkError`` if this node wants no link with it."""


class Stage(Enum):
    HANDSHAKE = auto()
    HELLO = auto()  # the keys are there, the other's hello is not
    ESTABLISHED = auto()
    CLOSED = auto()  # the other side said so
    FAILED = auto()


_ESTABLISHED = Stage.ESTABLISHED  # attributes of an Enum are slow to reach


class Session:
    """One side of one link. After a ``LinkError`` it is of no use any more."""

    __slots__ = ("_buffer", "_handshake", "_hellos", "_initiator", "_outgoing", "opener", "peer", "sealer", "stage")

    sealer: Sealer  #: these two and the peer once it is established
    opener: Opener
    peer: PeerIdentity

    def __init__(
        self,
        *,
        initiator: bool,
        psk: bytes,
        static_private: bytes,
        hellos: Hellos,
        prologue: bytes = PROLOGUE,
        ephemeral_private: bytes | None = None,
        payloads: tuple[bytes, bytes, bytes] = (b"", b"", b""),
    ) -> None:
        """*ephemeral_private* and *payloads* are for published test vectors only."""
        self._initiator = initiator
        self._hellos = hellos
        self._handshake = Handshake(
            initiator=initiator,
            psk=psk,
            static_private=static_private,
            prologue=prologue,
            ephemeral_private=ephemeral_private,
            payloads=payloads,
        )
        self._buffer = b""
        self._outgoing: list[bytes] = []
        self.stage = Stage.HANDSHAKE
        if initiator:
            self._write_message()

    # --- what the shell calls

    def receive_data(self, data: bytes) -> list[bytes | Control]:
        """Take bytes of the connection; return the content and the control that they hold.

        Raise ``LinkError`` if they are wrong. There may be something in ``data_to_send`` afterwards, also after an
        error: a refusal.
        """
        try:
            if self.stage is _ESTABLISHED:
                return self._judged(self.opener.open(data))
            return self._receive_early(data)
        except LinkError:
            self.stage = Stage.FAILED
            raise

    def receive_eof(self) -> None:
        """The connection ended. Raise ``LinkError`` unless the other side said that it would."""
        if self.stage is not Stage.CLOSED:
            reason = self._why_ended()
            self.stage = Stage.FAILED
            raise LinkError(reason)

    def data_to_send(self) -> bytes:
        """Return what the session itself has to say: its part of the handshake."""
        data = b"".join(self._outgoing)
        self._outgoing.clear()
        return data

    def _why_ended(self) -> str:
        match self.stage:
            case Stage.HANDSHAKE if self._initiator:
                return "it was closed at its beginning: it takes no links now, or is no llama-mesh node of this version"
            case Stage.HELLO if self._initiator:
                return "it was closed during the handshake; most likely the cluster tokens differ"
            case Stage.HANDSHAKE | Stage.HELLO:
                return "it was closed during the handshake"
            case Stage.ESTABLISHED:
                return "it ended without a goodbye; what was on its way is missing"
            case _:
                return "it has failed before"

    # --- the handshake

    def _receive_early(self, data: bytes) -> list[bytes | Control]:
        if self.stage is Stage.FAILED:
            raise LinkError("it has failed before")
        if self.stage is Stage.HANDSHAKE:
            data = self._receive_handshake(data)
        if self.stage is Stage.HELLO and data:
            opened = self.opener.open(data)
            if opened:
                self._receive_hello(opened[0])
            return self._judged(opened[1:])
        return []  # closed, or the handshake goes on

    def _receive_handshake(self, data: bytes) -> bytes:
        """Read and answer messages while it is a handshake; return what follows it."""
        self._buffer += data
        while self.stage is Stage.HANDSHAKE:
            buffer, size = self._buffer, self._handshake.next_size
            # Judged as soon as it can be: nobody makes us wait for 65535 bytes that cannot be right.
            if buffer[:2] != size.to_bytes(2, "big")[: len(buffer)]:
                raise LinkError("this is not the handshake of a llama-mesh link")
            if len(buffer) < 2 + size:
                return b""
            self._buffer = buffer[2 + size :]
            self._read_message(buffer[2 : 2 + size])
        rest, self._buffer = self._buffer, b""
        return rest

    def _read_message(self, message: bytes) -> None:
        handshake = self._handshake
        handshake.read(message)
        if handshake.done:
            self._split()
            return
        # Before message 3 is written: to whom it would come, it would only look like a refusal.
        if self._initiator and handshake.remote_static == handshake.own_static:
            raise SelfDialError("this is the node itself, or one with a copy of its key")
        self._write_message()

    def _write_message(self) -> None:
        message = self._handshake.write()
        self._outgoing.append(len(message).to_bytes(2, "big") + message)
        if self._handshake.done:
            self._split()
            self._say_hello()

    def _split(self) -> None:
        self.sealer, self.opener = self._handshake.split()
        self.stage = Stage.HELLO

    # --- the hellos

    def _binding(self, initiator: bool) -> Binding:
        handshake = self._handshake
        own = initiator is self._initiator
        return Binding(initiator, handshake.hash, handshake.own_static if own else handshake.remote_static)

    def _say_hello(self) -> None:
        self._outgoing.append(self.sealer.seal(self._hellos.make(self._binding(self._initiator))))

    def _receive_hello(self, content: bytes | Control) -> None:
        """The responder answers with its own hello only when it has found the initiator's good."""
        if isinstance(content, Control):
            self._judged([content])
            raise LinkError("it closed the link instead of saying who it is")
        try:
            if len(content) > MAX_HELLO:
                raise LinkError("its hello is too large")
            self.peer = self._hellos.check(content, self._binding(not self._initiator))
        except LinkError:
            self._outgoing.append(self.sealer.seal_control(Control.REFUSED))
            raise
        if not self._initiator:
            self._say_hello()
        self.stage = Stage.ESTABLISHED
        del self._handshake  # and its keys

    def _judged(self, opened: list[bytes | Control]) -> list[bytes | Control]:
        """Note what the last of *opened* means; only that can be the end."""
        if opened and type(last := opened[-1]) is Control:
            if last is Control.REFUSED:
                raise LinkError("it refused this node; its log says why")
            if last is Control.CLOSE:
                self.stage = Stage.CLOSED
        return opened
