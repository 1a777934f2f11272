"""Why a node is ranked where it is, in short English: for ``GET /admin/route`` and ``llama-mesh route MODEL``."""

from __future__ import annotations

from collections.abc import Mapping

from mesh.core.node_state import Fit, ProfileState
from mesh.core.routing_cost import Estimate, expected_tokens, under_way
from mesh.core.routing_view import Candidate, Work

_ROOM: Mapping[str, str] = {Fit.EVICT: ", an idle model has to go", Fit.WAIT: ", it has to wait for memory"}


def exclusion(work: Work, candidate: Candidate) -> str | None:
    """Return why *candidate* must not get *work*, or None. The request's way comes first, then the node."""
    if candidate.key in work.tried:
        return "already tried"
    if not candidate.local:
        if candidate.key in work.visited:
            return "the request came through it"
        if work.hops >= work.max_hops:
            return f"hop limit of {work.max_hops} reached"
        if candidate.rejected is not None:
            return candidate.rejected
        if not candidate.reachable:
            return "not reachable"
        if candidate.circuit_s is not None:
            return f"circuit open for another {candidate.circuit_s:.1f} s"
    if candidate.draining:
        return "draining"
    return _of_profile(work, candidate.profile)


def _of_profile(work: Work, profile: ProfileState | None) -> str | None:
    if profile is None:
        return f"does not have {work.profile}"
    if work.kind is not None and profile.kind != work.kind:
        return f"{work.profile} is for {profile.kind} there, not for {work.kind}"
    if profile.fit == Fit.NEVER and not profile.ready and not profile.loading:
        return "cannot load it"
    return None


def reasons(work: Work, candidate: Candidate, profile: ProfileState, found: Estimate) -> tuple[str, ...]:
    """Return one text for each term of *found* that is not zero, in their order."""
    told = {
        "queue": _queue(candidate, found),
        "load": _load(candidate, profile, found),
        "prefill": _rate(found.prompt_tokens, found.prefill_tps, profile.prefill_tps, found, candidate.beside.computing)
        + (f", {candidate.affinity:.0%} cached" if candidate.affinity > 0 else ""),
        "decode": _rate(found.tokens, found.decode_tps, profile.decode_tps, found, candidate.beside.computing)
        + (f", at most {work.max_tokens}" if work.max_tokens is not None else "")
        + (", length not known" if work.tokens is None and expected_tokens(work) != work.max_tokens else ""),
        "network": "round trip" if candidate.rtt_s is not None else "round trip, not measured",
        "crowding": _crowding(candidate, profile, found),
    }
    return tuple(f"{name} {seconds:.3g} s: {told[name]}" for name, seconds in found.terms.items() if seconds)


def _queue(candidate: Candidate, found: Estimate) -> str:
    turns = candidate.beside.contenders
    others = f"; other models that wait for the memory: {turns}" if turns else ""
    own = f", {candidate.own_now} of them sent from here" if candidate.own_now else ""
    age = f", as of {candidate.age_s:.1f} s ago" if candidate.age_s >= 1 else ""
    return f"about {found.ahead:.3g} ahead{own}{age}, {found.slots} slots, {found.service_s:.3g} s each{others}"


def _load(candidate: Candidate, profile: ProfileState, found: Estimate) -> str:
    whole = f"{found.load_s:.3g} s" + ("" if profile.load_s is not None else " (a guess)")
    if under_way(candidate, profile):
        return f"the rest of a load of {whole}"
    return f"not loaded; a load takes {whole}{_ROOM.get(profile.fit, '')}"


def _rate(tokens: float, tps: float, known: float | None, found: Estimate, computing: int) -> str:
    guess = "" if known is not None else " (a guess)"
    beside = f", beside {found.company:.2g} others" if found.company >= 0.05 else ""
    models = f", other models at work: {computing}" if computing else ""
    return f"{tokens:.0f} tokens at {tps:.3g}/s{guess}{beside}{models}"


def _crowding(candidate: Candidate, profile: ProfileState, found: Estimate) -> str:
    beside = candidate.beside
    parts = []
    if (slower := found.company + beside.requests) >= 0.05:
        parts.append(f"{slower:.2g} others get slower")
    if beside.starved:
        parts.append(f"{beside.starved} wait longer for the memory")
    if not profile.ready and not under_way(candidate, profile):
        parts.append("what has to go is loaded again" if profile.fit in _ROOM else "one copy more takes memory")
    return ", ".join(parts) or "little"
