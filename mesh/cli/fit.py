"""`llama-mesh fit`: what models take, where they would go, and what would have to go first.

A running node is asked for the models of its cookbook and for its memory. Files, "what if" and a machine without a
running node are worked out here (``mesh.cli.fit_local``), from the same figures and by the same rules.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from mesh.cli import node
from mesh.cli.configuration import NO_COOKBOOK, load_from
from mesh.cli.failure import FAILED, OK, USAGE, CliError
from mesh.cli.fit_table import lacking_ram_mib, print_fits
from mesh.cli.output import print_json
from mesh.config.loader import Loaded
from mesh.config.shellwords import ShellSyntaxError, split
from mesh.config.units import parse_megabytes
from mesh.core.budget import AUTO_VRAM_SHARE
from mesh.errors import MeshError

if TYPE_CHECKING:
    from mesh.config.profile import Profile
    from mesh.engine.memory_report import MemoryReport

Entry = dict[str, Any]

#: Of the cookbook's names, how many are told to who mistyped one.
_NAMED = 10


def fit(arguments: argparse.Namespace) -> int:
    """Say what fits. Exits 1 if a model that was named cannot be sized, or started with these arguments."""
    extra, gpus_mib = _words(arguments.args), _sizes(arguments.gpus)
    if extra and not arguments.models:
        raise CliError("--args needs a MODEL", fix="Name the model to try them on.", exit_code=USAGE)
    asked, budget = (None, None) if gpus_mib is not None else _node(arguments)
    search = _Answer(arguments, asked, budget, extra, gpus_mib)
    answer = search.complete()
    broken = [entry for entry in answer["models"] if entry["problem"]] if arguments.models else []
    if len(answer["models"]) == 1 and broken:
        raise search.errors.get(arguments.models[0]) or CliError(broken[0]["problem"])
    if arguments.json:
        for entry in answer["models"]:
            _remark(entry, answer["budget"])
        print_json(answer["models"][0] if len(arguments.models) == 1 else answer)
    else:
        print_fits(answer, where=search.where(), remarks=search.remarks)
    return FAILED if broken else OK


class _Answer:
    """Collects the entries of the models, some from the node and some worked out here, in the order asked for."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        asked: node.Node | None,
        budget: Entry | None,
        extra: Sequence[str],
        gpus_mib: Sequence[int] | None,
    ) -> None:
        self.errors: dict[str, CliError] = {}  #: why a name gave nothing
        self.remarks: list[str] = []  #: on the answer as a whole
        self._arguments = arguments
        self._models: list[str] = arguments.models
        self._node = asked
        self._budget = budget
        self._extra = extra
        self._gpus_mib = gpus_mib
        self._told = False  #: whether the node said anything of a model

    def complete(self) -> Entry:
        """Return what --json prints."""
        if self._node is not None and self._budget is None:
            self.remarks.append("what the node has and who holds it is not shown: that needs an admin key (--key)")
        entries = self._named() if self._models else self._all()
        return {"node": None if self._node is None else self._node.url, "models": entries, "budget": self._budget}

    def where(self) -> str:
        """Return which memory the verdicts are about."""
        if self._node is not None:
            empty = self._budget is None and not self._told
            return "this machine as if it ran nothing" if empty else f"node {self._node.url}"
        if self._gpus_mib is not None:
            return "this machine as it is now, but with these GPUs, empty"
        return "this machine as it is now; no running node was asked"

    def _all(self) -> list[Entry]:
        if self._node is not None:
            return self._ask(self._node, None)
        return [*self._worked_out([], frozenset()).values()]

    def _named(self) -> list[Entry]:
        from mesh.api.fits import fit_entry
        from mesh.cli import fit_local as local

        files = frozenset(name for name in self._models if _is_file(name))
        here = [name for name in self._models if self._node is None or self._extra or name in files]
        found = self._worked_out(here, files) if here else {}
        if self._node is not None:
            for name in (name for name in dict.fromkeys(self._models) if name not in here):
                try:
                    found[name] = self._ask(self._node, name)[0]
                except CliError as error:
                    if error.http_status != 404:
                        raise
                    self._failed(name, error, error.fix)
        found |= {name: fit_entry(local.broken(name, error.message), {}) for name, error in self.errors.items()}
        return [found[name] for name in self._models]

    def _failed(self, name: str, error: MeshError, fix: str | None) -> None:
        """Keep *error* for the end: what is known of the other models is told first."""
        from mesh.cli.fit_local import directory

        known = error if isinstance(error, CliError) else CliError(error.message, fix=fix)
        self.errors[name] = directory(name) if os.path.isdir(name) else known

    def _ask(self, asked: node.Node, name: str | None) -> list[Entry]:
        entries = _fits_of(asked, name)
        self._told = True
        return entries

    def _worked_out(self, names: Sequence[str], files: frozenset[str]) -> dict[str, Entry]:
        """Return the entries of *names*, or of the whole cookbook if there are none."""
        # Late, so that no other command, and no answer of a node, pays for importing the engine.
        from mesh.api.fits import fit_entry
        from mesh.cli import fit_local as local

        loaded = self._loaded(only_files=bool(names) and files.issuperset(names))
        profiles = self._profiles(names, files, loaded) if names else {p.key: p for p in loaded.catalog.profiles}
        report = self._report(loaded)
        ours = self._gpus_mib is None and (self._node is None or self._node.is_here)
        footprints = local.footprints(
            [*profiles.values()], loaded.settings, report, our_engine=ours, vetted=bool(names)
        )
        running = local.names_of(report.holders)
        entries = {name: fit_entry(local.judge(p, footprints[p.key], report), running) for name, p in profiles.items()}
        if self._node is not None and self._budget is None:
            for entry in entries.values():
                entry["notes"].append("judged as if this machine ran nothing: what a node holds needs an admin key")
        return entries

    def _profiles(self, names: Sequence[str], files: frozenset[str], loaded: Loaded) -> dict[str, Profile]:
        from mesh.cli import fit_local as local

        profiles: dict[str, Profile] = {}
        for name in names:
            try:
                if name in files:
                    profiles[name] = local.file_profile(name, self._extra)
                else:
                    profiles[name] = local.named_profile(loaded.catalog, name, self._extra)
            except MeshError as error:
                self._failed(name, error, _known_names(loaded))
        return profiles

    def _loaded(self, *, only_files: bool) -> Loaded:
        """A mistake in a cookbook must not get in the way of a file."""
        return load_from(self._arguments, cookbook=NO_COOKBOOK if only_files else None)

    def _report(self, loaded: Loaded) -> MemoryReport:
        from mesh.api.budget import budget_entry
        from mesh.cli import fit_local as local

        if self._budget is not None:
            return local.report_of(self._budget)
        devices = local.these_devices()
        auto = loaded.settings.max_vram_mb == "auto"
        if self._gpus_mib is not None:
            devices = local.imagined_devices(self._gpus_mib, devices)
            self.remarks += [_counted(auto)] if self._gpus_mib else []
        elif auto and not devices.budgeted:
            self.remarks.append("max_vram_mb is auto, but no GPU can be read here: GPU memory is not limited")
        report = local.empty_node(local.budget_limits(loaded.settings, gpus=self._gpus_mib is None), devices)
        if self._node is None:
            self._budget = budget_entry(report)
        return report


