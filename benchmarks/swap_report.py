"""From moments to figures: spreads, the waiting bound, the table. Pure; measures nothing.

The bound. A request for X that comes when X's instance takes nothing new any more waits until that has finished
(*drain*, *stop*), then for the turn of the incumbent Y (*load*, *tenure*, *drain*, *stop*), then for its own *load*.
SPEC.md section 3 states it for one that comes when Y has its turn already: without X's own drain and stop. Each piece
is the longest that was measured, and none comes from how long the scheduler kept somebody waiting: *drain* is the
longest time that an instance worked on one request. Waiting for a slot behind requests of one's own model is not in it;
only a faster machine would help. So it holds for every wait *for a turn*; for whole waits where the machine keeps up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

from benchmarks.native import BenchmarkError
from benchmarks.swap_log import Story

SWAP_GOAL_S = 0.1
PARTS = ("decide", "stop", "start", "load", "answer")


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap, from its trigger (request or SIGTERM) to the first token. ``parts`` is empty if they are not known."""

    model: str
    first_token_s: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Bound:
    """The longest measured piece of each kind, seconds."""

    load_s: float
    tenure_s: float
    drain_s: float
    stop_s: float

    @property
    def stated_s(self) -> float:
        """What SPEC.md section 3 says."""
        return self.load_s + self.tenure_s + self.drain_s + self.stop_s + self.load_s

    @property
    def full_s(self) -> float:
        """The same for a request that comes while the previous instance of its own model is leaving."""
        return self.drain_s + self.stop_s + self.stated_s


@dataclass(frozen=True, slots=True)
class Storm:
    """One storm: what was sent, what clients saw, what the node wrote down."""

    name: str
    rate_per_s: float
    requests: int
    tenure_s: float
    keeps_up: bool  #: the rate was chosen such that the machine can serve it; then whole waits are judged
    first_token_s: Sequence[float]  #: as clients saw them
    failures: Sequence[str]
    story: Story


# -- statistics


def budget_for_one(figures_mib: Sequence[int]) -> int:
    """Return a budget, in MiB, into which one model fits at the highest figure, and two do not at the lowest."""
    low, high = min(figures_mib), max(figures_mib)
    if high >= 2 * low:
        raise BenchmarkError(f"no budget holds one and not two of models that are said to take {low} and {high} MiB")
    return low + high // 2


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least *percent* of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(ceil(len(ordered) * percent / 100), 1) - 1]


def spread(values: Sequence[float]) -> dict[str, float]:
    figures = {
        "median": median(values),
        "p25": percentile(values, 25),
        "p75": percentile(values, 75),
        "min": min(values),
        "max": max(values),
    }
    return {name: round(value, 4) for name, value in figures.items()}


# -- swaps


def swap_summary(mesh: Sequence[Swap], bare: Sequence[Swap]) -> dict[str, Any]:
    """Compare swaps that were made in pairs, one of each, shortly after another."""
    pairs = [ours.first_token_s - theirs.first_token_s for ours, theirs in zip(mesh, bare, strict=True)]
    times = {name: [swap.first_token_s for swap in swaps] for name, swaps in (("mesh", mesh), ("bare", bare))}
    difference_s = median(times["mesh"]) - median(times["bare"])
    return {
        "swaps": len(mesh),
        "mesh_s": spread(times["mesh"]),
        "bare_s": spread(times["bare"]),
        "difference_s": round(difference_s, 4),
        "paired_difference_s": spread(pairs),
        "goal_s": SWAP_GOAL_S,
        "goal_met": difference_s <= SWAP_GOAL_S,
        "parts_s": {"mesh": _parts(mesh), "bare": _parts(bare)},
        "each_s": {name: [round(value, 4) for value in values] for name, values in times.items()},
    }


def _parts(swaps: Sequence[Swap]) -> dict[str, float]:
    known = [swap.parts for swap in swaps if swap.parts]
    return {name: round(median(p[name] for p in known), 4) for name in PARTS if known and name in known[0]}


