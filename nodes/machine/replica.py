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
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import EntryRow, Expiring, LoggedBatch, Mark, ReplicaRow
from bus_kv.errors import (
    BusKVError,
    ConsistencyNotMet,
    NotPrimary,
    OutcomeUnknown,
    Overloaded,
    ShardUnavailable,
    StaleEpoch,
    WrongShard,
)  # fmt: skip
from bus_kv.knobs import KEY_BYTES_MAX
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.protocol.entry import Entry, applied_count, decode_entry
from bus_kv.protocol.shard_map import shard_to_document, token_of
from bus_kv.protocol.sizes import OPERATION_BYTES
from nodes.machine.dedup import DedupWindow, DiskRuns, Run
from nodes.machine.folder import Folder
from nodes.machine.history import History
from nodes.machine.judge import Decision, Judge, data_bytes_added, logged_writes, read_reply
from nodes.machine.key_filter import FilterBuilder
from nodes.machine.lifetimes import COUNT_MAX, HORIZON_MS, Lifetimes
from nodes.machine.loader import Loader
from nodes.machine.scans import Scans
from nodes.machine.table import UNKNOWN, Table, Writes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import Trim
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Shard
    from bus_kv.protocol.sizes import Sizes
    from nodes.machine.loader import Known, Loaded

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
    batches: list[bytes] = field(default_factory=list)
    """As they were sent."""
    logged: list[LoggedBatch] = field(default_factory=list)
    batch_bytes: int = 0
    writes: Writes = field(default_factory=dict)
    keys: int = 0
    """Keys that it adds, and bytes of data."""
    data_bytes: int = 0
    appended: bool = False

    def entry(self, shard: str) -> Entry:
        return Entry(
            shard, self.epoch, self.first, self.last, self.previous, self.time_ms, self.data_bytes,
            tuple([logged.outcomes for logged in self.logged]), tuple(self.batches), self.record,
        )  # fmt: skip

    def add(self, logged: LoggedBatch, raw: bytes, writes: Writes, data_bytes: int) -> None:
        """Put a decided batch at its end."""
        self.logged.append(logged)
        self.batches.append(raw)
        self.batch_bytes += len(raw) + len(logged.outcomes)
        self.writes |= writes
        self.last = logged.first + applied_count(logged.outcomes) - 1
        self.keys += logged.outcomes.count(b.CREATED) - logged.outcomes.count(b.DELETED)
        self.data_bytes += data_bytes


@dataclass(slots=True)
class _Waiting:
    seq: int
    deadline_ns: int
    respond: Respond
    reply: BatchReply


@dataclass(frozen=True, slots=True)
class Past:
    """What the disk has of a shard when its replica is made: see `Mark`."""

    mark: Mark = field(default_factory=Mark)
    clients: Sequence[tuple[str, int]] = ()
    """Clients whose requests are there, with their newest number."""


