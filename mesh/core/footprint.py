"""What one instance is charged: learned figure, else the cookbook's, else the estimate, else nothing known. Pure.

Each kind of memory is decided by itself: a cookbook that gives only GPU memory leaves main memory to the estimate. On
a machine without GPUs, and on one whose GPU uses the machine's memory, everything is main memory.

llama-server's prompt cache (``-cram``) grows with use up to a bound, so no sample shows it: the bound is charged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mesh.core.devices import Gpu
from mesh.core.estimate import Estimate
from mesh.core.gpu_choice import Choice
from mesh.core.launch_options import LaunchOptions
from mesh.core.placement import Need
from mesh.core.resources import RAM, VRAM, Resources

_MIB = 1024 * 1024
#: what the estimate's formulas may be off by; their worst known error on real dimensions is 1 %, most are exact
MARGIN = 1.03
#: a llama-server without its buffers: code, heap, threads, and a vocabulary of 50,000 tokens. Measured with b11549 on
#: two CPUs: 28 MiB at rest, 16 more after the first long prompt, and the vocabulary with its merges 0.4 KiB a token
PROCESS_RAM_MIB = 64
_TOKENS_INCLUDED = 50_000
_TOKEN_BYTES = 450
#: more of it with a GPU: the driver's libraries, staging buffers; a guess until it is learned
GPU_PROCESS_RAM_MIB = 256
#: CUDA context, cuBLAS and graph pools on each GPU that a process uses; gguf-parser says 250, which is too little
GPU_CONTEXT_MIB = 500
#: llama-server's own default for ``-cram``
DEFAULT_PROMPT_CACHE_MIB = 8192
#: of a limited main memory, the part that each instance's prompt cache may take unless the user says otherwise
_PROMPT_CACHE_SHARE = 16
#: and how many times its KV cache it may be
_PROMPT_CACHE_CONTEXTS = 4


class Source(StrEnum):
    LEARNED = "learned"
    COOKBOOK = "cookbook"
    ESTIMATED = "estimated"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Learned:
    """The most that instances of one launch were seen to use once they had served a request."""

    ready_ram_mib: int  #: at the first sample: the prompt cache is still empty
    peak_ram_mib: int
    gpu_mib: int = 0  #: over all GPUs together
    gpus: int = 0  #: on how many of them; 0 = the driver did not say
    samples: int = 0  #: instances that it was learned from


@dataclass(frozen=True, slots=True)
class Footprint:
    need: Need
    source: Source
    estimate: Estimate | None = None
    problem: str | None = None  #: why no instance can be started at all: a file that is missing or broken
    prompt_cache_mib: int | None = None  #: to be passed as ``-cram``; None = not to be passed
    notes: tuple[str, ...] = ()  #: what is a guess, in words
    identity: str = ""  #: of launch, engine, files and kind of machine: what is learned under it holds for it


@dataclass(frozen=True, slots=True)
class Machine:
    """What of the machine matters here."""

    gpus: tuple[Gpu, ...] = ()  #: those with memory of their own
    unified: bool = False  #: it has a GPU that uses main memory
    ram_limit_mib: int | None = None
    cpu_only: bool = False  #: the engine can use no GPU


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one launch."""

    options: LaunchOptions
    cookbook: Resources = field(default_factory=Resources)
    learned: Learned | None = None
    estimate: Estimate | None = None  #: with or without GPUs, as ``sees_gpu`` says
    file_bytes: int = 0  #: of a model that could be read but not estimated
    vocabulary: int = 0  #: tokens
    identity: str = ""
    basic_ram_mib: int = PROCESS_RAM_MIB  #: what its program takes besides buffers and a large vocabulary
    request_bytes: int = 0  #: what a request may take in main memory, and give back

    @property
    def process_ram_mib(self) -> int:
        """What the process takes besides its buffers."""
        return self.basic_ram_mib + max(0, self.vocabulary - _TOKENS_INCLUDED) * _TOKEN_BYTES // _MIB


@dataclass(frozen=True, slots=True)
class _Figure:
    """MiB of each kind as one source has it, on one GPU; None = it does not say."""

    ram: int | None = None
    gpu: int | None = None


