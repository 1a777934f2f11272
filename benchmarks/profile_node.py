"""``python -m benchmarks.profile_node``: where our node spends its CPU per request, or per streamed event.

A sampling profiler: the node runs unchanged but for a timer of its own CPU time, whose handler notes the Python line
that is running (time in a C function counts for the line that called it). Where `perf` or `strace` exist, they tell
the C functions and the system calls per request. These are shares of one run; to compare, use benchmarks.proxy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import candidates, load, procfs
from benchmarks.candidates import Candidate
from benchmarks.load import Load
from benchmarks.native import BenchmarkError
from benchmarks.proxy import PARTS

SAMPLE_INTERVAL_S = 0.001
RESULT_VARIABLE = "BENCH_PROFILE_RESULT"
RESULT_TIMEOUT_S = 10
STRACE_RATE_PER_S = 1000
STREAM_HASTE = 8


class Sampler:
    """Inside the node: samples the main thread between SIGUSR1 and SIGUSR2, then writes what it saw."""

    def __init__(self, result: Path) -> None:
        self._result = result
        self._lines: Counter[str] = Counter()
        self._functions: Counter[str] = Counter()
        self._own: Counter[str] = Counter()

    def install(self) -> None:
        signal.signal(signal.SIGPROF, self._sample)
        signal.signal(signal.SIGUSR1, lambda *_: signal.setitimer(signal.ITIMER_PROF, *[SAMPLE_INTERVAL_S] * 2))
        signal.signal(signal.SIGUSR2, self._finish)

    def _sample(self, _signal: int, frame: FrameType | None) -> None:
        if frame is None:
            return
        self._lines[f"{_place(frame)}:{frame.f_lineno}"] += 1
        self._own[_function(frame)] += 1
        seen = set()
        while frame is not None:
            seen.add(_function(frame))
            frame = frame.f_back
        self._functions.update(seen)

    def _finish(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = {"lines": self._lines, "own": self._own, "functions": self._functions}
        unfinished = self._result.with_suffix(".part")
        content = {kind: counter.most_common(60) for kind, counter in found.items()}
        unfinished.write_text(json.dumps(content | {"samples": self._own.total()}))
        unfinished.replace(self._result)


def _place(frame: FrameType) -> str:
    return re.sub(r"^.*?/(?=mesh/|site-packages/|lib/python)", "", frame.f_code.co_filename)


def _function(frame: FrameType) -> str:
    return f"{_place(frame)}:{frame.f_code.co_qualname}"


def run_inside(result: Path) -> int:
    """The node itself, with the sampler installed: ``llama-mesh`` with the arguments of this process."""
    from mesh.__main__ import main as run_node

    Sampler(result).install()
    return int(run_node() or 0)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    part = next(part for part in PARTS if part.name == options.part)
    # a node that is mostly idle gives no samples: streams speak faster here than in the benchmark
    wanted = replace(
        part.load, seconds=options.seconds, stream_interval_us=part.load.stream_interval_us // STREAM_HASTE
    )
    with tempfile.TemporaryDirectory(prefix="llama-mesh-profile-") as directory:
        core = procfs.reserve_core()
        result = Path(directory) / "profile.json"
        os.environ[RESULT_VARIABLE] = str(result)
        slots = None if "mesh" not in part.candidates else 0
        try:
            node = candidates.mesh(Path(directory), "node", max_concurrent=slots, program="benchmarks.profile_node")
        except BenchmarkError as error:
            print(f"the node cannot be profiled: {error}", file=sys.stderr)
            return 1
        if core is not None:
            node.pin(core)
        try:
            print(f"{part.title}\n")
            _print_samples(_sampled(node, wanted, result), options.top)
            _print_symbols(node, wanted, Path(directory), options.top)
            _print_system_calls(node, wanted)
        finally:
            node.stop()
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_node", description=__doc__)
    parser.add_argument("--part", choices=[part.name for part in PARTS], default="saturated")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--top", type=int, default=25, help="lines per list")
    return parser.parse_args(arguments)


def _sampled(node: Candidate, wanted: Load, result: Path) -> dict[str, Any]:
    pid = node.pids[0]
    os.kill(pid, signal.SIGUSR1)
    outcome = load.run(wanted, node.port, node.pids)
    os.kill(pid, signal.SIGUSR2)
    deadline = time.monotonic() + RESULT_TIMEOUT_S
    while not result.exists():
        if time.monotonic() > deadline:
            raise BenchmarkError("the sampler inside the node wrote nothing")
        time.sleep(0.05)
    cost = outcome.cpu_us_per_event if outcome.events else outcome.cpu_us_per_request
    found: dict[str, Any] = json.loads(result.read_text())
    return found | {"unit_us": cost, "unit": "event" if outcome.events else "request"}


def _print_samples(found: dict[str, Any], top: int) -> None:
    total = max(found["samples"], 1)
    print(f"{found['unit_us']:.1f} us per {found['unit']} with the sampler on; {total} samples\n")
    titles = {"own": "functions, own time", "functions": "functions, with what they call", "lines": "lines"}
    for kind, title in titles.items():
        print(f"{title} (us per {found['unit']}, share)")
        for name, count in found[kind][:top]:
            print(f"  {count / total * found['unit_us']:6.2f}  {count / total:6.1%}  {name}")
        print()


def _print_symbols(node: Candidate, wanted: Load, directory: Path, top: int) -> None:
    if shutil.which("perf") is None:
        print("C functions: `perf` is not installed (Debian: apt-get install linux-perf)\n")
        return
    data = directory / "perf.data"
    command = ["perf", "record", "-q", "-F", "999", "-o", str(data), "-p", str(node.pids[0])]
    recorder = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    load.run(wanted, node.port, node.pids)
    recorder.send_signal(signal.SIGINT)
    recorder.wait(30)
    listing = subprocess.run(
        ["perf", "report", "-i", str(data), "--stdio", "-q", "--sort", "dso,symbol"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    print("C functions (perf)")
    lines = [" ".join(line.split()).removesuffix("- -").strip() for line in listing.stdout.splitlines() if line.strip()]
    print("\n".join(f"  {line}" for line in lines[:top]), "\n")


def _print_system_calls(node: Candidate, wanted: Load) -> None:
    if shutil.which("strace") is None:
        print("system calls: `strace` is not installed (Debian: apt-get install strace)\n")
        return
    command = ["strace", "-c", "-f", "-U", "calls,name", "-p", str(node.pids[0])]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    # strace slows the node down: a rate that it can still keep
    slow = wanted if wanted.stream else replace(wanted, rate_per_s=STRACE_RATE_PER_S)
    outcome = load.run(replace(slow, seconds=2.0), node.port, node.pids)
    tracer.send_signal(signal.SIGINT)
    _, listing = tracer.communicate(timeout=30)
    units = (outcome.events or outcome.requests) * (outcome.seconds + wanted.warmup_s) / outcome.seconds
    print("system calls (strace), per unit")
    for line in listing.splitlines():
        if found := re.match(r"\s*(\d+)\s+(\w+)", line):
            print(f"  {int(found[1]) / units:8.3f}  {found[2]}")


if __name__ == "__main__":
    if RESULT_VARIABLE in os.environ:
        sys.exit(run_inside(Path(os.environ.pop(RESULT_VARIABLE))))
    sys.exit(main())
