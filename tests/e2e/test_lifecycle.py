"""Starting, sharing, swapping, idling, reloading and stopping real llama-servers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import StartNode
from tests.e2e.harness import TINY_ARGS, Models, Node, cookbook, eventually, profile

ENDLESS_ARGS = "-t 1 -tb 1 -c 32768 -np 1 --no-warmup"
#: some seconds of talk for a tiny model: longer than the second after which idle things end in these tests
LONG: dict[str, Any] = {"ignore_eos": True, "max_tokens": 6000}


class TestStart:
    def test_simultaneous_first_requests_start_one_process(self, models: Models, start_node: StartNode) -> None:
        """Trap 18."""
        node = start_node(cookbook({"alpha": profile(models.alpha)}))
        assert node.instances() == []
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: node.say("alpha"), range(8)))
        assert answers == ["I am alpha"] * 8
        assert node.metric("llama_mesh_instance_spawns_total") == 1
        instance = node.instance("alpha")
        assert (instance["state"], instance["slots"], instance["active"], instance["busy"]) == ("ready", 2, 0, 0)
        assert node.server_pids() == [instance["pid"]]

    def test_a_second_instance_when_all_slots_are_taken(self, models: Models, start_node: StartNode) -> None:
        node = start_node(cookbook({"alpha": profile(models.alpha, ENDLESS_ARGS, max_instances=2)}))
        with node.connection() as first, node.connection() as second:
            assert first.start_stream("alpha", **LONG) == 200
            assert second.start_stream("alpha", **LONG) == 200
            assert sorted(i["busy"] for i in node.instances("alpha")) == [1, 1]
            assert len(set(node.server_pids())) == 2

    def test_warm_requests_flow_while_another_model_loads(self, models: Models, start_node: StartNode) -> None:
        """Trap 40. The loading one is a real llama-server behind a wrapper that takes its time."""
        slow = f'sleep 1.5; exec {sys.executable} -I -S {engine_path()} "$@"'
        script = models.alpha.parent / "slow-server"
        script.write_text(f'#!/bin/sh\ncase "$*" in *beta.gguf*) {slow} ;; esac\n{slow.partition("; ")[2]}\n')
        script.chmod(0o755)
        text = cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta)})
        node = start_node(text, {"llama_cpp": {"binary_path": str(script)}})
        node.prewarm("alpha")
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(node.say, "beta")
            eventually(lambda: node.instances("beta", "spawning"), every_s=0.01)
            slowest = 0.0
            while not loading.done():
                asked_at = time.monotonic()
                assert node.say("alpha") == "I am alpha"
                slowest = max(slowest, time.monotonic() - asked_at)
            assert loading.result() == "I am beta"
        assert slowest < 1.0, "a request for the warm model waited for the cold one"


def engine_path() -> str:
    from mesh.engine import embedded

    return embedded.__file__


class TestBudget:
    """Two models of more than 50 MiB each, by the cookbook and then as measured, and 100 MiB for both."""

    @pytest.fixture
    def node(self, models: Models, start_node: StartNode) -> Node:
        text = cookbook(
            {
                "alpha": profile(models.alpha, TINY_ARGS + " -cram 40", estimated_sysmem_mb=60),
                "beta": profile(models.beta, TINY_ARGS + " -cram 40", estimated_sysmem_mb=60),
                "giant": profile(models.gamma, estimated_sysmem_mb=101),
            },
            defaults={"min_eviction_tenure_secs": 1},
        )
        return start_node(text, {"max_sysmem_mb": 100})

    def test_they_take_turns(self, node: Node) -> None:
        for name in ("alpha", "beta", "alpha", "beta"):
            assert node.say(name) == f"I am {name}"
            assert [i["model_id"] for i in node.instances(state="ready")] == [name]
            assert len(node.servers()) == 1, "the loser's process had ended before the winner's began"
            assert 50 < node.status()["budget"]["used"]["ram"] <= 100
        assert node.metric("llama_mesh_instance_evictions_total") == 3

    def test_requests_for_both_at_once_are_collated(self, node: Node) -> None:
        """Traps 32, 33, 34, 35: everyone is served in time, and not with a swap for each request."""
        names = ["alpha", "beta"] * 10
        with ThreadPoolExecutor(len(names)) as pool:
            answers = list(pool.map(node.say, names))
        assert answers == [f"I am {name}" for name in names]
        assert node.metric("llama_mesh_instance_spawns_total") <= 4
        assert node.status()["queues"] == {}

    def test_a_busy_model_is_not_stopped_but_gives_way(self, node: Node) -> None:
        """Trap 32: its stream ends whole before the other model starts."""
        node.prewarm("alpha")
        with node.connection() as stream, ThreadPoolExecutor(1) as pool:
            assert stream.start_stream("alpha", ignore_eos=True, max_tokens=1900) == 200
            other = pool.submit(node.say, "beta")
            eventually(lambda: node.status()["queues"] == {"beta:default": 1} or other.done(), every_s=0.01)
            assert stream.read_until(b"[DONE]").count(b"data: ") > 1800
            assert other.result(20) == "I am beta"

    def test_one_that_never_fits_is_refused_with_the_numbers(self, node: Node) -> None:
        """Trap 49."""
        pid = node.prewarm("alpha")["pid"]
        response = node.chat("giant")
        assert (response.status_code, response.json()["error"]["type"]) == (503, "model_too_large")
        assert "101" in response.json()["error"]["message"]
        assert "100" in response.json()["error"]["message"]
        assert "retry-after" not in response.headers
        assert node.instance("alpha")["pid"] == pid


class TestIdle:
    def test_an_idle_instance_ends_and_the_next_request_starts_another(
        self, models: Models, start_node: StartNode
    ) -> None:
        """Trap 23: the clock runs from the end of the last request, not while one is served."""
        node = start_node(cookbook({"alpha": profile(models.alpha, ENDLESS_ARGS, idle_timeout_seconds=1)}))
        first = node.prewarm("alpha")
        with node.connection() as stream:
            started_at = time.monotonic()
            assert stream.start_stream("alpha", **LONG) == 200
            stream.read_until(b"[DONE]")
            assert time.monotonic() - started_at > 1.2, "not a test: the stream was too short"
            ended_at = time.monotonic()
        assert node.instance("alpha")["pid"] == first["pid"]
        eventually(lambda: not node.instances("alpha", "ready"), within_s=5)
        assert time.monotonic() - ended_at > 0.8
        eventually(lambda: not node.instances("alpha"), within_s=5)
        assert first["pid"] not in node.server_pids()
        assert node.say("alpha") == "I am alpha"
        assert node.instance("alpha")["id"] != first["id"]
        assert node.status()["failures"] == {}, "an idle stop is no failure (trap 29)"


class TestReload:
    @pytest.fixture
    def node(self, models: Models, start_node: StartNode) -> Node:
        node = start_node(cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta, ENDLESS_ARGS)}))
        for name in ("alpha", "beta"):
            node.prewarm(name)
        return node

    def test_only_what_changed_drains(self, node: Node, models: Models) -> None:
        """Traps 82, 83: the changed one finishes its stream first; new requests get the new one meanwhile."""
        before = {name: node.instance(name)["pid"] for name in ("alpha", "beta")}
        with node.connection() as stream:
            stream.start_stream("beta", **LONG)
            changed = profile(models.beta, ENDLESS_ARGS + " --seed 7")
            node.rewrite_cookbook(cookbook({"alpha": profile(models.alpha, idle_timeout_seconds=77), "beta": changed}))
            node.wait_log("cookbook reloaded")
            eventually(lambda: node.instances("beta", "draining"))
            assert node.say("beta") == "I am beta"
            assert {i["state"] for i in node.instances("beta")} == {"draining", "ready"}
            assert stream.read_until(b"[DONE]").count(b"data: ") > 5000
        eventually(lambda: len(node.instances("beta")) == 1, what="the old one ended")
        assert node.instance("alpha")["pid"] == before["alpha"]
        assert node.instance("beta")["pid"] != before["beta"]
        assert node.http.get("/v1/models/alpha").json()["metadata"]["idle_timeout_seconds"] == 77, "limits apply live"

    def test_a_removed_model_is_gone_and_an_added_one_is_there(self, node: Node, models: Models) -> None:
        node.rewrite_cookbook(cookbook({"alpha": profile(models.alpha), "gamma": profile(models.gamma)}))
        node.wait_log("cookbook reloaded")
        assert node.chat("beta").status_code == 404
        assert node.say("gamma") == "I am gamma"
        eventually(lambda: not node.instances("beta"))

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("models: [\n", "cookbook.yaml:"),
            ('{"models": [{"name": "a:b", "profiles": [{"model_path": "x"}]}]}', ":1:"),
            ("models:\n  - name: alpha\n    profiles:\n      - model_pth: x\n", ":4:"),
            (
                "models:\n - {name: A, profiles: [{model_path: x}]}\n - {name: a, profiles: [{model_path: x}]}\n",
                "give one another name",
            ),
            ("", "is empty"),
        ],
        ids=["no YAML", "colon in a name", "unknown key", "same name twice", "emptied"],
    )
    def test_a_bad_edit_changes_nothing(self, node: Node, text: str, says: str) -> None:
        """Trap 84: one error with its line; the same processes answer the same models."""
        before = node.server_pids()
        node.rewrite_cookbook(text)
        (line,) = node.wait_log("cookbook_reload_failed")
        assert (line["level"], says in str(line)) == ("ERROR", True), line
        assert [node.say("alpha"), node.say("beta")] == ["I am alpha", "I am beta"]
        assert node.server_pids() == before

    def test_five_edits_in_a_second_end_in_one_state(self, node: Node, models: Models) -> None:
        """Trap 86."""
        pid = node.instance("alpha")["pid"]
        for seed in range(5):
            changed = profile(models.beta, f"{ENDLESS_ARGS} --seed {seed}")
            node.rewrite_cookbook(cookbook({"alpha": profile(models.alpha), "beta": changed}))
            assert node.say("beta") == "I am beta"
            time.sleep(0.15)
        eventually(lambda: not node.instances("beta") or "4" in node.instance("beta")["command"])
        assert node.say("beta") == "I am beta"
        final = node.instance("beta")
        assert final["command"][final["command"].index("--seed") + 1] == "4"
        assert len(node.servers()) == 2
        assert node.instance("alpha")["pid"] == pid


class TestCommandLine:
    def test_prewarm_ps_unload(self, class_node: Node) -> None:
        node = class_node
        assert node.cli_json("prewarm", "alpha")["instance"]["state"] == "ready"
        (row,) = node.cli_json("ps")["instances"]
        assert (row["model_id"], row["state"], row["pid"]) == ("alpha", "ready", node.server_pids()[0])
        table = node.cli("ps")
        assert "alpha" in table.stdout
        assert str(row["pid"]) in table.stdout
        assert node.cli_json("unload", "alpha")["unloaded"] == 1
        eventually(lambda: not node.servers())
        assert node.cli_json("ps")["instances"] == []

    def test_models_and_version(self, class_node: Node) -> None:
        assert [m["id"] for m in class_node.cli_json("models")["data"]] == ["alpha", "beta"]
        assert "b11549" in class_node.cli("version").stdout

    def test_logs_and_following_them(self, class_node: Node) -> None:
        node = class_node
        node.prewarm("beta")
        assert "listening" in node.cli("logs", "beta").stdout
        follower = subprocess.Popen(
            [sys.executable, "-m", "mesh", "logs", "-f", "beta", "--url", node.url],
            cwd=node.directory, env=node.environ, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with follower:
            assert follower.stdout is not None
            eventually(lambda: "listening" in follower.stdout.readline(), every_s=0)  # type: ignore[union-attr]
            node.say("beta")
            line = eventually(lambda: follower.stdout.readline(), every_s=0)  # type: ignore[union-attr]
            assert line.strip()
            follower.send_signal(signal.SIGINT)
            assert follower.wait(10) in (0, 130)

    def test_failures_say_why(self, class_node: Node) -> None:
        unknown = class_node.cli("prewarm", "nothing")
        assert unknown.returncode == 1
        assert "not found" in unknown.stderr
        nobody = class_node.cli("ps", "--url", "http://127.0.0.1:9")
        assert nobody.returncode == 1
        assert "127.0.0.1:9" in nobody.stderr
        assert class_node.cli("pss").returncode == 2


@pytest.fixture(scope="module")
def class_node(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    text = cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta)})
    with Node(tmp_path_factory.mktemp("cli"), text) as node:
        yield node


def test_counters_survive_a_restart(models: Models, start_node: StartNode) -> None:
    """Trap 96: monotonic across restarts."""
    node = start_node(cookbook({"alpha": profile(models.alpha)}))
    node.say("alpha")
    before = node.metric("llama_mesh_requests_total")
    node.stop()
    assert json.loads((node.directory / "state" / "metrics.json").read_text())
    node.start()
    assert node.metric("llama_mesh_requests_total") >= before
