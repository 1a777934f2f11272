"""Main memory end to end: what is said before a load, what is learned after it, and what is refused, with real servers.

GPU memory is in ``test_memory_gpus``; that the estimate is exact for every kind of model is in
``test_estimate_accuracy``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import estimate_accuracy, synthetic_models
from tests.e2e.conftest import StartNode
from tests.e2e.harness import TINY_ARGS, Models, Node, cookbook, eventually, profile
from tests.e2e.memory import fits, holder, wait_learned

#: A prompt cache is charged as if it were full, so it makes a tiny model as large as a test needs it to be.
CACHE_MIB = 300
SIZED_ARGS = f"-t 1 -tb 1 -c 32768 -np 1 --no-warmup -cram {CACHE_MIB}"
#: Room for one such model, estimated or learned, and never for two.
ROOM_FOR_ONE_MIB = 500
#: What is refused on sight may take this long, on a machine that is busy with other tests.
AT_ONCE_S = 2.0
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 20000}


def truncated(model: Path, directory: Path) -> Path:
    """Return a copy of *model* as an interrupted download leaves it."""
    copy = directory / "truncated.gguf"
    content = model.read_bytes()
    copy.write_bytes(content[: len(content) // 2])
    return copy


# -- the acceptance tests of the estimate


class TestFit:
    def test_it_says_what_the_server_logs(self, smollm2: Path, start_node: StartNode) -> None:
        """And eight bits for each cached value make 17/32 of sixteen (trap 45)."""
        node = start_node(cookbook({}))
        sizes = {}
        for arguments in ("-c 8192 -np 2", "-c 8192 -np 2 -ctk q8_0 -ctv q8_0"):
            told = node.cli_json("fit", str(smollm2), "--args", arguments)
            logged = estimate_accuracy.logged(smollm2, arguments)
            sizes[arguments] = told["kv"]["gpu"] + told["kv"]["cpu"]
            assert sizes[arguments] == pytest.approx(logged.kv, abs=0.01)
            assert told["weights"]["cpu"] == pytest.approx(logged.weights, abs=0.01)
            assert (told["context"], told["slots"]) == (logged.context, logged.slots)
        plain, quantised = sizes.values()
        assert quantised / plain == pytest.approx(17 / 32)

    def test_a_truncated_file_is_named_and_the_others_are_served(
        self, models: Models, start_node: StartNode, tmp_path: Path
    ) -> None:
        file = truncated(models.beta, tmp_path)
        node = start_node(cookbook({"alpha": profile(models.alpha), "torn": profile(file)}))
        told = node.cli("fit", "torn")
        assert told.returncode == 1
        assert str(file) in told.stderr
        assert "truncated" in told.stderr
        told = node.cli("fit", str(file))
        assert (told.returncode, str(file) in told.stderr) == (1, True)
        refused = node.chat("torn")
        assert refused.status_code == 503
        assert str(file) in refused.json()["error"]["message"]
        assert node.say("alpha") == "I am alpha"
        assert str(file) in fits(node)["torn"]["problem"]


def test_one_mebibyte_too_little_is_refused_without_a_child(smollm2: Path, start_node: StartNode) -> None:
    """Trap 49: the answer comes at once and has the numbers. What the figure says is enough, is enough."""
    text = cookbook({"smol": profile(smollm2, "-t 1 -tb 1 -c 4096 -np 1 --no-warmup -cram 0")})
    node = start_node(text, {"max_sysmem_mb": 100})
    need = fits(node)["smol"]["need_mib"]["ram"]
    node.stop()

    node = start_node(text, {"max_sysmem_mb": need - 1})
    asked_at = time.monotonic()
    response = node.chat("smol")
    assert time.monotonic() - asked_at < AT_ONCE_S
    assert response.status_code == 503
    error = response.json()["error"]
    assert f"ram {need} MiB" in error["message"]
    assert f"ram {need - 1} MiB" in error["message"]
    assert error["memory"] == {
        "need_mib": {"ram": need},
        "capacity_mib": {"ram": need - 1},
        "free_mib": {"ram": need - 1},
        "held_by": [],
        "foreign_mib": {},
    }
    assert fits(node)["smol"]["fit"] == "never"
    assert node.metric("llama_mesh_instance_spawns_total") == 0
    assert not node.log("instance started")
    node.stop()

    node = start_node(text, {"max_sysmem_mb": need})
    assert fits(node)["smol"]["fit"] == "now"
    assert node.say("smol")
    assert need / 2 < wait_learned(node, "smol")["live_mib"]["ram"] <= need


# -- learning


class TestLearning:
    def test_it_survives_a_restart_and_holds_for_these_arguments_only(self, models: Models, tmp_path: Path) -> None:
        """Traps 47, 97."""
        other = "-t 1 -tb 1 -c 8192 -np 2 --no-warmup"
        text = cookbook({"alpha": [profile(models.alpha), profile(models.alpha, other, id="other")]})
        learned_file = tmp_path / "state" / "metrics.footprints.json"
        with Node(tmp_path, text) as node:
            assert fits(node)["alpha"]["source"] == "estimated"
            node.say("alpha")
            seen = wait_learned(node, "alpha")
            assert 0 < seen["live_mib"]["ram"] <= seen["memory_mib"]["ram"]
            need = fits(node)["alpha"]["need_mib"]
            assert need == seen["memory_mib"]
            assert fits(node)["alpha:other"]["source"] == "estimated"
        before = json.loads(learned_file.read_text())
        assert [record["model"] for record in before["launches"].values()] == ["alpha"]

        with learned_file.open() as old, Node(tmp_path, text) as node:
            known = fits(node)
            assert (known["alpha"]["source"], known["alpha"]["need_mib"]) == ("learned", need)
            assert known["alpha:other"]["source"] == "estimated"
            node.say("alpha:other")
            wait_learned(node, "alpha:other")
            node.stop()
            assert json.load(old) == before, (
                "a reader of the old file sees the old file: it was replaced, not rewritten"
            )
        after = json.loads(learned_file.read_text())["launches"]
        assert sorted(record["model"] for record in after.values()) == ["alpha", "alpha:other"]
        assert list(learned_file.parent.glob("*.tmp")) == []

    def test_a_file_that_cannot_be_read_costs_a_warning(self, models: Models, tmp_path: Path) -> None:
        """Trap 97."""
        state = tmp_path / "state"
        state.mkdir()
        (state / "metrics.footprints.json").write_text('{"version": 1, "launches": {"half')
        with Node(tmp_path, cookbook({"alpha": profile(models.alpha)})) as node:
            (line,) = node.wait_log("memory use is learned anew")
            assert line["level"] == "WARNING"
            assert fits(node)["alpha"]["source"] == "estimated"
            node.say("alpha")
            wait_learned(node, "alpha")
        (record,) = json.loads((state / "metrics.footprints.json").read_text())["launches"].values()
        assert record["model"] == "alpha"

    def test_mapped_weights_are_not_counted_twice(self, start_node: StartNode, tmp_path: Path) -> None:
        """Trap 45: both instances map the same pages of the file, so together they use little more than one."""
        weights = synthetic_models.write("gqa", tmp_path / "large.gguf")
        one, two = (profile(weights, f"{TINY_ARGS} --alias {name}") for name in ("one", "two"))
        node = start_node(cookbook({"one": one, "two": two}))
        assert node.chat("one", max_tokens=1).status_code == 200
        alone = wait_learned(node, "one")["live_mib"]["ram"]
        assert alone > weights.stat().st_size / 2**20, "its weights are resident"
        assert node.chat("two", max_tokens=1).status_code == 200

        def together() -> int:
            parts = [(holder(node, name)["live_mib"] or {}).get("ram", 0) for name in ("one", "two")]
            return sum(parts) if min(parts) > 0 and parts[0] < 0.9 * alone else 0

        both = eventually(together, what="a sample of both")
        assert alone <= both < 1.6 * alone


# -- a budget for one model at a time


@pytest.fixture(scope="module")
def crowded(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """A node that has room for one of its models."""
    directory = tmp_path_factory.mktemp("crowded")
    text = cookbook(
        {
            "alpha": profile(models.alpha, SIZED_ARGS),
            "beta": profile(models.beta, SIZED_ARGS, max_wait_in_queue_ms=700),
            "typo": profile(models.gamma, f"{SIZED_ARGS} --no-such-flag"),
            "torn": profile(truncated(models.gamma, directory), SIZED_ARGS),
            "huge": profile(models.gamma, f"{TINY_ARGS} -cram {2 * CACHE_MIB}"),
        }
    )
    with Node(directory, text, {"max_sysmem_mb": ROOM_FOR_ONE_MIB}) as node:
        yield node


class TestCrowded:
    @pytest.mark.parametrize(("model", "why"), [("typo", "--no-such-flag"), ("torn", "truncated.gguf")])
    def test_a_mistake_in_one_profile_evicts_nobody(self, crowded: Node, model: str, why: str) -> None:
        """Trap 46: the idle model keeps its pid, and the answer is there at once."""
        idle = crowded.prewarm("alpha")
        evictions = crowded.metric("llama_mesh_instance_evictions_total")
        asked_at = time.monotonic()
        response = crowded.chat(model)
        assert time.monotonic() - asked_at < AT_ONCE_S
        assert response.status_code == 503
        assert why in response.json()["error"]["message"]
        assert crowded.instance("alpha")["pid"] == idle["pid"]
        assert crowded.metric("llama_mesh_instance_evictions_total") == evictions

    def test_too_large_is_refused_at_once_with_numbers(self, crowded: Node) -> None:
        """Trap 49; nobody goes for it either."""
        idle = crowded.prewarm("alpha")
        asked_at = time.monotonic()
        response = crowded.chat("huge")
        assert time.monotonic() - asked_at < AT_ONCE_S
        assert response.status_code == 503
        memory = response.json()["error"]["memory"]
        assert memory["need_mib"]["ram"] > ROOM_FOR_ONE_MIB
        assert memory["capacity_mib"] == {"ram": ROOM_FOR_ONE_MIB}
        assert [held["model"] for held in memory["held_by"]] == ["alpha"]
        assert crowded.instance("alpha")["pid"] == idle["pid"]

    def test_a_queue_timeout_says_who_has_the_memory(self, crowded: Node) -> None:
        crowded.prewarm("alpha")
        with crowded.connection() as connection:
            assert connection.start_stream("alpha", **LONG) == 200
            assert fits(crowded)["beta"]["fit"] == "waits"
            response = crowded.chat("beta")
            held = holder(crowded, "alpha")
        assert response.status_code == 503
        error = response.json()["error"]
        assert f"memory is held by alpha (busy, ram {held['memory_mib']['ram']} MiB)" in error["message"]
        (told,) = error["memory"]["held_by"]
        assert (told["model"], told["active"], told["state"]) == ("alpha", 1, "ready")
        assert told["memory_mib"] == held["memory_mib"]
        assert error["memory"]["need_mib"]["ram"] > error["memory"]["free_mib"]["ram"]

    def test_what_fits_and_what_would_have_to_go(self, crowded: Node) -> None:
        alpha = crowded.prewarm("alpha")
        eventually(lambda: crowded.instance("alpha")["active"] == 0, what="the stream before it ended")
        said = fits(crowded)
        assert {name: entry["fit"] for name, entry in said.items()} == {
            "alpha": "loaded",
            "beta": "after_eviction",
            "typo": "unknown",
            "torn": "unknown",
            "huge": "never",
        }
        assert said["beta"]["evict"] == [{"instance": alpha["id"], "model": "alpha"}]
        assert "truncated.gguf" in said["torn"]["problem"]
        assert "does not know --no-such-flag" in said["typo"]["problem"]
        assert said["beta"]["kv"]["cpu"] > 0
        told = crowded.cli("fit")
        assert told.returncode == 0, told
        lines = {line.split()[0]: line for line in told.stdout.splitlines() if line.split()}
        assert "loaded" in lines["alpha"]
        assert "yes, after alpha stops" in lines["beta"]
        assert "no: more than the whole budget" in lines["huge"]
        assert f"free of {ROOM_FOR_ONE_MIB} MiB" in lines["ram"]
        assert crowded.cli_json("fit", "beta")["evict"] == said["beta"]["evict"]

    def test_ps_shows_the_memory(self, crowded: Node) -> None:
        crowded.unload()  # after a start samples come often
        eventually(lambda: crowded.instances() == [], what="all are gone")
        assert crowded.say("alpha") == "I am alpha"
        charged = wait_learned(crowded, "alpha")["memory_mib"]["ram"]
        told = crowded.cli("ps").stdout
        lines = {line.split()[0]: line for line in told.splitlines() if line.split()}
        assert f"ram {charged} MiB" in lines["alpha"]
        assert "learned" in lines["alpha"]
        free = ROOM_FOR_ONE_MIB - charged
        assert lines["ram"].split(None, 1)[1] == f"{charged} used, {free} free of {ROOM_FOR_ONE_MIB} MiB"

    def test_a_good_request_does_evict(self, crowded: Node) -> None:
        """So the tests before it did look at a node that was full."""
        idle = crowded.prewarm("alpha")
        assert crowded.say("beta") == "I am beta"
        assert idle["pid"] not in crowded.server_pids()
        assert [i["model_id"] for i in crowded.instances(state="ready")] == ["beta"]
