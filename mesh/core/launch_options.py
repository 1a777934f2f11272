"""The arguments of a llama-server that decide how much memory it takes, typed. Values only; llama-server's defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DraftOptions:
    """A draft model for speculative decoding. ``None`` means as the main model's, or llama-server's own default."""

    path: str
    context: int = 0  #: tokens; 0 = as the model was trained
    gpu_layers: int | None = None  #: None = all
    type_k: str = "f16"
    type_v: str = "f16"


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    model: str | None = None
    context: int = 0  #: ``-c``, tokens; 0 = as trained
    slots: int | None = None  #: ``-np``; None = llama-server chooses
    kv_unified: bool | None = None  #: None = llama-server's default for these slots
    batch: int = 2048
    ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attn: bool | None = None  #: None = auto
    gpu_layers: int | None = None  #: ``-ngl``; None = all
    kv_offload: bool = True  #: False: ``-nkvo``, the KV cache stays on the host
    op_offload: bool = True
    cpu_moe_layers: int = 0  #: the first so many layers keep their experts on the host
    overrides: tuple[tuple[str, str], ...] = ()  #: ``-ot``: (regular expression on tensor names, buffer type)
    swa_full: bool = False
    embedding: bool = False
    rerank: bool = False
    mmproj: str | None = None
    mmproj_offload: bool = True
    draft: DraftOptions | None = None
    loras: tuple[str, ...] = ()
    mmap: bool = True
    mlock: bool = False
    prompt_cache_mib: int | None = None  #: ``-cram``; None = not given, -1 = unlimited, 0 = none
    split_mode: str = "layer"  #: "layer", "row", "none", "tensor"
    tensor_split: tuple[float, ...] = ()
    main_gpu: int = 0
    devices: tuple[str, ...] | None = None  #: ``-dev``: llama.cpp's names, e.g. "CUDA0"; ("none",) = no GPU
