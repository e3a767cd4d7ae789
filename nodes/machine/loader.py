"""Fetches what memory lacks from the state on disk, for the requests that wait for it.

All misses of a turn travel in one lookup, and there is one lookup under way: what is missed meanwhile gathers for the
next. Of keys that are to be written it brings everything but the value. The values for gets come up to one full reply:
that answers at least the request that has waited longest, what it did not reach is asked for again. So there is never
more in memory than that, however many keys are asked for, and however large their values are.

A fold that ends in between takes records out of memory that the lookup may not have seen on disk, so its answer is not
used and the question is asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import Lookup, RequestsOf, Unread
from bus_kv.protocol.batch import GET
from nodes.machine.dedup import disk_runs
from nodes.machine.table import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable

    from bus_kv.core.machine import Query
    from bus_kv.protocol.batch import Batch
    from nodes.machine.dedup import DiskRuns
    from nodes.machine.table import Table

    Known: TypeAlias = tuple[bytes | Unread, int, int, int | None]
    """A record, with or without its value."""
    Loaded: TypeAlias = dict[bytes, Known | None]
    """None: absent."""
    Then: TypeAlias = Callable[[list[Any], str | None], None]
    Ask: TypeAlias = Callable[[Query, Then], None]
    """Ask the state; the ticket is filled in."""
    Resume: TypeAlias = Callable[[Loaded | str], None]
    """Called with the records, or with why there are none."""

LOOKUP_KEYS_MAX = 2048
"""Keys of one lookup, unless a single request has more."""
UNREACHED: Known = (Unread(0), 0, 0, None)
"""In place of a record that is for a get alone, where the values before it fill the reply."""


@dataclass(slots=True)
class _Want:
    heads: dict[bytes, None]
    whole: dict[bytes, None]
    resume: Resume
    is_open: Callable[[], bool]


class Loader:
    def __init__(self, shard: str, table: Table, ask: Ask, reply_bytes_max: int) -> None:
        self._shard, self._table, self._ask = shard, table, ask
        self.values_bytes_max = reply_bytes_max
        """Values up to this come in one lookup."""
        self._wants: list[_Want] = []
        self._busy = False

    def want(
        self, heads: Iterable[bytes], whole: Iterable[bytes], resume: Resume,
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        """Fetch these records: `heads` without their values, `whole` with them, as many as fill a reply.

        Not if nobody waits for them any more when their turn comes (`is_open`).
        """
        self._wants.append(_Want(dict.fromkeys(heads), dict.fromkeys(whole), resume, is_open))

    def want_for(
        self, batch: Batch, cold: Container[bytes], resume: Resume, is_open: Callable[[], bool]
    ) -> None:
        """Fetch those of a batch's records that are `cold`."""
        operations = [*zip(batch.kinds, batch.keys, strict=True)]
        heads = [key for kind, key in operations if kind != GET and key in cold]
        whole = [key for kind, key in operations if kind == GET and key in cold]
        self.want(heads, whole, resume, is_open)

    def take_wanted(self) -> None:
        """At the end of a turn, or of what was done after it: ask for what was missed."""
        if self._busy:
            return
        self._wants = [want for want in self._wants if want.is_open()]
        if not self._wants:
            return
        taken = self._cut()
        heads: dict[bytes, None] = {}
        whole: dict[bytes, None] = {}
        for want in taken:
            heads |= want.heads
            whole |= want.whole
        self._busy = True
        lookup = Lookup(0, self._shard, [*heads], [*whole], self.values_bytes_max)
        self._ask(lookup, partial(self._on_rows, taken, lookup, self._table.folds))

    def _cut(self) -> list[_Want]:
        """The wants of the next lookup; at least one."""
        keys = 0
        for count, want in enumerate(self._wants):
            keys += len(want.heads) + len(want.whole)
            if count and keys > LOOKUP_KEYS_MAX:
                taken, self._wants = self._wants[:count], self._wants[count:]
                return taken
        taken, self._wants = self._wants, []
        return taken

    def _on_rows(
        self, taken: list[_Want], lookup: Lookup, folds: int, rows: list[Any], failure: str | None
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
        reached = dict.fromkeys(lookup.whole[: rows[0]])
        loaded = self._learn(dict.fromkeys(lookup.heads) | reached, rows[1:])
        first = next((want for want in taken if want.whole), None)
        ready: list[_Want] = []
        left: list[_Want] = []
        for want in taken:
            is_ready = want is first or want.whole.keys() <= reached.keys()
            (ready if is_ready else left).append(want)
        self._wants = left + self._wants
        for want in ready:
            want.resume({key: loaded.get(key, UNREACHED) for key in [*want.heads, *want.whole]})

    def _learn(self, keys: dict[bytes, None], rows: list[Any]) -> Loaded:
        """The records of these keys. Those that are absent or have their value are kept: the table holds no others."""
        loaded: dict[bytes, Any] = {**keys}
        loaded |= {key: (value, epoch, seq, ends) for key, value, epoch, seq, ends in rows}
        get = self._table.get
        self._table.learn(
            {
                key: record for key, record in loaded.items()
                if (record is None or type(record[0]) is not Unread) and get(key) is UNKNOWN
            }
        )  # fmt: skip
        return loaded

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
