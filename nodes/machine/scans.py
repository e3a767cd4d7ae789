"""Ranges: pages merged from the state on disk and from what memory holds beyond it, and counts."""

from __future__ import annotations

import heapq
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import RangeCount, RangeRead
from bus_kv.errors import BusKVError, ShardUnavailable
from bus_kv.protocol.sizes import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bus_kv.protocol.requests import ScanRequest
    from nodes.machine.replica import Replica
    from nodes.machine.table import Record, Table

    Respond = Callable[[dict[str, Any] | BusKVError], None]


class Scans:
    def __init__(self, replica: Replica, ask: Callable[[Any, Any], None], page_bytes: int) -> None:
        self._replica, self._ask, self._page_bytes = replica, ask, page_bytes

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
        table = self._replica.table
        mean_bytes = table.data_bytes // max(table.keys, 1) + ITEM_BYTES
        # One more than the page has, to know whether the range goes on.
        count = min(request.limit, self._page_bytes // mean_bytes + 1) + 1
        query = RangeRead(
            0, self._replica.shard.id, request.start, request.end, count, self._page_bytes,
            request.reverse, not request.keys_only,
        )  # fmt: skip
        self._ask(query, partial(self._on_rows, request, query, epoch, respond, table.folds))

    def _on_rows(
        self, request: ScanRequest, query: RangeRead, epoch: int, respond: Respond, folds: int,
        rows: list[Any], failure: str | None,
    ) -> None:  # fmt: skip
        refusal = self._refusal(epoch, failure)
        if refusal is not None:
            return respond(refusal)
        if folds != self._replica.table.folds:
            # A fold took records out of memory that this answer may lack.
            return self._read(request, epoch, respond)
        goes_on = query.goes_on(rows)
        merged = _merge(self._replica.table, request, rows, goes_on)
        items, position = self._page(request, merged)
        if position is None and goes_on:
            last = rows[-1][0]
            position = last if request.reverse else last + b"\0"
        return respond({"items": items, "next": position})

    def _page(
        self, request: ScanRequest, records: Iterator[tuple[bytes, Record]]
    ) -> tuple[list[dict[str, Any]], bytes | None]:
        """As much as fits, and where the next page begins: its lowest key, or in reverse its exclusive highest."""
        items: list[dict[str, Any]] = []
        room = self._page_bytes
        for key, (value, epoch, seq, _) in records:
            room -= len(key) + len(value or b"") + ITEM_BYTES
            if items and (len(items) == request.limit or room < 0):
                return items, items[-1]["key"] if request.reverse else key
            items.append({"key": key, "value": value, "version": [epoch, seq]})
            if request.keys_only:
                del items[-1]["value"]
        return items, None

    def _refusal(self, epoch: int, failure: str | None) -> BusKVError | None:
        refusal = self._replica.not_serving(epoch)
        if refusal is None and failure is not None:
            refusal = ShardUnavailable(f"shard {self._replica.shard.id}: {failure}; send it again")
        return refusal


def _merge(
    table: Table, request: ScanRequest, rows: list[Any], goes_on: bool
) -> Iterator[tuple[bytes, Record]]:
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
