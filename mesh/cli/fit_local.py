"""Footprints worked out in this process: for files, for "what if", and when no node runs. Starts no model.

Uses what a node uses (``FootprintBook``, the budget's and the scheduler's pure functions), so that both say the same.
As before a start, llama-server is asked whether it accepts the arguments; that loads nothing.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from mesh.app import footprints_path, limits
from mesh.cli.failure import CliError
from mesh.cli.output import stderr_console
from mesh.config.engines import engine_of_file, keys_of
from mesh.config.llama_args import args_hash, expand, without_flags
from mesh.config.profile import Catalog, Engine, Profile
from mesh.config.settings import Settings
from mesh.core.budget import INSTANCES, BudgetLimits, capacity, taken_by_others
from mesh.core.devices import Devices, Gpu
from mesh.core.footprint import Footprint, Source
from mesh.core.lifecycle import State
from mesh.core.placement import Need
from mesh.core.resources import RAM, Resources
from mesh.core.scheduler import outlook
from mesh.core.world import InstanceView, Recipe, Snapshot
from mesh.engine.footprints import FootprintBook
from mesh.engine.kinds import engines as engines_of
from mesh.engine.kinds import kind_of
from mesh.engine.locate import EngineBinary, Engines
from mesh.engine.memory_report import Fit, Holder, MemoryReport, ModelFit
from mesh.engine.vetting import complaint
from mesh.errors import ConfigError, EngineMissingError, MeshError
from mesh.host.devices import DeviceReader, TelemetryError
from mesh.host.memory import ram_available_mib, ram_total_mib

T = TypeVar("T")

#: A file on a sleepy disk or a share may take its time; what takes longer than this deserves a word.
_SLOW_S = 0.7
#: Of the names that could have been meant, how many are told.
_NAMED = 10
_MODEL_NAME = re.compile(r"(?i).*\.gguf|ggml.*\.bin")
#: Stands for a llama-server that can do all that there is hardware for.
_ANY_ENGINE = EngineBinary(("llama-server",), None, "path")
#: What only a llama-server on the machine that it is about can judge: these name devices.
_DEVICE_FLAGS = (
    *("-dev", "--device", "-devd", "--device-draft", "--spec-draft-device", "-mmdev", "--mmproj-device"),
    *("-ot", "--override-tensor", "-otd", "--override-tensor-draft", "--spec-draft-override-tensor"),
)
_UNCHECKED = "its arguments were not checked: there is no llama-server here to ask"


def file_profile(path: str, extra: Sequence[str] = ()) -> Profile:
    """Return a profile that serves the file at *path*, by the engine whose it is, with the arguments *extra*."""
    if not os.path.isfile(path):
        raise CliError(f"there is no such file: {path}", fix="Give the path of a model file, or a model's name.")
    full = os.path.abspath(path)
    words, engine = expand(extra), engine_of_file(_magic(full)) or Engine.LLAMA
    return Profile(key=full, id=path, model=path, profile="default", args=words, model_path=full, engine=engine,
                   args_hash=args_hash(keys_of(engine).launch_args(words, full, None, None)))  # fmt: skip


def _magic(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(4)
    except OSError:  # whoever looks into it tells
        return b""


def directory(path: str) -> CliError:
    """Return what to say of a directory where a model was to be named."""
    try:
        files = sorted(name for name in os.listdir(path) if _MODEL_NAME.fullmatch(name))
    except OSError:
        files = []
    there = (
        f": {', '.join(files[:_NAMED])}{', ...' if len(files) > _NAMED else ''}" if files else "; there is none in it"
    )
    return CliError(f"{path} is a directory", fix=f"Name a model file{' in it' if files else ''}{there}.")


def broken(name: str, problem: str) -> ModelFit:
    """Return the verdict on *name*, of which nothing else can be said."""
    return ModelFit(name, name, Fit.UNKNOWN, Footprint(Need(), Source.UNKNOWN, problem=problem))


def named_profile(catalog: Catalog, name: str, extra: Sequence[str] = ()) -> Profile:
    """Return the cookbook's profile *name*; with *extra* arguments it is another one, of which nothing is known yet."""
    profile = catalog.resolve(name)
    if not extra:
        return profile
    args = (*profile.args, *expand(extra))
    full = keys_of(profile.engine).launch_args(args, profile.model_path, profile.hf_repo, profile.hf_file)
    key = f"{profile.key} {' '.join(extra)}"  # an instance of the profile as it is would be another model
    return replace(profile, key=key, args=args, args_hash=args_hash(full), estimate=Resources())


