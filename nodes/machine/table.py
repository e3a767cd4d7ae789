"""A shard's committed data in memory: records by key, keys in order, lifetimes in order.

A record is (value, epoch, seq, expires_at): the value, the version of the write that made it, and the log time in
milliseconds at which it expires, or None. Values live here until the fold moves them to disk.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, TypeAlias

from sortedcontainers import SortedList

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus_kv.protocol.requests import ScanRequest

Record: TypeAlias = tuple[bytes, int, int, int | None]
Writes: TypeAlias = dict[bytes, Record | None]
"""Newest record per key of one entry; None where the key was deleted."""

_UNSORTED_MAX = 4096
"""New keys wait unsorted until a scan needs them, up to this many, so that a load does not pay for order per key."""


class Table:
    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}
        self.data_bytes = 0
        self._sorted: SortedList[bytes] = SortedList()
        self._unsorted: list[bytes] = []
        self._lifetimes: list[tuple[int, bytes, int]] = []

    def apply(self, writes: Writes) -> None:
        """Make the writes of one committed entry visible, all at once."""
        records = self.records
        created = [key for key in writes if key not in records]
        old = [records[key] for key in writes if key in records]
        self.data_bytes -= sum([len(r[0]) for r in old])
        gone = [key for key, record in writes.items() if record is None]
        records.update(writes)  # type: ignore[arg-type]  # tombstones are taken out below
        for key in gone:
            del records[key]
        new = [r for r in writes.values() if r is not None] if gone else [*writes.values()]
        self.data_bytes += sum([len(r[0]) for r in new if r]) + sum(map(len, created))
        for record, key in zip(writes.values(), writes, strict=True):
            if record is not None and record[3] is not None:
                heapq.heappush(self._lifetimes, (record[3], key, record[2]))
        self._index(created, gone)

    def _index(self, created: list[bytes], gone: list[bytes]) -> None:
        self._unsorted += created
        if gone:
            self._sort()
            for key in gone:
                self._sorted.remove(key)
                self.data_bytes -= len(key)
        elif len(self._unsorted) >= _UNSORTED_MAX:
            self._sort()

    def _sort(self) -> None:
        self._sorted.update(self._unsorted)
        self._unsorted.clear()

    def next_expiry_ms(self) -> int | None:
        return self._lifetimes[0][0] if self._lifetimes else None

    def pop_expired(self, time_ms: int, count_max: int) -> list[bytes]:
        """Keys whose record's lifetime ended at or before `time_ms`; each is told once."""
        keys: list[bytes] = []
        while self._lifetimes and self._lifetimes[0][0] <= time_ms and len(keys) < count_max:
            _, key, seq = heapq.heappop(self._lifetimes)
            record = self.records.get(key)
            if record is not None and record[2] == seq:
                keys.append(key)
        return keys

    def scan(self, request: ScanRequest, page_bytes_max: int) -> tuple[list[bytes], bytes | None]:
        """Keys of one page and the position of the next (see `make_cursor`), None when the range is exhausted."""
        self._sort()
        page: list[bytes] = []
        room = page_bytes_max
        for key in self._range(request):
            room -= len(key) + (0 if request.keys_only else len(self.records[key][0])) + 64
            if page and (len(page) == request.limit or room < 0):
                return page, page[-1] if request.reverse else key
            page.append(key)
        return page, None

    def _range(self, request: ScanRequest) -> Iterator[bytes]:
        if request.end is not None and request.end <= request.start:
            return iter(())
        keys: Iterator[bytes] = self._sorted.irange(
            request.start, request.end, inclusive=(True, False), reverse=request.reverse
        )
        return keys
