"""The swap benchmark's pure parts: log reader, statistics, bound, verdicts. The rest takes minutes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from benchmarks import swap, swap_log, swap_report
from benchmarks.native import BenchmarkError
from benchmarks.swap_log import Life, Served, Story
from benchmarks.swap_report import Storm, Swap
from benchmarks.swap_servers import Launch


def line(at: float, message: str, **fields: object) -> str:
    """One line of the node's log, *at* seconds after the epoch."""
    stamp = datetime.fromtimestamp(at, UTC).isoformat().replace("+00:00", "Z")
    return json.dumps({"timestamp": stamp, "level": "INFO", "fields": {"message": message, **fields}})


def answered(at: float, instance: str, queue_ms: float | None, duration_ms: float) -> str:
    fields = {"path": "/v1/chat/completions", "instance": instance, "model": instance[0], "duration_ms": duration_ms}
    return line(at, "request", **fields, **({} if queue_ms is None else {"queue_ms": queue_ms}))


#: a serves from 1 to 2 and is swapped for b, which is ready at 3
SWAP_LOG = (
    line(0.0, "node started"),
    line(0.5, "instance started", instance="a-1", model="a"),
    line(1.0, "instance ready", instance="a-1"),
    answered(1.5, "a-1", 700.0, 1100.0),
    "Traceback (most recent call last):",
    '"text"',
    line(2.01, "draining", instance="a-1"),
    line(2.11, "instance stopped", instance="a-1"),
    line(2.12, "instance started", instance="b-2", model="b"),
    line(3.0, "instance ready", instance="b-2"),
    answered(3.6, "b-2", None, 100.0),
    line(3.7, "request", path="/admin/instances", duration_ms=1.0),
)


def storm(story: Story, *, keeps_up: bool = True, failures: Sequence[str] = (), tenure_s: float = 3.0) -> Storm:
    seen = [request.wait_s + 0.1 for request in story.served]
    return Storm("test", 20.0, len(seen) + len(failures), tenure_s, keeps_up, seen, failures, story)


def two_turns(b_waits_s: float) -> Story:
    """a is ready at 1, b's only request comes at 2; b loads for 1 s and then takes it. Each request takes 0.5 s."""
    b_ready = 2 + b_waits_s
    lives = (
        Life("a-1", "a", 0.0, 1.0, b_ready - 1.2, b_ready - 1.1),
        Life("b-2", "b", b_ready - 1.0, b_ready),
    )
    return Story(lives, (Served("a", "a-1", 0.0, 1.0, 1.5), Served("b", "b-2", 2.0, b_ready, b_ready + 0.5)))


# -- the log


def test_the_log_tells_lives_and_requests() -> None:
    story = swap_log.read(SWAP_LOG)
    assert story.lives == (Life("a-1", "a", 0.5, 1.0, 2.01, 2.11), Life("b-2", "b", 2.12, 3.0))
    first, second = story.served
    assert (first.model, first.instance) == ("a", "a-1")
    assert (first.arrived_at, first.admitted_at, first.ended_at) == pytest.approx((0.4, 1.1, 1.5))
    assert (first.wait_s, first.service_s) == pytest.approx((0.7, 0.4))
    assert second.wait_s == 0  # a request that did not queue


def test_the_parts_of_a_swap_add_up() -> None:
    parts = swap_log.swap_parts(swap_log.read(SWAP_LOG), sent_at=2.0, first_token_at=3.2)
    assert parts == pytest.approx({"decide": 0.01, "stop": 0.1, "start": 0.01, "load": 0.88, "answer": 0.2})
    assert sum(parts.values()) == pytest.approx(1.2)


@pytest.mark.parametrize("missing", ["draining", "instance stopped", "instance ready"])
def test_parts_that_the_log_does_not_show_are_not_invented(missing: str) -> None:
    log = [text for text in SWAP_LOG if f'"{missing}"' not in text]
    assert swap_log.swap_parts(swap_log.read(log), 2.0, 3.2) == {}


# -- statistics


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(200, 0, -1)]
    assert swap_report.percentile(values, 99) == 198
    assert swap_report.percentile(values, 50) == 100
    assert swap_report.percentile([7.0], 99) == 7


def test_a_budget_holds_one_model_and_never_two() -> None:
    for figures in ([256, 256], [256, 300, 280], [256, 511]):
        budget = swap_report.budget_for_one(figures)
        assert max(figures) <= budget < 2 * min(figures)
    with pytest.raises(BenchmarkError, match="256 and 512 MiB"):
        swap_report.budget_for_one([256, 512])


def test_the_swap_is_judged_by_the_difference_of_the_medians() -> None:
    bare = [Swap("a", s, {"stop": 0.05, "load": s}) for s in (0.5, 0.6, 0.7)]
    found = swap_report.swap_summary([Swap("a", s) for s in (0.6, 0.65, 5.0)], bare)
    assert found["difference_s"] == pytest.approx(0.05)
    assert found["goal_met"]
    assert found["paired_difference_s"]["max"] == pytest.approx(4.3)
    assert found["parts_s"] == {"mesh": {}, "bare": {"stop": 0.05, "load": 0.6}}
    assert not swap_report.swap_summary([Swap("a", s + 0.11) for s in (0.5, 0.6, 0.7)], bare)["goal_met"]


# -- the bound


