"""How fast is a new llama-server beside the one in use? Measured on the tiny model, and on a model of the cookbook.

On the tiny model both run at once and take turns, so whatever else the machine does happens to both. A loss is measured
again, with more rounds, before it counts (``mesh.core.canary`` says what they are good for).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

from mesh.build.measuring import measure
from mesh.build.rejected import RejectedError
from mesh.build.server_under_test import (
    GPUS_HIDDEN,
    Connection,
    ServerFailedError,
    ServerUnderTest,
)
from mesh.build.smoke import CPU_NOTE, rejected
from mesh.build.status import Comparison, Speed
from mesh.core.canary import Change, Verdict, judge, rounds_order
from mesh.core.exits import Cause, classify
from mesh.errors import BuildError, EngineMissingError, InstanceError, MeshError
from mesh.host.warden import Warden

TINY_MODEL: Final = "tiny model"
#: rounds of each server; the later ones only if the earlier ones show a loss, and then all of them count
TINY_ROUNDS: Final = (8, 16, 32)
TRIAL_ROUNDS: Final = (3, 6)
#: no further round of a big model is begun after so long; there are always two
TRIAL_BUDGET_S: Final = 120.0
TINY_LIMIT_S: Final = 120.0
TRIAL_LIMIT_S: Final = 600.0
#: what one round makes the tiny model read (a token each) and write. Short: a busy machine is quiet for moments only
_TINY_CHARACTERS, _TINY_TOKENS = 192, 16
#: the same for a real model, for which it is some 400 tokens
_TRIAL_CHARACTERS, _TRIAL_TOKENS = 1800, 32
_TEXT: Final = "The quick brown fox jumps over the lazy dog while 12 bright llamas count the stars above the hills. "

Say = Callable[[str], None]
Progress = Callable[[int, int], None]  #: rounds done, and of how many


class Served(Protocol):
    """An instance that a trial lends."""

    @property
    def base_url(self) -> str: ...
    @property
    def api_key(self) -> str | None: ...


class Trials(Protocol):
    """Lends instances of the cookbook's models."""

    def runs_by_default(self, profile_name: str, build: str) -> bool:
        """Whether the usual engine of the profile is the one of *build*."""
        ...

    def trial(self, profile_name: str, binary: Path | None) -> AbstractAsyncContextManager[Served]:
        """Lend an instance of the profile: one like any other, or one that *binary* runs, which is gone afterwards.

        It waits for memory as requests do. Raise ``MeshError``: ``InstanceError`` if it did not start, and others if
        the profile does not exist or gets no room.
        """
        ...


# -- on the tiny model


async def compare_tiny(
    old: Path | None,
    new: Path,
    model: Path,
    *,
    max_slowdown: float,
    env: Mapping[str, str],
    say: Say,
    progress: Progress,
    args: Sequence[str] = (),
    warden: Warden | None = None,
) -> tuple[Comparison, tuple[str, ...]]:
    """Measure *old*, if there is one and it starts, and *new*. Return the speeds and notes.

    Raise ``RejectedError`` if *new* fails or lost more than *max_slowdown*, another ``BuildError`` if there is no
    memory for it. By *warden* the servers die with the node.
    """
    on_gpu = _Tiny(old, new, model, max_slowdown, env, args, say, progress, warden)
    try:
        try:
            return await on_gpu.compare()
        except ServerFailedError as error:
            if error.cause is not Cause.MEMORY or on_gpu.gpus_hidden:
                raise
            say(f"{error.message}; once more without the GPUs")
        comparison, notes = await replace(on_gpu, env={**env, **GPUS_HIDDEN}).compare()
        return comparison, (CPU_NOTE, *notes)
    except ServerFailedError as error:
        raise rejected("measuring its speed", error) from error


