"""What the cookbook's keys mean for each engine: which file it reads, how it gets it, which keys are for it.

How engines are run is ``mesh.engine.kinds``' business.
"""

from __future__ import annotations

import os.path
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from mesh.config import llama_args
from mesh.config.llama_args import HF_FLAGS, MODEL_FLAGS, OTHER_SOURCE_FLAGS, expand, has_flag
from mesh.config.profile import Engine

LaunchArgs = Callable[[Sequence[str], str | None, str | None, str | None], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class EngineKeys:
    """One engine."""

    program: str
    magic: bytes  #: the first bytes of a model file
    file: str  #: what such a file is called
    source_flags: tuple[str, ...]  #: those of its arguments that name a model
    #: a profile's arguments with its model, as ``args_hash`` names them; takes model_path, hf_repo, hf_file
    launch_args: LaunchArgs
    fetches: bool = False  #: it can download a model: hf_repo is for it
    has_builds: bool = False  #: engine_build is for it
    converts: bool = False  #: convert is for it
    one_request: bool = False  #: it does one at a time
    max_wait_ms: int = 60_000  #: how long a request may wait for it where nobody said


def _with_model(
    args: Sequence[str], model_path: str | None, hf_repo: str | None = None, hf_file: str | None = None
) -> tuple[str, ...]:
    """Return *args* with the model, unless they name one."""
    named = has_flag(args, MODEL_FLAGS) or model_path is None
    return (*expand(args), *(() if named else ("-m", model_path or "")))


ENGINES: Final[Mapping[Engine, EngineKeys]] = {
    Engine.LLAMA: EngineKeys(
        "llama-server",
        b"GGUF",
        "GGUF",
        MODEL_FLAGS + HF_FLAGS + OTHER_SOURCE_FLAGS,
        llama_args.launch_args,
        fetches=True,
        has_builds=True,
    ),
    Engine.WHISPER: EngineKeys(
        "whisper-server",
        b"lmgg",
        "ggml whisper",
        MODEL_FLAGS,
        _with_model,
        converts=True,
        one_request=True,
        max_wait_ms=600_000,  # a file takes as long as a whole queue of chats, and it is one after the other
    ),
}


def keys_of(engine: Engine) -> EngineKeys:
    """Return what the keys mean for *engine*."""
    return ENGINES[engine]


def max_wait_s(engine: Engine, *chosen_ms: int | None) -> float | None:
    """Return how long a request may wait for *engine*: the first of *chosen_ms* that was given; None = for ever."""
    wait_ms = next((ms for ms in chosen_ms if ms is not None), keys_of(engine).max_wait_ms)
    return wait_ms / 1000 or None


def engine_of_file(magic: bytes) -> Engine | None:
    """Return whose model a file is that begins with *magic*; None if nobody's."""
    return next((engine for engine, keys in ENGINES.items() if magic == keys.magic), None)


def kind_of_file(magic: bytes) -> str | None:
    """Return the same in words."""
    engine = engine_of_file(magic)
    return None if engine is None else f"a {ENGINES[engine].file} file, for {ENGINES[engine].program}"


def wrong_with_file(path: str, keys: EngineKeys) -> str | None:
    """Return why *path* is no model for an engine; None if it is.

    Looks at its first bytes; never at what is no file, such as a pipe, where reading would wait.
    """
    if not os.path.exists(path):
        return f"there is no such file: {path!r}"
    if not os.path.isfile(path):
        return f"{path!r} is {'a directory' if os.path.isdir(path) else 'no file'}; name the {keys.file} file"
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        return f"{path!r} cannot be read: {error.strerror or error}"
    if magic == keys.magic:
        return None
    if (other := kind_of_file(magic)) is not None:
        return f"{path!r} is {other}; {keys.program} reads {keys.file} files"
    return f"{path!r} is not a {keys.file} file; is the download complete?"
