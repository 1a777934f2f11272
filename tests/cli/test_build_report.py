"""What is said of ended attempts, and the table of builds."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mesh.build.status import Comparison, Outcome, Speed, Stage
from mesh.cli.build_report import fix, headline, is_good, print_builds, print_speeds, print_tail
from tests.build.project import BROKEN, Project, bench, spec_in, until
from tests.cli.build_node import picture
from tests.fakes_builds import COMPARISON, NEW, OLD, STARTED_AT, attempt, ended, status, version


@pytest.mark.parametrize(
    ("outcome", "good", "said"),
    [
        (Outcome.INSTALLED, True, "0f1e2d3c4 (master) is installed after 8:12; instances are replaced"),
        (Outcome.UNCHANGED, True, "0f1e2d3c4 (master) runs already; nothing was changed"),
        (Outcome.DISABLED, False, "nothing is configured to be built"),
        (Outcome.REJECTED, False, "0f1e2d3c4 (master) was built, but rejected: [why]"),
        (Outcome.FAILED, False, "compiling failed: [why]"),
        (Outcome.CANCELLED, False, "cancelled while compiling"),
    ],
)
def test_every_outcome_has_a_sentence(outcome: Outcome, good: bool, said: str) -> None:
    found = asdict(ended(outcome, commit=NEW, error="[why]"))
    assert is_good(found) == good
    assert headline(found).startswith(said)
    assert good or fix(found)


async def test_why_one_was_skipped_as_a_node_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reason is a note, not an error: nothing went wrong."""
    project = Project(tmp_path / "upstream")
    commit = project.commit(BROKEN)
    async with bench(spec_in(tmp_path, project)) as node:
        assert (await node.rebuild()).outcome is Outcome.FAILED
        events = node.manager.subscribe()
        node.manager.start()
        event = await asyncio.wait_for(until(aiter(events), "ended"), 30)
    skipped: Any = event.data["attempt_state"]
    assert skipped["outcome"] == "skipped"
    why = f"{commit[:9]} (master) was skipped: {commit[:7]} is held back (command failed (exit status: "
    assert headline(skipped).startswith(why)
    assert headline(skipped).endswith("; llama-mesh rebuild default tries it again")
    assert not is_good(skipped)
    print_speeds(skipped)
    assert capsys.readouterr().out == "", "the note has been told"


def test_what_is_not_known_is_left_out() -> None:
    assert headline(asdict(ended(Outcome.FAILED))) == "compiling failed: no reason was given"
    assert headline(asdict(ended(Outcome.SKIPPED))).endswith("was skipped: no reason was given")
    assert headline(asdict(ended(Outcome.UNCHANGED, ref=None))) == "- runs already; nothing was changed"


def test_the_fix_names_the_build() -> None:
    assert "'llama-mesh rebuild' tries" in fix(asdict(ended(Outcome.FAILED)))
    assert "'llama-mesh rebuild cuda' tries" in fix(asdict(ended(Outcome.CANCELLED, build="cuda")))
    assert "llama_cpp.repo_url" in fix(asdict(ended(Outcome.DISABLED)))
    assert "builds.cuda.repo_url" in fix(asdict(ended(Outcome.DISABLED, build="cuda")))


@pytest.mark.parametrize(
    ("exit_status", "said"), [(2, "exit status 2"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_the_tail_and_how_it_ended(exit_status: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_tail(asdict(ended(Outcome.FAILED, exit_status=exit_status, log_tail=("\x1b[31m[red] x\x1b[0m", "y"))))
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["  [red] x", "  y", f"{said}, 2 last lines above"]
    assert captured.out == ""


def test_no_tail_is_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_tail(asdict(ended(Outcome.FAILED)))
    print_tail(asdict(ended(Outcome.CANCELLED, log_tail=("[7/9] CC a.c",))))
    print_tail(asdict(ended(Outcome.FAILED, exit_status=1)))
    assert capsys.readouterr().err == "exit status 1\n"


def test_speeds_old_and_new(capsys: pytest.CaptureFixture[str]) -> None:
    comparisons = (
        COMPARISON,
        Comparison("[big]", None, Speed(99.96, 7.0)),
        Comparison("z", Speed(0.0, 1.0), Speed(5, 2)),
    )
    print_speeds(asdict(ended(Outcome.INSTALLED, comparisons=comparisons, notes=("tested on the CPU",))))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ") for line in lines[1:2]] == [["tiny model", "1,200 → 1,320 (+10%)", "45.0 → 44.0 (-2%)"]]
    assert lines[2].split() == ["[big]", "100.0", "7.0"]
    assert lines[3].split() == ["z", "5.0", "1.0", "→", "2.0", "(+100%)"]
    assert lines[4] == "note: tested on the CPU"


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip()]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    gone = "ffff000011112222"
    first = status(
        live_commit=NEW,
        versions=(
            version(live=True, built_at_wall=STARTED_AT - 7200 + 65),
            version(OLD[:8], previous=True, built_at_wall=None, ref=None),
        ),
        held={OLD: "rolled back", gone: "too slow"},
    )
    by_hand = status("cuda", live_commit=OLD, enabled=False)
    print_builds(
        {"": picture(first, by_hand, status("new", live_commit=None), status("off", live_commit=None, enabled=False))}
    )
    captured = capsys.readouterr()
    assert cells(captured.out) == [
        ["BUILD", "COMMIT", "REF", "BUILT", "STATE", "BINARY"],
        ["default", NEW[:9], "master", "2h ago", "live", "/opt/build-0f1e2d3/bin/llama-server"],
        ["default", OLD[:8], "-", "-", "previous, held", "/opt/build-a1b2c3d/bin/llama-server"],
        ["default", gone[:9], "-", "-", "held", "-"],
        ["cuda", OLD[:9], "-", "-", "live", "/opt/cuda/llama-server"],
        ["new", "-", "-", "-", "not built", "/opt/new/llama-server"],
        ["off", "-", "-", "-", "disabled", "/opt/off/llama-server"],
    ]
    assert captured.err.splitlines() == [
        f"default: {OLD[:9]} is held: rolled back",
        f"default: {gone[:9]} is held: too slow",
    ]


def test_the_nodes_of_a_mesh_and_what_goes_on_there(capsys: pytest.CaptureFixture[str]) -> None:
    busy: Any = status(current=attempt(stage=Stage.COMPILING, done=3, total=9))
    failed = status(last=ended(Outcome.FAILED, seconds=5, error="no [space] left"))
    well = status(last=ended(Outcome.UNCHANGED, error=None))
    print_builds({"gpu1": picture(busy), "gpu2": picture(failed), "gpu3": picture(well)})
    captured = capsys.readouterr()
    assert [row[:2] for row in cells(captured.out)] == [
        ["NODE", "BUILD"], ["gpu1", "default"], ["gpu2", "default"], ["gpu3", "default"]
    ]  # fmt: skip
    assert captured.err.splitlines() == [
        "gpu1 default: compiling 3/9, for 1:05; 'llama-mesh rebuild' watches it",
        "gpu2 default, 1m ago: compiling failed: no [space] left",
    ]


def test_a_node_that_builds_nothing_says_how_it_could(capsys: pytest.CaptureFixture[str]) -> None:
    print_builds({"": picture()})
    assert "llama_cpp.repo_url" in capsys.readouterr().out
