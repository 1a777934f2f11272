"""All that is particular to whisper.cpp's whisper-server (1.8.5), but for its HTTP shapes: see ``whisper_form``.

What it does otherwise than llama-server: it listens only once its model is loaded; it works on one request at a time;
it ends with status 0 over a flag that it does not know; it shares its port with anybody who asks (SO_REUSEPORT); it
looks for plug-ins and pages in the directory where it runs, and leaves uploads there that ffmpeg could not read.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from mesh.config.engines import keys_of
from mesh.config.llama_args import ADDRESS_FLAGS, MODEL_FLAGS, expand, flag_value, has_flag, without_flags
from mesh.config.profile import Engine, Profile
from mesh.config.settings import Settings
from mesh.core.estimate import EstimateError
from mesh.core.launch_options import LaunchOptions
from mesh.core.whisper_estimate import PROCESS_RAM_MIB, WhisperOptions, estimate
from mesh.core.whisper_facts import WhisperFacts
from mesh.engine.assignment import Assignment
from mesh.engine.children import LOOPBACK, child_env, reachable
from mesh.engine.kind import UNASSIGNED, Capability, Command, EngineKind, Launch, Option, Sizes
from mesh.engine.locate import EngineBinary, file_identity
from mesh.engine.whisper_form import WhisperAdapter
from mesh.errors import ConfigError, EngineMissingError
from mesh.files import cache_dir
from mesh.models import whisper

PROGRAM: Final = "whisper-server"
DEVICE_VARIABLE: Final = "WHISPER_ARG_DEVICE"
CONVERTER: Final = "ffmpeg"
#: where it answers belongs to the node: with another path its health could not be asked for
PATH_FLAGS: Final = ("--inference-path", "--request-path")
#: its arguments that name files, which it would look for in its own directory
_FILE_FLAGS: Final = (*MODEL_FLAGS, "-vm", "--vad-model", "-fp", "--font-path", "--public", "--tmp-dir")
_TEXT_FLAGS: Final = ("--prompt",)
_CONVERT_FLAGS: Final = ("--convert",)
#: the instance's own directory stands there already: ``children.files_root``
_DIRECTORY_FLAGS: Final = ("--tmp-dir",)
_VAD_MODEL_FLAGS: Final = ("-vm", "--vad-model")
_DEVICE_FLAGS: Final = ("-dev", "--device")
_NO_GPU_FLAGS: Final = ("-ng", "--no-gpu")
_NO_FLASH_FLAGS: Final = ("-nfa", "--no-flash-attn")
_NUMBERS: Final = {
    "best_of": ("-bo", "--best-of"),
    "beam_size": ("-bs", "--beam-size"),
    "processors": ("-p", "--processors"),
}
_CAPABILITIES: Final = frozenset({Capability.AUDIO, Capability.ANY})


# -- where it is


def find(settings: Settings) -> EngineBinary:
    """Return the configured whisper-server, else that on PATH, else the one that was made in the cache."""
    if (configured := settings.whisper_cpp.binary_path) is not None:
        path = Path(configured).expanduser()
        if not path.is_file():
            wrong = "is a directory" if path.is_dir() else "does not exist"
            raise EngineMissingError(f"whisper_cpp.binary_path {path} {wrong}; correct it, or remove it to use PATH")
        return _binary(path, "configured")
    if (found := shutil.which(PROGRAM)) is not None:
        return _binary(Path(found), "path")
    if (made := max(_in_cache(), key=_made_at, default=None)) is not None:
        return _binary(made, "cache")
    raise EngineMissingError(
        f"no {PROGRAM} found. Either set whisper_cpp.binary_path in config.yaml, or put {PROGRAM} on PATH, or let"
        " llama-mesh make one in its cache, which takes a C++ compiler: llama-mesh demo --transcribe"
    )


def _in_cache() -> Iterator[Path]:
    """Yield what ``mesh.cli.whisper_build`` has made."""
    with contextlib.suppress(RuntimeError):  # this user has no home, as in some containers
        yield from (path for path in cache_dir(os.environ).glob(f"{PROGRAM}-*/{PROGRAM}") if path.is_file())


def _made_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _binary(path: Path, source: Literal["configured", "path", "cache"]) -> EngineBinary:
    resolved = path.resolve()
    version = re.fullmatch(rf"{PROGRAM}-(\d+(?:\.\d+)+)(?:-\w+)?", resolved.parent.name)
    return EngineBinary(
        (str(resolved),),
        version[1] if version else None,
        source,
        build="",
        identity=file_identity(resolved),
        program=PROGRAM,
    )


# -- how it is started


def command(
    profile: Profile,
    engine: EngineBinary,
    port: int,
    environ: Mapping[str, str] | None = None,
    assignment: Assignment = UNASSIGNED,
    directory: Path | None = None,
) -> Command:
    """Return how to start *profile* on *port*. Raise ``ConfigError`` for what can only be wrong."""
    texts, args = _texts_apart(profile.args)
    model = expected_model(profile)
    if model is None:
        raise ConfigError(f"profile {profile.key} names no model; give it model_path, a ggml file")
    env = child_env(profile, os.environ if environ is None else environ, assignment)
    if (problem := _lacks_converter(profile, env)) is not None:
        raise ConfigError(f"profile {profile.key}: {problem}")
    host = flag_value(args, ("--host",)) or LOOPBACK
    own = without_flags(args, (*ADDRESS_FLAGS, *MODEL_FLAGS, *PATH_FLAGS))
    if profile.convert:
        own = without_flags(tuple(word for word in own if word not in _CONVERT_FLAGS), _DIRECTORY_FLAGS)
        own += ("--convert", "--tmp-dir", str(directory or "."))
    place = ("-m", model, "--host", host, "--port", str(port), "--inference-path", "/inference")
    argv = (*engine.argv, *texts, *_absolute((*own, *place)))
    return Command(argv, env, reachable(profile, host), port, None, directory)


def _texts_apart(args: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the arguments that are prose with their values, which may look like flags, and all others."""
    texts, rest, words = list[str](), list[str](), deque(args)
    while words:
        word = words.popleft()
        flag, equals, value = word.partition("=")
        if flag not in _TEXT_FLAGS or not (equals or words):
            rest.append(word)
        else:
            texts += (flag, value if equals else words.popleft())
    return tuple(texts), expand(rest)


