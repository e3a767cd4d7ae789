"""Tells which keys surely are not there, so that a load of new keys asks the disk for none of them.

One bit per key, by CRC-32: keys are only added, a deleted one leaves its bit. At sixteen bits a key about one absent
key in sixteen passes for perhaps present, and costs a lookup.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from bus_kv.core.machine import KeysAfter

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nodes.machine.loader import Ask
    from nodes.machine.table import Table

BUILD_KEYS = 1024
"""Keys of one step of building a filter: a step holds up requests for about a millisecond."""

RETRY_NS = 1_000_000_000
_BITS_PER_KEY = 16
_KEYS_MIN = 1 << 12


class KeyFilter:
    def __init__(self, keys: int, complete: bool) -> None:
        """Room for `keys` keys. Until it is `complete` every key is perhaps there."""
        self.keys_max = max(keys, _KEYS_MIN)
        self.complete = complete
        slots = 1 << (self.keys_max * _BITS_PER_KEY - 1).bit_length()
        self._mask = slots - 1
        self._bits = bytearray(slots >> 3)

    def add(self, keys: Iterable[bytes]) -> None:
        bits, mask = self._bits, self._mask
        for key in keys:
            slot = crc32(key) & mask
            bits[slot >> 3] |= 1 << (slot & 7)

    def may_hold(self, key: bytes) -> bool:
        slot = crc32(key) & self._mask
        return not self.complete or bool(self._bits[slot >> 3] >> (slot & 7) & 1)


class FilterBuilder:
    """Builds a table's filter from the keys on disk, step by step: after a start, and when it has become too small.

    Keys that are written meanwhile enter both filters, so the new one lacks nothing when it takes over.
    """

    def __init__(self, shard: str, table: Table, ask: Ask) -> None:
        self._shard, self._table, self._ask = shard, table, ask
        self._now_ns = self._not_before_ns = 0

    def build_if_needed(self, now_ns: int) -> None:
        table = self._table
        self._now_ns = now_ns
        too_small = table.keys > table.filter.keys_max
        if now_ns < self._not_before_ns or table.next_filter is not None:
            return
        if too_small or not table.filter.complete:
            table.next_filter = KeyFilter(4 * table.keys, complete=False)
            table.next_filter.add([*table.dirty, *table.frozen])
            self._step(table.next_filter, 0)

    def _step(self, filter: KeyFilter, position: int) -> None:
        query = KeysAfter(0, self._shard, position, BUILD_KEYS)
        self._ask(query, partial(self._on_keys, filter))

    def _on_keys(self, filter: KeyFilter, rows: list[Any], failure: str | None) -> None:
        if failure is not None:
            self._table.next_filter = None
            self._not_before_ns = self._now_ns + RETRY_NS
        elif rows:
            position, keys = rows[0]
            filter.add(keys)
            self._table.learn_keys(keys)
            self._step(filter, position)
        else:
            filter.complete = True
            self._table.all_keys_learned()
            self._table.filter, self._table.next_filter = filter, None
