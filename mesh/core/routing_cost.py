"""The cost of serving one request on one node, in seconds, term by term. Pure arithmetic; ``routing`` compares.

    queue     until a place is free: those ahead of it beyond the slots, each for the mean service time; and the turns
              of other models that are waited for there and want the same memory
    load      until the model is there, if it is not; of a load under way only the rest
    prefill   the part of the prompt that is not cached, at the speed under the load to expect there
    decode    the answer, likewise
    network   one round trip, and a little for the hop itself, so that the local node wins a tie
    crowding  what this request takes from those that it would compute with, from those who wait for the memory, and
              from whoever loads again what has to go for it

The last one is not spent by this request but by others. Without it each request is served where it alone is best off,
and all are worse off: a fast node is crowded until it is slow, and models push each other out of memory in turns.

Each term is monotone in each figure of the load: more busy, waiting or pending never makes a node cheaper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import exp
from statistics import median

from mesh.core.node_state import Fit, Kind, ProfileState
from mesh.core.routing_view import Candidate, Work
from mesh.core.speed import SHARING, SLICING, slowdown

#: Figures of which no node knows anything. A middling model on a middling GPU: 7-14B, 4 bits, 400 GB/s. What matters is
#: that they are the same for all, and that the first request replaces them.
PREFILL_TPS = 800.0
DECODE_TPS = 35.0
#: The median answer of published traces is 130-250 tokens.
TOKENS = 200.0
#: A load reads the file: from a SATA SSD or a busy NVMe 500 MiB/s, after the process has started and initialised CUDA.
LOAD_BYTES_MIB_S = 500.0
LOAD_BASE_S = 3.0
LOAD_S = 20.0  #: if the size is not known either
#: llama-server's own choice if nobody sets --parallel
SLOTS = 4

#: A load under way has at least this part of its time to go: it is not done until the record says so.
REST = 0.1
#: Making room: SIGTERM, exit, and the driver's memory comes back.
EVICT_S = 1.0
#: Waiting for room: the tenure of a busy incumbent (15 s by default) on average half over, then it drains.
WAIT_S = 8.0
_ROOM_S: Mapping[str, float] = {Fit.EVICT: EVICT_S, Fit.WAIT: WAIT_S}
#: Loads that evicting a model costs others: whoever wants it next loads it again. Below 1, models chase each other
#: around the mesh (benchmarks.routing: with 0 the mean latency is a tenth longer, with 2 no better).
RELOAD = 1.0
#: The same for a load in free memory: one copy more that somebody has to make room for later. Requests that come close
#: together rather wait for one load than cause two.
SPREAD = 0.5
#: Of what ``SLICING`` says, the part by which it delays each request of other instances on the same GPUs: it is there
#: only for a part of their time. 0 lets small models crowd out the only home of a big one (p99 a tenth longer).
OVERLAP = 0.5
#: Whoever claims less does not know; and a cost stays a finite number.
_SLOWEST_TPS = 0.001
#: Of a link that was not measured: between continents it is 0.15, in a house 0.0005.
RTT_S = 0.02
HOP_S = 0.002

#: A record's load counts 1/e after so many service times: by then most of those that were counted have gone.
FORGET = 2.0
#: The share of the slots that is taken, in the long run, on a node of which nothing is known.
USUAL = 0.3


@dataclass(frozen=True, slots=True)
class Prior:
    """What is assumed of a node that has not told: the median of those that have, else the constants above."""

    load_s: float | None
    prefill_tps: float
    decode_tps: float
    service_s: float | None


def prior_of(profiles: Iterable[ProfileState]) -> Prior:
    """Return what *profiles*, one model's on several nodes, let expect of one more."""
    known = list(profiles)
    return Prior(
        _median(p.load_s for p in known),
        _median(p.prefill_tps for p in known) or PREFILL_TPS,
        _median(p.decode_tps for p in known) or DECODE_TPS,
        _median(p.service_s for p in known),
    )


@dataclass(frozen=True, slots=True)
class Estimate:
    """The terms, and the figures behind them that ``routing_reasons`` tells."""

    terms: dict[str, float]
    ahead: float  #: requests there, those of others as far as they are believed, and the own ones
    slots: int  #: 0 = unlimited
    company: float  #: requests that it would run with on its instance
    service_s: float
    load_s: float  #: a whole load, without making room
    prompt_tokens: float  #: to be processed
    prefill_tps: float  #: alone
    tokens: float  #: to be generated
    decode_tps: float  #: alone


