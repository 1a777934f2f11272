"""The words for "no": each says what is the matter, with numbers, and what would help."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mesh.config.profile import Profile
from mesh.core.backoff import Failure
from mesh.core.lifecycle import State
from mesh.core.resources import Resources
from mesh.core.scheduler import InstanceView, Refusal
from mesh.engine import llama
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


def queue_timeout(model: str, waited_s: float, instances: Sequence[InstanceView]) -> QueueTimeoutError:
    """Say what the request waited for, as far as the model's own instances tell."""
    if any(i.state is State.SPAWNING for i in instances):
        why = "the model is still loading"
    elif any(i.state is State.READY for i in instances):
        why = "all its slots are taken"
    else:
        why = "the memory it needs is in use by other models"
    return QueueTimeoutError(f"Queue timeout: waited {waited_s:.1f} s for '{model}'; {why} (max_wait_in_queue_ms)")


def gone(key: str) -> UnknownModelError:
    return UnknownModelError(f"Model '{key}' was removed from the cookbook while the request waited", param="model")


def refused(
    model: str, refusal: Refusal, need: Resources, capacity: Resources, failure: Failure | None, now: float
) -> MeshError:
    """Return the error for a plan's refusal of a known model."""
    match refusal:
        case Refusal.NOT_HERE:
            return CapacityError(f"'{model}' is not started on this node: max_instances is 0", retry_after_s=None)
        case Refusal.TOO_LARGE:
            return TooLargeError(
                f"'{model}' needs {_memory(need)}; the node's whole budget is {_memory(capacity)}. "
                "Raise max_vram_mb / max_sysmem_mb or use a smaller context or quantisation."
            )
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
    model = llama.expected_model(profile) or profile.hf_repo
    what = f"the model ({model}) or the arguments" if model else "the arguments"
    return f"{reason}; if it stays like this, correct {what} of '{profile.id}' in the cookbook"


def _memory(amount: Resources) -> str:
    return Resources({k: v for k, v in amount.mib.items() if k != "instances"}).describe()
