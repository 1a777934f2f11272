"""`rebuild`, `rollback` and `builds`: what is asked, what is said, exit statuses; on a terminal, and at a real node."""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from mesh.build.status import Outcome, Stage
from mesh.cli import build_watch
from mesh.cli.main import run
from tests.api.node import Node
from tests.api.served import serving
from tests.cli.build_node import CUT, BuildNode, log, picture, progress, snapshot, told
from tests.cli.fake_node import FakeNode
from tests.fakes_builds import COMPARISON, NEW, OLD, FakeBuilds, attempt, ended, status, version

ROOT = Path(__file__).parents[2]
REBUILD, CANCEL, ROLLBACK, BUILDS = (
    "POST /admin/rebuild-llama", "POST /admin/rebuild-llama/cancel", "POST /admin/rollback-llama", "POST /admin/builds"
)  # fmt: skip
INSTALLED = ended(Outcome.INSTALLED, commit=NEW, comparisons=(COMPARISON,), notes=("tested on the CPU",))
FAILED = ended(Outcome.FAILED, commit=NEW, error="cmake --build: [x]", exit_status=2, log_tail=("error: one", "two"))


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_watch, "pause", lambda seconds: None)


def accepted(begun: Any = None) -> tuple[int, Any]:
    found = attempt() if begun is None else begun
    return 202, {"status": "accepted", "message": "", "build_status": {}, "attempt": asdict(found)}


def refused(code: int, type: str, message: str) -> tuple[int, Any]:
    return code, {"status": "error", "message": message, "error": {"message": message, "type": type, "param": None}}


BUSY = refused(409, "conflict", "default is being built already")


def ends(builder: BuildNode, last: Any) -> None:
    builder.answers[REBUILD] = [accepted()]
    builder.scripts = [[snapshot(attempt()), told("ended", last)]]


# --- rebuild


@pytest.mark.parametrize(
    ("arguments", "body"),
    [
        ([], {}),
        (["cuda"], {"build": "cuda"}),
        (["--branch", "b6123", "--force"], {"branch": "b6123", "force": True}),
        (["cuda", "--no-wait", "--node", "gpu2"], {"build": "cuda", "node": "gpu2"}),
    ],
)
def test_what_is_asked(builder: BuildNode, arguments: list[str], body: dict[str, Any]) -> None:
    ends(builder, INSTALLED)
    assert run(["rebuild", *arguments]) == 0
    assert builder.bodies(REBUILD) == [body]


