"""The log of a node: what was appended is completed in order, be it nothing."""

import json
import queue
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus_kv.core.machine import Append, AppendCompleted, EntryRow, LogRead, Trim
from bus_kv.protocol.codec import encode_cbor
from bus_kv.protocol.sizes import Sizes
from nodes.log import LOG_NAME, NodeLog


class Log:
    """A log that runs, and what it tells."""

    def __init__(self, directory: Path) -> None:
        self.log = NodeLog(directory, "n1")
        self.events: queue.Queue[Any] = queue.Queue()
        self.log.start(self.events.put, self.events.put)

    def append(self, ticket: int, *entries: EntryRow) -> None:
        self.log.append(Append(ticket, [*entries], []))

    def until_completed(self, ticket: int) -> None:
        while self.events.get(timeout=10) != AppendCompleted(ticket):
            pass


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    log = Log(tmp_path)
    yield log
    log.log.close()
    assert [event for event in log.events.queue if not isinstance(event, AppendCompleted)] == []


def test_an_append_of_nothing_is_completed(log: Log) -> None:
    """A seal that comes twice waits for the log and brings nothing new."""
    log.append(1)
    log.until_completed(1)
    log.append(2, EntryRow("s1", 1, 1, b"x"))
    log.append(3)
    log.until_completed(3)
    assert log.log.end("s1") == 1


def test_what_may_go_is_deleted_while_more_is_added(log: Log) -> None:
    """A few more at a time: in the end nothing of it is left."""
    log.append(1, *(EntryRow("s1", i, 1, b"x") for i in range(1, 201)))
    log.until_completed(1)
    log.log.trim(Trim("s1", 150))
    for ticket in range(2, 100):
        log.append(ticket, EntryRow("s1", 199 + ticket, 1, b"x"))
        log.until_completed(ticket)
    log.log.close()
    log.log = NodeLog(log.log.path.parent, "n1")
    assert [row.last for row in log.log.entries("s1")] == [*range(151, 299)]


def test_what_is_deleted_is_not_written_again(log: Log, tmp_path: Path) -> None:
    """As SQLite does by itself where its distributor wants deleted bytes to be overwritten."""
    wal, entry_bytes, count = tmp_path / f"{LOG_NAME}-wal", 32 << 10, 40
    for seq in range(1, count + 1):
        log.append(seq, EntryRow("s1", seq, 1, bytes(entry_bytes)))
        log.until_completed(seq)
    before = wal.stat().st_size
    assert before > count * entry_bytes
    log.log.trim(Trim("s1", count))
    for seq in range(count + 1, 2 * count + 1):
        log.append(seq, EntryRow("s1", seq, 1, b"x"))
        log.until_completed(seq)
    log.log.read(LogRead(0, "s1", (1, 2 * count), 1))  # answered behind the last deletion
    log.events.get(timeout=10)
    with sqlite3.connect(tmp_path / LOG_NAME) as reader:
        assert reader.execute("SELECT min(last) FROM entries").fetchone() == (count + 1,)
    reader.close()
    assert wal.stat().st_size - before < count * entry_bytes


def shard_map(version: int, **epochs: int) -> dict[str, Any]:
    return {"map_version": version, "shards": {id: {"epoch": e} for id, e in epochs.items()}}


def map_after(directory: Path, *changes: dict[str, Any]) -> Any:
    """What a log remembers that takes these changes of the map and is opened again."""
    log = Log(directory)
    for ticket, change in enumerate(changes, 1):
        log.log.append(Append(ticket, [], [], change))
    log.until_completed(len(changes))
    log.log.close()
    again = NodeLog(directory, "n1")
    map = again.map()
    again.close()
    return map


def test_the_map_is_remembered_change_by_change(tmp_path: Path) -> None:
    gone = {"map_version": 2, "shards": {"s2": None, "s3": {"epoch": 2}}}
    assert map_after(tmp_path, shard_map(1, s1=1, s2=1), gone) == shard_map(2, s1=1, s3=2)


def test_a_log_of_the_format_before_keeps_its_map(tmp_path: Path) -> None:
    NodeLog(tmp_path, "n1").close()
    with sqlite3.connect(tmp_path / LOG_NAME) as db:
        db.execute("DROP TABLE map_shards")
        db.execute("UPDATE meta SET value = '1' WHERE name = 'format_version'")
        db.execute("INSERT INTO meta VALUES ('map', ?)", [json.dumps(shard_map(1, s1=1, s2=1))])
    db.close()
    assert map_after(tmp_path, shard_map(2, s2=2)) == shard_map(2, s1=1, s2=2)


def test_many_small_entries_fit_into_the_message_that_they_are_asked_for(log: Log) -> None:
    """A replica that has missed a megabyte of them would never get it (found by `bus-kv chaos --fault wipe-disk`)."""
    sizes = Sizes(1 << 20)
    log.append(1, *(EntryRow("s1", i, 1, b"x" * 60) for i in range(1, 20_001)))
    log.until_completed(1)
    log.log.read(LogRead(2, "s1", (0, 0), sizes.entry))
    answer = log.events.get(timeout=10)
    _, rows = answer.rows
    assert len(rows) > 10_000
    assert len(encode_cbor({"entries": [row.body for row in rows]})) <= sizes.message
