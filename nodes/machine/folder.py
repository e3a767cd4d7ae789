"""Decides when committed operations go to disk, and what of the log is no longer needed then.

There is one fold at a time. It carries everything committed up to a mark, the mark with it, so after a crash the log is
replayed from exactly there. What is too much for one goes in several, entry by entry. The log keeps the newest
`log_keep_bytes` behind the fold, for whoever has to catch up, and what is behind the last checkpoint of the state: it
is replayed much faster than the write-ahead log of the state.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import Fold, LoggedBatch, Mark, Trim
from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import MILLISECOND_NS
from nodes.machine.judge import logged_writes
from nodes.machine.spent import Spent

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from nodes.machine.lifetimes import Lifetimes
    from nodes.machine.table import Table


KEPT_STEPS = 4096
"""Small entries are counted together: the log forgets what it keeps in so many steps."""


REPLICAS_PER_INTERVAL = 10
"""Every fold is a transaction: a node with more replicas than this folds each more seldom."""
FOLD_MEMORY_SHARE = 16
"""Of DuckDB's memory, one fold carries no more than this part: writing it takes several times its bytes."""


@dataclass(slots=True)
class _Waiting:
    """One committed entry."""

    batches: list[LoggedBatch]
    rolled_back: list[LoggedBatch]
    end: Mark
    size: int


