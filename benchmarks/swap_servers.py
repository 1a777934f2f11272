"""What the swap benchmark starts and asks: a node with two models that do not fit together, and llama-servers by hand.

Owns processes and sockets; measures moments, judges nothing. What it starts ends with the context that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.candidates import free_port
from benchmarks.native import BenchmarkError
from benchmarks.swap_report import Swap

MODELS = ("a", "b")
#: ``-cram 0``: no prompt cache that grows; the node would bound it, a llama-server by hand would not
ARGS = "-c 4096 -np 2 -cram 0"
#: about what such a llama-server takes; it is in the cookbook, so that the node's own estimates decide nothing here
ESTIMATE_MIB = 256
NO_BUDGET = None
READY_TIMEOUT_S, STOP_TIMEOUT_S, ANSWER_TIMEOUT_S = 60.0, 30.0, 300.0
HEALTH_POLL_S = 0.01
LAST_LINES, LAST_LINE_CHARACTERS = 15, 500
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer that was complete. Moments are monotonic, except ``sent_wall_s``."""

    sent_at: float
    sent_wall_s: float
    first_token_at: float
    ended_at: float
    instance: str | None  #: which of the node's instances gave it

    @property
    def first_token_s(self) -> float:
        return self.first_token_at - self.sent_at


def ask(port: int, model: str, *, max_tokens: int, prompt: str = "Count to twenty.") -> Answer:
    """Send one streaming chat request on a connection of its own and read the answer to its end; raise if it is bad."""
    body = {"model": model, "stream": True, "max_tokens": max_tokens, "messages": [{"role": "user", "content": prompt}]}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_TIMEOUT_S)
    sent_at, sent_wall_s, first_token_at, last = time.monotonic(), time.time(), None, b""
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise BenchmarkError(f"{model} was answered {response.status}: {response.read()[:500]!r}")
        for line in response:
            if first_token_at is None and _has_content(line):
                first_token_at = time.monotonic()
            last = line.strip() or last
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkError(f"{model} was not answered: {error!r}") from error
    finally:
        connection.close()
    if first_token_at is None or last != b"data: [DONE]":
        raise BenchmarkError(f"{model} was answered without an end or without a token; the last line: {last[:300]!r}")
    instance = response.headers.get("X-Llama-Mesh-Instance")
    return Answer(sent_at, sent_wall_s, first_token_at, time.monotonic(), instance)


def _has_content(line: bytes) -> bool:
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:]).get("choices") or [{}]
    return bool((choices[0].get("delta") or {}).get("content"))


