"""The uncommitted end of a shard's log in memory: what is decided or received and not known to be committed.

Everything below its base is committed and the same in every log that matters; so all cutting and matching happens here.
An entry is identified by its end, (epoch, seq): two logs that have an entry with the same end are equal up to it (R2).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import LoggedBatch
from bus_kv.protocol import batch as b
from bus_kv.protocol.entry import ROLLED_BACK, Entry, applied_count
from nodes.machine.judge import logged_writes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nodes.machine.table import Writes

Position: TypeAlias = tuple[int, int]
"""(epoch, last seq) of an entry: the end of a log, or a place between two entries."""


@dataclass(slots=True)
class Segment:
    """One entry between decision and commit."""

    epoch: int
    first: int
    previous: Position
    time_ms: int
    record: dict[str, Any] | None = None
    last: int = 0
    batches: list[bytes] = field(default_factory=list)
    """As they were sent."""
    logged: list[LoggedBatch] = field(default_factory=list)
    batch_bytes: int = 0
    writes: Writes = field(default_factory=dict)
    keys: int = 0
    """Keys that it adds, and bytes of data."""
    data_bytes: int = 0
    appended: bool = False
    remembered: bool = False
    """Its requests are in the dedup window: always where it was decided, elsewhere once it is committed."""
    received: Entry | None = None
    """The entry as it came from another log, until it is decoded."""

    @property
    def is_opening(self) -> bool:
        return self.record is not None and ROLLED_BACK not in self.record

    @property
    def end(self) -> Position:
        return self.epoch, self.last

    def entry(self, shard: str) -> Entry:
        return Entry(
            shard, self.epoch, self.first, self.last, self.previous, self.time_ms, self.data_bytes,
            tuple([logged.outcomes for logged in self.logged]), tuple(self.batches), self.record,
        )  # fmt: skip

    def add(self, logged: LoggedBatch, raw: bytes, writes: Writes, data_bytes: int) -> None:
        """Put a decided batch at its end."""
        self.logged.append(logged)
        self.batches.append(raw)
        self.batch_bytes += len(raw) + len(logged.outcomes)
        if self.writes:
            self.writes |= writes
        else:
            self.writes = writes
        self.last = logged.first + applied_count(logged.outcomes) - 1
        self.keys += logged.outcomes.count(b.CREATED) - logged.outcomes.count(b.DELETED)
        self.data_bytes += data_bytes

    def decode(self) -> None:
        """Read what a received entry writes. Most of its cost, so it waits until that is sure to be needed."""
        entry, self.received = self.received, None
        if entry is None:
            return
        seq, self.batch_bytes = entry.first, record_bytes(entry.record)
        for raw, (outcomes, batch) in zip(entry.batches, entry.decoded(), strict=True):
            logged = LoggedBatch(batch, outcomes, entry.epoch, seq, entry.time_ms)
            self.add(logged, raw, logged_writes(logged), 0)
            seq += applied_count(outcomes)
        self.last = entry.last


def received_segment(entry: Entry) -> Segment:
    """A segment for an entry that another log has decided."""
    segment = Segment(
        entry.epoch, entry.first, entry.previous, entry.time_ms, entry.record, entry.last
    )
    segment.appended = True
    segment.received, segment.data_bytes = entry, entry.data_bytes
    segment.batch_bytes = (
        sum(map(len, entry.batches)) + sum(map(len, entry.outcomes)) + record_bytes(entry.record)
    )
    return segment


def record_bytes(record: dict[str, Any] | None) -> int:
    """What counts of an entry's record: entries that were rolled back may be large."""
    return sum(map(len, (record or {}).get(ROLLED_BACK, ())))


class Tail:
    def __init__(self, base: Position) -> None:
        self.base = base
        """End of what is committed."""
        self.segments: deque[Segment] = deque()
        self.bytes = 0

    @property
    def end(self) -> Position:
        return self.segments[-1].end if self.segments else self.base

    def append(self, segment: Segment) -> None:
        self.segments.append(segment)
        self.bytes += segment.batch_bytes

    def take_committed(self, seq: int) -> Iterator[Segment]:
        """Remove and yield the segments up to a seq that is known to be committed."""
        while self.segments and self.segments[0].last <= seq:
            segment = self.segments.popleft()
            self.bytes -= segment.batch_bytes
            self.base = segment.end
            yield segment

    def find(self, position: Position) -> int | None:
        """How many segments lie before a place in the log; None when no entry of this log ends there.

        Places below the base are told as 0: what is committed is part of every log that may be compared with this one.
        """
        if position == self.end:
            return len(self.segments)
        if position[1] < self.base[1] or position == self.base:
            return 0
        ends = (i for i, segment in enumerate(self.segments, 1) if segment.end == position)
        return next(ends, None)

    def before(self, position: Position) -> Position:
        """The last place of this log that is not beyond `position` in either epoch or seq, but never below the base."""
        for segment in reversed(self.segments):
            if segment.epoch <= position[0] and segment.last <= position[1]:
                return segment.end
        return self.base

    def cut(self, count: int) -> list[Segment]:
        """Keep the first `count` segments; returns those that are gone."""
        gone: list[Segment] = []
        while len(self.segments) > count:
            segment = self.segments.pop()
            self.bytes -= segment.batch_bytes
            gone.append(segment)
        gone.reverse()
        return gone
