"""One run of the load generator (native/loadgen.c): what to send, and what came of it."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.native import BenchmarkError, compiled

API_KEY = "sk-bench-0123456789abcdef0123456789abcdef"
OPENED_TIMEOUT_S = 60
STREAM_EVENTS = 1_000_000_000  #: streams outlast every window; the generator closes them

#: what the OpenAI Python client sends with a chat request
CLIENT_HEADERS = (
    "Accept-Encoding: gzip, deflate",
    "Connection: keep-alive",
    "Accept: application/json",
    "User-Agent: OpenAI/Python 2.8.1",
    "X-Stainless-Lang: python",
    "X-Stainless-Package-Version: 2.8.1",
    "X-Stainless-OS: Linux",
    "X-Stainless-Arch: x64",
    "X-Stainless-Runtime: CPython",
    f"Authorization: Bearer {API_KEY}",
    "x-stainless-retry-count: 0",
    "x-stainless-read-timeout: 600",
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of a candidate. Without ``rate_per_s`` each connection sends as soon as it has its answer."""

    connections: int
    seconds: float
    model: str = "mock"
    rate_per_s: float = 0
    request_bytes: int = 1000
    answer_bytes: int = 1000
    stream_interval_us: int = 0  #: not 0: every request is a stream with an event per so many microseconds
    unique_header: str | None = None  #: a header whose value differs in every request
    warmup_s: float = 0.3

    @property
    def stream(self) -> bool:
        return self.stream_interval_us > 0

    def body(self) -> bytes:
        """The chat request; its prompt is as long as ``request_bytes`` asks."""
        request: dict[str, Any] = {"model": self.model, "messages": [{"role": "user", "content": ""}]}
        request |= {"stream": self.stream, "temperature": 0.7}
        if self.stream:
            request |= {"max_tokens": STREAM_EVENTS, "mock_interval_us": self.stream_interval_us}
        else:
            request |= {"mock_answer_bytes": self.answer_bytes}
        missing = max(1, self.request_bytes - len(json.dumps(request)))
        request["messages"][0]["content"] = ("the quick brown fox " * (missing // 20 + 1))[:missing]
        return json.dumps(request).encode()

    def scaled(self, factor: float) -> Load:
        return replace(self, seconds=self.seconds * factor)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the generator counted within its window. CPU is that of the measured processes together."""

    seconds: float
    requests: int
    events: int
    cpu_us: float
    latency_us: dict[str, float] = field(default_factory=dict)
    event_delay_us: dict[str, float] = field(default_factory=dict)
    late: int = 0
    reconnects: int = 0

    @property
    def cpu_us_per_request(self) -> float:
        return self.cpu_us / self.requests

    @property
    def cpu_us_per_event(self) -> float:
        return self.cpu_us / self.events


def run(load: Load, port: int, pids: Sequence[int]) -> Outcome:
    """Put *load* on *port* and measure the processes *pids*. Raise ``BenchmarkError`` if one answer was wrong."""
    with _body_file(load) as body:
        command = _command(load, port, pids, body)
        # the generator ends by itself; this limit is for the case that it does not
        limit_s = load.seconds + load.warmup_s + 60
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    return _outcome(result.stdout, result.stderr, port)


@contextmanager
def held_streams(load: Load, port: int) -> Iterator[int]:
    """Keep ``load.connections`` streams open while the block runs; yields their number."""
    with _body_file(load) as body:
        command = [*_command(load, port, (), body), "--hold"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            first = json.loads(process.stdout.readline() or "{}")
            if "open" not in first:
                raise BenchmarkError(f"the streams could not be opened: {first.get('error') or 'no answer'}")
            yield int(first["open"])
        finally:
            process.communicate(timeout=OPENED_TIMEOUT_S)


@contextmanager
def _body_file(load: Load) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(load.body())
        file.flush()
        yield Path(file.name)


def _command(load: Load, port: int, pids: Sequence[int], body: Path) -> list[str]:
    command = [str(compiled("loadgen")), "--port", str(port), "--body-file", str(body)]
    command += ["--connections", str(load.connections), "--rate", str(load.rate_per_s)]
    command += ["--duration-ms", str(round(load.seconds * 1000)), "--warmup-ms", str(round(load.warmup_s * 1000))]
    for header in CLIENT_HEADERS:
        command += ["--header", header]
    for pid in pids:
        command += ["--cpu-pid", str(pid)]
    if load.unique_header:
        command += ["--unique-header", load.unique_header]
    return [*command, "--stream"] if load.stream else command


def _outcome(stdout: str, stderr: str, port: int) -> Outcome:
    try:
        found = json.loads(stdout)
    except ValueError:
        raise BenchmarkError(f"the load generator failed on port {port}: {stdout[-500:]}{stderr[-500:]}") from None
    if found["errors"]:
        raise BenchmarkError(f"{found['errors']} failed requests on port {port}; the first: {found['error']}")
    if not found["requests"] and not found["events"]:
        pause = f"the generator itself was stopped for up to {found['longest_pause_ms']:.0f} ms"
        raise BenchmarkError(f"port {port} answered nothing within {found['seconds']:.1f} s ({pause})")
    return Outcome(
        seconds=found["seconds"],
        requests=found["requests"],
        events=found["events"],
        cpu_us=sum(found["cpu_ns"]) / 1000,
        latency_us=found["latency_us"] or {},
        event_delay_us=found["event_delay_us"] or {},
        late=found["late"],
        reconnects=found["reconnects"],
    )
