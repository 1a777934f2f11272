"""One attempt that is going on: its state as others see it, and how it ends. Whatever happens in it, it does end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace

import msgspec

from mesh.build.command import TAIL_LINES
from mesh.build.compile import CompileError
from mesh.build.events import Events
from mesh.build.lock import BuildLock
from mesh.build.pipeline import Pipeline, Report, Request, Result, Tools
from mesh.build.rejected import RejectedError
from mesh.build.spec import BuildSpec
from mesh.build.state import lock_path
from mesh.build.status import Attempt, Outcome, Stage
from mesh.errors import BuildError, MeshError
from mesh.logs import Log

_log = Log(__name__)


class Running:
    """Runs a pipeline, once: ``run``. ``attempt`` is what is known of it at any time."""

    def __init__(
        self, spec: BuildSpec, attempt: Attempt, request: Request, tools: Tools, events: Events, lock: BuildLock | None
    ) -> None:
        self._spec = spec
        self._request = request
        self._tools = tools
        self._events = events
        self._lock = lock
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._attempt = attempt
        self.retry = False  #: whether it may be better next time
        self._events.publish("started", self._whole())

    @property
    def attempt(self) -> Attempt:
        """The attempt now, with the newest lines of its log while it goes on."""
        ended = self._attempt.outcome is not None
        return self._attempt if ended else replace(self._attempt, log_tail=tuple(self._tail))

    @property
    def stage(self) -> Stage:
        return self._attempt.stage

    async def run(self, slot: asyncio.Lock, refresh: Callable[[], Awaitable[None]]) -> None:
        """Wait for other processes and for *slot*, build, *refresh*. Raise nothing; ``end`` says how it ended."""
        try:
            if self._lock is None:
                self._lock = await BuildLock.wait(lock_path(self._spec))
            async with slot:
                report = Report(self._on_stage, self._on_line, self._on_commit)
                result = await Pipeline(self._spec, self._request, self._tools, report).run()
            self._outcome(result)
        except asyncio.CancelledError:
            self._failed(Outcome.CANCELLED, "cancelled; what ran before runs on")
        except MeshError as error:
            self._error(error)
        except OSError as error:  # nobody's fault in particular: no descriptor left, a disk that fails
            why = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"
            _log.warning("a build met an error of the system", build=self._spec.name, error=str(error))
            self._error(BuildError(f"the system did not let us build ({why}); what ran before runs on"))
        except Exception as error:
            _log.exception("a build failed in a way that nobody thought of", build=self._spec.name)
            self._failed(Outcome.FAILED, f"internal error: {error!r}; see the log")
        await refresh()

    def end(self) -> None:
        """Tell that it has ended. Also after a cancellation that came before the first step."""
        self._release()
        if self._attempt.outcome is None:
            self._failed(Outcome.CANCELLED, "cancelled; what ran before runs on")
        self._attempt = replace(self._attempt, ended_at_wall=self._tools.wall())
        self._log_end()
        self._events.publish("ended", self._whole())

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    # -- what the pipeline says

    def _on_stage(self, stage: Stage, done: int | None, total: int | None) -> None:
        before = self._attempt
        self._attempt = replace(before, stage=stage, done=done, total=total)
        if stage is not before.stage:
            self._events.publish("stage", self._whole())
        elif done != before.done or total != before.total:
            data = {"stage": str(stage), "done": done, "total": total}
            self._events.publish("progress", self._names() | data)

    def _on_line(self, line: str) -> None:
        self._tail.append(line)
        _log.debug(line, build=self._spec.name)
        self._events.publish("log", self._names() | {"line": line})

    def _on_commit(self, commit: str) -> None:
        self._attempt = replace(self._attempt, commit=commit)

    # -- how it ended

    def _outcome(self, result: Result) -> None:
        self._attempt = replace(
            self._attempt, outcome=result.outcome, comparisons=result.comparisons, notes=result.notes
        )

    def _error(self, error: MeshError) -> None:
        rejected = isinstance(error, RejectedError)
        self.retry = not isinstance(error, (RejectedError, CompileError))
        status, tail = (error.exit_status, error.log_tail) if isinstance(error, BuildError) else (None, ())
        measured = error.comparisons if isinstance(error, RejectedError) else ()
        self._failed(Outcome.REJECTED if rejected else Outcome.FAILED, error.message)
        tail = (tail or tuple(self._tail))[-TAIL_LINES:]
        self._attempt = replace(self._attempt, exit_status=status, log_tail=tail, comparisons=measured)

    def _failed(self, outcome: Outcome, why: str) -> None:
        self._attempt = replace(self._attempt, outcome=outcome, error=why, log_tail=tuple(self._tail))

    def _log_end(self) -> None:
        ended = self._attempt
        bad = ended.outcome in (Outcome.FAILED, Outcome.REJECTED)
        words = ended.error or "; ".join(ended.notes)
        tell = _log.warning if bad else _log.info
        outcome = str(ended.outcome)
        tell("build ended", build=ended.build, attempt=ended.id, outcome=outcome, commit=ended.commit, why=words)

    def _names(self) -> dict[str, object]:
        return {"build": self._attempt.build, "attempt": self._attempt.id}

    def _whole(self) -> dict[str, object]:
        return self._names() | {"attempt_state": msgspec.to_builtins(self._attempt)}
