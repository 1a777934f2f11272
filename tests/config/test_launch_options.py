"""Every spelling of the options that decide about memory is read as llama-server reads it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.config.launch_options import ALL_LAYERS, parse
from mesh.config.llama_args import launch_args
from mesh.core.launch_options import DraftOptions, LaunchOptions


def test_nothing_given_is_llama_servers_defaults() -> None:
    assert parse(()) == LaunchOptions()
    assert parse(launch_args((), "/m.gguf", None, None)) == LaunchOptions(model="/m.gguf")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("-m a.gguf", {"model": "a.gguf"}),
        ("-c 4096", {"context": 4096}),
        ("--ctx-size=4096", {"context": 4096}),
        ("-c 1024 -c 2048", {"context": 2048}),
        ("-np 3", {"slots": 3}),
        ("--parallel 3", {"slots": 3}),
        ("-np -1", {"slots": None}),
        ("-np 4x", {"slots": 4}),
        ("-kvu", {"kv_unified": True}),
        ("-no-kvu", {"kv_unified": False}),
        ("--kv-unified --no-kv-unified", {"kv_unified": False}),
        ("-b 512 -ub 128", {"batch": 512, "ubatch": 128}),
        ("-ctk q8_0 -ctv q4_0", {"type_k": "q8_0", "type_v": "q4_0"}),
        ("-fa on", {"flash_attn": True}),
        ("-fa off", {"flash_attn": False}),
        ("-fa 0", {"flash_attn": False}),
        ("-fa on -fa auto", {"flash_attn": None}),
        ("-ngl 12", {"gpu_layers": 12}),
        ("--n-gpu-layers all", {"gpu_layers": None}),
        ("-ngl 5 --gpu-layers auto", {"gpu_layers": None}),
        ("-ngl -2", {"gpu_layers": None}),
        ("-nkvo", {"kv_offload": False}),
        ("--no-op-offload", {"op_offload": False}),
        ("-cmoe", {"cpu_moe_layers": ALL_LAYERS}),
        ("-ncmoe 7", {"cpu_moe_layers": 7}),
        ("-ot a=CPU,b=CUDA0 -ot c=CPU", {"overrides": (("a", "CPU"), ("b", "CUDA0"), ("c", "CPU"))}),
        ("-ncffn 2", {"overrides": ((r"blk\.(0|1)\.ffn_(gate|up|gate_up|down)\.", "CPU"),)}),
        ("--swa-full", {"swa_full": True}),
        ("--embeddings", {"embedding": True}),
        ("--reranking", {"rerank": True}),
        ("-mm p.gguf --no-mmproj-offload", {"mmproj": "p.gguf", "mmproj_offload": False}),
        ("-mm p.gguf --no-mmproj", {"mmproj": None}),
        ("--lora a,b --lora-scaled c:0.5,d", {"loras": ("a", "b", "c", "d")}),
        ("-lm mlock", {"mmap": False, "mlock": True}),
        ("-lm mmap+mlock", {"mmap": True, "mlock": True}),
        ("-lm none", {"mmap": False, "mlock": False}),
        ("--no-mmap --mlock", {"mmap": False, "mlock": True}),
        ("-cram 512", {"prompt_cache_mib": 512}),
        ("--cache-ram -1", {"prompt_cache_mib": -1}),
        ("-cram 0", {"prompt_cache_mib": 0}),
        ("-sm none -mg 1", {"split_mode": "none", "main_gpu": 1}),
        ("-ts 3,1", {"tensor_split": (3.0, 1.0)}),
        ("-ts 3/1", {"tensor_split": (3.0, 1.0)}),
        ("-dev CUDA0,CUDA1", {"devices": ("CUDA0", "CUDA1")}),
        ("-dev none", {"devices": ("none",)}),
        ("-md d.gguf", {"draft": DraftOptions("d.gguf")}),
        (
            "--spec-draft-model d.gguf -ngld 5 -ctkd q8_0 -ctvd q4_0 -cd 2048",
            {"draft": DraftOptions("d.gguf", 2048, 5, "q8_0", "q4_0")},
        ),
        ("-ngld 5", {"draft": None}),
        ("--kv-unified-per-slot 1024", {"context": 4096}),
        ("-np 2 --kv-unified-per-slot 1024", {"slots": 2, "context": 2048}),
        ("-c 0 --kv-unified-per-slot 1024", {"context": 0}),
    ],
)
def test_every_spelling_is_read(args: str, expected: dict[str, Any]) -> None:
    """Trap 45. ``-c 0`` beside --kv-unified-per-slot, ``4x`` and ``3/1`` behave so in the real server too."""
    assert parse(args.split()) == LaunchOptions(**expected)


@pytest.mark.parametrize(
    "args",
    ["-c x", "-np 0", "-np x", "-ctk F16", "-fa maybe", "-ngl foo", "-c", "-ts a,b", "-sm foo", "-ub -5", "-lm foo"],
)
def test_what_llama_server_refuses_leaves_the_default(args: str) -> None:
    assert parse(args.split()) == LaunchOptions()


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"LLAMA_ARG_CTX_SIZE": "4096", "LLAMA_ARG_N_PARALLEL": "2"}, {"context": 4096, "slots": 2}),
        ({"LLAMA_ARG_N_GPU_LAYERS": "0"}, {"gpu_layers": 0}),
        ({"LLAMA_ARG_KV_UNIFIED": "on"}, {"kv_unified": True}),
        ({"LLAMA_ARG_KV_OFFLOAD": "0"}, {"kv_offload": False}),
        ({"LLAMA_ARG_NO_KV_OFFLOAD": "1"}, {"kv_offload": False}),
        ({"LLAMA_ARG_SWA_FULL": "off"}, {}),
        ({"LLAMA_ARG_SWA_FULL": "1"}, {"swa_full": True}),
        ({"LLAMA_ARG_CPU_MOE": "true"}, {"cpu_moe_layers": ALL_LAYERS}),
        ({"LLAMA_ARG_SPEC_DRAFT_MODEL": "d.gguf"}, {"draft": DraftOptions("d.gguf")}),
        ({"LLAMA_ARG_MMPROJ": "p", "LLAMA_ARG_NO_MMPROJ_AUTO": "1"}, {}),
        ({"LLAMA_ARG_FLASH_ATTN": "off"}, {"flash_attn": False}),
        ({"LLAMA_ARG_CACHE_RAM": "100", "": "7", "PATH": "/bin"}, {"prompt_cache_mib": 100}),
    ],
)
def test_variables_count_as_arguments_that_come_first(env: dict[str, str], expected: dict[str, Any]) -> None:
    assert parse((), env) == LaunchOptions(**expected)


def test_an_argument_beats_a_variable() -> None:
    env = {"LLAMA_ARG_CTX_SIZE": "4096", "LLAMA_ARG_NO_KV_OFFLOAD": "1"}
    assert parse(["-c", "512", "-kvo"], env) == LaunchOptions(context=512)


_WORDS = ["-c", "-np", "-ngl", "-ot", "-ts", "-fa", "-kvu", "-md", "-lm", "-cram", "--lora-scaled"]


@given(st.lists(st.sampled_from([*_WORDS, "0", "-1", "x", "a=b", ",", "9e9", "é"])))
def test_any_line_is_read(args: list[str]) -> None:
    assert isinstance(parse(args, {"LLAMA_ARG_CTX_SIZE": "x"}), LaunchOptions)
