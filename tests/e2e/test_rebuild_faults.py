"""Builds that go wrong: each time the old llama-server goes on serving, from the same process (traps 88, 90, 92)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.build_project import Repository, small_disk
from tests.e2e import builds
from tests.e2e.builds import Traffic, build, ended, order, rebuild, replaced
from tests.e2e.conftest import StartNode
from tests.e2e.harness import Models, Node, cookbook, eventually, profile


def assert_old_one_serves(node: Node, before: dict[str, Any], old: str) -> None:
    """Nothing has changed for clients, and what is shown is what runs (trap 90)."""
    assert node.say("alpha") == "hello from alpha.gguf"
    assert node.instance("alpha")["pid"] == before["pid"]
    assert old.startswith(node.instance("alpha")["engine"]["version"])
    assert old.startswith(node.http.get("/version").json()["llama_cpp_version"])
    assert build(node)["live_commit"] == old


#: what a commit does, how its build ends, and what must be said of it
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"broken_source": True}, "failed", "exit status"),
    ({"configure_fails": True}, "failed", "exit status"),
    ({"output_name": "llama-cli"}, "failed", "llama-server"),
    ({"told_decode_tps": 1.0}, "rejected", "decode"),
    ({"told_prefill_tps": 1.0}, "rejected", "prefill"),
    ({"ignore_sigterm": True}, "rejected", "SIGTERM"),
    ({"smoke_say": "something else"}, "rejected", "something else"),
    ({"crash_at_load": 134}, "rejected", "aborted"),
    ({"crash_mid_stream": 3}, "rejected", ""),
    ({"version_code": 3}, "rejected", "--version"),
    ({"missing_library": True}, "rejected", "librar"),
]


@pytest.mark.parametrize(("behaviour", "outcome", "said"), BAD, ids=[next(iter(bad)) for bad, _, _ in BAD])
def test_a_bad_commit_changes_nothing(
    behaviour: dict[str, Any],
    outcome: str,
    said: str,
    models: Models,
    start_node: StartNode,
    repository: Repository,
    tmp_path: Path,
) -> None:
    old = repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    before = node.prewarm("alpha")
    bad = repository.commit(**behaviour)
    attempt = rebuild(node)
    assert (attempt["outcome"], attempt["commit"]) == (outcome, bad), attempt
    assert said in attempt["error"], attempt
    assert_old_one_serves(node, before, old)
    # cmake may have missed something that is installed by the next time; all else is the commit's own fault
    assert list(build(node)["held"]) == ([] if "configure_fails" in behaviour else [bad])
    assert build(node)["last_error"] == attempt["error"]
    good = repository.commit(say="mended")
    assert rebuild(node)["outcome"] == "installed"
    replaced(node, good)
    assert node.http.get("/metrics/json").json()["last_build_error"] is None


def test_a_compile_error_is_told_with_its_last_lines(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Trap 90."""
    repository.commit()
    node = builds.start(start_node, models, repository, tmp_path / "made")
    repository.commit(broken_source=True)
    result = node.cli("rebuild", within_s=120)
    assert result.returncode == 1
    told = result.stdout + result.stderr
    assert "exit status" in told
    assert "error: " in told
    assert "as_asked" in told  # the name that the compiler complains of
    assert len(build(node)["last"]["log_tail"]) <= 40


