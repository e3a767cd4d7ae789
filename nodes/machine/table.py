"""A shard's committed data in memory: what the state on disk does not hold yet, and a bounded cache of what it does.

A record is (value, epoch, seq, expires_at): the value, the version of the write that made it, and the log time in
milliseconds at which it expires, or None. In every layer None stands for a key that is known to be absent.

The cache is two generations. What is written or read enters `young`; when that has half the bound it becomes `old`,
and the former `old` is dropped. So whatever `young` lacks and `old` has is the newest record, and nothing is kept in
order. What was written since the last fold is in `dirty` as well, what a fold under way carries in `frozen`: these are
the only copies beside the log, and are not bounded here but by the folder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from sortedcontainers import SortedList

from nodes.machine.key_filter import KeyFilter
from nodes.machine.key_order import KEY_BYTES, KeyOrder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from bus_kv.core.machine import LoggedBatch, Mark

Record: TypeAlias = tuple[bytes, int, int, int | None]
Writes: TypeAlias = dict[bytes, Record | None]
"""Newest record per key of one entry; None where the key was deleted."""

UNKNOWN: Any = object()
"""Not in memory, and perhaps on disk."""

RECORD_BYTES = 300
"""What a record takes in memory beside its key and value."""


class Table:
    def __init__(self, mark: Mark, cache_bytes_max: int) -> None:
        self.keys = mark.keys
        """How many keys are committed."""
        self.data_bytes = mark.data_bytes
        """Sum of the sizes of their keys and values."""
        self.young: Writes = {}
        self.old: Writes = {}
        self.dirty: Writes = {}
        self.frozen: Writes = {}
        self.folds = 0
        """Folds that ended: what was read from disk before the last one may lack what it took out of memory."""
        self.reads_repeated = False
        """A fold ended before a read from disk did, which was asked again."""
        self.filter = KeyFilter(2 * mark.keys, complete=mark.last == 0)
        self.next_filter: KeyFilter | None = None
        """The one that is being built from the keys on disk."""
        self.cache_bytes_max = cache_bytes_max
        self.order: KeyOrder | None = KeyOrder(complete=mark.last == 0)
        """All keys in order; None when they are too many for memory."""
        self._young_bytes = 0
        self._order: SortedList[bytes] = SortedList()
        """Without `order`: unfolded keys, those of `_ordered`; the others wait until a scan needs them."""
        self._ordered: set[bytes] = set()
        self._unordered: dict[bytes, None] = {}

    def get(self, key: bytes) -> Any:
        """The key's record, None when it surely is absent, UNKNOWN when the disk has to be asked."""
        record = self.young.get(key, UNKNOWN)
        if record is not UNKNOWN:
            return record
        for layer in (self.old, self.dirty, self.frozen):
            if key in layer:
                record = layer[key]
                self.learn({key: record})
                return record
        return UNKNOWN if self.filter.may_hold(key) else None

    def apply(
        self, writes: Writes, logged: Sequence[LoggedBatch], keys: int, data_bytes: int
    ) -> None:
        """Make the writes of one committed entry visible, all at once; `keys` and `data_bytes` say what they add."""
        self.keys += keys
        self.data_bytes += data_bytes
        before = [*map(self.young.get, writes)]
        # A record in the cache was written or on disk: its key is in the filter, and will be in the next one.
        fresh = _without_record(writes, before)
        self.filter.add(fresh)
        if self.next_filter is not None:
            self.next_filter.add(fresh)
        self.dirty.update(writes)
        self._keep_order(writes, logged)
        # Where each record takes the place of another one in the cache, that is what the data grow by.
        is_known = not fresh and all(writes.values())
        self._keep(writes, data_bytes if is_known else self._growth(writes, before, fresh))

    def _keep_order(self, writes: Writes, logged: Sequence[LoggedBatch]) -> None:
        order = self.order
        if order is None or not order.complete:
            self._unordered.update(dict.fromkeys(writes))
        if order is not None:
            for batch in logged:
                order.follow(batch)
            self._bound_order(order)

    def _bound_order(self, order: KeyOrder) -> None:
        if len(order) > self.cache_bytes_max // KEY_BYTES:
            self.order = None
            self._order_unfolded()

    def learn_keys(self, keys: Iterable[bytes]) -> None:
        """Keys that are on disk, at the first pass over them."""
        if self.order is not None and not self.order.complete:
            self.order.learn(keys)
            self._bound_order(self.order)

    def all_keys_learned(self) -> None:
        if self.order is not None and not self.order.complete:
            self.order.finish()
            self._order, self._ordered, self._unordered = SortedList(), set(), {}

    def learn(self, records: Writes) -> None:
        """Keep records that are committed, as long as there is room."""
        before = [*map(self.young.get, records)]
        fresh = _without_record(records, before)
        self._keep(records, self._growth(records, before, fresh))

    def _growth(self, records: Writes, before: list[Record | None], fresh: list[bytes]) -> int:
        """By how many bytes `young` grows by these records; `before` is what it has of their keys, `fresh` those of
        which it has no record."""
        added = [len(key) for key in fresh if key not in self.young]
        replaced_bytes = sum([len(r[0]) for r in before if r is not None])
        return _value_bytes(records) - replaced_bytes + RECORD_BYTES * len(added) + sum(added)

    def _keep(self, records: Writes, growth_bytes: int) -> None:
        young = self.young
        self._young_bytes += growth_bytes
        young.update(records)
        if self._young_bytes > self.cache_bytes_max // 2:
            self.old, self.young, self._young_bytes = young, {}, 0

    # ---- the fold ----

    def freeze(self, records: Writes | None = None, later: Iterable[LoggedBatch] = ()) -> Writes:
        """What the next fold carries to disk: everything, or `records`, the newest of the oldest entries; `later` are
        the batches of the others."""
        assert not self.frozen, "one fold at a time"
        if records is None:
            self.frozen, self.dirty = self.dirty, {}
            return self.frozen
        dirty = self.dirty
        # One deletion looks like another: of a key that was written in between, the later one has to stay.
        deleted = {key for key, record in records.items() if record is None}
        if not deleted:
            later = ()
        deleted_again = {key for logged in later for key in deleted.intersection(logged.batch.keys)}
        for key, record in records.items():
            if key in dirty and dirty[key] == record and key not in deleted_again:
                del dirty[key]
        self.frozen = records
        return records

    def folded(self) -> Writes:
        """The fold is on disk: its records, which are no longer held for it."""
        folded, self.frozen = self.frozen, {}
        self.folds += 1
        if self.order is None or not self.order.complete:
            self._order_unfolded()
        return folded

    def _order_unfolded(self) -> None:
        self._order, self._ordered = SortedList(), set()
        self._unordered = dict.fromkeys([*self.dirty, *self.frozen])

    # ---- in order ----

    def unfolded(self, start: bytes, end: bytes | None, reverse: bool) -> Iterator[bytes]:
        """Keys of [start, end) that memory has and the disk may not, in order."""
        if end is not None and end <= start:
            return iter(())
        if self.order is not None and self.order.complete:
            dirty, frozen = self.dirty, self.frozen
            keys = self.order.range(start, end, reverse)
            return (key for key in keys if key in dirty or key in frozen)
        if self._unordered:
            fresh = [key for key in self._unordered if key not in self._ordered]
            self._order.update(fresh)
            self._ordered.update(fresh)
            self._unordered = {}
        return self._order.irange(start, end, inclusive=(True, False), reverse=reverse)

    def unfolded_record(self, key: bytes) -> Record | None:
        """The record of a key that `unfolded` told."""
        return self.dirty[key] if key in self.dirty else self.frozen[key]


def _without_record(records: Writes, before: list[Record | None]) -> list[bytes]:
    if all(before):
        return []
    return [key for key, record in zip(records, before, strict=True) if record is None]


def _value_bytes(records: Writes) -> int:
    return sum([len(record[0]) for record in records.values() if record is not None])
