"""What gossip tells: one log line and one call per change of a member, and an alarm if somebody else uses our key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mesh.core.gossip_record import Record
from mesh.core.membership import Change, Event, Membership, MemberView, Status
from mesh.core.node_state import decode_state
from mesh.logs import Log

_log = Log(__name__)

#: A restart with a clock that went back meets its own former record once; another process with the key goes on.
_CLASHES, _WITHIN_S, _QUIET_S = 3, 120.0, 600.0


class Story:
    def __init__(
        self, on_change: Callable[[Change, MemberView], None] | None, own_payload: Callable[[], bytes]
    ) -> None:
        self._on_change = on_change
        self._clashes = KeyClash(own_payload)

    def tell(self, core: Membership, now: float) -> None:
        """Tell what happened since the last call."""
        for event in core.take_events():
            if event.change is Change.OWN_KEY:
                if not self._clashes.notice(event.record, now):
                    continue
                _log.error(
                    "another process uses this node's key: was its state directory copied? "
                    "Give one of the two another key",
                    node=_name(event.record),
                )
            view = core.view(event.record.key) or _view(event.record)
            _write(event, view)
            self._call(event.change, view)

    def _call(self, change: Change, view: MemberView) -> None:
        if self._on_change is None:
            return
        try:
            self._on_change(change, view)
        except Exception:  # a bug there must not stop gossip
            _log.exception("on_change failed", change=change)


class KeyClash:
    """Tells two processes with one key from one that restarted."""

    def __init__(self, own_payload: Callable[[], bytes]) -> None:
        self._own_payload = own_payload
        self._seen: deque[float] = deque(maxlen=_CLASHES)
        self._reported = False

    def notice(self, record: Record, now: float) -> bool:
        """Note a record under our key that we did not make; return whether it is time to raise the alarm."""
        if _boot(record.payload) == _boot(self._own_payload()):
            return False
        if self._seen and now - self._seen[-1] > _QUIET_S:
            self._seen.clear()
            self._reported = False
        self._seen.append(now)
        if self._reported or len(self._seen) < _CLASHES or now - self._seen[0] > _WITHIN_S:
            return False
        self._reported = True
        return True


def _write(event: Event, view: MemberView) -> None:
    node = _name(event.record)
    match event.change:
        case Change.JOINED:
            _log.info("node joined", node=node, key=view.key.hex()[:16])
        case Change.SUSPECT:
            _log.info("node may be gone", node=node)
        case Change.ALIVE:
            _log.info("node is back", node=node)
        case Change.DEAD:
            _log.warning("node is gone", node=node)
        case Change.LEFT:
            _log.info("node left", node=node)
        case Change.UPDATED if event.restarted:
            _log.debug("node is of a new incarnation", node=node)
        case _:
            pass


def _view(record: Record) -> MemberView:
    """Return what is left to say of a member that was forgotten."""
    return MemberView(record.key, record.payload, Status.LEFT, *record.age, last_heard=None, updated_at=0.0)


def _name(record: Record) -> str:
    try:
        return decode_state(record.payload).node_id
    except ValueError:
        return record.key.hex()[:16]


def _boot(payload: bytes) -> str:
    try:
        return decode_state(payload).boot
    except ValueError:
        return ""
