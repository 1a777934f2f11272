"""From a profile to the command line, environment and address of its llama-server. Starts nothing.

Secrets never stand in an argument list, which every user of the machine can read: ``--api-key`` and ``--hf-token``
become the environment variables that llama.cpp knows for them (trap 101).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from mesh.config.launch_options import parse
from mesh.config.llama_args import (
    ADDRESS_FLAGS,
    FIT_FLAGS,
    HF_FLAGS,
    MODEL_FLAGS,
    OTHER_SOURCE_FLAGS,
    flag_value,
    has_flag,
    launch_args,
    without_flags,
)
from mesh.config.profile import Engine, Profile
from mesh.core.estimate import EstimateError, estimate
from mesh.core.footprint import PROCESS_RAM_MIB
from mesh.core.model_facts import ModelFacts
from mesh.engine import flags
from mesh.engine.assignment import Assignment
from mesh.engine.children import LOOPBACK, child_env, ordered, reachable
from mesh.engine.kind import UNASSIGNED, Capability, Command, EngineKind, Launch, Sizes
from mesh.engine.locate import EngineBinary
from mesh.errors import ConfigError
from mesh.models import gguf

API_KEY_FLAGS = ("--api-key",)
API_KEY_FILE_FLAGS = ("--api-key-file",)
HF_TOKEN_FLAGS = ("-hft", "--hf-token")
API_KEY_VARIABLE = "LLAMA_API_KEY"
HF_TOKEN_VARIABLE = "HF_TOKEN"
#: variables by which llama-server learns of a model without an argument
MODEL_VARIABLES = ("LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO")
_SOURCE_VARIABLES = frozenset({"LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL", "LLAMA_ARG_DOCKER_REPO"})
#: headers kept in memory; one of a large model takes about 1 MB
_HEADERS_KEPT = 32


def command(
    profile: Profile,
    engine: EngineBinary,
    port: int,
    environ: Mapping[str, str] | None = None,
    assignment: Assignment = UNASSIGNED,
    directory: Path | None = None,
) -> Command:
    """Return how to start *profile* on *port*. Raise ``ConfigError`` for what can only be wrong (trap 30)."""
    args = launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file)
    if not has_flag(profile.args, FIT_FLAGS) and flags.lacks(engine, FIT_FLAGS[0]):
        args = without_flags(args, FIT_FLAGS)  # an older llama.cpp, which does not resize itself
    if not has_flag(args, MODEL_FLAGS + HF_FLAGS + OTHER_SOURCE_FLAGS) and not set(MODEL_VARIABLES) & set(profile.env):
        raise ConfigError(f"profile {profile.key} names no model; give it model_path, hf_repo or -m in its arguments")
    host = flag_value(args, ("--host",)) or LOOPBACK
    key = _api_key(profile, args)
    env = child_env(profile, os.environ if environ is None else environ, assignment)
    if (keys := flag_value(args, API_KEY_FLAGS)) is not None:
        env[API_KEY_VARIABLE] = keys
    if (token := flag_value(args, HF_TOKEN_FLAGS)) is not None:
        env[HF_TOKEN_VARIABLE] = token
    open_args = without_flags(args, ADDRESS_FLAGS + API_KEY_FLAGS + HF_TOKEN_FLAGS)
    chosen = ordered(assignment, profile).arguments(args, env)
    argv = (*engine.argv, *open_args, *chosen, "--host", host, "--port", str(port))
    return Command(argv, env, reachable(profile, host), port, key)


def expected_model(profile: Profile) -> str | None:
    """Return the model file that the child must have loaded; None if it is not given by a path."""
    return flag_value(launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file), MODEL_FLAGS)


def _api_key(profile: Profile, args: tuple[str, ...]) -> str | None:
    """Return a key that the child accepts: of its arguments, its key file or its environment."""
    listed = flag_value(args, API_KEY_FLAGS) or profile.env.get(API_KEY_VARIABLE)
    if listed is not None:
        return next((key.strip() for key in listed.split(",") if key.strip()), None)
    file = flag_value(args, API_KEY_FILE_FLAGS)
    if file is None:
        return None
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {profile.key}: cannot read --api-key-file {file}: {error}") from error
    return next((line.strip() for line in lines if line.strip()), None)


# -- what it can do, and what its files say


def capabilities(profile: Profile) -> frozenset[Capability]:
    """Return what *profile* can do. Asked for every request."""
    return _CAPABILITIES[profile.embeddings, profile.rerank, profile.multimodal]


def _capabilities(embeddings: bool, rerank: bool, multimodal: bool) -> frozenset[Capability]:
    found = {Capability.ANY}
    if embeddings:
        found.add(Capability.EMBEDDING)
    if rerank:
        found.add(Capability.RERANK)
    if not found - {Capability.ANY}:
        found |= {Capability.TEXT, Capability.AUDIO} if multimodal else {Capability.TEXT}
    return frozenset(found)


_BOTH = (False, True)
_CAPABILITIES: Final = {(e, r, m): _capabilities(e, r, m) for e in _BOTH for r in _BOTH for m in _BOTH}


def launch(profile: Profile, env: Mapping[str, str]) -> Launch:
    """Return what *profile* asks of its llama-server in *env*, and the files that it reads."""
    args = launch_args(profile.args, profile.model_path, profile.hf_repo, profile.hf_file)
    options = parse(args, env)
    draft = options.draft.path if options.draft is not None else None
    named = (options.model, draft, options.mmproj, *options.loras)
    fetched = has_flag(args, HF_FLAGS + OTHER_SOURCE_FLAGS) or not _SOURCE_VARIABLES.isdisjoint(env)
    return Launch(args, options, tuple(dict.fromkeys(path for path in named if path)), fetched)


def look(launch: Launch, identities: Mapping[str, str | None]) -> Sizes:
    """Return what the GGUF headers say."""
    facts = {path: _read(path, known) for path, known in identities.items()}
    options, model = launch.options, facts[launch.files[0]]
    tokens = model.metadata.get("tokenizer.ggml.tokens.length", 0)
    vocabulary = tokens if isinstance(tokens, int) else 0
    draft = facts.get(options.draft.path) if options.draft is not None else None
    mmproj = facts.get(options.mmproj) if options.mmproj is not None else None
    lora_bytes = sum(facts[path].file_bytes for path in options.loras if path in facts)
    compute = functools.partial(estimate, model, options, draft=draft, mmproj=mmproj, lora_bytes=lora_bytes)
    try:
        return Sizes(compute(gpus=True), compute(gpus=False), vocabulary=vocabulary)
    except EstimateError as error:
        size = sum(each.file_bytes for each in facts.values())
        return Sizes(file_bytes=size, vocabulary=vocabulary, note=str(error))


@functools.lru_cache(_HEADERS_KEPT)
def _read(path: str, identity: str | None) -> ModelFacts:
    return gguf.read(path)


KIND: Final = EngineKind(
    engine=Engine.LLAMA,
    program="llama-server",
    command=command,
    expected_model=expected_model,
    capabilities=capabilities,
    launch=launch,
    look=look,
    known_flags=flags.known_flags,
    check_flag="--version",
    variables="LLAMA_ARG_",
    slots=None,
    tells_properties=True,
    tells_slots=True,
    keeps_alive=True,
    shares_ports=False,
    maps_model=True,
    needs_directory=False,
    usage_statuses=frozenset({1}),
    process_ram_mib=PROCESS_RAM_MIB,
)
