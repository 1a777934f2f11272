"""``python -m benchmarks.routing``: end-to-end latency under the router, against simpler ones, simulated.

Several nodes with unequal GPUs, memory for some of the models at a time, records of each other that are seconds old,
cold starts and bursts. The router, the scheduler and the learned figures are the real code; time and GPUs are not, so a
run takes seconds and gives the same for the same seed. Goal: lower p50 and lower p99 than each other policy.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from math import ceil
from random import Random

from benchmarks.routing_load import arrivals, fleet
from benchmarks.routing_mesh import POLICIES, Mesh

Result = dict[str, dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    found = measure(options.seed, options.load, options.nodes, options.requests)
    if not options.json:
        print(f"seed {options.seed}, load {options.load}, {options.nodes} nodes, {options.requests} requests; seconds")
        for name, figures in found.items():
            print(f"{name:14}" + "  ".join(f"{key} {value:8.2f}" for key, value in figures.items()))
    summary = {name: {key: figures[key] for key in ("p50_s", "p99_s")} for name, figures in found.items()}
    if options.json:
        print(json.dumps(summary))
    return 1 if options.check and not better(found) else 0


def measure(seed: int, load: float, nodes: int, requests: int) -> Result:
    """Run each policy over the same fleet and the same arrivals."""
    random = Random(f"{seed} load")
    boxes = fleet(random, nodes)
    work = arrivals(random, boxes, load, requests)
    found: Result = {}
    for name, policy in POLICIES.items():
        mesh = Mesh(boxes, policy, seed)
        mesh.run(work)
        taken = sorted(mesh.latencies.values())
        assert len(taken) == requests, "a request was lost"
        found[name] = {
            "p50_s": round(percentile(taken, 50), 3),
            "p99_s": round(percentile(taken, 99), 3),
            "mean_s": round(sum(taken) / len(taken), 3),
            "loads": sum(node.loads for node in mesh.nodes),
        }
    return found


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile."""
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def better(found: Result) -> bool:
    """Whether the mesh has the lower p50 and the lower p99 than each other policy."""
    ours = found["mesh"]
    others = [figures for name, figures in found.items() if name != "mesh"]
    return all(ours[key] < figures[key] for figures in others for key in ("p50_s", "p99_s"))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, on the last line")
    parser.add_argument("--seed", type=int, default=1, help="of the fleet and of the arrivals (default 1)")
    parser.add_argument(
        "--load", type=float, default=0.15, help="of what the GPUs could do if nothing was swapped (default 0.15)"
    )
    parser.add_argument("--nodes", type=int, default=6, help="default 6")
    parser.add_argument("--requests", type=int, default=3000, help="default 3000")
    parser.add_argument(
        "--check", action="store_true", help="exit 1 unless the mesh is better at p50 and p99 than each"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
