"""One node's copy of one shard: its log, what of it is committed, and its part in the epoch (rules R1–R8).

Theory of operation. A replica is in one epoch at a time, the one that it has promised. As the primary it turns what
`Writer` decides into entries: each goes to its own log and, at once, to the other replicas; `Replication` counts how
far their durable logs match, and what W members have is committed. As a backup it takes entries whose predecessor it
has (R2), fetches what it missed (`Pull`), cuts what conflicts, and acknowledges what is durable. Committed entries are
applied to the table and folded; everything beyond is in the `Tail`.

A primary serves only while ACTIVE: its opening entry is durable on W members and it knows that the map names its
(epoch, token) ACTIVE. It gets there by `open` and `activate`, and leaves by `promise`. It never resumes an epoch (R7).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import CutRow, EntryRow, Mark, ReplicaRow
from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import BusKVError, NotPrimary, OutcomeUnknown, ShardUnavailable, StaleEpoch
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.shard_map import Member, ShardState, shard_to_document
from nodes.machine.backup import Backup
from nodes.machine.cuts import Cuts, rolled_back_in
from nodes.machine.expiry import Expiry
from nodes.machine.folder import Folder
from nodes.machine.history import History
from nodes.machine.key_filter import FilterBuilder
from nodes.machine.lifetimes import Lifetimes
from nodes.machine.loader import Loader
from nodes.machine.pull import Pull
from nodes.machine.replication import Replication
from nodes.machine.scans import Scans
from nodes.machine.status import LEADING, Status
from nodes.machine.table import Table
from nodes.machine.tail import Segment, Tail, received_segment, record_bytes
from nodes.machine.waiters import Waiters, Waiting
from nodes.machine.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import Trim
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.batch import Version
    from bus_kv.protocol.entry import Entry
    from bus_kv.protocol.shard_map import Shard
    from bus_kv.protocol.sizes import Sizes
    from nodes.machine.tail import Position

ANY_ROUND = 2**62
NOT_KNOWN_SEQ = 2**62
FETCH_TRIES = 4
"""Who has not asked for so many times the pause after which it asks again does not fetch any more."""


@dataclass(frozen=True, slots=True)
class Past:
    """What the disk has of a shard when its replica is made: see `Mark`."""

    mark: Mark = field(default_factory=Mark)
    clients: Sequence[tuple[str, int]] = ()
    """Clients whose requests are there, with their newest number."""


@dataclass(slots=True)
class Ports:
    """The ways out of a replica; what comes back is told to the callbacks."""

    ask: Callable[[Any, Any], None]
    """Put a query to the state on disk."""
    clock: Callable[[], int]
    """The time of the step, in nanoseconds."""
    tell: Callable[[str, dict[str, Any]], None] = lambda _node, _fields: None
    """Send to a node's inbox; what is told in one turn travels together."""
    call: Callable[[str, dict[str, Any], Callable[[dict[str, Any]], None]], None] = (
        lambda _node, _fields, _then: None
    )
    """Ask a node; no answer may ever come."""
    load: Callable[[Replica, Member], None] = lambda _replica, _source: None
    """Fetch a snapshot from the primary."""
    announce: Callable[[dict[str, Any]], None] = lambda _event: None
    """Say on the bus what has become of the shard."""