# -- storms


def bound(story: Story, tenure_s: float) -> Bound:
    """Return the bound, from the longest measured pieces."""
    loads = [life.ready_at - life.started_at for life in story.lives if life.ready_at is not None]
    drain_s = max(request.service_s for request in story.served)
    return Bound(max(loads), tenure_s, drain_s, max(_stops(story), default=0.0))


def _stops(story: Story) -> list[float]:
    """How long each instance took to exit once it was told to and its last request had ended."""
    found = []
    for life in story.lives:
        if life.stopped_at is not None and life.draining_at is not None:
            ends = [request.ended_at for request in story.served_by(life.instance)]
            found.append(life.stopped_at - max([life.draining_at, *(end for end in ends if end <= life.stopped_at)]))
    return found


def turn_waits(story: Story) -> list[float]:
    """Return, for each life, how long its model had waited for it.

    That is until its first admission; since the arrival of its first request or, if that is later, since the last
    admission to the previous instance of the model: before that it waited behind others of its own.
    """
    last_admission: dict[str, float] = {}
    waits = []
    for life in sorted(story.lives, key=lambda life: life.started_at):
        served = story.served_by(life.instance)
        if not served:
            continue
        since = max(min(request.arrived_at for request in served), last_admission.get(life.model, 0.0))
        waits.append(served[0].admitted_at - since)
        last_admission[life.model] = served[-1].admitted_at
    return waits


def restarts(story: Story) -> int:
    """Return how often a model made room and was started again with nobody served in between: a swap for nothing."""
    lives = sorted(story.lives, key=lambda life: life.started_at)
    return sum(old.model == new.model and old.draining_at is not None for old, new in pairwise(lives))


def throughput_per_s(story: Story) -> float:
    """Return how many requests an instance served per second of the time in which one served."""
    busy_s = 0.0
    for life in story.lives:
        served = story.served_by(life.instance)
        if served:
            busy_s += max(request.ended_at for request in served) - served[0].admitted_at
    return len(story.served) / busy_s if busy_s else 0.0


def storm_summary(storm: Storm) -> dict[str, Any]:
    """Judge one storm. ``problems`` says in words what is wrong; empty if nothing is."""
    found: dict[str, Any] = {
        "name": storm.name,
        "requests": storm.requests,
        "rate_per_s": round(storm.rate_per_s, 2),
        "answered": len(storm.first_token_s),
        "failures": list(storm.failures),
    }
    problems = [f"{len(storm.failures)} requests failed, the first: {failure}" for failure in storm.failures[:1]]
    if len(storm.first_token_s) + len(storm.failures) != storm.requests:
        problems.append(f"only {len(storm.first_token_s)} of {storm.requests} requests were answered")
    if len(storm.story.served) < len(storm.first_token_s):
        problems.append(f"the node's log shows {len(storm.story.served)} of {len(storm.first_token_s)} answers")
    if storm.story.served:
        figures = _waiting(storm)
        problems += _broken(storm, figures)
        found |= figures
    return found | {"problems": problems}


def _waiting(storm: Storm) -> dict[str, Any]:
    story, limits = storm.story, bound(storm.story, storm.tenure_s)
    waits, turns = [request.wait_s for request in story.served], turn_waits(story)
    return {
        "swaps": len(story.lives) - 1,
        "restarts": restarts(story),
        "served_nobody": sum(not story.served_by(life.instance) for life in story.lives),
        "throughput_per_s": round(throughput_per_s(story), 2),
        "longest_turn_wait_s": round(max(turns), 3),
        "wait_s": {"p50": _p(waits, 50), "p99": _p(waits, 99), "longest": round(max(waits), 3)},
        "first_token_s": {f"p{n}": _p(storm.first_token_s, n) for n in (50, 99, 100) if storm.first_token_s},
        "bound_s": round(limits.full_s, 3),
        "stated_bound_s": round(limits.stated_s, 3),
        "pieces_s": {
            "load": round(limits.load_s, 3),
            "tenure": limits.tenure_s,
            "drain": round(limits.drain_s, 3),
            "stop": round(limits.stop_s, 3),
        },
    }


