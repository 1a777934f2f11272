"""Whether nodes of other versions take part (``cluster.version_mismatch_action``). Tells of each once (trap 65)."""

from __future__ import annotations

from typing import Literal

from mesh.core.node_state import PeerKey
from mesh.logs import Log

_log = Log(__name__)

Action = Literal["warn", "reject_major", "reject_any"]


class VersionPolicy:
    """Judges peers' versions against this node's."""

    def __init__(self, own: str, action: Action) -> None:
        self._own = own
        self._action = action
        #: The last version of each node that was told of. By key: a name may have two for a while, old and new.
        self._told: dict[PeerKey, str] = {}

    def judge(self, key: PeerKey, node_id: str, version: str) -> str | None:
        """Return why a node of *version* gets no requests, None if it may; log it when it differs, once."""
        why = self._why_rejected(version)
        if version == self._own:
            self._told.pop(key, None)
        elif self._told.get(key) != version:
            self._told[key] = version
            _log.warning("a node has another version", node=node_id, version=version, own=self._own,
                         action="gets no requests" if why else "takes part")  # fmt: skip
        return why

    def forget(self, key: PeerKey) -> None:
        self._told.pop(key, None)

    def _why_rejected(self, version: str) -> str | None:
        differs = version != self._own
        if self._action == "reject_major":
            differs = _major(version) != _major(self._own)
        if not differs or self._action == "warn":
            return None
        return f"its version {version or '?'} is rejected (version_mismatch_action: {self._action})"


def _major(version: str) -> str:
    """Return what must be equal for compatibility: before 1.0 that is the minor version too."""
    parts = version.split(".")
    return ".".join(parts[:2]) if parts[0] == "0" else parts[0]