def sees_gpu(machine: Machine, choice: Choice) -> bool:
    """Whether an instance will use a GPU if its arguments let it."""
    return machine.unified or (bool(machine.gpus) and choice.gpus != ())


def build(known: Known, machine: Machine, choice: Choice) -> Footprint:
    """Return what an instance takes. Start and memory are decided with the same ``machine`` and ``choice``."""
    passed, bound, notes = _prompt_cache(known.options, known.estimate, machine.ram_limit_mib)
    each = _each_mib(known.estimate)
    estimated = _estimated(known, bound, each, gpu=sees_gpu(machine, choice))
    figures = {
        Source.LEARNED: _within(machine.ram_limit_mib, _learned(known, bound, each, estimated), estimated),
        Source.COOKBOOK: _Figure(known.cookbook.mib.get(RAM), known.cookbook.mib.get(VRAM)),
        Source.ESTIMATED: estimated,
    }
    figures = {source: figure for source, figure in figures.items() if figure != _Figure()}
    if machine.gpus:
        need = _divided(figures, known.estimate, each, choice)
    elif machine.unified:
        need = Need(Resources.of(ram_mib=_undivided(figures)))
    else:
        need = _pooled(figures, cpu_only=machine.cpu_only)
    source = next(iter(figures), Source.UNKNOWN)
    if source is Source.ESTIMATED and known.estimate is None:
        source, notes = Source.UNKNOWN, (*notes, "of a kind that cannot be estimated: its file's size is charged")
    notes = (*(known.estimate.notes if known.estimate else ()), *notes)
    return Footprint(need, source, known.estimate, None, passed, notes, known.identity)


def needed_ram_mib(resident_mib: int, private_mib: int, estimate: Estimate | None) -> int:
    """Return what of its resident memory an instance needs: not the pages of the model file that it has copies of.

    A GPU has copied its layers, and on a CPU llama.cpp repacks the weights of many types; the mapped originals are page
    cache that nobody reads any more (trap 45). *private_mib* is what the kernel cannot drop.
    """
    if estimate is None:
        return resident_mib
    buffers = estimate.kv.cpu + estimate.recurrent.cpu + estimate.compute.cpu + estimate.output.cpu
    weights_mib = _mib_exactly(estimate.weights.cpu + estimate.draft.cpu + estimate.projector.cpu)
    copied_mib = max(0, private_mib - PROCESS_RAM_MIB - _mib_exactly(buffers))
    return private_mib + min(resident_mib - private_mib, max(0, weights_mib - copied_mib))


