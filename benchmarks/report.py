"""From measurements to figures: medians over rounds, ratios to nginx, the JSON file and the table. Measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.load import Outcome

REQUEST_RATIO_GOAL = 2.0
EVENT_RATIO_GOAL = 1.25

ANSWER_MB = 0.2  #: of the part "answer_200kb"

Figure = Callable[[Outcome], float]


@dataclass(slots=True)
class Measurements:
    """Everything one run of the benchmark found out: ``outcomes[part][candidate]`` has one entry per round."""

    outcomes: dict[str, dict[str, list[Outcome]]] = field(default_factory=dict)
    idle_kb_per_stream: dict[str, float] = field(default_factory=dict)
    idle_streams: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, part: str, candidate: str, outcome: Outcome) -> None:
        self.outcomes.setdefault(part, {}).setdefault(candidate, []).append(outcome)

    def medians(self, part: str, figure: Figure, *, without_proxy: bool = False) -> dict[str, float]:
        """The median over rounds of *figure*, per candidate; the mock itself only if it is asked for."""
        found = self.outcomes.get(part, {})
        wanted = {name: outcomes for name, outcomes in found.items() if without_proxy or name != "direct"}
        return {name: round(median(map(figure, outcomes)), 2) for name, outcomes in wanted.items()}


def cpu_us(outcome: Outcome) -> float:
    """CPU per unit of work: per event where there are events, else per request."""
    return outcome.cpu_us_per_event if outcome.events else outcome.cpu_us_per_request


def ratio(figures: Mapping[str, float], candidate: str = "mesh") -> float | None:
    """How many times nginx's CPU *candidate* needs; ``None`` if one of them was not measured."""
    if not figures.get("nginx") or candidate not in figures:
        return None
    return round(figures[candidate] / figures["nginx"], 3)


def added_us(measurements: Measurements, part: str, latency: Figure) -> dict[str, float]:
    """What a proxy adds to *latency*: its quietest round minus that of `direct`.

    Other work on the machine only ever lengthens a latency, and a percentile of one window by milliseconds: a median
    over few rounds would still show it.
    """
    quietest = {name: min(map(latency, outcomes)) for name, outcomes in measurements.outcomes.get(part, {}).items()}
    if "direct" not in quietest:
        return {}
    return {name: round(value - quietest["direct"], 1) for name, value in quietest.items() if name != "direct"}


def summary(measurements: Measurements, moderate_rate: str) -> dict[str, Any]:
    """The content of proxy.json; the keys of issue 2 first, the rest for whoever wants to know more."""
    saturated = measurements.medians("saturated", cpu_us)
    events = measurements.medians("sse", cpu_us)
    p50 = added_us(measurements, moderate_rate, lambda o: o.latency_us["p50"])
    p99 = added_us(measurements, moderate_rate, lambda o: o.latency_us["p99"])
    idle = measurements.idle_kb_per_stream
    return {
        "requests": {
            "cpu_us": saturated,
            "ratio": ratio(saturated),
            "added_p50_us": p50.get("mesh"),
            "added_p99_us": p99.get("mesh"),
            "added_us": {"p50": p50, "p99": p99},
            "equal_rate_ratio": _equal_rate_ratios(measurements),
        },
        "sse": {
            "cpu_us_per_event": events,
            "ratio": ratio(events),
            "added_delay_p50_us": added_us(measurements, "sse", lambda o: o.event_delay_us["p50"]),
            "added_delay_p99_us": added_us(measurements, "sse", lambda o: o.event_delay_us["p99"]),
        },
        "idle_streams": {"kb_per_stream": idle.get("mesh"), "all": idle, "streams": measurements.idle_streams},
        "two_nodes": _two_nodes(measurements),
        "goals": {"requests_ratio": REQUEST_RATIO_GOAL, "sse_ratio": EVENT_RATIO_GOAL},
        "parts": {part: _part(measurements, part) for part in measurements.outcomes},
        "failures": measurements.failures,
    }


def _equal_rate_ratios(measurements: Measurements) -> dict[str, float | None]:
    """Saturated, the faster proxy also finds everything else awake; at equal rates both pay for the same wake-ups."""
    rates = [part for part in measurements.outcomes if part.startswith("rate_")]
    return {part: ratio(measurements.medians(part, cpu_us)) for part in rates}


