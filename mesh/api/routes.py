"""The ONE table of inference routes: which paths the data plane carries to an instance, and how.

Every path that is not in it belongs to the Starlette app (``mesh.api.server``). A row says where the model's name is,
whose error envelope the path speaks, what the profile must be able to do, and whether the request takes a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from mesh.config.profile import Profile
from mesh.engine.kind import Capability as Capability
from mesh.engine.kinds import kind_of
from mesh.errors import RequestError, UnknownModelError


class ModelIn(Enum):
    BODY = "body"  # the JSON key "model"
    QUERY = "query"  # ?model=
    FORM = "form"  # the field "model" of a multipart form, wherever it stands there
    NONE = "none"  # the default model


class Dialect(Enum):
    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    LLAMA = "llama"


@dataclass(frozen=True, slots=True, eq=False)  # a row is itself: rows are keys on the hot path
class Route:
    """One row. ``needs_slot`` is False for what only tokenizes or reads; such a request is not counted."""

    method: str
    path: str
    model_in: ModelIn = ModelIn.BODY
    dialect: Dialect = Dialect.OPENAI
    capability: Capability = Capability.TEXT
    needs_slot: bool = True
    may_stream: bool = True

    def check(self, profile: Profile, name: str) -> None:
        """Raise the caller's error if *profile*, asked for as *name*, cannot do what this path is for."""
        able = kind_of(profile).capabilities(profile)
        match self.capability:
            case Capability.TEXT | Capability.ANY if able <= _AUDIO_ONLY:
                raise RequestError(f"Model '{name}' is for audio: {AUDIO_PATHS}", param="model")
            case Capability.TEXT if Capability.TEXT not in able:
                raise RequestError(f"Model '{name}' is restricted to embeddings or rerank endpoints", param="model")
            case Capability.EMBEDDING if Capability.EMBEDDING not in able:
                raise UnknownModelError(f"Model '{name}' is not configured for embeddings", param="model")
            case Capability.RERANK if Capability.RERANK not in able:
                raise UnknownModelError(f"Model '{name}' is not configured for reranking", param="model")
            case Capability.AUDIO if Capability.AUDIO not in able:
                raise UnknownModelError(f"Model '{name}' takes no audio: {_NO_AUDIO}", param="model")


AUDIO_PATHS = "/v1/audio/transcriptions, /v1/audio/translations"
_AUDIO_ONLY = frozenset({Capability.AUDIO, Capability.ANY})
_NO_AUDIO = "that is for profiles with engine: whisper, or with a llama-server model that has an --mmproj"


def _text(path: str, dialect: Dialect = Dialect.OPENAI) -> Route:
    return Route("POST", path, dialect=dialect)


def _embedding(path: str, dialect: Dialect = Dialect.OPENAI) -> Route:
    return Route("POST", path, dialect=dialect, capability=Capability.EMBEDDING, may_stream=False)


def _rerank(path: str) -> Route:
    return Route("POST", path, capability=Capability.RERANK, may_stream=False)


def _audio(path: str, dialect: Dialect = Dialect.OPENAI) -> Route:
    return Route("POST", path, ModelIn.FORM, dialect, Capability.AUDIO, may_stream=False)


def _read(method: str, path: str, model_in: ModelIn, dialect: Dialect = Dialect.LLAMA) -> Route:
    return Route(method, path, model_in, dialect, Capability.ANY, needs_slot=False, may_stream=False)


ROUTES: tuple[Route, ...] = (
    _text("/v1/chat/completions"),
    _text("/chat/completions"),
    _text("/v1/completions"),
    _text("/v1/responses"),
    _text("/v1/messages", Dialect.ANTHROPIC),
    _read("POST", "/v1/messages/count_tokens", ModelIn.BODY, Dialect.ANTHROPIC),
    _embedding("/v1/embeddings"),
    _embedding("/embeddings", Dialect.LLAMA),
    _embedding("/embedding", Dialect.LLAMA),
    _audio("/v1/audio/transcriptions"),
    _audio("/v1/audio/translations"),
    _audio("/inference", Dialect.LLAMA),
    _rerank("/v1/rerank"),
    _rerank("/v1/reranking"),
    _rerank("/rerank"),
    _rerank("/reranking"),
    _text("/completion", Dialect.LLAMA),
    _text("/completions", Dialect.LLAMA),
    _text("/infill", Dialect.LLAMA),
    _read("POST", "/tokenize", ModelIn.BODY),
    _read("POST", "/detokenize", ModelIn.BODY),
    _read("POST", "/apply-template", ModelIn.BODY),
    _read("GET", "/props", ModelIn.QUERY),
    _read("GET", "/slots", ModelIn.QUERY),
    _read("GET", "/lora-adapters", ModelIn.QUERY),
    _read("POST", "/lora-adapters", ModelIn.QUERY),  # its body is an array
)


def _index() -> Mapping[bytes, Mapping[bytes, Route]]:
    table: dict[bytes, dict[bytes, Route]] = {}
    for route in ROUTES:
        methods = table.setdefault(route.path.encode(), {})
        methods[route.method.encode()] = route
        if route.method == "GET":
            methods[b"HEAD"] = route
    return table


#: path -> method -> row; a path that is here with another method is a 405
BY_PATH: Mapping[bytes, Mapping[bytes, Route]] = _index()
