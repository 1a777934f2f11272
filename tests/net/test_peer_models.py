"""Which model a name means, however many nodes have it, and until when it is known."""

from __future__ import annotations

from math import inf

import pytest

from mesh.config.profile import Profile
from mesh.core.node_state import ProfileState
from mesh.net.peer_models import Models, model_of
from mesh.net.peers import stand_in
from tests.members import profile

QWEN = model_of(profile())


@pytest.fixture
def models() -> Models:
    return Models(lambda state: stand_in(state, max_wait_s=None, max_request_s=None, max_queue=0))


def key_of_name(models: Models, name: str) -> str | None:
    found = models.find(name)
    return None if found is None else found.key


def test_figures_make_no_other_model() -> None:
    assert model_of(profile(ready=2, busy=3, decode_tps=9.0, max_queue=7)) == QWEN
    for other in (profile(id="x"), profile(aliases=("x",)), profile(kind="rerank"), profile(description="x")):
        assert model_of(other) != QWEN


def test_it_is_known_while_anybody_has_it(models: Models) -> None:
    for alive in (True, True, False):
        models.add(QWEN, alive=alive)
    for alive in (True, False, True):
        assert key_of_name(models, "QWEN") == "qwen:default"
        models.remove(QWEN, alive=alive)
    assert key_of_name(models, "qwen") is None
    assert (len(models), models._names) == (0, {})


@pytest.mark.parametrize("order", [1, -1])
def test_what_wins(models: Models, order: int) -> None:
    """trap 80: not who came first, so that all nodes mean the same."""
    by_key, by_id = profile("a:b"), profile("m:default", id="a:b")
    by_alias, other = profile("n:default", aliases=("a:b", "m")), profile("o:default", aliases=("A:B", "M"))
    for model in [by_key, by_id, by_alias, other][::order]:
        models.add(model_of(model), alive=model is not by_key)
    assert key_of_name(models, "a:B") == "a:b", "though it is dead"
    assert (key_of_name(models, "m:default"), key_of_name(models, "m")) == ("m:default", "o:default")
    models.remove(model_of(by_key), alive=False)
    assert key_of_name(models, "a:b") == "m:default"
    models.remove(model_of(by_id), alive=True)
    assert key_of_name(models, "a:b") == "o:default"


def test_of_two_of_a_kind_the_one_that_lives_is_meant(models: Models) -> None:
    first, last = model_of(profile("z:default", aliases=("x",))), model_of(profile("a:default", aliases=("x",)))
    models.remember(first, 10.0)
    assert key_of_name(models, "x") == "z:default"
    models.add(last, alive=False)
    assert key_of_name(models, "x") == "a:default"
    models.add(first, alive=True)
    assert key_of_name(models, "x") == "z:default"


def test_a_name_of_several_kinds_is_dropped_once(models: Models) -> None:
    model = model_of(profile("qwen:default", id="qwen:default", aliases=("QWEN:default", "q", "Q")))
    models.add(model, alive=True)
    assert key_of_name(models, "q") == "qwen:default"
    models.remove(model, alive=True)
    assert models._names == {}


def test_it_is_remembered_until_its_time(models: Models) -> None:
    other = model_of(profile("phi:default"))
    assert models.forgets_at == inf
    models.remember(QWEN, 10.0)
    models.remember(other, 20.0)
    models.remember(QWEN, 30.0)
    assert models.forgets_at == 20.0
    assert not models.forget(19.9)
    assert models.forget(20.0)
    assert (key_of_name(models, "phi"), key_of_name(models, "qwen")) == (None, "qwen:default")
    models.add(QWEN, alive=True)
    assert not models.forget(30.0), "somebody has it"
    assert key_of_name(models, "qwen") == "qwen:default"


def test_a_stand_in_is_made_once() -> None:
    made: list[ProfileState] = []

    def counted(state: ProfileState) -> Profile:
        made.append(state)
        return stand_in(state, max_wait_s=None, max_request_s=None, max_queue=0)

    models = Models(counted)
    models.add(QWEN, alive=True)
    found = models.find("qwen")
    models.add(model_of(profile(busy=1)), alive=True)
    models.remove(QWEN, alive=True)
    assert models.find("qwen:default") is found
    assert made == [QWEN]
