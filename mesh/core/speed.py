"""How fast this node serves a profile, learned from its own requests: what the others reckon with when they route.

Rates are kept as of a request that is *alone* on its instance: a sample is multiplied by ``slowdown`` of the company
it had, and whoever uses the figure divides by that of the company to expect. So to be popular is not to look slow.

Each figure is a weighted mean that forgets: by samples (an old one counts less with every new one) and by time. Single
samples are bounded to a factor of what is known, so one request that was stopped by a swapping machine, or whose
prompt came out of the cache, moves it a little and not far; a real change comes through within a few samples. Rates
and load times are averaged as logarithms: they differ by factors, and twice as fast and half as fast should cancel out.
"""

from __future__ import annotations

from math import exp, exp2, inf, isfinite, log
from typing import NamedTuple

import msgspec

#: What one more request on an instance adds to the time that each of its tokens takes. Measured by the field for
#: llama-server on GPUs: 4 at once get 2-2.5 times the tokens of one, so each takes 1.6-2 times as long.
SHARING = 0.25

#: The weight of the past never exceeds so many samples, so each new one moves a figure by at least 1/25.
_MOST_WEIGHT = 24.0
#: The past counts half after so long: what a model did an hour ago, before the driver was updated, says little.
_HALF_LIFE_S = 1800.0
#: Once so many samples are known, a single one is believed up to this factor away from them.
_TRUSTED_WEIGHT = 2.0
_OUTLIER = 4.0
#: Prefill faster than so much is a cached prompt rather than news, if it is not known how much was processed.
_CACHED = 1.5
#: Shorter ones measure the overhead of a request more than the speed; they count in proportion.
_WHOLE_PROMPT = 256
_WHOLE_ANSWER = 32
#: No machine does more; a clock that stood still does.
_FASTEST_TPS = 1e6
_LONGEST_S = 86_400.0
_LONGEST_TOKENS = 1e7


#: The same for one more instance that computes on the same GPUs: they take turns, but each pauses now and then.
SLICING = 0.8


def slowdown(others: float, instances: float = 0.0) -> float:
    """Return how many times longer a token takes with *others* on its instance and *instances* computing beside it."""
    return (1.0 + SHARING * max(0.0, others)) * (1.0 + SLICING * max(0.0, instances))


class Figures(NamedTuple):
    """What was learned; None = not known."""

    load_s: float | None = None  #: from the decision to start it until it serves
    prefill_tps: float | None = None  #: prompt tokens per second of a request that is alone
    decode_tps: float | None = None  #: generated tokens per second of a request that is alone
    service_s: float | None = None  #: how long a request holds its slot
    tokens: float | None = None  #: that an answer has


class Mean(msgspec.Struct):
    """One figure: a mean, how much it weighs, and when it was last touched."""

    value: float = 0.0
    weight: float = 0.0
    at: float = 0.0


class State(msgspec.Struct):
    """Everything that was learned of one profile, to be saved. Its clock does not outlive the process: ``restore``."""

    load_s: Mean
    prefill_tps: Mean
    decode_tps: Mean
    service_s: Mean
    tokens: Mean