def these_devices() -> Devices:
    """Return this machine's memory as it is now; without a readable GPU, its RAM."""
    reader = DeviceReader()
    try:
        return reader.read()
    except TelemetryError as error:
        return Devices(ram_total_mib=ram_total_mib(), ram_available_mib=ram_available_mib(), problems=(str(error),))
    finally:
        reader.close()


def imagined_devices(gpus_mib: Sequence[int], real: Devices) -> Devices:
    """Return a machine with empty GPUs of these sizes and the RAM of *real*."""
    gpus = tuple(
        Gpu(kind=f"gpu{i}", uuid=f"imagined-{i}", name="imagined", total_mib=mib, used_mib=0, index=i)
        for i, mib in enumerate(gpus_mib)
    )
    return Devices("nvml" if gpus else "none", gpus, real.ram_total_mib, real.ram_available_mib)


def budget_limits(settings: Settings, *, gpus: bool = True) -> BudgetLimits:
    """Return what the configuration allows; without *gpus*, where those it means are not there, no size of theirs."""
    allowed = limits(settings).budget
    share: Literal["auto"] | None = "auto" if allowed.vram_mib == "auto" else None
    return allowed if gpus else replace(allowed, vram_mib=share, per_gpu_mib={})


def empty_node(allowed: BudgetLimits, devices: Devices) -> MemoryReport:
    """Return the memory of a node that has just started on *devices*."""
    budget = capacity(allowed, devices)
    foreign = taken_by_others(budget, devices, Resources())
    ceiling = {kind: mib - foreign.mib.get(kind, 0) for kind, mib in budget.mib.items()}
    return MemoryReport(budget, Resources(ceiling), foreign, Resources(), devices=devices)


def report_of(answer: Mapping[str, Any]) -> MemoryReport:
    """Return the report that a node answered to GET /admin/budget, as far as a verdict needs it."""
    memory: Mapping[str, Mapping[str, int | None]] = answer["memory"]
    budget = {kind: figures["capacity_mib"] for kind, figures in memory.items()}
    limited = {kind: mib for kind, mib in budget.items() if mib is not None}
    foreign = {kind: memory[kind]["foreign_mib"] or 0 for kind in memory}
    return MemoryReport(
        capacity=Resources(limited),
        ceiling=Resources({kind: mib - foreign[kind] for kind, mib in limited.items()}),
        foreign=Resources(foreign),
        used=Resources({kind: figures["used_mib"] or 0 for kind, figures in memory.items()}),
        holders=tuple(_holder(told) for told in answer["held_by"]),
        devices=_devices(answer["devices"]) if answer["devices"] else None,
    )


def _holder(told: Mapping[str, Any]) -> Holder:
    return Holder(told["instance"], told["key"], told["model"], State(told["state"]), Resources(told["memory_mib"]),
                  active=told["active"], pinned=told["pinned"], evictable=told["evictable"])  # fmt: skip


def _devices(told: Mapping[str, Any]) -> Devices:
    names = ("kind", "uuid", "name", "total_mib", "used_mib", "vendor", "index", "unified")
    gpus = tuple(Gpu(**{name: gpu[name] for name in names}) for gpu in told["gpus"])
    return Devices(told["telemetry"], gpus, told["ram_total_mib"], told["ram_available_mib"])


