"""The primary's judgement: every batch is decided once, at the end of the log, and answered when that end is safe.

A batch of gets is answered from committed state. Any other is judged against the end of the log, committed state under
the uncommitted tail, and what it writes joins the entry of this turn. What memory lacks is fetched from disk first, and
the batch is judged when it comes back, as if it had arrived then.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import LoggedBatch
from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import (
    BusKVError,
    ConsistencyNotMet,
    Overloaded,
    ShardUnavailable,
    WrongShard,
)  # fmt: skip
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.protocol.shard_map import token_of
from nodes.machine.dedup import DedupWindow, DiskRuns, Run
from nodes.machine.judge import Decision, Judge, data_bytes_added, plain_writes, read_reply
from nodes.machine.table import UNKNOWN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from nodes.machine.loader import Known, Loaded
    from nodes.machine.replica import Replica
    from nodes.machine.waiters import Waiting

    Respond: TypeAlias = Callable[[BatchReply | BusKVError], None]


class Writer:
    def __init__(self, replica: Replica, clients: Sequence[tuple[str, int]], time_ms: int) -> None:
        """`clients` are those whose requests are on disk, with their newest number."""
        self._replica, self._knobs = replica, replica.knobs
        self._table, self._loader = replica.table, replica.loader
        self._dedup = DedupWindow(replica.knobs, clients, time_ms)
        self._parked: dict[int, tuple[int, Respond, int]] = {}
        """Deadline, answer and bytes of requests that wait for the disk."""
        self._parked_bytes = 0
        self._parks = 0
        self.erasing: dict[tuple[str, int], list[Callable[[Any], None]]] = {}
        """Who waits for the result of which delete_prefix."""
        self._loaded: Loaded = {}
        """Records from disk for the request that is resumed just now."""

    # ---- a batch ----

    def submit(
        self, batch: Batch, raw: bytes, epoch: int | None, deadline_ns: int, respond: Respond
    ) -> None:
        """Answer a checked batch; `epoch` None: gets that any replica may answer.

        An answer that cannot be given by `deadline_ns` is a failure, OUTCOME_UNKNOWN once something was appended.
        """
        self._replica.settle()  # whoever sends one from an answer comes before the next touch
        refusal = self._refusal(batch, epoch)
        if refusal is not None:
            return respond(refusal)
        round = self._replica.begin_round(batch.consistency) if _is_read(batch) else 0
        judge = partial(self._judge, batch, raw, epoch, deadline_ns, respond, round=round)
        # The members confirm while the answer is made.
        return self._replica.soon(judge) if round else judge()

    def _judge(
        self, batch: Batch, raw: bytes, epoch: int | None, deadline_ns: int, respond: Respond,
        disk: DiskRuns | None = None, round: int = 0,
    ) -> None:  # fmt: skip
        reads = _is_read(batch)
        again = partial(self._resume, batch, raw, epoch, deadline_ns, respond)
        if reads and len(self._parked) > self._knobs.calls_max:
            return respond(Overloaded(f"{self._shard} has too many reads under way"))
        if disk is not None and disk.folds != self._table.folds:
            disk = None
        if not reads and disk is None and self._dedup.needs_disk(batch):
            fetch_requests = partial(self._loader.requests_of, batch)
            return self._park(len(raw), deadline_ns, respond, fetch_requests, again)
        records, is_known = self._committed(batch.keys) if reads else self._latest(batch.keys)
        if not is_known:
            cold = {k for k, r in zip(batch.keys, records, strict=True) if r is UNKNOWN}
            # What was loaded before may have left memory again: all of it at once then.
            fetch = partial(self._loader.want_for, batch, cold | self._loaded.keys())
            return self._park(len(raw), deadline_ns, respond, fetch, partial(again, disk=disk))
        self._replica.operations += len(batch)
        if reads:
            return self._read(batch, records, deadline_ns, respond, round)
        return self._write(batch, raw, records, disk, deadline_ns, respond)

    @property
    def _shard(self) -> str:
        return f"shard {self._replica.shard.id}"

    def _refusal(self, batch: Batch, epoch: int | None) -> BusKVError | None:
        replica = self._replica
        refusal = replica.not_serving(epoch)
        if refusal is not None:
            return refusal
        tokens = batch.keys
        if replica.policy != "range":
            tokens = [token_of(replica.policy, key) for key in batch.keys]
        end = replica.shard.end
        start = replica.shard.start
        if (start and min(tokens) < start) or (end is not None and max(tokens) >= end):
            return WrongShard(f"a key lies outside {self._shard}; read the map")
        return None if _is_read(batch) else self._overload()

    def _overload(self) -> BusKVError | None:
        """The bounds of what waits for the log."""
        replica, knobs = self._replica, self._knobs
        if (
            replica.last[1] - replica.commit_seq > knobs.tail_operations_max
            or replica.tail.bytes > knobs.tail_bytes_max
            or replica.waiting_count + len(self._parked) > knobs.calls_max
        ):
            return Overloaded(f"{self._shard} has too many writes under way; send it again")
        if replica.folder.is_full:
            return Overloaded(f"the disk of {self._shard} lags behind; send it again")
        return None

    def _read(
        self, batch: Batch, records: list[Known | None], deadline_ns: int, respond: Respond,
        round: int,
    ) -> None:  # fmt: skip
        """Answer gets from what is committed now, once this is known to be the newest (R5)."""
        replica = self._replica
        reply = read_reply(records, replica.sizes.entry)
        if batch.consistency == "one":
            reply.read = (replica.tail.base[0], replica.commit_seq, replica.age_ms)
        replica.answer_read(
            batch.consistency, deadline_ns, respond, reply, replica.commit_seq, round=round
        )

    def _write(
        self, batch: Batch, raw: bytes, records: list[Known | None], disk: DiskRuns | None,
        deadline_ns: int, respond: Respond,
    ) -> None:  # fmt: skip
        replica = self._replica
        time_ms = max(replica.time_ms, replica.now_ns // 1_000_000)
        decision = self._decide(batch, records, time_ms, disk)
        applied = decision.outcomes.translate(None, b"\0")
        if applied:
            self.accept(batch, raw, time_ms, decision)
        level, reply = batch.consistency, decision.reply
        if level == "all" and len(replica.shard.members) < replica.members_for_all:
            self._note_all_not_met(reply)
            level = "quorum"
        if level == "one" and len(applied) < len(batch):
            # What was refused or done before tells about data: that has to be committed (R5).
            level = "quorum"
        if applied:
            # An own entry that commits confirms the epoch as a round would.
            return replica.answer_written(level, deadline_ns, respond, reply)
        end = replica.last[1]
        return replica.answer_read(level, deadline_ns, respond, reply, end, is_read=False)

    # ---- from disk ----

    def _park(
        self, size: int, deadline_ns: int, respond: Respond,
        fetch: Callable[[Any, Callable[[], bool]], None], again: Callable[[int, Any], None],
    ) -> None:  # fmt: skip
        """Let a request wait for the disk; it is judged when it comes back, as if it had arrived then."""
        if self._parked and self._parked_bytes + size > self._knobs.parked_bytes_max:
            return respond(Overloaded(f"too many bytes wait for the disk of {self._shard}"))
        self._parks += 1
        self._parked[self._parks] = (deadline_ns, respond, size)
        self._parked_bytes += size
        park = self._parks
        return fetch(partial(again, park), lambda: park in self._parked)

    def _unpark(self, park: int) -> Respond | None:
        """Who waited; None when he was answered at his deadline."""
        parked = self._parked.pop(park, None)
        if parked is None:
            return None
        self._parked_bytes -= parked[2]
        return parked[1]

    def _resume(
        self, batch: Batch, raw: bytes, epoch: int | None, deadline_ns: int, respond: Respond,
        park: int, fetched: Loaded | DiskRuns | str, disk: DiskRuns | None = None,
    ) -> None:  # fmt: skip
        if self._unpark(park) is None:
            return None
        if isinstance(fetched, str):
            return respond(self._not_fetched(fetched))
        refusal = self._refusal(batch, epoch)
        if refusal is not None:
            return respond(refusal)
        if isinstance(fetched, DiskRuns):
            return self._judge(batch, raw, epoch, deadline_ns, respond, fetched)
        with self.having(fetched):
            self._judge(batch, raw, epoch, deadline_ns, respond, disk)
        return None

    @contextmanager
    def having(self, loaded: Loaded) -> Iterator[None]:
        """Judge with these records from disk at hand."""
        self._loaded = loaded
        yield
        self._loaded = {}

    def _not_fetched(self, reason: str) -> BusKVError:
        return ShardUnavailable(f"{self._shard}: {reason}; send it again")

    def _committed(self, keys: Sequence[bytes]) -> tuple[list[Any], bool]:
        """Committed records, UNKNOWN where the disk has to be asked, and whether there is no such. What is in the cache
        is the hot path."""
        try:
            return [*map(self._table.young.__getitem__, keys)], True
        except KeyError:
            records = [*map(self._table.get, keys)]
        if self._loaded:
            loaded = map(self._loaded.get, keys, repeat(UNKNOWN))
            records = [m if r is UNKNOWN else r for r, m in zip(records, loaded, strict=True)]
        return records, UNKNOWN not in records

    def _latest(self, keys: Sequence[bytes]) -> tuple[list[Any], bool]:
        """`latest` of each key, and whether none is UNKNOWN."""
        records, is_known = self._committed(keys)
        written = [
            s.writes for s in self._replica.tail.segments if not s.writes.keys().isdisjoint(keys)
        ]
        for writes in written:  # the newest last
            records = [*map(writes.get, keys, records)]
        return records, is_known or UNKNOWN not in records

    def latest(self, key: bytes) -> Any:
        """The key's record at the end of the log, None when it is absent, UNKNOWN when the disk has to be asked."""
        return self._latest([key])[0][0]

    # ---- the decision ----

    def _decide(
        self, batch: Batch, records: list[Known | None], time_ms: int, disk: DiskRuns | None
    ) -> Decision:
        """Outcomes of a batch at the end of the log, where its keys have these records.

        The plain case, new puts without conditions, is the hot path.
        """
        seen = self._dedup.seen(batch, disk)
        before = dict(zip(batch.keys, records, strict=True))
        if seen or batch.conditions or batch.ttls_ms or batch.kinds.count(b.PUT) < len(batch):
            return Judge(self._replica, batch, before, time_ms, seen).decide()
        epoch, first = self._replica.shard.epoch, self._replica.last[1] + 1
        marks = bytes([b.REPLACED]) * len(records)
        if not all(records):
            marks = bytes([b.CREATED if record is None else b.REPLACED for record in records])
        outcomes = marks if len(before) == len(records) else _with_repeats(batch.keys, marks)
        writes = plain_writes(batch, epoch, first)
        added = data_bytes_added(writes, before)
        return Decision(writes, outcomes, added, BatchReply(outcomes, epoch, first))

    def accept(self, batch: Batch, raw: bytes, time_ms: int, decision: Decision) -> None:
        """Put a decided batch at the end of the log."""
        replica = self._replica
        segment = replica.open_segment(time_ms, len(raw) + len(batch))
        first = replica.last[1] + 1
        logged = LoggedBatch(batch, decision.outcomes, segment.epoch, first, segment.time_ms)
        before_bytes = segment.batch_bytes
        segment.add(logged, raw, decision.writes, decision.data_bytes)
        replica.tail.bytes += segment.batch_bytes - before_bytes
        self.remember([logged])

    def remember(self, logged_batches: list[LoggedBatch]) -> None:
        """Know these requests when they come again (R6)."""
        for logged in logged_batches:
            batch = logged.batch
            if batch.client:
                run = Run(
                    batch.numbers, batch.indexes, logged.outcomes, logged.epoch, logged.first,
                    logged.time_ms,
                )  # fmt: skip
                self._dedup.add(batch.client, run)

    def forget_after(self, seq: int) -> None:
        """What stands in the log behind `seq` may be cut."""
        self._dedup.forget_after(seq)

    # ---- ALL ----

    def _note_all_not_met(self, reply: BatchReply) -> None:
        members, wanted = len(self._replica.shard.members), self._replica.members_for_all
        _fail_all(reply, f"ALL takes {wanted} members and the shard has {members}")

    def tell_all_not_met(self, waiting: Waiting[Any]) -> None:
        """The time of an ALL request is over: it is committed, and not every member has it or has confirmed."""
        if isinstance(waiting.reply, BatchReply) and not waiting.is_read:
            _fail_all(waiting.reply, "not every member has it")
            return waiting.respond(waiting.reply)
        return waiting.respond(
            ConsistencyNotMet("not every member confirms; read with quorum", met="quorum")
        )

    # ---- the turn ----

    def end_turn(self) -> None:
        self._dedup.leave_to_disk(self._replica.folder.mark.last)
        self._dedup.forget_idle(self._replica.time_ms)

    @property
    def is_waiting(self) -> bool:
        return bool(self._parked)

    def next_ns(self) -> int:
        if not self._parked:
            return NEVER_NS
        return min([end_ns for end_ns, *_ in self._parked.values()])

    def on_deadline(self, now_ns: int) -> None:
        for park in [park for park, (end_ns, *_) in self._parked.items() if end_ns <= now_ns]:
            respond = self._unpark(park)
            assert respond is not None
            respond(self._not_fetched("its disk does not answer"))


def _is_read(batch: Batch) -> bool:
    return batch.kinds.count(b.GET) == len(batch)


def _fail_all(reply: BatchReply, reason: str) -> None:
    for i, outcome in enumerate(reply.outcomes):
        version = reply.version(i)
        if outcome in b.APPLIED and version is not None:
            message = f"committed at quorum; {reason}"
            failure = ConsistencyNotMet(message, met="quorum", version=list(version))
            reply.failures[i] = failure.to_body()


def _with_repeats(keys: list[bytes], outcomes: bytes) -> bytes:
    """A key that stands twice in a batch is there the second time."""
    marks = bytearray(outcomes)
    first_at: dict[bytes, int] = {}
    for i, key in enumerate(keys):
        if first_at.setdefault(key, i) != i:
            marks[i] = b.REPLACED
    return bytes(marks)
