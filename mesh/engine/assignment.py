"""What the node decides for one start of an instance beyond its profile: its GPUs, their shares, its prompt cache.

Values and their words for llama-server; decides nothing and starts nothing. What the user wrote always wins. None of
it is part of ``args_hash``: the same profile on other GPUs is the same profile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mesh.config.llama_args import flag_value, has_flag
from mesh.core.devices import Devices, Gpu
from mesh.core.footprint import Footprint
from mesh.core.gpu_choice import named
from mesh.core.resources import Resources

#: which GPUs a process sees; HIP takes CUDA's variable too
VISIBLE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_PROMPT_CACHE_VARIABLE = "LLAMA_ARG_CACHE_RAM"
PROMPT_CACHE_FLAGS = ("-cram", "--cache-ram")
_MAIN_GPU_FLAGS = ("-mg", "--main-gpu")
#: their values count or name the GPUs that the process sees: among fewer of them they would mean other ones
_COUNTING_FLAGS = ("-ts", "--tensor-split", "-dev", "--device")
_COUNTING_VARIABLES = ("LLAMA_ARG_TENSOR_SPLIT", "LLAMA_ARG_DEVICE", "WHISPER_ARG_DEVICE")
#: an index that does not exist ends the list, for CUDA and for HIP; to some versions an empty list means all
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1"}


@dataclass(frozen=True, slots=True)
class Assignment:
    """What one instance was given. ``gpus``: None leaves the choice to the child, empty hides every GPU from it."""

    gpus: tuple[Gpu, ...] | None = None
    shares_mib: tuple[int, ...] = ()  #: of the model, one per GPU; empty = llama-server divides it
    prompt_cache_mib: int | None = None  #: None = as llama-server does it

    def environment(self, args: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
        """Return what the child is told that neither *args* nor *env* decide: its GPUs, and its prompt cache's bound.

        The bound goes by the variable: a llama-server that is too old for ``-cram`` ignores that, but dies of the flag.
        """
        given = has_flag(args, PROMPT_CACHE_FLAGS) or _PROMPT_CACHE_VARIABLE in env
        bounded = self.prompt_cache_mib is not None and not given
        return self._visible(args, env) | ({_PROMPT_CACHE_VARIABLE: str(self.prompt_cache_mib)} if bounded else {})

    def _visible(self, args: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
        if self.gpus is None or counts_gpus(args, env):
            return {}
        if not self.gpus:
            return dict(_NO_GPU)
        if self.gpus[0].vendor == "amd":  # HIP knows no UUIDs; it numbers them as rocm-smi does
            return {"HIP_VISIBLE_DEVICES": ",".join(str(gpu.index) for gpu in self.gpus)}
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in self.gpus)}

    def arguments(self, args: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...]:
        """Return the flags to add to *args*: those that neither they nor *env* give."""
        if self.gpus is not None and len(self.gpus) > 1 and any(self.shares_mib) and not counts_gpus(args, env):
            return ("--tensor-split", ",".join(str(share) for share in self.shares_mib))
        return ()

    def in_order_of(self, names: Sequence[str]) -> Assignment:
        """Return this with its GPUs in the order in which *names* name them; others come last."""
        if self.gpus is None or not names:
            return self
        ranks = [next((r for r, n in enumerate(names) if named(gpu, n.strip())), len(names)) for gpu in self.gpus]
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        shares = tuple(self.shares_mib[i] for i in order) if self.shares_mib else ()
        return replace(self, gpus=tuple(self.gpus[i] for i in order), shares_mib=shares)


def assign(footprint: Footprint, placed: Resources, devices: Devices) -> Assignment:
    """Return what an instance of *footprint* is told so that it takes the memory that *placed* charges."""
    gpus = tuple(gpu for gpu in devices.budgeted if placed.mib.get(gpu.kind))
    estimate = footprint.estimate
    if not devices.budgeted:
        return Assignment(None, (), footprint.prompt_cache_mib)
    if not gpus:
        # a driver context on every GPU is what it would take otherwise, but of an unknown model we must not presume
        hidden = estimate is not None and not estimate.total.gpu and not footprint.need.gpu_mib
        return Assignment(() if hidden else None, (), footprint.prompt_cache_mib)
    extra = footprint.need.each_mib + (footprint.need.grain_mib if len(gpus) > 1 else 0)
    shares = tuple(max(0, placed.mib[gpu.kind] - extra) for gpu in gpus)
    return Assignment(gpus, shares, footprint.prompt_cache_mib)


def counts_gpus(args: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether the user's arguments only make sense for exactly the GPUs that the child would see by itself."""
    main_gpu = flag_value(args, _MAIN_GPU_FLAGS) or env.get("LLAMA_ARG_MAIN_GPU", "0")
    return has_flag(args, _COUNTING_FLAGS) or not env.keys().isdisjoint(_COUNTING_VARIABLES) or main_gpu != "0"
