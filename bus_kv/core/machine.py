"""The contract between machines, which decide, and drivers, which do I/O.

A machine is told what happened by `step(event, now_ns)`; what it wants done is collected until the driver takes it as
one Ready. It never blocks, sleeps, reads a clock or draws its own randomness: time is an argument in nanoseconds since
the Unix epoch that never goes back within a process, and randomness is handed to its constructor.

The turn of a driver: step the events of the bounded inbox, take one Ready, hand `append` to the log, send the rest.
When the log is durable the driver steps AppendCompleted, and the machine releases what depended on it. That is group
commit: whatever arrived while one commit was on its way shares the next (after etcd's raft, "Ready"). A turn ends early
once the machine is full: what came of its first events then travels while the rest is worked on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Mapping

    from bus_kv.protocol.batch import Batch

    Record: TypeAlias = tuple[bytes, int, int, int | None]
    """(value, epoch, seq, expires_at)."""

# ---- events: something happened ----


@dataclass(slots=True)
class Received:
    """A message came in. `channel` names the subscription, `name` the subject's telling token (verb, shard, node)."""

    channel: str
    name: str
    body: bytes
    reply: str = ""
    headers: Mapping[str, str] | None = None


@dataclass(slots=True)
class Responded:
    """An answer to a Request; `body` None means that nobody listens on the subject (NATS "no responders")."""

    correlation: int
    body: bytes | None


@dataclass(slots=True)
class AppendCompleted:
    """Everything appended with a ticket up to this one is durable."""

    ticket: int


@dataclass(slots=True)
class AppendStalled:
    """The log cannot take more for now (disk full). It tries again by itself; nothing is lost or out of order."""

    reason: str


@dataclass(slots=True)
class Stored:
    """An answer of the map's store. `document` None and `failure` None: no such key. A failure is of unknown outcome
    unless `conflict`: then the compare-and-set found another revision and changed nothing."""

    correlation: int
    revision: int = 0
    document: dict[str, Any] | None = None
    failure: str | None = None
    conflict: bool = False


@dataclass(slots=True)
class Answered:
    """The state's answer to a query or a fold. `failure` says why there is none; asking again later may help."""

    ticket: int
    rows: list[Any] = field(default_factory=list)
    failure: str | None = None


@dataclass(slots=True)
class FoldStalled:
    """The state cannot take more for now (disk full). It tries again by itself; an empty reason: it goes on."""

    reason: str


@dataclass(slots=True)
class Checkpointed:
    """The state is whole up to these seqs, by shard, without the write-ahead log of its own."""

    lasts: dict[str, int]


Event: TypeAlias = (
    Received
    | Responded
    | AppendCompleted
    | AppendStalled
    | Stored
    | Answered
    | FoldStalled
    | Checkpointed
)

# ---- effects: something to do ----


@dataclass(slots=True)
class Publish:
    subject: str
    body: bytes
    headers: Mapping[str, str] | None = None


@dataclass(slots=True)
class Request:
    """Publish with a reply subject that leads back here as Responded. No deadline: the machine keeps its own."""

    correlation: int
    subject: str
    body: bytes


@dataclass(slots=True)
class Subscribe:
    """Listen on a channel, of a shard or of the process; `active` False ends it."""

    channel: str
    name: str
    active: bool


@dataclass(slots=True)
class StoreGet:
    correlation: int
    key: str


@dataclass(slots=True)
class StoreCas:
    """Put `document` under `key` if the key's revision still is `revision` (0: the key does not exist)."""

    correlation: int
    key: str
    revision: int
    document: dict[str, Any]


@dataclass(slots=True)
class Halt:
    """End the process with this exit code, telling the operator why."""

    exit_code: int
    message: str


@dataclass(slots=True)
class Trim:
    """Entries of a shard up to this seq are no longer needed in the log."""

    shard: str
    last: int


@dataclass(frozen=True, slots=True)
class LoggedBatch:
    """A committed batch with its primary's decisions, as the log has it."""

    batch: Batch
    outcomes: bytes
    epoch: int
    first: int
    """Seq of its first applied operation."""
    time_ms: int


