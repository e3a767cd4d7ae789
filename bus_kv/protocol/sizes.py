"""What fits into a message: every size limit follows from the server's max_payload, here and nowhere else.

The rule behind the numbers: what is accepted fits every later message about it. A value fits a batch with the largest
key, a batch fits an entry with the decisions about it, an entry fits a message, all results of a batch fit a reply.
"""

from __future__ import annotations

from dataclasses import dataclass

from bus_kv.knobs import KEY_BYTES_MAX, OPS_MAX

MAX_PAYLOAD_BYTES_MIN = 65_536
"""A server that carries less than this is not usable: a key alone has 4 KiB."""
HEADERS_BYTES = 1024
"""Room in a message for headers: the failure's text and code, a trace context."""
ENVELOPE_BYTES = 512
"""Room for field names, shard, client and epoch around a batch, or around an entry's batches."""
RESULT_BYTES = 320
"""Longest result of a write, or failure of one operation, in either codec."""
OPERATION_BYTES = 80
"""What an operation takes in a batch beside its key and value, everything set: kind, number, index, condition, ttl."""
READ_BYTES = 48
"""What the answer to a get takes beside its value: outcome, version, lifetime."""
UNANSWERED_BYTES = 4
"""What a get takes in an answer that leaves it out."""
ENTRY_BYTES = 9
"""What an entry takes in a list of them beside its own bytes: CBOR says how long it is."""
ITEM_BYTES = 64
"""What an item of a scan takes beside key and value."""


@dataclass(frozen=True, slots=True)
class Sizes:
    max_payload: int

    @property
    def message(self) -> int:
        """Largest body that we send."""
        return self.max_payload - HEADERS_BYTES

    @property
    def entry(self) -> int:
        """Largest sum of an entry's batches and of the decisions about them."""
        return self.message - ENVELOPE_BYTES

    @property
    def batch(self) -> int:
        """Largest encoded batch."""
        return self.entry - OPS_MAX - ENVELOPE_BYTES

    @property
    def value(self) -> int:
        """Largest value."""
        return self.batch - KEY_BYTES_MAX - OPERATION_BYTES - ENVELOPE_BYTES

    @property
    def operations(self) -> int:
        """Most operations in one message: their results fit into one reply."""
        return min(OPS_MAX, self.entry // RESULT_BYTES)

    @property
    def page(self) -> int:
        """Largest sum of the items of one page of a scan; half a message, as JSON may need twice."""
        return self.entry // 2


def operation_bytes(key: bytes, value: bytes | None) -> int:
    """What an operation takes in a batch, at most."""
    return len(key) + len(value or b"") + OPERATION_BYTES