def test_installed_is_exit_0_and_tells_commit_and_speeds(
    builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(builder, INSTALLED)
    assert run(["rebuild"]) == 0
    captured = capsys.readouterr()
    first, _, speeds, note = captured.out.splitlines()
    assert first.startswith("default: 0f1e2d3c4 (master) is installed after 8:12")
    assert "1,200 → 1,320 (+10%)" in speeds
    assert note == "note: tested on the CPU"
    assert captured.err.splitlines() == ["default: fetching", "default: installed"]


def test_a_failure_is_exit_1_with_its_exit_status_and_last_lines(
    builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    """trap 90"""
    ends(builder, FAILED)
    assert run(["rebuild"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines()[-5:] == [
        "  error: one",
        "  two",
        "exit status 2, 2 last lines above",
        "error: default: compiling failed: cmake --build: [x]",
        "fix:   What ran before runs on. 'llama-mesh rebuild' tries it again.",
    ]


def test_a_rejected_build_shows_what_it_lost(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    ends(builder, replace(INSTALLED, outcome=Outcome.REJECTED, error="decode lost 60 %"))
    assert run(["rebuild"]) == 1
    captured = capsys.readouterr()
    assert "45.0 → 44.0" in captured.out
    assert "was built, but rejected: decode lost 60 %" in captured.err


@pytest.mark.parametrize(("last", "code"), [(INSTALLED, 0), (FAILED, 1), (ended(Outcome.CANCELLED), 1)])
def test_as_json_it_is_the_attempt(
    last: Any, code: int, builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    ends(builder, last)
    assert run(["rebuild", "--json"]) == code
    captured = capsys.readouterr()
    assert json.loads(captured.out) == json.loads(json.dumps(asdict(last)))
    assert captured.err == ""


def test_not_waiting(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    builder.answers[REBUILD] = [accepted(), accepted(), BUSY]
    assert run(["rebuild", "--no-wait"]) == 0
    assert "the rebuild of default has started" in capsys.readouterr().out
    assert run(["rebuild", "--no-wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == 1
    assert run(["rebuild", "--no-wait"]) == 1
    assert "default is being built already" in capsys.readouterr().err


def test_one_that_is_in_progress_is_watched(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    builder.answers = {REBUILD: [BUSY], BUILDS: [(200, picture(status(current=attempt(7))))]}
    builder.scripts = [[snapshot(attempt(7)), told("ended", replace(INSTALLED, id=7))]]
    assert run(["rebuild"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("a rebuild of default is in progress already (manual)")
    assert "is installed" in captured.out


def test_one_that_another_process_makes_cannot_be_watched(
    builder: BuildNode, capsys: pytest.CaptureFixture[str]
) -> None:
    builder.answers = {REBUILD: [BUSY], BUILDS: [(200, picture(status()))]}
    assert run(["rebuild"]) == 1
    assert "default is being built already" in capsys.readouterr().err


def test_a_node_that_builds_nothing_says_how_it_could(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    builder.answers[REBUILD] = [(202, {"status": "accepted", "attempt": None}), accepted(ended(Outcome.DISABLED))]
    for _ in range(2):
        assert run(["rebuild"]) == 1
        assert "llama_cpp.repo_url" in capsys.readouterr().err


def test_an_unknown_build_points_to_the_list(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    for command, path in (("rebuild", REBUILD), ("rollback", ROLLBACK)):
        builder.answers[path] = [refused(404, "build_not_found", "there is no build 'x'; there are: default")]
        assert run([command, "x"]) == 1
        error = capsys.readouterr().err
        assert "there are: default" in error
        assert "'llama-mesh builds' shows what there is." in error


def test_on_another_node(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    """Its events do not come this far: it is asked."""
    builder.answers = {
        REBUILD: [(202, {**accepted()[1], "node": "gpu2"}), refused(409, "conflict", "node gpu2: busy")],
        BUILDS: [(200, picture(status(current=attempt()))), (200, picture(status(last=INSTALLED)))],
    }
    assert run(["rebuild", "--node", "gpu2"]) == 0
    assert capsys.readouterr().out.startswith("default on gpu2: 0f1e2d3c4 (master) is installed")
    builder.answers[BUILDS] = [(200, picture(status(current=attempt()))), (200, picture(status(last=FAILED)))]
    assert run(["rebuild", "--node", "gpu2"]) == 1
    assert "default on gpu2: compiling failed" in capsys.readouterr().err


def everywhere(code: int, **nodes: Any) -> tuple[int, Any]:
    return code, {"status": "ok" if code < 300 else "error", "message": "", "nodes": nodes}


NOT_THERE = {"status": "error", "message": "there is no build", "type": "build_not_found"}
CONFLICT = {"status": "error", "message": "node gpu3: busy", "type": "conflict"}
SILENT = {"status": "error", "message": "gpu4 is [silent]", "type": "peer_error"}


def test_everywhere_each_node_has_a_line(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    begun = accepted()[1]
    over = picture(status(last=INSTALLED))
    builder.answers = {
        REBUILD: [everywhere(202, gpu1=begun, gpu2=NOT_THERE, gpu3=CONFLICT)],
        BUILDS: [
            everywhere(200, gpu1=picture(status(current=attempt())), gpu3=picture(status(current=attempt()))),
            everywhere(200, gpu1=over, gpu3=over),
        ],
    }
    assert run(["rebuild", "--everywhere"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:34] for line in lines] == [
        "gpu1  0f1e2d3c4 (master) is instal",
        "gpu2  does not have it",
        "gpu3  0f1e2d3c4 (master) is instal",
    ]


def test_everywhere_one_failure_is_exit_1(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    begun = accepted()[1]
    told_of = everywhere(200, gpu1=picture(status(last=INSTALLED)), gpu2=picture(status(last=FAILED)))
    builder.answers = {REBUILD: [everywhere(202, gpu1=begun, gpu2=begun)], BUILDS: [told_of]}
    assert run(["rebuild", "--everywhere"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1] == "gpu2  compiling failed: cmake --build: [x]"
    assert "gpu2:\n  error: one\n  two\nexit status 2" in captured.err
    assert run(["rebuild", "--everywhere", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["nodes"]["gpu2"]["attempt"]["exit_status"]) == ("error", 2)
    builder.answers = {REBUILD: [everywhere(502, gpu1=begun, gpu4=SILENT)], BUILDS: [told_of]}
    assert run(["rebuild", "--everywhere"]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "gpu4  gpu4 is [silent]"
    builder.answers[REBUILD] = [everywhere(202, gpu1={"status": "accepted", "attempt": None})]
    assert run(["rebuild", "--everywhere"]) == 1
    assert capsys.readouterr().out == "gpu1  builds nothing\n"


def test_everywhere_without_waiting(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    builder.answers[REBUILD] = [everywhere(202, gpu1=accepted()[1])]
    assert run(["rebuild", "--everywhere", "--no-wait"]) == 0
    assert capsys.readouterr().out == "gpu1  started\n"


def test_cancel(builder: BuildNode, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"status": "ok", "message": "the rebuild of cuda was told to stop", "cancelled": True}
    builder.answers[CANCEL] = [(200, said), (200, everywhere(200, gpu1=said)[1])]
    assert run(["rebuild", "cuda", "--cancel"]) == 0
    assert capsys.readouterr().out == "the rebuild of cuda was told to stop\n"
    assert run(["rebuild", "--cancel", "--everywhere"]) == 0
    assert capsys.readouterr().out == "gpu1  the rebuild of cuda was told to stop\n"
    assert builder.bodies(CANCEL) == [{"build": "cuda"}, {"node": "*"}]
    assert run(["rebuild", "--cancel", "--force"]) == 2
    assert "Leave out --branch and --force." in capsys.readouterr().err


# --- rollback and builds


def test_rollback(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    said = {"status": "ok", "message": "default is back", "version": asdict(version(OLD))}
    node.answers[ROLLBACK] = (200, said)
    assert run(["rollback"]) == 0
    said_of_it = "back at a1b2c3d4e (master); instances are replaced as their requests end"
    assert capsys.readouterr().out == f"default: {said_of_it}\n"
    assert run(["rollback", "cuda", "--node", "gpu2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"]["commit"] == OLD
    assert [asked.body for asked in node.asked] == [{}, {"build": "cuda", "node": "gpu2"}]
    node.answers[ROLLBACK] = (200, {**said, "node": "gpu2"})
    assert run(["rollback", "cuda", "--node", "gpu2"]) == 0
    assert capsys.readouterr().out == f"cuda on gpu2: {said_of_it}\n"
    node.answers[ROLLBACK] = everywhere(200, gpu1=said, gpu2=NOT_THERE)
    assert run(["rollback", "--everywhere"]) == 0
    assert [line[:16] for line in capsys.readouterr().out.splitlines()] == ["gpu1  back at a1", "gpu2  does not h"]


def test_builds(node: FakeNode, capsys: pytest.CaptureFixture[str]) -> None:
    here = picture(status(versions=(version(live=True),)))
    node.answers["GET /admin/builds"] = (200, here)
    assert run(["builds"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["default", "0f1e2d3c4", "master"]
    assert run(["builds", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["builds"][0]["name"] == "default"
    node.answers[BUILDS] = (200, {**here, "node": "gpu2"})
    assert run(["builds", "--node", "gpu2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["gpu2", "default", "0f1e2d3c4"]
    node.answers[BUILDS] = everywhere(502, gpu1=here, gpu4=SILENT)
    assert run(["builds", "--everywhere"]) == 1
    captured = capsys.readouterr()
    assert captured.out.splitlines()[1].split()[:2] == ["gpu1", "default"]
    assert "gpu4: gpu4 is [silent]" in captured.err


# --- on a terminal


#: Makes the terminal on stdin the controlling one, from which Ctrl-C is a SIGINT, and goes on as ``python -m mesh``.
_ATTACHED = """\
import fcntl, runpy, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
runpy.run_module("mesh", run_name="__main__", alter_sys=True)
"""


def on_a_terminal(builder: BuildNode, *, interrupt_at: bytes | None = None) -> tuple[str, int]:
    """Run `rebuild` on a terminal of its own; press Ctrl-C there once *interrupt_at* is shown."""
    terminal, inside = os.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "20"}
    command = [sys.executable, "-c", _ATTACHED, "rebuild", "--url", builder.url]
    with subprocess.Popen(
        command, stdin=inside, stdout=inside, stderr=inside, cwd=ROOT, env=environment, start_new_session=True
    ) as process:
        os.close(inside)
        written = b""
        while select.select([terminal], [], [], 30)[0]:
            try:
                written += os.read(terminal, 65536)
            except OSError:  # the command has ended
                break
            if interrupt_at is not None and interrupt_at in written:
                os.write(terminal, b"\x03")
                interrupt_at = None
        os.close(terminal)
    return written.decode(), process.returncode


def test_the_bar_is_drawn_and_a_broken_connection_is_taken_up(builder: BuildNode) -> None:
    builder.answers[REBUILD] = [accepted()]
    compiling = attempt(stage=Stage.COMPILING, done=100, total=345)
    builder.scripts = [
        [snapshot(attempt()), told("stage", compiling), log("[100/345] CC a.c"), progress(100, 345), CUT],
        [snapshot(replace(compiling, done=200)), progress(344, 345), told("ended", INSTALLED)],
    ]
    written, code = on_a_terminal(builder)
    assert code == 0
    assert "100/345" in written
    assert "trying again" in written
    assert "━" in written
    last = written[written.rindex("\x1b[2K") :]
    assert "default: 0f1e2d3c4 (master) is installed after 8:12" in last
    assert "100/345" not in last


def test_ctrl_c_ends_the_watching_only(builder: BuildNode) -> None:
    hold = threading.Event()
    builder.answers[REBUILD] = [accepted()]
    builder.scripts = [[snapshot(attempt(stage=Stage.COMPILING)), progress(100, 345), log("a line"), hold]]
    written, code = on_a_terminal(builder, interrupt_at=b"a line")
    hold.set()
    assert code == 130
    assert "the build goes on; 'llama-mesh rebuild --cancel' stops it" in written
    assert "Traceback" not in written
    assert [path for path, _ in builder.asked] == [REBUILD, "GET /admin/builds/events"]


# --- at a real node


async def test_at_a_real_node(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The two ends of the same shapes: nothing of the API is faked here, only what builds."""
    node = Node()
    fake = node.ctx.builds = FakeBuilds(status(versions=(version(live=True),)), status("cuda"))
    async with serving(node) as served:
        monkeypatch.setenv("LLAMESH_URL", f"http://127.0.0.1:{served.port}")
        rebuilding = asyncio.create_task(asyncio.to_thread(run, ["rebuild", "cuda", "--branch", "b1"]))
        await asyncio.wait_for(fake.subscribed.wait(), 10)
        begun = fake.by_name["cuda"].current
        assert begun is not None
        fake.change("stage", replace(begun, stage=Stage.COMPILING))
        fake.feed("progress", build="cuda", attempt=begun.id, stage="compiling", done=1, total=2)
        fake.feed("log", build="cuda", attempt=begun.id, line="[1/2] CC a.c")
        fake.change("ended", replace(INSTALLED, id=begun.id, build="cuda", started_at_wall=begun.started_at_wall))
        assert await asyncio.wait_for(rebuilding, 10) == 0
        captured = capsys.readouterr()
        assert "cuda: compiling 1/2\n[1/2] CC a.c\ncuda: installed\n" in captured.err
        assert "cuda: 0f1e2d3c4 (master) is installed" in captured.out
        for argv, said in (
            (["builds"], "default  0f1e2d3c4  master"),
            (["rollback"], "default: back at a1b2c3d4e"),
            (["rebuild", "--cancel"], "no rebuild of default is in progress"),
            (["rebuild", "--no-wait"], "has started"),
            (["ps"], "Nothing is loaded"),
        ):
            assert await asyncio.to_thread(run, argv) == 0
            assert said in capsys.readouterr().out
        assert await asyncio.to_thread(run, ["rebuild", "nope"]) == 1
        assert "there are: default, cuda" in capsys.readouterr().err
