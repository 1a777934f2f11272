"""A node that keeps its llama-server current while it serves (traps 88, 89, 90, 93); the sources are a stand-in's."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

from tests.build_project import Repository
from tests.e2e import builds
from tests.e2e.builds import Traffic, build, ended, order, rebuild, refused, replaced
from tests.e2e.conftest import StartNode
from tests.e2e.harness import Models, cookbook, eventually, profile


def test_the_first_build_takes_over_from_the_installed_engine(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    go = tmp_path / "go"
    commit = repository.commit(wait_for=go)
    text = cookbook({"alpha": profile(models.alpha, builds.ARGS + " -t 1")})
    node = start_node(text, {"llama_cpp": builds.settings(repository, tmp_path / "made")})
    builds.stopped_in_the_middle(tmp_path / "made")
    assert node.say("alpha") == "I am alpha"  # the embedded engine's answer, while the compiler runs
    assert node.instance("alpha")["engine"]["version"].startswith("b")
    go.touch()
    assert ended(node)["outcome"] == "installed"
    replaced(node, commit)
    assert node.say("alpha") == "hello from alpha.gguf"
    assert commit.startswith(node.http.get("/version").json()["llama_cpp_version"])


def test_a_new_version_replaces_the_old_one_and_nobody_notices(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    old = repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    before = node.prewarm("alpha")
    assert old.startswith(before["engine"]["version"])
    new = repository.commit(say="what the new one says")
    with Traffic(node) as traffic, node.connection() as stream:
        assert stream.start_stream("alpha", ignore_eos=True, max_tokens=300) == 200
        attempt = rebuild(node)
        assert (attempt["outcome"], attempt["commit"]) == ("installed", new)
        after = replaced(node, new)
        eventually(lambda: len(traffic.statuses) > 20)
        assert stream.read_until(b"data: [DONE]")
    assert set(traffic.statuses) == {200}
    assert after["pid"] != before["pid"]
    assert node.say("alpha") == "what the new one says"
    assert attempt["comparisons"][0]["old"]["decode_tps"] > 0
    assert node.metric("llama_mesh_builds_total") == 2


def test_the_same_commit_drains_nothing(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Trap 89."""
    repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    pid = node.prewarm("alpha")["pid"]
    assert rebuild(node)["outcome"] == "unchanged"
    assert node.prewarm("alpha")["pid"] == pid
    assert not node.log("superseded")
    assert not node.log('"draining"')