def _absolute(args: Sequence[str]) -> Iterator[str]:
    """Yield *args* with the paths that start in the node's directory, for it runs in another."""
    before = ""
    for word in args:
        yield os.path.abspath(os.path.expanduser(word)) if before in _FILE_FLAGS and word else word
        before = word


def expected_model(profile: Profile) -> str | None:
    """Return the model file, the arguments going first."""
    return flag_value(_texts_apart(profile.args)[1], MODEL_FLAGS) or profile.model_path


def _lacks_converter(profile: Profile, env: Mapping[str, str]) -> str | None:
    if not profile.convert or shutil.which(CONVERTER, path=env.get("PATH", os.defpath)) is not None:
        return None
    return f"'convert: true' needs {CONVERTER}, and there is none on PATH; install it, or remove 'convert'"


# -- what it takes


def launch(profile: Profile, env: Mapping[str, str]) -> Launch:
    """Return what *profile* asks of its whisper-server, and the files that it reads."""
    args = keys_of(Engine.WHISPER).launch_args(profile.args, profile.model_path, None, None)
    vad = flag_value(args, _VAD_MODEL_FLAGS)
    files = tuple(os.path.expanduser(path) for path in (expected_model(profile), vad) if path)
    options = LaunchOptions(
        model=files[0] if files else None,
        split_mode="none",  # it divides no model
        devices=_devices(args, env),
        mmap=False,
        prompt_cache_mib=0,
    )
    return Launch((*args, *(["--convert"] if profile.convert else [])), options, files,
                  problem=_lacks_converter(profile, env))  # fmt: skip


def _devices(args: Sequence[str], env: Mapping[str, str]) -> tuple[str, ...] | None:
    """Return the GPU that it is told to use, as llama.cpp would call it; None lets the node choose."""
    if has_flag(args, _NO_GPU_FLAGS):
        return ("none",)
    number = flag_value(args, _DEVICE_FLAGS) or env.get(DEVICE_VARIABLE)
    return (f"CUDA{number}",) if number is not None and number.isdecimal() else None


