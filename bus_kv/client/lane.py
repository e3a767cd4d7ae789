"""What waits to be sent to one shard: columns on the first attempt, objects once an operation needs another one."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Any

from bus_kv.core.fate import Fate
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.sizes import ENVELOPE_BYTES, OPERATION_BYTES, operation_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bus_kv.protocol.batch import Version


@dataclass(slots=True)
class Columns:
    """Operations as parallel arrays, an index each; what is rarely set is a sparse map. All are gets, or none is."""

    keys: list[bytes] = field(default_factory=list)
    tokens: list[Any] = field(default_factory=list)
    """Whom to tell the outcome."""
    deadlines_ns: list[int] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)
    values: list[bytes | None] = field(default_factory=list)
    """Neither has to be filled in for gets."""
    conditions: dict[int, Version | None] = field(default_factory=dict)
    ttls_ms: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def extend(
        self, kind: int, keys: list[bytes], values: Sequence[bytes | None], tokens: list[Any],
        deadline_ns: int,
    ) -> None:  # fmt: skip
        if kind != b.GET:
            self.kinds += bytes([kind]) * len(keys)
            self.values += values
        self.keys += keys
        self.tokens += tokens
        self.deadlines_ns += [deadline_ns] * len(keys)

    def fitting(self, count: int, bytes_max: int) -> int:
        """How many of the first `count` operations fit into a batch of `bytes_max`; at least one."""
        keys, values = self.keys[:count], [v for v in self.values[:count] if v]
        bytes_max -= ENVELOPE_BYTES
        if sum(map(len, keys)) + sum(map(len, values)) + count * OPERATION_BYTES <= bytes_max:
            return count
        sizes = map(operation_bytes, keys, self.values or repeat(None))
        return max(1, bisect_right([*accumulate(sizes)], bytes_max))

    def split(self, count: int) -> tuple[Columns, Columns]:
        """The first `count` operations, and the others."""
        if count == len(self):
            return self, Columns()
        return self._slice(0, count), self._slice(count, len(self))

    def _slice(self, start: int, end: int) -> Columns:
        return Columns(
            self.keys[start:end],
            self.tokens[start:end],
            self.deadlines_ns[start:end],
            self.kinds[start:end],
            self.values[start:end],
            {i - start: c for i, c in self.conditions.items() if start <= i < end},
            {i - start: t for i, t in self.ttls_ms.items() if start <= i < end},
        )

    def batch(self, client: str, numbers: Sequence[int], consistency: str) -> Batch:
        kinds = bytes(self.kinds) or bytes([b.GET]) * len(self)
        return Batch(
            kinds, self.keys, self.values if b.PUT in kinds else [], client, numbers,
            conditions=self.conditions, ttls_ms=self.ttls_ms, consistency=consistency,
        )  # fmt: skip


@dataclass(slots=True, eq=False)
class Operation(Fate):
    """One get, put or delete that could not be sent at once, or has to be sent again, under the same number."""

    kind: int
    key: bytes
    value: bytes | None
    token: Any
    number: int
    deadline_ns: int
    keyspace: str
    consistency: str | None
    has_condition: bool = False
    condition: Version | None = None
    ttl_ms: int | None = None
    attempts: int = 0
    unanswered: bool = False
    at_primary: bool = False
    """A get at ONE that no other replica could answer."""

    @property
    def is_read(self) -> bool:
        return self.kind == b.GET


@dataclass(slots=True, eq=False)
class Lane:
    shard: str
    reads: bool
    consistency: str
    keyspace: str
    anywhere: bool = False
    """Any replica may answer."""
    waiting: Columns = field(default_factory=Columns)
    again: list[Operation] = field(default_factory=list)
    in_flight: int = 0
    operations_in_flight: int = 0
    usual_ns: int = 0
    """How long answers take."""
    late_ns: int = 0
    """From when on that of the newest message is late; 0 once that has been seen."""

    @property
    def id(self) -> tuple[str, bool, str, bool]:
        return self.shard, self.reads, self.consistency, self.anywhere

    @property
    def has_work(self) -> bool:
        return bool(self.waiting.keys or self.again)

    @property
    def next_deadline_ns(self) -> int:
        """When the first of what waits has waited too long. Only if `has_work`."""
        return min([*self.waiting.deadlines_ns[:1], *[o.deadline_ns for o in self.again[:1]]])


@dataclass(slots=True)
class Sent:
    """One message under way."""

    lane: Lane
    columns: Columns
    numbers: Sequence[int]
    sent_ns: int
    give_up_ns: int
    suspect_ns: int
    """When the primary is suspected of being gone."""
    epoch: int = 0
    """Of the shard, as it was sent."""
    node: str = ""
    """The primary then; empty when any replica may answer."""
    suspected: bool = False
    again: list[Operation] | None = None
    """The operations when this is not their first attempt."""

    @property
    def next_ns(self) -> int:
        """When to look at it again, if there is no answer by then."""
        return self.give_up_ns if self.suspected else min(self.suspect_ns, self.give_up_ns)

    def operations(self) -> list[Operation]:
        if self.again is None:
            self.again = operations_of(self.columns, self.numbers, self.lane)
        return self.again


def operations_of(columns: Columns, numbers: Sequence[int], lane: Lane) -> list[Operation]:
    kinds, values = columns.kinds, columns.values
    if lane.reads:
        kinds, values = bytearray([b.GET]) * len(columns), [None] * len(columns)
    rows = zip(
        kinds, columns.keys, values, columns.tokens, numbers, columns.deadlines_ns, strict=True
    )
    operations = [
        Operation(kind, key, value, token, number, deadline_ns, lane.keyspace, lane.consistency)
        for kind, key, value, token, number, deadline_ns in rows
    ]
    for i, condition in columns.conditions.items():
        operations[i].has_condition, operations[i].condition = True, condition
    for i, ttl_ms in columns.ttls_ms.items():
        operations[i].ttl_ms = ttl_ms
    return operations


def columns_of(operations: list[Operation]) -> Columns:
    return Columns(
        [o.key for o in operations],
        [o.token for o in operations],
        [o.deadline_ns for o in operations],
        bytearray([o.kind for o in operations]),
        [o.value for o in operations],
        {i: o.condition for i, o in enumerate(operations) if o.has_condition},
        {i: o.ttl_ms for i, o in enumerate(operations) if o.ttl_ms is not None},
    )