def test_one_at_a_time_and_cancelled_by_hand(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    old = repository.commit()
    at = tmp_path / "made"
    node = builds.start(start_node, models, repository, at)
    pid = node.prewarm("alpha")["pid"]
    repository.commit(sleep_s=300)
    attempt = order(node)
    sleeping = builds.stopped_in_the_middle(at)
    body = refused(node.http.post("/admin/rebuild-llama"))
    assert body["build_status"]["is_building"] is True
    assert node.http.get("/metrics/json").json()["is_building"] is True
    refused(node.http.post("/admin/rollback-llama"))
    cancelled = node.cli("rebuild", "--cancel")
    assert cancelled.returncode == 0, cancelled
    assert ended(node, attempt["id"] - 1)["outcome"] == "cancelled"
    assert builds.is_over(sleeping)
    assert node.prewarm("alpha")["pid"] == pid
    assert old.startswith(build(node)["live_commit"])
    assert [path.name for path in at.glob("build-*")] == [f"build-{old[:7]}"]


def test_there_and_back(models: Models, start_node: StartNode, repository: Repository, tmp_path: Path) -> None:
    old = repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    node.prewarm("alpha")
    new = repository.commit(say="new words")
    done = node.cli("rebuild", within_s=120)
    assert done.returncode == 0, done
    assert new[:7] in done.stdout + done.stderr
    replaced(node, new)
    back = node.cli("rollback")
    assert back.returncode == 0, back
    replaced(node, old)
    assert node.say("alpha") == "hello from alpha.gguf"
    assert node.cli("rollback").returncode == 1  # there is nothing before the first one
    shown = node.cli_json("builds")["builds"][0]
    assert shown["live_commit"] == old
    assert list(shown["held"]) == [new]
    assert rebuild(node)["outcome"] == "installed"  # by hand it may come back
    replaced(node, new)


def test_what_was_rolled_back_does_not_come_back_by_itself(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    old = repository.commit()
    at = tmp_path / "made"
    llama_cpp = builds.settings(repository, at, auto_update_interval_seconds=0.5)
    node = builds.start(start_node, models, repository, at, {"llama_cpp": llama_cpp})
    repository.commit(say="new words")
    eventually(lambda: build(node)["last"]["outcome"] == "installed" and build(node)["last"]["id"] > 1, within_s=60)
    assert node.http.post("/admin/rollback-llama").status_code == 200
    eventually(lambda: build(node)["last"]["outcome"] == "skipped", within_s=60)
    assert build(node)["live_commit"] == old
    third = repository.commit(say="better words")
    eventually(lambda: build(node)["live_commit"] == third, within_s=60)
    assert node.say("alpha") == "better words"


def test_a_binary_that_somebody_else_replaced(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Trap 93: what runs is what binary_path leads to, whoever put it there."""
    old = repository.commit()
    at = tmp_path / "made"
    node = builds.start(start_node, models, repository, at)
    node.prewarm("alpha")
    new = repository.commit(say="new words")
    rebuild(node)
    replaced(node, new)
    link = at / "bin" / "llama-server"
    fresh = link.with_name("by-hand")
    fresh.symlink_to(at / f"build-{old[:7]}" / "bin" / "llama-server")
    os.replace(fresh, link)
    replaced(node, old)


def test_named_builds_and_the_profiles_that_run_them(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    first = repository.commit(say="one")
    second = repository.commit(say="two")
    repository.tag("stable", first)
    at = tmp_path / "made"
    text = cookbook(
        {
            "new": profile(models.alpha, builds.ARGS),
            "old": profile(models.alpha, builds.ARGS, engine_build="stable"),
        }
    )
    config = {"llama_cpp": builds.settings(repository, at), "builds": {"stable": {"branch": "stable"}}}
    node = start_node(text, config)
    assert ended(node)["outcome"] == ended(node, name="stable")["outcome"] == "installed"
    assert (node.say("new"), node.say("old")) == ("two", "one")
    pid = node.instance("old")["pid"]
    third = repository.commit(say="three")
    assert rebuild(node)["commit"] == third
    replaced(node, third, "new")
    assert (node.say("new"), node.say("old")) == ("three", "one")
    assert node.instance("old")["pid"] == pid
    assert second != third
    assert rebuild(node, build="stable")["outcome"] == "unchanged"


def test_a_model_that_does_not_fit_twice(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Its requests finish, those that come wait, and there are never two of it."""
    repository.commit()
    at = tmp_path / "made"
    config = {"llama_cpp": builds.settings(repository, at), "max_instances_per_node": 1}
    text = cookbook({"alpha": profile(models.alpha, builds.ARGS)})
    node = start_node(text, config)
    assert ended(node)["outcome"] == "installed"
    node.prewarm("alpha")
    new = repository.commit(say="new words")
    most = 0
    with Traffic(node) as traffic:
        order(node)
        while not builds.runs(node, new):
            most = max(most, len(node.instances("alpha")))
    assert most == 1
    assert set(traffic.statuses) == {200}
    assert node.say("alpha") == "new words"


def test_events_tell_the_whole_story(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    repository.commit(say="new")
    seen: list[tuple[str, dict[str, object]]] = []
    with node.http.stream("GET", "/admin/builds/events") as response:
        kind = ""
        for line in response.iter_lines():
            if line.startswith("event: "):
                kind = line.removeprefix("event: ")
                if kind == "snapshot":
                    threading.Thread(target=order, args=(node,), daemon=True).start()
            elif line.startswith("data: "):
                seen.append((kind, json.loads(line.removeprefix("data: "))))
                if kind == "ended":
                    break
    kinds = [kind for kind, _ in seen]
    assert kinds[0] == "snapshot"
    assert {"started", "stage", "log"} <= set(kinds)
    steps = [data for kind, data in seen if kind == "progress" and data["stage"] == "compiling"]
    assert steps[-1]["done"] == steps[-1]["total"]
