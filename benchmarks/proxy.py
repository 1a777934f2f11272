"""``python -m benchmarks.proxy``: our node, nginx and no proxy, interleaved in one run over a fast mock upstream.

Decides what is measured in which order; candidates.py starts and stops, load.py measures, report.py concludes.
The proxy has a core for itself, everything else runs on the others: clients and busy instances do not share it either,
and processes that the kernel moves about differ in cost from one second to the next. Exit
status: 0 measured, 1 something failed (or, with --check, a goal was missed), 3 measured, but nginx is not installed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import candidates, load, procfs, report
from benchmarks.candidates import Candidate
from benchmarks.load import Load
from benchmarks.native import BenchmarkError
from benchmarks.report import Measurements

OUTPUT = Path(__file__).parent / "out" / "proxy.json"
NGINX_MISSING = (
    "nginx is not installed, so there is nothing to compare with: our node and `direct` are measured alone.\n"
    "On Debian or Ubuntu: apt-get install nginx-light   (this benchmark never installs system packages)"
)
NGINX_MISSING_STATUS = 3
MODERATE = "rate_2000"
SSE_INTERVAL_US = 20_000
IDLE_STREAMS = 1000
SETTLE_S = 1.0


PROXIES = ("nginx", "mesh", "baseline")


@dataclass(frozen=True, slots=True)
class Part:
    """One load that every one of ``candidates`` gets in every round."""

    name: str
    title: str
    load: Load
    candidates: tuple[str, ...] = PROXIES


ALL = ("direct", "nginx", "mesh", "baseline")
PARTS = (
    Part("saturated", "1 KB, saturated, 32 connections", Load(32, 2.0), (*ALL, "mesh-slots", "two-nodes")),
    Part("unique_ids", "same, own X-Request-Id each", Load(32, 1.5, unique_header="X-Request-Id")),
    Part("queued", "same, 8 slots: 24 always wait", Load(32, 1.5, model="mock-few-slots"), ("mesh-slots",)),
    Part("keepalive_100", "same, upstream closes after 100", Load(32, 1.5, model="mock-like-llama-server"), ("mesh",)),
    Part(MODERATE, "1 KB, 2,000 requests/s", Load(32, 3.0, rate_per_s=2000), ALL),
    Part("rate_6000", "1 KB, 6,000 requests/s", Load(32, 2.0, rate_per_s=6000)),
    Part("rate_150", "1 KB, 150 requests/s", Load(32, 3.0, rate_per_s=150), ALL),
    Part("request_20kb", "20 KB requests, saturated", Load(32, 1.5, request_bytes=20_000)),
    Part("request_200kb", "200 KB requests, saturated", Load(32, 1.5, request_bytes=200_000)),
    Part("answer_200kb", "200 KB answers, saturated", Load(32, 1.5, answer_bytes=200_000), (*PROXIES, "two-nodes")),
    Part(
        "sse", "SSE, 100 streams x 50 events/s", Load(100, 3.0, stream_interval_us=SSE_INTERVAL_US), (*ALL, "two-nodes")
    ),
    Part(
        "sse_saturated", "SSE, 100 streams, saturated", Load(100, 2.0, stream_interval_us=1000), (*PROXIES, "two-nodes")
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    _allow_many_files()
    # a terminated benchmark stops what it started, as an interrupted one does
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    version = candidates.nginx_version()
    if version is None:
        print(NGINX_MISSING, file=sys.stderr)
    environment = procfs.environment(version)
    try:
        measurements = _measure(options)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    titles = {part.name: part.title for part in PARTS}
    found = report.summary(measurements, MODERATE) | {
        "rounds": options.rounds,
        "seconds_factor": options.seconds_factor,
        "pinned": options.pin and len(os.sched_getaffinity(0)) < environment["cores"],
        "loads": titles,
        "environment": environment,
    }
    _write(found, options.json)
    print(report.table(found, titles))
    print(f"written to {options.json}")
    return _status(found, version, check=options.check)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.proxy", description=(__doc__ or "").split("\n\n")[0])
    names = ", ".join(part.name for part in PARTS)
    parser.add_argument("--quick", action="store_true", help="2 short rounds: a look, not a result")
    parser.add_argument("--rounds", type=int, help="interleaved rounds (default 5)")
    parser.add_argument("--seconds-factor", type=float, help="lengthen every measurement (default 1)")
    parser.add_argument("--parts", type=_names, help=f"only these, comma-separated: {names}")
    parser.add_argument(
        "--only", type=_names, help="only these candidates: direct, nginx, mesh, mesh-slots, two-nodes, baseline"
    )
    parser.add_argument("--baseline", type=Path, metavar="DIR", help="also measure the node of this other checkout")
    parser.add_argument(
        "--no-pin", dest="pin", action="store_false", help="let the kernel move processes between cores"
    )
    parser.add_argument("--json", type=Path, default=OUTPUT, metavar="FILE", help=f"default {OUTPUT}")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    options = parser.parse_args(arguments)
    if options.parts and (unknown := options.parts - {part.name for part in PARTS}):
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}; known: {names}")
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.seconds_factor = options.seconds_factor or (0.35 if options.quick else 1.0)
    return options


def _names(text: str) -> set[str]:
    return {name.strip() for name in text.split(",") if name.strip()}


def _measure(options: argparse.Namespace) -> Measurements:
    measurements = Measurements()
    # what is started from here on inherits the cores that are left for everything but the proxy
    core = procfs.reserve_core() if options.pin else None
    with tempfile.TemporaryDirectory(prefix="llama-mesh-bench-") as directory, ExitStack() as stack:
        running = _start_all(options, Path(directory), stack, measurements)
        for candidate in running.values():
            if core is not None and candidate.name != "direct":
                candidate.pin(core)
        if options.parts is None:
            _measure_idle_streams(running, measurements)
        for number in range(1, options.rounds + 1):
            print(f"round {number} of {options.rounds}", file=sys.stderr, flush=True)
            _measure_round(running, options, measurements)
    return measurements


def _start_all(
    options: argparse.Namespace, directory: Path, stack: ExitStack, measurements: Measurements
) -> dict[str, Candidate]:
    """Start every candidate that can be started. One that cannot is a failure of the run, but not its end."""
    wanted: dict[str, Callable[[Path], Candidate]] = {"direct": candidates.direct}
    if candidates.find_nginx() is not None:
        wanted["nginx"] = candidates.nginx
    wanted["mesh"] = lambda place: candidates.mesh(place, "mesh")
    wanted["two-nodes"] = candidates.two_nodes
    wanted["mesh-slots"] = lambda place: candidates.mesh(place, "mesh-slots", max_concurrent=None)
    if options.baseline is not None:
        wanted["baseline"] = lambda place: candidates.mesh(place, "baseline", root=options.baseline.resolve())
    running = {}
    for name, start in wanted.items():
        if options.only and name not in options.only | {"direct"}:
            continue
        place = directory / name
        place.mkdir()
        try:
            running[name] = start(place)
        except BenchmarkError as error:
            _failed(measurements, str(error))
            continue
        stack.callback(running[name].stop)
    return running


def _measure_round(running: Mapping[str, Candidate], options: argparse.Namespace, measurements: Measurements) -> None:
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        for name in part.candidates:
            if (candidate := running.get(name)) is None:
                continue
            try:
                outcome = load.run(part.load.scaled(options.seconds_factor), candidate.port, candidate.pids)
            except BenchmarkError as error:
                _failed(measurements, f"{part.name}, {name}: {error}")
            else:
                measurements.add(part.name, name, outcome)


def _measure_idle_streams(running: Mapping[str, Candidate], measurements: Measurements) -> None:
    """Memory of open streams on which nothing happens, before anything else has made the processes grow."""
    idle = Load(IDLE_STREAMS, seconds=60, stream_interval_us=30_000_000)
    measurements.idle_streams = IDLE_STREAMS
    for name in ("nginx", "mesh", "baseline"):
        if (candidate := running.get(name)) is None:
            continue
        before_kib = procfs.pss_kib(candidate.pids)
        try:
            with load.held_streams(idle, candidate.port) as opened:
                time.sleep(SETTLE_S)
                grown_kib = procfs.pss_kib(candidate.pids) - before_kib
        except BenchmarkError as error:
            _failed(measurements, f"idle streams, {name}: {error}")
        else:
            measurements.idle_kb_per_stream[name] = round(grown_kib / opened, 2)


def _failed(measurements: Measurements, what: str) -> None:
    print(f"FAILED: {what}", file=sys.stderr, flush=True)
    measurements.failures.append(what)


def _allow_many_files() -> None:
    """A thousand streams are two thousand descriptors of the proxy; the children inherit this limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))


def _write(found: Mapping[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def _status(found: Mapping[str, Any], nginx_version: str | None, *, check: bool) -> int:
    if found["failures"]:
        return 1
    if nginx_version is None:
        return NGINX_MISSING_STATUS
    goals = (found["requests"]["ratio"], report.REQUEST_RATIO_GOAL), (found["sse"]["ratio"], report.EVENT_RATIO_GOAL)
    missed = any(measured is None or measured > goal for measured, goal in goals)
    return 1 if check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
