"""Ranges: pages from memory where it has all of them, else merged with what the state on disk has; and counts.

The disk has no order of its own: a page costs it a look at every key. So when a scan goes on where a page ended, more
is read than the next page needs, and kept for those that follow.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import RangeCount, RangeRead
from bus_kv.errors import BusKVError, ShardUnavailable
from bus_kv.protocol.sizes import ITEM_BYTES
from nodes.machine.table import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus_kv.protocol.requests import ScanRequest
    from nodes.machine.replica import Replica
    from nodes.machine.table import Record, Table

    Respond = Callable[[dict[str, Any] | BusKVError], None]
    Rows = list[tuple[bytes, bytes | None, int, int, int | None]]

AHEAD_ROWS = 20_000
AHEAD_BYTES = 4 << 20
AHEAD_RUNS_MAX = 4
"""Runs of rows that are kept for scans that go on."""
POSITIONS_MAX = 64
"""Ends of pages that are remembered: a scan that begins at one goes on."""


@dataclass(slots=True)
class _Run:
    """Rows of [start, end) in the order of a scan, as the disk had them after so many folds."""

    request: ScanRequest
    rows: Rows
    keys: list[bytes]
    """Of the rows, ascending."""
    goes_on: bool
    folds: int

    def rest(self, request: ScanRequest, page_bytes: int) -> Rows | None:
        """What a scan that begins within the run needs of it; None when that is not here."""
        mine = self.request
        if (mine.reverse, mine.keys_only) != (request.reverse, request.keys_only):
            return None
        if request.reverse:
            inside = request.end is not None and self.keys[0] < request.end <= self.keys[-1]
            if not inside or request.start != mine.start or request.end is None:
                return None
            rows = self.rows[len(self.keys) - bisect_left(self.keys, request.end) :]
        else:
            if not self.keys[0] < request.start <= self.keys[-1] or request.end != mine.end:
                return None
            rows = self.rows[bisect_left(self.keys, request.start) :]
        return rows if not self.goes_on or _taken(request, rows, page_bytes) < len(rows) else None


def _taken(request: ScanRequest, rows: Rows, page_bytes: int) -> int:
    """How many of the rows one page takes, and one more, to know whether the range goes on."""
    room = page_bytes
    for at, row in enumerate(rows):
        room -= len(row[0]) + ITEM_BYTES + (0 if request.keys_only else len(row[1] or b""))
        if at == request.limit or (at and room < 0):
            return at + 1
    return len(rows)


class Scans:
    def __init__(self, replica: Replica, ask: Callable[[Any, Any], None], page_bytes: int) -> None:
        self._replica, self._ask, self._page_bytes = replica, ask, page_bytes
        self._runs: deque[_Run] = deque(maxlen=AHEAD_RUNS_MAX)
        self._positions: deque[bytes] = deque(maxlen=POSITIONS_MAX)

    def scan(self, request: ScanRequest, epoch: int, respond: Respond) -> None:
        """One page of the shard's part of a range: {"items", "next"}, or {"count", "next"} when only that is asked."""
        refusal = self._replica.not_serving(epoch)
        if refusal is not None:
            return respond(refusal)
        self._replica.operations += 1
        if request.count_only:
            again = partial(self._count, request, epoch, respond)
            return self._replica.folder.barrier(again)
        return self._read(request, epoch, respond)

    def _count(self, request: ScanRequest, epoch: int, respond: Respond) -> None:
        query = RangeCount(0, self._replica.shard.id, request.start, request.end)
        self._ask(query, partial(self._on_count, epoch, respond))

    def _on_count(self, epoch: int, respond: Respond, rows: list[Any], failure: str | None) -> None:
        respond(self._refusal(epoch, failure) or {"count": rows[0], "next": None})

    def _read(self, request: ScanRequest, epoch: int, respond: Respond) -> None:
        try:
            return self._respond(request, _cached(self._replica.table, request), None, respond)
        except _Cold:
            pass
        table = self._replica.table
        for run in self._runs:
            rows = run.rest(request, self._page_bytes) if run.folds == table.folds else None
            if rows is not None:
                taken = _taken(request, rows, self._page_bytes)
                goes_on = run.goes_on or taken < len(rows)
                return self._merge(request, rows[:taken], goes_on, respond)
        return self._ask_disk(request, epoch, respond)

    def _ask_disk(self, request: ScanRequest, epoch: int, respond: Respond) -> None:
        table = self._replica.table
        begins_at = request.end if request.reverse else request.start
        if begins_at in self._positions:
            count, bytes_max = max(AHEAD_ROWS, request.limit + 1), AHEAD_BYTES
        else:
            mean_bytes = table.data_bytes // max(table.keys, 1) + ITEM_BYTES
            bytes_max = self._page_bytes
            # One more than the page has, to know whether the range goes on.
            count = min(request.limit, bytes_max // mean_bytes + 1) + 1
        query = RangeRead(
            0, self._replica.shard.id, request.start, request.end, count, bytes_max,
            request.reverse, not request.keys_only,
        )  # fmt: skip
        self._ask(query, partial(self._on_rows, request, query, epoch, respond, table.folds))

    def _on_rows(
        self, request: ScanRequest, query: RangeRead, epoch: int, respond: Respond, folds: int,
        rows: Rows, failure: str | None,
    ) -> None:  # fmt: skip
        refusal = self._refusal(epoch, failure)
        if refusal is not None:
            return respond(refusal)
        if folds != self._replica.table.folds:
            # A fold took records out of memory that this answer may lack.
            self._replica.table.reads_repeated = True
            return self._read(request, epoch, respond)
        goes_on = query.goes_on(rows)
        taken = _taken(request, rows, self._page_bytes)
        if taken < len(rows):
            keys = [row[0] for row in rows]
            keys.sort()
            self._runs.append(_Run(request, rows, keys, goes_on, folds))
            rows, goes_on = rows[:taken], True
        return self._merge(request, rows, goes_on, respond)

    def _merge(self, request: ScanRequest, rows: Rows, goes_on: bool, respond: Respond) -> None:
        merged = _merged(self._replica.table, request, rows, goes_on)
        end = None
        if goes_on:
            last = rows[-1][0]
            end = last if request.reverse else last + b"\0"
        self._respond(request, merged, end, respond)

    def _respond(
        self, request: ScanRequest, records: Iterator[tuple[bytes, Any]], end: bytes | None,
        respond: Respond,
    ) -> None:  # fmt: skip
        """Answer with as much as fits; `end` is where the range goes on behind all records, if it does."""
        items, position = self._page(request, records)
        position = position or end
        if position is not None:
            self._positions.append(position)
        respond({"items": items, "next": position})

    def _page(
        self, request: ScanRequest, records: Iterator[tuple[bytes, Any]]
    ) -> tuple[list[dict[str, Any]], bytes | None]:
        """A page, and where the next begins: its lowest key, or in reverse its exclusive highest."""
        items: list[dict[str, Any]] = []
        room, limit, keys_only = self._page_bytes, request.limit, request.keys_only
        for key, (value, epoch, seq, _) in records:
            room -= len(key) + ITEM_BYTES + (0 if keys_only else len(value))
            if items and (len(items) == limit or room < 0):
                return items, items[-1]["key"] if request.reverse else key
            item = {"key": key, "value": value, "version": [epoch, seq]}
            if keys_only:
                del item["value"]
            items.append(item)
        return items, None

    def _refusal(self, epoch: int, failure: str | None) -> BusKVError | None:
        refusal = self._replica.not_serving(epoch)
        if refusal is None and failure is not None:
            refusal = ShardUnavailable(f"shard {self._replica.shard.id}: {failure}; send it again")
        return refusal


class _Cold(Exception):
    """A record of the page is not in memory."""


def _cached(table: Table, request: ScanRequest) -> Iterator[tuple[bytes, Record]]:
    """The records of a range from memory. Raises _Cold at the first that has to be fetched."""
    if table.order is None or not table.order.complete:
        raise _Cold
    get = table.get
    for key in table.order.range(request.start, request.end, request.reverse):
        record = get(key)
        if record is UNKNOWN:
            raise _Cold
        yield key, record


def _merged(
    table: Table, request: ScanRequest, rows: Rows, goes_on: bool
) -> Iterator[tuple[bytes, Any]]:
    """Records in the order of the scan, up to the last row where the disk has more."""
    start, end = request.start, request.end
    if goes_on and request.reverse:
        start = rows[-1][0]
    elif goes_on:
        end = rows[-1][0] + b"\0"
    unfolded = (
        (key, record)
        for key in table.unfolded(start, end, request.reverse)
        if (record := table.unfolded_record(key)) is not None
    )
    dirty, frozen = table.dirty, table.frozen
    folded = ((row[0], row[1:]) for row in rows if row[0] not in dirty and row[0] not in frozen)
    return heapq.merge(folded, unfolded, key=lambda pair: pair[0], reverse=request.reverse)
