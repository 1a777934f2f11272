"""Every key of cookbook.yaml: shapes and single values. ``mesh.config.cookbook`` makes profiles of them."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, Strict, WithJsonSchema

from mesh.config import shellwords
from mesh.config.fields import Section, StrictLine, not_zero
from mesh.config.fields import key as _key
from mesh.config.profile import Engine
from mesh.config.units import Count, Megabytes, Milliseconds, Seconds


def _split_args(value: object) -> object:
    """Return the words of a shell-style string, or of a list whose items are words already."""
    if isinstance(value, list):
        return tuple(_word(item) for item in value)
    if not isinstance(value, str):
        raise ValueError("expected text as in a shell, or a list of words")
    try:
        return tuple(shellwords.split(value))
    except shellwords.ShellSyntaxError as error:
        raise ValueError(f"invalid shell syntax: {error}. Check for unmatched quotes, or write a list") from None


def _word(item: object) -> str:
    if isinstance(item, bool):
        return str(item).lower()
    if not isinstance(item, str | int | float):
        raise ValueError("a list of arguments holds plain words and numbers only")
    return str(item)


def _no_nul(words: tuple[str, ...]) -> tuple[str, ...]:
    if any("\0" in word for word in words):
        raise ValueError("holds a NUL character, which no program can be given")
    return words


def _environment(value: object) -> object:
    """Let numbers be values; true or false would have to be guessed at."""
    if not isinstance(value, dict):
        raise ValueError("expected a mapping of variables, for example {OMP_NUM_THREADS: 4}")
    for name, text in value.items():
        if not name or "=" in name or "\0" in name:
            raise ValueError(f"{name!r} is not a variable's name")
        if isinstance(text, bool) or not isinstance(text, str | int | float) or "\0" in str(text):
            raise ValueError(f"the value of {name} must be text or a number, got {_kind(text)}")
    return {name: str(text) for name, text in value.items()}


def _kind(value: object) -> str:
    """Say what stands where a variable's value should; the text itself may be a secret."""
    if isinstance(value, bool):
        return f"{str(value).lower()}; put it in quotes"
    if isinstance(value, str):
        return "text with a NUL character, which no program can be given"
    if value is None:
        return "nothing; write '' for an empty one"
    return "a mapping" if isinstance(value, dict) else "a list"


def _devices(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, str | int | list):
        raise ValueError("expected a list of GPUs, for example [0, 1]")
    items = value if isinstance(value, list) else str(value).split(",")
    if any(isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip() for item in items):
        raise ValueError("expected a list of GPU numbers or UUIDs, for example [0, 1]")
    return tuple(str(item).strip() for item in items)


def _plain_text(value: object) -> object:
    if not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("is empty; give a value or remove the key")
    return value


_ARGS_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": ["string", "number", "boolean"]}}]}
_ENV_SCHEMA = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
_DEVICES_SCHEMA = {
    "anyOf": [{"type": "array", "items": {"type": ["string", "integer"]}}, {"type": ["string", "integer"]}]
}

Flag = Annotated[bool, Strict()]
StrictText = Annotated[str, Strict()]
Path = Annotated[str, Strict(), BeforeValidator(_plain_text), WithJsonSchema({"type": "string", "minLength": 1})]
Args = Annotated[tuple[str, ...], BeforeValidator(_split_args), AfterValidator(_no_nul), WithJsonSchema(_ARGS_SCHEMA)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment), WithJsonSchema(_ENV_SCHEMA)]
Devices = Annotated[tuple[str, ...], BeforeValidator(_devices), WithJsonSchema(_DEVICES_SCHEMA)]
SilenceSeconds = Annotated[Seconds, not_zero("every load would count as stuck at once")]
DownloadSeconds = Annotated[Seconds, not_zero("every download would fail at once")]


class Inheritable(Section):
    """Keys that a profile takes from ``defaults:`` where it does not set them itself."""

    llama_server_args: Args | None = _key(
        None, "Arguments of llama-server, or of whisper-server, as in a shell or as a list"
    )
    env: Environment | None = _key(None, "Environment variables of the child; added to those of 'defaults'")
    engine: Engine | None = _key(None, "llama (llama-server) or whisper (whisper-server, for speech)")
    engine_build: StrictLine | None = _key(
        None, "Which llama-server: a name of 'builds' in config.yaml; null or 'default' = that of llama_cpp"
    )
    convert: Flag | None = _key(
        None, "whisper only: let ffmpeg read the audio, so that m4a, webm, opus and more are understood"
    )
    devices: Devices | None = _key(None, "GPUs it may use, as CUDA_VISIBLE_DEVICES names them; empty = all")
    pinned: Flag | None = _key(None, "Never evicted to make room for another model")
    idle_timeout_seconds: Seconds | None = _key(None, "Stop it after this long without a request; 0 = never")
    startup_timeout_seconds: SilenceSeconds | None = _key(
        None, "A load with no output, I/O or CPU use for this long is stuck; not the length of the load"
    )
    download_timeout_seconds: DownloadSeconds | None = _key(None, "Longest download of a model by llama-server")
    max_instances: Count | None = _key(None, "Instances on this node at once; 0 = never started here")
    max_concurrent_requests_per_instance: Count | None = _key(None, "Requests at once; null = its slots, 0 = unlimited")
    max_queue_size: Count | None = _key(None, "Waiting requests, more get 503; 0 = unlimited")
    max_wait_in_queue_ms: Milliseconds | None = _key(None, "Longest wait for a place, loading included; 0 = for ever")
    max_request_duration_ms: Milliseconds | None = _key(None, "Longest whole request; 0 = unlimited")
    min_eviction_tenure_secs: Seconds | None = _key(
        None, "How long it is left alone, when busy, while others wait for its memory; 0 = not at all"
    )
    drain_on_disconnect: Flag | None = _key(None, "Let a generation finish although its client left")


class ProfileEntry(Inheritable):
    """One way to run a model. Clients ask for ``model:id``, or just ``model`` if the id is ``default``."""

    id: StrictLine = _key("default", "Name of this profile; 'default' is what the bare model name means")
    description: StrictText | None = _key(None, "Shown in /v1/models")
    enabled: Flag = _key(True, "false = as if it were not here")
    aliases: tuple[StrictLine, ...] = _key((), "Other names for this profile, for example gpt-4o")
    model_path: Path | None = _key(None, "A GGUF file; for whisper a ggml file, such as ggml-base.bin")
    hf_repo: Path | None = _key(None, "Or a Hugging Face repository, user/repo or user/repo:quant")
    hf_file: Path | None = _key(None, "The file in hf_repo")
    estimated_vram_mb: Megabytes | None = _key(
        None, "GPU memory of one instance, in MB or as '8GB'; used until it was measured"
    )
    estimated_sysmem_mb: Megabytes | None = _key(
        None, "Main memory of one instance, in MB or as '8GB'; used until it was measured"
    )


class ModelEntry(Section):
    name: StrictLine = Field(description="What clients put in 'model'; must not contain ':'")
    description: StrictText | None = _key(None, "Shown in /v1/models")
    enabled: Flag = _key(True, "false = as if it were not here")
    profiles: tuple[ProfileEntry, ...] = _key((), "The ways to run it")


class CookbookFile(Section):
    """All of cookbook.yaml."""

    defaults: Inheritable = _key(Inheritable(), "What profiles do not set themselves")
    models: tuple[ModelEntry, ...] = _key((), "The models of this node")