def _two_nodes(measurements: Measurements) -> dict[str, float | None]:
    """What a link costs: CPU is that of both nodes together."""
    name = "two-nodes"
    saturated, events = measurements.medians("saturated", cpu_us), measurements.medians("sse", cpu_us)
    large = measurements.medians("answer_200kb", lambda o: o.requests * ANSWER_MB / o.seconds)
    return {
        "cpu_us_per_request": saturated.get(name),
        "requests_ratio": ratio(saturated, name),
        "cpu_us_per_event": events.get(name),
        "sse_ratio": ratio(events, name),
        "events_per_s": measurements.medians("sse_saturated", _per_s).get(name),
        "mb_per_s": large.get(name),
    }


def _part(measurements: Measurements, part: str) -> dict[str, Any]:
    figures = measurements.medians(part, cpu_us)
    everyone = measurements.outcomes[part]
    return {
        "cpu_us": figures,
        "ratio": {name: ratio(figures, name) for name in figures if name != "nginx"},
        "per_s": measurements.medians(part, _per_s, without_proxy=True),
        "busy": measurements.medians(part, lambda o: o.cpu_us / o.seconds / 1e6),
        "p50_us": measurements.medians(part, lambda o: _delay(o)["p50"], without_proxy=True),
        "p99_us": measurements.medians(part, lambda o: _delay(o)["p99"], without_proxy=True),
        "cpu_us_by_round": {name: [round(cpu_us(o), 2) for o in outcomes] for name, outcomes in everyone.items()},
    }


def _per_s(outcome: Outcome) -> float:
    return (outcome.events or outcome.requests) / outcome.seconds


def _delay(outcome: Outcome) -> Mapping[str, float]:
    return outcome.event_delay_us or outcome.latency_us


def table(found: Mapping[str, Any], titles: Mapping[str, str]) -> str:
    """The same figures for people."""
    header = ("", "candidate", "CPU us", "x nginx", "busy", "per s", "p50 us", "p99 us")
    rows: list[Sequence[str]] = [header]
    for part, figures in found["parts"].items():
        for index, candidate in enumerate(figures["per_s"]):
            rows.append(_row(titles.get(part, part) if index == 0 else "", candidate, figures))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [_line(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join([*lines, "", *_conclusions(found)])


def _row(title: str, candidate: str, figures: Mapping[str, Any]) -> Sequence[str]:
    times = figures["ratio"].get(candidate)
    cpu = figures["cpu_us"].get(candidate)
    return (
        title,
        candidate,
        "" if cpu is None else f"{cpu:.1f}",
        "" if times is None else f"{times:.2f}",
        "" if cpu is None else f"{figures['busy'][candidate]:.0%}",
        *(f"{figures[key][candidate]:.0f}" for key in ("per_s", "p50_us", "p99_us")),
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
    right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right])


def _conclusions(found: Mapping[str, Any]) -> list[str]:
    requests, sse, idle = found["requests"], found["sse"], found["idle_streams"]
    added_p50, added_p99 = (_each(requests["added_us"][key]) for key in ("p50", "p99"))
    delay_p50, delay_p99 = _each(sse["added_delay_p50_us"]), _each(sse["added_delay_p99_us"])
    lines = [
        _goal("request", requests["ratio"], REQUEST_RATIO_GOAL),
        f"CPU per request at equal rates, x nginx: {_each(requests['equal_rate_ratio'])}",
        _goal("SSE event", sse["ratio"], EVENT_RATIO_GOAL),
        f"two nodes with a link, CPU of both: {_each(found['two_nodes'])}",
        f"added latency in us: p50 {added_p50}, p99 {added_p99}",
        f"added delay of an event in us: p50 {delay_p50}, p99 {delay_p99}",
        f"memory in KiB per open idle stream ({idle['streams']} streams): {_each(idle['all'])}",
    ]
    return lines + [f"FAILED: {failure.splitlines()[0]}" for failure in found["failures"]]


def _goal(what: str, measured: float | None, goal: float) -> str:
    if measured is None:
        return f"CPU per {what}: no ratio to nginx (goal <= {goal})"
    return f"CPU per {what}: {measured:.2f} x nginx, goal <= {goal}: {'met' if measured <= goal else 'MISSED'}"


def _each(figures: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in figures.items() if value is not None) or "not measured"
