"""Planted bugs, as data: what is edited where, and what that breaks.

A test that cannot fail proves nothing. ``test_mutants.py`` demands that each of these is caught by something, and
``make mutants`` shows by what. Each ``old`` occurs exactly once in its file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    file: str
    old: str
    new: str
    breaks: str


def _in(file: str, *edits: tuple[str, str, str]) -> tuple[Mutant, ...]:
    return tuple(Mutant(file, old, new, breaks) for breaks, old, new in edits)


_MEMORY = _in(
    "draft.py",
    (
        "what stops is not counted",
        "owned = [i for i in self.world.instances if i.state is not State.STOPPED]",
        "owned = [i for i in self.world.instances if i.state in LIVE]",
    ),
    (
        "a start does not wait for the exit",
        "spot = spot or self.room(need, self.now, self.soon, self.future)",
        "spot = spot or self.room(need, self.soon, self.future)",
    ),
    (
        "what another waits for is given away",
        "spot = spot or self.room(need, self.now, self.soon, self.future)",
        "spot = spot or self.room(need, self.now, self.future)",
    ),
    ("a start is not charged", "        self.now = self.now + spot\n", ""),
    ("foreign use is ignored", "self.ceiling = self.world.ceiling", "self.ceiling = self.world.capacity"),
    (
        "foreign use makes a model impossible",
        "place(recipe.need, self.world.capacity)",
        "place(recipe.need, self.world.ceiling)",
    ),
    (
        "a busy victim's memory is soon free",
        "            if not self.in_use(i):\n                self.soon = self.soon",
        "            if True:\n                self.soon = self.soon",
    ),
    (
        "a draining busy one's memory is soon free",
        "ending = [i for i in going if i.state is State.STOPPING or not i.active]",
        "ending = going",
    ),
    (
        "what drains is not foreseen",
        "self.future = self.now - total(i.footprint for i in going)",
        "self.future = self.soon",
    ),
    (
        "memory on its way is given away twice",
        "            self.reserve(spot, soon=True)  # memory",
        "            pass  # memory",
    ),
    (
        "the victims' memory is not kept for the competitor",
        "self.drain(victims, Reason.ROOM, competitor=key)\n            self.reserve(spot, soon=True)",
        "self.drain(victims, Reason.ROOM, competitor=key)",
    ),
    ("a big waiter reserves nothing", "in victims)\n            self.reserve(spot, soon=False)", "in victims)"),
    ("whoever was cleared away comes straight back", "                self.wait(cleared)\n", ""),
    ("it starts on an old figure", "if self.world.recipes[key].fresh:", "if True:"),
    (
        "nothing is reserved of the untouchable",
        "chosen = chosen or self.choose(need, self.others(key), self.future)",
        "chosen = None",
    ),
    ("two count on the same instance", " and i.id not in self.promised)", ")"),
    (
        "scaling out takes reserved memory",
        "self.room(recipe.need, self.now, self.soon, self.future)",
        "self.room(recipe.need, self.now)",
    ),
)

_VICTIMS = _in(
    "draft.py",
    (
        "a busy victim",
        "if i.state is State.READY and not i.active]\n        mine",
        "if i.state is State.READY]\n        mine",
    ),
    (
        "a wanted victim",
        "mine = [i for i in idle if i.key not in self.waiting or (turns_end and self.had_turn(i))]",
        "mine = idle",
    ),
    ("a just loaded victim", "replaceable and not i.fresh and", "replaceable and"),
    ("a victim that could not be started again", "return replaceable and not", "return not"),
    ("a pinned victim", "i.state in LIVE and not i.pinned)\n        usable", "i.state in LIVE)\n        usable"),
    (
        "a hold before the tenure is over",
        "if i.state is State.READY and i.active and self.had_turn(i)]",
        "if i.state is State.READY and i.active]",
    ),
    ("spare victims go too", "if (there := self.room(need, *with_it)) is not None:", "if (there := None) is not None:"),
    ("not the least recently used", "sorted(mine, key=lambda i: (i.idle_since, i.id))", "mine"),
    ("nobody is held", "            self.held.update(i.id for i in chosen[0])", "            pass"),
    ("others go for arguments nobody looked at", "elif not recipe.vetted:", "elif False:"),
    (
        "looked over again and again",
        "self.decisions += [] if recipe.vetting else [Vet(key)]",
        "self.decisions += [Vet(key)]",
    ),
    (
        "looked over for nothing",
        "elif not recipe.vetted:\n            self.decisions += [] if recipe.vetting else [Vet(key)]\n",
        "elif False:\n            pass\n",
    ),
    (
        "a load that ran out of memory waits for ever",
        "        return any(kinds & i.footprint.mib.keys() for i in ending)",
        "        return True",
    ),
    (
        "its retry does not wait for the exits",
        "        return any(kinds & i.footprint.mib.keys() for i in ending)",
        "        return False",
    ),
    ("its retry clears nothing", "        self.drain(near, Reason.ROOM, competitor=key)\n", ""),
    (
        "its retry goes elsewhere",
        "return replace(need, gpus=kinds, all_gpus=True) if kinds and allowed else need",
        "return need",
    ),
    (
        "others go for a retry that has no room",
        "if self.room(cleared, self.pinned()) is not None and self.clear(",
        "if self.clear(",
    ),
)

_SERVICE = _in(
    "draft.py",
    ("one beyond the slots", "if n < limit[id_]]", "if n <= limit[id_]]"),
    ("many beyond the slots", "if n + 1 < limit[id_]:", "if n < limit[id_]:"),
    ("a held one is admitted to", "and i.id not in self.held]\n        if not open_", "]\n        if not open_"),
    ("requests without a slot are forgotten", "demand.free if i is free_to else 0", "0"),
    ("an outdated load goes on", "if i.state in LIVE and i.stale:", "if i.state is State.READY and i.stale:"),
    ("two loads of one model at once", "any(i.state is State.SPAWNING for i in mine)", "False"),
    ("one above max_instances", "len(mine) >= recipe.max_instances", "len(mine) > recipe.max_instances"),
    ("a failing one is scaled out", "if recipe.failing or len(mine)", "if len(mine)"),
    (
        "the impossible waits",
        "if recipe.need is not None and place(recipe.need, self.world.capacity) is None:",
        "if False:",
    ),
    ("the unknown size is refused", "if recipe.need is not None and place(", "if recipe.need is None or place("),
    ("a wanted one idles out", "if i.active or i.key in self.waiting or recipe.pinned", "if i.active or recipe.pinned"),
)

_ORDER = _in(
    "scheduler.py",
    ("an idle one is forgotten when its queue empties", "    draft.retire()  # those", "    pass  # those"),
    ("whoever had to go comes back first", "return max(demand.since, ended), ended", "return demand.since, ended"),
    ("at a tie, too", "ended >= demand.since, demand.key", "ended < demand.since, demand.key"),
    ("not the oldest first", "key=lambda d: turn(world, d)", "key=lambda d: d.key"),
    ("whoever lost its instance is forgotten", "while starved := [d", "if starved := [d"),
    (
        "nobody wakes at the end of a tenure",
        "        if waiting:\n            moments",
        "        if False:\n            moments",
    ),
    ("it wakes at once, for ever", "if m > world.now)", "if m >= world.now)"),
    (
        "the outlook names busy ones as if they could go",
        "(True, others), (True, others + pinned)",
        "(False, others), (True, others + pinned)",
    ),
)

_REPLACING = _in(
    "replacing.py",
    (
        "all engines are replaced at once",
        "if still_to_come(draft.world.replacing, draft.world.instances, waiting) or _under_way(draft):",
        "if False:",
    ),
    (
        "the next one begins while a successor loads beside",
        "any(_has_successor(draft, key) for key in {i.key for i in old if i.state in LIVE})",
        "False",
    ),
    (
        "the next one begins while an old one drains",
        "if any(i.state in GOING or i.id in draft.leaving for i in old):",
        "if False:",
    ),
    (
        "the next one begins before a successor is ready",
        "if still_to_come(draft.world.replacing, draft.world.instances, waiting) or _under_way(draft):",
        "if _under_way(draft):",
    ),
    ("an engine is replaced while somebody starves", "if not starved and _make_room", "if _make_room"),
    ("a successor beside too many", " and len(draft.live(recipe.key)) <= recipe.max_instances", ""),
    ("the old one stays", "max(0, len(ready) - len(old) - leaving)", "0"),
    ("the last old ones go as soon as one successor serves", "len(ready) - len(old) - leaving)", "len(ready))"),
    ("whoever leaves already has no part in it", "len(ready) - len(old) - leaving)", "len(ready) - len(old))"),
    (
        "the old one goes while its successor loads",
        "ready = [i for i in draft.live(key) if i.state is State.READY]",
        "ready = draft.live(key)",
    ),
    (
        "an old one that loads goes too",
        "old = sorted((i for i in ready if i.superseded)",
        "old = sorted((i for i in draft.live(key) if i.superseded)",
    ),
    ("one that fails again and again is loaded again and again", " and not recipe.doubtful", ""),
    ("nobody is told that there is no room", "        draft.cramped.add(recipe.key)\n", ""),
    ("nobody goes if both would fit", "going = chosen[0] or old[:1]", "going = chosen[0]"),
    ("the last of several is not waited for", "draft.drain(going[-1:], Reason", "draft.drain(going[:1], Reason"),
    ("all go when one is enough", "going = chosen[0] or old[:1]", "going = old"),
    ("it goes for arguments nobody looked at", "if recipe.vetted:", "if True:"),
    ("it is looked over again and again", "elif not recipe.vetting:", "else:"),
    ("a failing successor is tried", " and draft.obstacle(recipe) is None:", ":"),
    ("it goes on an old figure", "recipe.fresh and ", ""),
    ("a load that ran out of memory is tried again and again", " and recipe.ran_out is None", ""),
    ("two loads of a replaced model at once", "if ready and not loading and", "if ready and"),
    ("the successor is not waited for", "competitor=recipe.key if alone else None", "competitor=None"),
    ("it is waited for though others serve", "competitor=recipe.key if alone else None", "competitor=recipe.key"),
    ("busy models are replaced first", "(draft.in_use(turn[1][-1]), turn", "(not draft.in_use(turn[1][-1]), turn"),
    ("busy instances are replaced first", "draft.in_use(i), i.idle", "not draft.in_use(i), i.idle"),
) + _in(
    "draft.py",
    (
        "two copies that do not fit",
        "self.room(enlarged, self.now, self.soon, self.future)",
        "self.room(enlarged, self.soon, self.future)",
    ),
    (
        "a successor takes what another waits for",
        "self.room(enlarged, self.now, self.soon, self.future)",
        "self.room(enlarged, self.now)",
    ),
    ("what the old one takes is not looked at", "reduce(at_least, (i.footprint for i in old), need)", "need"),
    ("two copies of an unknown size", "None if recipe.guessed else self.room(enlarged", "self.room(enlarged"),
    ("two copies in more RAM than there is", "spot.mib.get(RAM, 0) <= self.spare_ram_mib()", "True"),
    ("what loads has all of its RAM", "self.world.spare_ram_mib - max(", "self.world.spare_ram_mib or max("),
    ("others go while the old one drains", "self.beside(recipe, need, old) is None and self.wait(need)", "False"),
    ("a successor does not wait for the exit", " or self.awaits_exit(recipe, need):", ":"),
    ("its room is not kept", "    self.reserve(spot, soon=False)\n        return", "    pass\n        return"),
    ("others go for what nobody asked for", "if not demand.attended:", "if False:"),
    ("a lost successor is waited for for ever", "            self.decisions.append(Forgo(key))", "            pass"),
    ("a successor that could come is given up", "elif not self.wait(need):", "else:"),
    ("a guest keeps others from work", "elif not recipe.yielding:", "else:"),
    ("one that was just admitted to counts as idle", "i.active > 0 or i.id in self.admitting", "i.active > 0"),
) + _in(
    "scheduler.py",
    ("no engine is replaced", "    replace_next(draft, demands)\n", ""),
    ("no replacement is finished", "    finish_replacements(draft)\n", ""),
)  # fmt: skip

_PLACEMENT = _in(
    "placement.py",
    ("worst fit", "key=lambda s: (_sum(spare, s), s))", "key=lambda s: (-_sum(spare, s), s))"),
    ("the grain is ignored", "need.each_mib + (need.grain_mib if gpus > 1 else 0)", "need.each_mib"),
    (
        "the context is paid once",
        "need.each_mib + (need.grain_mib if gpus > 1 else 0)",
        "need.each_mib if gpus == 1 else need.grain_mib",
    ),
    ("only one view is looked at", "taken = highest(used)", "taken = highest(used[:1])"),
    ("the last view wins", "max(result.get(kind, mib), mib)", "mib"),
    (
        "the limits are not checked",
        "placed is not None and placed.fits(capacity, taken) else None",
        "placed is not None else None",
    ),
    ("the indivisible is divided", "(1 if need.single else len(room))", "len(room)"),
    (
        "the most GPUs instead of the fewest",
        "range(1, (1 if need.single else len(room)) + 1)",
        "range(1 if need.single else len(room), 0, -1)",
    ),
    ("devices are ignored", "allowed = kinds if need.gpus is None else [", "allowed = kinds if True else ["),
    (
        "a lost GPU is passed over",
        "None if need.gpus is not None and len(allowed) < len(set(need.gpus)) else allowed",
        "allowed",
    ),
    ("proportions are ignored", "need.proportions if len(need.proportions) == len(chosen) else by_room", "by_room"),
    ("a MiB is lost", "(result[i] - weights[i], i))[:left]", "(result[i] - weights[i], i))[:0]"),
    ("the odd MiB goes where it is full", "(result[i] - weights[i], i))[:left]", "(weights[i] - result[i], i))[:left]"),
    (
        "charged anew, it is divided otherwise",
        "max(0, placed.mib[kind] - _extra(need, len(kinds)))",
        "placed.mib[kind]",
    ),
    ("the sum of all GPUs is not charged", "Resources({**amounts, VRAM: sum(amounts.values())})", "Resources(amounts)"),
    ("the pool forgets the context", "Resources({VRAM: need.gpu_mib}) if", "Resources({VRAM: need.split_mib}) if"),
)

_WORLD = _in(
    "world.py",
    ("foreign use is not taken off", "mib - self.foreign.mib.get(kind, 0)", "mib"),
    ("foreign use is added", "mib - self.foreign.mib.get(kind, 0)", "mib + self.foreign.mib.get(kind, 0)"),
    (
        "no limit where nobody else is",
        "in self.capacity.mib.items()})",
        "in self.capacity.mib.items() if kind in self.foreign.mib})",
    ),
    ("what loads does not live", "frozenset({State.SPAWNING, State.READY})", "frozenset({State.READY})"),
)

MUTANTS = (*_MEMORY, *_VICTIMS, *_SERVICE, *_ORDER, *_REPLACING, *_PLACEMENT, *_WORLD)