def _p(values: Sequence[float], percent: float) -> float:
    return round(percentile(values, percent), 3)


def _broken(storm: Storm, figures: Mapping[str, Any]) -> list[str]:
    judged = {"a model waited for its turn": figures["longest_turn_wait_s"]}
    if storm.keeps_up:
        judged["a request waited"] = figures["wait_s"]["longest"]
    limit_s = figures["bound_s"]
    found = [f"{what} {value:.2f} s, the bound is {limit_s:.2f} s" for what, value in judged.items() if value > limit_s]
    if figures["restarts"]:
        found.append(f"{figures['restarts']} times a model made room and was itself started again, next")
    return found


# -- for people


def table(found: Mapping[str, Any]) -> str:
    lines = [*_swap_lines(found["swap"])] if found.get("swap") else []
    for storm in found.get("storms", ()):
        lines += ["", *_storm_lines(storm)]
    return "\n".join(lines)


def _swap_lines(swap: Mapping[str, Any]) -> list[str]:
    header = f"{'ms':8}{'median':>9}{'p25':>8}{'p75':>8}{'min':>8}{'max':>8}   "
    lines = [
        f"swap: {swap['swaps']} times each, from the request (by hand: SIGTERM) to the first token",
        header + "".join(f"{part:>8}" for part in PARTS),
    ]
    for name in ("mesh", "bare"):
        figures, parts = swap[f"{name}_s"], swap["parts_s"][name]
        cells = "".join(f"{figures[key] * 1000:8.0f}" for key in ("p25", "p75", "min", "max"))
        tail = "".join(f"{parts[part] * 1000:8.0f}" if part in parts else f"{'-':>8}" for part in PARTS)
        lines.append(f"{name:8}{figures['median'] * 1000:9.0f}{cells}   {tail}")
    pair = swap["paired_difference_s"]
    verdict = "met" if swap["goal_met"] else "MISSED"
    lines.append(
        f"difference of the medians {swap['difference_s'] * 1000:+.0f} ms (pairs: median {pair['median'] * 1000:+.0f}, "
        f"p25 {pair['p25'] * 1000:+.0f}, p75 {pair['p75'] * 1000:+.0f}); goal <= {swap['goal_s'] * 1000:.0f}: {verdict}"
    )
    return lines


def _storm_lines(storm: Mapping[str, Any]) -> list[str]:
    first = f"storm, {storm['name']}: {storm['requests']} requests A/B/A/B at {storm['rate_per_s']:g}/s"
    lines = [f"{first}, {storm['answered']} answered 200, {len(storm['failures'])} failed"]
    if "swaps" in storm:
        wait, seen, pieces = storm["wait_s"], storm["first_token_s"], storm["pieces_s"]
        within = "" if storm["longest_turn_wait_s"] <= storm["stated_bound_s"] else ", which it exceeds"
        lines += [
            f"  {storm['swaps']} swaps, {storm['restarts']} of them to the same model, "
            f"{storm['served_nobody']} instances that served nobody; "
            f"while one serves: {storm['throughput_per_s']:.1f} requests/s",
            f"  longest wait for a turn {storm['longest_turn_wait_s']:.2f} s, bound {storm['bound_s']:.2f} s; "
            f"without the own instance's leaving (SPEC.md 3) {storm['stated_bound_s']:.2f} s{within}",
            "  bound from the longest " + ", ".join(f"{name} {value:.2f} s" for name, value in pieces.items()),
            f"  whole waits: p50 {wait['p50']:.2f}, p99 {wait['p99']:.2f}, longest {wait['longest']:.2f} s",
        ]
        if seen:
            lines.append(
                f"  to the first token: p50 {seen['p50']:.2f}, p99 {seen['p99']:.2f}, longest {seen['p100']:.2f} s"
            )
    return lines + [f"  FAILED: {problem}" for problem in storm["problems"]]
