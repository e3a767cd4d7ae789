"""Fetches what memory lacks from the state on disk, for the requests that wait for it.

All misses of a turn travel in one lookup, and there is one lookup under way: what is missed meanwhile gathers for the
next. A fold that ends in between takes records out of memory that the lookup may not have seen on disk, so its answer
is not used and the question is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import Lookup, RequestsOf
from nodes.machine.dedup import disk_runs
from nodes.machine.table import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from bus_kv.core.machine import Query
    from bus_kv.protocol.batch import Batch
    from nodes.machine.dedup import DiskRuns
    from nodes.machine.table import Table, Writes

    Then: TypeAlias = Callable[[list[Any], str | None], None]
    Ask: TypeAlias = Callable[[Query, Then], None]
    """Ask the state; the ticket is filled in."""
    Resume: TypeAlias = Callable[[Writes | str], None]
    """Called with the records (None: absent), or with why there are none."""

LOOKUP_KEYS_MAX = 2048
LOOKUP_BYTES_MAX = 32 << 20
"""A lookup asks for fewer keys where values are large."""


@dataclass(slots=True)
class _Want:
    keys: dict[bytes, None]
    resume: Resume
    is_open: Callable[[], bool]


class Loader:
    def __init__(self, shard: str, table: Table, ask: Ask) -> None:
        self._shard, self._table, self._ask = shard, table, ask
        self._wants: list[_Want] = []
        self._busy = False

    def want(
        self, keys: Iterable[bytes], resume: Resume, is_open: Callable[[], bool] = lambda: True
    ) -> None:
        """Fetch these records; not if nobody waits for them any more when their turn comes (`is_open`)."""
        self._wants.append(_Want(dict.fromkeys(keys), resume, is_open))

    def take_wanted(self) -> None:
        """At the end of a turn: ask for what was missed in it."""
        if self._busy:
            return
        self._wants = [want for want in self._wants if want.is_open()]
        if not self._wants:
            return
        taken, keys = self._cut()
        self._busy = True
        lookup = Lookup(0, self._shard, [*keys])
        self._ask(lookup, partial(self._on_rows, taken, self._table.folds))

    def _cut(self) -> tuple[list[_Want], dict[bytes, None]]:
        """The wants of the next lookup; at least one."""
        table = self._table
        mean_bytes = table.data_bytes // max(table.keys, 1) + 1
        keys_max = min(LOOKUP_KEYS_MAX, LOOKUP_BYTES_MAX // mean_bytes)
        keys: dict[bytes, None] = {}
        for count, want in enumerate(self._wants):
            if keys and len(keys) + len(want.keys) > keys_max:
                taken, self._wants = self._wants[:count], self._wants[count:]
                return taken, keys
            keys |= want.keys
        taken, self._wants = self._wants, []
        return taken, keys

    def _on_rows(
        self, taken: list[_Want], folds: int, rows: list[Any], failure: str | None
    ) -> None:
        self._busy = False
        if failure is None and folds != self._table.folds:
            self._wants = taken + self._wants
            self._table.reads_repeated = True
            return
        if failure is not None:
            for want in taken:
                want.resume(failure)
            return
        found = {key: (value, epoch, seq, expires) for key, value, epoch, seq, expires in rows}
        for want in taken:
            records: Writes = {key: found.get(key) for key in want.keys}
            self._table.learn({k: r for k, r in records.items() if self._table.get(k) is UNKNOWN})
            want.resume(records)

    def requests_of(
        self, batch: Batch, resume: Callable[[DiskRuns | str], None],
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """What the disk knows about requests like these (R6)."""
        if not is_open():
            return
        query = RequestsOf(0, self._shard, batch.client, batch.numbers[0], batch.numbers[-1])
        self._ask(query, partial(self._on_requests, batch, resume, self._table.folds))

    def _on_requests(
        self, batch: Batch, resume: Callable[[DiskRuns | str], None], folds: int, rows: list[Any],
        failure: str | None,
    ) -> None:  # fmt: skip
        if failure is None and folds != self._table.folds:
            self._table.reads_repeated = True
            return self.requests_of(batch, resume)
        return resume(failure or disk_runs(rows, folds))

    def fail(self, reason: str) -> None:
        """Nobody will be answered from here any more."""
        wants, self._wants = self._wants, []
        for want in wants:
            want.resume(reason)
