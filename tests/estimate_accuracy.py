"""How far the memory estimate is from what the real llama-server says of itself.

``python -m tests.estimate_accuracy [--json] [--fresh N] [KIND ...]`` runs every case and prints the errors by kind of
model: synthetic ones (``tests.synthetic_models``), each with many arguments. llama-server logs the size of every buffer
it has; that is the truth here. ``tests/e2e/test_estimate_accuracy.py`` holds a part of the cases to their bounds.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from mesh.config import launch_options
from mesh.core.estimate import Part, estimate
from mesh.models import gguf
from tests import synthetic_models

MIB: Final = 1 << 20
_BUFFER: Final = re.compile(r"(\S+) +(model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_N_CTX: Final = re.compile(r"llama_context: n_ctx += (\d+)")
_N_SEQ_MAX: Final = re.compile(r"llama_context: n_seq_max += (\d+)")
_PART_OF: Final = {"model": "weights", "KV": "kv", "RS": "recurrent", "compute": "compute", "output": "output"}
#: what makes the log complete and repeatable. Mapped weights would be logged as ranges of the file, hence no mmap
_SERVER: Final = ("--port", "0", "-lv", "5", "--fit", "off", "--no-warmup", "-lm", "none")
_LIMIT_S: Final = 60

ARGUMENTS: Final = (
    "-c 4096",
    "-c 8192 -np 1",
    "-c 8192 -np 4",
    "-c 8192 -np 4 -kvu",
    "-c 5000 -np 3",
    "-c 300 -np 2",
    "-c 0 -np 2",
    "-c 4096 -ub 128",
    "-c 8192 -ub 2048",
    "-c 8192 -b 256",
    "-c 4096 -fa off",
    "-c 8192 -np 1 -fa off -ub 1024",
    "-c 8192 -ctk q8_0 -ctv q8_0",
    "-c 8192 -ctk q4_0",
    "-c 16384 -ctk bf16 -ctv bf16 -np 2",
    "-c 16384 --swa-full",
    "-c 4096 --embedding",
    "-c 8192 --embedding -ub 1024 -np 2",
)

#: the sizes of well-known models, with fewer layers, experts and words, which change no buffer but the weights
REAL_SIZES: Final[dict[str, dict[str, Any]]] = {
    "dense": {"width": 4096, "heads": 32, "heads_kv": 8, "head_dim": 128, "ff": 14336, "vocab": 32000},  # Llama 3 8B
    "gqa": {"width": 2560, "heads": 32, "heads_kv": 8, "ff": 9728},  # Qwen3 4B
    "qwen2": {"width": 3584, "heads": 28, "heads_kv": 4, "head_dim": 128, "ff": 18944},  # Qwen2.5 7B
    "swa": {"width": 2560, "heads": 8, "heads_kv": 4, "ff": 10240, "window": 1024, "layers": 7},  # Gemma 3 4B
    "gemma2": {"width": 2304, "heads": 8, "heads_kv": 4, "ff": 9216, "window": 4096},  # Gemma 2 2B
    "gptoss": {"width": 2816, "heads": 64, "heads_kv": 8, "ff_expert": 2816, "experts_used": 4},  # about gpt-oss 20B
    "moe": {"width": 2048, "heads": 32, "heads_kv": 4, "head_dim": 128, "experts_used": 8, "ff_expert": 768},  # A3B
    "mixtral": {"width": 4096, "heads": 32, "heads_kv": 8, "head_dim": 128, "ff_expert": 14336, "experts": 4},
    "mla": {"width": 2048, "heads": 16, "head_dim": 128, "kv_rank": 512, "rope_dim": 64, "experts_used": 6,
            "ff_expert": 1536, "ff": 11008},  # DeepSeek V2 Lite
    "hybrid": {"width": 2048, "heads": 32, "heads_kv": 8, "ff": 8192},  # LFM2 1.2B
    "granite": {"width": 1536, "heads": 12, "heads_kv": 4, "head_dim": 128, "ff": 4096, "inner": 3072},
    "mamba": {"width": 2560, "inner": 5120},  # Mamba 2.8B
    "mamba2": {"width": 2560, "inner": 5120},  # Mamba2 2.7B
    "encoder": {"width": 1024, "heads": 16, "ff": 4096},  # BGE large
}  # fmt: skip
#: proportions that no known model has; the compute buffer is the harder to foresee
ODD_SIZES: Final[dict[str, dict[str, Any]]] = {
    "dense": {"width": 1024, "ff": 1024},
    "gemma2": {"ff": 1536},
    "swa": {"ff": 1536},
    "mamba": {"vocab": 32000},
    "mamba2": {"state": 64, "inner": 2048, "groups": 2},
}


@dataclass(frozen=True)
class Case:
    """One model and one command line."""

    kind: str
    arguments: str
    sizes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        sizes = ",".join(f"{name}={value}" for name, value in self.sizes)
        return f"{self.kind}{f'({sizes})' if sizes else ''} {self.arguments}"


@dataclass(frozen=True)
class Buffers:
    """Sizes in MiB, and what context and slots they are for."""

    weights: float = 0.0
    kv: float = 0.0
    recurrent: float = 0.0
    compute: float = 0.0
    output: float = 0.0
    context: int = 0
    slots: int = 0

    @property
    def total(self) -> float:
        return self.weights + self.working

    @property
    def working(self) -> float:
        """All but the weights: what the arguments decide."""
        return self.kv + self.recurrent + self.compute + self.output


@dataclass(frozen=True)
class Result:
    case: Case
    logged: Buffers
    estimated: Buffers

    @property
    def total_error(self) -> float:
        return self.estimated.total / self.logged.total - 1

    @property
    def working_error(self) -> float:
        return self.estimated.working / self.logged.working - 1

    def inexact(self) -> list[str]:
        """What differs of that which must be exact: to the last digit of the log, two lines added up."""
        sizes = [name for name in ("weights", "kv", "recurrent") if abs(self._difference(name)) > 0.0101]
        return sizes + [name for name in ("context", "slots") if self._difference(name)]

    def _difference(self, name: str) -> float:
        return float(getattr(self.estimated, name) - getattr(self.logged, name))


class RefusedError(Exception):
    """llama-server did not start with these arguments; the text is what it said."""


def logged(model: Path, arguments: str) -> Buffers:
    """Start the real server and return what it allocates."""
    command = [sys.executable, "-m", "mesh.engine.embedded", "-m", str(model), *_SERVER, *shlex.split(arguments)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        watchdog = threading.Timer(_LIMIT_S, child.kill)
        watchdog.start()
        try:
            return _listen(child)
        finally:
            watchdog.cancel()
            child.kill()


def _listen(child: subprocess.Popen[str]) -> Buffers:
    """Return what the server says until it is ready."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        # said by llama.cpp's logger, so behind all that it had to say before
        if "all slots are idle" in line:
            return buffers(lines)
    raise RefusedError("".join(line for line in lines if " E " in line or line.startswith("error"))[-500:])


