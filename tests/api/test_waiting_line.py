"""A line of requests on the fake clock: its rounds, their pace, the order, and that nobody is forgotten in it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

import pytest

from mesh.api.waiting_line import FIRST_PAUSE_S, LAST_PAUSE_S, WaitingLine

pytestmark = pytest.mark.looptime


class Line:
    """A line, and nodes that take as many as the test says; *room* None is any number."""

    def __init__(self) -> None:
        self.emptied = 0
        self.line = WaitingLine(self._emptied)
        self.room: int | None = 0
        self.tries: list[tuple[float, int]] = []
        self.served: list[int] = []
        self.expired: list[int] = []
        self.answer_after_s: float | None = None  #: None = at once, inside the call

    def _emptied(self) -> None:
        self.emptied += 1

    def join(self, *places: int, ends_at: float = inf) -> list[Request]:
        requests = [Request(self, place, ends_at) for place in places]
        for request in requests:
            self.line.join(request, again=False)
        return requests


class Request:
    def __init__(self, line: Line, place: int, ends_at: float) -> None:
        self.line = line
        self.place = place
        self.ends_at = ends_at
        self.on_retry: Callable[[], None] = self.ask

    def retry(self) -> None:
        loop = asyncio.get_running_loop()
        self.line.tries.append((loop.time(), self.place))
        if self.line.answer_after_s is None:
            self.on_retry()
        else:
            loop.call_later(self.line.answer_after_s + self.place * 1e-6, self.on_retry)

    def ask(self) -> None:
        if self.line.room == 0:
            self.line.line.join(self, again=True)
            return
        if self.line.room is not None:
            self.line.room -= 1
        self.line.served.append(self.place)

    def expired(self) -> None:
        self.line.expired.append(self.place)


async def test_the_first_round_comes_soon() -> None:
    waits = Line()
    waits.room = None
    waits.join(0)
    await asyncio.sleep(FIRST_PAUSE_S / 2 - 0.001)
    assert waits.tries == []
    await asyncio.sleep(FIRST_PAUSE_S)
    assert waits.served == [0]


@pytest.mark.parametrize("answer_after_s", [None, 0.001])
async def test_full_nodes_are_asked_about_once_a_second_whatever_waits(answer_after_s: float | None) -> None:
    """One tries for all: forty that each try for themselves would be forty uploads a second for nothing."""
    waits = Line()
    waits.answer_after_s = answer_after_s
    waits.join(*range(40))
    await asyncio.sleep(5)
    before = len(waits.tries)
    await asyncio.sleep(60)
    assert 60 <= len(waits.tries) - before <= 120
    assert {place for _, place in waits.tries} == {0}, "the oldest one"
    assert len(waits.line) == 40 or answer_after_s


async def test_the_pause_grows_for_a_single_one_too() -> None:
    """The line is empty while it is tried; that must not begin the pauses anew."""
    waits = Line()
    waits.answer_after_s = 0.001
    waits.join(0)
    await asyncio.sleep(60)
    assert len(waits.tries) < 125
    assert waits.tries[-1][0] - waits.tries[-2][0] >= LAST_PAUSE_S / 2
    assert waits.emptied == 0


async def test_a_node_that_has_room_again_is_filled_within_a_few_rounds() -> None:
    waits = Line()
    waits.join(*range(500))
    await asyncio.sleep(30)
    waits.room = None
    await asyncio.sleep(2 * LAST_PAUSE_S + 10 * FIRST_PAUSE_S)
    assert waits.served == list(range(500))


async def test_at_first_one_then_twice_as_many() -> None:
    """A thousand at once on a node that has room for one would be no better than a thousand that ask by themselves."""
    waits = Line()
    waits.room = None
    waits.join(*range(20))
    await asyncio.sleep(10 * FIRST_PAUSE_S)
    times = [time for time, _ in waits.tries]
    assert [times.count(time) for time in sorted(set(times))] == [1, 2, 4, 8, 5]


async def test_whoever_is_turned_away_ends_the_rush() -> None:
    waits = Line()
    waits.room = 20
    waits.join(*range(100))
    await asyncio.sleep(10)
    assert waits.served == list(range(20))
    assert len(waits.tries) < 20 + 32 + 20, "of one rush some come back, then one at a time"


@pytest.mark.parametrize("answer_after_s", [None, 0.001])
async def test_who_came_first_goes_first(answer_after_s: float | None) -> None:
    """Also when several of one round are turned away and come back, and when newcomers are there by then."""
    waits = Line()
    waits.answer_after_s = answer_after_s
    waits.room = 4
    waits.join(*range(12))
    for step in range(20):
        await asyncio.sleep(2.0)
        waits.join(100 + step)
        waits.room = (0, 3, 1)[step % 3]
    waits.room = None
    await asyncio.sleep(5)
    assert waits.served == [*range(12), *range(100, 120)]


async def test_those_of_one_round_come_back_in_their_order_however_late() -> None:
    waits = Line()
    requests = waits.join(*range(4))
    await asyncio.sleep(0)
    for request in requests:
        waits.line.leave(request)
    for request in reversed(requests):  # the answers come in any order
        waits.line.join(request, again=True)
    waits.join(9)
    waits.room = None
    await asyncio.sleep(5)
    assert waits.served == [0, 1, 2, 3, 9]


async def test_the_wait_is_everybodys_own() -> None:
    """Whoever has waited long enough is told so with the next round, and is not tried again."""
    waits = Line()
    now = asyncio.get_running_loop().time()
    waits.join(0)
    waits.join(1, 2, ends_at=now + 5.0)
    waits.join(3, ends_at=now + 0.01)
    waits.join(4, ends_at=now + 20.0)
    await asyncio.sleep(FIRST_PAUSE_S)
    assert waits.expired == [3]
    await asyncio.sleep(5.0 + LAST_PAUSE_S - FIRST_PAUSE_S)
    assert waits.expired == [3, 1, 2]
    assert 3 not in {place for _, place in waits.tries}
    waits.room = None
    await asyncio.sleep(3.0)
    assert waits.served == [0, 4]


async def test_who_has_left_is_not_tried() -> None:
    waits = Line()
    requests = waits.join(0, 1, 2)
    waits.line.leave(requests[0])
    waits.line.leave(requests[0])
    waits.room = None
    await asyncio.sleep(1)
    assert waits.served == [1, 2]


async def test_one_whose_end_is_anothers_end_too() -> None:
    """What is tried or told may end others of the same round: those have left."""
    waits = Line()
    first, second, _ = waits.join(0, 1, 2)
    first.on_retry = lambda: waits.line.leave(second)
    waits.room = None
    await asyncio.sleep(1)
    assert [place for _, place in waits.tries] == [0, 2]


async def test_a_bug_in_one_does_not_keep_the_others_waiting(caplog: pytest.LogCaptureFixture) -> None:
    """No line without a timer, or all of it would wait for ever."""

    def fail() -> None:
        raise ValueError("a bug")

    waits = Line()
    errors: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context["exception"]))
    first, *_ = waits.join(0, 1, 2, 3)
    first.on_retry = fail
    waits.room = None
    await asyncio.sleep(2)
    assert waits.served == [1, 2, 3]
    assert len(errors) == 1


async def test_an_empty_line_ends_once_and_has_no_timer() -> None:
    waits = Line()
    waits.room = None
    waits.join(0)
    await asyncio.sleep(10)
    assert waits.emptied == 1
    assert waits.line._timer is None
    (request,) = waits.join(1)
    waits.line.leave(request)
    await asyncio.sleep(10)
    assert waits.emptied == 2


async def test_a_line_ends_though_more_arrive_than_one_round_lets_go() -> None:
    """A rate that one node can carry must not keep a line alive that formed in a bad moment."""
    waits = Line()
    waits.join(*range(200))
    await asyncio.sleep(5)
    waits.room = None
    place = 1000
    for _ in range(300):  # 2000 a second
        await asyncio.sleep(0.01)
        for _ in range(20):
            waits.join(place)
            place += 1
    assert len(waits.line) <= 2000 * FIRST_PAUSE_S
