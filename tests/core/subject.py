"""The functions under test, as they are or with a planted bug."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import ModuleType
from typing import Any

from mesh.core import placement, scheduler, world
from mesh.core.world import Outlook, Plan, Recipe, Snapshot
from tests.core.mutants import Mutant
from tests.core.placement_rules import Placer
from tests.core.worlds import Planner

SOURCES = {"scheduler.py": scheduler, "placement.py": placement, "world.py": world}


@dataclass(frozen=True)
class Subject:
    """The functions under test, edited or not."""

    plan: Planner = scheduler.plan
    next_wakeup: Callable[[Snapshot], float | None] = scheduler.next_wakeup
    outlook: Callable[[Snapshot, Recipe], Outlook] = scheduler.outlook
    placer: Placer = field(default_factory=Placer)


def broken(mutant: Mutant) -> Subject:
    """Return the functions with *mutant*'s edit. They take and give the real types."""
    edited = {file: _module(file, mutant) for file in SOURCES}
    mind = edited["scheduler.py"]
    for file in ("placement.py", "world.py"):  # its imports are of the real ones
        for name, value in vars(edited[file]).items():
            if name in vars(mind) and not name.startswith("__") and not isinstance(value, type):
                setattr(mind, name, value)

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
