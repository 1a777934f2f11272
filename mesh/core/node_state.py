"""What a node tells the others of itself: the content of its gossip record. Values only; the bytes are MessagePack.

Unknown fields are ignored and missing ones have defaults, so that nodes of different versions understand each other
(trap 66); whatever is decoded here was written by somebody else, so every number is brought into its range.
No key, token, path or command line is in it (trap 101).
"""

from __future__ import annotations

from enum import StrEnum
from typing import NewType

import msgspec

#: A node's Ed25519 public key, 32 bytes: its identity. ``node_id`` is only a name.
PeerKey = NewType("PeerKey", bytes)

#: Of links and gossip. Nodes speak with each other if this is the same; everything else is a matter of defaults.
PROTOCOL = 1

_LONGEST_TEXT = 512
_MOST_ADDRESSES = 16
_MOST_KINDS = 64


class PeerIdentity(msgspec.Struct, frozen=True):
    """Who is at the other end of a link, proven in its handshake."""

    key: PeerKey
    node_id: str
    version: str = ""  #: of its llama-mesh


class Fit(StrEnum):
    """Whether a node could start (another) instance of a profile."""

    NOW = "now"  # in free memory
    EVICT = "evict"  # once idle others have gone
    WAIT = "wait"  # once busy others are done, or a back-off is over
    NEVER = "never"  # too large, no engine, no file and no disk for it (trap 64), max_instances 0


class Kind(StrEnum):
    TEXT = "text"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    AUDIO = "audio"


class ProfileState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One profile on one node."""

    key: str  #: "model:profile", lower-case: the same key on two nodes is the same model
    id: str  #: as clients see it
    aliases: tuple[str, ...] = ()
    kind: str = Kind.TEXT
    multimodal: bool = False  #: takes audio, or images, beside text
    description: str = ""
    fit: str = Fit.NOW  #: of one more instance
    ready: int = 0  #: instances that serve
    loading: int = 0
    slots: int = 0  #: requests at once, over all ready instances; 0 = unlimited, if any is ready
    busy: int = 0  #: slots that are taken
    queued: int = 0  #: requests that wait
    load_s: float | None = None  #: how long a start takes; None = not known
    prefill_tps: float | None = None  #: prompt tokens per second of one request
    decode_tps: float | None = None  #: generated tokens per second of one request
    service_s: float | None = None  #: how long a request holds its slot, on average
    max_instances: int = 1
    max_queue: int = 0  #: how many may wait there; 0 = any number


class NodeState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One node."""

    node_id: str
    version: str = ""  #: of llama-mesh
    engine_version: str = ""
    addresses: tuple[str, ...] = ()  #: host:port, at which it can be reached, the best first
    public_url: str = ""
    started_at_unix: int = 0  #: by its own clock; for people only
    boot: str = ""  #: another text with every start
    ready: bool = True
    draining: bool = False  #: takes no new work
    left: bool = False  #: its goodbye
    current_requests: int = 0
    queue_length: int = 0
    capacity_mib: dict[str, int] = {}
    used_mib: dict[str, int] = {}
    profiles: tuple[ProfileState, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(NodeState)


def encode_state(state: NodeState) -> bytes:
    """Return *state* as bytes; the same state gives the same bytes."""
    return _encoder.encode(state)


def decode_state(payload: bytes) -> NodeState:
    """Return what *payload* says. Raise ``ValueError`` if it is not a node's state."""
    try:
        state = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, OverflowError) as error:
        raise ValueError(f"not a node's state: {error}") from error
    if not state.node_id or len(state.node_id) > _LONGEST_TEXT or not state.node_id.isprintable():
        raise ValueError("a node's state without a sane name")
    return msgspec.structs.replace(
        state,
        version=_clean(state.version),
        engine_version=_clean(state.engine_version),
        public_url=_clean(state.public_url),
        boot=_clean(state.boot),
        addresses=tuple(_clean(address) for address in state.addresses[:_MOST_ADDRESSES]),
        capacity_mib=_amounts(state.capacity_mib),
        used_mib=_amounts(state.used_mib),
        current_requests=max(0, state.current_requests),
        queue_length=max(0, state.queue_length),
        profiles=tuple(_sane(profile) for profile in state.profiles),
    )


def _sane(profile: ProfileState) -> ProfileState:
    """Return *profile* with counts that are not negative and figures that can be divided by."""
    return msgspec.structs.replace(
        profile,
        key=_clean(profile.key).lower(),
        id=_clean(profile.id),
        aliases=tuple(_clean(alias) for alias in profile.aliases),
        kind=_clean(profile.kind),
        fit=_clean(profile.fit),
        description=_clean(profile.description),
        ready=max(0, profile.ready),
        loading=max(0, profile.loading),
        slots=max(0, profile.slots),
        busy=max(0, profile.busy),
        queued=max(0, profile.queued),
        max_queue=max(0, profile.max_queue),
        load_s=_positive(profile.load_s),
        prefill_tps=_positive(profile.prefill_tps),
        decode_tps=_positive(profile.decode_tps),
        service_s=_positive(profile.service_s),
    )


def _clean(text: str) -> str:
    """Return *text* fit to be shown: it goes to terminals and logs, and somebody else wrote it."""
    if len(text) <= _LONGEST_TEXT and text.isprintable():
        return text
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_TEXT])


def _amounts(mib: dict[str, int]) -> dict[str, int]:
    return {_clean(kind): max(0, amount) for kind, amount in list(mib.items())[:_MOST_KINDS]}


def _positive(figure: float | None) -> float | None:
    """Return *figure* if it is a positive, finite number."""
    return figure if figure is not None and 0 < figure < 1e12 else None
