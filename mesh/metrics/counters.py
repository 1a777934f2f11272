"""The counters of models, as plain ints for the hot path. Cumulates, averages and sorts only when asked for a state."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from mesh.metrics.state import HashState, HistogramState, ModelState

LATENCY_BOUNDS_S: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
TTFT_BOUNDS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RECENT: Final = 100  # llamesh's p95 is over the last 100 requests


class Histogram:
    """Counts of observations by bucket; cheap to observe, cumulated only when exported."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def state(self) -> HistogramState:
        return HistogramState(self.bounds, tuple(self.counts), self.sum)

    def restore(self, state: HistogramState | None) -> None:
        """Take *state* over; counts made by other bounds cannot be, and are dropped."""
        if state is not None and state.le == self.bounds and len(state.counts) == len(self.counts):
            self.counts = [max(0, count) for count in state.counts]
            self.sum = max(0.0, state.sum)


class ModelMetrics:
    """Counters of one model name under one set of arguments. Callers keep the object and bump its ints."""

    __slots__ = (
        "_recent_s",
        "errors_total",
        "latency",
        "requests_total",
        "tokens_generated_total",
        "tokens_prompt_total",
        "ttft",
    )

    def __init__(self) -> None:
        self.requests_total = 0
        self.errors_total = 0
        self.tokens_generated_total = 0
        self.tokens_prompt_total = 0
        self.latency = Histogram(LATENCY_BOUNDS_S)
        self.ttft = Histogram(TTFT_BOUNDS_S)
        self._recent_s: deque[float] = deque(maxlen=_RECENT)

    def observe(self, latency_s: float, ttft_s: float | None = None) -> None:
        """Count one finished request; call it once per request (trap 95)."""
        latency = self.latency
        latency.counts[bisect_left(LATENCY_BOUNDS_S, latency_s)] += 1
        latency.sum += latency_s
        if ttft_s is not None:
            self.ttft.observe(ttft_s)
        self._recent_s.append(latency_s)

    def recent_s(self) -> list[float]:
        """The latencies of the last 100 requests, in no particular order."""
        return list(self._recent_s)

    def state(self) -> ModelState:
        return ModelState(
            self.requests_total,
            self.errors_total,
            self.tokens_generated_total,
            self.tokens_prompt_total,
            self.latency.state(),
            self.ttft.state(),
        )

    def restore(self, state: ModelState) -> None:
        self.requests_total = max(0, state.requests_total)
        self.errors_total = max(0, state.errors_total)
        self.tokens_generated_total = max(0, state.tokens_generated_total)
        self.tokens_prompt_total = max(0, state.tokens_prompt_total)
        self.latency.restore(state.latency)
        self.ttft.restore(state.ttft)


class HashMetrics:
    """What belongs to a set of launch arguments whatever it is called: its names, learned memory, model facts."""

    __slots__ = ("base_latency_ms", "models", "parsed_model_params", "peak_sysmem_mb", "peak_vram_mb", "sample_count")

    def __init__(self) -> None:
        self.models: dict[str, ModelMetrics] = {}
        self.peak_vram_mb = 0
        self.peak_sysmem_mb = 0
        self.sample_count = 0
        #: {"params": {...}, "llama_cpp_version": str | None} as llamesh stores it
        self.parsed_model_params: dict[str, Any] | None = None
        #: latency counted by llamesh, which kept no histogram of it
        self.base_latency_ms = 0

    def used(self, ram_mib: int, vram_mib: int) -> None:
        """Note what one instance was seen to use."""
        self.peak_sysmem_mb = max(self.peak_sysmem_mb, ram_mib)
        self.peak_vram_mb = max(self.peak_vram_mb, vram_mib)
        self.sample_count += 1

    def state(self) -> HashState:
        models = {name: model.state() for name, model in self.models.items()}
        requests = sum(state.requests_total for state in models.values())
        latency_s = sum(model.latency.sum for model in self.models.values())
        total_ms = self.base_latency_ms + round(latency_s * 1000)
        return HashState(
            display_names=sorted(models),
            requests_total=requests,
            errors_total=sum(state.errors_total for state in models.values()),
            tokens_generated_total=sum(state.tokens_generated_total for state in models.values()),
            avg_latency_ms=total_ms / requests if requests else 0.0,
            total_latency_ms=total_ms,
            p95_latency_ms=p95_ms(s for model in self.models.values() for s in model.recent_s()),
            peak_vram_mb=self.peak_vram_mb,
            peak_sysmem_mb=self.peak_sysmem_mb,
            sample_count=self.sample_count,
            parsed_model_params=self.parsed_model_params,
            models=models,
        )

    def restore(self, state: HashState) -> None:
        self.peak_vram_mb = max(0, state.peak_vram_mb)
        self.peak_sysmem_mb = max(0, state.peak_sysmem_mb)
        self.sample_count = max(0, state.sample_count)
        self.parsed_model_params = state.parsed_model_params
        for name, model in (state.models or _llamesh_models(state)).items():
            self.models.setdefault(name, ModelMetrics()).restore(model)
        own_ms = round(sum(model.latency.sum for model in self.models.values()) * 1000)
        total_ms = state.total_latency_ms or round(state.avg_latency_ms * state.requests_total)
        self.base_latency_ms = max(0, total_ms - own_ms)


def _llamesh_models(state: HashState) -> dict[str, ModelState]:
    """llamesh does not split a hash by name: its sums go to the first name, the others start at 0."""
    totals = ModelState(state.requests_total, state.errors_total, state.tokens_generated_total)
    return {name: totals if i == 0 else ModelState() for i, name in enumerate(state.display_names)}


def p95_ms(samples_s: Iterable[float]) -> int:
    """llamesh's p95: index floor((n-1)*0.95) of the sorted samples; 0 if there are none."""
    ordered = sorted(samples_s)
    return round(ordered[int((len(ordered) - 1) * 0.95)] * 1000) if ordered else 0
