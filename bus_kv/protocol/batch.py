"""The columnar batch: what the hot path carries from a client's call to the log of every member, bytes unchanged.

A batch is parallel arrays over operations of one shard. Per-operation Python objects exist only at the API's edge; here
an operation is an index. Rare fields (conditions, lifetimes) are sparse maps from index to value.

An operation's identity for exactly-once is (client, number, index). A client that coalesces calls gives each its own
number and index 0; a `batch` request gives all its operations one number and their positions as indexes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv import knobs
from bus_kv.errors import KeyTooLarge, MalformedRequest, ValueTooLarge
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.sizes import ENVELOPE_BYTES, Sizes, operation_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

GET, PUT, DELETE, EXPIRE = 0, 1, 2, 3
"""Kinds of operation. EXPIRE is written by a primary only and never accepted from the bus."""

KIND_NAMES = ("get", "put", "delete", "expire")

# Outcome of one operation, a byte each. The first five are the primary's decisions and stand in the log.
REFUSED, CREATED, REPLACED, DELETED, ABSENT = 0, 1, 2, 3, 4
FOUND, MISSING, UNANSWERED = 5, 6, 7
"""A get's outcome; UNANSWERED means that the reply was full: ask again for this one."""

APPLIED = (CREATED, REPLACED, DELETED)
"""Outcomes that took a seq."""

Version: TypeAlias = tuple[int, int]
"""(epoch, seq) of the write that made a value."""

CONSISTENCIES = ("one", "quorum", "all")


@dataclass(slots=True)
class Batch:
    kinds: bytes
    keys: list[bytes]
    values: list[bytes | None] = field(default_factory=list)
    """One per operation when the batch holds a put, else empty."""
    client: str = ""
    numbers: Sequence[int] = ()
    """Request number of each operation, ascending; empty for a batch of gets."""
    indexes: Sequence[int] = ()
    """Index within its request of each operation; empty means 0 for all."""
    conditions: dict[int, Version | None] = field(default_factory=dict)
    """Operation -> version its key must have now; None: the key must be absent."""
    ttls_ms: dict[int, int] = field(default_factory=dict)
    consistency: str = "quorum"
    atomic: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def identity(self, i: int) -> tuple[int, int]:
        """(number, index) of operation i."""
        return self.numbers[i], self.indexes[i] if self.indexes else 0

    def select(self, positions: Sequence[int]) -> Batch:
        """The batch of the operations at `positions` alone, identities kept."""
        return Batch(
            kinds=bytes([self.kinds[i] for i in positions]),
            keys=[self.keys[i] for i in positions],
            values=[self.values[i] for i in positions] if self.values else [],
            client=self.client,
            numbers=[self.numbers[i] for i in positions] if self.numbers else (),
            indexes=[self.indexes[i] for i in positions] if self.indexes else (),
            conditions={n: self.conditions[i] for n, i in _present(positions, self.conditions)},
            ttls_ms={n: self.ttls_ms[i] for n, i in _present(positions, self.ttls_ms)},
            consistency=self.consistency,
            atomic=self.atomic,
        )

    def encode(self) -> bytes:
        """The bytes that travel and are logged; what is at its default is left out."""
        numbers: Any = self.numbers
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1 and not self.indexes:
            numbers = numbers[0]
        fields = {
            "kinds": self.kinds,
            "keys": self.keys,
            "values": self.values,
            "client": self.client,
            "numbers": numbers,
            "indexes": self.indexes,
            "conditions": [*self.conditions.items()],
            "ttls_ms": [*self.ttls_ms.items()],
        }
        body = {name: value for name, value in fields.items() if value or value == 0}
        body["consistency"] = self.consistency
        if self.atomic:
            body["atomic"] = True
        return encode_cbor(body)


def _present(positions: Sequence[int], sparse: dict[int, Any]) -> Iterator[tuple[int, int]]:
    return ((n, i) for n, i in enumerate(positions) if i in sparse) if sparse else iter(())


_FIELDS = {
    "kinds", "keys", "values", "client", "numbers", "indexes",
    "conditions", "ttls_ms", "consistency", "atomic",
}  # fmt: skip