@dataclass(slots=True)
class _Rounds:
    """What was measured of both so far."""

    old: list[Speed] = field(default_factory=list)
    new: list[Speed] = field(default_factory=list)

    def judge(self, max_slowdown: float) -> Verdict:
        return judge(self.old, self.new, max_slowdown)

    def concluded(self, model: str, max_slowdown: float, say: Say) -> Comparison:
        """Return the best of both; raise ``RejectedError`` if the new one is too slow."""
        comparison = Comparison(model, _best(self.old) if self.old else None, _best(self.new))
        if comparison.old is None:
            say(f"{model}: {comparison.new.prefill_tps:.4g} tok/s prefill, {comparison.new.decode_tps:.4g} decode")
            return comparison
        verdict = self.judge(max_slowdown)
        say(f"{model}: {verdict.prefill}; {verdict.decode}")
        if not verdict.accepted:
            lost = "; ".join(str(change) for change in verdict.too_slow)
            raise RejectedError(
                f"the new llama-server is too slow with '{model}' (best of {len(self.new)} rounds): {lost}. "
                f"max_slowdown is {max_slowdown:g}; raise it if that is meant",
                comparisons=(comparison,),
            )
        return comparison


@dataclass(slots=True)
class _Tiny:
    """One comparison on the tiny model."""

    old: Path | None
    new: Path
    model: Path
    max_slowdown: float
    env: Mapping[str, str]
    args: Sequence[str]
    say: Say
    progress: Progress
    warden: Warden | None
    _old_server: ServerUnderTest | None = field(default=None, init=False)
    _rounds: _Rounds = field(default_factory=_Rounds, init=False)
    _notes: tuple[str, ...] = field(default=(), init=False)

    @property
    def gpus_hidden(self) -> bool:
        return GPUS_HIDDEN.items() <= self.env.items()

    async def compare(self) -> tuple[Comparison, tuple[str, ...]]:
        """Return speeds and notes. Raise ``ServerFailedError`` if the new server fails, or if memory ran out."""
        async with AsyncExitStack() as stack:
            await self._start_old(stack)
            new_server = await stack.enter_async_context(self._server(self.new))
            for number, count in enumerate(TINY_ROUNDS):
                if number > 0:
                    self.say("the new one was slower; measuring again")
                await self._run(new_server, count)
                if self._old_server is None or self._rounds.judge(self.max_slowdown).accepted:
                    break
        return self._rounds.concluded(TINY_MODEL, self.max_slowdown, self.say), self._notes

    def _server(self, binary: Path) -> ServerUnderTest:
        return ServerUnderTest((str(binary),), self.model, args=self.args, env=self.env, warden=self.warden)

    async def _start_old(self, stack: AsyncExitStack) -> None:
        if self.old is None:
            return
        try:
            self._old_server = await stack.enter_async_context(self._server(self.old))
        except ServerFailedError as error:
            self._lose_old(error)

    def _lose_old(self, error: ServerFailedError) -> None:
        """Go on without the old server: what is wrong with it says nothing against the new one."""
        if error.cause is Cause.MEMORY and not self.gpus_hidden:
            raise error
        self._old_server = None
        self._rounds.old.clear()
        self._notes = (f"nothing to compare with: the llama-server in use failed: {error.message}",)
        self.say(self._notes[0])

    async def _run(self, new_server: ServerUnderTest, count: int) -> None:
        rounds, done = self._rounds, len(self._rounds.new)
        for is_new in rounds_order(count):
            try:
                if is_new:
                    rounds.new.append(await _tiny_round(new_server, len(rounds.new)))
                elif self._old_server is not None:
                    rounds.old.append(await _tiny_round(self._old_server, len(rounds.old)))
            except ServerFailedError as error:
                if is_new:
                    raise
                self._lose_old(error)
            self.progress(len(rounds.new), done + count)


def _best(speeds: Sequence[Speed]) -> Speed:
    return Speed(max(speed.prefill_tps for speed in speeds), max(speed.decode_tps for speed in speeds))


# -- on a model of the cookbook


