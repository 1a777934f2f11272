"""Watching a build to its end: over events, over connections that break, over restarts, and by asking again."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import msgspec
import pytest
from rich.console import Console

from mesh.build.status import Attempt, Outcome, Stage
from mesh.cli import build_watch
from mesh.cli.build_view import BuildView
from mesh.cli.build_watch import LostError, as_told, events, follow, poll
from mesh.cli.failure import CliError
from mesh.cli.node import Node
from tests.cli.build_node import CUT, END, PING, BuildNode, log, picture, progress, snapshot, told
from tests.fakes_builds import STARTED_AT, attempt, ended, status

BUILDS = "POST /admin/builds"


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it would have waited, each time."""
    found: list[float] = []
    monkeypatch.setattr(build_watch, "pause", found.append)
    return found


@pytest.fixture
def shown() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def view(shown: io.StringIO) -> Iterator[BuildView]:
    with BuildView(as_json=False, console=Console(file=shown, width=200)) as found:
        yield found


def watched(builder: BuildNode, view: BuildView, begun: Attempt | None = None) -> Any:
    return follow(Node(builder.url), asdict(begun or attempt()), view)


def test_it_is_shown_until_it_has_ended(builder: BuildNode, view: BuildView, shown: io.StringIO) -> None:
    other = attempt(9, "default", Stage.TESTING)
    builder.scripts = [
        [
            snapshot(attempt()),
            PING,
            log("Cloning"),
            told("stage", attempt(stage=Stage.COMPILING)),
            progress(1, 2),
            log("not of this one", attempt=9),
            progress(2, 2, attempt=9),
            told("stage", other),
            ("dropped", {"count": 3}),
            ("of a newer node", {}),
            told("ended", ended(Outcome.INSTALLED)),
            log("after the end"),
        ]
    ]
    assert msgspec.convert(watched(builder, view), Attempt) == ended(Outcome.INSTALLED)
    assert builder.asked == [("GET /admin/builds/events", "build=default")]
    assert shown.getvalue().splitlines() == [
        "default: fetching",
        "Cloning",
        "default: compiling",
        "default: compiling 1/2",
        "[... 3 events dropped: this end is too slow]",
        "default: installed",
    ]


def test_one_that_has_ended_already_is_in_the_picture(builder: BuildNode, view: BuildView) -> None:
    builder.scripts = [[snapshot(None, ended(Outcome.UNCHANGED)), END]]
    assert watched(builder, view)["outcome"] == "unchanged"
    assert watched(builder, view, ended(Outcome.DISABLED))["outcome"] == "disabled"
    assert len(builder.asked) == 1, "what ended at once is not asked for"


@pytest.mark.parametrize("end", [CUT, END])
def test_a_connection_that_breaks_is_taken_up_again(
    end: str, builder: BuildNode, view: BuildView, shown: io.StringIO, pauses: list[float]
) -> None:
    """What happened meanwhile is in the next picture; the pauses begin anew with news."""
    first = [snapshot(attempt()), log("one"), end]
    builder.scripts = [
        first,
        [CUT],
        [CUT],
        [snapshot(attempt(stage=Stage.COMPILING, done=7, total=9, log_tail=("one", "missed"))), log("two"), CUT],
        [snapshot(None, ended(Outcome.INSTALLED)), END],
    ]
    assert watched(builder, view)["outcome"] == "installed"
    assert pauses == [1.0, 2.0, 4.0, 1.0]
    lines = shown.getvalue().splitlines()
    assert [line for line in lines if "trying again" not in line] == [
        "default: fetching",
        "one",
        "default: compiling",
        "default: compiling 7/9",
        "missed",
        "two",
        "default: installed",
    ]
    assert any("trying again" in line for line in lines)


