"""Where a request is served: ``rank`` orders the nodes by what serving it there would cost, in seconds.

The order is strict and depends on nothing but its arguments:

1. A forwarded request is served here unless that is impossible: its sender chose this node, and a second opinion on
   other figures would send it in circles (trap 60).
2. Nodes with room, then those whose queue is full, then those that must not get it (``excluded`` says why).
3. The cheapest first. Costs that differ by less than the figures are worth are ties: this node first, because a hop
   less can break less; the others take turns (``Work.turn``), so that equals share (trap 51).

Bursts spread without any news (trap 50): each request that this node has sent and that has not ended counts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from mesh.core.routing_cost import Estimate, Prior, estimate, prior_of
from mesh.core.routing_reasons import exclusion, reasons
from mesh.core.routing_view import Beside, Candidate, Work, beside

__all__ = ["Beside", "Candidate", "Ranked", "Work", "beside", "rank"]

#: Costs this close are a tie. Learned rates of one and the same machine differ by several percent from day to day.
NOISE = 0.05
NOISE_S = 0.02

_SERVED_HERE = "it was forwarded to this node, so it is served here"


@dataclass(frozen=True, slots=True)
class Ranked:
    """A candidate and its place in the order."""

    candidate: Candidate
    work: Work
    excluded: str | None = None  #: why it must not get the request; None = it may
    estimate: Estimate | None = None  #: None if it is excluded

    @property
    def terms(self) -> Mapping[str, float]:
        """Seconds by name; empty if it is excluded."""
        return self.estimate.terms if self.estimate is not None else {}

    @property
    def cost(self) -> float:
        """The sum of the terms."""
        return sum(self.terms.values())

    @property
    def full(self) -> bool:
        """Whether its queue takes no more, as far as it is known."""
        return self.candidate.full

    @property
    def reasons(self) -> tuple[str, ...]:
        """Short texts with the numbers. Made when they are asked for: a request does not ask."""
        if self.excluded is not None:
            return (self.excluded,)
        here = (_SERVED_HERE,) if self.work.forwarded and self.candidate.local else ()
        full = ("its queue is full",) if self.full else ()
        if self.estimate is None or self.candidate.profile is None:
            return here + full
        return here + full + reasons(self.work, self.candidate, self.candidate.profile, self.estimate)


def rank(work: Work, candidates: Sequence[Candidate]) -> tuple[Ranked, ...]:
    """Return *candidates* in the order in which they should be asked; the excluded ones come last."""
    prior = prior_of(c.profile for c in candidates if c.profile is not None)
    judged = [_judge(work, candidate, prior) for candidate in candidates]
    allowed = [r for r in judged if r.excluded is None]
    chosen = [r for r in allowed if work.forwarded and r.candidate.local]
    rest = [r for r in allowed if r not in chosen] if chosen else allowed
    excluded = sorted((r for r in judged if r.excluded is not None), key=_name)
    return (*chosen, *_cheapest([r for r in rest if not r.full]), *_cheapest([r for r in rest if r.full]), *excluded)


def _judge(work: Work, candidate: Candidate, prior: Prior) -> Ranked:
    why = exclusion(work, candidate)
    if why is not None or candidate.profile is None:
        return Ranked(candidate, work, why)
    return Ranked(candidate, work, None, estimate(work, candidate, candidate.profile, prior))


def _cheapest(ranked: list[Ranked]) -> Iterator[Ranked]:
    """Yield *ranked* by cost; those that tie with the cheapest of the rest in turns."""
    costs = [(r.cost, _name(r), r) for r in ranked]
    costs.sort(key=lambda entry: entry[:2])
    start = 0
    while start < len(costs):
        least = costs[start][0]
        end = start + 1
        while end < len(costs) and costs[end][0] <= least * (1 + NOISE) + NOISE_S:
            end += 1
        yield from _in_turns([r for _, _, r in costs[start:end]])
        start = end


def _in_turns(ties: list[Ranked]) -> list[Ranked]:
    """Order equals: who serves at once before who has to load, for a load costs memory besides its time."""
    ready = [r for r in ties if not r.terms.get("load")]
    return [*_turns(ready), *_turns([r for r in ties if r.terms.get("load")])]


def _turns(ties: list[Ranked]) -> list[Ranked]:
    here = [r for r in ties if r.candidate.local]
    others = sorted((r for r in ties if not r.candidate.local), key=_name)
    first = others[0].work.turn % len(others) if others else 0
    return here + others[first:] + others[:first]


def _name(ranked: Ranked) -> tuple[str, bytes]:
    return ranked.candidate.node_id, ranked.candidate.key
