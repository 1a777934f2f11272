"""What the routing simulator is run on: a fleet of unequal boxes, and requests shaped like those of published traces.

Lengths follow the Azure LLM inference traces of 2023 (median prompt 1,000 tokens, median answer 130, both with heavy
tails). Arrivals are a Poisson mixture: calm and bursts of several times the rate, with gamma gaps in both, on top of a
slow swing of day and night. A few models get most of the requests (Zipf). Clients favour some nodes over others.
Everything is drawn from one seed; every policy gets the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log, pi, sin
from random import Random

#: of an instance with 4 slots in use, against one: what load 1.0 is reckoned with
BATCH_GAIN = 2.3


@dataclass(frozen=True, slots=True)
class Model:
    """Rates are those of a request alone on a box of speed 1 (an RTX 4090, say)."""

    key: str
    size_mib: int
    prefill_tps: float
    decode_tps: float


@dataclass(frozen=True, slots=True)
class Box:
    name: str
    speed: float
    gpu_mib: int
    slots: int
    sharing: float  #: what each further request adds to the time of a token; the router assumes one figure for all
    disk_mib_s: float
    site: int  #: boxes of one site are 0.5 ms apart, others 40
    models: frozenset[str]


@dataclass(frozen=True, slots=True)
class Arrival:
    number: int
    at: float
    entry: int  #: the node that the client asks
    model: str
    prompt: int
    guess: int  #: of the prompt's tokens, from its bytes: all that a router knows
    output: int
    max_tokens: int | None


MODELS = (
    Model("chat-8b", 6_000, 5_000, 110),
    Model("moe-30b", 18_500, 3_500, 140),
    Model("coder-14b", 10_000, 2_800, 65),
    Model("small-3b", 2_800, 9_000, 190),
    Model("think-32b", 20_500, 1_300, 34),
    Model("large-70b", 42_000, 600, 15),
    Model("vision-12b", 9_000, 3_000, 75),
)
_SHAPES = (  # speed, GPU memory, slots
    (1.0, 24_000, 4),
    (0.5, 24_000, 4),
    (0.25, 12_000, 2),
    (1.1, 48_000, 8),
    (0.5, 16_000, 4),
    (0.25, 24_000, 2),
)


def fleet(random: Random, nodes: int) -> list[Box]:
    """Return *nodes* unequal boxes; each model is on two of those that can hold it at least, if there are two."""
    placed: list[set[str]] = [set() for _ in range(nodes)]
    shapes = [_SHAPES[n % len(_SHAPES)] for n in range(nodes)]
    for model in MODELS:
        able = [n for n in range(nodes) if shapes[n][1] >= model.size_mib]
        chosen = [n for n in able if random.random() < 0.7]
        for n in chosen if len(chosen) >= 2 else random.sample(able, min(2, len(able))):
            placed[n].add(model.key)
    return [
        Box(
            f"node-{n}",
            speed * random.uniform(0.9, 1.1),
            gpu_mib,
            slots,
            random.uniform(0.12, 0.4),
            random.choice((500.0, 1_500.0, 3_000.0)),
            0 if random.random() < 0.7 else 1,
            frozenset(placed[n]),
        )
        for n, (speed, gpu_mib, slots) in enumerate(shapes)
    ]


def arrivals(random: Random, boxes: list[Box], load: float, requests: int) -> list[Arrival]:
    """Return *requests* arrivals at *load* times what the boxes could do if nothing was ever swapped."""
    hosted = [m for m in MODELS if any(m.key in box.models for box in boxes)]
    random.shuffle(hosted)
    weights = [1 / (rank + 1) for rank in range(len(hosted))]
    bodies = [_lengths(random) for _ in range(requests)]
    models = random.choices(hosted, weights, k=requests)
    work_s = sum(p / m.prefill_tps + o / m.decode_tps for (p, o), m in zip(bodies, models, strict=True)) / requests
    rate = load * BATCH_GAIN * sum(box.speed for box in boxes) / work_s
    entries = random.choices(range(len(boxes)), [random.uniform(0.3, 2) for _ in boxes], k=requests)
    times = _times(random, rate, requests)
    found = []
    for number, (at, entry, model, (prompt, output)) in enumerate(zip(times, entries, models, bodies, strict=True)):
        guess = max(1, round(prompt * random.lognormvariate(0, 0.2)))
        limit = random.choice((None, None, 512, 1024, 4096))
        limit = None if limit is None else max(limit, output)
        found.append(Arrival(number, at, entry, model.key, prompt, guess, output, limit))
    return found


def _lengths(random: Random) -> tuple[int, int]:
    prompt = min(16_000, max(8, round(random.lognormvariate(log(900), 1.1))))
    return prompt, min(2_000, max(1, round(random.lognormvariate(log(130), 1.0))))


def _times(random: Random, rate: float, count: int) -> list[float]:
    """Return *count* moments: calm and bursts in turns, a swing of +-50 % with two whole days in the run."""
    day_s = count / rate / 2
    times: list[float] = []
    now, burst, turns = 0.0, False, 0.0
    while len(times) < count:
        if now >= turns:
            burst = not burst
            turns = now + random.expovariate(1 / (10.0 if burst else 50.0))
        factor = (3.0 if burst else 0.6) * (1 + 0.5 * sin(2 * pi * now / day_s))
        now += random.gammavariate(0.5, 2.0) / (rate * factor)
        times.append(now)
    return times


def rtt_s(a: Box, b: Box) -> float:
    return 0.0005 if a.site == b.site else 0.04


def load_s(random: Random, box: Box, model: Model) -> float:
    """Return how long a load takes this time."""
    return (2.0 + model.size_mib / box.disk_mib_s) * exp(random.gauss(0, 0.15))
