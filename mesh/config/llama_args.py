"""The part of a llama-server command line that follows from a profile alone, and the hash that names it.

Pure. Kept as llamesh 1.20 has it, so that its ``node-metrics.json`` still finds its profiles. Host, port and the binary
are no part of it: they differ from one start to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

MODEL_FLAGS = ("-m", "--model")
HF_FLAGS = ("-hfr", "--hf-repo")
#: Flags that name a model for today's llama-server, though llamesh does not know them as such.
OTHER_SOURCE_FLAGS = ("-hf", "-mu", "--model-url", "-dr", "--docker-repo")
CONTEXT_FLAGS = ("-c", "--ctx-size")
FIT_FLAGS = ("--fit",)
ADDRESS_FLAGS = ("--host", "--port")


def has_flag(args: Iterable[str], flags: Sequence[str]) -> bool:
    """Whether one of *flags* stands in *args*, alone or as ``flag=value``. Case-sensitive: ``-M`` is not ``-m``."""
    return any(arg.split("=", 1)[0] in flags for arg in args)


def flag_value(args: Sequence[str], flags: Sequence[str]) -> str | None:
    """Return the value of the last of *flags* in *args* (for llama-server the last one wins); None without one."""
    value = None
    tokens = expand(args)
    for position, token in enumerate(tokens[:-1]):
        if token in flags:
            value = tokens[position + 1]
    return value


def without_flags(args: Sequence[str], flags: Sequence[str]) -> tuple[str, ...]:
    """Return *args* without *flags* and their values."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip:
            skip = False
        elif arg in flags:
            skip = True
        elif arg.split("=", 1)[0] not in flags:
            kept.append(arg)
    return tuple(kept)


def expand(args: Iterable[str]) -> tuple[str, ...]:
    """Split each ``--flag=value`` at its first ``=``: llama-server itself only takes two words."""
    tokens: list[str] = []
    for arg in args:
        tokens.extend(arg.split("=", 1) if arg.startswith("-") and "=" in arg else (arg,))
    return tuple(tokens)


def launch_args(
    profile_args: Sequence[str], model_path: str | None, hf_repo: str | None, hf_file: str | None
) -> tuple[str, ...]:
    """Return a profile's arguments with its model source, ``-c 0`` and ``--fit off`` where they are not given.

    ``--fit off``: the child must never resize itself under the node's memory budget.
    """
    args = [*expand(profile_args)]
    if not has_flag(profile_args, MODEL_FLAGS + HF_FLAGS):
        args += _source(model_path, hf_repo, hf_file)
    if not has_flag(profile_args, CONTEXT_FLAGS):
        args += ["-c", "0"]
    if not has_flag(profile_args, FIT_FLAGS):
        args += ["--fit", "off"]
    return tuple(args)


def _source(model_path: str | None, hf_repo: str | None, hf_file: str | None) -> list[str]:
    if hf_repo is not None:
        return ["-hfr", hf_repo, *(["-hff", hf_file] if hf_file is not None else [])]
    return ["-m", model_path] if model_path is not None else []


def args_hash(args: Sequence[str]) -> str:
    """Return 16 hex digits that name *args* regardless of their order and of host and port."""
    words = sorted(arg.encode() for arg in without_flags(args, ADDRESS_FLAGS))
    return hashlib.sha256(b"".join(word + b"\0" for word in words)).hexdigest()[:16]