def buffers(lines: Iterable[str]) -> Buffers:
    """Add up the lines that tell the size of a buffer."""
    found: dict[str, float] = {}
    counts: dict[str, int] = {}
    for line in lines:
        if size := _BUFFER.search(line):
            part = _PART_OF[size[2]]
            found[part] = found.get(part, 0.0) + float(size[3])
        elif context := _N_CTX.search(line):
            counts["context"] = int(context[1])
        elif slots := _N_SEQ_MAX.search(line):
            counts["slots"] = int(slots[1])
    return Buffers(**found, context=counts["context"], slots=counts["slots"])


def estimated(model: Path, arguments: str) -> Buffers:
    """Return what we say beforehand."""
    options = launch_options.parse(["-m", str(model), *shlex.split(arguments)])
    result = estimate(gguf.read(model), options, gpus=False)
    parts: dict[str, Part] = {name: getattr(result, name) for name in _PART_OF.values()}
    sizes = {name: part.total / MIB for name, part in parts.items()}
    return Buffers(**sizes, context=result.context, slots=result.slots)


def compare(case: Case, directory: Path) -> Result:
    """Write the model, run the server, and put both figures side by side."""
    model = synthetic_models.write(case.kind, directory / f"{case.kind}.gguf", **dict(case.sizes))
    return Result(case, logged(model, case.arguments), estimated(model, case.arguments))


