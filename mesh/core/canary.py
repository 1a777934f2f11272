"""Is a new build too slow? Compares what two servers did in rounds that alternated. Pure.

What disturbs a measurement (other load, a processor that grows hot) only ever makes it slower, so of each server the
best round counts: it is what the program can do, and a mean is what the machine was doing meanwhile. On a busy machine
one of the two may never have had a quiet moment. But rounds that were run one after the other had the same company, so
most of them must tell of the loss, too. Measured with a build against itself on two cores at a load of 8: after 8
rounds of each the best ones were 30 % apart in 14 % of the cases, both measures in 2 %, and after 24 in none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol


class Measured(Protocol):
    """The speed of one round, in tokens per second; both are positive."""

    @property
    def prefill_tps(self) -> float: ...
    @property
    def decode_tps(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Change:
    """One kind of speed, before and after, each in its best round."""

    what: str  #: "prefill" or "decode"
    old_tps: float
    new_tps: float
    loss: float  #: the share of the old speed that is certainly lost; 0 if nothing is

    def __str__(self) -> str:
        return f"{self.what} lost {self.loss:.0%}: {self.old_tps:.4g} tok/s before, {self.new_tps:.4g} now"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of both kinds of speed, and which of them lost more than is allowed."""

    prefill: Change
    decode: Change
    too_slow: tuple[Change, ...]

    @property
    def accepted(self) -> bool:
        return not self.too_slow


def judge(old: Sequence[Measured], new: Sequence[Measured], max_slowdown: float) -> Verdict:
    """Compare the rounds of both. *max_slowdown* is the share that may be lost; 1 accepts everything.

    Rounds of the same number are taken to have been run one after the other (``rounds_order``).
    """
    assert old, "there must be a round to compare with"
    assert new, "there must be a round to compare"
    prefill = _change("prefill", [s.prefill_tps for s in old], [s.prefill_tps for s in new])
    decode = _change("decode", [s.decode_tps for s in old], [s.decode_tps for s in new])
    return Verdict(prefill, decode, tuple(change for change in (prefill, decode) if change.loss > max_slowdown))


def _change(what: str, old: Sequence[float], new: Sequence[float]) -> Change:
    best = 1.0 - max(new) / max(old)
    usual = 1.0 - median(after / before for before, after in zip(old, new, strict=False))
    return Change(what, max(old), max(new), max(0.0, min(best, usual)))


def rounds_order(count: int) -> list[bool]:
    """Return in which order *count* rounds of each are run, True for the new one: old, new, new, old, old, new ...

    So neither of them always comes second, when the caches are warm and the processor is hot.
    """
    return [new for n in range(count) for new in ((False, True) if n % 2 == 0 else (True, False))]
