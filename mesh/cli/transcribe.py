"""`llama-mesh transcribe`: what is said in a file, as text on stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import httpx

from mesh.cli import node
from mesh.cli.failure import OK, CliError
from mesh.cli.output import print_json
from mesh.cli.upload import FileForm, UploadView, size_of

FORMATS: Final = ("text", "json", "srt", "vtt", "verbose_json")
STDIN: Final = "-"
_AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class Wish:
    """What is asked of a model for audio."""

    model: str
    format: str = "text"
    translate: bool = False
    language: str | None = None
    prompt: str | None = None

    @property
    def path(self) -> str:
        return "/v1/audio/translations" if self.translate else "/v1/audio/transcriptions"

    @property
    def fields(self) -> dict[str, str]:
        """Those of the form. Text is taken out of JSON, which llama-server's audio models have too."""
        response_format = "json" if self.format == "text" else self.format
        given = {"language": self.language, "prompt": self.prompt}
        told = {name: value for name, value in given.items() if value is not None}
        return {"model": self.model, "response_format": response_format, **told}


def transcribe(arguments: argparse.Namespace) -> int:
    """Send the file, wait, print what comes back."""
    with opened(arguments.file) as (file, name):
        found = node.find(arguments)
        wish = Wish(
            model=arguments.model or _only_model(found),
            format=arguments.format,
            translate=arguments.translate,
            language=arguments.language,
            prompt=arguments.prompt,
        )
        answer = ask(found, wish, file, name, as_json=arguments.json)
    _print(answer, as_json=arguments.json)
    return OK


@contextmanager
def opened(name: str) -> Iterator[tuple[IO[bytes], str]]:
    """Open the file, or stdin; the value has the name to send with it, too."""
    if name == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise CliError("there is no audio on stdin", fix="Pipe it in: llama-mesh transcribe - < speech.wav")
        yield sys.stdin.buffer, "stdin"
        return
    try:
        file = Path(name).open("rb")  # noqa: SIM115 - closed below; errors of the block are not ours
    except OSError as error:
        raise CliError(f"cannot read {name}: {error.strerror}", fix="Name an audio file, or - for stdin.") from error
    with file:
        yield file, Path(name).name


def _only_model(found: node.Node) -> str:
    """Return the one model for audio that the node has; those for text that hear as well do not make it unclear."""
    capabilities = {str(model["id"]): _capabilities(model) for model in found.get("/v1/models")["data"]}
    audio_only = [name for name, able in capabilities.items() if able == [_AUDIO]]
    names = audio_only or [name for name, able in capabilities.items() if _AUDIO in able]
    if not names:
        fix = "Give its cookbook one with 'engine: whisper', or name one with --model."
        raise CliError(f"the node at {found.url} has no model for audio", fix=fix)
    if len(names) > 1:
        raise CliError(f"there are several models for audio: {', '.join(names)}", fix="Name one with --model.")
    return names[0]


def _capabilities(model: dict[str, Any]) -> list[str]:
    return (model.get("metadata") or {}).get("capabilities") or []  # older nodes do not tell


def ask(found: node.Node, wish: Wish, file: IO[bytes], name: str, *, as_json: bool) -> Any:
    """Return what the node answers: a text, or an object for the formats that are one."""
    form = FileForm(wish.fields, file, name, size_of(file))
    with UploadView(name, form.size_bytes, as_json=as_json) as view:
        response = found.upload(wish.path, form.pieces(view), form.headers, model=wish.model)
    if wish.format in ("srt", "vtt"):
        return response.text
    answer = _object(response)
    return answer["text"].strip() if wish.format == "text" else answer


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
        start = response.text[:200]
        raise CliError(f"the answer has no text: {start}", fix="Is it a llama-mesh node? See --url.")
    return answer


def _print(answer: str | dict[str, Any], *, as_json: bool) -> None:
    if not isinstance(answer, str):
        print_json(answer)
    elif as_json:
        print_json({"text": answer})
    else:
        print(answer, end="" if answer.endswith("\n") else "\n")
