"""What was cut from a replica's log is told to the shard's primary, stands in the log once more, and is announced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.core.machine import Append, CutRow, CutsRead, EntryRow, Fold, Mark, ReplicaRow
from bus_kv.core.timers import NEVER_NS
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.sizes import ENTRY_BYTES
from nodes import log as log_module
from nodes.log import NodeLog
from nodes.machine.cuts import logged, rolled_back_in
from tests.support.state import State
from tests.support.trio import Trio

if TYPE_CHECKING:
    from pathlib import Path


def returning(is_active: bool = True) -> Trio:
    """n1 has written b"lost" for itself; n2 leads epoch 2, in which n1 is about to come back."""
    trio = Trio()
    trio.serve()
    trio.put("n1", b"kept", b"1")
    trio.settle()
    trio.put("n1", b"lost", b"1", "one")
    trio.fsync("n1")
    trio["n1"].take_messages()
    for name in ("n2", "n3"):
        trio[name].promise(2, "t2")
        trio.fsync(name)
    shard = trio.record("n2", "n1", "n2", "n3", epoch=2)
    trio.open(shard)
    trio.fsync("n2")
    trio.deliver(trio.remind("n2"), "n3")
    trio.fsync("n3")
    trio.answer("n3")
    if is_active:
        trio.activate(shard)
        trio.put("n2", b"new", b"1")
    return trio


def told_in(trio: Trio, name: str) -> list[tuple[tuple[int, int], bytes]]:
    """(version, key) of what a log says was rolled back."""
    records = [decode_entry(row.body).record for row in trio.nodes[name].log]
    batches = [batch for record in records for batch in rolled_back_in(record)]
    return [((b.epoch, b.first + i), key) for b in batches for i, key in enumerate(b.batch.keys)]


def test_what_was_cut_stands_in_every_log_and_is_announced() -> None:
    trio = returning()
    trio.settle()
    [(_, lost)] = trio.nodes["n1"].cuts
    trio.read_cuts("n1")
    answers = trio.tell_cuts("n1")
    assert (answers, trio.nodes["n1"].events) == ([], [])  # not before it is committed
    trio.settle()
    assert answers == [{"type": "noted", "lost": [0]}]
    for name in ("n1", "n2", "n3"):
        assert told_in(trio, name) == [((1, lost.last), b"lost")]
    event = {
        "shard": "s1", "type": "rolled_back", "node": "n1", "epoch": 2,
        "versions": [(1, lost.last)], "count": 1,
    }  # fmt: skip
    assert trio.nodes["n1"].events == [event]
    trio.read_cuts("n1")
    assert trio.nodes["n1"].cuts == []
    assert trio["n1"].cuts.next_ns() == NEVER_NS


def test_what_was_cut_is_told_after_a_restart_too() -> None:
    trio = returning()
    trio.settle()
    trio.read_cuts("n1")
    trio.nodes["n1"].calls.clear()
    trio.restart("n1")
    trio.settle()
    trio.read_cuts("n1")
    trio.tell_cuts("n1")
    trio.settle()
    trio.restart("n1")  # before it has forgotten: told once more, and not twice in the oplog
    trio.settle()
    trio.read_cuts("n1")
    trio.tell_cuts("n1")
    trio.settle()
    trio.read_cuts("n1")
    assert trio.nodes["n1"].cuts == []
    assert {*told_in(trio, "n2")} == {told_in(trio, "n2")[0]}


def test_nothing_is_told_before_another_entry_is_committed_in_its_place() -> None:
    trio = returning(is_active=False)
    trio.deliver(trio.remind("n2"), "n1")
    trio.fetch("n1")
    trio.fsync("n1")
    assert trio["n1"].commit_seq < trio.nodes["n1"].cuts[0][1].last
    trio.read_cuts("n1")
    assert trio.nodes["n1"].calls == []


def test_an_entry_that_was_committed_after_all_is_not_told_as_lost() -> None:
    trio = returning()
    trio.settle()
    node = trio.nodes["n1"]
    committed = [row for row in node.log if row.epoch == 1 and decode_entry(row.body).batches]
    node.cuts[:] = [(1, committed[0])]
    trio.read_cuts("n1")
    assert trio.tell_cuts("n1") == [{"type": "noted", "lost": []}]
    assert node.events == []
    assert told_in(trio, "n2") == []


# ---- the disk ----


@pytest.fixture
def row() -> EntryRow:
    trio = returning()
    trio.settle()
    return trio.nodes["n1"].cuts[0][1]


def test_the_oplog_tells_of_an_operation_that_was_rolled_back_once(
    tmp_path: Path, row: EntryRow
) -> None:
    state = State(tmp_path)
    lost = logged(decode_entry(row.body))
    for shard in ("s1", "s2"):
        for last in (20, 21):  # two replicas have told it
            state.do(Fold(last, shard, "default", {}, [], Mark(2, last), lost * 2))
    query = "SELECT shard, epoch, seq, op, key, value, outcome FROM oplog ORDER BY shard"
    told = [(shard, 1, row.last, "put", b"lost", b"1", "rolled_back") for shard in ("s1", "s2")]
    assert state.fetch(query) == told
    state.store.close()
    state = State(tmp_path)
    assert state.fetch(query) == told
    assert state.fetch("SELECT count(*) FROM state.kv_1") == [(0,)]
    state.store.close()


def opened_log(directory: Path) -> tuple[NodeLog, list[Any]]:
    log, events = NodeLog(directory, "n1"), list[Any]()
    log.start(events.append, events.append)
    return log, events


def cut_all(log: NodeLog, rows: list[EntryRow]) -> None:
    replica = ReplicaRow("s1", 2, "t2", 0, {})
    log.append(Append(1, [*rows], [replica]))
    log.append(Append(2, [CutRow("s1", 0, 2)], []))


def test_the_log_forgets_what_was_told(tmp_path: Path) -> None:
    log, events = opened_log(tmp_path)
    rows = [EntryRow("s1", seq, 1, b"x" * 10) for seq in (1, 2, 3)]
    cut_all(log, rows)
    log.read(CutsRead(3, "s1", 0, 2 * (10 + ENTRY_BYTES)))
    log.close()
    first, second = events[-1].rows
    assert (first[1], second[1]) == (rows[0], rows[1])
    log, events = opened_log(tmp_path)
    assert log.has_cuts("s1")
    log.read(CutsRead(1, "s1", second[0], 20))
    log.close()
    [(place, third)] = events[-1].rows
    assert third == rows[2]
    log, events = opened_log(tmp_path)
    log.read(CutsRead(1, "s1", place, 20))
    log.close()
    assert events[-1].rows == []
    log, _ = opened_log(tmp_path)
    assert not log.has_cuts("s1")
    log.close()


def test_what_was_cut_does_not_grow_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "CUTS_BYTES_MAX", 25)
    log, events = opened_log(tmp_path)
    cut_all(log, [EntryRow("s1", seq, 1, b"x" * 10) for seq in (1, 2, 3)])
    log.read(CutsRead(3, "s1", 0, 1000))
    log.close()
    assert [row.last for _, row in events[-1].rows] == [2, 3]