def _node(arguments: argparse.Namespace) -> tuple[node.Node | None, Entry | None]:
    """Return the node to ask and its memory.

    Without a node if none was named and none runs, without its memory if our key is not an admin's.
    """
    try:
        asked = node.find(arguments)
    except CliError:  # port 0: nobody can know where it listens
        return None, None
    try:
        budget = asked.get("/admin/budget")
        if isinstance(budget, dict) and "memory" in budget:
            return asked, budget
        raise CliError(f"{asked.url} does not answer like a llama-mesh node", fix="Name the node with --url.")
    except CliError as error:
        if error.http_status == 403:
            return asked, None
        if node.is_named(arguments) or error.http_status == 401:
            raise
        return None, None


def _is_file(model: str) -> bool:
    """Whether *model* means a file, not a model of a cookbook, which may have slashes in its name, too."""
    return model.lower().endswith(".gguf") or os.path.isfile(model)


def _fits_of(asked: node.Node, name: str | None) -> list[Entry]:
    """Return what *asked* says of the model *name*, or of all."""
    query = "" if name is None else "?" + urlencode({"model": name})
    entries: list[Entry] = asked.get(f"/modelFits{query}")["models"]
    if name is not None and not entries:
        raise CliError(f"{asked.url} says nothing of '{name}'", fix="Try again: its cookbook may just be changing.")
    return entries


def _remark(entry: Entry, budget: Entry | None) -> None:
    """Note on *entry* what no budget forbids and will not work; the table has it as the verdict."""
    total_mib = lacking_ram_mib(entry, budget)
    if total_mib is not None:
        ram = entry["need_mib"]["ram"]
        remark = f"it needs {ram:,} MiB of main memory and the machine has {total_mib:,} MiB"
        entry["notes"] += [remark] if remark not in entry["notes"] else []


def _known_names(loaded: Loaded) -> str:
    """Return what else to try for a name that the cookbook of this machine does not have."""
    names = [profile.id for profile in loaded.catalog.profiles]
    if not names:
        return "There is no cookbook here that names models (--cookbook): give the path of a model file."
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"The cookbook of this machine has {shown}; or give the path of a model file."


def _counted(auto: bool) -> str:
    if auto:
        return f"of each of these GPUs {AUTO_VRAM_SHARE:.0%} is for models, as max_vram_mb: auto gives"
    return f"all of each of these GPUs is counted; max_vram_mb: auto would give models {AUTO_VRAM_SHARE:.0%}"


def _words(text: str | None) -> tuple[str, ...]:
    try:
        return tuple(split(text or ""))
    except ShellSyntaxError as error:
        raise CliError(f"--args: {error}", exit_code=USAGE) from error


def _sizes(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(mib for size in text.split(",") if (mib := parse_megabytes(size)))
    except ValueError as error:
        fix = "Write it like --gpus 24GB,24GB or --gpus 24576,16384 (MiB)."
        raise CliError(f"--gpus {text}: {error}", fix=fix, exit_code=USAGE) from error