@dataclass(frozen=True, slots=True)
class Mark:
    """Up to where the state of a shard holds its log: (epoch, seq) and time of the last entry; what it amounts to."""

    epoch: int = 0
    last: int = 0
    time_ms: int = 0
    keys: int = 0
    data_bytes: int = 0
    lineage: tuple[tuple[int, int], ...] = ()
    """(epoch, seq) of every opening entry up to here: which epochs are part of the log, and from where."""


@dataclass(slots=True)
class Fold:
    """Bring committed operations of one shard into the state, all of them with the mark in one transaction."""

    ticket: int
    shard: str
    keyspace: str
    records: dict[bytes, Record | None]
    """Newest record of every key they wrote; None: deleted."""
    batches: list[LoggedBatch]
    mark: Mark
    rolled_back: list[LoggedBatch] = field(default_factory=list)
    """What was taken out of some replica's log; of these versions, what the oplog has already is left out."""


@dataclass(frozen=True, slots=True)
class Unread:
    """In place of a value that was left on disk, and as long."""

    value_bytes: int

    def __len__(self) -> int:
        return self.value_bytes


@dataclass(slots=True)
class Lookup:
    """Records of these keys -> [reached, (key, value, epoch, seq, expires_at)…], absent keys left out.

    First those of `heads`, all of them with Unread in place of the value. Then those of `whole` in order, at least the
    first, up to the one with which values come to `bytes_max`; `reached` tells how many keys of `whole` were gone
    through by then.
    """

    ticket: int
    shard: str
    heads: list[bytes]
    whole: list[bytes]
    bytes_max: int


@dataclass(slots=True)
class RangeRead:
    """Records of [start, end) in key order -> [(key, value, epoch, seq, expires_at)]: `limit` of them, or up to the one
    with which keys and values come to `bytes_max`, or all there are. `values` False leaves None in place of all values.
    """

    ticket: int
    shard: str
    start: bytes
    end: bytes | None
    limit: int
    bytes_max: int
    reverse: bool = False
    values: bool = True

    def goes_on(self, rows: list[Any]) -> bool:
        """Whether the range may hold more than these rows."""
        sizes = sum([len(row[0]) + len(row[1] or b"") for row in rows])
        return len(rows) >= self.limit or sizes >= self.bytes_max


@dataclass(slots=True)
class RangeCount:
    """How many keys lie in [start, end) -> [count]."""

    ticket: int
    shard: str
    start: bytes
    end: bytes | None


@dataclass(slots=True)
class KeysAfter:
    """The next keys in the order of the table, from position `after` on -> [(position, [keys])], [] at its end."""

    ticket: int
    shard: str
    after: int
    count: int


@dataclass(slots=True)
class Expiring:
    """Lifetimes that end at or before `until_ms`, the earliest first -> [(expires_at, key, seq)], `limit` at most."""

    ticket: int
    shard: str
    until_ms: int
    limit: int


@dataclass(slots=True)
class RequestsOf:
    """Logged batches of a client that may hold these request numbers, and its floor ->
    [floor, (numbers, indexes, outcomes, epoch, first, time_ms)…]."""

    ticket: int
    shard: str
    client: str
    first: int
    last: int


@dataclass(slots=True)
class HistoryOf:
    """Versions of a key below `before` (epoch, seq), newest first ->
    [(epoch, seq, op, value, time_ms, client, number)], `limit` at most."""

    ticket: int
    shard: str
    key: bytes
    before: tuple[int, int] | None
    limit: int
    bytes_max: int


@dataclass(slots=True)
class Sql:
    """A user's query over the kv and oplog of these shards -> [columns, rows]; a failure carries code and message."""

    ticket: int
    shards: list[str]
    query: str
    rows_max: int
    bytes_max: int
    timeout_ms: int


@dataclass(slots=True)
class LogRead:
    """Entries of a shard's log behind a place -> [have, entries]: the last (epoch, seq) in the log that is beyond
    `after` in neither, and the rows behind `after` up to `bytes_max`, one at least. Where there is no such end `have`
    is None and the rows are those with which the log begins."""

    ticket: int
    shard: str
    after: tuple[int, int]
    bytes_max: int


