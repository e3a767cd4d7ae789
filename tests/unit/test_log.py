"""The log of a node: what was appended is completed in order, be it nothing."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bus_kv.core.machine import Append, AppendCompleted, EntryRow
from nodes.log import NodeLog


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
