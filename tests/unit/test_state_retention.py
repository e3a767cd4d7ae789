"""What the state on disk forgets, and what it must not."""

from pathlib import Path

import pytest

from bus_kv.core.machine import RequestsOf
from tests.support.state import State, Writer, open_state, puts


def keys(*numbers: int) -> list[bytes]:
    return [f"key-{number:06}".encode() for number in numbers]


@pytest.fixture
def writer() -> Writer:
    return Writer()


def test_old_operations_go_by_log_time(tmp_path: Path, writer: Writer) -> None:
    state = State(tmp_path, oplog_keep_s=2)
    state.do(writer.fold(puts(keys(1)), time_ms=1000))
    state.do(writer.fold(puts(keys(2)), time_ms=9000))
    state.do(Writer("s2").fold(puts(keys(1)), time_ms=9000))
    state.store.close()
    state = State(tmp_path, oplog_keep_s=2)
    state.do(writer.fold(puts(keys(3)), time_ms=10_500))
    state.store.close()
    state = State(tmp_path)
    assert [row[4] for row in state.contents("s1").oplog] == keys(2, 3)
    assert [row[4] for row in state.contents("s2").oplog] == keys(1)
    assert len(state.records(keys(1, 2, 3))) == 3
    state.store.close()


def test_old_operations_go_by_size(tmp_path: Path, writer: Writer) -> None:
    state = State(tmp_path)
    for number in range(6):
        state.do(writer.fold(puts(keys(number), b"v" * 10_000), time_ms=number))
    state.store.close()
    state = State(tmp_path, oplog_keep_bytes=25_000)
    state.do(writer.fold(puts(keys(9)), time_ms=9))
    state.store.close()
    state = State(tmp_path)
    assert [row[4] for row in state.contents("s1").oplog] == keys(4, 5, 9)
    state.store.close()


def test_forgotten_requests_leave_their_greatest_number(tmp_path: Path, writer: Writer) -> None:
    for last, time_ms in ((10, 0), (20, 1000), (30, 5000)):
        state = State(tmp_path, dedup_window_ms=3000)
        batch = puts(keys(1), client="c", numbers=range(last, last + 1))
        idle = puts(keys(2), client=f"idle-{last}", numbers=range(last, last + 1))
        state.do(writer.fold(batch, idle, time_ms=time_ms))
        state.store.close()
    state = State(tmp_path)
    assert state.ask(RequestsOf(1, "s1", "c", 0, 99))[0] == 20
    assert [row[4] for row in state.ask(RequestsOf(1, "s1", "c", 0, 99))[1:]] == [5]
    assert sorted(state.store.clients("s1")) == [
        ("c", 30), ("idle-10", 10), ("idle-20", 20), ("idle-30", 30),
    ]  # fmt: skip
    state.store.close()


def test_of_many_clients_the_latest_are_remembered(tmp_path: Path, writer: Writer) -> None:
    state = State(tmp_path)
    for number in range(20):
        batch = puts(keys(1), client=f"c{number}", numbers=range(number, number + 1))
        state.do(writer.fold(batch, time_ms=number))
    state.store.close()
    state = State(tmp_path, dedup_window_ms=10, clients_max=5)
    state.do(writer.fold(puts(keys(1)), time_ms=1000))
    state.store.close()
    store = open_state(tmp_path)
    assert sorted(store.clients("s1")) == [(f"c{n}", n) for n in range(15, 20)]
    store.close()
