"""`llama-mesh demo`: a real node, a real llama-server and a small real model, from nothing to a streamed answer.

It runs the node as a user would, as a process of its own in a scratch directory, and leaves nothing behind but the
cached model. With --transcribe the same node then runs whisper-server, too.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

import mesh
from mesh.cli import demo_model, demo_speech
from mesh.cli.failure import OK, CliError
from mesh.cli.node import Node
from mesh.cli.output import print_json, stderr_console, stdout_console
from mesh.cli.whisper_setup import WhisperParts

PROMPT = "Explain in two sentences why llamas are good pack animals."
MODEL = "smollm2"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 15.0
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Answer:
    """What one streamed chat said and how fast it came."""

    text: str
    first_token_s: float
    tokens: int
    tokens_per_s: float


def demo(arguments: argparse.Namespace) -> int:
    """Fetch, start, load, ask, report, stop."""
    for ending in (signal.SIGTERM, signal.SIGHUP):  # by default they would end us without stopping the node
        signal.signal(ending, _leave)
    notes = stderr_console()
    model = demo_model.ensure(os.environ, notes)
    notes.print(f"[bold]model[/]   {escape(str(model))}", soft_wrap=True)
    speech = demo_speech.ensure(notes) if arguments.transcribe else None
    if speech is not None:
        notes.print(f"[bold]speech[/]  {escape(str(speech.speech))}", soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="llama-mesh-demo-") as scratch, _node(Path(scratch), model, speech) as node:
        notes.print(f"[bold]node[/]    {node.url}")
        started_at = time.monotonic()
        with notes.status("starting llama-server and loading the model …"):
            node.post("/admin/prewarm", {"model": MODEL, "wait": True, "timeout_s": 120}, timeout_s=135)
        load_s = time.monotonic() - started_at
        notes.print(f"[bold]loaded[/]  in {load_s:.1f} s\n")
        answer = _ask(node, arguments, echo=_silent if arguments.json else _type_out)
        if not arguments.json:
            _report(node, arguments, answer)
        heard = None if speech is None else demo_speech.transcribe(node, speech, notes, as_json=arguments.json)
        if arguments.json:
            print_json(_as_json(node, arguments, answer, load_s, heard))
        elif speech is not None and heard is not None:
            demo_speech.report(node, speech, heard, keeps=arguments.keep)
        elif not arguments.transcribe:
            notes.print(f"\n{demo_speech.HINT}")
        if arguments.keep:
            _wait_for_interrupt()
    return OK


def _leave(signal_number: int, frame: object) -> None:
    sys.exit(128 + signal_number)


def _ask(node: Node, arguments: argparse.Namespace, *, echo: Callable[[str], None]) -> Answer:
    body = _chat(arguments.prompt, arguments.max_tokens)
    asked_at = time.monotonic()
    first_at: float | None = None
    texts: list[str] = []
    tokens = 0
    with node.stream("POST", "/v1/chat/completions", body=body) as response:
        for event in _events(response.iter_lines()):
            if text := _delta(event):
                first_at = first_at or time.monotonic()
                texts.append(text)
                echo(text)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    if first_at is None:
        raise CliError("the model answered nothing", fix="Try again with another --prompt.")
    spent_s = max(time.monotonic() - first_at, 1e-6)
    tokens = tokens or len(texts)
    # The first token is what the clock starts with.
    return Answer("".join(texts), first_at - asked_at, tokens, max(tokens - 1, 0) / spent_s)


def _chat(prompt: str, max_tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """Yield the JSON of each SSE event; an error event raises."""
    for line in lines:
        data = line.removeprefix("data:").strip()
        if not line.startswith("data:") or data == "[DONE]":
            continue
        event = json.loads(data)
        if error := event.get("error"):
            raise CliError(f"the stream broke off: {error.get('message', error)}")
        yield event


def _delta(event: dict[str, Any]) -> str:
    choices = event.get("choices") or [{}]
    return (choices[0].get("delta") or {}).get("content") or ""


def _type_out(text: str) -> None:
    print(text, end="", flush=True)


def _silent(text: str) -> None:
    pass


def _as_json(
    node: Node, arguments: argparse.Namespace, answer: Answer, load_s: float, heard: demo_speech.Transcript | None
) -> dict[str, Any]:
    """Return what --json prints; the transcription only if it was asked for, null if it was not possible."""
    result: dict[str, Any] = {
        "url": node.url,
        "model": MODEL,
        "load_s": round(load_s, 3),
        "first_token_s": round(answer.first_token_s, 3),
        "tokens": answer.tokens,
        "tokens_per_s": round(answer.tokens_per_s, 1),
        "text": answer.text,
    }
    if arguments.transcribe:
        result["transcription"] = None if heard is None else heard.as_json()
    return result


def _report(node: Node, arguments: argparse.Namespace, answer: Answer) -> None:
    print("\n", flush=True)
    out = stdout_console()
    out.print(
        f"[bold green]{answer.tokens_per_s:.0f} tokens/s[/], first token after "
        f"[bold]{answer.first_token_s * 1000:.0f} ms[/], {answer.tokens} tokens\n"
    )
    out.print(
        "[bold]The same with curl:[/]" if arguments.keep else "[bold]The same with curl[/] (demo --keep lets you):"
    )
    out.print(_curl_line(node, arguments.prompt), markup=False, soft_wrap=True)


def _curl_line(node: Node, prompt: str) -> str:
    body = json.dumps({"model": MODEL, "stream": True, "messages": [{"role": "user", "content": prompt}]})
    quoted = body.replace("'", "'\\''")
    return f"curl -N {node.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{quoted}'"


def _wait_for_interrupt() -> None:
    try:
        stderr_console().print("\n[dim]The node keeps running; Ctrl-C stops it.[/]")
        signal.pause()
    except KeyboardInterrupt:
        stderr_console().print("\nstopping")


@contextmanager
def _node(scratch: Path, model: Path, speech: WhisperParts | None) -> Iterator[Node]:
    """Run a node that serves *model*, and the one for *speech*, for as long as the block runs."""
    port = _free_port()
    _write_files(scratch, model, port, speech)
    log = scratch / "node.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            _command(scratch),
            cwd=scratch,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to us, and we stop it in order
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
    try:
        node = Node(f"http://127.0.0.1:{port}")
        _wait_until_ready(node, process, log)
        yield node
    finally:
        _stop(process)


def _die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the demo is killed, so that the node stops in order then too."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _command(scratch: Path) -> list[str]:
    files = ["--config", str(scratch / "config.yaml"), "--cookbook", str(scratch / "cookbook.yaml")]
    return [sys.executable, "-m", "mesh", "serve", *files]


def _environment() -> dict[str, str]:
    """Return our environment without LLAMESH_ overrides, so that the demo is the same on every machine.

    The node runs in another directory; it must find this very code there even if it is not installed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("LLAMESH_")}
    paths = [str(Path(mesh.__file__).parents[1]), kept.get("PYTHONPATH")]
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def _write_files(scratch: Path, model: Path, port: int, speech: WhisperParts | None) -> None:
    # JSON is YAML, and quotes any path right.
    config: dict[str, Any] = {"listen_addr": f"127.0.0.1:{port}", "node_id": "demo", "cluster": {"enabled": False}}
    profile = {"id": "default", "model_path": str(model.absolute()), "llama_server_args": "-c 2048"}
    models = [{"name": MODEL, "profiles": [profile]}]
    if speech is not None:
        config |= demo_speech.settings(speech)
        models.append(demo_speech.cookbook_entry(speech))
    (scratch / "config.yaml").write_text(json.dumps(config))
    (scratch / "cookbook.yaml").write_text(json.dumps({"models": models}))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(node: Node, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise CliError(f"the node ended with status {process.returncode}:\n{_tail(log)}")
        try:
            node.get("/readyz")
            return
        except CliError as error:
            if time.monotonic() > deadline:
                raise CliError(f"the node is not ready after {START_TIMEOUT_S:.0f} s: {error}\n{_tail(log)}") from error
        time.sleep(0.05)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-15:]
    return "\n".join(f"  | {line[:500]}" for line in lines) or "  | (no output)"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the node as a service manager would: SIGTERM, patience, and the second SIGTERM that means now."""
    for last_words in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        process.send_signal(last_words)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
        except KeyboardInterrupt:
            continue
