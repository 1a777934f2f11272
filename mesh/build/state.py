"""What is remembered of a build from one run of the node to the next: what ran before, and what is held back.

``<build_path>.mesh.json``, read and written under the lock of the build. A damaged file is an empty one: nothing that
runs depends on it. Everything here blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from mesh.build.layout import Shelf
from mesh.build.spec import BuildSpec
from mesh.core.build_policy import Hold, Installed, remembered
from mesh.files import read_file, replace_file
from mesh.logs import Log

_log = Log(__name__)


@dataclass(frozen=True, slots=True)
class State:
    history: tuple[Installed, ...] = ()  #: the oldest first
    held: Mapping[str, Hold] = field(default_factory=dict)  #: by commit


class _File(msgspec.Struct):
    version: int = 1
    history: tuple[Installed, ...] = ()
    held: dict[str, Hold] = {}


def lock_path(spec: BuildSpec) -> Path:
    return spec.build_path.with_name(f"{spec.build_path.name}.lock")


def state_path(spec: BuildSpec) -> Path:
    return spec.build_path.with_name(f"{spec.build_path.name}.mesh.json")


def load(spec: BuildSpec) -> State:
    path = state_path(spec)
    try:
        known = msgspec.json.decode(read_file(path)[0], type=_File)
    except FileNotFoundError:
        return State()
    except (OSError, msgspec.MsgspecError, ValueError) as error:
        _log.warning("which builds ran before is forgotten", path=str(path), error=str(error))
        return State()
    return State(known.history, known.held)


def save(spec: BuildSpec, state: State) -> None:
    """Raise ``OSError`` if it cannot be written; the old file stays then."""
    file = _File(history=state.history, held=dict(state.held))
    replace_file(state_path(spec), msgspec.json.format(msgspec.json.encode(file)))


def installed(shelf: Shelf) -> Installed | None:
    """Return what is in force as history tells it; None if nothing is."""
    if shelf.target is None:
        return None
    if (live := shelf.live) is None:
        return Installed(str(shelf.target), "")
    return Installed(str(live.binary), live.commit, (live.manifest.ref or None) if live.manifest else None)


def up_to_date(state: State, shelf: Shelf) -> State:
    """Return *state* with the history that leads to what is in force now."""
    return State(remembered(state.history, installed(shelf)), state.held)
