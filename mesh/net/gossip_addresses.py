"""Where members say they are. Brought up to date with each change of one member, so that nothing goes over all of them.

Answers two questions: at which addresses is a member, and does a living member say that it is at this address.
"""

from __future__ import annotations

from collections import Counter

from mesh.core.membership import MemberView, Status
from mesh.core.node_state import PeerKey, decode_state


class AddressBook:
    def __init__(self) -> None:
        self._said: dict[PeerKey, tuple[bytes, tuple[str, ...]]] = {}  #: payloads, and the addresses in them
        self._living: dict[PeerKey, tuple[str, ...]] = {}
        self._taken: Counter[str] = Counter()  #: how many living members say so of each address

    def __len__(self) -> int:
        return len(self._said)

    def changed(self, view: MemberView) -> bool:
        """Take over a change of a member; return whether nobody living is now where somebody was."""
        addresses = self.of(view)
        if view.status is Status.LEFT:
            self._said.pop(view.key, None)
        before = self._living.get(view.key, ())
        after = addresses if view.status is Status.ALIVE else ()
        if before == after:
            return False
        self._taken.update(after)
        self._living[view.key] = after
        if not after:
            del self._living[view.key]
        for address in before:
            self._taken[address] -= 1
            if not self._taken[address]:
                del self._taken[address]
        return any(address not in self._taken for address in before)

    def is_taken(self, address: str) -> bool:
        return address in self._taken

    def of(self, view: MemberView) -> tuple[str, ...]:
        """Return where a member says it is; read once for each of its records."""
        held = self._said.get(view.key)
        if held is None or held[0] is not view.payload:
            held = self._said[view.key] = (view.payload, _addresses(view.payload))
        return held[1]


def _addresses(payload: bytes) -> tuple[str, ...]:
    try:
        return decode_state(payload).addresses
    except ValueError:  # the gate lets in no such record
        return ()
