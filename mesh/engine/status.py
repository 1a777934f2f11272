"""Which engine there is, for whoever asks often."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import Final

from mesh.config.profile import Engine
from mesh.engine.locate import EngineBinary, Engines
from mesh.errors import EngineMissingError

#: How long what the engine locator said is believed; health endpoints ask often.
ENGINE_TTL_S: Final = 1.0


class EngineStatus:
    """Answers "which engine" and "is there one" from memory, looking again at most once a second.

    That is the default build's, and while that is missing the first other one: its profiles can be started.
    """

    def __init__(self, engines: Engines, used: Callable[[], Collection[Engine]] = frozenset) -> None:
        """*used*: the engines that profiles ask for."""
        self._engines = engines
        self._used = used
        self._looked_at = float("-inf")
        self._version: str | None = None
        self._source: str | None = None
        self._missing: EngineMissingError | None = None

    def version(self) -> str | None:
        self._look()
        return self._version

    def source(self) -> str | None:
        """Return where the engine is from: "configured", "embedded", "path" or "cache"."""
        self._look()
        return self._source

    def problem(self) -> str | None:
        """Return why no instance can be started, or None. The short words are llamesh's."""
        return "Binary missing" if self.missing() else None

    def missing(self) -> EngineMissingError | None:
        """Return what to do about it, if there is no engine."""
        self._look()
        return self._missing

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._looked_at < ENGINE_TTL_S:
            return
        self._looked_at = now
        try:
            engine = self._find()
            self._version, self._source, self._missing = engine.version, engine.source, None
        except EngineMissingError as error:
            self._version, self._source, self._missing = None, None, error

    def _find(self) -> EngineBinary:
        try:
            return self._engines.named()
        except EngineMissingError:
            if (other := next(self._engines.all(self._used()), None)) is not None:
                return other
            raise