def prompt_cache_mib(ram_limit_mib: int, estimate: Estimate | None) -> int:
    """Return what one instance's prompt cache may grow to where main memory is limited.

    It holds prompts as they stand in the KV cache: some times all of that is plenty for a small model.
    """
    bound = min(DEFAULT_PROMPT_CACHE_MIB, ram_limit_mib // _PROMPT_CACHE_SHARE)
    if estimate is None:
        return bound
    return min(bound, _mib_exactly(_PROMPT_CACHE_CONTEXTS * (estimate.kv.total + estimate.recurrent.total)))


def _prompt_cache(
    options: LaunchOptions, estimate: Estimate | None, ram_limit_mib: int | None
) -> tuple[int | None, int, tuple[str, ...]]:
    """Return the bound to pass (None = none), the bound to charge, and what is to be noted."""
    if options.prompt_cache_mib is not None:
        unlimited = options.prompt_cache_mib < 0
        return None, max(0, options.prompt_cache_mib), ("-cram -1: the prompt cache has no bound",) * unlimited
    if ram_limit_mib is None or options.embedding or options.rerank:
        return None, 0, ()  # embeddings are not cached
    bound = prompt_cache_mib(ram_limit_mib, estimate)
    told = (f"includes {bound} MiB for llama-server's prompt cache; -cram N in its arguments sets another bound",)
    return bound, bound, told * bool(bound)


def _mib_exactly(size: int) -> int:
    return -(-size // _MIB)


def _each_mib(estimate: Estimate | None) -> int:
    """Return what every GPU that it uses holds besides its share."""
    return GPU_CONTEXT_MIB + (_mib(estimate.compute.gpu) if estimate is not None else 0)


def _learned(known: Known, bound: int, each: int, estimated: _Figure) -> _Figure:
    """Return the peaks, the prompt cache as if it were full, the compute buffers as if all of them were touched, and
    a request as if it were as large as is expected. One that was larger, once, is not charged for ever."""
    learned = known.learned
    if learned is None:
        return _Figure()
    if known.request_bytes and estimated.ram is not None:
        learned = replace(learned, peak_ram_mib=min(learned.peak_ram_mib, estimated.ram))
    compute = _mib(known.estimate.compute.cpu) if known.estimate is not None else 0
    ready = learned.ready_ram_mib or learned.peak_ram_mib  # never seen without prompts: those may come on top
    ram = max(learned.peak_ram_mib, ready + bound + compute + _mib(known.request_bytes))
    if not learned.gpus:
        return _Figure(ram)
    on_others = (learned.gpus - 1) * min(each, learned.gpu_mib // learned.gpus)
    return _Figure(ram, learned.gpu_mib - on_others)


def _within(ram_limit_mib: int | None, figure: _Figure, estimated: _Figure) -> _Figure:
    """What ran here fits here: a peak above the whole budget was a leak or an unbounded cache, not what it needs."""
    if figure.ram is None or ram_limit_mib is None or figure.ram <= ram_limit_mib:
        return figure
    return replace(figure, ram=min(ram_limit_mib, ram_limit_mib if estimated.ram is None else estimated.ram))


def _estimated(known: Known, bound: int, each: int, *, gpu: bool) -> _Figure:
    estimate, process = known.estimate, known.process_ram_mib + bound
    if estimate is None:
        size = _mib(known.file_bytes)
        if not size:
            return _Figure()
        return _Figure(process, size + each) if gpu else _Figure(process + size)
    ram = _mib(estimate.total.cpu) + process
    if not gpu or not estimate.total.gpu:
        return _Figure(ram, 0)
    return _Figure(ram + GPU_PROCESS_RAM_MIB, _mib(estimate.total.gpu - estimate.compute.gpu) + each)


def _divided(figures: Mapping[Source, _Figure], estimate: Estimate | None, each: int, choice: Choice) -> Need:
    """On GPUs with memory of their own."""
    fixed = Resources.of(ram_mib=_first(figure.ram for figure in figures.values()))
    on_gpu = _first(figure.gpu for figure in figures.values()) if choice.gpus != () else 0
    if not on_gpu:
        return Need(fixed)
    each = min(each, on_gpu)
    grain = math.ceil(estimate.largest_layer_bytes / _MIB) if estimate is not None else 0
    return choice.apply(Need(fixed, split_mib=on_gpu - each, each_mib=each, grain_mib=grain))


def _undivided(figures: Mapping[Source, _Figure]) -> int:
    """The GPU uses main memory: both kinds are one. A cookbook that gives one of them means the whole."""
    amounts = {source: (figure.ram or 0) + (figure.gpu or 0) for source, figure in figures.items()}
    learned = figures.get(Source.LEARNED)
    if learned is not None and learned.gpu is None:  # not every driver tells what a process holds for the GPU
        return max(amounts.values())
    return next(iter(amounts.values()), 0)


def _pooled(figures: Mapping[Source, _Figure], *, cpu_only: bool) -> Need:
    """No GPU is known. Somebody who gives figures may know of one: what they leave out is not guessed.

    Unless the engine can use none: then the estimate of main memory holds, whatever is said of GPUs.
    """
    said = [figure for source, figure in figures.items() if source is not Source.ESTIMATED] or [*figures.values()]
    ram_mib = _first(f.ram for f in (figures.values() if cpu_only else said))
    return Need(Resources.of(ram_mib=ram_mib), split_mib=_first(f.gpu for f in said))


def _first(amounts: Iterable[int | None]) -> int:
    return next((amount for amount in amounts if amount is not None), 0)


def _mib(size_bytes: int) -> int:
    return math.ceil(size_bytes * MARGIN / _MIB)