class Replica:
    def __init__(
        self, shard: Shard, node: str, knobs: Knobs, sizes: Sizes, past: Past,
        ask: Callable[[Any, Any], None], clock: Callable[[], int],
    ) -> None:  # fmt: skip
        """`ask` puts a query to the state; `clock` tells the time of the step in nanoseconds."""
        mark = past.mark
        self.shard = shard
        self.node = node
        self.status = Status.RESTARTED
        self.promised: tuple[int, str] = (0, "")
        self.opened_epoch = 0
        self.last: tuple[int, int] = (mark.epoch, mark.last)
        """(epoch, seq) of the end of the log, appended or still in memory."""
        self.commit_seq = mark.last
        self.time_ms = mark.time_ms
        self.table = Table(mark, knobs.cache_bytes)
        self.tail: deque[Segment] = deque()
        self.members_for_all = 1
        """min(replication_factor, nodes of the map): how many members ALL takes (R4)."""
        self.operations = 0
        """Operations answered since the start of the process."""
        self.lifetimes = Lifetimes(all_known=mark.last == 0)
        self.folder = Folder(shard.id, shard.keyspace, mark, self.table, self.lifetimes, knobs, ask)
        self.loader = Loader(shard.id, self.table, ask, sizes.entry)
        self.scans = Scans(self, ask, sizes.page)
        self.history = History(self, ask, sizes.page)
        self._filter_builder = FilterBuilder(shard.id, self.table, ask)
        self._knobs, self._sizes, self._ask, self._now_ns = knobs, sizes, ask, clock
        self._dedup = DedupWindow(knobs, past.clients, mark.time_ms)
        self._waiting: deque[_Waiting] = deque()
        self._tail_bytes = 0
        self._parked: dict[int, tuple[int, Respond]] = {}
        """Deadline and answer of requests that wait for the disk."""
        self._parks = 0
        self.erasing: dict[tuple[str, int], list[Callable[[Any], None]]] = {}
        """Who waits for the result of which delete_prefix."""
        self._loaded: Loaded = {}
        """Records from disk for the request that is resumed just now."""

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
        segment = Segment(entry.epoch, entry.first, entry.previous, entry.time_ms)
        seq = entry.first
        for raw, (outcomes, batch) in zip(entry.batches, entry.decoded(), strict=True):
            logged = LoggedBatch(batch, outcomes, entry.epoch, seq, entry.time_ms)
            segment.add(logged, raw, logged_writes(logged), 0)
            self._remember(logged)
            seq += applied_count(outcomes)
        segment.last, segment.data_bytes = entry.last, entry.data_bytes
        self.last = (entry.epoch, entry.last)
        self.time_ms = entry.time_ms
        self._apply(segment)
        self.commit_seq = entry.last

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
        self, batch: Batch, raw: bytes, epoch: int, deadline_ns: int, respond: Respond,
        disk: DiskRuns | None = None,
    ) -> None:  # fmt: skip
        """Answer a checked batch: a batch of gets from committed state, any other once what it was judged against is
        committed. What memory lacks is fetched from disk first.

        An answer that cannot be given by `deadline_ns` is a failure, OUTCOME_UNKNOWN once something was appended.
        """
        reads = batch.kinds.count(b.GET) == len(batch)
        refusal = self._refusal(batch, epoch) or (None if reads else self._overload())
        if refusal is not None:
            return respond(refusal)
        again = partial(self._resume, batch, raw, epoch, deadline_ns, respond)
        if reads and len(self._parked) > self._knobs.calls_max:
            return respond(Overloaded(f"shard {self.shard.id} has too many reads under way"))
        if disk is not None and disk.folds != self.table.folds:
            disk = None
        if not reads and disk is None and self._dedup.needs_disk(batch):
            return self._park(deadline_ns, respond, partial(self.loader.requests_of, batch), again)
        records = self._committed(batch.keys) if reads else [*map(self.latest, batch.keys)]
        if UNKNOWN in records:
            cold = {k for k, r in zip(batch.keys, records, strict=True) if r is UNKNOWN}
            # What was loaded before may have left memory again: all of it at once then.
            fetch = partial(self.loader.want_for, batch, cold | self._loaded.keys())
            return self._park(deadline_ns, respond, fetch, partial(again, disk=disk))
        self.operations += len(batch)
        if reads:
            return respond(self._read(batch, records))
        time_ms = max(self.time_ms, self._now_ns() // 1_000_000)
        decision = self._decide(batch, records, time_ms, disk)
        if decision.writes:
            self._accept(batch, raw, decision)
        if batch.consistency == "all" and len(self.shard.members) < self.members_for_all:
            self._tell_all_not_met(decision.reply)
        return self._answer_at_end(decision.reply, deadline_ns, respond)

    def _park(
        self, deadline_ns: int, respond: Respond, fetch: Callable[[Any, Callable[[], bool]], None],
        again: Callable[[int, Any], None],
    ) -> None:  # fmt: skip
        """Let a request wait for the disk; it is judged when it comes back, as if it had arrived then."""
        self._parks += 1
        self._parked[self._parks] = (deadline_ns, respond)
        park = self._parks
        fetch(partial(again, park), lambda: park in self._parked)

    def _resume(
        self, batch: Batch, raw: bytes, epoch: int, deadline_ns: int, respond: Respond, park: int,
        fetched: Loaded | DiskRuns | str, disk: DiskRuns | None = None,
    ) -> None:  # fmt: skip
        if self._parked.pop(park, None) is None:
            return None  # it was answered at its deadline
        if isinstance(fetched, str):
            return respond(self._not_fetched(fetched))
        if isinstance(fetched, DiskRuns):
            return self.submit(batch, raw, epoch, deadline_ns, respond, fetched)
        self._loaded = fetched
        self.submit(batch, raw, epoch, deadline_ns, respond, disk)
        self._loaded = {}
        return None

    def _not_fetched(self, reason: str) -> BusKVError:
        return ShardUnavailable(f"shard {self.shard.id}: {reason}; send it again")

    def _refusal(self, batch: Batch, epoch: int) -> BusKVError | None:
        refusal = self.not_serving(epoch)
        if refusal is not None:
            return refusal
        tokens = batch.keys
        if self.policy != "range":
            tokens = [token_of(self.policy, key) for key in batch.keys]
        end = self.shard.end
        if min(tokens) < self.shard.start or (end is not None and max(tokens) >= end):
            return WrongShard(f"a key lies outside shard {self.shard.id}; read the map")
        return None

    def not_serving(self, epoch: int) -> BusKVError | None:
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
            or len(self._waiting) + len(self._parked) > self._knobs.calls_max
        ):
            return Overloaded(f"shard {self.shard.id} has too many writes under way; send it again")
        if self.folder.is_full:
            return Overloaded(f"the disk of shard {self.shard.id} lags behind; send it again")
        return None

    policy = "range"
    """How keys map to tokens; the node sets it from the keyspace."""

    def _committed(self, keys: Sequence[bytes]) -> list[Any]:
        """Committed records, UNKNOWN where the disk has to be asked. What is in the cache is the hot path."""
        young = self.table.young
        records = [young.get(key, UNKNOWN) for key in keys]
        if UNKNOWN not in records:
            return records
        get, loaded = self.table.get, self._loaded
        records = [get(k) if r is UNKNOWN else r for k, r in zip(keys, records, strict=True)]
        if not loaded:
            return records
        return [
            loaded.get(k, UNKNOWN) if r is UNKNOWN else r
            for k, r in zip(keys, records, strict=True)
        ]

    def _read(self, batch: Batch, records: list[Known | None]) -> BatchReply:
        reply = read_reply(records, self._sizes.entry)
        if batch.consistency == "one":
            reply.read = (self.shard.epoch, self.commit_seq, 0)
        return reply

    def _decide(
        self, batch: Batch, records: list[Known | None], time_ms: int, disk: DiskRuns | None
    ) -> Decision:
        """Outcomes of a batch at the end of the log, where its keys have these records.

        The plain case, new puts without conditions, is the hot path.
        """
        self.time_ms = time_ms
        seen = self._dedup.seen(batch, disk)
        before = dict(zip(batch.keys, records, strict=True))
        if seen or batch.conditions or batch.ttls_ms or batch.kinds.count(b.PUT) < len(batch):
            return Judge(self, batch, before, time_ms, seen).decide()
        epoch, first = self.shard.epoch, self.last[1] + 1
        marks = [b.CREATED if record is None else b.REPLACED for record in records]
        if len(before) < len(records):
            _mark_repeats(batch.keys, marks)
        outcomes = bytes(marks)
        seqs = range(first, first + len(batch))
        writes: Writes = {
            key: (value, epoch, seq, None)  # type: ignore[misc]  # a put's value is bytes
            for key, value, seq in zip(batch.keys, batch.values, seqs, strict=True)
        }
        added = data_bytes_added(writes, before)
        return Decision(writes, outcomes, added, BatchReply(outcomes, epoch, first))

    def latest(self, key: bytes) -> Any:
        """The key's record at the end of the log, None when it is absent, UNKNOWN when the disk has to be asked."""
        for segment in reversed(self.tail):
            if key in segment.writes:
                return segment.writes[key]
        record = self.table.get(key)
        return self._loaded.get(key, UNKNOWN) if record is UNKNOWN else record

    def _accept(self, batch: Batch, raw: bytes, decision: Decision) -> None:
        """Put a decided batch at the end of the log."""
        segment = self._open_segment(len(raw) + len(batch))
        first = self.last[1] + 1
        logged = LoggedBatch(batch, decision.outcomes, segment.epoch, first, segment.time_ms)
        segment.add(logged, raw, decision.writes, decision.data_bytes)
        self._tail_bytes += len(raw) + len(batch)
        self.last = (segment.epoch, segment.last)
        self._remember(logged)

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

    def _remember(self, logged: LoggedBatch) -> None:
        batch = logged.batch
        if batch.client:
            run = Run(
                batch.numbers, batch.indexes, logged.outcomes, logged.epoch, logged.first,
                logged.time_ms,
            )  # fmt: skip
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

    # ---- the turn ----

    def expire(self, time_ms: int) -> None:
        """Write the expirations that are due as log operations (R5)."""
        if self.status is not Status.ACTIVE:
            return
        time_ms = max(time_ms, self.time_ms)
        if self.lifetimes.needs_more(time_ms):
            self._extend_lifetimes(time_ms + HORIZON_MS)
        count_max = min(
            self._knobs.expire_batch_operations_max,
            self._sizes.batch // (KEY_BYTES_MAX + OPERATION_BYTES),
        )
        ended = self.lifetimes.pop_ended(time_ms, count_max)
        cold = [key for key in ended if self.latest(key) is UNKNOWN]
        if cold:
            self.loader.want(cold, [], lambda loaded: self._expire_loaded(ended, loaded))
        elif ended:
            self._expire(ended)

    def _expire_loaded(self, ended: dict[bytes, int], loaded: Loaded | str) -> None:
        if isinstance(loaded, str) or self.status is not Status.ACTIVE:
            return self.lifetimes.put_back(ended, self.time_ms)
        self._loaded = loaded
        self._expire(ended)
        self._loaded = {}
        return None

    def _expire(self, ended: dict[bytes, int]) -> None:
        """Delete those keys whose newest record still is the one whose lifetime has ended."""
        time_ms = max(self._now_ns() // 1_000_000, self.time_ms)
        gone: dict[bytes, Known] = {}
        for key, seq in ended.items():
            record = self.latest(key)
            if record is UNKNOWN:
                self.lifetimes.put_back({key: seq}, time_ms)
            elif record is not None and record[2] == seq:
                gone[key] = record
        if not gone:
            return
        self.time_ms = time_ms
        versions = [(record[1], record[2]) for record in gone.values()]
        kinds = bytes([b.EXPIRE]) * len(gone)
        batch = Batch(kinds, [*gone], conditions=dict(enumerate(versions)))
        outcomes = bytes([b.DELETED]) * len(gone)
        writes: Writes = dict.fromkeys(gone)
        added = data_bytes_added(writes, gone)
        reply = BatchReply(outcomes, self.shard.epoch, self.last[1] + 1)
        self._accept(batch, batch.encode(), Decision(writes, outcomes, added, reply))

    def _extend_lifetimes(self, until_ms: int) -> None:
        """Read from disk which lifetimes end next."""
        self.lifetimes.asked_until_ms = until_ms
        self._ask(Expiring(0, self.shard.id, until_ms, COUNT_MAX), self._on_lifetimes)

    def _on_lifetimes(self, rows: list[Any], failure: str | None) -> None:
        if failure is None:
            return self.lifetimes.extend(rows, COUNT_MAX, self._now_ns() // 1_000_000)
        return self.lifetimes.ask_later(self._now_ns() // 1_000_000)

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
            self._apply(segment)
        self.commit_seq = max(self.commit_seq, seq)
        while self._waiting and self._waiting[0].seq <= self.commit_seq:
            waiting = self._waiting.popleft()
            waiting.respond(waiting.reply)

    def _apply(self, segment: Segment) -> None:
        """Make a committed segment visible, and have it folded."""
        table = self.table
        table.apply(segment.writes, segment.logged, segment.keys, segment.data_bytes)
        self.lifetimes.add(segment.writes)
        end = Mark(segment.epoch, segment.last, segment.time_ms, table.keys, table.data_bytes)
        self.folder.add(segment.logged, end, segment.batch_bytes, self._now_ns())

    def end_turn(self) -> Trim | None:
        """Ask the disk for what was missed in this turn, fold what is due; what the log may forget."""
        self.loader.take_wanted()
        self.folder.fold_if_due(self._now_ns())
        if self.status is Status.ACTIVE:
            self._filter_builder.build_if_needed(self._now_ns())
        self._dedup.leave_to_disk(self.folder.mark.last)
        self._dedup.forget_idle(self.time_ms)
        return self.folder.trim()

    def next_deadline_ns(self) -> int | None:
        deadlines = [self._waiting[0].deadline_ns] if self._waiting else []
        deadlines += [deadline_ns for deadline_ns, _ in self._parked.values()]
        expiry_ms = self.lifetimes.next_ms() if self.status is Status.ACTIVE else None
        if expiry_ms is not None:
            deadlines.append(expiry_ms * 1_000_000)
        fold_ns = self.folder.next_ns()
        if fold_ns is not None:
            deadlines.append(fold_ns)
        return min(deadlines, default=None)

    @property
    def reply_bytes_max(self) -> int:
        return self._sizes.entry

    @property
    def is_waiting(self) -> bool:
        """Whether an answer waits for the log or for the disk."""
        return bool(self._waiting) or bool(self._parked)

    def on_deadline(self, now_ns: int) -> None:
        if self._waiting and self._waiting[0].deadline_ns <= now_ns:
            late = [w for w in self._waiting if w.deadline_ns <= now_ns]
            self._waiting = deque(w for w in self._waiting if w.deadline_ns > now_ns)
            for waiting in late:
                waiting.respond(
                    OutcomeUnknown("not durable yet; send it again with the same request_id")
                )
        for park in [park for park, (end_ns, _) in self._parked.items() if end_ns <= now_ns]:
            _, respond = self._parked.pop(park)
            respond(self._not_fetched("its disk does not answer"))
        self.expire(now_ns // 1_000_000)

    def fail_waiting(self, reason: str) -> None:
        """Answer all that waits: its outcome is for the next epoch to tell."""
        self.loader.fail(reason)
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