def decode_batch(body: bytes) -> Batch:
    """Decode without judging the contents: for bytes that `check_batch` has passed once."""
    fields = decode_cbor(body)
    if not fields.keys() <= _FIELDS:
        raise MalformedRequest(f"unknown field {min(map(str, fields.keys() - _FIELDS))} in batch")
    for name in ("conditions", "ttls_ms"):
        if name in fields:
            fields[name] = _from_pairs(fields[name])
    batch = Batch(**{"kinds": b"", "keys": [], **fields})
    _require(type(batch.keys) is list, "keys is not a list")
    first: Any = batch.numbers
    if type(first) is int and 0 <= first <= knobs.NUMBER_MAX:
        batch.numbers = range(first, first + len(batch.keys))
    return batch


def _from_pairs(pairs: Any) -> dict[Any, Any]:
    """A sparse map travels as a list of pairs: maps on the wire have text names only."""
    try:
        return dict(pairs)
    except (TypeError, ValueError):
        raise MalformedRequest("a sparse field is a list of [operation, value]") from None


def check_batch(batch: Batch, sizes: Sizes) -> None:
    """Refuse a batch that is not whole: MalformedRequest, KeyTooLarge, ValueTooLarge.

    Every test runs over a column at C speed; which operation is at fault is looked for only when one is.
    """
    count = len(batch.keys)
    _require(0 < count <= sizes.operations, f"a batch holds 1 to {sizes.operations} operations")
    _require(type(batch.kinds) is bytes and len(batch.kinds) == count, "kinds do not match keys")
    _require(max(batch.kinds) <= DELETE, "unknown kind of operation")
    _require(set(map(type, batch.keys)) == {bytes}, "keys are byte strings")
    _require(batch.consistency in CONSISTENCIES, "consistency is one of one, quorum, all")
    _require(type(batch.atomic) is bool, "atomic is true or false")
    check_keys(batch.keys)
    _check_values(batch, count, sizes.value)
    _check_identity(batch, count)
    _check_sparse(batch, count)


def check_keys(keys: Sequence[bytes]) -> None:
    lengths = [*map(len, keys)]
    _require(min(lengths) > 0, "a key is empty; keys have 1 to 4096 bytes")
    if max(lengths) > knobs.KEY_BYTES_MAX:
        raise KeyTooLarge(
            f"a key of {max(lengths)} bytes; keys have at most {knobs.KEY_BYTES_MAX} bytes"
        )


def check_values(values: Sequence[bytes], value_bytes_max: int) -> None:
    longest = max(map(len, values), default=0)
    if longest > value_bytes_max:
        raise ValueTooLarge(
            f"a value of {longest} bytes; this cluster takes values up to {value_bytes_max} bytes"
        )


def _check_values(batch: Batch, count: int, value_bytes_max: int) -> None:
    puts = batch.kinds.count(PUT)
    if not batch.values:
        return _require(not puts, "a put has no value")
    _require(type(batch.values) is list and len(batch.values) == count, "values do not match keys")
    if puts == count:
        _require(set(map(type, batch.values)) == {bytes}, "a put's value is a byte string")
        return check_values(batch.values, value_bytes_max)  # type: ignore[arg-type]
    for kind, value in zip(batch.kinds, batch.values, strict=True):
        _require(type(value) is (bytes if kind == PUT else type(None)), "only puts have values")
    return check_values([v for v in batch.values if v is not None], value_bytes_max)


def _check_identity(batch: Batch, count: int) -> None:
    if batch.kinds.count(GET) == count:
        return
    _require(type(batch.client) is str and is_client(batch.client), "client is 1 to 64 characters")
    numbers = batch.numbers
    _require(type(numbers) in (list, range) and len(numbers) == count, "numbers do not match keys")
    _require(set(map(type, numbers)) == {int}, "numbers are integers")
    _require(min(numbers) >= 0 and max(numbers) <= knobs.NUMBER_MAX, "numbers are unsigned 64 bit")
    indexes = batch.indexes
    if indexes:
        _require(type(indexes) is list and len(indexes) == count, "indexes do not match keys")
        _require(set(map(type, indexes)) == {int}, "indexes are integers")
        _require(min(indexes) >= 0 and max(indexes) < 2**32, "indexes are unsigned 32 bit")
        ascending = list(zip(numbers, indexes, strict=True))
        _require(all(a < b for a, b in pairwise(ascending)), "not ascending")
    elif type(numbers) is list:
        _require(sorted(set(numbers)) == numbers, "numbers are ascending, each once")


