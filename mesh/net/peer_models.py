"""Which models peers have, and by which names clients know them: kept up with each node's changes, never made anew.

A *model* is what decides who is meant by a name: key, id, aliases, kind and description, without any figure of load. A
thousand nodes with the same cookbook are one entry each for its models. What nobody has any more is remembered for a
while. A name that nobody knows costs one look into a dict, however many nodes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf

from mesh.config.profile import Profile
from mesh.core.node_state import ProfileState


def model_of(profile: ProfileState) -> ProfileState:
    """Return *profile* without its figures."""
    return ProfileState(
        key=profile.key,
        id=profile.id,
        aliases=profile.aliases,
        kind=profile.kind,
        multimodal=profile.multimodal,
        description=profile.description,
    )


class _Entry:
    """One model."""

    __slots__ = ("dead", "live", "stand_in")

    def __init__(self) -> None:
        self.live = 0  #: nodes that have it
        self.dead = 0  #: and that had it when they died
        self.stand_in: Profile | None = None


class Models:
    def __init__(self, stand_in: Callable[[ProfileState], Profile]) -> None:
        """*stand_in* makes a profile for what only others have."""
        self._stand_in = stand_in
        self._entries: dict[ProfileState, _Entry] = {}
        self._names: dict[str, dict[ProfileState, int]] = {}  #: lower-case; what each may mean, and how surely
        self._remembered: dict[ProfileState, float] = {}  #: until when; the earliest first

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, model: ProfileState, *, alive: bool) -> None:
        """One node more has it."""
        entry = self._entry(model)
        if alive:
            entry.live += 1
        else:
            entry.dead += 1

    def remove(self, model: ProfileState, *, alive: bool) -> None:
        """One node less has it."""
        entry = self._entries[model]
        if alive:
            entry.live -= 1
        else:
            entry.dead -= 1
        self._drop_if_gone(model)

    def remember(self, model: ProfileState, until: float) -> None:
        """Know it until then, even if nobody has it. *until* is never before that of an earlier call."""
        self._entry(model)
        self._remembered.pop(model, None)
        self._remembered[model] = until

    @property
    def forgets_at(self) -> float:
        return next(iter(self._remembered.values()), inf)

    def forget(self, now: float) -> bool:
        """Drop what was remembered for long enough; return whether some model is not known any more."""
        before = len(self._entries)
        while self.forgets_at <= now:
            model = next(iter(self._remembered))
            del self._remembered[model]
            self._drop_if_gone(model)
        return len(self._entries) != before

    def find(self, name: str) -> Profile | None:
        """Return a stand-in for what is known by *name*. Keys win over ids, ids over aliases; what lives over what does
        not; of equals the same one on every node, whoever came first."""
        meant = self._names.get(name.lower())
        if meant is None:
            return None
        model = max(meant, key=lambda model: (meant[model], self._liveness(model), _order(model)))
        entry = self._entries[model]
        if entry.stand_in is None:
            entry.stand_in = self._stand_in(model)
        return entry.stand_in

    def _liveness(self, model: ProfileState) -> int:
        entry = self._entries[model]
        return 2 if entry.live else 1 if entry.dead else 0

    def _entry(self, model: ProfileState) -> _Entry:
        entry = self._entries.get(model)
        if entry is None:
            entry = self._entries[model] = _Entry()
            for name, surely in _names(model):
                known = self._names.setdefault(name, {})
                known[model] = max(surely, known.get(model, surely))
        return entry

    def _drop_if_gone(self, model: ProfileState) -> None:
        entry = self._entries[model]
        if entry.live or entry.dead or model in self._remembered:
            return
        del self._entries[model]
        for name, _ in _names(model):
            meant = self._names.get(name, {})
            meant.pop(model, None)
            if not meant:
                self._names.pop(name, None)


def _names(model: ProfileState) -> Iterator[tuple[str, int]]:
    for alias in model.aliases:
        yield alias.lower(), 0
    yield model.id.lower(), 1
    yield model.key.lower(), 2


def _order(model: ProfileState) -> tuple[object, ...]:
    return model.key, model.id, model.aliases, model.kind, model.description
