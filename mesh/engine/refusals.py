"""The words for "no": each says what is the matter, with numbers, and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mesh.config.profile import Profile
from mesh.core.backoff import Failure
from mesh.core.footprint import Footprint, Source
from mesh.core.lifecycle import State
from mesh.core.placement import Need, again
from mesh.core.resources import Resources
from mesh.core.world import InstanceView, Refusal
from mesh.engine.holders import in_words
from mesh.engine.kinds import kind_of
from mesh.engine.memory_report import Holder, MemoryReport, capacity_details
from mesh.errors import (
    CapacityError,
    EngineMissingError,
    InstanceError,
    MeshError,
    QueueFullError,
    QueueTimeoutError,
    TooLargeError,
    UnknownModelError,
)

#: Log lines of a child that an error message quotes.
QUOTED_LINES = 8


def queue_full(model: str, limit: int) -> QueueFullError:
    return QueueFullError(f"Queue full: {limit} requests already wait for '{model}' (max_queue_size)")


def node_queue_full(limit: int) -> QueueFullError:
    return QueueFullError(f"Queue full: {limit} requests already wait on this node (max_total_queue_entries)")


def queue_timeout(
    model: str, waited_s: float, instances: Sequence[InstanceView], footprint: Footprint | None, report: MemoryReport
) -> QueueTimeoutError:
    """Say what the request waited for: its own instances, or the memory that others hold."""
    details = None
    if any(i.state is State.SPAWNING for i in instances):
        why = "the model is still loading"
    elif any(i.state is State.READY for i in instances):
        why = "all its slots are taken"
    elif footprint is None:
        why = "how much memory it needs could not be looked up yet"
    else:
        why, details = in_the_way(footprint.need, report), capacity_details(footprint.need, report)
    text = f"Queue timeout: waited {waited_s:.1f} s for '{model}'; {why} (max_wait_in_queue_ms)"
    return QueueTimeoutError(text, details=details)


def in_the_way(need: Need, report: MemoryReport) -> str:
    """Return who has the memory that *need* waits for."""
    holders = [f"{h.model_id} ({_doing(h)}, {in_words(h.memory)})" for h in report.holders]
    if foreign := in_words(report.foreign) if report.foreign.mib else "":
        holders.append(f"other programs ({foreign})")
    held = f"; memory is held by {', '.join(holders)}" if holders else ""
    stuck = "; pinned models are never evicted: unload one" if any(h.pinned for h in report.holders) else ""
    return f"it needs {in_words(again(need, Resources()))}, free is {in_words(report.free)}{held}{stuck}"


def _doing(holder: Holder) -> str:
    if holder.state is not State.READY:
        return str(holder.state)
    return "busy" if holder.active else "pinned" if holder.pinned else "idle"


def gone(key: str) -> UnknownModelError:
    return UnknownModelError(f"Model '{key}' was removed from the cookbook while the request waited", param="model")


def refused(
    profile: Profile,
    refusal: Refusal,
    footprint: Footprint | None,
    report: MemoryReport,
    failure: Failure | None,
    now: float,
) -> MeshError:
    """Return the error for a plan's refusal of a known model."""
    model = profile.id
    match refusal:
        case Refusal.NOT_HERE:
            return CapacityError(f"'{model}' is not started on this node: max_instances is 0", retry_after_s=None)
        case Refusal.TOO_LARGE if footprint is not None:
            return _too_large(model, footprint, report)
        case Refusal.FAILING if failure is not None:
            return failed(model, failure, now)
        case _:
            return UnknownModelError(f"Model '{model}' not found in local cookbook or any peer", param="model")


def failed(model: str, failure: Failure, now: float) -> InstanceError:
    """Return the error for a model that does not start, with its last log lines."""
    wait_s = max(0, math.ceil(failure.retry_at - now))
    what = "crashed" if failure.kind == "crash" else "failed to start"
    parts = [f"'{model}' {what}: {failure.reason}"]
    if failure.count > 1:
        parts.append(f"; {failure.count} failures in a row, next try in {wait_s} s")
    if failure.log_tail:
        parts.append("; last log lines:\n" + "\n".join(failure.log_tail[-QUOTED_LINES:]))
    kind = EngineMissingError if failure.kind == "engine" else InstanceError
    return kind("".join(parts), retry_after_s=max(1, wait_s))


def to_correct(reason: str, profile: Profile) -> str:
    """Return *reason* with what an operator can correct, for a child that did not accept what it was started with."""
    model = kind_of(profile).expected_model(profile) or profile.hf_repo
    what = f"the model ({model}) or the arguments" if model else "the arguments"
    return f"{reason}; if it stays like this, correct {what} of '{profile.id}' in the cookbook"


def _too_large(model: str, footprint: Footprint, report: MemoryReport) -> TooLargeError:
    need = footprint.need
    only = f" on {', '.join(need.gpus)}" if need.gpus is not None else " on one GPU" if need.single else ""
    hint = "Raise the limit that is too low, or use a smaller context or quantisation"
    if need.gpus and not set(need.gpus) & report.capacity.mib.keys():
        hint = "Correct 'devices' in the cookbook: this machine has no such GPU"
    elif footprint.source is Source.ESTIMATED:
        hint += ", or state estimated_vram_mb and estimated_sysmem_mb if you know that it needs less"
    elif footprint.source is Source.LEARNED:
        hint += "; it was seen to use that much (to forget that, delete the footprints file beside metrics_path)"
    return TooLargeError(
        f"'{model}' needs {in_words(again(need, Resources()))}{only} ({footprint.source}); the node's whole budget is "
        f"{in_words(report.capacity)}. {hint}.",
        details=capacity_details(need, report),
    )