@dataclass(slots=True)
class CutsRead:
    """Forget what was cut from a shard's log up to place `told`, then read what was cut after it ->
    [(place, EntryRow)…], the oldest first, up to `bytes_max`, one at least if there is any."""

    ticket: int
    shard: str
    told: int
    bytes_max: int


@dataclass(slots=True)
class SnapshotRead:
    """A chunk of a shard's state as it was at seq `last` -> [table, chunk, place of the next chunk or None at the end].
    `place` None begins; what was written after `last` may be left out."""

    ticket: int
    shard: str
    last: int
    place: Any
    bytes_max: int


@dataclass(slots=True)
class ClientsOf:
    """Clients whose requests are in the state -> [(client, newest number)]."""

    ticket: int
    shard: str


@dataclass(slots=True)
class Load:
    """Write a chunk of a snapshot. Without a table it begins, and clears the shard; with a mark it ends, and only then
    is there anything."""

    ticket: int
    shard: str
    keyspace: str
    table: str
    chunk: bytes
    mark: Mark | None = None


Query: TypeAlias = (
    Lookup
    | RangeRead
    | RangeCount
    | KeysAfter
    | Expiring
    | RequestsOf
    | HistoryOf
    | Sql
    | SnapshotRead
    | ClientsOf
)
Effect: TypeAlias = (
    Publish
    | Request
    | Subscribe
    | StoreGet
    | StoreCas
    | Halt
    | Trim
    | Fold
    | Load
    | LogRead
    | CutsRead
    | Query
)


@dataclass(slots=True)
class Append:
    """One log transaction: entry rows and replica rows, durable together or not at all."""

    ticket: int
    entries: list[EntryRow | CutRow]
    """In this order."""
    replicas: list[ReplicaRow]
    map: dict[str, Any] | None = None
    """What of the shard map has changed (R10): see `document_change`."""


@dataclass(frozen=True, slots=True)
class EntryRow:
    shard: str
    last: int
    epoch: int
    body: bytes


@dataclass(frozen=True, slots=True)
class CutRow:
    """Take the entries behind `last` out of a shard's log and keep them aside: `epoch` has chosen another log (R2)."""

    shard: str
    last: int
    epoch: int
    keep: bool = True
    """False: a snapshot takes their place; nothing is kept."""


@dataclass(frozen=True, slots=True)
class ReplicaRow:
    """What a replica must remember besides its log (R1, R7): one row per shard, replaced as a whole."""

    shard: str
    promised_epoch: int
    promised_token: str
    opened_epoch: int
    record: dict[str, Any]
    """The shard's record, as the newest configuration told it."""
    base_seq: int = 0
    """Where the log begins after a snapshot: the state may have it up to there although the log is empty."""


@dataclass(slots=True)
class Ready:
    effects: list[Effect] = field(default_factory=list)
    append: Append | None = None


class Machine(Protocol):
    def step(self, event: Event, now_ns: int) -> None: ...

    def on_deadline(self, now_ns: int) -> None:
        """A deadline that `next_deadline_ns` told has passed; what has come since may have moved it."""

    def next_deadline_ns(self) -> int:
        """NEVER_NS: not before something comes."""

    def settle(self, now_ns: int) -> bool:
        """Do what the effects of the last turn did not have to wait for, unless another turn has done it already.

        True: it has effects of its own, so there has to be a turn.
        """

    @property
    def is_settled(self) -> bool:
        """Whether `settle` has nothing to do."""

    def take_ready(self, now_ns: int) -> Ready: ...

    @property
    def is_full(self) -> bool:
        """Whether enough was done since the last Ready: further events are for the next turn."""


def turn(machine: Machine, inbox: deque[Event], now_ns: int, deadline_ns: int) -> Ready:
    """One pass, the same in production and in the simulator: step what waits, then take one Ready.

    `deadline_ns` is what `next_deadline_ns` said after the turn before. Events that are left in the inbox need another
    turn.
    """
    while inbox and not machine.is_full:
        machine.step(inbox.popleft(), now_ns)
    if deadline_ns <= now_ns:
        machine.on_deadline(now_ns)
    return machine.take_ready(now_ns)
