"""Watches attempts at builds until they have ended: the asked node's by its events, those of others by asking again.

An attempt is known by its number and its start: numbers begin anew when a node does. A connection that breaks is taken
up again, and what happened in between is in the picture that every stream of events begins with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from mesh.cli import everywhere
from mesh.cli.build_view import Attempt, BuildView
from mesh.cli.failure import CliError
from mesh.cli.node import Node

#: A node pings its viewers every 15 s; without three of them the connection is dead.
_SILENCE_S: Final = 45.0
#: So many times in a row the node may not be reached: a restart takes less.
_TRIES: Final = 6
_LONGEST_PAUSE_S: Final = 8.0
_POLL_S: Final = 2.0
#: So many times in a row another node may not answer.
_MISSED: Final = 15
#: Between two attempts; tests put something else here.
pause = time.sleep

_SEE: Final = "'llama-mesh builds' shows what the node has, and what it does now."


class LostError(CliError):
    """The node does not know the attempt any more."""


def follow(found: Node, attempt: Attempt, view: BuildView) -> Attempt:
    """Return *attempt* of the node that is asked as it ended. Raise ``CliError`` if that cannot be known any more."""
    view.tell(attempt["build"], attempt)
    missed = 0
    while attempt.get("outcome") is None:
        try:
            for latest in _changes(found, attempt, view):
                attempt, missed = latest, 0
                if attempt.get("outcome") is not None:
                    break
            why = "the node ended the connection"
        except CliError as error:
            if error.http_status is not None or isinstance(error, LostError):
                raise
            why = error.message
        if attempt.get("outcome") is None:
            missed += 1
            if missed >= _TRIES:
                raise CliError(f"the build may go on, but it cannot be watched: {why}", fix=_SEE)
            view.problem(f"{why}; trying again")
            pause(min(_LONGEST_PAUSE_S, 2.0 ** (missed - 1)))
    view.problem(None)
    return attempt


def _changes(found: Node, attempt: Attempt, view: BuildView) -> Iterator[Attempt]:
    """Yield *attempt* as one connection tells of it; the rest of what it tells is shown."""
    build, number = attempt["build"], attempt["id"]
    with found.stream("GET", "/admin/builds/events", params={"build": build}, silence_s=_SILENCE_S) as response:
        for kind, data in events(response.iter_lines()):
            view.problem(None)
            state = data.get("attempt_state")
            if kind == "snapshot":
                latest = as_told(data, attempt)
                view.tell(build, latest, elapsed_s=data["now_wall"] - latest["started_at_wall"])
                view.catch_up(latest["log_tail"] if latest.get("outcome") is None else ())
                yield latest
            elif state is not None and state["id"] == number and state["build"] == build:
                view.tell(build, state)
                yield state
            elif kind == "dropped":
                view.log(f"[... {data['count']} events dropped: this end is too slow]")
            elif data.get("attempt") == number:
                if kind == "progress":
                    view.progress(build, data["stage"], data["done"], data["total"])
                elif kind == "log":
                    view.log(data["line"])


def events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield kind and data of each whole server-sent event in *lines*."""
    kind, data = "message", ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "event":
            kind = value
        elif name == "data":
            data += value
        elif not line:
            if data:
                yield kind, json.loads(data)
            kind, data = "message", ""


def as_told(picture: Mapping[str, Any], attempt: Attempt) -> Attempt:
    """Return *attempt* as a node has it now. Raise ``LostError`` if it does not know it any more."""
    status: Mapping[str, Any] = next((b for b in picture["builds"] if b["name"] == attempt["build"]), {})
    for known in (status.get("current"), status.get("last")):
        if known is not None and _is_same(known, attempt):
            return dict(known)
    if picture["started_at_wall"] > attempt["started_at_wall"]:
        raise LostError("the node was started anew, which ended the build; what ran before runs on", fix=_SEE)
    raise LostError("how it ended is not known any more: another build came after it", fix=_SEE)


def _is_same(one: Attempt, other: Attempt) -> bool:
    return bool(one["id"] == other["id"] and one["started_at_wall"] == other["started_at_wall"])


def poll(found: Node, node: str, attempts: Mapping[str, Attempt], view: BuildView) -> dict[str, Attempt]:
    """Return the *attempts* of other nodes, by node, as they ended; *node* is one of them, or ``"*"``.

    One that cannot be known any more ends with outcome "unknown" and the reason as its error. Lines of logs are shown
    if it is one node: those of several would be a muddle.
    """
    latest = dict(attempts)
    missed = dict.fromkeys(latest, 0)
    for name, attempt in latest.items():
        view.tell(name, attempt)
    while left := [name for name, attempt in latest.items() if attempt.get("outcome") is None]:
        said = _pictures(found, node)
        for name in left:
            latest[name], missed[name] = _heard(said.get(name), latest[name], missed[name])
            view.tell(name, latest[name], elapsed_s=_elapsed_s(said.get(name), latest[name]))
            if node != everywhere.ALL_NODES and latest[name].get("outcome") is None:
                view.catch_up(latest[name].get("log_tail") or ())
        silent = [name for name in left if missed[name]]
        view.problem(f"no answer from {', '.join(silent)}; asking again" if silent else None)
        if any(latest[name].get("outcome") is None for name in left):
            pause(_POLL_S)
    return latest


def _pictures(found: Node, node: str) -> Mapping[str, Any]:
    """Return what the nodes say of their builds; nothing if the one that is asked does not answer."""
    try:
        answer = everywhere.post(found, "/admin/builds", {"node": node})
    except CliError:
        return {}
    return dict(answer["nodes"]) if "nodes" in answer else {node: answer}


def _heard(said: Mapping[str, Any] | None, attempt: Attempt, missed: int) -> tuple[Attempt, int]:
    """Return what is known of *attempt* after a node said *said*, and how often it now has said nothing in a row."""
    if said is None or said.get("status") == "error":
        why = "the node does not answer" if said is None else str(said.get("message"))
        return (attempt, missed + 1) if missed + 1 < _MISSED else (_unknown(attempt, why), 0)
    try:
        return as_told(said, attempt), 0
    except LostError as error:
        return _unknown(attempt, error.message), 0


def _unknown(attempt: Attempt, why: str) -> Attempt:
    return {**attempt, "outcome": "unknown", "error": why}


def _elapsed_s(said: Mapping[str, Any] | None, attempt: Attempt) -> float | None:
    now = None if said is None else said.get("now_wall")
    return None if now is None else now - attempt["started_at_wall"]