def test_the_bound_is_the_sum_of_the_longest_pieces() -> None:
    bound = swap_report.bound(two_turns(4.0), tenure_s=3.0)
    assert (bound.load_s, bound.drain_s, bound.stop_s) == pytest.approx((1.0, 0.5, 0.1))
    assert bound.stated_s == pytest.approx(1 + 3 + 0.5 + 0.1 + 1)
    assert bound.full_s == pytest.approx(bound.stated_s + 0.5 + 0.1)


def test_a_drain_before_the_exit_is_no_part_of_the_stop() -> None:
    lives = (Life("a-1", "a", 0.0, 1.0, 2.0, 4.1),)
    story = Story(lives, (Served("a", "a-1", 1.0, 1.0, 4.0),))
    assert swap_report.bound(story, 0.0).stop_s == pytest.approx(0.1)


def test_waiting_behind_requests_of_the_own_model_is_no_wait_for_a_turn() -> None:
    lives = (Life("a-1", "a", 0.0, 1.0, 5.0, 5.1), Life("b-2", "b", 5.1, 6.0, 9.0, 9.1), Life("a-3", "a", 9.1, 10.0))
    served = (
        Served("a", "a-1", 0.0, 1.0, 2.0),
        Served("a", "a-1", 0.1, 4.0, 5.0),  # behind others
        Served("b", "b-2", 4.5, 6.0, 9.0),
        Served("a", "a-3", 0.2, 10.0, 11.0),  # comes first of those left; until 4.0 others of its own went ahead
        Served("a", "a-3", 7.0, 10.5, 11.0),
    )
    assert swap_report.turn_waits(Story(lives, served)) == pytest.approx([1.0, 1.5, 6.0])
    assert swap_report.throughput_per_s(Story(lives, served)) == pytest.approx(5 / (4 + 3 + 1))


# -- verdicts


def test_a_storm_within_its_bound_has_no_problems() -> None:
    found = swap_report.storm_summary(storm(two_turns(4.0)))
    assert found["problems"] == []
    assert (found["swaps"], found["answered"], found["served_nobody"]) == (1, 2, 0)
    assert found["longest_turn_wait_s"] == found["wait_s"]["longest"] == pytest.approx(4.0)


def test_a_wait_beyond_the_bound_is_a_problem() -> None:
    found = swap_report.storm_summary(storm(two_turns(7.0)))
    assert [problem.split(" 7.00 s")[0] for problem in found["problems"]] == [
        "a model waited for its turn",
        "a request waited",
    ]


def test_whole_waits_are_judged_only_where_the_machine_keeps_up() -> None:
    story = two_turns(4.0)
    behind = Served("b", "b-2", 2.0, 20.0, 20.5)  # its model serves meanwhile
    story = Story(story.lives, (*story.served, behind))
    assert swap_report.storm_summary(storm(story, keeps_up=False))["problems"] == []
    (problem,) = swap_report.storm_summary(storm(story))["problems"]
    assert problem.startswith("a request waited 18.00 s")


def test_a_model_that_makes_room_for_itself_is_a_problem() -> None:
    lives = (Life("a-1", "a", 0.0, 1.0, 2.0, 2.1), Life("a-2", "a", 2.1, 3.0), Life("a-3", "a", 9.0, 10.0))
    served = tuple(Served("a", f"a-{n}", at, at, at + 0.5) for n, at in ((1, 1.0), (2, 3.0), (3, 10.0)))
    found = swap_report.storm_summary(storm(Story(lives, served)))
    assert found["restarts"] == 1  # a-2 made no room: it crashed
    assert found["problems"] == ["1 times a model made room and was itself started again, next"]


def test_a_request_that_failed_or_vanished_is_a_problem() -> None:
    story = two_turns(4.0)
    (problem,) = swap_report.storm_summary(storm(story, failures=["request 7: 503"]))["problems"]
    assert "request 7: 503" in problem
    vanished = Storm("test", 20.0, 3, 3.0, True, [4.1, 1.1], [], story)
    assert swap_report.storm_summary(vanished)["problems"] == ["only 2 of 3 requests were answered"]


def test_a_storm_in_which_all_failed_is_still_reported() -> None:
    found = swap_report.storm_summary(storm(Story((), ()), failures=["request 0: refused"]))
    assert found["problems"]
    assert "FAILED: 1 requests failed" in swap_report.table({"swap": None, "storms": [found]})


def test_the_exit_status() -> None:
    good: dict[str, list[str]] = {"problems": []}
    bad = {"problems": ["a request waited"]}
    missed = {"goal_met": False}
    assert swap.status({"swap": {"goal_met": True}, "storms": [good]}, check=True) == 0
    assert swap.status({"swap": missed, "storms": [good]}, check=False) == 0
    assert swap.status({"swap": missed, "storms": []}, check=True) == 1
    assert swap.status({"swap": None, "storms": [good, bad]}, check=False) == 1


def test_the_table_says_everything_that_matters() -> None:
    times = [Swap("a", 0.5, {"stop": 0.05}), Swap("b", 0.7, {"stop": 0.05})]
    slow = swap_report.storm_summary(storm(two_turns(7.0)))
    text = swap_report.table({"swap": swap_report.swap_summary(times, times), "storms": [slow]})
    for part in ("difference of the medians +0 ms", "met", "1 swaps", "bound 6.20 s", "FAILED: a model waited"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_same_command_on_another_port() -> None:
    launch = Launch(("llama-server", "--port", "1", "-m", "x"), {})
    assert launch.on_port(22) == ("llama-server", "--port", "22", "-m", "x")