@dataclass(frozen=True, slots=True)
class Launch:
    """How the node started one of its llama-servers."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)

    def on_port(self, port: int) -> tuple[str, ...]:
        """Return the same command line for another port."""
        at = self.argv.index("--port") + 1
        return (*self.argv[:at], str(port), *self.argv[at + 1 :])


# -- the node


@dataclass(slots=True)
class Node:
    """A running ``python -m mesh serve``. Its log can be read until the directory is removed, also after its end."""

    port: int
    log: Path

    def instances(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = _call(self.port, "GET", "/admin/instances")["instances"]
        return found

    def prewarm(self, model: str) -> dict[str, Any]:
        """Load *model* and return its instance."""
        answer = _call(self.port, "POST", "/admin/prewarm", {"model": model, "timeout_s": READY_TIMEOUT_S})
        instance: dict[str, Any] = answer["instance"]
        return instance

    def swap_to(self, model: str, max_tokens: int) -> Answer:
        """Ask for the model that is not loaded; raise if the other one did not have to go for it."""
        before = {instance["id"] for instance in self.instances()}
        answer = ask(self.port, model, max_tokens=max_tokens)
        after = [(instance["model_id"], instance["state"]) for instance in self.instances()]
        if answer.instance in before or after != [(model, "ready")]:
            raise BenchmarkError(f"this was no swap: {answer.instance} answered; now run: {after}")
        return answer

    def launch_of(self, model: str) -> Launch:
        """Return the command line and environment of the llama-server that runs *model*."""
        instance = next(i for i in self.instances() if i["model_id"] == model)
        pairs = Path(f"/proc/{instance['pid']}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
        env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
        return Launch(tuple(instance["command"]), env)


@contextmanager
def node(
    root: Path, directory: Path, files: Mapping[str, Path], *, budget_mib: int | None, tenure_s: float
) -> Iterator[Node]:
    """Run the node of the working tree *root* with one model per file, until the block ends."""
    directory.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "mesh", "serve", *_node_files(directory, port, files, budget_mib, tenure_s)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLAMESH_")}
    log = directory / "node.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=directory,
            env=environment | {"PYTHONPATH": str(root)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to us, and we stop it in order
            preexec_fn=_die_with_parent,
        )
    try:
        _wait_until(port, "/readyz", process, log)
        yield Node(port, log)
    finally:
        _stop(process)


def _node_files(
    directory: Path, port: int, files: Mapping[str, Path], budget_mib: int | None, tenure_s: float
) -> Sequence[str]:
    """Write configuration and cookbook as JSON, which is YAML; return the flags that name them."""
    config = {
        "listen_addr": f"127.0.0.1:{port}",
        "node_id": "swap",
        "metrics_path": str(directory / "metrics.json"),
        "max_sysmem_mb": budget_mib,
        "shutdown_grace_period_seconds": 2,
        # nobody is turned away: how long requests wait is what is measured
        "model_defaults": {"min_eviction_tenure_secs": tenure_s, "max_wait_in_queue_ms": 1000 * ANSWER_TIMEOUT_S},
    }
    profile = {"id": "default", "estimated_sysmem_mb": ESTIMATE_MIB, "llama_server_args": ARGS}
    cookbook = {"models": [{"name": n, "profiles": [{**profile, "model_path": str(p)}]} for n, p in files.items()]}
    flags: list[str] = []
    for name, content in (("config", config), ("cookbook", cookbook)):
        path = directory / f"{name}.yaml"
        path.write_text(json.dumps(content, indent=1))
        flags += [f"--{name}", str(path)]
    return flags


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM should the benchmark be killed; the node then stops its llama-servers in order."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


# -- by hand


class Bare:
    """One llama-server at a time, swapped as a script would: SIGTERM, wait for the exit, start, poll /health, ask."""

    def __init__(self, launches: Mapping[str, Launch], directory: Path) -> None:
        self._launches = launches
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir()

    def swap_to(self, model: str, max_tokens: int) -> Swap:
        """Return the times from the SIGTERM to the first token of *model*; the first call has nothing to stop."""
        began_at = time.monotonic()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            _wait_for_exit(self._process)
        stopped_at = time.monotonic()
        port, log = free_port(), self._directory / f"{model}.log"
        launch = self._launches[model]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                launch.on_port(port),
                env=dict(launch.env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started_at = time.monotonic()
        _wait_until(port, "/health", self._process, log, every_s=HEALTH_POLL_S)
        ready_at = time.monotonic()
        first_token_at = ask(port, model, max_tokens=max_tokens).first_token_at
        moments = (began_at, stopped_at, started_at, ready_at, first_token_at)
        parts = {
            name: end - start
            for name, start, end in zip(("stop", "start", "load", "answer"), moments, moments[1:], strict=False)
        }
        return Swap(model, first_token_at - began_at, parts)

    def close(self) -> None:
        if self._process is not None:
            _stop(self._process)


# -- both


def _wait_until(port: int, path: str, process: subprocess.Popen[bytes], log: Path, *, every_s: float = 0.05) -> None:
    """Return when GET *path* answers 200; raise with the last lines of *log* if it does not in time."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        with contextlib.suppress(BenchmarkError):
            _call(port, "GET", path)
            return
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
            tail = "\n".join(line[:LAST_LINE_CHARACTERS] for line in lines)
            raise BenchmarkError(f"it does not answer GET {path}; status {process.returncode}; its last lines:\n{tail}")
        time.sleep(every_s)


def _call(port: int, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the answer's JSON, None if it is none; raise for anything but 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_TIMEOUT_S + 5)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise BenchmarkError(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()
    if response.status != 200:
        raise BenchmarkError(f"{method} {path}: {response.status} {content[:500]!r}")
    with contextlib.suppress(ValueError):
        return json.loads(content)
    return None


def _wait_for_exit(process: subprocess.Popen[bytes]) -> None:
    """Return as soon as it has exited; ``Popen.wait`` with a timeout would look only every 50 ms."""
    descriptor = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(descriptor, select.POLLIN)
        if not poller.poll(STOP_TIMEOUT_S * 1000):
            raise BenchmarkError(f"a llama-server did not end within {STOP_TIMEOUT_S:g} s of SIGTERM")
    finally:
        os.close(descriptor)
    process.wait()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, patience, the second SIGTERM that means now, SIGKILL; an interrupt only hastens it."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(STOP_TIMEOUT_S)
    process.wait()
