"""``python -m benchmarks.swap``: what it costs that two models share the memory of one.

Swap: a request for the model that is not loaded, to its first token, against the same by hand with bare llama-servers.
Storm: requests A/B/A/B at a fixed rate; all must be answered, and nobody may wait for a turn longer than the bound.

Real node, real llama-server, real model. Decides what is measured in which order; swap_servers.py starts and asks,
swap_log.py reads the node's log, swap_report.py concludes. Exit status: 0 measured; 1 a request failed, a wait exceeded
its bound, or (with --check) the swap's goal was missed; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import procfs, swap_log, swap_report
from benchmarks.candidates import ROOT
from benchmarks.native import BenchmarkError
from benchmarks.swap_report import Storm, Swap
from benchmarks.swap_servers import ESTIMATE_MIB, MODELS, NO_BUDGET, Answer, Bare, Node, ask, node
from mesh.cli import demo_model
from mesh.cli.failure import CliError

SWAPS, QUICK_SWAPS = 16, 4
REQUESTS, QUICK_REQUESTS = 200, 40
RATE_PER_S = 20.0
TENURE_S = 3.0
MAX_TOKENS = 8
#: of the rate that the first storm showed to be possible; swapping takes a part, and other work on the machine too
PACE = 0.5
SETTLE_S = 0.3
PROGRESS_EVERY_S = 5.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a terminated benchmark stops what it started
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        found = _measure(options)
    except KeyboardInterrupt:
        print("interrupted; everything was stopped", file=sys.stderr)
        return 130
    except (BenchmarkError, CliError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if options.json else swap_report.table(found))
    return status(found, check=options.check)


def status(found: Mapping[str, Any], *, check: bool) -> int:
    """Return the exit status for *found*."""
    if any(storm["problems"] for storm in found["storms"]):
        return 1
    return 1 if check and found["swap"] is not None and not found["swap"]["goal_met"] else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.swap", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--quick", action="store_true", help="few swaps, small storms: a look, not a result")
    parser.add_argument("--only", choices=("swap", "storm"), help="only this half")
    parser.add_argument("--swaps", type=int, help=f"swaps of each kind (default {SWAPS})")
    parser.add_argument(
        "--requests", type=int, help=f"of the first storm; the second has half of them (default {REQUESTS})"
    )
    parser.add_argument(
        "--rate", type=float, default=RATE_PER_S, help=f"requests/s of the first storm ({RATE_PER_S:g})"
    )
    parser.add_argument("--tenure", type=float, default=TENURE_S, help=f"seconds, of the storms (default {TENURE_S:g})")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="DIR", help="measure the node of another checkout")
    parser.add_argument("--check", action="store_true", help="exit 1 if the swap's goal is missed")
    options = parser.parse_args(arguments)
    options.swaps = options.swaps or (QUICK_SWAPS if options.quick else SWAPS)
    options.requests = options.requests or (QUICK_REQUESTS if options.quick else REQUESTS)
    return options


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    model = demo_model.ensure(os.environ, Console(stderr=True))
    root = options.tree.resolve()
    environment = procfs.environment(None)
    with tempfile.TemporaryDirectory(prefix="llama-mesh-swap-") as name:
        directory = Path(name)
        files = {name: directory / f"{name}.gguf" for name in MODELS}
        for path in files.values():
            shutil.copyfile(model, path)
        budget_mib = _budget_mib(root, directory / "sizes", files)
        bench = _Bench(root, directory, files, budget_mib)
        swap = None if options.only == "storm" else bench.swap(options.swaps)
        storms = [] if options.only == "swap" else bench.storms(options)
    return {"swap": swap, "storms": storms, "budget_mib": budget_mib, "tree": str(root), "environment": environment}


def _budget_mib(root: Path, directory: Path, files: Mapping[str, Path]) -> int:
    """Return a budget for one of the models, whatever the node believes that they need, but not for both."""
    with node(root, directory, files, budget_mib=NO_BUDGET, tenure_s=0) as unlimited:
        for model in files:
            ask(unlimited.port, model, max_tokens=MAX_TOKENS)
        figures = [ESTIMATE_MIB, *(instance["memory"].get("ram", 0) for instance in unlimited.instances())]
    _progress(f"the node charges {figures[1:]} MiB of RAM, the cookbook says {ESTIMATE_MIB}")
    return swap_report.budget_for_one(figures)


@dataclass(frozen=True, slots=True)
class _Bench:
    """The two measurements, with what they share."""

    root: Path
    directory: Path
    files: Mapping[str, Path]
    budget_mib: int

    def swap(self, count: int) -> dict[str, Any]:
        """Swap *count* times with the node and as often by hand, in turns."""
        answers: list[tuple[str, Answer]] = []
        bare_swaps: list[Swap] = []
        with ExitStack() as stack:
            limited = stack.enter_context(self._node("swap", tenure_s=0))
            launches = {}
            for model in MODELS:
                limited.prewarm(model)
                launches[model] = limited.launch_of(model)
            bare = stack.enter_context(closing(Bare(launches, self.directory / "bare")))
            bare.swap_to(MODELS[1], MAX_TOKENS)
            for number in range(-len(MODELS), count):  # the first ones are not counted
                model = MODELS[number % 2]
                pair = _swap_both(limited, bare, model, mesh_first=number // 2 % 2 == 0)
                if number >= 0:
                    answers.append((model, pair[0]))
                    bare_swaps.append(pair[1])
                    both = f"node {pair[0].first_token_s * 1000:.0f} ms, by hand {pair[1].first_token_s * 1000:.0f} ms"
                    _progress(f"swap {number + 1} of {count}: {both}")
        story = swap_log.read(limited.log.read_text(errors="replace").splitlines())
        mesh_swaps = [Swap(model, answer.first_token_s, _parts(story, answer)) for model, answer in answers]
        return swap_report.swap_summary(mesh_swaps, bare_swaps)

    def storms(self, options: argparse.Namespace) -> list[dict[str, Any]]:
        """One storm as fast as asked for, then one at a rate that the machine can serve."""
        first = self._storm("as asked for", options.requests, options.rate, options.tenure, keeps_up=False)
        possible_per_s = swap_report.throughput_per_s(first.story)
        if not possible_per_s:
            return [swap_report.storm_summary(first)]
        rate_per_s = min(options.rate, PACE * possible_per_s)
        second = self._storm("paced", options.requests // 2, rate_per_s, options.tenure, keeps_up=True)
        return [swap_report.storm_summary(storm) for storm in (first, second)]

    def _storm(self, name: str, count: int, rate_per_s: float, tenure_s: float, *, keeps_up: bool) -> Storm:
        _progress(f"storm, {name}: {count} requests at {rate_per_s:.1f}/s")
        with self._node(f"storm-{name.replace(' ', '-')}", tenure_s=tenure_s) as limited:
            clients = _Clients(limited.port)
            clients.send(count, rate_per_s)
        story = swap_log.read(limited.log.read_text(errors="replace").splitlines())
        first_tokens = [answer.first_token_s for answer in clients.answers]
        return Storm(name, rate_per_s, count, tenure_s, keeps_up, first_tokens, clients.failures, story)

    def _node(self, name: str, *, tenure_s: float) -> Any:
        return node(self.root, self.directory / name, self.files, budget_mib=self.budget_mib, tenure_s=tenure_s)


def _swap_both(limited: Node, bare: Bare, model: str, *, mesh_first: bool) -> tuple[Answer, Swap]:
    """Swap both to *model*, one after the other; who goes first changes, so that neither always has the warm caches."""
    time.sleep(SETTLE_S)
    if mesh_first:
        answer = limited.swap_to(model, MAX_TOKENS)
        return answer, bare.swap_to(model, MAX_TOKENS)
    by_hand = bare.swap_to(model, MAX_TOKENS)
    return limited.swap_to(model, MAX_TOKENS), by_hand


def _parts(story: swap_log.Story, answer: Answer) -> dict[str, float]:
    return swap_log.swap_parts(story, answer.sent_wall_s, answer.sent_wall_s + answer.first_token_s)


@dataclass(slots=True)
class _Clients:
    """Clients that do not wait for each other: each request goes out when it is due, whatever became of the others."""

    port: int
    answers: list[Answer] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def send(self, count: int, rate_per_s: float) -> None:
        """Send *count* requests for the models in turn, and return when all have been answered or have failed."""
        # daemons, so that an interrupt need not wait for them
        threads = [threading.Thread(target=self._ask, args=(number,), daemon=True) for number in range(count)]
        began_at = shown_at = time.monotonic()
        for number, thread in enumerate(threads):
            time.sleep(max(began_at + number / rate_per_s - time.monotonic(), 0))
            thread.start()
            shown_at = self._show(shown_at, count)
        for thread in threads:
            while thread.is_alive():
                thread.join(PROGRESS_EVERY_S)
                shown_at = self._show(shown_at, count)
        _progress(f"  {len(self.answers)} of {count} answered in {time.monotonic() - began_at:.0f} s")

    def _ask(self, number: int) -> None:
        try:
            prompt = f"Say {number}."  # all different, so that no answer is a cached one
            self.answers.append(ask(self.port, MODELS[number % 2], max_tokens=MAX_TOKENS, prompt=prompt))
        except Exception as error:
            self.failures.append(f"request {number}: {error}")

    def _show(self, shown_at: float, count: int) -> float:
        if time.monotonic() < shown_at + PROGRESS_EVERY_S:
            return shown_at
        _progress(f"  {len(self.answers)} of {count} answered, {len(self.failures)} failed")
        return time.monotonic()


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
