"""Makes the catalog of a cookbook: fills in defaults, checks the profiles and indexes their names.

Works on entries that are valid in themselves (``cookbook_file``). Nothing here knows files or lines: problems name key
paths. Looks at the disk only to warn of a model file that is not there or none.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

from mesh.config.builds import DEFAULT_BUILD
from mesh.config.cookbook_file import CookbookFile, Inheritable, ModelEntry, ProfileEntry
from mesh.config.diagnostics import ConfigErrors, Diagnostic, KeyPath, Problem, dotted, suggestion
from mesh.config.engines import keys_of, max_wait_s, wrong_with_file
from mesh.config.llama_args import (
    ADDRESS_FLAGS,
    CONTEXT_FLAGS,
    HF_FLAGS,
    MODEL_FLAGS,
    args_hash,
    expand,
    flag_value,
    has_flag,
)
from mesh.config.profile import Catalog, Engine, Profile
from mesh.config.settings import Settings
from mesh.core.resources import Resources

__all__ = ["Assembly", "CookbookFile", "Entry", "assemble", "build_catalog", "entries_of"]

T = TypeVar("T")

_TWO_WORDS = re.compile(r"--?[a-zA-Z][a-zA-Z0-9-]*\s+\S")


@dataclass(frozen=True, slots=True)
class Entry:
    """A profile of the file with its model and its place."""

    path: KeyPath
    model: ModelEntry
    profile: ProfileEntry

    @property
    def enabled(self) -> bool:
        return self.model.enabled and self.profile.enabled

    @property
    def name(self) -> str:
        return f"{self.model.name}:{self.profile.id}"


@dataclass(slots=True)
class Assembly:
    """A catalog in the making. With errors it must not be used."""

    catalog: Catalog = field(default_factory=Catalog)
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)


def entries_of(file: CookbookFile) -> list[Entry]:
    """Return the profiles of *file* in its order, disabled ones included."""
    return [
        Entry(("models", m, "profiles", p), model, profile)
        for m, model in enumerate(file.models)
        for p, profile in enumerate(model.profiles)
    ]


def build_catalog(file: CookbookFile, settings: Settings, version: int = 0) -> Catalog:
    """Return the catalog of a valid *file*; raise ``ConfigErrors`` (without lines) for what contradicts itself."""
    built = assemble(entries_of(file), file.defaults, settings, version)
    if built.errors:
        raise ConfigErrors(Diagnostic("cookbook", None, dotted(p.path), p.message) for p in built.errors)
    return built.catalog


def unserved(file: CookbookFile) -> Iterator[Problem]:
    """Yield a warning for each model of *file* that nobody can ask for."""
    for m, model in enumerate(file.models):
        if model.enabled and not model.profiles:
            message = f"'{model.name}' has no profiles and is not served; a profile with 'model_path' is enough"
            yield Problem(("models", m), message)


def assemble(entries: Iterable[Entry], defaults: Inheritable, settings: Settings, version: int) -> Assembly:
    """Check *entries* against each other and build the catalog of the enabled ones."""
    built = Assembly()
    profiles: list[tuple[Entry, Profile]] = []
    built.errors += _build_errors(("defaults",), defaults, settings)
    for entry in entries:
        built.errors += _build_errors(entry.path, entry.profile, settings)
        profile = _profile(entry, defaults, settings)
        built.errors += _source_errors(entry, profile)
        if entry.enabled:
            built.errors += _name_errors(entry)
            built.warnings += _warnings(entry, profile, settings)
            profiles.append((entry, profile))
    names = _Names(built.errors)
    names.add_all(profiles)
    built.catalog = Catalog(
        tuple(profile for _, profile in profiles), MappingProxyType(names.index), settings.default_model, version
    )
    return built


def _first(*values: T | None, otherwise: T) -> T:
    """Return the first value that was given. Not ``or``: 0, false and an empty list are values."""
    return next((value for value in values if value is not None), otherwise)


def _profile(entry: Entry, common: Inheritable, settings: Settings) -> Profile:
    own, limits = entry.profile, settings.model_defaults
    model_path = os.path.expanduser(own.model_path) if own.model_path else None
    engine = own.engine or common.engine or Engine.LLAMA
    keys = keys_of(engine)  # what is meant for one program says nothing to another: else it would restart it
    shared = common.llama_server_args if engine is (common.engine or Engine.LLAMA) else None
    args = _first(own.llama_server_args, shared, otherwise=())
    request_ms = _first(
        own.max_request_duration_ms, common.max_request_duration_ms, otherwise=limits.max_request_duration_ms
    )
    return Profile(
        key=entry.name.lower(),
        id=entry.model.name if own.id == "default" else entry.name,
        model=entry.model.name,
        profile=own.id,
        args=args,
        model_path=model_path,
        hf_repo=own.hf_repo,
        hf_file=own.hf_file,
        engine=engine,
        engine_build=_engine_build(own.engine_build or common.engine_build) if keys.has_builds else None,
        convert=keys.converts and (_first(own.convert, common.convert, otherwise=False) or "--convert" in args),
        env=MappingProxyType({**(common.env or {}), **(own.env or {})}),
        aliases=own.aliases,
        pinned=_first(own.pinned, common.pinned, otherwise=False),
        devices=_first(own.devices, common.devices, otherwise=()),
        description=own.description,
        model_description=entry.model.description,
        estimate=Resources.of(ram_mib=own.estimated_sysmem_mb or 0, vram_mib=own.estimated_vram_mb or 0),
        idle_timeout_s=_first(own.idle_timeout_seconds, common.idle_timeout_seconds, otherwise=300.0),
        max_instances=_first(own.max_instances, common.max_instances, otherwise=max(1, limits.max_instances_per_model)),
        max_concurrent=_first(
            own.max_concurrent_requests_per_instance,
            common.max_concurrent_requests_per_instance,
            otherwise=limits.max_concurrent_requests_per_instance,
        ),
        max_queue=_first(own.max_queue_size, common.max_queue_size, otherwise=limits.max_queue_size_per_model),
        max_wait_s=max_wait_s(
            engine, own.max_wait_in_queue_ms, common.max_wait_in_queue_ms, limits.max_wait_in_queue_ms
        ),
        max_request_s=request_ms / 1000 or None,
        min_tenure_s=_first(
            own.min_eviction_tenure_secs, common.min_eviction_tenure_secs, otherwise=limits.min_eviction_tenure_secs
        ),
        startup_timeout_s=_first(own.startup_timeout_seconds, common.startup_timeout_seconds, otherwise=60.0),
        download_timeout_s=_first(own.download_timeout_seconds, common.download_timeout_seconds, otherwise=3600.0),
        drain_on_disconnect=_first(own.drain_on_disconnect, common.drain_on_disconnect, otherwise=False),
        args_hash=args_hash(keys.launch_args(args, model_path, own.hf_repo, own.hf_file)),
    )


def _engine_build(name: str | None) -> str | None:
    folded = None if name is None else name.lower()
    return None if folded == DEFAULT_BUILD else folded


def _build_errors(path: KeyPath, keys: Inheritable, settings: Settings) -> Iterator[Problem]:
    """Yield whether the build that is named there is none."""
    name, known = keys.engine_build, (DEFAULT_BUILD, *settings.builds)
    if name is not None and name.lower() not in known:
        message = f"there is no build '{name}'{suggestion(name, known)}; config.yaml has: {', '.join(known)}"
        yield Problem((*path, "engine_build"), message)


def _source_errors(entry: Entry, profile: Profile) -> Iterator[Problem]:
    """Yield what is wrong with where the model comes from; without a source the child would be a router (trap 30)."""
    keys = keys_of(profile.engine)
    in_args = has_flag(profile.args, keys.source_flags)
    if profile.model_path and profile.hf_repo:
        yield Problem(entry.path, f"profile {entry.name} has both 'model_path' and 'hf_repo'; keep one")
    if not keys.fetches and profile.hf_repo:
        message = f"{keys.program} downloads nothing; give 'model_path', a {keys.file} file, instead of 'hf_repo'"
        yield Problem((*entry.path, "hf_repo"), message)
    elif not keys.fetches and not (profile.model_path or in_args):
        yield Problem(entry.path, f"profile {entry.name} has no model: give 'model_path', a {keys.file} file")
    elif not (profile.model_path or profile.hf_repo or in_args):
        yield Problem(
            entry.path,
            f"profile {entry.name} has no model: give 'model_path' (a GGUF file) or 'hf_repo',"
            " or -m/--model or -hfr/--hf-repo in llama_server_args",
        )


def _name_errors(entry: Entry) -> Iterator[Problem]:
    if ":" in entry.model.name:
        yield Problem(
            (*entry.path[:2], "name"),
            f"'{entry.model.name}' contains ':', which separates model and profile; use '-', or make it an alias",
        )
    if ":" in entry.profile.id:
        message = f"'{entry.profile.id}' contains ':', which separates model and profile; use '-'"
        yield Problem((*entry.path, "id"), message)


def _warnings(entry: Entry, profile: Profile, settings: Settings) -> Iterator[Problem]:
    if profile.hf_file and not profile.hf_repo:
        yield Problem((*entry.path, "hf_file"), "has no effect without 'hf_repo'")
    if profile.model_path and has_flag(profile.args, MODEL_FLAGS + HF_FLAGS):
        yield Problem((*entry.path, "model_path"), "has no effect: llama_server_args already names a model")
    yield from _file_warnings(entry, profile)
    yield from _keys_of_other_engines(entry, profile)
    yield from _argument_warnings(entry, profile)
    if glued := next((word.split()[0] for word in profile.args if _TWO_WORDS.match(word)), None):
        message = f"one argument holds '{glued}' and its value together; in a list these are two items"
        yield Problem((*entry.path, "llama_server_args"), message)
    yield from _too_large(entry, profile, settings)


def model_file(profile: Profile) -> str | None:
    """Return the model file that *profile* is started with, its arguments going first; None if it names none."""
    return flag_value(profile.args, MODEL_FLAGS) or (
        None if has_flag(profile.args, MODEL_FLAGS + HF_FLAGS) else profile.model_path
    )


def _file_warnings(entry: Entry, profile: Profile) -> Iterator[Problem]:
    path = model_file(profile)
    wrong = None if path is None else wrong_with_file(path, keys_of(profile.engine))
    if wrong is not None:
        key = "llama_server_args" if flag_value(profile.args, MODEL_FLAGS) else "model_path"
        yield Problem((*entry.path, key), wrong)


def _keys_of_other_engines(entry: Entry, profile: Profile) -> Iterator[Problem]:
    """Yield the keys that mean nothing to the profile's engine, or nothing beside its arguments."""
    keys, own = keys_of(profile.engine), entry.profile
    if own.convert and not keys.converts:
        yield Problem((*entry.path, "convert"), f"has no effect: {keys.program} reads no audio through ffmpeg")
    if own.convert is False and profile.convert:
        yield Problem((*entry.path, "convert"), "has no effect: llama_server_args have --convert")
    if own.engine_build and not keys.has_builds:
        yield Problem((*entry.path, "engine_build"), f"has no effect: builds are of llama.cpp, not of {keys.program}")
    if keys.one_request and own.max_concurrent_requests_per_instance not in (None, 1):
        message = f"has no effect: {keys.program} works on one request at a time; raise max_instances instead"
        yield Problem((*entry.path, "max_concurrent_requests_per_instance"), message)


