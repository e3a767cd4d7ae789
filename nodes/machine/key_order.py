"""All keys of a shard in order, while they take little memory: a scan of what is cached then needs no disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedList

from bus_kv.protocol.batch import ABSENT, CREATED, DELETED, REFUSED

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bus_kv.core.machine import LoggedBatch

KEY_BYTES = 100
"""What a key takes here, about."""
_PENDING_MAX = 4096
"""New keys wait unsorted until a scan needs them, up to this many, so that a load does not pay for order per key."""


class KeyOrder:
    def __init__(self, complete: bool) -> None:
        """Not `complete`: the keys on disk follow by `learn`, up to `finish`."""
        self.complete = complete
        self._sorted: SortedList[bytes] = SortedList()
        self._pending: dict[bytes, None] = {}
        self._gone: set[bytes] = set()
        """Deleted while the keys on disk are being learned: those were read before it."""

    def __len__(self) -> int:
        return len(self._sorted) + len(self._pending)

    def follow(self, logged: LoggedBatch) -> None:
        """Do what a committed batch did to the set of keys."""
        created, deleted = changes(logged)
        for key in deleted:
            if key in self._pending:
                del self._pending[key]
            else:
                self._sorted.discard(key)
        if not self.complete:
            self._gone.update(deleted)
            self._gone.difference_update(created)
            created = [key for key in created if key not in self._sorted]
        self._pending.update(dict.fromkeys(created))
        if len(self._pending) >= _PENDING_MAX:
            self._sort()

    def learn(self, keys: Iterable[bytes]) -> None:
        """Keys that are on disk."""
        known = self._pending.keys() | self._gone
        self._sorted.update([k for k in keys if k not in known and k not in self._sorted])

    def finish(self) -> None:
        self.complete = True
        self._gone.clear()

    def range(self, start: bytes, end: bytes | None, reverse: bool) -> Iterator[bytes]:
        """Keys of [start, end), from the low or from the high end."""
        if end is not None and end <= start:
            return iter(())
        self._sort()
        keys: Iterator[bytes] = self._sorted.irange(
            start, end, inclusive=(True, False), reverse=reverse
        )
        return keys

    def _sort(self) -> None:
        self._sorted.update(self._pending)
        self._pending.clear()


def changes(logged: LoggedBatch) -> tuple[list[bytes], list[bytes]]:
    """(created, deleted): keys that the batch added to those that were there before it, and those it took away."""
    outcomes, keys = logged.outcomes, logged.batch.keys
    if DELETED not in outcomes:
        if CREATED not in outcomes:
            return [], []
        return [k for k, o in zip(keys, outcomes, strict=True) if o == CREATED], []
    before: dict[bytes, bool] = {}
    after: dict[bytes, bool] = {}
    for key, outcome in zip(keys, outcomes, strict=True):
        if outcome not in (REFUSED, ABSENT):
            before.setdefault(key, outcome != CREATED)
            after[key] = outcome != DELETED
    created = [key for key, there in after.items() if there and not before[key]]
    return created, [key for key, there in after.items() if not there and before[key]]