def test_a_node_that_is_killed_in_the_middle_of_a_build(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Nobody is left compiling; the next node serves with what was in force, and builds what was begun anew."""
    old = repository.commit()
    at = tmp_path / "made"
    node = builds.start(start_node, models, repository, at)
    node.prewarm("alpha")
    go = tmp_path / "go"
    new = repository.commit(wait_for=go, say="new words")
    order(node)
    sleeping = builds.stopped_in_the_middle(at)
    node.sigkill()
    eventually(lambda: not node.marked(), what="all processes of the killed node end")
    assert builds.is_over(sleeping)
    shutil.copy(at / f"build-{old[:7]}" / "bin" / "llama-server", tmp_path / "copy")
    for pid_file in at.glob("build-*/sleeping.pid"):
        pid_file.unlink()
    node.start()
    builds.stopped_in_the_middle(at)  # at its start the node builds what is new
    assert node.say("alpha") == "hello from alpha.gguf"
    assert build(node)["live_commit"] == old
    go.touch()
    assert ended(node)["outcome"] == "installed"
    replaced(node, new)
    assert node.say("alpha") == "new words"
    assert (tmp_path / "copy").read_bytes() == (at / f"build-{old[:7]}" / "bin" / "llama-server").read_bytes()


def test_a_node_that_is_told_to_stop_in_the_middle_of_a_build(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    repository.commit()
    at = tmp_path / "made"
    node = builds.start(start_node, models, repository, at)
    repository.commit(sleep_s=300)
    order(node)
    sleeping = builds.stopped_in_the_middle(at)
    node.stop()  # asserts that nothing is left
    assert builds.is_over(sleeping)


def test_a_disk_that_fills_up(models: Models, start_node: StartNode, repository: Repository, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64) as disk:
        old = repository.commit()
        node = builds.start(start_node, models, repository, disk)
        before = node.prewarm("alpha")
        repository.commit(fill_mib=100)
        attempt = rebuild(node)
        assert attempt["outcome"] == "failed"
        assert "is full" in attempt["error"], attempt
        assert_old_one_serves(node, before, old)
        assert not build(node)["held"]  # the commit is not to blame
        free_mib = shutil.disk_usage(disk).free / 2**20
        assert free_mib > 10, "what was half-built is gone"
        good = repository.commit(say="mended")
        assert rebuild(node)["outcome"] == "installed"
        replaced(node, good)
        node.stop()


def test_a_repository_that_is_gone(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """Trap 91's other half: a node starts, serves and says what is the matter without its repository."""
    old = repository.commit()
    at = tmp_path / "made"
    node = builds.start(start_node, models, repository, at)
    before = node.prewarm("alpha")
    repository.path.rename(tmp_path / "moved")
    attempt = rebuild(node)
    assert attempt["outcome"] == "failed"
    assert str(repository.path) in attempt["error"]
    assert_old_one_serves(node, before, old)
    node.stop()
    node.start()
    assert node.say("alpha") == "hello from alpha.gguf"
    assert ended(node)["outcome"] == "failed"
    assert build(node)["live_commit"] == old


def test_a_canary_on_a_model_of_the_cookbook(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """A build that is well on the tiny model and crashes on ours is rejected."""
    old = repository.commit()
    at = tmp_path / "made"
    llama_cpp = builds.settings(repository, at, canary_profile="alpha")
    text = cookbook({"alpha": profile(models.alpha, builds.ARGS)})
    node = start_node(text, {"llama_cpp": llama_cpp})
    assert ended(node)["outcome"] == "installed"
    before = node.prewarm("alpha")
    good = repository.commit(version="another")
    attempt = rebuild(node)
    assert attempt["outcome"] == "installed", attempt
    assert [c["model"] for c in attempt["comparisons"]][1:] == ["alpha"]
    replaced(node, good)
    assert node.instance("alpha")["pid"] != before["pid"]
    assert [i["key"] for i in node.instances()] == ["alpha:default"]  # the trial is over
    assert old != good


def test_a_build_that_cannot_load_a_model_which_does_not_fit_twice(
    models: Models, start_node: StartNode, repository: Repository, tmp_path: Path
) -> None:
    """It is well on the tiny model, and ours had to go before it could be tried: the version before comes back."""
    old = repository.commit()
    at = tmp_path / "made"
    llama_cpp = builds.settings(repository, at, auto_update_interval_seconds=1)
    config = {"llama_cpp": llama_cpp, "max_instances_per_node": 1}
    node = builds.start(start_node, models, repository, at, config)
    before = node.prewarm("alpha")
    with Traffic(node) as traffic:
        bad = repository.commit(cannot_load="alpha.gguf")
        held = eventually(lambda: build(node)["held"], within_s=builds.ENDED_S, every_s=0.1, what="a commit is held")
        after = replaced(node, old)
        served = len(traffic.statuses)
        eventually(lambda: len(traffic.statuses) > served + 5)
        eventually(lambda: build(node)["last"]["outcome"] == "skipped", what="it is left alone from then on")
    assert set(traffic.statuses) == {200}
    assert held == {bad: "alpha did not start with it: GGML_ASSERT(fits) failed as asked "
                         "(llama-server ended by itself: aborted)"}  # fmt: skip
    assert_old_one_serves(node, after, old)
    assert after["pid"] != before["pid"]
    assert node.log("the version before is in force again")
    good = repository.commit(say="mended")
    replaced(node, good)
