"""The second step of `llama-mesh demo`: the same node runs whisper-server too, and transcribes a real speech."""

from __future__ import annotations

import os
import shlex
import time
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from mesh.cli import whisper_setup
from mesh.cli.failure import CliError
from mesh.cli.node import Node
from mesh.cli.output import stdout_console
from mesh.cli.transcribe import Wish, ask
from mesh.cli.whisper_setup import WhisperParts

MODEL: Final = "whisper-tiny"
HINT: Final = "[dim]demo --transcribe also shows speech to text.[/]"
_LOAD_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was heard, and how fast."""

    text: str
    speech_s: float
    load_s: float
    took_s: float

    def as_json(self) -> dict[str, Any]:
        return {
            "model": MODEL,
            "speech_s": round(self.speech_s, 3),
            "load_s": round(self.load_s, 3),
            "took_s": round(self.took_s, 3),
            "text": self.text,
        }


def ensure(notes: Console) -> WhisperParts | None:
    """Return server, model and speech; None, and the reason on *notes*, if they are not to be had: the demo is one
    without them, too."""
    try:
        return whisper_setup.ensure(os.environ, notes)
    except CliError as error:
        notes.print(f"the transcription is left out: {error.message}", style="yellow", markup=False, soft_wrap=True)
        notes.print(error.fix or "", markup=False, soft_wrap=True)
        return None


def settings(parts: WhisperParts) -> dict[str, Any]:
    """Return what the node's configuration needs for it."""
    return {"whisper_cpp": {"binary_path": str(parts.server.absolute())}}


def cookbook_entry(parts: WhisperParts) -> dict[str, Any]:
    """Return the model for the node's cookbook."""
    profile = {"id": "default", "engine": "whisper", "model_path": str(parts.model.absolute())}
    return {"name": MODEL, "profiles": [profile]}


def transcribe(node: Node, parts: WhisperParts, notes: Console, *, as_json: bool) -> Transcript:
    """Load the model, send the speech, return what comes back."""
    started_at = time.monotonic()
    with notes.status("starting whisper-server and loading the model …"):
        body = {"model": MODEL, "wait": True, "timeout_s": _LOAD_TIMEOUT_S}
        node.post("/admin/prewarm", body, timeout_s=_LOAD_TIMEOUT_S + 15)
    asked_at = time.monotonic()
    with parts.speech.open("rb") as file:
        text = ask(node, Wish(MODEL), file, parts.speech.name, as_json=as_json)
    return Transcript(text, _seconds(parts.speech), asked_at - started_at, time.monotonic() - asked_at)


def _seconds(speech: Path) -> float:
    with wave.open(str(speech), "rb") as audio:
        return audio.getnframes() / audio.getframerate()


def report(node: Node, parts: WhisperParts, transcript: Transcript, *, keeps: bool) -> None:
    """Print it for people, with lines to try, and how, unless the node keeps running anyway."""
    print(f"\n{transcript.text}\n", flush=True)
    out = stdout_console()
    out.print(
        f"[bold green]{transcript.speech_s:.0f} s of speech in {transcript.took_s:.1f} s[/], "
        f"whisper-server loaded in [bold]{transcript.load_s:.1f} s[/]\n"
    )
    out.print("[bold]The same again" + (":[/]" if keeps else "[/] (demo --transcribe --keep lets you):"))
    out.print(f"llama-mesh transcribe --url {node.url} {shlex.quote(str(parts.speech))}", markup=False, soft_wrap=True)
    curl = f"curl {node.url}/v1/audio/transcriptions -F model={MODEL} -F {shlex.quote(f'file=@{parts.speech}')}"
    out.print(curl, markup=False, soft_wrap=True)