def is_client(client: str) -> bool:
    return 0 < len(client) <= knobs.CLIENT_CHARS_MAX


def _check_sparse(batch: Batch, count: int) -> None:
    _require(type(batch.conditions) is dict and type(batch.ttls_ms) is dict, "not a map")
    for i, condition in batch.conditions.items():
        _require(
            type(i) is int and 0 <= i < count and batch.kinds[i] != GET, "condition of no write"
        )
        if condition is None:
            _require(batch.kinds[i] == PUT, "only a put can ask for an absent key")
        else:
            batch.conditions[i] = as_version(condition)
    for i, ttl_ms in batch.ttls_ms.items():
        _require(type(i) is int and 0 <= i < count and batch.kinds[i] == PUT, "lifetime of no put")
        check_ttl(ttl_ms)


def check_ttl(ttl_ms: Any) -> None:
    _require(
        type(ttl_ms) is int and 0 < ttl_ms <= knobs.TTL_MS_MAX,
        f"ttl_ms is a whole number of milliseconds from 1 to {knobs.TTL_MS_MAX}",
    )


def as_version(value: Any) -> Version:
    """`[epoch, seq]` as a version. Raises MalformedRequest."""
    whole = type(value) in (list, tuple) and len(value) == 2
    _require(
        whole and all(type(n) is int and 0 <= n < 2**63 for n in value),
        "a version is [epoch, seq], two whole numbers",
    )
    return (value[0], value[1])


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MalformedRequest(message)


def split_batch(batch: Batch, bytes_max: int) -> list[Batch]:
    """Cut a batch into batches that encode to at most `bytes_max` each, in order. An atomic one is never cut."""
    values = batch.values or [None] * len(batch)
    sizes = [*map(operation_bytes, batch.keys, values)]
    bytes_max -= ENVELOPE_BYTES
    if batch.atomic or sum(sizes) <= bytes_max:
        return [batch]
    pieces: list[list[int]] = [[]]
    room = bytes_max
    for i, size in enumerate(sizes):
        if size > room and pieces[-1]:
            pieces.append([])
            room = bytes_max
        pieces[-1].append(i)
        room -= size
    return [batch.select(piece) for piece in pieces]


@dataclass(slots=True)
class BatchReply:
    """Outcomes of a batch, columnar as well. `failures` holds wire bodies of what was refused, by operation."""

    outcomes: bytes
    epochs: int | list[int]
    """Epoch of each operation's version; a plain number when it is the same for all."""
    seqs: int | list[int]
    """Seq of each operation's version, 0 where there is none; a plain number n means n, n+1, n+2 …"""
    values: list[bytes | None] | None = None
    expires_at: dict[int, int] = field(default_factory=dict)
    failures: dict[int, dict[str, Any]] = field(default_factory=dict)
    read: tuple[int, int, int] | None = None
    """(epoch, seq, age_ms) of the state that a ONE read was answered from."""

    def version(self, i: int) -> Version | None:
        seq = self.seqs + i if isinstance(self.seqs, int) else self.seqs[i]
        epoch = self.epochs if isinstance(self.epochs, int) else self.epochs[i]
        return (epoch, seq) if seq else None

    def versions(self) -> list[Version | None]:
        """Every operation's version."""
        count = len(self.outcomes)
        seqs = range(self.seqs, self.seqs + count) if isinstance(self.seqs, int) else self.seqs
        epochs = [self.epochs] * count if isinstance(self.epochs, int) else self.epochs
        return [v if v[1] else None for v in zip(epochs, seqs, strict=True)]

    def to_wire(self) -> dict[str, Any]:
        wire: dict[str, Any] = {
            "outcomes": self.outcomes,
            "epochs": self.epochs,
            "seqs": self.seqs,
        }
        for name in ("values", "read"):
            if getattr(self, name):
                wire[name] = getattr(self, name)
        for name in ("expires_at", "failures"):
            if getattr(self, name):
                wire[name] = [*getattr(self, name).items()]
        return wire


def decode_batch_reply(wire: dict[str, Any]) -> BatchReply:
    """Read the `batch` field of a shard's answer."""
    for name in ("expires_at", "failures"):
        if name in wire:
            wire[name] = dict(wire[name])
    return BatchReply(**wire)
