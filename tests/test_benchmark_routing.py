"""The routing simulator: one line of figures, the same for the same seed, and physics that add up."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from random import Random

import pytest

from benchmarks import routing
from benchmarks.routing_load import MODELS, Arrival, Box, arrivals, fleet
from benchmarks.routing_mesh import POLICIES, Mesh
from benchmarks.routing_node import Node

SEED, LOAD, NODES, REQUESTS = 3, 0.15, 4, 150


def workload(requests: int = REQUESTS) -> tuple[list[Box], list[Arrival]]:
    random = Random(SEED)
    boxes = fleet(random, NODES)
    return boxes, arrivals(random, boxes, LOAD, requests)


def test_the_last_line_is_the_summary_and_a_seed_gives_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--json", "--requests", "120", "--nodes", "4", "--seed", "5"]
    lines = []
    for _ in range(2):
        assert routing.main(arguments) == 0
        lines.append(capsys.readouterr().out.splitlines()[-1])
    assert lines[0] == lines[1]
    found = json.loads(lines[0])
    assert list(found) == ["mesh", "random", "round_robin", "least_loaded"]
    assert all(list(figures) == ["p50_s", "p99_s"] for figures in found.values())
    assert all(0 < figures["p50_s"] <= figures["p99_s"] for figures in found.values())


def test_the_table_and_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert routing.main(["--requests", "200", "--check"]) in (0, 1)
    assert capsys.readouterr().out.count("p99_s") == 4
    worse = {"mesh": {"p50_s": 1.0, "p99_s": 9.0}, "random": {"p50_s": 2.0, "p99_s": 8.0}}
    assert not routing.better(worse)
    assert routing.better({**worse, "random": {"p50_s": 2.0, "p99_s": 9.5}})


def test_the_mesh_is_better_than_each_on_a_small_run() -> None:
    assert routing.better(routing.measure(seed=1, load=0.15, nodes=6, requests=600))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_every_request_is_answered_once_and_not_faster_than_it_can_be(policy: object) -> None:
    boxes, work = workload()
    mesh = Mesh(boxes, policy, SEED)  # type: ignore[arg-type]
    mesh.run(work)
    assert set(mesh.latencies) == {a.number for a in work}
    assert mesh.served.total() == len(work)
    assert all(not own.total() for view in mesh.views for own in view.own)  # nothing is in flight any more
    models = {m.key: m for m in MODELS}
    for a in work:
        fastest = max(box.speed for box in boxes if a.model in box.models)
        least = (a.prompt / models[a.model].prefill_tps + a.output / models[a.model].decode_tps) / fastest
        assert mesh.latencies[a.number] >= least * 0.999


def test_all_policies_get_the_same_work_and_use_only_nodes_that_have_the_model() -> None:
    assert workload() == workload()
    boxes, work = workload()
    assert all(any(a.model in box.models for box in boxes) for a in work)
    assert [a.at for a in work] == sorted(a.at for a in work)
    homes = Counter(key for box in boxes for key in box.models)
    sizes = {m.key: m.size_mib for m in MODELS}
    assert all(sizes[key] <= box.gpu_mib for box in boxes for key in box.models)
    assert max(homes.values()) > 1


def test_lengths_and_gaps_are_heavy_tailed() -> None:
    _, work = workload(4000)
    prompts, outputs = sorted(a.prompt for a in work), sorted(a.output for a in work)
    assert 700 < prompts[2000] < 1100
    assert 100 < outputs[2000] < 160
    assert sum(prompts) / 4000 > 1.4 * prompts[2000]
    gaps = [b.at - a.at for a, b in pairwise(work)]
    mean = sum(gaps) / len(gaps)
    assert sum((g - mean) ** 2 for g in gaps) / len(gaps) > 2 * mean**2  # Poisson would have 1


class Clock:
    """Events by time, for one node."""

    def __init__(self) -> None:
        self.events: list[tuple[float, int, object]] = []
        self.now = 0.0

    def at(self, when: float, what: object) -> None:
        self.events.append((when, len(self.events), what))

    def run(self) -> None:
        done: set[int] = set()
        while left := [e for e in self.events if e[1] not in done]:
            when, number, what = min(left, key=lambda e: e[:2])
            done.add(number)
            self.now = when
            what(when)  # type: ignore[operator]


def answer(count: int, *, models: tuple[str, ...] = ("chat-8b",), gpu_mib: int = 24_000) -> list[float]:
    """Give one node *count* equal requests at once; return when each was answered."""
    box = Box("node-0", 1.0, gpu_mib, 4, 0.25, 1_000.0, 0, frozenset(models))
    clock, ends = Clock(), list[float]()
    node = Node(box, {m.key: m for m in MODELS}, clock.at, Random(1))
    for n in range(count):
        arrival = Arrival(n, 0.0, 0, models[n % len(models)], 1000, 1000, 110, None)
        node.submit(arrival, lambda _, now: ends.append(now), 0.0)
    clock.run()
    return ends


def test_a_batch_takes_longer_than_one_and_shorter_than_one_after_another() -> None:
    load_s = answer(1)[0] - (1000 / 5000 + 1.0)  # 110 tokens at 110/s
    alone, four = answer(1)[0] - load_s, answer(4)[-1] - load_s
    assert 1.5 * alone < four < 3 * alone
    eight = answer(8)
    assert eight[-1] - load_s == pytest.approx(2 * four, rel=0.02)  # four slots: two rounds
    assert len(eight) == 8


def test_two_models_share_the_gpu_or_take_turns_in_its_memory() -> None:
    together = answer(2, models=("chat-8b", "small-3b"))
    swapped = answer(2, models=("chat-8b", "small-3b"), gpu_mib=6_500)
    assert len(together) == len(swapped) == 2
    assert max(swapped) > max(together) + 2  # one had to be stopped and the other loaded
