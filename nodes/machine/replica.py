"""One node's copy of one shard: it orders writes while it is the primary, and enforces the shard map (rules R1–R8).

Theory of operation. A write is decided once, when it arrives: its outcome and seq are judged against the end of the log
(committed state under the uncommitted tail), and its batch joins the open segment. Every turn each open segment becomes
one entry; the log makes it durable; `on_durable` commits it, moves its writes into the table and releases the answers
that waited for it. An answer waits for the end of the log that it was judged against, so nobody is told about a state
that a crash can still take back. A read of committed state waits for nothing.

A replica may serve only while ACTIVE: its opening entry is durable and it knows that the map names its (epoch, token)
ACTIVE. It gets there by `open` and `activate`, and leaves by `promise`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import EntryRow, ReplicaRow
from bus_kv.errors import (
    BusKVError,
    ConsistencyNotMet,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    StaleEpoch,
    WrongShard,
)  # fmt: skip
from bus_kv.knobs import KEY_BYTES_MAX
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.protocol.entry import Entry, applied_count, decode_entry
from bus_kv.protocol.shard_map import shard_to_document, token_of
from bus_kv.protocol.sizes import OPERATION_BYTES
from nodes.machine.dedup import DedupWindow, Run
from nodes.machine.judge import Decision, Judge, logged_writes, read_reply
from nodes.machine.table import Record, Table, Writes

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.requests import ScanRequest
    from bus_kv.protocol.shard_map import Shard
    from bus_kv.protocol.sizes import Sizes

    Respond: TypeAlias = Callable[[BatchReply | BusKVError], None]


class Status(StrEnum):
    RESTARTED = "restarted"
    """Has a log and a past; needs a new epoch before it may serve (R7)."""
    PROMISED = "promised"
    """Sealed for a higher epoch; takes part in nothing older (R1)."""
    OPENING = "opening"
    OPENED = "opened"
    """The opening entry is durable; whether the map says ACTIVE is not known yet."""
    ACTIVE = "active"


@dataclass(slots=True)
class Segment:
    """The writes of one entry between decision and commit."""

    epoch: int
    first: int
    previous: tuple[int, int]
    time_ms: int
    record: dict[str, Any] | None = None
    last: int = 0
    outcomes: list[bytes] = field(default_factory=list)
    batches: list[bytes] = field(default_factory=list)
    batch_bytes: int = 0
    writes: Writes = field(default_factory=dict)
    appended: bool = False

    def entry(self, shard: str) -> Entry:
        return Entry(
            shard, self.epoch, self.first, self.last, self.previous, self.time_ms,
            tuple(self.outcomes), tuple(self.batches), self.record,
        )  # fmt: skip


@dataclass(slots=True)
class _Waiting:
    seq: int
    deadline_ns: int
    respond: Respond
    reply: BatchReply


class Replica:
    def __init__(self, shard: Shard, node: str, knobs: Knobs, sizes: Sizes) -> None:
        self.shard = shard
        self.node = node
        self.status = Status.RESTARTED
        self.promised: tuple[int, str] = (0, "")
        self.opened_epoch = 0
        self.last: tuple[int, int] = (0, 0)
        """(epoch, seq) of the end of the log, appended or still in memory."""
        self.commit_seq = 0
        self.time_ms = 0
        self.table = Table()
        self.tail: deque[Segment] = deque()
        self.members_for_all = 1
        """min(replication_factor, nodes of the map): how many members ALL takes (R4)."""
        self.operations = 0
        """Operations answered since the start of the process."""
        self._knobs = knobs
        self._sizes = sizes
        self._dedup = DedupWindow(knobs)
        self._waiting: deque[_Waiting] = deque()
        self._tail_bytes = 0

    # ---- life cycle ----

    def restore(self, row: ReplicaRow) -> None:
        """Take up what the disk remembers, before `replay`."""
        self.promised = (row.promised_epoch, row.promised_token)
        self.opened_epoch = row.opened_epoch

    def replay(self, row: EntryRow) -> None:
        """Apply an entry read from the log at start. All of it is committed: a shard's only member is its majority.

        Raises ValueError when it is not the one that follows.
        """
        entry = decode_entry(row.body)
        if (entry.shard, entry.epoch, entry.last) != (row.shard, row.epoch, row.last):
            raise ValueError(f"entry {row.last} of shard {row.shard} is another one")
        if entry.previous != self.last:
            raise ValueError(f"the log of shard {row.shard} has a gap before {entry.first}")
        seq = entry.first
        for outcomes, batch in entry.decoded():
            writes = logged_writes(batch, outcomes, entry.epoch, seq, entry.time_ms)
            self._remember(batch, outcomes, entry.epoch, seq, entry.time_ms)
            self.table.apply(writes)
            seq += applied_count(outcomes)
        self.last = (entry.epoch, entry.last)
        self.commit_seq = entry.last
        self.time_ms = entry.time_ms

    def row(self) -> ReplicaRow:
        return ReplicaRow(
            self.shard.id, *self.promised, self.opened_epoch, shard_to_document(self.shard)
        )

    def promise(self, epoch: int, token: str) -> None:
        """Take part in nothing older from now on. The caller makes it durable before it answers (R1)."""
        assert (epoch, token) == self.promised or epoch > self.promised[0], "R1: promises only grow"
        self.promised = (epoch, token)
        if self.status is not Status.PROMISED:
            self.status = Status.PROMISED
            self.fail_waiting("the shard is changing its configuration")

    def open(self, shard: Shard, time_ms: int) -> None:
        """Begin `shard.epoch` as its primary with an opening entry; at most once per epoch (step 3, R7)."""
        assert shard.epoch > self.opened_epoch, "R7: an epoch is opened once"
        attempt = (shard.epoch, shard.token)
        assert attempt == self.promised or shard.epoch > self.promised[0], "R1: promises only grow"
        self.fail_waiting("the shard is changing its configuration")
        self.shard = shard
        self.promised = (shard.epoch, shard.token)
        self.opened_epoch = shard.epoch
        self.status = Status.OPENING
        self.time_ms = max(self.time_ms, time_ms)
        seq = self.last[1] + 1
        segment = Segment(shard.epoch, seq, self.last, self.time_ms, shard_to_document(shard))
        segment.last = seq
        self.last = (shard.epoch, seq)
        self.tail.append(segment)

    def activate(self, shard: Shard) -> None:
        """The map says that this replica's attempt is ACTIVE: serve (step 4)."""
        assert self.status is Status.OPENED, "step 4: serve only after the opening entry is durable"
        assert (shard.epoch, shard.token) == self.promised, "step 4: only the own attempt counts"
        self.shard = shard
        self.status = Status.ACTIVE
        self._commit(self.last[1])

    # ---- writes and reads ----

    def submit(
        self, batch: Batch, raw: bytes, epoch: int, now_ns: int, deadline_ns: int, respond: Respond
    ) -> None:
        """Answer a checked batch: a batch of gets now, any other once what it was judged against is committed.

        An answer that cannot be given by `deadline_ns` is OUTCOME_UNKNOWN.
        """
        reads = batch.kinds.count(b.GET) == len(batch)
        refusal = self._refusal(batch, epoch) or (None if reads else self._overload())
        if refusal is not None:
            return respond(refusal)
        self.operations += len(batch)
        if reads:
            return respond(self._read(batch))
        decision = self._decide(batch, max(self.time_ms, now_ns // 1_000_000))
        if decision.writes:
            self._accept(batch, raw, decision)
        if batch.consistency == "all" and len(self.shard.members) < self.members_for_all:
            self._tell_all_not_met(decision.reply)
        return self._answer_at_end(decision.reply, deadline_ns, respond)

    def _refusal(self, batch: Batch, epoch: int) -> BusKVError | None:
        refusal = self._not_serving(epoch)
        if refusal is not None:
            return refusal
        tokens = batch.keys
        if self.policy != "range":
            tokens = [token_of(self.policy, key) for key in batch.keys]
        end = self.shard.end
        if min(tokens) < self.shard.start or (end is not None and max(tokens) >= end):
            return WrongShard(f"a key lies outside shard {self.shard.id}; read the map")
        return None

    def _not_serving(self, epoch: int) -> BusKVError | None:
        if self.status is not Status.ACTIVE:
            return NotPrimary(
                f"node {self.node} does not serve shard {self.shard.id}; read the map"
            )
        if epoch != self.shard.epoch:
            return StaleEpoch(f"shard {self.shard.id} is at epoch {self.shard.epoch}; read the map")
        return None

    def _overload(self) -> BusKVError | None:
        """The bounds of what waits for the log."""
        operations = self.last[1] - self.commit_seq
        if (
            operations > self._knobs.tail_operations_max
            or self._tail_bytes > self._knobs.tail_bytes_max
            or len(self._waiting) > self._knobs.calls_max
        ):
            return Overloaded(f"shard {self.shard.id} has too many writes under way; send it again")
        return None

    policy = "range"
    """How keys map to tokens; the node sets it from the keyspace."""

    def _read(self, batch: Batch) -> BatchReply:
        records = [*map(self.table.records.get, batch.keys)]
        reply = read_reply(records, self._sizes.entry)
        if batch.consistency == "one":
            reply.read = (self.shard.epoch, self.commit_seq, 0)
        return reply

    def _decide(self, batch: Batch, time_ms: int) -> Decision:
        """Outcomes of a batch at the end of the log. The plain case, new puts without conditions, is the hot path."""
        self.time_ms = time_ms
        seen = self._dedup.seen(batch)
        if seen or batch.conditions or batch.ttls_ms or batch.kinds.count(b.PUT) < len(batch):
            return Judge(self, batch, time_ms, seen).decide()
        epoch, first, latest = self.shard.epoch, self.last[1] + 1, self.latest
        marks = [b.CREATED if latest(key) is None else b.REPLACED for key in batch.keys]
        if len(set(batch.keys)) < len(batch.keys):
            _mark_repeats(batch.keys, marks)
        outcomes = bytes(marks)
        seqs = range(first, first + len(batch))
        writes: Writes = {
            key: (value, epoch, seq, None)  # type: ignore[misc]  # a put's value is bytes
            for key, value, seq in zip(batch.keys, batch.values, seqs, strict=True)
        }
        return Decision(writes, outcomes, BatchReply(outcomes, epoch, first))

    def latest(self, key: bytes) -> Record | None:
        """The key's record at the end of the log."""
        for segment in reversed(self.tail):
            if key in segment.writes:
                return segment.writes[key]
        return self.table.records.get(key)

    def _accept(self, batch: Batch, raw: bytes, decision: Decision) -> None:
        """Put a decided batch at the end of the log."""
        segment = self._open_segment(len(raw) + len(batch))
        first = self.last[1] + 1
        segment.outcomes.append(decision.outcomes)
        segment.batches.append(raw)
        segment.batch_bytes += len(raw) + len(batch)
        self._tail_bytes += len(raw) + len(batch)
        segment.writes |= decision.writes
        segment.last = self.last[1] + applied_count(decision.outcomes)
        self.last = (segment.epoch, segment.last)
        self._remember(batch, decision.outcomes, segment.epoch, first, segment.time_ms)

    def _open_segment(self, more_bytes: int) -> Segment:
        segment = self.tail[-1] if self.tail else None
        if (
            segment is None
            or segment.appended
            or segment.record is not None
            or segment.time_ms != self.time_ms
            or segment.batch_bytes + more_bytes > self._sizes.entry
        ):
            segment = Segment(self.shard.epoch, self.last[1] + 1, self.last, self.time_ms)
            self.tail.append(segment)
        return segment

    def _remember(
        self, batch: Batch, outcomes: bytes, epoch: int, first: int, time_ms: int
    ) -> None:
        if batch.client:
            run = Run(batch.numbers, batch.indexes, outcomes, epoch, first, time_ms)
            self._dedup.add(batch.client, run)

    def _tell_all_not_met(self, reply: BatchReply) -> None:
        members, wanted = len(self.shard.members), self.members_for_all
        message = f"committed at quorum; ALL takes {wanted} members and the shard has {members}"
        for i, outcome in enumerate(reply.outcomes):
            version = reply.version(i)
            if outcome in b.APPLIED and version is not None:
                failure = ConsistencyNotMet(message, met="quorum", version=list(version))
                reply.failures[i] = failure.to_body()

    def _answer_at_end(self, reply: BatchReply, deadline_ns: int, respond: Respond) -> None:
        if self.last[1] <= self.commit_seq:
            return respond(reply)
        self._waiting.append(_Waiting(self.last[1], deadline_ns, respond, reply))

    def scan(
        self, request: ScanRequest, epoch: int
    ) -> tuple[list[dict[str, Any]], bytes | None] | BusKVError:
        """One page of the shard's part of the range: its items and where the next page begins."""
        refusal = self._not_serving(epoch)
        if refusal is not None:
            return refusal
        self.operations += 1
        keys, position = self.table.scan(request, self._sizes.page)
        items: list[dict[str, Any]] = []
        for key in keys:
            value, *version, _ = self.table.records[key]
            items.append({"key": key, "value": value, "version": version})
            if request.keys_only:
                del items[-1]["value"]
        return items, position

    # ---- the turn ----

    def expire(self, time_ms: int) -> None:
        """Write the expirations that are due as log operations (R5)."""
        if self.status is not Status.ACTIVE:
            return
        count_max = min(
            self._knobs.expire_batch_operations_max,
            self._sizes.batch // (KEY_BYTES_MAX + OPERATION_BYTES),
        )
        time_ms = max(time_ms, self.time_ms)
        keys, versions = [], []
        for key in self.table.pop_expired(time_ms, count_max):
            record = self.latest(key)
            if record is not None and record == self.table.records.get(key):
                keys.append(key)
                versions.append((record[1], record[2]))
        if not keys:
            return
        self.time_ms = time_ms
        batch = Batch(bytes([b.EXPIRE]) * len(keys), keys, conditions=dict(enumerate(versions)))
        outcomes = bytes([b.DELETED]) * len(keys)
        reply = BatchReply(outcomes, self.shard.epoch, self.last[1] + 1)
        self._accept(batch, batch.encode(), Decision(dict.fromkeys(keys), outcomes, reply))

    def take_entries(self) -> list[EntryRow]:
        """Entries decided since the last turn, for the log."""
        rows: list[EntryRow] = []
        for segment in reversed(self.tail):
            if segment.appended:
                break
            segment.appended = True
            body = segment.entry(self.shard.id).encode()
            rows.append(EntryRow(self.shard.id, segment.last, segment.epoch, body))
        rows.reverse()
        return rows

    def on_durable(self, seq: int) -> None:
        """The own log is durable up to `seq`."""
        if self.status is Status.OPENING and seq >= self.last[1]:
            self.status = Status.OPENED
        if self.status is Status.ACTIVE:
            self._commit(seq)

    def _commit(self, seq: int) -> None:
        assert len(self.shard.members) == 1, "R3: the only member is the majority"
        while self.tail and self.tail[0].last <= seq:
            segment = self.tail.popleft()
            self._tail_bytes -= segment.batch_bytes
            self.table.apply(segment.writes)
        self.commit_seq = max(self.commit_seq, seq)
        while self._waiting and self._waiting[0].seq <= self.commit_seq:
            waiting = self._waiting.popleft()
            waiting.respond(waiting.reply)

    def next_deadline_ns(self) -> int | None:
        deadlines = [self._waiting[0].deadline_ns] if self._waiting else []
        expiry_ms = self.table.next_expiry_ms() if self.status is Status.ACTIVE else None
        if expiry_ms is not None:
            deadlines.append(expiry_ms * 1_000_000)
        return min(deadlines, default=None)

    @property
    def reply_bytes_max(self) -> int:
        return self._sizes.entry

    @property
    def is_waiting(self) -> bool:
        """Whether an answer waits for the log."""
        return bool(self._waiting)

    def on_deadline(self, now_ns: int) -> None:
        if self._waiting and self._waiting[0].deadline_ns <= now_ns:
            late = [w for w in self._waiting if w.deadline_ns <= now_ns]
            self._waiting = deque(w for w in self._waiting if w.deadline_ns > now_ns)
            for waiting in late:
                waiting.respond(
                    OutcomeUnknown("not durable yet; send it again with the same request_id")
                )
        self.expire(now_ns // 1_000_000)

    def fail_waiting(self, reason: str) -> None:
        """Answer all that waits: its outcome is for the next epoch to tell."""
        while self._waiting:
            self._waiting.popleft().respond(
                OutcomeUnknown(f"{reason}; send it again with the same request_id")
            )


def _mark_repeats(keys: list[bytes], marks: list[int]) -> None:
    """A key that stands twice in a batch is there the second time."""
    first_at: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if first_at.setdefault(key, i) != i:
            marks[i] = b.REPLACED
