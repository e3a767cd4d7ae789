"""Decides a batch at the end of the log, operation by operation, and answers gets from records.

The hot path, new puts without conditions, does not come here: `Replica._decide` does those in bulk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import Unread
from bus_kv.errors import OutcomeUnknown, PreconditionFailed
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.protocol.sizes import READ_BYTES, RESULT_BYTES, UNANSWERED_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bus_kv.core.machine import LoggedBatch
    from nodes.machine.loader import Known
    from nodes.machine.replica import Replica
    from nodes.machine.table import Record, Writes


@dataclass(slots=True)
class Decision:
    """What became of one batch: `writes` and `outcomes` of the new operations, and the reply to all."""

    writes: Writes
    outcomes: bytes
    data_bytes: int
    """What the writes add to the sizes of keys and values."""
    reply: BatchReply


class Judge:
    """Decides a batch operation by operation: conditions, lifetimes, repeats, deletes, gets, atomic batches."""

    def __init__(
        self, replica: Replica, batch: Batch, before: Mapping[bytes, Known | None], time_ms: int,
        seen: dict[int, tuple[b.Version, int] | OutcomeUnknown],
    ) -> None:  # fmt: skip
        """`before` has the record of each key at the end of the log, with its value if a get asks for it."""
        self.replica, self.batch, self.time_ms, self.seen = replica, batch, time_ms, seen
        self.before = before
        self.epoch, self.seq = replica.shard.epoch, replica.last[1]
        count = len(batch)
        self.writes: Writes = {}
        self.logged = bytearray(count)
        self.reply = BatchReply(b"", [self.epoch] * count, [0] * count)
        self.outcomes = bytearray(count)
        self.records: dict[int, Known] = {}

    def decide(self) -> Decision:
        for i, kind in enumerate(self.batch.kinds):
            if i in self.seen:
                self._repeat(i)
            elif kind == b.GET:
                self._get(i)
            else:
                self._write(i, kind)
        if self.batch.atomic and self.reply.failures:
            self._undo()
        self.reply.outcomes = bytes(self.outcomes)
        self._add_values()
        added = data_bytes_added(self.writes, {key: self.before[key] for key in self.writes})
        return Decision(self.writes, bytes(self.logged), added, self.reply)

    def _latest(self, key: bytes) -> Known | None:
        return self.writes[key] if key in self.writes else self.before[key]

    def _repeat(self, i: int) -> None:
        earlier = self.seen[i]
        if isinstance(earlier, OutcomeUnknown):
            self.reply.failures[i] = earlier.to_body()
        else:
            self._result(i, *earlier)

    def _get(self, i: int) -> None:
        record = self._latest(self.batch.keys[i])
        if record is None:
            self.outcomes[i] = b.MISSING
        else:
            self.records[i] = record
            self._result(i, (record[1], record[2]), b.FOUND)

    def _write(self, i: int, kind: int) -> None:
        key = self.batch.keys[i]
        record = self._latest(key)
        if i in self.batch.conditions and not self._holds(i, record):
            return
        if kind == b.DELETE and record is None:
            self.outcomes[i] = b.ABSENT
            return
        self.seq += 1
        if kind == b.DELETE:
            self.writes[key], outcome = None, b.DELETED
        else:
            self.writes[key] = put_record(self.batch, i, self.epoch, self.seq, self.time_ms)
            outcome = b.CREATED if record is None else b.REPLACED
        self.logged[i] = outcome
        self._result(i, (self.epoch, self.seq), outcome)

    def _holds(self, i: int, record: Known | None) -> bool:
        wanted = self.batch.conditions[i]
        version = None if record is None else (record[1], record[2])
        if version == wanted:
            return True
        have = "absent" if version is None else f"at version {list(version)}"
        want = "absent" if wanted is None else f"at version {list(wanted)}"
        failure = PreconditionFailed(f"the key is {have}, not {want}; read it again")
        self.reply.failures[i] = failure.to_body()
        return False

    def _result(self, i: int, version: b.Version, outcome: int) -> None:
        assert isinstance(self.reply.epochs, list)
        assert isinstance(self.reply.seqs, list)
        self.outcomes[i] = outcome
        self.reply.epochs[i], self.reply.seqs[i] = version

    def _undo(self) -> None:
        """An atomic batch with a refused operation does nothing."""
        cause = min(self.reply.failures)
        failure = PreconditionFailed(
            f"operation {cause} of the atomic batch was refused; nothing was done"
        )
        self.reply.failures = {
            i: self.reply.failures.get(i, failure.to_body()) for i in range(len(self.batch))
        }
        count = len(self.batch)
        self.writes, self.logged, self.outcomes = {}, bytearray(count), bytearray(count)
        self.reply.seqs = [0] * count

    def _add_values(self) -> None:
        """What the gets found, as much as fits beside the results of the writes."""
        if not self.records:
            return
        records = map(self.records.get, range(len(self.batch)))
        values: list[Any] = [r[0] if r else None for r in records]
        self.reply.values = values
        self.reply.expires_at = {i: r[3] for i, r in self.records.items() if r[3] is not None}
        fit_values(self.reply, self.replica.sizes.entry - RESULT_BYTES * len(self.batch))


def put_record(batch: Batch, i: int, epoch: int, seq: int, time_ms: int) -> Record:
    ttl_ms = batch.ttls_ms.get(i)
    value = batch.values[i]
    assert value is not None
    return (value, epoch, seq, None if ttl_ms is None else time_ms + ttl_ms)


def data_bytes_added(writes: Writes, before: Mapping[bytes, Known | None]) -> int:
    """How much larger keys and values become, all together, by these writes; `before` has the records they replace."""
    new = sum([len(key) + len(r[0]) for key, r in writes.items() if r is not None])
    return new - sum([len(key) + len(r[0]) for key, r in before.items() if r is not None])


def plain_writes(batch: Batch, epoch: int, first: int) -> Writes:
    """The writes of puts without lifetimes, all of them done."""
    seqs = range(first, first + len(batch))
    return {
        key: (value, epoch, seq, None)  # type: ignore[misc]  # a put's value is bytes
        for key, value, seq in zip(batch.keys, batch.values, seqs, strict=True)
    }


def logged_writes(logged: LoggedBatch) -> Writes:
    """The writes of a logged batch: the same records that its primary made when it decided."""
    batch, seq = logged.batch, logged.first
    put = logged.outcomes.count(b.CREATED) + logged.outcomes.count(b.REPLACED)
    if put == len(batch) and not batch.ttls_ms:
        return plain_writes(batch, logged.epoch, seq)
    writes: Writes = {}
    for i, outcome in enumerate(logged.outcomes):
        if outcome == b.DELETED:
            writes[batch.keys[i]] = None
        elif outcome in b.APPLIED:
            writes[batch.keys[i]] = put_record(batch, i, logged.epoch, seq, logged.time_ms)
        seq += outcome in b.APPLIED
    return writes


_NO_RECORD = (None, 0, 0, None)


def read_reply(records: list[Known | None], bytes_max: int) -> BatchReply:
    """Answer gets, as many as fit into one message; the rest is UNANSWERED. The first always fits."""
    outcomes = bytes([b.FOUND]) * len(records)
    if not all(records):
        outcomes = bytes([b.MISSING if r is None else b.FOUND for r in records])
    columns: Any = zip(*[r or _NO_RECORD for r in records], strict=True)
    values, epochs, seqs, expires_at = map(list, columns)  # Unread is for `fit_values` to leave out
    reply = BatchReply(outcomes, epochs, seqs, values)
    if expires_at.count(None) < len(records):
        reply.expires_at = {i: at for i, at in enumerate(expires_at) if at is not None}
    fit_values(reply, bytes_max, keep=1)
    if epochs.count(epochs[0]) == len(epochs):
        reply.epochs = epochs[0]
    return reply


def fit_values(reply: BatchReply, bytes_max: int, keep: int = 0) -> None:
    """Leave values out of a reply until it fits; the first `keep` operations stay as they are.

    What is Unread is left out in any case.
    """
    values: list[Any] | None = reply.values
    epochs, seqs = reply.epochs, reply.seqs
    assert isinstance(values, list)
    assert isinstance(epochs, list)
    assert isinstance(seqs, list)
    room = bytes_max - READ_BYTES * len(values)
    types = {*map(type, values)}
    sizes = (
        [*map(len, values)] if types == {bytes} else [0 if v is None else len(v) for v in values]
    )
    if sum(sizes) <= room and Unread not in types:
        return
    outcomes = bytearray(reply.outcomes)
    for i, value in enumerate(values):
        is_unread = type(value) is Unread
        size = 0 if is_unread else sizes[i]
        room -= size
        if is_unread or (room < 0 and value is not None and i >= keep):
            outcomes[i] = b.UNANSWERED
            values[i], epochs[i], seqs[i] = None, 0, 0
            room += size + READ_BYTES - UNANSWERED_BYTES
            reply.expires_at.pop(i, None)
    reply.outcomes = bytes(outcomes)
