"""What a node tells of itself: what is loaded, what would fit, how fast it is, and nothing that is secret."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mesh import __version__
from mesh.api import cluster
from mesh.api.own_state import LEARN_EVERY_S, OwnState
from mesh.api.usage import Timings
from mesh.config.profile import Catalog, Profile
from mesh.core.lifecycle import State
from mesh.core.node_state import Fit, decode_state, encode_state
from mesh.core.resources import Resources
from mesh.engine.memory_report import Fit as Found
from mesh.engine.memory_report import ModelFit
from tests.api.exchanges import served
from tests.api.node import AUTH, SLASHED, SMOL, STARTED_AT, Node
from tests.fakes_supervisor import FakeFailure, FakeInstance


def own_state(node: Node, addresses: tuple[str, ...] = ("192.0.2.1:8080",)) -> OwnState:
    return OwnState(node.ctx, boot="b00t", addresses=lambda: addresses)


def busy_node(**settings: Any) -> Node:
    node = Node(**settings)
    node.supervisor.views = [
        FakeInstance("i-1", SMOL.key, "Smol", slots=4, busy=3),
        FakeInstance("i-2", SMOL.key, "Smol", slots=2, busy=2),
        FakeInstance("i-3", SMOL.key, "Smol", state=State.SPAWNING, slots=None),
        FakeInstance("i-4", SMOL.key, "Smol", state=State.DRAINING, busy=1),
        FakeInstance("i-5", SMOL.key, "Smol", stale=True, busy=1),
    ]
    node.supervisor.waiting = {SMOL.key: 5}
    node.supervisor.capacity = Resources.of(vram_mib=24000)
    node.supervisor.used = Resources.of(vram_mib=13000, ram_mib=5)
    node.ctx.metrics.current_requests = 10
    return node


def test_the_state_is_what_the_supervisor_says() -> None:
    node = busy_node(public_url="https://n.example")
    state = own_state(node).state()
    assert (state.node_id, state.version, state.engine_version) == ("node-a", __version__, "b123")
    assert (state.addresses, state.public_url, state.boot) == (("192.0.2.1:8080",), "https://n.example", "b00t")
    assert (state.started_at_unix, state.ready, state.draining, state.left) == (int(STARTED_AT), True, False, False)
    assert (state.current_requests, state.queue_length) == (10, 5)
    assert (state.capacity_mib, state.used_mib) == ({"vram": 24000}, {"vram": 13000, "ram": 5})
    smol, slashed = state.profiles
    assert (smol.key, smol.id, smol.aliases, smol.description) == (SMOL.key, "Smol", SMOL.aliases, "fast")
    assert (smol.ready, smol.loading, smol.slots, smol.busy, smol.queued) == (2, 1, 6, 5, 5)
    assert (slashed.ready, slashed.loading, slashed.slots, slashed.busy, slashed.queued) == (0, 0, 0, 0, 0)
    assert decode_state(encode_state(state)) == state


def test_an_instance_that_takes_any_number_has_no_slots() -> None:
    node = Node()
    node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol", slots=0, busy=9)]
    assert own_state(node).profile(SMOL).slots == 0
    assert own_state(node).profile(SMOL).busy == 9


@pytest.mark.parametrize(
    ("args", "kind"), [((), "text"), (("--embeddings",), "embedding"), (("--reranking",), "rerank")]
)
def test_the_kind_of_a_model(args: tuple[str, ...], kind: str) -> None:
    profile = replace(SMOL, args=args)
    assert own_state(Node(profile)).profile(profile).kind == kind


def test_no_key_path_or_command_line_is_told() -> None:
    """trap 101"""
    secret = Profile(
        key="s:default",
        id="s",
        model="s",
        profile="default",
        args=("--api-key", "s3cret"),
        model_path="/home/me/s3cret.gguf",
        env={"HF_TOKEN": "s3cret"},
        args_hash="h",
    )
    node = Node(secret, auth=AUTH, cluster={"noise": {"config_dir": "/s3cret"}})
    node.supervisor.views = [FakeInstance("i", "s:default", "s", command=("llama-server", "--api-key", "s3cret"))]
    record = encode_state(own_state(node).state())
    for word in (b"s3cret", b"user-key", b"admin-key", b"llama-server", b"/home"):
        assert word not in record


def test_a_long_description_is_cut() -> None:
    """A record travels to every node, again and again."""
    profile = replace(SMOL, description="x" * 5000)
    assert len(own_state(Node(profile)).profile(profile).description) == 200


def test_what_is_never_started_here_is_not_offered() -> None:
    assert [p.key for p in own_state(Node(SMOL, replace(SLASHED, max_instances=0))).state().profiles] == [SMOL.key]


@pytest.mark.parametrize(("draining", "drained"), [(True, False), (False, True)])
def test_draining_is_told_whoever_asked_for_it(draining: bool, drained: bool) -> None:
    node = Node()
    node.ctx.draining, node.ctx.drained = draining, drained
    assert own_state(node).state().draining


def test_a_node_without_an_engine_is_not_ready() -> None:
    assert not own_state(Node(engine_problem="Binary missing")).state().ready


# --- what others must know at once


def test_what_changes_the_shape_and_what_does_not() -> None:
    node = busy_node()
    own = own_state(node)
    before = own.shape()
    node.supervisor.used = Resources.of(vram_mib=13001)
    node.ctx.metrics.current_requests = 11
    assert own.shape() == before
    node.supervisor.views[0] = replace(node.supervisor.views[0], busy=4, active=4)
    assert own.shape() == before, "others wait, so it was full already"
    node.supervisor.waiting = {}
    assert (own.shape()[0], own.shape()[1] == before[1]) == (before[0], False)

    offered = own.shape()[0]
    node.ctx.drained = True
    assert own.shape()[0] != offered
    node.ctx.drained = False
    assert own.shape()[0] == offered
    node.supervisor.views.pop()
    assert own.shape()[0] != offered
    offered = own.shape()[0]
    node.supervisor.catalog = replace(node.supervisor.catalog, version=7)
    assert own.shape()[0] != offered


def test_the_order_of_instances_is_no_change() -> None:
    node = busy_node()
    own = own_state(node)
    before = own.shape()
    node.supervisor.views.reverse()
    assert own.shape() == before


# --- what would fit


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (Found.LOADED, Fit.NOW),
        (Found.NOW, Fit.NOW),
        (Found.AFTER_EVICTION, Fit.EVICT),
        (Found.WAITS, Fit.WAIT),
        (Found.NEVER, Fit.NEVER),
    ],
)
async def test_what_would_fit(found: Found, told: Fit) -> None:
    node = Node()
    node.supervisor.fits = (ModelFit(SMOL.key, "Smol", found),)
    own = own_state(node)
    assert own.profile(SMOL).fit == Fit.WAIT, "not looked yet"
    await own.look()
    assert own.profile(SMOL).fit == told


async def test_what_can_never_be_started() -> None:
    node = Node(SMOL, replace(SLASHED, max_instances=0))
    fits = (ModelFit(SMOL.key, "Smol", Found.NOW), ModelFit(SLASHED.key, SLASHED.id, Found.NOW))
    own = own_state(node)
    node.supervisor.fits = fits
    await own.look()
    assert (own.profile(SMOL).fit, own.profile(SLASHED).fit) == (Fit.NOW, Fit.NEVER)
    node.engine_problem = "Binary missing"
    await own.look()
    assert own.profile(SMOL).fit == Fit.NEVER
    node.engine_problem = None
    node.supervisor.fits = ()
    await own.look()
    assert own.profile(SMOL).fit == Fit.NEVER


async def test_what_failed_to_start_is_not_offered_until_it_may_be_tried_again() -> None:
    node = Node()
    node.supervisor.fits = (ModelFit(SMOL.key, "Smol", Found.NOW),)
    own = own_state(node)
    for retry_in_s, expected in ((4.5, Fit.NEVER), (None, Fit.NOW), (0.0, Fit.NOW)):
        node.supervisor.failed = {SMOL.key: FakeFailure("exited with 1", 1, retry_in_s, ())}
        await own.look()
        assert own.profile(SMOL).fit == expected


async def test_a_model_of_unknown_size_must_be_there_or_have_room_to_come(tmp_path: Path) -> None:
    """trap 64"""
    (tmp_path / "there.gguf").write_bytes(b"")
    profiles = [
        replace(SMOL, key="there:default", model_path=str(tmp_path / "there.gguf")),
        replace(SMOL, key="gone:default", model_path=str(tmp_path / "gone.gguf")),
        replace(SMOL, key="huge:default", hf_repo="org/huge", estimate=Resources.of(vram_mib=10**12)),
    ]
    node = Node(*profiles)
    node.supervisor.fits = tuple(ModelFit(p.key, p.id, Found.UNKNOWN) for p in profiles)
    own = own_state(node)
    await own.look()
    assert [own.profile(p).fit for p in profiles] == [Fit.NOW, Fit.NEVER, Fit.NEVER]


async def test_a_full_disk_takes_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """trap 64: also if nothing says how large the model is."""
    profile = replace(SMOL, hf_repo="org/some")
    node = Node(profile)
    node.supervisor.fits = (ModelFit(profile.key, profile.id, Found.UNKNOWN),)
    own = own_state(node)
    for least, expected in ((0, Fit.NOW), (10**12, Fit.NEVER)):
        monkeypatch.setattr("mesh.api.own_state.LEAST_FREE_MIB", least)
        await own.look()
        assert own.profile(profile).fit == expected


async def test_what_left_the_cookbook_is_forgotten() -> None:
    node = Node()
    node.supervisor.fits = (ModelFit(SMOL.key, "Smol", Found.NOW),)
    own = own_state(node)
    await own.look()
    node.supervisor.catalog = Catalog()
    await own.look()
    assert own._fits == {}


# --- what is learned


def test_a_load_is_timed_once() -> None:
    node = Node()
    own = own_state(node)
    view = FakeInstance("i-1", SMOL.key, "Smol", state=State.SPAWNING, ready_at_wall=None)
    node.supervisor.views = [view]
    own.time_loads(1.0)
    assert own.profile(SMOL).load_s is None
    node.supervisor.views = [replace(view, state=State.READY, started_at_wall=10.0, ready_at_wall=22.5)]
    own.time_loads(2.0)
    assert own.profile(SMOL).load_s == pytest.approx(12.5)
    weight = own.speed(SMOL.key).saved().load_s.weight
    own.time_loads(3.0)
    assert own.speed(SMOL.key).saved().load_s.weight == weight
    node.supervisor.views = []
    own.time_loads(4.0)
    assert own._timed == set()


def test_a_wall_clock_that_was_set_back_is_survived() -> None:
    node = Node()
    own = own_state(node)
    node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol", started_at_wall=10.0, ready_at_wall=5.0)]
    own.time_loads(1.0)
    assert 0 < (own.profile(SMOL).load_s or 0) < 1


def test_speed_is_learned_of_requests() -> None:
    """Waited until 101, first byte at 103, done at 113: 2 s for the prompt, 10 s for the answer, 12 s in its slot."""
    node = Node()
    own = own_state(node)
    own.finished(served(), 113.0, (1000, 101))
    learned = own.profile(SMOL)
    assert learned.prefill_tps == pytest.approx(500, rel=0.01)
    assert learned.decode_tps == pytest.approx(10, rel=0.02)
    assert learned.service_s == pytest.approx(12)
    assert own.profile(SLASHED).decode_tps is None


def test_what_llama_server_measured_is_believed_more() -> None:
    """It knows what came out of its cache, and does not count the network in."""
    own = own_state(Node())
    own.finished(served(told=Timings(prompt_tokens=300, prompt_s=0.5, generated=41, decode_s=2.0)), 113.0, (1000, 101))
    learned = own.profile(SMOL)
    assert learned.prefill_tps == pytest.approx(600, rel=0.01)
    assert learned.decode_tps == pytest.approx(20, rel=0.03)
    assert learned.service_s == pytest.approx(12)


def test_what_had_company_is_faster_alone() -> None:
    """Rates are told as of a request that is alone, so that to be popular is not to look slow."""
    rates = []
    for busy in (0, 3):
        node = Node()
        node.supervisor.views = [FakeInstance("i-1", SMOL.key, "Smol", busy=busy)]
        own = own_state(node)
        own.finished(served(), 113.0, (1000, 101))
        rates.append(own.profile(SMOL).decode_tps or 0.0)
    assert rates[1] > 1.5 * rates[0]


def test_what_is_not_learned_of() -> None:
    """Answers that nobody watched, and more of one profile than say anything new."""
    own = own_state(Node())
    own.finished(served(watched=False), 113.0, (1000, 101))
    assert own.profile(SMOL).service_s is None
    own.finished(served(), 113.0, (1000, 101))
    weight = own.speed(SMOL.key).saved().decode_tps.weight
    own.finished(served(), 113.0 + LEARN_EVERY_S / 2, (1000, 101))
    assert own.speed(SMOL.key).saved().decode_tps.weight == weight
    own.finished(served(), 113.0 + 2 * LEARN_EVERY_S, (1000, 101))
    assert own.speed(SMOL.key).saved().decode_tps.weight > weight


def test_an_answer_that_came_whole_has_no_first_byte() -> None:
    own = own_state(Node())
    own.finished(served(first_byte_at=None, admitted_at=100.0), 113.0, (1000, 101))
    learned = own.profile(SMOL)
    assert (learned.prefill_tps, learned.decode_tps) == (None, None)
    assert learned.service_s == pytest.approx(13)


def test_figures_are_rounded() -> None:
    """Else every record would differ from the last one, and be told to everybody."""
    own = own_state(Node())
    own.finished(served(), 113.123456, (1003, 97))
    learned = own.profile(SMOL)
    for figure in (learned.prefill_tps, learned.decode_tps, learned.service_s):
        assert figure == float(f"{figure:.3g}")


def test_what_an_instance_did_counts_from_its_own_admission() -> None:
    """Not what a request waited for before, or was with a peer that then refused it."""
    own = own_state(Node())
    own.finished(served(since=10.0), 113.0, (1000, 101))
    assert own.profile(SMOL).service_s == pytest.approx(12)


# --- from one process to the next


async def test_what_was_learned_outlives_the_process(tmp_path: Path) -> None:
    """A node that was restarted is not a stranger to its own speed."""
    path = tmp_path / "state" / "speeds.json"
    own = own_state(Node())
    own.finished(served(), 113.0, (1000, 101))
    await own.save(path)
    after = own_state(Node())
    after.restore(path, 5.0)
    assert after.profile(SMOL) == own.profile(SMOL)
    assert after.profile(SMOL).decode_tps is not None
    assert after.profile(SLASHED).decode_tps is None


async def test_only_what_is_new_is_written(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    own = own_state(Node())
    own.finished(served(), 113.0, (1000, 101))
    await own.save(path)
    path.unlink()
    await own.save(path)
    assert not path.exists()
    own.finished(served(), 114.0, (1000, 101))
    await own.save(path)
    assert path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"a": {"load_s": "x"}}',
        b"\xff\xfe",
        b'{"\xff": {}}',
        b'{"a": {"x": ' + b"[" * 100_000,
    ],
    ids=range(9),
)
def test_a_damaged_file_is_a_warning(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "speeds.json"
    path.write_bytes(content)
    own = own_state(Node())
    own.restore(path, 5.0)
    assert caplog.text.count("speeds are learned anew") == 1
    own.finished(served(), 113.0, (1000, 101))
    assert own.profile(SMOL).service_s == pytest.approx(12)


def test_there_is_no_file_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own_state(Node()).restore(tmp_path / "speeds.json", 5.0)
    assert caplog.text == ""


async def test_a_disk_that_takes_nothing_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    own = own_state(Node())
    own.finished(served(), 113.0, (1000, 101))
    for _ in range(3):
        await own.save(tmp_path / "file" / "speeds.json")
    assert caplog.text.count("speeds are kept in memory only") == 1
    await own.save(tmp_path / "speeds.json")
    assert (tmp_path / "speeds.json").exists(), "it tried again"


def test_a_trial_is_no_load_that_is_learned_from() -> None:
    node = Node()
    own = own_state(node)
    node.supervisor.views = [FakeInstance("i-1", "smol#canary", "Smol (canary)", hidden=True)]
    own.time_loads(1.0)
    assert own._speeds == {}


def test_a_trial_is_seen_by_operators_only() -> None:
    node = Node()
    node.supervisor.views = [
        FakeInstance("i-1", "smol#canary", "Smol (canary)", active=1, hidden=True),
        FakeInstance("i-2", SMOL.key, "Smol", active=2),
    ]
    told = cluster.own_state(node.ctx)
    assert (told["loaded_models"], told["active_instances"]) == (["Smol"], 2)
    assert node.ctx.gauges().active == {"Smol": 2}
