"""The worked case: a box with four unequal GPUs and ten models. What goes where and who goes for whom, by hand.

Sizes are in GiB and include half a GiB for the driver's context on each GPU; "giant" and "big" may be divided, at the
price of a layer more on each. All is idle between the steps unless one says otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from mesh.core.lifecycle import State
from mesh.core.placement import Need, gpu_kinds
from mesh.core.resources import Resources
from mesh.core.scheduler import outlook, plan
from mesh.core.world import Drain, Recipe, Refusal, Refuse, Snapshot, Spawn
from tests.core.simulation import Simulation, apply, arrived, ended, gone, loaded
from tests.core.worlds import Planner

GIB = 1024
BOX = Resources({"gpu0": 80 * GIB, "gpu1": 48 * GIB, "gpu2": 24 * GIB, "gpu3": 12 * GIB})


def model(key: str, gib: float, layer_gib: float = 0.5, **more: object) -> Recipe:
    need = Need(split_mib=int(gib * GIB), each_mib=GIB // 2, grain_mib=int(layer_gib * GIB))
    for name in ("gpus", "single"):
        if name in more:
            need = replace(need, **{name: more.pop(name)})  # type: ignore[arg-type]
    return replace(Recipe(key, need, idle_timeout_s=0.0), **more)  # type: ignore[arg-type]


MODELS = {
    r.key: r
    for r in (
        model("keep", 9, pinned=True),
        model("tiny", 1),
        model("small", 8),
        model("draw", 10, gpus=("gpu1",)),  # `devices`
        model("coder", 14),
        model("chat", 20),
        model("vision", 30),
        model("mono", 40, single=True),  # -sm none
        model("big", 100, layer_gib=1),
        model("giant", 140, layer_gib=2),  # more than the two largest GPUs have
    )
}


class Box:
    """The machine: a request is asked, and what had to happen for it is told in words."""

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self.world = Snapshot(1000.0, BOX, MODELS, [], [])

    def ask(self, key: str) -> list[str]:
        """One request for *key*, from its arrival to its end; return who stopped and who started for it."""
        self.world = arrived(self.world, key, slotted=1)
        told: list[str] = []
        while any(d.key == key for d in self.world.demands):
            before = self.world
            told += self.step()
            if not self.progress() and self.world.demands == before.demands:
                return [*told, f"{key} waits"]
        self.finish(key)
        return told

    def step(self) -> list[str]:
        """Carry out one plan and let a second pass; return what was decided, but for the admissions."""
        result = self.planner(self.world)
        by_id = {i.id: i.key for i in self.world.instances}
        told = []
        for d in result.decisions:
            match d:
                case Drain(instance=id_):
                    told.append(f"stop {by_id[id_]}")
                case Spawn(key=key, footprint=footprint):
                    told.append(f"start {key} on {on(footprint)}")
                case Refuse(key=key, refusal=refusal):
                    told.append(f"refuse {key}: {refusal}")
        self.world = replace(apply(self.world, result), now=self.world.now + 1.0)
        return told

    def progress(self) -> bool:
        """Let processes exit and loads finish; return whether there was any."""
        before = self.world
        for i in before.instances:
            if i.state is State.STOPPING:
                self.world = gone(self.world, i.id)
            elif i.state is State.SPAWNING:
                self.world = loaded(self.world, i.id)
        return self.world is not before

    def finish(self, key: str) -> None:
        for i in self.world.instances:
            if i.key == key and i.active:
                self.world = ended(self.world, i.id)

    def foreign(self, **gib: int) -> None:
        self.world = replace(self.world, foreign=Resources({kind: n * GIB for kind, n in gib.items()}))


def on(footprint: Resources) -> str:
    """E.g. "gpu3", or "gpu0 37903 + gpu1 46037" if there are several."""
    kinds = gpu_kinds(footprint)
    return kinds[0] if len(kinds) == 1 else " + ".join(f"{kind} {footprint.mib[kind]}" for kind in kinds)


def loaded_box(planner: Planner) -> Box:
    """Eight models, each where the least room is left over. Free after each, on gpu0, gpu1, gpu2, gpu3:"""
    box = Box(planner)
    assert box.ask("keep") == ["start keep on gpu3"]  # 80, 48, 24, 2.5
    assert box.ask("tiny") == ["start tiny on gpu3"]  # 80, 48, 24, 1
    assert box.ask("small") == ["start small on gpu2"]  # 80, 48, 15.5, 1
    assert box.ask("draw") == ["start draw on gpu1"]  # 80, 37.5, 15.5, 1: it may not go elsewhere
    assert box.ask("coder") == ["start coder on gpu2"]  # 80, 37.5, 1, 1
    assert box.ask("chat") == ["start chat on gpu1"]  # 80, 17, 1, 1
    assert box.ask("vision") == ["start vision on gpu0"]  # 49.5, 17, 1, 1
    assert box.ask("mono") == ["start mono on gpu0"]  # 9, 17, 1, 1
    return box


def giant_box(planner: Planner) -> Box:
    box = loaded_box(planner)
    box.ask("big")
    box.ask("giant")
    return box


def test_each_goes_where_the_least_room_is_left_over(planner: Planner) -> None:
    box = loaded_box(planner)
    for key in MODELS:
        if key not in ("big", "giant"):
            assert box.ask(key) == []  # all are warm


def test_the_big_one_takes_three_gpus_rather_than_one_more_victim(planner: Planner) -> None:
    """The least recently used go until 100 GiB fit: "tiny" would be a spare victim, "mono" was used last.

    Then there are 39.5, 48 and 24 GiB; less a context and a layer on each, 38 + 46.5 + 22.5 = 107.
    """
    box = loaded_box(planner)
    started = "start big on gpu0 37903 + gpu1 46037 + gpu2 23068"
    assert box.ask("big") == ["stop small", "stop draw", "stop coder", "stop chat", "stop vision", started]
    assert {i.key for i in box.world.instances} == {"keep", "tiny", "mono", "big"}


def test_the_giant_one_needs_three_gpus_and_the_pinned_one_stays(planner: Planner) -> None:
    """77.5 + 45.5 GiB of the two largest are too few; with 21.5 of the third they are 144.5."""
    box = loaded_box(planner)
    box.ask("big")
    assert box.ask("giant") == ["stop mono", "stop big", "start giant on gpu0 79449 + gpu1 47701 + gpu2 23890"]
    assert {i.key for i in box.world.instances} == {"keep", "tiny", "giant"}
    assert box.ask("tiny") == []


def test_a_busy_giant_serves_its_tenure_and_is_held_then(planner: Planner) -> None:
    box = giant_box(planner)
    giant = next(i.id for i in box.world.instances if i.key == "giant")
    box.world = arrived(box.world, "giant", slotted=1)
    assert box.step() == []
    box.world = arrived(arrived(box.world, "small", slotted=1), "coder", slotted=1)
    assert box.step() == []  # busy, and just loaded: nobody goes, "tiny" would not do
    assert not box.planner(box.world).held
    box.world = replace(box.world, now=box.world.now + 15)
    assert box.planner(box.world).held == {giant}
    assert box.ask("tiny") == []  # warm requests flow meanwhile
    box.finish("giant")
    assert box.step() == ["stop giant"]
    assert box.step() == []  # its memory is not back before it has exited
    box.progress()
    assert box.step() == ["start coder on gpu2", "start small on gpu2"]  # by name: they came at once


def test_what_others_use_is_not_there_and_not_evictable(planner: Planner) -> None:
    box = Box(planner)
    box.foreign(gpu0=70)
    assert box.ask("keep") == ["start keep on gpu0"]  # 0.5 GiB is left on gpu0, the least
    assert box.ask("vision") == ["start vision on gpu1"]
    assert box.ask("mono") == ["stop vision", "start mono on gpu1"]  # no other has 40.5 GiB to itself
    assert box.ask("giant") == ["giant waits"]  # not for ever: it would fit if the others stopped
    box.foreign()
    assert box.step() == ["stop mono"]


def test_devices_are_kept_though_others_have_room(planner: Planner) -> None:
    box = Box(planner)
    box.foreign(gpu0=70)
    assert box.ask("mono") == ["start mono on gpu1"]
    assert box.ask("draw") == ["stop mono", "start draw on gpu1"]


def test_what_is_larger_than_all_four_is_refused(planner: Planner) -> None:
    """164 GiB less a context and a layer on each are 162; and no single GPU has 80 GiB and a context."""
    box = Box(planner)
    models = {"all": model("all", 160), "more": model("more", 161), "one": model("one", 80, single=True)}
    box.world = replace(box.world, recipes=models)
    assert box.ask("more") == [f"refuse more: {Refusal.TOO_LARGE}"]
    assert box.ask("one") == [f"refuse one: {Refusal.TOO_LARGE}"]
    assert box.ask("all")[0].startswith("start all on gpu0")


def test_the_outlook_tells_what_asking_would_do() -> None:
    box = loaded_box(plan)
    looked = outlook(box.world, MODELS["big"])
    by_id = {i.id: i.key for i in box.world.instances}
    assert looked.placement is not None
    assert on(looked.placement) == "gpu0 37903 + gpu1 46037 + gpu2 23068"
    assert [by_id[id_] for id_ in looked.victims] == ["small", "draw", "coder", "chat", "vision"]
    assert not looked.waits


def test_in_every_order_of_arrival_all_are_served(planner: Planner) -> None:
    for order in permutations(("keep", "draw", "mono", "big", "giant")):
        world = Snapshot(1000.0, BOX, MODELS, [], [])
        for n, key in enumerate(order):
            world = arrived(replace(world, now=1000.0 + n), key, slotted=2)
        simulation = Simulation(world, planner)
        simulation.run(1000)
        assert simulation.world.demands == []
        assert simulation.swaps == len(order)  # none twice
