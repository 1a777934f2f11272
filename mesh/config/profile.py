"""What the rest of the node sees of a cookbook: immutable profiles, defaults already applied, and an index of names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from mesh.config.diagnostics import suggestion
from mesh.core.resources import Resources
from mesh.errors import RequestError, UnknownModelError

#: What one unknown name may cost: comparing is slow, and the event loop waits for it.
_LONGEST_NAME = 100
_COMPARED = 300
_HINTS = 10


class Engine(StrEnum):
    LLAMA = "llama"
    WHISPER = "whisper"


@dataclass(frozen=True, slots=True)
class Profile:
    """One enabled ``model:profile`` of the cookbook. Durations are seconds; ``None`` or 0 as each field says."""

    key: str  #: "model:profile", lower-case: the identity
    id: str  #: as shown to clients: the model's name if the profile is "default", else "name:profile"
    model: str
    profile: str
    args: tuple[str, ...]  #: llama_server_args, split, otherwise verbatim
    model_path: str | None = None
    hf_repo: str | None = None
    hf_file: str | None = None
    engine: Engine = Engine.LLAMA
    engine_build: str | None = None  #: which build runs it; None = that of ``llama_cpp``
    engine_path: str | None = None  #: this very binary, whatever the build: for trials only, never from a file
    convert: bool = False  #: audio goes through ffmpeg first
    env: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    devices: tuple[str, ...] = ()
    description: str | None = None
    model_description: str | None = None
    estimate: Resources = field(default_factory=Resources)
    idle_timeout_s: float = 300.0  #: 0 = never stopped for being idle
    max_instances: int = 1  #: 0 = never started on this node
    max_concurrent: int | None = None  #: requests at once per instance; None = the child's slots, 0 = unlimited
    max_queue: int = 0  #: waiting requests; 0 = unlimited
    max_wait_s: float | None = 60.0  #: in the queue, loading included; None = for ever
    max_request_s: float | None = None  #: whole request; None = unlimited
    min_tenure_s: float = 15.0  #: how long a busy instance is left alone while others wait for its memory
    startup_timeout_s: float = 60.0  #: silence (no output, no I/O) after which a load counts as stuck
    drain_on_disconnect: bool = False  #: True: a client that leaves does not cancel its generation (trap 11)
    download_timeout_s: float = 3600.0  #: longest download of a model by the child itself
    args_hash: str = ""  #: names the launch arguments, as in llamesh's metrics; same hash, same running instance
    #: whether the arguments make the child an embedding server, a reranker, or one that takes images or audio; read for
    #: every request
    embeddings: bool = field(init=False)
    rerank: bool = field(init=False)
    multimodal: bool = field(init=False)

    def __post_init__(self) -> None:
        flags = {arg.strip().lower().split("=", 1)[0] for arg in self.args}
        object.__setattr__(self, "embeddings", not flags.isdisjoint({"--embedding", "--embeddings"}))
        object.__setattr__(self, "rerank", not flags.isdisjoint({"--rerank", "--reranking"}))
        # of a model that is fetched nobody knows whether a projector comes with it, unless the arguments speak of one
        projector = not flags.isdisjoint({"-mm", "--mmproj", "-mmu", "--mmproj-url", "--mmproj-auto"})
        variables = not self.env.keys().isdisjoint({"LLAMA_ARG_MMPROJ", "LLAMA_ARG_MMPROJ_URL"})
        object.__setattr__(self, "multimodal", projector or variables)


@dataclass(frozen=True, slots=True)
class Catalog:
    """The enabled profiles in cookbook order, and every name that leads to one (lower-case)."""

    profiles: tuple[Profile, ...] = ()
    names: Mapping[str, Profile] = field(default_factory=dict)
    default_model: str | None = None
    version: int = 0  #: grows by one with every reload that changed something

    def resolve(self, name: str | None) -> Profile:
        """Return the profile for a requested name; ``None`` means the request named none.

        Raise ``RequestError`` if none was named and there is no default, ``UnknownModelError`` if it is not known.
        """
        if name is None:
            if self.default_model is None:
                raise RequestError("the request names no 'model' and no default_model is configured", param="model")
            name = self.default_model
        found = self.names.get(name.lower())
        if found is None:
            message = f"Model '{name}' not found in local cookbook or any peer{self._hint(name)}"
            raise UnknownModelError(message, param="model")
        return found

    def _hint(self, name: str) -> str:
        """Return what may have been meant, after a semicolon. Bounded: anybody may ask for anything."""
        if len(name) > _LONGEST_NAME:
            return ""
        model = name.partition(":")[0].lower()
        if own := [profile.id for profile in self.profiles if profile.model.lower() == model]:
            return f"; profiles: {', '.join(own[:_HINTS])}{', ...' if len(own) > _HINTS else ''}"
        known = (known for profile in self.profiles for known in (profile.id, *profile.aliases))
        return suggestion(name, islice(known, _COMPARED), cutoff=0.7)