class Replica:
    def __init__(
        self, shard: Shard, node: str, incarnation: str, knobs: Knobs, sizes: Sizes, past: Past,
        ports: Ports,
    ) -> None:  # fmt: skip
        mark = past.mark
        self.shard = shard
        self.node, self.incarnation = node, incarnation
        self.own = Member(node, incarnation)
        self.knobs, self.sizes, self.ports = knobs, sizes, ports
        self.status = Status.RESTARTED
        self.promised: tuple[int, str] = (0, "")
        self.opened_epoch = 0
        self.base_seq = 0
        """Where the own log begins, after a snapshot."""
        self.whole_seq = 0
        """Up to here a snapshot may have holes that the log behind it fills. After a restart that is not known: it is
        the end of the primary's log, as soon as that is heard."""
        self.is_stranded = False
        """No log reaches back to where this one ends, and a member must not throw its own away: only as a learner."""
        self.tail = Tail((mark.epoch, mark.last))
        self.commit_seq = mark.last
        self._committed_seq = mark.last
        """Known to be committed: applied when what this turn says has left."""
        self.durable_seq = mark.last
        self.time_ms = mark.time_ms
        """Log time at the end of the log."""
        self.lineage = [*mark.lineage]
        """(epoch, seq) of every committed opening entry: which epochs are part of the log, and from where."""
        self.policy = "range"
        """How keys map to tokens; the node sets it from the keyspace."""
        self.members_for_all = 1
        """min(replication_factor, nodes of the map): how many members ALL takes (R4)."""
        self.everywhere_seq = 0
        """Up to here every member of an epoch with so many members has had the log, as far as primaries have said."""
        self.operations = 0
        """Operations answered since the start of the process."""
        self.replication: Replication | None = None
        """Set while this is the primary of the promised epoch."""
        self.table = Table(mark, knobs.cache_bytes)
        self.lifetimes = Lifetimes(all_known=mark.last == 0)
        ask = ports.ask
        self.folder = Folder(
            shard.id, shard.keyspace, mark, self.table, self.lifetimes, knobs, ask,
            _phase(shard, node),
        )  # fmt: skip
        self.loader = Loader(shard.id, self.table, ask, sizes.entry)
        self.scans = Scans(self, ask, sizes.page)
        self.history = History(self, ask, sizes.page)
        self.writer = Writer(self, past.clients, mark.time_ms)
        self.expiry = Expiry(self)
        self.pull = Pull(self, knobs)
        self.backup = Backup(self)
        self.cuts = Cuts(self)
        self._filter_builder = FilterBuilder(shard.id, self.table, ask)
        self._fetched_until_ns = 0
        self._base_time_ms = mark.time_ms
        self._rows: list[EntryRow | CutRow] = []
        """What the log has to do at the end of the turn."""
        self._row_changed = False
        self._handed: deque[tuple[int, int, tuple[int, str]]] = deque()
        """(last seq, cuts, promise) of what the log is making durable."""
        self.durable_promise = (0, "")
        self._soon: list[Callable[[], None]] = []
        self._due: list[Callable[[], None]] = []
        """What to do when what this turn says has left; and what to do now that it has."""
        self._cuts = 0
        self._on_opened: Callable[[], None] | None = None
        self._ones, self._writes, self._reads, self._alls = (Waiters() for _ in range(4))
        self._queues = (self._ones, self._writes, self._reads, self._alls)

    @property
    def last(self) -> Position:
        """(epoch, seq) of the end of the log, appended or still in memory."""
        return self.tail.end

    @property
    def now_ns(self) -> int:
        return self.ports.clock()

    @property
    def primary(self) -> str:
        """Who leads the promised epoch, as far as is known."""
        return self.backup.primary if self.replication is None else self.node

    # ---- life cycle ----

    def restore(self, row: ReplicaRow) -> None:
        """Take up what the disk remembers, before `replay`."""
        self.promised = self.durable_promise = (row.promised_epoch, row.promised_token)
        self.opened_epoch, self.base_seq = row.opened_epoch, row.base_seq
        if row.base_seq:
            self.whole_seq = NOT_KNOWN_SEQ

    def heard_end(self, seq: int) -> None:
        """The primary's log has come at least so far: no snapshot of it was taken further on before."""
        if self.whole_seq == NOT_KNOWN_SEQ:
            self.whole_seq = seq

    def succeed(self, old: Replica, base_seq: int) -> None:
        """Take the place of a learner's replica whose log is thrown away; what it promised stays promised (R1)."""
        self.promised, self.durable_promise = old.promised, old.durable_promise
        self.opened_epoch, self.base_seq = old.opened_epoch, base_seq
        self.policy, self.members_for_all = old.policy, old.members_for_all
        self.everywhere_seq = old.everywhere_seq
        if old.last[1] > old.commit_seq or old.cuts.is_due:
            # Of its end nobody knows yet whether it was committed elsewhere.
            self._rows.append(CutRow(self.shard.id, old.commit_seq, self.promised[0]))
            self.cuts.found()
        self._rows.append(CutRow(self.shard.id, 0, self.promised[0], keep=False))
        self._row_changed = True

    def replay(self, row: EntryRow) -> None:
        """Take an entry from the own log at start. What of it is committed, the next primary will say.

        Raises ValueError when it is not the one that follows.
        """
        entry = decode_entry(row.body)
        if (entry.shard, entry.epoch, entry.last) != (row.shard, row.epoch, row.last):
            raise ValueError(f"entry {row.last} of shard {row.shard} is another one")
        if entry.previous != self.last:
            raise ValueError(f"the log of shard {row.shard} has a gap before {entry.first}")
        self.tail.append(received_segment(entry))
        self.time_ms, self.durable_seq = entry.time_ms, entry.last

    def row(self) -> ReplicaRow:
        return ReplicaRow(
            self.shard.id, *self.promised, self.opened_epoch, shard_to_document(self.shard),
            self.base_seq,
        )  # fmt: skip

    def promise(self, epoch: int, token: str) -> None:
        """Take part in nothing older from now on. It has to be durable before it is answered (R1)."""
        assert (epoch, token) == self.promised or epoch > self.promised[0], "R1: promises only grow"
        if (epoch, token) != self.promised:
            self.promised = (epoch, token)
            self.backup.begin_epoch()
            self.is_stranded = False
            self.pull.stop()
        self.step_down("the shard is changing its configuration")
        self.status = Status.PROMISED
        self._row_changed = True

    def step_down(self, reason: str) -> None:
        """No longer part of the epoch. What its primary has not committed may be cut, so it is forgotten until it is
        committed."""
        if self.status is Status.ACTIVE:
            self.backup.fresh_ns = self.now_ns
        if self.replication is not None:
            self.take_decided()
            self.replication = self._on_opened = None
            self.writer.forget_after(self.commit_seq)
            for segment in self.tail.segments:
                segment.remembered = False
        self.fail_waiting(reason)
        if self.status in LEADING or self.status is Status.FOLLOWING:
            self.status = Status.RESTARTED

    def open(self, shard: Shard, time_ms: int, opened: Callable[[], None] | None = None) -> None:
        """Begin `shard.epoch` as its primary with an opening entry; at most once per epoch (step 3, R7).

        `opened` is called once that entry is durable on W of its members.
        """
        assert shard.epoch > self.opened_epoch, "R7: an epoch is opened once"
        self.promise(shard.epoch, shard.token)
        self.shard = shard
        self.opened_epoch = shard.epoch
        self.status = Status.OPENING
        self.time_ms = max(self.time_ms, time_ms)
        seq = self._append_record(shard_to_document(shard))
        self.replication = Replication(shard, self.node, self.knobs, seq)
        self.replication.everywhere = self.everywhere_seq
        self._on_opened = opened

    @property
    def is_learner(self) -> bool:
        """A learner of the epoch that it has promised, and that is ACTIVE: nothing it has is counted on."""
        current = (self.shard.epoch, self.shard.token) == self.promised
        return current and self.shard.state is ShardState.ACTIVE and self.own in self.shard.learners

    @property
    def has_followed(self) -> bool:
        """A backup, or one that was in this life and waits for the next primary: what is committed here was all of it
        not long ago, and an answer at ONE says how long."""
        return self.status in (Status.FOLLOWING, Status.PROMISED) and self.backup.fresh_ns > 0

    @property
    def is_whole(self) -> bool:
        """Whether what is committed here has no holes."""
        return self.commit_seq >= self.whole_seq

    @property
    def is_active(self) -> bool:
        return self.status is Status.ACTIVE

    @property
    def is_opened(self) -> bool:
        """The opening entry is durable on W members: the map may say ACTIVE."""
        replication = self.replication
        if replication is None or self.status is Status.OPENING:
            return False
        return replication.quorum(replication.match) >= replication.opening

    def activate(self, shard: Shard) -> None:
        """The map says that this replica's attempt is ACTIVE: serve (step 4)."""
        assert self.is_opened, "step 4: serve only after the opening entry is durable on W members"
        assert (shard.epoch, shard.token) == self.promised, "step 4: only the own attempt counts"
        assert self.replication is not None
        self.shard = self.replication.shard = shard
        self.status = Status.ACTIVE
        self._row_changed = True  # what it knows to be ACTIVE, the disk remembers (R10)
        self._on_opened = None
        self._progress()
        self.settle()
        assert self.commit_seq >= self.replication.opening, "R5: reads begin at the opening entry"

    # ---- who may ask ----

    def not_serving(self, epoch: int | None) -> BusKVError | None:
        """Why this replica cannot answer; `epoch` None: any replica will do, a stale answer too."""
        if epoch is None and self.has_followed:
            return None
        if epoch is not None and not self.refuses_for_good(epoch):
            return OutcomeUnknown(
                f"what becomes of epoch {epoch} of shard {self.shard.id} is not known here"
            )
        if self.status is not Status.ACTIVE:
            return NotPrimary(
                f"node {self.node} does not serve shard {self.shard.id}; read the map"
            )
        if epoch is not None and epoch != self.shard.epoch:
            return StaleEpoch(f"shard {self.shard.id} is at epoch {self.shard.epoch}; read the map")
        return None

    def refuses_for_good(self, epoch: int) -> bool:
        """Whether nobody does what is asked of this epoch once this replica has refused it.

        The primary of a later epoch may do it; and that of an earlier one, until this replica is known to be ACTIVE:
        should its attempt come to nothing, the earlier log may still be the one that is chosen.
        """
        is_over = epoch < self.opened_epoch and self.status is Status.ACTIVE
        return is_over or epoch == self.opened_epoch

    @property
    def age_ms(self) -> int:
        """How long ago a backup had all that its primary had committed."""
        return 0 if self.is_active else (self.now_ns - self.backup.fresh_ns) // 1_000_000

    # ---- the primary's log ----

    def open_segment(self, time_ms: int, more_bytes: int) -> Segment:
        """The entry that the next batch of this turn goes into."""
        segment = self.tail.segments[-1] if self.tail.segments else None
        self.time_ms = time_ms
        if (
            segment is None
            or segment.appended
            or segment.record is not None
            or segment.time_ms != time_ms
            or segment.batch_bytes + more_bytes > self.sizes.entry
        ):
            segment = Segment(self.shard.epoch, self.last[1] + 1, self.last, time_ms)
            segment.last = segment.first - 1
            segment.remembered = True
            self.tail.append(segment)
        return segment

    def append_record(self, record: dict[str, Any]) -> None:
        """Put an entry without operations at the end of the log."""
        self.time_ms = max(self.time_ms, self.now_ns // 1_000_000)
        self._append_record(record)

    def _append_record(self, record: dict[str, Any]) -> int:
        seq = self.last[1] + 1
        segment = Segment(self.promised[0], seq, self.last, self.time_ms, record, seq)
        segment.batch_bytes = record_bytes(record)
        segment.remembered = True
        self.tail.append(segment)
        return seq

    def take_decided(self) -> None:
        """Make entries of what was decided since the last turn."""
        fresh: list[Segment] = []
        for segment in reversed(self.tail.segments):
            if segment.appended:
                break
            fresh.append(segment)
        for segment in reversed(fresh):
            segment.appended = True
            body = segment.entry(self.shard.id).encode()
            self._rows.append(EntryRow(self.shard.id, segment.last, segment.epoch, body))
            if self.replication is not None:
                self.replication.send_entry(segment.previous, body)

    def take_rows(self) -> tuple[list[EntryRow | CutRow], ReplicaRow | None]:
        """What the log has to do, in one transaction; when there is anything, `on_durable` follows once."""
        self.take_decided()
        rows, self._rows = self._rows, []
        row = self.row() if self._row_changed else None
        self._row_changed = False
        if rows or row:
            self._handed.append((self.last[1], self._cuts, self.promised))
        return rows, row

    def take_messages(self) -> list[dict[str, Any]]:
        """What the primary publishes to its replicas: nothing of an epoch before its opening is durable.

        What only some of them need is told to these.
        """
        if self.replication is None or self.status is Status.OPENING:
            return []
        question = self.replication.take_question(self.now_ns)
        if question is not None:
            for node in question[0]:
                self.ports.tell(node, question[1])
        return self.replication.take_messages(
            self.now_ns, self.last, self._committed_seq, self.sizes.entry
        )

    def on_durable(self) -> bool:
        """The oldest of what was handed to the log is durable. Whether the turn has to look at the replica for it."""
        seq, cuts, self.durable_promise = self._handed.popleft()
        if cuts == self._cuts:
            # Else the log was cut since, and how far it is durable the next one will tell.
            self.durable_seq = seq
        if self.replication is None:
            return self.backup.acknowledge()
        is_opened = self.status is Status.OPENING and self.durable_seq >= self.replication.opening
        if is_opened:
            self.status = Status.OPENED
        self.replication.match[self.node] = self.durable_seq
        return self._progress() or is_opened

    def on_replica_answer(self, fields: dict[str, Any]) -> bool:
        """A replica of the own epoch tells how far it matches and which confirm round it has seen. Whether the turn has
        to look at this one for it."""
        replication = self.replication
        if replication is None or (fields["epoch"], fields["token"]) != self.promised:
            return False
        is_ours = replication.on_answer(
            fields["node"], fields["incarnation"], fields["match"], fields["round"]
        )
        return is_ours and self._progress()

    def _progress(self) -> bool:
        """Commit and answer what has become possible. Whether anybody was told: what he does then may concern this
        replica again."""
        replication = self.replication
        assert replication is not None
        is_told = False
        if self._on_opened is not None and self.is_opened:
            opened, self._on_opened, is_told = self._on_opened, None, True
            opened()
        if self.status is not Status.ACTIVE:
            return is_told
        # Not beyond the own disk: the state must never hold more than the log beside it.
        seq = min(replication.quorum(replication.match), self.durable_seq)
        if seq >= replication.opening:
            self.commit_soon(seq)
        if self._ones:
            is_told |= self._ones.release(self.durable_seq, ANY_ROUND)
        if self._writes:
            is_told |= self._writes.release(self._committed_seq, ANY_ROUND)
        if self._reads:
            rounds = replication.quorum(replication.rounds)
            is_told |= self._reads.release(self._committed_seq, rounds)
        all_seq = min(self._committed_seq, replication.all(replication.match))
        if all_seq > self.everywhere_seq and len(replication.shard.members) >= self.members_for_all:
            self.everywhere_seq = replication.everywhere = all_seq
        if self._alls:
            is_told |= self._alls.release(all_seq, replication.all(replication.rounds))
        return is_told

    # ---- answers ----

    def answer_written(
        self, consistency: str, deadline_ns: int, respond: Callable[[Any], None], reply: Any
    ) -> None:
        """Answer when what was written, up to the end of the log, is as durable as asked for (R4)."""
        queue = {"one": self._ones, "quorum": self._writes, "all": self._alls}[consistency]
        queue.add(Waiting(self.last[1], 0, deadline_ns, respond, reply, False))

    def begin_round(self, consistency: str) -> int:
        """Have the members confirm at the end of this turn; the number of the round, 0 when a read needs none."""
        replication = self.replication
        if consistency == "one" or replication is None or len(replication.shard.members) == 1:
            return 0
        return replication.want_round(of_all=consistency == "all")

    def answer_read(
        self, consistency: str, deadline_ns: int, respond: Callable[[Any], None], reply: Any,
        seq: int, is_read: bool = True, round: int = 0,
    ) -> None:  # fmt: skip
        """Answer once `seq` is committed and so many members have confirmed, in a round that begins after now, that no
        later epoch can have begun (R5); or in `round`, which `begin_round` gave to the request.

        `is_read` False: the answer tells of a write's outcome.
        """
        if consistency == "one":
            return respond(reply)
        replication = self.replication
        if replication is None or not self.is_active:
            return respond(NotPrimary(f"shard {self.shard.id} has another primary; read the map"))
        if len(replication.shard.members) == 1:
            if seq <= self.commit_seq:
                return respond(reply)
            # Who is alone confirms himself: what was judged first is answered first.
            self._writes.add(Waiting(seq, 0, deadline_ns, respond, reply, is_read))
            return None
        queue = self._alls if consistency == "all" else self._reads
        round = round or replication.want_round(of_all=consistency == "all")
        queue.add(Waiting(seq, round, deadline_ns, respond, reply, is_read))
        return None

    def fail_waiting(self, reason: str) -> None:
        """Answer all that waits: its outcome is for the next epoch to tell."""
        self.loader.fail(reason)
        for queue in self._queues:
            for waiting in queue.take_all():
                waiting.respond(_failure(waiting, self.shard.id, reason))

    # ---- entries of another log ----

    def append_received(self, entry: Entry, body: bytes) -> None:
        """Put an entry at the end of the log, the bytes as they came."""
        self.tail.append(received_segment(entry))
        self.time_ms = entry.time_ms
        self._rows.append(EntryRow(self.shard.id, entry.last, entry.epoch, body))

    def cut(self, count: int) -> None:
        """Give up the uncommitted entries behind the first `count`: another log was chosen (R2)."""
        gone = self.tail.cut(count)
        assert gone[0].first > self.commit_seq, "R2: never cut below commit_seq"
        assert gone[-1].epoch <= self.promised[0], "R2: a higher epoch is never cut by a lower"
        last = self.last[1]
        self._rows.append(CutRow(self.shard.id, last, self.promised[0]))
        self._cuts += 1
        self.cuts.found()
        self.durable_seq = min(self.durable_seq, last)
        segments = self.tail.segments
        self.time_ms = segments[-1].time_ms if segments else self._base_time_ms

    # ---- what is committed ----

    def commit_soon(self, seq: int) -> None:
        """Everything up to `seq` is committed. Who waits for that is told first; it is applied before anybody looks."""
        self._committed_seq = max(self._committed_seq, seq)

    def soon(self, work: Callable[[], None]) -> None:
        """Do it when what this turn says has left."""
        self._soon.append(work)

    def make_due(self) -> None:
        """What this turn says is about to leave: what was to be done soon is due."""
        self._due += self._soon
        self._soon = []

    @property
    def is_settled(self) -> bool:
        """Nothing is left for `settle`."""
        return not self._due and self._committed_seq <= self.commit_seq

    def settle(self) -> None:
        """Apply what is committed, and do what was to be done soon; before anybody looks at the replica again."""
        if self._committed_seq > self.commit_seq:
            self._commit()
        if self._due:
            due, self._due = self._due, []
            for work in due:
                work()

    def _commit(self) -> None:
        for segment in self.tail.take_committed(self._committed_seq):
            segment.decode()
            if not segment.remembered:
                self.writer.remember(segment.logged)
            self._apply(segment)
            self.commit_seq = segment.last
        self._committed_seq = self.commit_seq

    def _apply(self, segment: Segment) -> None:
        table = self.table
        if segment.is_opening:
            self.lineage.append((segment.epoch, segment.first))
        table.apply(segment.writes, segment.logged, segment.keys, segment.data_bytes)
        if any(logged.batch.ttls_ms for logged in segment.logged):
            self.lifetimes.add(segment.writes)
        self._base_time_ms = segment.time_ms
        end = Mark(
            segment.epoch, segment.last, segment.time_ms, table.keys, table.data_bytes,
            tuple(self.lineage),
        )  # fmt: skip
        rolled_back = rolled_back_in(segment.record)
        self.folder.add(segment.logged, rolled_back, end, segment.batch_bytes, self.now_ns)

    def fate(self, version: Version) -> str:
        """What became of a write: "primary", "quorum", "all", "rolled_back" or "unknown" (R4).

        "all": it has been durable on every member of a configuration with enough members for ALL. That stays true when
        a member is replaced, whose successor may be catching up still; so does the answer, unless a primary dies in the
        moment in which it has seen it and nobody else has heard.
        """
        epoch, seq = version
        if epoch == self.shard.epoch and self.commit_seq < seq <= self.last[1]:
            return "primary" if seq <= self.durable_seq else "unknown"
        ends = [*(first for _, first in self.lineage[1:]), self.commit_seq + 1]
        for (own, first), end in zip(self.lineage, ends, strict=True):
            if own == epoch and first < seq < end:
                return "all" if seq <= self.everywhere_seq else "quorum"
        return "rolled_back" if epoch < self.shard.epoch else "unknown"

    def note_fetch(self) -> None:
        """Another replica is fetching the log or a snapshot; while it does, the log does not leave it behind."""
        patience_ns = FETCH_TRIES * self.knobs.snapshot_retry_ms * MILLISECOND_NS
        self._fetched_until_ns = self.now_ns + patience_ns

    # ---- the turn ----

    def end_turn(self) -> Trim | None:
        """Ask the disk for what was missed in this turn, fold what is due; what the log may forget."""
        self.make_due()
        self.loader.take_wanted()
        self.folder.end_turn(self.now_ns)
        if self.status is Status.ACTIVE:
            self._filter_builder.build_if_needed(self.now_ns)
        self.writer.end_turn()
        self.cuts.tell_if_due()
        replication = self.replication
        others_have = min(replication.match.values()) if replication else self.commit_seq
        return self.folder.trim(others_have, self.now_ns < self._fetched_until_ns)

    def next_deadline_ns(self) -> int:
        """NEVER_NS: nothing is to be done unless something comes."""
        is_active, replication = self.status is Status.ACTIVE, self.replication
        is_leading = replication is not None and self.status is not Status.OPENING
        return min(
            self._ones.next_ns, self._writes.next_ns, self._reads.next_ns, self._alls.next_ns,
            self.writer.next_ns(), self.folder.next_ns(), self.pull.next_ns(), self.cuts.next_ns(),
            self.expiry.next_ns() if is_active else NEVER_NS,
            replication.next_ns() if replication is not None and is_leading else NEVER_NS,
        )  # fmt: skip

    @property
    def waiting_count(self) -> int:
        return sum(map(len, self._queues))

    @property
    def is_waiting(self) -> bool:
        """Whether an answer waits for the log, for other replicas or for the disk."""
        return self.waiting_count > 0 or self.writer.is_waiting or bool(self._soon or self._due)

    def on_deadline(self, now_ns: int) -> None:
        for queue in self._queues:
            for waiting in queue.take_late(now_ns):
                if queue is self._alls and waiting.seq <= self.commit_seq:
                    self.writer.tell_all_not_met(waiting)
                else:
                    waiting.respond(_failure(waiting, self.shard.id, "too few members answer"))
        self.writer.on_deadline(now_ns)
        self.pull.on_deadline(now_ns)
        self.expiry.expire(now_ns // 1_000_000)


def _phase(shard: Shard, node: str) -> float:
    """Where the node stands among all who have the shard, from 0 to 1."""
    nodes = [member.node for member in (*shard.members, *shard.learners)]
    return nodes.index(node) / len(nodes) if node in nodes else 0.0


def _failure(waiting: Waiting[Any], shard: str, reason: str) -> BusKVError:
    if waiting.is_read:
        return ShardUnavailable(f"shard {shard}: {reason}; send it again")
    return OutcomeUnknown(f"{reason}; send it again with the same request_id")