def test_a_connection_that_is_dead_is_given_up(
    builder: BuildNode, view: BuildView, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No end ever comes from a machine that vanished; only the pings are missing."""
    monkeypatch.setattr(build_watch, "_SILENCE_S", 0.1)
    hold = threading.Event()
    too_late = told("ended", ended(Outcome.FAILED))
    builder.scripts = [[snapshot(attempt()), hold, too_late], [snapshot(None, ended(Outcome.INSTALLED)), END]]
    assert watched(builder, view)["outcome"] == "installed"
    hold.set()


def test_a_node_that_stays_away_is_given_up(builder: BuildNode, view: BuildView, pauses: list[float]) -> None:
    builder.scripts = [[snapshot(attempt()), CUT]]
    with pytest.raises(CliError, match="the build may go on, but it cannot be watched") as caught:
        watched(builder, view)
    assert "llama-mesh builds" in (caught.value.fix or "")
    assert pauses == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_a_refusal_is_no_reason_to_try_again(builder: BuildNode, view: BuildView, pauses: list[float]) -> None:
    class Refusing(Node):
        __slots__ = ()

        def stream(self, *args: Any, **options: Any) -> Any:
            raise CliError("Unauthorized", http_status=401)

    with pytest.raises(CliError, match="Unauthorized"):
        follow(Refusing(builder.url), asdict(attempt()), view)
    assert pauses == []


@pytest.mark.parametrize(
    ("restarted_s", "current", "said"),
    [
        (5.0, None, "started anew, which ended the build"),
        (5.0, attempt(1, started_at_wall=STARTED_AT + 9), "started anew, which ended the build"),
        (-5.0, attempt(2), "another build came after it"),
    ],
    ids=["restarted", "restarted and builds again, with the same number", "another one"],
)
def test_what_is_not_known_any_more(
    restarted_s: float, current: Attempt | None, said: str, builder: BuildNode, view: BuildView
) -> None:
    after = snapshot(current, started_at=STARTED_AT + restarted_s) if current else (
        "snapshot", picture(status(), started_at=STARTED_AT + restarted_s)
    )  # fmt: skip
    builder.scripts = [[snapshot(attempt()), CUT], [after]]
    with pytest.raises(LostError, match=said):
        watched(builder, view)


def test_as_told_knows_an_attempt_by_number_and_start() -> None:
    begun = asdict(attempt(3))
    assert as_told(picture(status(current=attempt(3, stage=Stage.TESTING))), begun)["stage"] == "testing"
    assert as_told(picture(status(current=attempt(4), last=ended(Outcome.FAILED, 3))), begun)["outcome"] == "failed"
    with pytest.raises(LostError):
        as_told(picture(status(current=attempt(3, started_at_wall=STARTED_AT + 1))), begun)
    with pytest.raises(LostError):
        as_told(picture(status("cuda", current=attempt(3, "cuda"))), begun)


def test_events_as_the_standard_has_them() -> None:
    lines = [
        ": ping",
        "",
        "event: a",
        "id: 7",
        'data: {"x":',
        "data:1}",
        "",
        'data:{"y": 2}',
        "",
        "event: cut",
        "data: 1",
    ]
    assert list(events(lines)) == [("a", {"x": 1}), ("message", {"y": 2})]


# --- other nodes


def pictures(**nodes: Any) -> tuple[int, Any]:
    return 200, {"status": "ok", "message": "", "nodes": nodes}


DEAD = {"status": "error", "message": "n is silent", "type": "peer_error"}


def test_another_node_is_asked_until_it_has_ended(
    builder: BuildNode, view: BuildView, shown: io.StringIO, pauses: list[float]
) -> None:
    now = [attempt(), attempt(stage=Stage.COMPILING, done=1, total=2)]
    last = picture(status(last=ended(Outcome.INSTALLED)))
    builder.answers[BUILDS] = [(200, {**picture(status(current=a)), "node": "gpu2"}) for a in now] + [(200, last)]
    found = poll(Node(builder.url), "gpu2", {"gpu2": asdict(attempt())}, view)
    assert found["gpu2"]["outcome"] == "installed"
    assert builder.bodies(BUILDS) == [{"node": "gpu2"}] * 3
    assert pauses == [2.0, 2.0]
    assert shown.getvalue().splitlines() == [
        "gpu2: fetching", "gpu2: compiling", "gpu2: compiling 1/2", "gpu2: installed"
    ]  # fmt: skip


def test_the_lines_of_another_node_are_shown_as_its_tail_moves_on_each_once(
    builder: BuildNode, view: BuildView, shown: io.StringIO
) -> None:
    lines = [f"[{number}/60] CC" for number in range(60)]
    tails = [lines[:2], lines[:2], lines[:40], lines[20:]]
    going = [(200, picture(status(current=attempt(log_tail=tuple(tail))))) for tail in tails]
    last = (200, picture(status(last=ended(Outcome.FAILED, log_tail=("error: one",)))))
    builder.answers[BUILDS] = [*going[:2], (502, {}), *going[2:], last]
    poll(Node(builder.url), "gpu2", {"gpu2": asdict(attempt())}, view)
    told_of = ["no answer from gpu2; asking again"]
    assert shown.getvalue().splitlines() == [
        "gpu2: fetching", *lines[:2], *told_of, *lines[2:], "gpu2: failed"
    ], "those of a failure are told at the end"  # fmt: skip


def test_the_lines_of_several_nodes_are_not_mixed(builder: BuildNode, view: BuildView, shown: io.StringIO) -> None:
    going = picture(status(current=attempt(log_tail=("a line",))))
    over = picture(status(last=ended(Outcome.INSTALLED)))
    builder.answers[BUILDS] = [pictures(gpu1=going, gpu2=going), pictures(gpu1=over, gpu2=over)]
    poll(Node(builder.url), "*", {name: asdict(attempt()) for name in ("gpu1", "gpu2")}, view)
    assert "a line" not in shown.getvalue()


def test_all_nodes_are_asked_at_once_each_to_its_own_end(builder: BuildNode, view: BuildView) -> None:
    going = picture(status(current=attempt()))
    builder.answers[BUILDS] = [
        pictures(gpu1=going, gpu2=going, gpu3=going),
        pictures(gpu1=picture(status(last=ended(Outcome.INSTALLED))), gpu2=DEAD, gpu3=going),
        (502, {"status": "error", "message": "no"}),
        pictures(
            gpu1=picture(status(current=attempt(2))), gpu2=picture(status(last=ended(Outcome.FAILED))), gpu3=going
        ),
        pictures(gpu3=picture(status(), started_at=STARTED_AT + 1)),
    ]
    found = poll(Node(builder.url), "*", {f"gpu{n}": asdict(attempt()) for n in (1, 2, 3)}, view)
    assert {name: found[name]["outcome"] for name in found} == {
        "gpu1": "installed", "gpu2": "failed", "gpu3": "unknown"
    }  # fmt: skip
    assert "started anew" in found["gpu3"]["error"]
    assert len(builder.asked) == 5, "who has ended is not asked for again"


def test_a_node_that_is_gone_is_given_up_in_the_end(builder: BuildNode, view: BuildView, pauses: list[float]) -> None:
    builder.answers[BUILDS] = [pictures(gpu1=DEAD)]
    found = poll(Node(builder.url), "*", {"gpu1": asdict(attempt()), "gpu2": asdict(attempt())}, view)
    assert [(found[name]["outcome"], found[name]["error"]) for name in ("gpu1", "gpu2")] == [
        ("unknown", "n is silent"),
        ("unknown", "the node does not answer"),
    ]
    assert len(pauses) == 14
