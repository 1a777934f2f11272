"""The functions under test, as they are or with a planted bug."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from mesh.core import draft, placement, replacing, scheduler, world
from mesh.core.world import Outlook, Plan, Recipe, Snapshot
from tests.core.mutants import Mutant
from tests.core.placement_rules import Placer
from tests.core.worlds import Planner

SOURCES = {
    "world.py": world,
    "placement.py": placement,
    "draft.py": draft,
    "replacing.py": replacing,
    "scheduler.py": scheduler,
}
#: What they import of each other, but for the types of values: the edited functions take and give the real ones.
SHARED = {
    "world.py": ("LIVE", "GOING"),
    "placement.py": ("place", "gpu_kinds"),
    "draft.py": ("Draft",),
    "replacing.py": ("finish_replacements", "replace_next"),
}


@dataclass(frozen=True)
class Subject:
    """The functions under test, edited or not."""

    plan: Planner = scheduler.plan
    next_wakeup: Callable[[Snapshot], float | None] = scheduler.next_wakeup
    outlook: Callable[[Snapshot, Recipe], Outlook] = scheduler.outlook
    placer: Placer = field(default_factory=Placer)


def broken(mutant: Mutant) -> Subject:
    """Return the functions with *mutant*'s edit."""
    edited = {file: _module(file, mutant) for file in SOURCES}
    mind = edited["scheduler.py"]
    for source, names in SHARED.items():
        for file, user in edited.items():  # its imports are of the real ones
            for name in names if file != source else ():
                if name in vars(user):
                    setattr(user, name, vars(edited[source])[name])

    def seen(snapshot: Snapshot) -> Any:
        """With the edited properties."""
        return edited["world.py"].Snapshot(**{f.name: getattr(snapshot, f.name) for f in fields(snapshot)})

    def plan(snapshot: Snapshot) -> Plan:
        return mind.plan(seen(snapshot))  # type: ignore[no-any-return]

    where = edited["placement.py"]
    placer = Placer(where.place, where.again, where.shares)
    return Subject(plan, mind.next_wakeup, lambda snapshot, recipe: mind.outlook(seen(snapshot), recipe), placer)


def _module(file: str, mutant: Mutant) -> ModuleType:
    source = inspect.getsource(SOURCES[file])
    if mutant.file == file:
        assert source.count(mutant.old) == 1, f"the planted bug no longer applies: {mutant.old}"
        source = source.replace(mutant.old, mutant.new)
    name = f"mutant_{file.removesuffix('.py')}"
    spec = importlib.util.spec_from_loader(name, loader=None)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    exec(compile(source, name, "exec"), module.__dict__)  # the point of it
    return module
