"""Profiles with engines of their own, and arguments that the chosen engine does not know."""

from __future__ import annotations

import sys
from pathlib import Path

from mesh.engine import embedded
from tests.e2e.conftest import StartNode
from tests.e2e.harness import TINY_ARGS, Models, cookbook, profile


def engine(path: Path) -> Path:
    """Write a llama-server of its own file, which counts in *path*.calls how often it is started."""
    path.parent.mkdir(parents=True)
    text = f'#!/bin/sh\necho "$@" >> {path}.calls\nexec {sys.executable} -I -S {embedded.__file__} "$@"\n'
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_each_profile_runs_its_build(models: Models, start_node: StartNode, tmp_path: Path) -> None:
    other = engine(tmp_path / "engines/build-0123abc/bin/llama-server")
    builds = {"other": {"binary_path": str(other)}, "absent": {"binary_path": str(tmp_path / "absent")}}
    profiles = {
        "alpha": profile(models.alpha),
        "beta": profile(models.beta, engine_build="other"),
        "gamma": profile(models.gamma, engine_build="absent"),
    }
    node = start_node(cookbook(profiles), {"builds": builds})
    assert node.say("alpha") == "I am alpha"
    assert not Path(f"{other}.calls").read_text().count(str(models.beta)), "asked for its flags only"
    assert node.say("beta") == "I am beta"
    assert Path(f"{other}.calls").read_text().count(str(models.beta)) == 1
    error = node.chat("gamma").json()["error"]
    assert error["type"] == "engine_missing"
    assert "builds.absent.binary_path" in error["message"]


def test_flags_that_an_engine_does_not_know_start_nothing(
    models: Models, start_node: StartNode, tmp_path: Path
) -> None:
    """Told when the files are loaded, and to whoever asks; no process, and nobody has to go. An edit is enough."""
    binary = engine(tmp_path / "engines/bin/llama-server")
    args = TINY_ARGS + " --mlock --paralel 2"
    text = cookbook({"alpha": profile(models.alpha), "beta": profile(models.beta, args)})
    node = start_node(text, {"llama_cpp": {"binary_path": str(binary)}, "max_instances_per_node": 1})
    said = "llama-server (build default) does not know --mlock (use --load-mode mlock), --paralel"
    (line,) = node.wait_log("beta will not start")
    assert (line["level"], said in line["fields"]["message"]) == ("WARNING", True)
    pid = node.prewarm("alpha")["pid"]
    response = node.chat("beta")
    assert (response.status_code, response.json()["error"]["type"]) == (503, "instance_failed")
    assert said in response.json()["error"]["message"]
    assert node.instance("alpha")["pid"] == pid
    node.unload("alpha")
    assert said in node.chat("beta").json()["error"]["message"]
    starts = [line for line in Path(f"{binary}.calls").read_text().splitlines() if "--port" in line]
    assert len(starts) == 1, "only alpha was started"
    node.rewrite_cookbook(text.replace(args, TINY_ARGS))
    node.wait_log("cookbook reloaded")
    assert node.say("beta") == "I am beta"