def options_of(args: Sequence[str]) -> WhisperOptions:
    """Return what of *args* decides about memory; a number that cannot be read leaves the default."""
    numbers = {}
    for name, names in _NUMBERS.items():
        text = flag_value(args, names)
        if text is not None and (number := re.match(r"[+-]?\d{1,9}", text)) is not None:
            numbers[name] = int(number[0])
    return WhisperOptions(
        **numbers, flash_attn=not has_flag(args, _NO_FLASH_FLAGS), gpu=not has_flag(args, _NO_GPU_FLAGS)
    )


def look(launch: Launch, identities: Mapping[str, str | None]) -> Sizes:
    """Return what the model's header says."""
    facts, *beside = launch.files
    for path in beside:
        os.stat(path)  # a model for voice detection has a few MB; it has to be there
    model, options = _read(facts, identities[facts]), options_of(launch.args)
    try:
        on_gpu, on_cpu = estimate(model, options, gpus=True), estimate(model, options, gpus=False)
        return Sizes(on_gpu, on_cpu, request_bytes=on_cpu.output.cpu)
    except EstimateError as error:
        return Sizes(file_bytes=model.file_bytes, note=str(error))


@functools.lru_cache(32)
def _read(path: str, identity: str | None) -> WhisperFacts:
    return whisper.read(path)


# -- what it says

_HELP_LINE: Final = re.compile(r" {2,15}(?P<names>-\S.*?) {1,}\[")
_NAMED: Final = re.compile(r"--?[A-Za-z][\w-]*")
#: what a help without is that of something else
_PLAUSIBLE: Final = frozenset({"--model", "--port", "--inference-path"})
#: they take a value, though its help does not show one, or does not list them
_WITH_VALUE: Final = ("--tmp-dir", "-fp", "--font-path")


def known_flags(help_text: str) -> Mapping[str, Option]:
    """Return what *help_text* lists: names, and before the default in brackets the value's name, if it takes one."""
    found: dict[str, Option] = {}
    for line in help_text.splitlines():
        if (match := _HELP_LINE.match(line)) is None:
            continue
        words = match["names"].replace(",", " ").split()
        names = [word for word in words if _NAMED.fullmatch(word)]
        found |= dict.fromkeys(names, Option(int(len(words) > len(names))))
    if not found.keys() >= _PLAUSIBLE:
        return {}
    return found | dict.fromkeys(_WITH_VALUE, Option(1))


#: of the debugger that ggml starts, where there is one, when the process aborts
_DEBUGGER: Final = re.compile(
    r"\[(New LWP|Thread debugging|Inferior)|Using host libthread_db|\d+\t|#\d+ |0x[\da-f]+ in |warning: "
    r"|This GDB|Debuginfod |Download failed|To make this setting"
)
_NO_NUMBER: Final = re.compile(r" *what\(\): +(sto[a-z]+)")


def last_words(lines: Sequence[str]) -> Sequence[str]:
    """Return *lines* in words for people: without the help after a refused argument, and without a debugger's view."""
    usage = next((number for number, line in enumerate(lines) if line.startswith("usage: ")), len(lines))
    told = [line for line in lines[:usage] if line and not _DEBUGGER.match(line)]
    return [_NO_NUMBER.sub(r"error: invalid argument: a number was expected (\1)", line) for line in told]


KIND: Final = EngineKind(
    engine=Engine.WHISPER,
    program=PROGRAM,
    command=command,
    expected_model=expected_model,
    capabilities=lambda profile: _CAPABILITIES,
    launch=launch,
    look=look,
    known_flags=known_flags,
    check_flag="--help",
    variables="WHISPER_ARG_",
    slots=1,
    tells_properties=False,
    tells_slots=False,
    keeps_alive=False,
    shares_ports=True,
    maps_model=False,
    needs_directory=True,
    # a bad argument, a bad model, a number that is none (whose abort a shell calls 134), a flag without its value
    usage_statuses=frozenset({0, 3, 134, 139, -6, -11}),
    process_ram_mib=PROCESS_RAM_MIB,
    find=find,
    last_words=last_words,
    adapter=WhisperAdapter(),
)
