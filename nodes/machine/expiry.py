"""Expiry: when a record's lifetime has passed, the primary deletes it by a log operation (R5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import Expiring
from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import KEY_BYTES_MAX
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.sizes import OPERATION_BYTES
from nodes.machine.judge import Decision, data_bytes_added
from nodes.machine.lifetimes import COUNT_MAX, HORIZON_MS
from nodes.machine.table import UNKNOWN

if TYPE_CHECKING:
    from nodes.machine.loader import Known, Loaded
    from nodes.machine.replica import Replica
    from nodes.machine.table import Writes


class Expiry:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        sizes, knobs = replica.sizes, replica.knobs
        self._count_max = min(
            knobs.expire_batch_operations_max, sizes.batch // (KEY_BYTES_MAX + OPERATION_BYTES)
        )

    def next_ns(self) -> int:
        next_ms = self._replica.lifetimes.next_ms()
        return NEVER_NS if next_ms is None else next_ms * 1_000_000

    def expire(self, time_ms: int) -> None:
        """Write the expirations that are due."""
        replica = self._replica
        if not replica.is_active:
            return
        time_ms = max(time_ms, replica.time_ms)
        if replica.lifetimes.needs_more(time_ms):
            self._extend(time_ms + HORIZON_MS)
        ended = replica.lifetimes.pop_ended(time_ms, self._count_max)
        cold = [key for key in ended if replica.writer.latest(key) is UNKNOWN]
        if cold:
            replica.loader.want(cold, [], lambda loaded: self._on_loaded(ended, loaded))
        elif ended:
            self._delete(ended)

    def _on_loaded(self, ended: dict[bytes, int], loaded: Loaded | str) -> None:
        replica = self._replica
        if isinstance(loaded, str) or not replica.is_active:
            return replica.lifetimes.put_back(ended, replica.time_ms)
        with replica.writer.having(loaded):
            self._delete(ended)
        return None

    def _delete(self, ended: dict[bytes, int]) -> None:
        """Delete those keys whose newest record still is the one whose lifetime has ended."""
        replica, writer = self._replica, self._replica.writer
        time_ms = max(replica.now_ns // 1_000_000, replica.time_ms)
        gone: dict[bytes, Known] = {}
        for key, seq in ended.items():
            record = writer.latest(key)
            if record is UNKNOWN:
                replica.lifetimes.put_back({key: seq}, time_ms)
            elif record is not None and record[2] == seq:
                gone[key] = record
        if not gone:
            return
        versions = [(record[1], record[2]) for record in gone.values()]
        kinds = bytes([b.EXPIRE]) * len(gone)
        batch = Batch(kinds, [*gone], conditions=dict(enumerate(versions)))
        outcomes = bytes([b.DELETED]) * len(gone)
        writes: Writes = dict.fromkeys(gone)
        added = data_bytes_added(writes, gone)
        reply = b.BatchReply(outcomes, replica.shard.epoch, replica.last[1] + 1)
        writer.accept(batch, batch.encode(), time_ms, Decision(writes, outcomes, added, reply))

    def _extend(self, until_ms: int) -> None:
        """Read from disk which lifetimes end next."""
        replica = self._replica
        replica.lifetimes.asked_until_ms = until_ms
        query = Expiring(0, replica.shard.id, until_ms, COUNT_MAX)
        replica.ports.ask(query, self._on_lifetimes)

    def _on_lifetimes(self, rows: list[Any], failure: str | None) -> None:
        lifetimes, now_ms = self._replica.lifetimes, self._replica.now_ns // 1_000_000
        if failure is None:
            return lifetimes.extend(rows, COUNT_MAX, now_ms)
        return lifetimes.ask_later(now_ms)
