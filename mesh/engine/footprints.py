"""What an instance of each profile would take: the answer is always a look-up, what it rests on is read in threads.

The supervisor asks ``of`` whenever it decides about a start. A look at the files is good for ``FRESH_S``; after that
they are looked at again first, so that nothing is started on figures of a file that has been replaced. ``changed`` is
called, on the loop, when an answer that was asked for is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from mesh import tasks
from mesh.config.profile import Profile
from mesh.core.devices import Devices
from mesh.core.footprint import Footprint, Known, Learned, Machine, build, sees_gpu
from mesh.core.gpu_choice import Choice, choose
from mesh.core.launch_options import LaunchOptions
from mesh.engine.assignment import VISIBLE_VARIABLES
from mesh.engine.children import child_env
from mesh.engine.examine import Look, examine
from mesh.engine.instances import launch_identity
from mesh.engine.learned import LearnedFigures
from mesh.engine.locate import EngineBinary

_log = logging.getLogger(__name__)

LOOKS_AT_ONCE: Final = 4
#: a look takes milliseconds; one that takes this long keeps nobody else waiting
SLOW_S: Final = 3.0
#: how long files are taken to be as they were
FRESH_S: Final = 2.0
#: how long the first sample of the devices is waited for: a driver that hangs must not stop what needs no GPU
FIRST_SAMPLE_LIMIT_S: Final = 10.0


@dataclass(slots=True, eq=False)
class _Entry:
    """One profile. A look that ends after the profile was edited is stored in an entry that nobody has any more."""

    profile: Profile
    look: Look | None = None
    looked_at: float = 0.0
    looking: asyncio.Task[None] | None = None
    looking_since: float = 0.0
    outdated: bool = False  #: the look that goes on is not to be trusted when it ends
    asked: bool = False  #: ``of`` had no answer: tell when there is one
    built: tuple[object, Footprint] | None = None

    def fresh(self) -> bool:
        """Whether the files are taken to be as they were at the last look."""
        if self.look is None or self.looking is not None:
            return False
        return asyncio.get_running_loop().time() - self.looked_at <= FRESH_S

    def slow(self) -> bool:
        """Whether a look takes so long that what was known before counts no more: a file server that is dead."""
        return self.looking is not None and asyncio.get_running_loop().time() - self.looking_since >= SLOW_S


class FootprintBook:
    """Belongs to the event loop's thread.

    While *devices* says None, the first sample has not come and nothing can be answered: ask again once it has. After
    ``FIRST_SAMPLE_LIMIT_S`` the machine counts as one without GPUs, until there is a sample.
    """

    def __init__(
        self,
        *,
        engine: Callable[[Profile], EngineBinary],
        ram_limit_mib: Callable[[], int | None],
        devices: Callable[[], Devices | None],
        path: Path | None,
        changed: Callable[[], None],
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._engine = engine
        self._ram_limit_mib = ram_limit_mib
        self._devices = devices
        self._changed = changed
        self._environ = os.environ if environ is None else environ
        self._learned = LearnedFigures(path)
        self._entries: dict[str, _Entry] = {}
        #: which flags of each profile were said not to be known to its engine; None = there is no log to say it in
        self._told: dict[str, str | None] | None = None
        self._sampled: Devices | None = None
        self._waiting = False  #: for the first sample
        self._unsampled: Devices | None = None  #: what stands for it after too long a wait
        self._machine = Machine()

    def of(self, profile: Profile) -> Footprint | None:
        """Return what an instance takes; None if that was never found out.

        If it is not (or no longer) ``fresh``, the files are looked at (again), and then ``changed`` is called.
        """
        entry = self._entry(profile)
        if not entry.fresh():
            entry.asked = True
            self._start_look(entry)
        return None if entry.slow() else self._footprint(entry)

    def fresh(self, profile: Profile) -> bool:
        """Whether the files were as they are now a moment ago: nothing is started on figures of others."""
        entry = self._entries.get(profile.key)
        return entry is not None and _same_launch(entry.profile, profile) and entry.fresh()

    def peek(self, profile: Profile) -> Footprint | None:
        """Return what is known without looking at anything."""
        entry = self._entries.get(profile.key)
        if entry is None or not _same_launch(entry.profile, profile):
            return None
        entry.profile = profile
        return self._footprint(entry)

    def forget_looks(self) -> None:
        """An engine was replaced: what was seen a moment ago, or is being seen, may be of the old one."""
        for entry in self._entries.values():
            entry.looked_at, entry.outdated = -math.inf, entry.looking is not None

    def survey(self, profiles: Iterable[Profile]) -> None:
        """Look at the files of all *profiles* one after the other, in the background; forget all other profiles."""
        catalog = {profile.key: profile for profile in profiles}
        for key in self._entries.keys() - catalog.keys():
            del self._entries[key]
        self._told = {key: told for key, told in (self._told or {}).items() if key in catalog}
        tasks.spawn(self.look(catalog.values()), "survey of the model files")

    async def look(self, profiles: Iterable[Profile]) -> None:
        """Look at the files of *profiles* now, unless that was done a moment ago; then ``peek`` answers for each."""
        several = asyncio.Semaphore(LOOKS_AT_ONCE)
        await asyncio.gather(*(self._look_in_turn(profile, several) for profile in list(profiles)))

    async def _look_in_turn(self, profile: Profile, several: asyncio.Semaphore) -> None:
        async with several:
            entry = self._entry(profile)
            if not entry.fresh():
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(SLOW_S):
                        await asyncio.shield(self._start_look(entry))

    def learn(
        self,
        profile: Profile,
        usage_ram_mib: int,
        gpu_mib: Mapping[str, int] | None,
        *,
        first: bool,
        identity: str | None = None,
    ) -> None:
        """Take in what a READY instance uses that has served a request; *first*: its first sample of that kind.

        *identity*: of the footprint that it was started with; else the files are taken to be the same still.
        """
        known = self.peek(profile) if identity is None else None
        key = identity or (known.identity if known is not None else "")
        if key:
            self._learned.add(key, profile.id, usage_ram_mib, gpu_mib, first=first)

    async def save(self) -> bool:
        """Write what was learned, if it changed; False if it cannot be written."""
        return await self._learned.save()

    def restore(self) -> None:
        """Continue with what was learned before; blocks."""
        self._learned.restore()

    # -- looking

    def _entry(self, profile: Profile) -> _Entry:
        entry = self._entries.get(profile.key)
        if entry is None or not _same_launch(entry.profile, profile):
            entry = self._entries[profile.key] = _Entry(profile)
        entry.profile = profile  # its figures in the cookbook may have changed
        return entry

    def _start_look(self, entry: _Entry) -> asyncio.Task[None]:
        if entry.looking is None:
            loop = asyncio.get_running_loop()
            entry.looking_since = loop.time()
            loop.call_later(SLOW_S + 0.01, self._is_slow, entry)
            entry.looking = tasks.spawn(self._look(entry), f"look at the files of {entry.profile.key}")
        return entry.looking

    def _is_slow(self, entry: _Entry) -> None:
        if entry.slow():
            _log.warning("looking at the files of %s takes long; is their disk there?", entry.profile.key)
            self._changed()

    async def _look(self, entry: _Entry) -> None:
        env = child_env(entry.profile, self._environ)
        try:
            job = partial(examine, entry.profile, env, self._engine, entry.look)
            entry.look = await tasks.in_daemon_thread(job, "look at model files")  # a dead file server answers never
        except Exception:  # a bug in reading or estimating: the model may well run, and nobody may wait for ever
            _log.exception("looking at the files of %s failed unexpectedly", entry.profile.key)
            entry.look = entry.look or Look("", LaunchOptions(), note="its files could not be looked at")
        finally:
            now = asyncio.get_running_loop().time()
            entry.looking, entry.looked_at, entry.outdated = None, -math.inf if entry.outdated else now, False
        self._warn_of_flags(entry)
        if entry.asked:
            entry.asked = False
            self._changed()

    def _warn_of_flags(self, entry: _Entry) -> None:
        """Say once for each profile and engine which flags keep it from starting, before anybody asks for it."""
        refused = None if entry.look is None else entry.look.refused
        if self._told is not None and refused != self._told.get(entry.profile.key):
            if refused is not None:
                _log.warning("%s will not start: %s", entry.profile.id, refused)
            self._told[entry.profile.key] = refused

    # -- answering

    def _footprint(self, entry: _Entry) -> Footprint | None:
        """Put the answer together from what is known; the same object as long as that is the same."""
        look, machine = entry.look, self._current_machine()
        if look is None or machine is None:
            return None
        if not look.engine_has_gpus:
            machine = Machine(ram_limit_mib=machine.ram_limit_mib, cpu_only=True)
        identity = f"{look.identity}-{_kind(machine)}" if look.identity else ""
        learned = self._learned.get(identity)
        basis = (entry.profile, look, machine, learned)
        if entry.built is None or entry.built[0] != basis:
            entry.built = (basis, self._build(entry.profile, look, machine, learned, identity))
        return entry.built[1]

    def _build(
        self, profile: Profile, look: Look, machine: Machine, learned: Learned | None, identity: str
    ) -> Footprint:
        choice = self._choice(profile, look.options, machine)
        estimate = look.with_gpus if sees_gpu(machine, choice) else look.without_gpus
        known = Known(look.options, profile.estimate, learned, estimate, look.file_bytes, look.vocabulary, identity,
                      look.process_ram_mib, look.request_bytes)  # fmt: skip
        result = build(known, machine, choice)
        notes = (*result.notes, look.note) if look.note else result.notes
        return replace(result, problem=look.problem, notes=notes)

    def _choice(self, profile: Profile, options: LaunchOptions, machine: Machine) -> Choice:
        own, inherited = (
            next((env[name] for name in VISIBLE_VARIABLES if name in env), None) for env in (profile.env, self._environ)
        )
        return choose(options, machine.gpus, allowed=profile.devices, own=own, inherited=inherited)

    def _current_machine(self) -> Machine | None:
        devices = self._devices() or self._unsampled
        if devices is None:
            if not self._waiting:
                self._waiting = True
                asyncio.get_running_loop().call_later(FIRST_SAMPLE_LIMIT_S, self._do_without)
            return None
        if devices is not self._sampled:
            self._sampled = devices
            gpus = tuple(replace(gpu, used_mib=0, processes=None) for gpu in devices.budgeted)
            self._machine = Machine(gpus, any(gpu.unified for gpu in devices.gpus))
        limit = self._ram_limit_mib()
        if limit != self._machine.ram_limit_mib:
            self._machine = replace(self._machine, ram_limit_mib=limit)
        return self._machine

    def _do_without(self) -> None:
        if self._devices() is None:
            _log.warning("no sample of this machine's devices: models are started as if it had no GPU")
            self._unsampled = Devices()
            self._changed()


def _same_launch(one: Profile, other: Profile) -> bool:
    return one is other or launch_identity(one) == launch_identity(other)


def _kind(machine: Machine) -> str:
    """What is measured where there is a GPU says nothing about where there is none."""
    return "gpu" if machine.gpus else "unified" if machine.unified else "cpu"
