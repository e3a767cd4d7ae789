"""What was done to one key, newest first, from the operation log on disk once everything committed is there."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import HistoryOf
from bus_kv.errors import BusKVError, ShardUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.requests import HistoryRequest
    from nodes.machine.replica import Replica

    Respond = Callable[[dict[str, Any] | BusKVError], None]


VERSION_BYTES = 200
"""What a version takes in a reply beside its value, in either codec."""


class History:
    def __init__(self, replica: Replica, ask: Callable[[Any, Any], None], page_bytes: int) -> None:
        self._replica, self._ask, self._page_bytes = replica, ask, page_bytes

    def read(self, request: HistoryRequest, epoch: int, respond: Respond) -> None:
        """{"key", "versions", "next": version below which the next page begins, or None}"""
        refusal = self._replica.not_serving(epoch)
        if refusal is not None:
            return respond(refusal)
        self._replica.operations += 1
        return self._replica.folder.barrier(partial(self._read, request, epoch, respond))

    def _read(self, request: HistoryRequest, epoch: int, respond: Respond) -> None:
        query = HistoryOf(
            0, self._replica.shard.id, request.key, request.before, request.limit, self._page_bytes
        )
        self._ask(query, partial(self._on_rows, request, epoch, respond))

    def _on_rows(
        self, request: HistoryRequest, epoch: int, respond: Respond, rows: list[Any],
        failure: str | None,
    ) -> None:  # fmt: skip
        refusal = self._replica.not_serving(epoch)
        if refusal is None and failure is not None:
            refusal = ShardUnavailable(f"shard {self._replica.shard.id}: {failure}; send it again")
        if refusal is not None:
            return respond(refusal)
        sizes = sum([len(row[3] or b"") for row in rows])
        goes_on = len(rows) >= request.limit or sizes >= self._page_bytes
        shown = rows[: self._fitting(rows)]
        page = {
            "key": request.key,
            "versions": [*map(_version, shown)],
            "next": [*shown[-1][:2]] if goes_on or len(shown) < len(rows) else None,
        }
        return respond(page)

    def _fitting(self, rows: list[Any]) -> int:
        """How many versions one reply takes; at least one."""
        room = self._page_bytes
        for i, row in enumerate(rows):
            room -= len(row[3] or b"") + VERSION_BYTES
            if room < 0 and i:
                return i
        return len(rows)


def _version(row: tuple[Any, ...]) -> dict[str, Any]:
    epoch, seq, op, value, time_ms, client, number = row
    request_id = None if client is None else f"{client}:{number}"
    return {
        "version": [epoch, seq], "op": op, "value": value, "time": time_ms,
        "request_id": request_id,
    }  # fmt: skip