class Folder:
    def __init__(
        self, shard: str, keyspace: str, mark: Mark, table: Table, lifetimes: Lifetimes,
        knobs: Knobs, ask: Callable[[Any, Any], None], phase: float = 0.0,
    ) -> None:  # fmt: skip
        """The first fold is put off by this part of an interval, so that members do not fold at the same time: W of
        them are enough to acknowledge a write."""
        self.mark = mark
        """Up to where the disk has it all."""
        self.checkpointed = 0
        """Up to where the disk has it without the state's write-ahead log."""
        self.bytes = 0
        """Of committed batches that the disk does not have."""
        self.interval_ns = knobs.fold_interval_ms * MILLISECOND_NS
        self._shard, self._keyspace = shard, keyspace
        self._table, self._lifetimes, self._knobs, self._ask = table, lifetimes, knobs, ask
        self._waiting: deque[_Waiting] = deque()
        self._fold_bytes_max = min(
            2 * knobs.fold_bytes, (knobs.duckdb_memory_mb << 20) // FOLD_MEMORY_SHARE
        )  # fmt: skip
        self._end = mark
        self._since_ns: int | None = None
        """When the first of what waits was committed."""
        self._busy = False
        self._hold_ns = 0
        self._patience = 1 + phase
        """In intervals, until the next fold."""
        self._barriers: list[tuple[int, Callable[[], None]]] = []
        self._kept: deque[tuple[int, int]] = deque()
        """(last seq, bytes) of entries that the log still has, oldest first."""
        self._kept_bytes = 0
        self._spent = Spent()

    def add(
        self, batches: list[LoggedBatch], rolled_back: list[LoggedBatch], end: Mark,
        entry_bytes: int, now_ns: int,
    ) -> None:  # fmt: skip
        """An entry was committed; its writes are in the table."""
        self._waiting.append(_Waiting(batches, rolled_back, end, entry_bytes))
        self._end = end
        self.bytes += entry_bytes
        self._kept_bytes += entry_bytes
        if self._kept and self._kept[-1][1] < self._knobs.log_keep_bytes // KEPT_STEPS:
            entry_bytes += self._kept.pop()[1]
        self._kept.append((end.last, entry_bytes))
        if self._since_ns is None:
            self._since_ns = now_ns

    def barrier(self, then: Callable[[], None]) -> None:
        """Call when everything committed until now is on disk."""
        if self._end.last == self.mark.last:
            return then()
        self._barriers.append((self._end.last, then))

    def share_with(self, replicas: int) -> None:
        """So many replicas of the node fold, this one included."""
        interval_ns = self._knobs.fold_interval_ms * MILLISECOND_NS
        self.interval_ns = max(interval_ns, interval_ns * replicas // REPLICAS_PER_INTERVAL)

    @property
    def is_full(self) -> bool:
        """Too much waits for the disk: no more writes for now."""
        return self.bytes > self._knobs.unfolded_bytes_max

    def next_ns(self) -> int:
        """When a fold is due by age."""
        if self._since_ns is None or self._busy:
            return NEVER_NS
        due_ns = self._since_ns + int(self.interval_ns * self._patience)
        return max(due_ns, self._hold_ns)

    def end_turn(self, now_ns: int) -> None:
        self._spent.release_some()
        self._fold_if_due(now_ns)

    def _fold_if_due(self, now_ns: int) -> None:
        """Fold by age or size. After a fold made a read repeat itself that read comes first, while there is room."""
        if self._table.reads_repeated:
            self._table.reads_repeated = False
            self._hold_ns = now_ns + self._knobs.reads_first_ms * MILLISECOND_NS
        due_ns = self.next_ns()
        if due_ns == NEVER_NS:
            return
        held = now_ns < self._hold_ns and self.bytes < self._knobs.unfolded_bytes_max // 2
        due = now_ns >= due_ns or self.bytes >= self._knobs.fold_bytes * self._patience
        if self._barriers or (due and not held):
            self._fold()

    def _fold(self) -> None:
        taken, folded_bytes = self._take()
        batches = [logged for entry in taken for logged in entry.batches]
        self._busy, self._patience = True, 1
        if not self._waiting:
            self._since_ns = None
            records = self._table.freeze()
        else:
            # The newest record of a key may be of an entry behind the mark, and the only one that the table has.
            records = {}
            for logged in batches:
                records.update(logged_writes(logged))
            self._table.freeze(
                records, [logged for entry in self._waiting for logged in entry.batches]
            )
        fold = Fold(
            0, self._shard, self._keyspace, records, batches, taken[-1].end,
            [logged for entry in taken for logged in entry.rolled_back],
        )  # fmt: skip
        self._ask(fold, partial(self._on_folded, fold.mark, folded_bytes))

    def _take(self) -> tuple[list[_Waiting], int]:
        """The oldest entries, as many as one fold carries, and their bytes."""
        taken = [self._waiting.popleft()]
        size = taken[0].size
        while self._waiting and size + self._waiting[0].size <= self._fold_bytes_max:
            taken.append(self._waiting.popleft())
            size += taken[-1].size
        return taken, size

    def _on_folded(
        self, mark: Mark, folded_bytes: int, rows: list[Any], failure: str | None
    ) -> None:
        del rows
        assert failure is None, "a fold is tried until it is done"
        self._busy = False
        self.mark = mark
        self.bytes -= folded_bytes
        self._spent.add(self._table.folded())
        self._lifetimes.folded(mark.last, mark.time_ms)
        reached = [then for last, then in self._barriers if last <= mark.last]
        self._barriers = [(last, then) for last, then in self._barriers if last > mark.last]
        for then in reached:
            then()

    def trim(self, others_have: int, is_fetched: bool = False) -> Trim | None:
        """What the log may forget: entries behind the mark, the oldest first, once it keeps more than it should.

        What another member lacks (beyond `others_have`) or no checkpoint has stays, until the log is very long; and
        until it is much longer while somebody fetches what he lacks.
        """
        last, knobs = 0, self._knobs
        bytes_max = max(knobs.log_bytes_max, knobs.log_fetched_bytes_max if is_fetched else 0)
        spare = min(others_have, self.checkpointed)
        while len(self._kept) > 1 and self._kept_bytes > knobs.log_keep_bytes:
            seq, size = self._kept[0]
            is_wanted = seq > spare and self._kept_bytes <= bytes_max
            if seq > self.mark.last or is_wanted:
                break
            last = seq
            self._kept.popleft()
            self._kept_bytes -= size
        return Trim(self._shard, last) if last else None
