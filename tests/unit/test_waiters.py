"""Answers that wait for the log: those whose time is over are found wherever they stand."""

from typing import Any

from bus_kv.core.timers import NEVER_NS
from nodes.machine.waiters import Waiters, Waiting


def waiting(seq: int, deadline_ns: int) -> Waiting[Any]:
    return Waiting(seq, 0, deadline_ns, lambda _: None, seq, False)


def test_the_late_are_found_behind_those_with_more_time() -> None:
    waiters = Waiters()
    for seq, deadline_ns in enumerate([30, 10, 20]):
        waiters.add(waiting(seq, deadline_ns))
    assert waiters.next_ns == 10
    assert [w.seq for w in waiters.take_late(20)] == [1, 2]
    assert waiters.next_ns == 30
    assert [w.seq for w in waiters.take_late(30)] == [0]
    assert waiters.next_ns == NEVER_NS


def test_an_answer_in_time_delays_nobody() -> None:
    waiters = Waiters()
    waiters.add(waiting(1, 10))
    waiters.add(waiting(2, 20))
    waiters.release(1, 0)
    assert waiters.take_late(10) == []
    assert waiters.next_ns == 20
    waiters.release(2, 0)
    waiters.add(waiting(3, 50))
    assert waiters.next_ns == 50