def estimate(work: Work, candidate: Candidate, profile: ProfileState, prior: Prior) -> Estimate:
    """Return what serving *work* at *candidate* costs; *profile* is the candidate's."""
    prompt = work.prompt_tokens * (1.0 - min(1.0, max(0.0, candidate.affinity)))
    tokens = expected_tokens(work)
    prefill_tps = max(_SLOWEST_TPS, profile.prefill_tps or prior.prefill_tps)
    decode_tps = max(_SLOWEST_TPS, profile.decode_tps or prior.decode_tps)
    alone_s = prompt / prefill_tps + tokens / decode_tps
    service_s = profile.service_s or prior.service_s or work.prompt_tokens / prefill_tps + tokens / decode_tps
    slots = profile.slots if profile.ready else SLOTS
    ahead = _others(candidate, slots, service_s) + candidate.own_now
    company = (min(ahead, slots - 1.0) if slots else ahead) / max(1, profile.ready)
    load_s = _whole_load_s(candidate, profile, prior)
    slow = slowdown(company, candidate.beside.computing)
    terms = {
        "queue": _queue_s(profile, ahead, slots, service_s, load_s) + _turn_s(candidate, load_s),
        "load": _load_s(candidate, profile, load_s),
        "prefill": prompt / prefill_tps * slow,
        "decode": tokens / decode_tps * slow,
        "network": 0.0 if candidate.local else (RTT_S if candidate.rtt_s is None else candidate.rtt_s) + HOP_S,
        "crowding": _crowding_s(candidate, profile, alone_s, company, slots, load_s),
    }
    return Estimate(terms, ahead, slots, company, service_s, load_s, prompt, prefill_tps, tokens, decode_tps)


def expected_tokens(work: Work) -> float:
    """Return how long the answer is going to be: its limit is rarely reached, but never passed."""
    if work.kind in (Kind.EMBEDDING, Kind.RERANK):
        return 0.0
    usual = TOKENS if work.tokens is None else work.tokens
    return usual if work.max_tokens is None else min(usual, float(max(0, work.max_tokens)))


def under_way(candidate: Candidate, profile: ProfileState) -> bool:
    """Whether the model is being loaded there, for somebody else or for this node's own request."""
    if profile.ready:
        return False
    return profile.loading > 0 or (candidate.loading_for_s is not None and profile.fit != Fit.WAIT)


def _others(candidate: Candidate, slots: int, service_s: float) -> float:
    """Return how many requests of others are there: as reported, and the older that is, the more what is usual."""
    certain = exp(-max(0.0, candidate.age_s) / (FORGET * max(1.0, service_s)))
    return candidate.reported * certain + USUAL * (slots or SLOTS) * (1.0 - certain)


def _queue_s(profile: ProfileState, ahead: float, slots: int, service_s: float, load_s: float) -> float:
    if not slots:
        return 0.0
    wait = max(0.0, ahead - slots + 1.0) * service_s / slots
    more = profile.ready and profile.ready + profile.loading < profile.max_instances and profile.fit == Fit.NOW
    return min(wait, load_s) if more else wait  # another instance is started beside those that are full


def _whole_load_s(candidate: Candidate, profile: ProfileState, prior: Prior) -> float:
    if profile.load_s is not None:
        return profile.load_s
    if prior.load_s is not None:
        return prior.load_s
    return LOAD_S if candidate.size_mib is None else LOAD_BASE_S + candidate.size_mib / LOAD_BYTES_MIB_S


def _load_s(candidate: Candidate, profile: ProfileState, load_s: float) -> float:
    if profile.ready:
        return 0.0
    if under_way(candidate, profile):
        passed = candidate.loading_for_s
        passed = load_s / 2 + candidate.age_s if passed is None else passed  # seen at a random moment of it
        return max(load_s - max(0.0, passed), REST * load_s)
    room_s = _ROOM_S.get(profile.fit, 0.0)
    return load_s + room_s + (candidate.beside.service_s if profile.fit == Fit.WAIT else 0.0)


def _turn_s(candidate: Candidate, load_s: float) -> float:
    """Return how long it waits for the turns of other profiles, which want the memory as well."""
    return candidate.beside.contenders * (WAIT_S + load_s)


def _crowding_s(
    candidate: Candidate, profile: ProfileState, alone_s: float, company: float, slots: int, load_s: float
) -> float:
    """Return what it costs others: those it computes with, who wait for the memory, and who must load again for it."""
    beside = candidate.beside
    slower = (SHARING * company + OVERLAP * SLICING * beside.requests) * alone_s
    later = beside.starved * alone_s / (slots or SLOTS)
    decided = profile.ready or under_way(candidate, profile)
    again = 0.0 if decided else (RELOAD if profile.fit in (Fit.EVICT, Fit.WAIT) else SPREAD) * load_s
    return slower + later + again


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return median(known) if known else None