async def compare_trial(
    trials: Trials,
    profile: str,
    new: Path,
    *,
    old: Path | None = None,
    has_old: bool = True,
    max_slowdown: float,
    say: Say,
    progress: Progress,
) -> tuple[Comparison | None, tuple[str, ...]]:
    """Measure *profile* as it runs now, then with *new*; return the speeds (None: not to be had) and notes.

    Without an old build (not *has_old*) it need only run: what serves until now is of another kind, perhaps the
    embedded engine. *old* is what to compare with if the profile usually runs another build than the one that is made.

    Raise ``RejectedError`` if *new* does not run a model that runs now, or is too slow; another ``BuildError`` if it
    was too slow, and cannot be measured again now: it must not come into use, and another time it may prove itself.
    """
    rounds, lost = _Rounds(), tuple[Change, ...]()
    for count in TRIAL_ROUNDS:
        first = "with the llama-server in use, then " if has_old else ""
        say(f"{profile}: {count} rounds {first}with the new one")
        progress(len(rounds.new), len(rounds.new) + count)
        try:
            problem = await _trial_round(trials, profile, new, rounds, count, old=old, has_old=has_old)
            if lost and problem is not None:
                raise _UnavailableError(f"the llama-server in use failed: {problem}")
        except _UnavailableError as error:
            if lost:
                raise _undecided(profile, lost, max_slowdown, error) from error
            say(note := f"{profile} could not be compared: {error}")
            return None, (note,)
        progress(len(rounds.new), len(rounds.new))
        if not rounds.old or not (lost := rounds.judge(max_slowdown).too_slow):
            break
    notes = () if problem is None else (f"{profile}: nothing to compare with: {problem}",)
    return rounds.concluded(profile, max_slowdown, say), notes


def _undecided(profile: str, lost: Sequence[Change], max_slowdown: float, why: _UnavailableError) -> BuildError:
    """Return the error for a loss that may be the machine's: nobody remembers it against the commit."""
    changes = "; ".join(map(str, lost))
    return BuildError(
        f"the new llama-server was too slow with '{profile}', and could not be measured again ({why}): {changes}. "
        f"It is not put in force before it was; max_slowdown is {max_slowdown:g}"
    )


class _UnavailableError(Exception):
    """The model cannot be measured now, for no fault of the new build."""


async def _trial_round(
    trials: Trials, profile: str, new: Path, rounds: _Rounds, count: int, *, old: Path | None, has_old: bool
) -> str | None:
    """Measure the old, then the new. Return what is wrong with the old, None if nothing is."""
    problem: MeshError | None = None
    try:
        if has_old:
            rounds.old += await _lent(trials, profile, old, count)
    except (ServerFailedError, InstanceError) as error:
        problem = error
        rounds.old.clear()
    except MeshError as error:
        raise _UnavailableError(error.message) from error
    try:
        rounds.new += await _lent(trials, profile, new, count)
    except (ServerFailedError, InstanceError) as error:
        if _lacks_memory(error):  # somebody may have taken it since the old one ran
            raise _UnavailableError(f"there was no memory for the new llama-server: {error.message}") from error
        if problem is None or isinstance(problem, EngineMissingError):
            raise RejectedError(f"the new llama-server cannot run {profile}: {error.message}") from error
        raise _UnavailableError(f"no llama-server runs it, neither the old nor the new: {error.message}") from error
    except MeshError as error:
        raise _UnavailableError(error.message) from error
    return problem.message if problem else None


def _lacks_memory(error: MeshError) -> bool:
    """Whether more room may help. An instance says why it failed with its last lines only."""
    known = error.cause if isinstance(error, ServerFailedError) else Cause.OTHER
    return known is Cause.MEMORY or classify(1, error.message.splitlines()) is Cause.MEMORY


async def _lent(trials: Trials, profile: str, binary: Path | None, count: int) -> list[Speed]:
    """Return the speeds of at most *count* rounds on an instance of its own or a usual one."""
    loop, speeds = asyncio.get_running_loop(), list[Speed]()
    async with trials.trial(profile, binary) as served:
        connection = Connection(served.base_url, served.api_key)
        enough_at = loop.time() + TRIAL_BUDGET_S
        try:
            while len(speeds) < count and (len(speeds) < 2 or loop.time() < enough_at):
                prompt = _prompt(len(speeds), _TRIAL_CHARACTERS)
                speeds.append(await measure(connection, prompt, _TRIAL_TOKENS, TRIAL_LIMIT_S))
        finally:
            await connection.close()
    return speeds


# -- one round


async def _tiny_round(server: ServerUnderTest, number: int) -> Speed:
    return await measure(server, _prompt(number, _TINY_CHARACTERS), _TINY_TOKENS, TINY_LIMIT_S)


def _prompt(number: int, characters: int) -> str:
    """Return a text that differs from its first letter on, so that no cache knows it."""
    start = f"{chr(ord('A') + number % 26)}{number} "
    return (start + _TEXT * (characters // len(_TEXT) + 1))[:characters]
