"""What the files of a profile say about its memory: looked at in a thread, for every call here may block.

A file is read again only if its path, size or time changed. A broken or missing file is a ``problem``: the engine
could not load it either, nor would it start with flags that it does not know. A model of a kind that cannot be
estimated is none: the engine may know it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mesh.config.llama_args import args_hash
from mesh.config.profile import Profile
from mesh.core.estimate import Estimate
from mesh.core.footprint import PROCESS_RAM_MIB
from mesh.core.launch_options import LaunchOptions
from mesh.engine import flags
from mesh.engine.kind import EngineKind, Launch
from mesh.engine.kinds import kind_of
from mesh.engine.locate import EngineBinary
from mesh.errors import MeshError
from mesh.models import gguf


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
    process_ram_mib: int = PROCESS_RAM_MIB
    request_bytes: int = 0


def examine(
    profile: Profile, env: Mapping[str, str], engine: Callable[[Profile], EngineBinary], previous: Look | None = None
) -> Look:
    """Look at the files of *profile*, whose child would run in *env*; return *previous* if nothing changed."""
    kind = kind_of(profile)
    launch = kind.launch(profile, env)
    identities = {path: gguf.identity(path) for path in launch.files}
    binary = found(engine, profile)
    identity = _digest(
        args_hash(launch.args),
        *launch.args,  # the hash is llamesh's and does not see their order
        *sorted(f"{n}={v}" for n, v in env.items() if n.startswith(kind.variables) or n in profile.env),
        _engine_identity(binary),
        *(f"{path} {known}" for path, known in identities.items()),
    )
    if previous is not None and previous.identity == identity and previous.problem is None:
        return previous
    look = Look(
        identity,
        launch.options,
        engine_has_gpus=binary is None or binary.uses_gpus,
        process_ram_mib=kind.process_ram_mib,
    )
    look = _look_at_files(look, kind, launch, identities)
    refused = refused_flags(profile, env, binary)
    problems = [problem for problem in (refused, launch.problem, look.problem) if problem is not None]
    return replace(look, problem="; ".join(problems), refused=refused) if problems else look


def _look_at_files(look: Look, kind: EngineKind, launch: Launch, identities: Mapping[str, str | None]) -> Look:
    if launch.options.model is None:  # the child fetches it; the other files tell launches apart all the same
        return look
    try:
        sizes = kind.look(launch, identities)
    except (MeshError, OSError) as error:
        return look if launch.fetched else replace(look, problem=str(error))
    return replace(
        look,
        with_gpus=sizes.with_gpus,
        without_gpus=sizes.without_gpus,
        file_bytes=sizes.file_bytes,
        vocabulary=sizes.vocabulary,
        request_bytes=sizes.request_bytes,
        note=sizes.note,
    )


def refused_flags(profile: Profile, env: Mapping[str, str], binary: EngineBinary | None) -> str | None:
    """Return which flags of *profile* the *binary* does not know; None if it knows all, or nobody can say."""
    return None if binary is None else flags.refused(profile.args, binary, env, kind_of(profile))


def found(engine: Callable[[Profile], EngineBinary], profile: Profile) -> EngineBinary | None:
    """Return what *profile* would run, if it is there."""
    try:
        return engine(profile)
    except MeshError:  # nothing can be started, but the arithmetic is the same
        return None


def _engine_identity(binary: EngineBinary | None) -> str:
    """Return what changes when another program would run."""
    if binary is None:
        return "none"
    return f"embedded {binary.version}" if binary.source == "embedded" else binary.identity or " ".join(binary.argv)


def _digest(*parts: str) -> str:
    return hashlib.sha256(b"".join(part.encode(errors="surrogateescape") + b"\0" for part in parts)).hexdigest()[:32]
