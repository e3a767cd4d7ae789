"""Where a node begins after a crash: whether its log has all that the last checkpoint of its state lacks."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus_kv.core.machine import Append, AppendCompleted, CutRow, EntryRow, Mark, ReplicaRow
from bus_kv.protocol.entry import Entry
from nodes.host import _goes_on
from nodes.log import NodeLog


@pytest.fixture
def node_log(tmp_path: Path) -> Iterator[NodeLog]:
    log = NodeLog(tmp_path, "n1")
    yield log
    log.close()


def fill(log: NodeLog, *, first: int, last: int, base_seq: int = 0) -> None:
    """A replica whose log has the entries `first` … `last`, of one operation each."""
    done: queue.Queue[Any] = queue.Queue()
    log.start(done.put, done.put)
    rows: list[EntryRow | CutRow] = [
        EntryRow("s1", seq, 1, Entry("s1", 1, seq, seq, (1, seq - 1), 0).encode())
        for seq in range(first, last + 1)
    ]
    log.append(Append(1, rows, [ReplicaRow("s1", 1, "t", 0, {}, base_seq)]))
    assert done.get(timeout=10) == AppendCompleted(1)


@pytest.mark.parametrize(
    ("first", "last", "mark", "expected"),
    [
        pytest.param(1, 9, 0, True, id="the whole log"),
        pytest.param(4, 9, 3, True, id="just behind the checkpoint"),
        pytest.param(4, 9, 6, True, id="before it"),
        pytest.param(4, 9, 9, True, id="nothing behind it"),
        pytest.param(5, 9, 3, False, id="an entry is missing"),
        pytest.param(4, 9, 10, False, id="an older log"),
    ],
)
def test_a_log_goes_on_from_a_checkpoint_or_not(
    node_log: NodeLog, first: int, last: int, mark: int, expected: bool
) -> None:
    fill(node_log, first=first, last=last)
    assert _goes_on(node_log, {"s1": Mark(1, mark)}) is expected


@pytest.mark.parametrize(("mark", "expected"), [(7, True), (0, False), (3, False)])
def test_an_empty_log_behind_a_snapshot_goes_on_from_that_only(
    node_log: NodeLog, mark: int, expected: bool
) -> None:
    """What the snapshot brought may be in the write-ahead log of the state alone."""
    fill(node_log, first=8, last=7, base_seq=7)
    marks = {"s1": Mark(1, mark)} if mark else {}
    assert _goes_on(node_log, marks) is expected
