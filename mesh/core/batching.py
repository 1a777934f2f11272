"""How llama-server divides its context among slots and its work into batches; the sizes of its buffers follow.

The rules are those of ``llama_context`` and ``server.cpp`` in b11549.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core.architecture import Shape
from mesh.core.launch_options import LaunchOptions

#: What llama-server takes for ``-np auto``.
_AUTO_SLOTS = 4
#: Tokens that a draft model proposes at once (``--spec-draft-n-max``'s default); each is checked.
_DRAFTED = 3
#: Contexts are rounded up to this many tokens.
_STEP = 256
#: More tokens or slots than anybody can have; it keeps the numbers of a mistyped option from growing without bound.
_MOST_TOKENS = 2**40
_MOST_SLOTS = 2**20


@dataclass(frozen=True, slots=True)
class Batching:
    slots: int
    unified: bool  #: one cache that all slots share
    streams: int  #: separate caches
    context: int  #: tokens of all slots together
    cells: int  #: tokens that one cache holds
    window_cells: int  #: the same where the model has a window; 0 = it has none
    ubatch: int  #: tokens that are computed at once, the same number of each slot
    outputs: int  #: tokens of those that get an answer


def padded(tokens: int) -> int:
    return -(-tokens // _STEP) * _STEP


def batching(shape: Shape, options: LaunchOptions) -> Batching:
    """Return how a server with *options* divides the work with a model of *shape*."""
    slots = min(_AUTO_SLOTS if options.slots is None else max(1, options.slots), _MOST_SLOTS)
    unified = options.slots is None if options.kv_unified is None else options.kv_unified
    streams = 1 if unified else slots
    wanted = max(1, min(options.context if options.context > 0 else shape.context, _MOST_TOKENS))
    cells = max(_STEP, padded(padded(wanted) // streams))
    context = cells * streams
    ubatch = _ubatch(shape, options, wanted)
    tokens = -(-ubatch // slots) * slots
    answers = slots * (1 if options.draft is None else 1 + _DRAFTED)
    return Batching(
        slots=slots,
        unified=unified,
        streams=streams,
        context=context,
        cells=cells,
        window_cells=_window_cells(shape, options, cells, ubatch, slots if unified else 1),
        ubatch=tokens,
        outputs=tokens if options.embedding or options.rerank else min(tokens, answers),
    )


def _ubatch(shape: Shape, options: LaunchOptions, context: int) -> int:
    batch = options.batch if options.batch > 0 else context
    return max(1, min(options.ubatch or batch, batch, context if shape.causal else padded(context)))


def _window_cells(shape: Shape, options: LaunchOptions, cells: int, ubatch: int, slots: int) -> int:
    if not shape.window:
        return 0
    return cells if options.swa_full else min(cells, padded(shape.window * slots + ubatch))
