"""Which GPUs the settings of a profile leave to the node, as llama-server and CUDA will understand them. Pure.

A profile's ``devices``, and the environment of the node, say which GPUs it *may* use; the node picks among them. What
counts or names the GPUs that the child sees (``-ts``, ``-dev``, ``-mg``, CUDA_VISIBLE_DEVICES in the profile's
``env``) says which it *will* use: nothing is left to pick then.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mesh.core.devices import Gpu
from mesh.core.launch_options import LaunchOptions
from mesh.core.placement import Need

_NUMBERED = re.compile(r"[A-Za-z]*(\d+)")
_PREFIXED = re.compile(r"(?:gpu|cuda|hip|rocm)?(\d+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Choice:
    """As the fields of ``Need`` with these names. ``gpus`` empty: it will run without any."""

    gpus: tuple[str, ...] | None = None
    all_gpus: bool = False
    proportions: tuple[float, ...] = ()
    single: bool = False

    def apply(self, need: Need) -> Need:
        return replace(need, gpus=self.gpus, all_gpus=self.all_gpus, proportions=self.proportions, single=self.single)


def named(gpu: Gpu, name: str) -> bool:
    """Whether *name* means *gpu*: "1", "gpu1", "CUDA1", its UUID or, as for CUDA, the beginning of that."""
    if match := _PREFIXED.fullmatch(name):
        return gpu.kind == f"gpu{match[1]}" or (int(match[1]) == gpu.index and gpu.combinable)
    return bool(name) and gpu.uuid.lower().startswith(name.lower())


def visible(text: str, gpus: Sequence[Gpu]) -> tuple[Gpu, ...]:
    """Return those of *gpus* that CUDA_VISIBLE_DEVICES=*text* shows, in its order; an unknown one ends the list."""
    shown: list[Gpu] = []
    for name in text.split(","):
        gpu = next((gpu for gpu in gpus if named(gpu, name.strip())), None)
        if gpu is None:
            break
        shown.append(gpu)
    return tuple(shown)


def choose(
    options: LaunchOptions,
    gpus: Sequence[Gpu],
    *,
    allowed: Sequence[str] = (),
    own: str | None = None,
    inherited: str | None = None,
) -> Choice:
    """Return what is left to pick among *gpus*.

    *allowed*: the profile's ``devices``. *own* and *inherited*: CUDA_VISIBLE_DEVICES, or the other vendor's variable,
    of the profile and of the node.
    """
    seen, fixed, limited = _seen(gpus, allowed, own, inherited)
    if own is None and allowed and gpus and not seen:
        return Choice(tuple(allowed), all_gpus=True)  # none of them is there: nowhere, rather than on the CPU
    if options.devices is not None:
        named_by_child = _by_number(options.devices, seen)
        if named_by_child is not None:
            seen, fixed = named_by_child, True
    if options.split_mode == "none":
        return _one(options, seen, fixed=fixed, limited=limited)
    kinds = tuple(gpu.kind for gpu in seen)
    if any(options.tensor_split) and seen:
        shares = (*options.tensor_split, *[0.0] * len(seen))[: len(seen)]
        return Choice(kinds, True, shares if any(shares) else ())
    if fixed or options.main_gpu > 0:
        return Choice(kinds, all_gpus=bool(kinds))
    single = any(not gpu.combinable for gpu in seen)
    return Choice(kinds if limited or not kinds else None, single=single)


def _seen(
    gpus: Sequence[Gpu], allowed: Sequence[str], own: str | None, inherited: str | None
) -> tuple[tuple[Gpu, ...], bool, bool]:
    """Return the GPUs that the child could see, whether the node must leave it at that, and whether it is fewer."""
    if own is not None:
        return visible(own, gpus), True, True
    if allowed:
        return tuple(gpu for name in allowed for gpu in gpus if named(gpu, name)), False, True
    if inherited is not None:
        return visible(inherited, gpus), False, True
    return tuple(gpus), False, False


def _one(options: LaunchOptions, seen: tuple[Gpu, ...], *, fixed: bool, limited: bool) -> Choice:
    """``-sm none``: one GPU, the one that ``-mg`` names if the numbers are the user's."""
    if fixed or options.main_gpu > 0:
        chosen = seen[options.main_gpu : options.main_gpu + 1]
        return Choice(tuple(gpu.kind for gpu in chosen), all_gpus=bool(chosen), single=True)
    return Choice(tuple(gpu.kind for gpu in seen) if limited or not seen else None, single=True)


def _by_number(names: Sequence[str], seen: tuple[Gpu, ...]) -> tuple[Gpu, ...] | None:
    """Return the GPUs that llama.cpp's names ("CUDA1") mean: numbers among those it sees; None if unknown."""
    if tuple(names) == ("none",):
        return ()
    numbers = [int(match[1]) for name in names if (match := _NUMBERED.fullmatch(name))]
    if len(numbers) != len(names) or not all(number < len(seen) for number in numbers):
        return None
    return tuple(seen[number] for number in dict.fromkeys(numbers))
