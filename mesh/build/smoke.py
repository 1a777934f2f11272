"""Does a new llama-server work at all? It must start, load the tiny model, say its sentence, and end when told to.

Each step that fails is a ``RejectedError`` that says which one, why, what to do, and how the process ended; unless it
lacked memory, which may be there the next time.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mesh.build.rejected import RejectedError
from mesh.build.server_under_test import (
    GPUS_HIDDEN,
    STOP_LIMIT_S,
    TAIL_LINES,
    Child,
    Line,
    ServerFailedError,
    ServerUnderTest,
    data_of,
)
from mesh.core.exits import Cause
from mesh.errors import BuildError
from mesh.host.warden import Warden
from mesh.models.tiny_model import SENTENCE

#: a cold start reads the binary and its libraries from a disk that has just written them
VERSION_LIMIT_S: Final = 30.0
#: the answer takes a fraction of a second, but drivers compile kernels when they are first used
ANSWER_LIMIT_S: Final = 120.0
CPU_NOTE: Final = "the GPUs had no room for the tiny model; the new build was tested on the CPU"

#: a commit of that age may be what somebody wants
DONE_NOTE: Final = 'the new llama-server does not end streams with "data: [DONE]"; those of early 2024 never did'

_DONE: Final = "[DONE]"
_CHAT: Final = "/v1/chat/completions"
_QUESTION: Final[Mapping[str, Any]] = {
    "messages": [{"role": "user", "content": "Say your sentence."}],
    "temperature": 0,
    "max_tokens": 40,
}
_ENDED_WELL: Final = (0, -signal.SIGTERM, 128 + signal.SIGTERM)
#: what to do about what a linker or a driver says; the first that is found
_FIXES: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), fix)
    for pattern, fix in (
        (r"symbol lookup error|undefined symbol", "it found a library of another build; check LD_LIBRARY_PATH"),
        (
            r"version `(?:GLIBC|CXXABI)",
            "it was compiled against newer libraries than this machine has; delete its directory and build it here",
        ),
        (
            r"error while loading shared libraries|library not loaded",
            "install the package that has this library, or add -DBUILD_SHARED_LIBS=OFF to build_args if it is "
            "llama.cpp's own",
        ),
        (r"illegal instruction", "add -DGGML_NATIVE=OFF to build_args"),
        (
            r"driver version is insufficient|no kernel image is available|unsupported toolchain",
            "update the GPU's driver, or name the GPU in build_args (for CUDA: -DCMAKE_CUDA_ARCHITECTURES=native)",
        ),
        (r"exec format error", "it was compiled for another kind of machine; check build_args"),
    )
)


@dataclass(frozen=True, slots=True)
class Smoked:
    """What an admin should know of a test that went well, and whether the GPUs had to be left out of it."""

    notes: tuple[str, ...] = ()
    on_cpu: bool = False


async def smoke(
    binary: Path,
    model: Path,
    *,
    env: Mapping[str, str],
    say: Callable[[str], None],
    args: Sequence[str] = (),
    warden: Warden | None = None,
) -> Smoked:
    """Try *binary* on *model*, the tiny one. *args* are added to its arguments; it dies with the node by *warden*.

    Raise ``RejectedError`` if it fails, another ``BuildError`` if there is no memory for it.
    """
    trial = _Trial(binary, model, args, say, warden)
    say(f"{binary} --version: {await trial.version(env)}")
    try:
        return Smoked(await trial.serve(env))
    except BuildError as error:
        if not _lacks_memory(error):
            raise
        say(f"{error.message}; once more without the GPUs")
    return Smoked((CPU_NOTE, *await trial.serve({**env, **GPUS_HIDDEN})), on_cpu=True)


def rejected(step: str, error: ServerFailedError) -> BuildError:
    """Return the rejection for *error*, which happened in *step*, with a hint at what to do.

    Where memory was lacking, that is no fault of the build: it is another error, after which it is tried again.
    """
    if error.cause is Cause.MEMORY:
        why = f"the new llama-server could not be tested ({step}) for lack of memory: {error.message}"
        return BuildError(why, exit_status=error.exit_status, log_tail=error.log_tail)
    text = "\n".join((error.message, *error.log_tail))
    fix = next((f"; {fix}" for pattern, fix in _FIXES if pattern.search(text)), "")
    message = f"the new llama-server failed its test ({step}): {error.message}{fix}"
    return RejectedError(message, exit_status=error.exit_status, log_tail=error.log_tail)


def _lacks_memory(error: BuildError) -> bool:
    return isinstance(error.__cause__, ServerFailedError) and error.__cause__.cause is Cause.MEMORY


@dataclass(frozen=True, slots=True)
class _Trial:
    binary: Path
    model: Path
    args: Sequence[str]
    say: Callable[[str], None]
    warden: Warden | None

    async def version(self, env: Mapping[str, str]) -> str:
        """Return what it says of itself."""
        step = "--version"
        try:
            child = Child((str(self.binary), "--version"), env, self.warden)
            try:
                returncode = await child.ended(VERSION_LIMIT_S)
            finally:
                await child.kill()
            if returncode is None:
                raise ServerFailedError(
                    f"it did not end within {VERSION_LIMIT_S:.0f} s", log_tail=child.ring.tail(TAIL_LINES)
                )
            if returncode != 0:
                raise child.failure("it did not succeed")
        except ServerFailedError as error:
            raise rejected(step, error) from error
        lines = child.ring.tail()
        return next((line for line in lines if line.startswith("version")), lines[0] if lines else "it says nothing")

    async def serve(self, env: Mapping[str, str]) -> tuple[str, ...]:
        """Load, ask twice, stop; return notes."""
        step, argv = "loading a tiny model", (str(self.binary),)
        try:
            async with ServerUnderTest(argv, self.model, args=self.args, env=env, warden=self.warden) as server:
                self.say("it has loaded the tiny model")
                step = "a chat completion"
                _check(server, _whole_answer(server, await server.post(_CHAT, _QUESTION, ANSWER_LIMIT_S)))
                step = "a streamed chat completion"
                lines = await server.post(_CHAT, {**_QUESTION, "stream": True}, ANSWER_LIMIT_S)
                _check(server, _streamed_answer(server, lines))
                self.say(f'it said "{SENTENCE}" twice')
                step = "stopping"
                returncode = await server.stop()
                if returncode is None:
                    raise server.failure(f"it still ran {STOP_LIMIT_S:.0f} s after SIGTERM")
        except ServerFailedError as error:
            raise rejected(step, error) from error
        notes = [] if any(line.text == _DONE for line in data_of(lines)) else [DONE_NOTE]
        if returncode not in _ENDED_WELL:
            how = f"ended with exit status {returncode} when it was told to stop"
            notes.append(f"the new llama-server works, but {how}")
        return tuple(notes)


def _check(server: ServerUnderTest, said: str) -> None:
    if said != SENTENCE:
        raise server.failure(f'it computes nonsense: it said "{said[:200]}" instead of "{SENTENCE}"')


def _whole_answer(server: ServerUnderTest, lines: Sequence[Line]) -> str:
    text = "\n".join(line.text for line in lines)
    try:
        return str(json.loads(text)["choices"][0]["message"]["content"])
    except (ValueError, LookupError, TypeError) as error:
        raise server.failure(f"the answer is no chat completion: {text[:200]}") from error


def _streamed_answer(server: ServerUnderTest, lines: Sequence[Line]) -> str:
    """Return what a stream says, if it reached its end: a ``finish_reason``."""
    events = [line.text for line in data_of(lines) if line.text != _DONE]
    try:
        choices = [choice for event in events for choice in json.loads(event).get("choices", ())]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        complete = bool(choices and choices[-1].get("finish_reason"))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise server.failure(f"the stream is no chat completion: it ends with {events[-1:]}") from error
    if not complete:
        raise server.failure(f"the stream ended too early, with {events[-1:]}")
    return text
