"""What an operator sees: the start in the log, warnings, signals, and why a model does not run."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import StartNode
from tests.e2e.harness import Models, Node, cookbook, eventually, profile

ENDLESS_ARGS = "-t 1 -tb 1 -c 32768 -np 1 --no-warmup"


def test_the_start_names_the_files(start_node: StartNode) -> None:
    node = start_node(cookbook({}))
    (line,) = node.wait_log("node started")
    assert line["fields"]["config"] == str(node.directory / "config.yaml")
    assert line["fields"]["cookbook"] == str(node.cookbook_path)
    assert not node.log("no cookbook")


def test_a_start_without_a_cookbook_says_where_it_looked(tmp_path: Path) -> None:
    node = Node(tmp_path / "n", "")
    node.cookbook_path.unlink()
    command = [sys.executable, "-m", "mesh", "serve"]  # no --cookbook, unlike the harness
    with (tmp_path / "n" / "stdout").open("wb") as out:
        process = subprocess.Popen(command, cwd=node.directory, env=node.environ, stdout=out)
    try:
        (line,) = node.wait_log("no cookbook")
        assert line["level"] == "WARNING"
        said = f"no cookbook: looked for cookbook.yaml in {node.directory}; pass --cookbook"
        assert line["fields"]["message"] == said
    finally:
        process.terminate()
        assert process.wait(15) == 0


def test_a_reload_tells_only_new_warnings(models: Models, start_node: StartNode) -> None:
    gone = {"gone": profile("/nowhere/gone.gguf")}
    node = start_node(cookbook(gone))
    node.rewrite_cookbook("\n" + cookbook({**gone, "alpha": profile(models.alpha)}))
    assert node.wait_log("cookbook reloaded")[0]["fields"]["cookbook"] == str(node.cookbook_path)
    assert not node.log("gone.gguf")
    node.rewrite_cookbook(cookbook({**gone, "lost": profile("/nowhere/lost.gguf")}))
    node.wait_log("cookbook reloaded", count=2)
    assert not node.log("gone.gguf")
    (line,) = node.log("lost.gguf")
    assert line["level"] == "WARNING"


def test_a_hang_up_drains_also_when_it_comes_twice(start_node: StartNode) -> None:
    node = start_node(cookbook({}))
    node.process.send_signal(signal.SIGHUP)
    node.process.send_signal(signal.SIGHUP)
    assert node.process.wait(15) == 0
    assert node.log("node stopped")


def test_under_nohup_a_hang_up_is_nothing(start_node: StartNode) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what is ignored, a child inherits
    try:
        node = start_node(cookbook({}))
    finally:
        signal.signal(signal.SIGHUP, before)
    node.process.send_signal(signal.SIGHUP)
    assert node.http.get("/version").status_code == 200
    node.stop()
    assert [line["fields"]["signal"] for line in node.log("draining")] == ["SIGTERM"]


def test_the_second_signal_says_that_it_kills(models: Models, tmp_path: Path) -> None:
    node = Node(tmp_path / "n", cookbook({"alpha": profile(models.alpha, ENDLESS_ARGS)})).start()
    with closing(node.http), node.connection() as connection:
        assert connection.start_stream("alpha", ignore_eos=True, max_tokens=20000) == 200
        node.process.send_signal(signal.SIGTERM)
        node.wait_log("draining")
        node.process.send_signal(signal.SIGINT)
        assert node.process.wait(15) == 130
    (line,) = node.log("second signal:")
    assert line["level"] == "WARNING"
    eventually(lambda: not node.marked(), what="the children end")


@pytest.mark.parametrize("follow", [False, True], ids=["tail", "follow"])
def test_the_log_of_a_model_that_failed(start_node: StartNode, follow: bool) -> None:
    node = start_node(cookbook({"gone": profile("/nowhere/gone.gguf")}))
    assert node.http.get("/admin/logs?model=gone").text == "nothing runs and nothing failed\n"
    error = node.chat("gone").json()["error"]
    assert error["message"].startswith("'gone' failed to start: gguf_init_from_file: failed to open")
    assert "correct the model (/nowhere/gone.gguf)" in error["message"]
    with node.http.stream("GET", "/admin/logs", params={"model": "gone", "follow": str(follow).lower()}) as response:
        for line in response.iter_lines():
            if line.startswith("not running; last failure: gguf_init_from_file: failed to open"):
                return
    raise AssertionError("the log does not say why")