class Speed:
    """The learned figures of one profile on this node."""

    def __init__(self) -> None:
        self._state = State(Mean(), Mean(), Mean(), Mean(), Mean())

    def observe_load(self, load_s: float, now: float) -> None:
        """An instance was started and serves, after *load_s* seconds."""
        if _sane(load_s, _LONGEST_S):
            _blend(self._state.load_s, log(load_s), 1.0, now, log(_OUTLIER))

    def observe_request(
        self,
        *,
        now: float,
        prompt_tokens: int = 0,
        ttft_s: float | None = None,
        generated: int = 0,
        decode_s: float | None = None,
        slot_s: float | None = None,
        concurrency: float = 1.0,
        shared: float = 1.0,
        processed_tokens: int | None = None,
    ) -> None:
        """A request was answered in full. None = not measured.

        *ttft_s* is from its admission to the first token, *decode_s* from there to the last one, *slot_s* how long it
        held its slot, *concurrency* how many its instance had on average meanwhile, itself included, *shared* how many
        instances computed on its GPUs on average, its own included. *processed_tokens* are those of the prompt that did
        not come out of the cache, if the answer told.
        """
        company = slowdown(concurrency - 1.0, shared - 1.0)
        company = company if isfinite(company) else 1.0
        self._observe_prefill(prompt_tokens, processed_tokens, ttft_s, company, now)
        if decode_s is not None and 1 < generated <= _LONGEST_TOKENS and _sane(decode_s, _LONGEST_S):
            rate = (generated - 1) / decode_s * company
            if _sane(rate, _FASTEST_TPS):
                weight = min(1.0, generated / _WHOLE_ANSWER)
                _blend(self._state.decode_tps, log(rate), weight, now, log(_OUTLIER))
        if slot_s is not None and _sane(slot_s, _LONGEST_S):
            _blend(self._state.service_s, slot_s, 1.0, now, inf, factor=2 * _OUTLIER)
        if _sane(generated, _LONGEST_TOKENS):
            _blend(self._state.tokens, float(generated), 1.0, now, inf, factor=2 * _OUTLIER)

    def figures(self) -> Figures:
        """Return what is known so far."""
        s = self._state
        rates = (exp(m.value) if m.weight else None for m in (s.load_s, s.prefill_tps, s.decode_tps))
        means = (m.value if m.weight else None for m in (s.service_s, s.tokens))
        return Figures(*rates, *means)

    def saved(self) -> State:
        """Return a copy of the state, for a file (``msgspec.json``)."""
        return msgspec.convert(msgspec.to_builtins(self._state), State)

    @classmethod
    def restore(cls, state: State, now: float) -> Speed:
        """Return what was *saved* by an earlier process, at *now* of this one's clock. Damaged figures are left out.

        It is believed less than what is seen now: the machine may have changed meanwhile.
        """
        speed = cls()
        for name in State.__struct_fields__:
            mean: Mean = getattr(state, name)
            logarithm = name in ("load_s", "prefill_tps", "decode_tps")
            sane = abs(mean.value) <= log(_FASTEST_TPS) if logarithm else _sane(mean.value, _LONGEST_TOKENS)
            if sane and _sane(mean.weight, 1e9):
                setattr(speed._state, name, Mean(mean.value, min(mean.weight, _TRUSTED_WEIGHT), now))
        return speed

    def _observe_prefill(
        self, prompt_tokens: int, processed_tokens: int | None, ttft_s: float | None, company: float, now: float
    ) -> None:
        tokens = prompt_tokens if processed_tokens is None else min(prompt_tokens, processed_tokens)
        if ttft_s is None or not _sane(tokens, _LONGEST_TOKENS) or not _sane(ttft_s, _LONGEST_S):
            return
        rate = tokens / ttft_s * company
        if not _sane(rate, _FASTEST_TPS):
            return
        mean = self._state.prefill_tps
        sample = log(rate)
        if processed_tokens is None and _past(mean, now) >= _TRUSTED_WEIGHT:
            sample = min(sample, mean.value + log(_CACHED))
        _blend(mean, sample, min(1.0, tokens / _WHOLE_PROMPT), now, log(_OUTLIER))


def _sane(number: float, most: float) -> bool:
    return 0.0 < number <= most


def _past(mean: Mean, now: float) -> float:
    """Return what all that was seen weighs now."""
    return min(mean.weight, _MOST_WEIGHT) * exp2(-max(0.0, now - mean.at) / _HALF_LIFE_S)


def _blend(mean: Mean, sample: float, weight: float, now: float, most: float, factor: float = inf) -> None:
    """Let *sample* move *mean*: by at most *most* beyond it, and up to *factor* times it, once it is trusted."""
    past = _past(mean, now)
    if past >= _TRUSTED_WEIGHT:
        sample = max(mean.value - most, min(sample, mean.value + most))
        sample = min(sample, mean.value * factor) if factor < inf else sample
    mean.value += (sample - mean.value) * weight / (past + weight)
    mean.weight = past + weight
    mean.at = now