def cases(kinds: Sequence[str] = ()) -> Iterator[Case]:
    """Yield every kind with every arguments, and some in other sizes."""
    for kind in kinds or synthetic_models.KINDS:
        yield from (Case(kind, arguments) for arguments in ARGUMENTS)
        if real := REAL_SIZES.get(kind):
            sizes = (*({"layers": 2, "quant": synthetic_models.Quant.Q2_K} | real).items(),)
            yield from (Case(kind, arguments, sizes) for arguments in ARGUMENTS[::2])
        if odd := ODD_SIZES.get(kind):
            yield from (Case(kind, arguments, (*odd.items(),)) for arguments in ARGUMENTS[1::3])


def fresh_cases(kinds: Sequence[str], count: int, seed: int) -> Iterator[Case]:
    """Yield *count* cases of each kind in random sizes with random arguments: none that a formula was fitted to."""
    for kind in kinds or synthetic_models.KINDS:
        dice = random.Random(f"{kind} {seed}")
        for _ in range(count):
            yield Case(kind, _random_arguments(dice), tuple(_random_sizes(kind, dice).items()))


def _random_sizes(kind: str, dice: random.Random) -> dict[str, Any]:
    """Sizes in proportions that occur: see ``REAL_SIZES``."""
    usual = synthetic_models.KINDS[kind].shape
    times = dice.choice([1, 2, 3])
    width = usual.width * times
    sizes: dict[str, Any] = {"width": width, "inner": usual.inner * times, "heads": usual.heads * times}
    sizes |= {"heads_kv": usual.heads_kv * dice.choice([1, times]), "layers": usual.layers + dice.choice([0, 1])}
    sizes |= {"ff": int(width * dice.choice([2.5, 3, 3.5, 4])) // 256 * 256, "ff_expert": dice.choice([512, 768, 1024])}
    sizes |= {"experts_used": dice.choice([2, 4, 8]), "vocab": dice.choice([8192, 20480])}
    if kind in ("encoder", "nomic"):
        sizes["heads_kv"] = sizes["heads"]
    return sizes | {"quant": dice.choice([synthetic_models.Quant.Q8_0, synthetic_models.Quant.Q4_0])}


def _random_arguments(dice: random.Random) -> str:
    context, slots = dice.choice([2048, 6000, 12288, 20000]), dice.choice(["", " -np 1", " -np 2", " -np 4", " -np 6"])
    cache = dice.choice(["", "", " -ctk q8_0 -ctv q8_0", " -fa off", " --swa-full"])
    return f"-c {context}{slots}{dice.choice(['', '', ' -ub 256', ' -ub 1024', ' -kvu'])}{cache}"


def table(results: Sequence[Result]) -> str:
    """Return the errors by kind, in percent: of the total, and of all but the weights."""
    rows = ["kind        runs  exact  total: mean    max   without weights: mean    min    max"]
    kinds = list(dict.fromkeys(result.case.kind for result in results))
    for kind in [*kinds, "all"]:
        mine = [result for result in results if kind in (result.case.kind, "all")]
        total = [abs(result.total_error) * 100 for result in mine]
        working = [result.working_error * 100 for result in mine]
        exact = sum(not result.inexact() for result in mine)
        rows.append(
            f"{kind:11} {len(mine):4} {exact:6} {_mean(total):12.2f} {max(total):6.2f}"
            f" {_mean([abs(error) for error in working]):23.2f} {min(working):+6.2f} {max(working):+6.2f}"
        )
    return "\n".join(rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _as_json(result: Result) -> dict[str, Any]:
    return {
        "case": str(result.case),
        "logged": asdict(result.logged),
        "estimated": asdict(result.estimated),
        "total_error": result.total_error,
        "inexact": result.inexact(),
    }


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.estimate_accuracy", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(synthetic_models.KINDS))
    parser.add_argument("--json", action="store_true", help="every run with all its figures")
    parser.add_argument("--fresh", type=int, metavar="N", help="instead, N random cases of each kind")
    parser.add_argument("--seed", type=int, default=0, help="of those")
    options = parser.parse_args(argv)
    chosen = fresh_cases(options.kinds, options.fresh, options.seed) if options.fresh else cases(options.kinds)
    results = []
    with tempfile.TemporaryDirectory() as directory:
        for case in chosen:
            try:
                results.append(compare(case, Path(directory)))
            except RefusedError as refused:
                print(f"{case}: refused: {refused}", file=sys.stderr)
    print(json.dumps([_as_json(result) for result in results], indent=1) if options.json else table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
