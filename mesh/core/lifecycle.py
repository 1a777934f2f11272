"""The life of one instance as a table.

Three rules:

1. Every change of state is a row of ``TRANSITIONS``; nothing else assigns a state.
2. An instance lives once. A restart is a new instance with a new id, so no late event can touch it.
3. Memory is released by ``EXITED`` and by nothing else: a process that was told to stop still owns its VRAM.

One timer may run per state, armed on entry; what it means (load, drain or kill deadline) is the state itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    SPAWNING = "spawning"  # the process runs or is about to; whether it can serve is not known yet
    READY = "ready"  # it answered /health with 200
    DRAINING = "draining"  # it finishes what it has, and gets nothing new
    STOPPING = "stopping"  # it was told to end; its memory is still taken
    STOPPED = "stopped"  # the process is gone and reaped


class Event(StrEnum):
    HEALTHY = "healthy"  # /health answered 200
    DRAIN = "drain"  # evicted, unloaded, reloaded, or the node shuts down
    IDLE = "idle"  # no request is in flight any more
    DEADLINE = "deadline"  # the state's own timer ran out
    EXITED = "exited"  # the process was reaped


class Effect(StrEnum):
    CHECK_IDLE = "check_idle"  # raise IDLE now if nothing is in flight
    TERMINATE = "terminate"  # close upstream connections, SIGTERM to the group, arm the kill deadline
    KILL = "kill"  # SIGKILL to the group
    RELEASE = "release"  # give memory, port and table entry back


S, E, F = State, Event, Effect

TRANSITIONS: Mapping[tuple[State, Event], tuple[State, tuple[Effect, ...]]] = {
    (S.SPAWNING, E.HEALTHY): (S.READY, ()),
    (S.SPAWNING, E.DRAIN): (S.STOPPING, (F.TERMINATE,)),
    (S.SPAWNING, E.DEADLINE): (S.STOPPING, (F.TERMINATE,)),
    (S.SPAWNING, E.EXITED): (S.STOPPED, (F.RELEASE,)),
    (S.READY, E.DRAIN): (S.DRAINING, (F.CHECK_IDLE,)),
    (S.READY, E.EXITED): (S.STOPPED, (F.RELEASE,)),
    (S.DRAINING, E.IDLE): (S.STOPPING, (F.TERMINATE,)),
    (S.DRAINING, E.DEADLINE): (S.STOPPING, (F.TERMINATE,)),
    (S.DRAINING, E.EXITED): (S.STOPPED, (F.RELEASE,)),
    (S.STOPPING, E.DEADLINE): (S.STOPPING, (F.KILL,)),
    (S.STOPPING, E.EXITED): (S.STOPPED, (F.RELEASE,)),
}

#: Pairs that may happen and change nothing: late, repeated or overtaken events.
IGNORED: frozenset[tuple[State, Event]] = frozenset(
    {
        (S.SPAWNING, E.IDLE),
        (S.READY, E.HEALTHY),
        (S.READY, E.IDLE),
        (S.READY, E.DEADLINE),
        (S.DRAINING, E.HEALTHY),
        (S.DRAINING, E.DRAIN),
        (S.STOPPING, E.HEALTHY),
        (S.STOPPING, E.DRAIN),
        (S.STOPPING, E.IDLE),
        (S.STOPPED, E.HEALTHY),
        (S.STOPPED, E.DRAIN),
        (S.STOPPED, E.IDLE),
        (S.STOPPED, E.DEADLINE),
    }
)


class IllegalTransitionError(AssertionError):
    """A (state, event) pair that cannot happen: a bug, told with the instance's recent history."""

    def __init__(self, state: State, event: Event, story: tuple[str, ...] = ()) -> None:
        super().__init__(f"{event} in state {state}; story: {' > '.join(story) or 'none'}")


def step(state: State, event: Event, story: tuple[str, ...] = ()) -> tuple[State, tuple[Effect, ...]]:
    """Return the next state and the effects to carry out; raise ``IllegalTransitionError`` on a pair that is a bug."""
    if (state, event) in IGNORED:
        return state, ()
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransitionError(state, event, story) from None


def diagram() -> str:
    """Return the table as a Mermaid state diagram; SPEC.md holds a copy that a test compares."""
    lines = ["stateDiagram-v2", "    [*] --> spawning"]
    for (state, event), (target, effects) in TRANSITIONS.items():
        label = event if not effects else f"{event} / {', '.join(effects)}"
        lines.append(f"    {state} --> {target}: {label}")
    return "\n".join([*lines, "    stopped --> [*]"])
