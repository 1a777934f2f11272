"""What may differ from one kind of engine to another, as types. The kinds themselves: ``mesh.engine.kinds``.

Each engine has one file (``llama.py``, ``whisper.py``) that fills in an ``EngineKind``; nothing else on this node asks
which engine a profile has. Of other nodes' models it is told what they can do (``mesh.net.peers.engine_of``). Data
where data will do, a function where it will not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

from mesh.config.profile import Engine, Profile
from mesh.config.settings import Settings
from mesh.core.estimate import Estimate
from mesh.core.form import Form
from mesh.core.launch_options import LaunchOptions
from mesh.engine.assignment import Assignment
from mesh.engine.locate import EngineBinary
from mesh.errors import MeshError

UNASSIGNED = Assignment()


class Capability(Enum):
    """What a request asks of a model, and a profile can do. ``ANY`` is what every profile can."""

    TEXT = "text"
    EMBEDDING = "embedding"
    RERANK = "rerank"
    AUDIO = "audio"
    ANY = "any"


@dataclass(frozen=True, slots=True)
class Upload:
    """A form as an engine wants it. ``reply`` is what ``FormAdapter.answer`` needs of it; nobody else looks at it.

    One part is a view, of the file as it came and of nothing else; so it can be sent before all of it is here.
    """

    path: bytes
    content_type: bytes
    parts: tuple[bytes | memoryview, ...]
    reply: object

    @property
    def length(self) -> int:
        """The bytes of all parts together."""
        return sum(len(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client gets."""

    status: int
    content_type: bytes
    body: bytes


class FormAdapter(Protocol):
    """Translates between OpenAI's forms and an engine's own. Pure."""

    def upload(self, path: str, form: Form, body: memoryview, profile: Profile) -> Upload:
        """Return what to send for the *form* that is in *body* and came to *path*; raise ``RequestError``.

        *body* may end early in its last part, a file, but not within the first ``audio_format.HEAD_BYTES`` of that, or
        of what stands behind its tags.
        """

    def answer(
        self, upload: Upload, status: int, content_type: str, body: bytes, log_tail: Sequence[str]
    ) -> Answer | MeshError:
        """Return what to tell the client. *log_tail* is what the engine logged since the request began. Never raise."""


@dataclass(frozen=True, slots=True)
class Option:
    """A flag as a help text lists it."""

    values: int = 0  #: how many words after it are its own
    removed: str | None = None  #: it is listed only to say that it is gone; this is what to use instead


@dataclass(frozen=True, slots=True)
class Command:
    """Everything that starting one instance needs."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    host: str  #: where it can be reached
    port: int
    api_key: str | None = field(repr=False)
    cwd: Path | None = None  #: None = that of this process


class MakeCommand(Protocol):
    def __call__(
        self,
        profile: Profile,
        engine: EngineBinary,
        port: int,
        environ: Mapping[str, str] | None = None,
        assignment: Assignment = UNASSIGNED,
        directory: Path | None = None,
    ) -> Command:
        """Return how to start *profile* on *port*; raise ``ConfigError`` for what can only be wrong.

        *directory* is the instance's own and empty, where the engine ``needs_directory``; None if nothing is started.
        """


@dataclass(frozen=True, slots=True)
class Launch:
    """What can be said of a profile's launch without opening a file."""

    args: tuple[str, ...]  #: all that its binary gets from the profile
    options: LaunchOptions
    files: tuple[str, ...] = ()  #: what it reads; the model, if it is known, first
    fetched: bool = False  #: a file that is not there is no problem: the child fetches it
    problem: str | None = None  #: why it cannot be started, whatever is in the files


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the files of a launch say about its memory."""

    with_gpus: Estimate | None = None
    without_gpus: Estimate | None = None
    file_bytes: int = 0  #: stands for the estimate where there is none
    vocabulary: int = 0
    request_bytes: int = 0  #: main memory that a request may take, and give back: no sample need have shown it
    note: str | None = None


@dataclass(frozen=True, slots=True)
class EngineKind:
    """One engine: all that the rest of the node has to know of it."""

    engine: Engine
    program: str  #: what messages call it, and its name on PATH
    command: MakeCommand
    #: the model file that the child must have loaded; None if it is not given by a path
    expected_model: Callable[[Profile], str | None]
    capabilities: Callable[[Profile], frozenset[Capability]]
    launch: Callable[[Profile, Mapping[str, str]], Launch]
    #: opens the files of a launch, whose identities are given; raises ``MeshError`` or ``OSError`` for a broken one
    look: Callable[[Launch, Mapping[str, str | None]], Sizes]
    #: what a help text lists; empty if it is not that of this program
    known_flags: Callable[[str], Mapping[str, Option]]
    check_flag: str  #: put last, makes it read its arguments and exit, without loading anything
    variables: str  #: how the names of the variables begin that stand for its arguments
    slots: int | None  #: requests at once; None = as it tells
    tells_properties: bool  #: GET /props says what it loaded
    tells_slots: bool  #: GET /slots says what is busy
    keeps_alive: bool  #: False: one request for each connection
    #: it sets SO_REUSEPORT, so that another may listen on its port unnoticed, and not SO_REUSEADDR
    shares_ports: bool
    maps_model: bool  #: instances of one model share its weights in memory
    needs_directory: bool  #: it is to run in an empty directory of its own
    usage_statuses: frozenset[int]  #: exits before it was ready that call for other arguments, or another file
    process_ram_mib: int  #: it takes so much besides its buffers
    #: the program to run; None = that of the profile's build of llama.cpp
    find: Callable[[Settings], EngineBinary] | None = None
    #: its last lines without what says nothing of why it ended
    last_words: Callable[[Sequence[str]], Sequence[str]] = field(default=lambda lines: lines)
    adapter: FormAdapter | None = None  #: for forms; None = they are passed on as they are
