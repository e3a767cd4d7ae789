"""The log entry: one group-committed step of one shard, and the unit that replicas exchange.

An entry is a header with the primary's decisions and the clients' batches, bytes unchanged. Every member logs the
same bytes, so an entry needs no interpretation to be stored, compared or sent on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bus_kv.protocol.batch import APPLIED, Batch, decode_batch
from bus_kv.protocol.codec import decode_cbor, encode_cbor

ROLLED_BACK = "rolled_back"

_APPLIED = bytes(APPLIED)
_NOT_APPLIED = bytes(b for b in range(256) if b not in APPLIED)


def applied_count(outcomes: bytes) -> int:
    """How many operations took a seq."""
    return len(outcomes.translate(None, _NOT_APPLIED))


@dataclass(frozen=True, slots=True)
class Entry:
    shard: str
    epoch: int
    first: int
    """Seq of the first operation; an entry with a record holds none and takes one seq itself."""
    last: int
    previous: tuple[int, int]
    """(epoch, last seq) of the entry before it: what log matching compares (R2)."""
    time_ms: int
    """Log time: milliseconds since the Unix epoch, never less than in the entry before (R5)."""
    data_bytes: int = 0
    """What the entry adds to the sizes of keys and values, negative when it takes away: replicas need not read what was
    there before to know it."""
    outcomes: tuple[bytes, ...] = ()
    """The primary's decision about each operation, one byte string per batch."""
    batches: tuple[bytes, ...] = ()
    record: dict[str, Any] | None = None
    """Of an entry that holds no operations and takes one seq: the shard's record, in an opening entry, or
    {ROLLED_BACK: bodies of entries that some replica has cut}."""

    def encode(self) -> bytes:
        header = [
            self.shard, self.epoch, self.first, self.last, self.previous, self.time_ms,
            self.data_bytes, self.outcomes, self.record,
        ]  # fmt: skip
        return encode_cbor({"header": header, "batches": self.batches})

    def decoded(self) -> list[tuple[bytes, Batch]]:
        """(outcomes, batch) of every batch, in order."""
        pairs = zip(self.outcomes, self.batches, strict=True)
        return [(outcomes, decode_batch(batch)) for outcomes, batch in pairs]


def decode_entry(body: bytes) -> Entry:
    """Raises MalformedRequest, KeyError, TypeError or ValueError when the bytes are no entry."""
    fields = decode_cbor(body)
    shard, epoch, first, last, previous, time_ms, data_bytes, outcomes, record = fields["header"]
    return Entry(
        shard, epoch, first, last, tuple(previous), time_ms, data_bytes,
        tuple(outcomes), tuple(fields["batches"]), record,
    )  # fmt: skip