def _argument_warnings(entry: Entry, profile: Profile) -> Iterator[Problem]:
    path = (*entry.path, "llama_server_args")
    words = expand(profile.args)
    if words and words[-1] in MODEL_FLAGS + HF_FLAGS + CONTEXT_FLAGS + ADDRESS_FLAGS:
        yield Problem(path, f"'{words[-1]}' has no value; it will not start")
    port = flag_value(profile.args, ("--port",))
    if port is not None and not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        yield Problem(path, f"'--port {port}' is not a port (1 to 65535); leave it out and the node picks one")


def _too_large(entry: Entry, profile: Profile, settings: Settings) -> Iterator[Problem]:
    for key, need_mib, budget_key, budget_mib in (
        ("estimated_vram_mb", entry.profile.estimated_vram_mb, "max_vram_mb", settings.max_vram_mb),
        ("estimated_sysmem_mb", entry.profile.estimated_sysmem_mb, "max_sysmem_mb", settings.max_sysmem_mb),
    ):
        if need_mib is not None and isinstance(budget_mib, int) and need_mib > budget_mib:
            message = (
                f"{need_mib} is more than all of {budget_key}, {budget_mib}; it is refused until measured to need less"
            )
            yield Problem((*entry.path, key), message)


class _Names:
    """The index of names, all lower-case, and who took each. A name that two profiles claim is an error (trap 84)."""

    def __init__(self, errors: list[Problem]) -> None:
        self.index: dict[str, Profile] = {}
        self._errors = errors
        self._owners: dict[str, tuple[str, KeyPath]] = {}

    def add_all(self, profiles: list[tuple[Entry, Profile]]) -> None:
        """Index *profiles*: first what they are, then bare model names, then aliases."""
        for entry, profile in profiles:
            self._add_key(entry, profile)
        for model, own in _by_model(profiles).items():
            default = next((p for _, p in own if p.profile.lower() == "default"), own[0][1] if len(own) == 1 else None)
            if default is not None:
                self._take(model, default, f"the model '{default.model}'", own[0][0].path)
        for entry, profile in profiles:
            for position, alias in enumerate(profile.aliases):
                self._add_alias((*entry.path, "aliases", position), alias, profile)

    @staticmethod
    def _lacks_id(entry: Entry, other: Profile) -> bool:
        """Whether the clash is between profiles of one model, of which this one has no id."""
        return "id" not in entry.profile.model_fields_set and entry.name.partition(":")[0] == other.model

    def _add_key(self, entry: Entry, profile: Profile) -> None:
        other = self.index.get(profile.key)
        if other is None:
            self._take(profile.key, profile, f"the profile '{entry.name}'", entry.path)
            return
        self._errors.append(
            Problem(
                (*entry.path, "id"),
                f"duplicate model:profile identifier: '{other.model}:{other.profile}' and '{entry.name}'"
                f" both resolve to '{profile.key}'; "
                + ("give each profile an id" if self._lacks_id(entry, other) else "give one another name"),
                other=self._owners[profile.key][1],
            )
        )

    def _add_alias(self, path: KeyPath, alias: str, profile: Profile) -> None:
        name = alias.lower()
        other = self.index.get(name)
        if other is None:
            self._take(name, profile, f"an alias of '{profile.model}:{profile.profile}'", path)
        elif other is not profile:
            owner, place = self._owners[name]
            self._errors.append(Problem(path, f"'{alias}' is already {owner}; choose another alias", other=place))

    def _take(self, name: str, profile: Profile, owner: str, place: KeyPath) -> None:
        self.index[name] = profile
        self._owners[name] = owner, place


def _by_model(profiles: list[tuple[Entry, Profile]]) -> dict[str, list[tuple[Entry, Profile]]]:
    groups: dict[str, list[tuple[Entry, Profile]]] = {}
    for entry, profile in profiles:
        groups.setdefault(profile.model.lower(), []).append((entry, profile))
    return groups