def footprints(
    profiles: Sequence[Profile], settings: Settings, report: MemoryReport, *, our_engine: bool, vetted: bool
) -> dict[str, Footprint]:
    """Return what each of *profiles* takes, by key. Reads the headers of their files.

    Without *our_engine* for a machine elsewhere, or imagined, of which only the memory is known. *vetted*: let
    llama-server read the arguments; what it refuses is the footprint's problem.
    """
    return asyncio.run(_with_a_word_if_slow(_footprints(profiles, settings, report, our_engine, vetted)))


async def _footprints(
    profiles: Sequence[Profile], settings: Settings, report: MemoryReport, our_engine: bool, vetted: bool
) -> dict[str, Footprint]:
    devices = report.devices or Devices()
    engines = engines_of(settings)
    book = FootprintBook(
        engine=lambda profile: _engine(engines, profile) if our_engine else _ANY_ENGINE,
        ram_limit_mib=lambda: report.capacity.mib.get(RAM),
        devices=lambda: devices,
        path=footprints_path(settings),
        changed=lambda: None,
    )
    book.restore()
    await book.look(profiles)
    known: dict[str, Footprint] = {}
    for profile in profiles:
        if (footprint := book.peek(profile)) is not None:
            known[profile.key] = await _vetted(profile, footprint, engines, our_engine) if vetted else footprint
    return known


async def _vetted(profile: Profile, footprint: Footprint, engines: Engines, our_engine: bool) -> Footprint:
    """Return *footprint* with what llama-server has against the arguments: a mistyped one would just change nothing."""
    if footprint.problem is not None or not profile.args:
        return footprint
    if not our_engine:
        profile = replace(profile, args=without_flags(expand(profile.args), _DEVICE_FLAGS))
    try:
        refusal = await complaint(profile, engines.of(profile))
    except ConfigError as error:  # ours to say: no llama-server was asked
        return replace(footprint, problem=error.message)
    except MeshError:
        return replace(footprint, notes=(*footprint.notes, _UNCHECKED))
    return (
        footprint
        if refusal is None
        else replace(footprint, problem=f"{kind_of(profile).program} refuses this: {refusal}")
    )


async def _with_a_word_if_slow(work: Coroutine[Any, Any, T]) -> T:
    status = stderr_console().status("reading model files …")
    handle = asyncio.get_running_loop().call_later(_SLOW_S, status.start)
    try:
        return await work
    finally:
        handle.cancel()
        status.stop()


def _engine(engines: Engines, profile: Profile) -> EngineBinary:
    try:
        return engines.of(profile)
    except EngineMissingError:  # nothing can be started, but the arithmetic is the same
        return _ANY_ENGINE


def judge(profile: Profile, footprint: Footprint, report: MemoryReport) -> ModelFit:
    """Return where *profile* would go on the node of *report*, and what would have to go first."""
    nothing_known = footprint.source is Source.UNKNOWN and footprint.need == Need()
    if footprint.problem is not None or nothing_known:
        return ModelFit(profile.key, profile.id, Fit.UNKNOWN, footprint)
    need = footprint.need
    recipe = Recipe(profile.key, need + Resources({INSTANCES: 1}), profile.max_instances)
    instances = [_view(holder) for holder in report.holders]
    budget = report.capacity + Resources({INSTANCES: len(instances) + 1})
    world = Snapshot(0.0, budget, {}, instances, [], report.foreign)
    seen = outlook(world, recipe)
    if seen.placement is None:
        return ModelFit(profile.key, profile.id, Fit.NEVER, footprint)
    fit = Fit.WAITS if seen.waits else Fit.AFTER_EVICTION if seen.victims else Fit.NOW
    placement = Resources({kind: mib for kind, mib in seen.placement.mib.items() if kind != INSTANCES})
    return ModelFit(profile.key, profile.id, fit, footprint, placement, seen.victims)


def _view(holder: Holder) -> InstanceView:
    return InstanceView(holder.instance, holder.key, holder.state, holder.memory + Resources({INSTANCES: 1}),
                        active=holder.active, pinned=holder.pinned)  # fmt: skip


def names_of(holders: Iterable[Holder]) -> dict[str, str]:
    """Return the model of each instance."""
    return {holder.instance: holder.model_id for holder in holders}
