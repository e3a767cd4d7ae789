"""One replica over a state on disk, against a plain dictionary: writes, reads, scans, folds, evictions and restarts.

The disk answers in two steps that other things may come between: it looks, and later it tells. A fold is on disk when
it looks; so a restart in between finds a mark that nobody was told of.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bus_kv.core.machine import EntryRow, Fold, KeysAfter, Lookup
from bus_kv.knobs import Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.protocol.requests import ScanRequest
from bus_kv.protocol.shard_map import Member, Shard, ShardState
from bus_kv.protocol.sizes import Sizes
from nodes.machine.erase import erase
from nodes.machine.replica import Past, Ports, Replica
from tests.simulator import state

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.errors import BusKVError

KEYS = st.sampled_from([b"a", b"b", b"c", b"ca", b"d", b"\xff"])
WRITES = st.lists(st.tuples(KEYS, st.none() | st.binary(max_size=4)), min_size=1, max_size=5)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from([b.GET, b.PUT, b.DELETE]), KEYS, st.binary(max_size=4)),
    min_size=2, max_size=6,
).filter(lambda operations: {kind for kind, *_ in operations} != {b.GET})  # fmt: skip
ALL_BYTES = 1 << 20
LATE_NS = 2**62
SHARD = Shard(
    "s1", "default", b"", None, 0, "t", (Member("n1", "i"),), "n1", ShardState.ACTIVE
)  # fmt: skip


class ReplicaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.model: dict[bytes, bytes] = {}
        self.versions: dict[bytes, b.Version | None] = {}
        self.disk = state.Shard()
        self.log: list[EntryRow] = []
        self.now_ns = 0
        self.number = 0
        self.sent: list[tuple[Batch, BatchReply]] = []
        """Writes with their answers, to be sent again."""
        self.late: list[Batch] = []
        self.pages: list[dict[str, Any]] = []

    @initialize(
        cache_bytes=st.sampled_from([1, 700, 1500, 3000, 1 << 20]),
        runs=st.integers(0, 2),
        fold_bytes=st.integers(1, 200),
        lookup_bytes=st.sampled_from([1, 3, ALL_BYTES]),
    )
    def start(self, cache_bytes: int, runs: int, fold_bytes: int, lookup_bytes: int) -> None:
        self.lookup_bytes = lookup_bytes
        self.knobs = Knobs(
            cache_bytes=cache_bytes,
            dedup_runs_max=runs,
            fold_bytes=fold_bytes,
            log_keep_bytes=1,
            log_bytes_max=1,
        )
        self.restart()

    @rule()
    def restart(self) -> None:
        """Kill the process: memory is gone, what the disk was looking at is not told."""
        self.asked: list[tuple[Any, Any, Any]] = []
        past = Past(self.disk.mark, [*self.disk.clients.items()])
        ports = Ports(
            lambda query, then: self.asked.append((query, then, None)), lambda: self.now_ns
        )
        self.replica = Replica(SHARD, "n1", "i", self.knobs, Sizes(1 << 20), past, ports)
        # Less than a reply takes, so that few and small values fill it.
        self.replica.loader.values_bytes_max = self.lookup_bytes
        for row in self.log:
            if row.last > self.disk.mark.last:
                self.replica.replay(row)
        epoch = self.replica.last[0] + 1
        shard = replace(SHARD, epoch=epoch, token=f"t{epoch}")
        self.replica.open(shard, 0)
        self.turn()
        self.replica.activate(shard)
        self.turn()

    def turn(self) -> None:
        rows, row = self.replica.take_rows()
        self.log += [entry for entry in rows if isinstance(entry, EntryRow)]
        if rows or row:
            self.replica.on_durable()
        self.replica.settle()
        trim = self.replica.end_turn()
        if trim is not None:
            assert trim.last <= self.disk.mark.last, "the log was cut before the fold"
            self.log = [row for row in self.log if row.last > trim.last]

    # ---- the disk ----

    @rule(place=st.integers(0, 3))
    def look(self, place: int) -> None:
        """The disk carries out a question, whichever; it does not tell yet."""
        waiting = [i for i, (_, _, rows) in enumerate(self.asked) if rows is None]
        if not waiting:
            return
        i = waiting[place % len(waiting)]
        query, then, _ = self.asked[i]
        if isinstance(query, Fold):
            self.disk.apply(query)
            self.asked[i] = (query, then, [])
        else:
            self.asked[i] = (query, then, self.disk.answer(query))

    @rule(place=st.integers(0, 3))
    def tell(self, place: int) -> None:
        ready = [i for i, (_, _, rows) in enumerate(self.asked) if rows is not None]
        if ready:
            _, then, rows = self.asked.pop(ready[place % len(ready)])
            then(rows, None)
            self.turn()

    @rule()
    def fold_overtakes(self) -> None:
        """A fold begins and ends while older questions are still open."""
        self.time_passes()
        for i, (query, then, rows) in enumerate(self.asked):
            if isinstance(query, Fold):
                if rows is None:
                    self.disk.apply(query)
                del self.asked[i]
                then([], None)
                return self.turn()
        return None

    @rule()
    def wait_for_the_disk(self) -> None:
        for _ in range(200):
            if not self.asked:
                return
            self.look(0)
            self.tell(0)
        raise AssertionError("the disk is asked without end")

    @rule()
    def time_passes(self) -> None:
        """Long enough for a fold."""
        self.now_ns += self.knobs.fold_interval_ms * 1_000_000
        self.turn()

    # ---- requests ----

    @rule(writes=WRITES)
    def write(self, writes: list[tuple[bytes, bytes | None]]) -> None:
        batch = self.batch(writes)
        self.submit(batch, self.first_answer(batch))

    @rule(key=KEYS, value=st.binary(max_size=4))
    def hold_back(self, key: bytes, value: bytes) -> None:
        """A write that is on its way for long: later ones overtake it."""
        self.late.append(self.batch([(key, value)]))

    @rule()
    def arrive_late_twice(self) -> None:
        """It arrives, and its repeat as well, before the disk has told what it knows about the first."""
        if not self.late:
            return
        batch = self.late.pop(0)
        first = self.first_answer(batch)
        answers: list[BatchReply] = []

        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            if not answers:
                first(reply)
            answers.append(reply)
            assert reply.versions() == answers[0].versions()

        self.submit(batch, answered)
        self.submit(batch, answered)

    def batch(self, writes: list[tuple[bytes, bytes | None]]) -> Batch:
        kinds = bytes([b.DELETE if value is None else b.PUT for _, value in writes])
        numbers = range(self.number + 1, self.number + 1 + len(writes))
        self.number += len(writes)
        values = [value for _, value in writes] if b.PUT in kinds else []
        return Batch(kinds, [key for key, _ in writes], values, "c", numbers)

    def first_answer(self, batch: Batch) -> Callable[[BatchReply | BusKVError], None]:
        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            self.check_write(batch, reply)
            self.sent.append((batch, reply))

        return answered

    def check_write(self, batch: Batch, reply: BatchReply) -> None:
        for i, (kind, key) in enumerate(zip(batch.kinds, batch.keys, strict=True)):
            existed, outcome = key in self.model, reply.outcomes[i]
            if kind == b.GET:
                self.check_get(key, i, reply)
                continue
            if i in batch.conditions and batch.conditions[i] != self.versions.get(key):
                assert outcome == b.REFUSED
                continue
            self.versions[key] = reply.version(i) if kind == b.PUT else None
            if kind == b.DELETE:
                assert outcome == (b.DELETED if existed else b.ABSENT)
                self.model.pop(key, None)
            else:
                assert outcome == (b.REPLACED if existed else b.CREATED)
                value = batch.values[i]
                assert value is not None
                self.model[key] = value

    def check_get(self, key: bytes, i: int, reply: BatchReply) -> None:
        value = reply.values[i] if reply.values else None
        if reply.outcomes[i] == b.UNANSWERED:
            assert self.lookup_bytes < ALL_BYTES
            assert (value, reply.version(i)) == (None, None)
            return
        assert value == self.model.get(key)
        assert reply.version(i) == self.versions.get(key)
        assert reply.outcomes[i] == (b.FOUND if key in self.model else b.MISSING)

    @rule(operations=OPERATIONS)
    def mix(self, operations: list[tuple[int, bytes, bytes]]) -> None:
        """Gets among writes see what stands before them in their batch."""
        batch = self.batch([(key, value) for _, key, value in operations])
        batch.kinds = bytes([kind for kind, *_ in operations])
        puts = [value if kind == b.PUT else None for kind, _, value in operations]
        batch.values = [*puts] if b.PUT in batch.kinds else []

        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            self.check_write(batch, reply)

        self.submit(batch, answered)

    @rule(key=KEYS, value=st.binary(max_size=4), met=st.booleans())
    def write_on_condition(self, key: bytes, value: bytes, met: bool) -> None:
        batch = self.batch([(key, value)])
        batch.conditions[0] = self.versions.get(key) if met else (1, 1)

        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            self.check_write(batch, reply)

        self.submit(batch, answered)

    @rule(place=st.integers(0, 20))
    def send_again(self, place: int) -> None:
        """A repeat is answered as the first was, and does nothing; deletes of absent keys left no trace."""
        if not self.sent:
            return
        batch, first = self.sent[place % len(self.sent)]
        if b.ABSENT in first.outcomes:
            return

        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            assert reply.outcomes == first.outcomes
            assert reply.versions() == first.versions()

        self.submit(batch, answered)

    @rule(keys=st.lists(KEYS, min_size=1, max_size=4))
    def read(self, keys: list[bytes]) -> None:
        self.ask_for(keys)

    def ask_for(self, keys: list[bytes]) -> list[list[bytes]]:
        """What comes of it, once it has come: the keys that were left out of the reply."""
        left: list[list[bytes]] = []

        def answered(reply: BatchReply | BusKVError) -> None:
            assert isinstance(reply, BatchReply)
            for i, key in enumerate(keys):
                self.check_get(key, i, reply)
            unanswered = [i for i, outcome in enumerate(reply.outcomes) if outcome == b.UNANSWERED]
            assert len(unanswered) < len(keys), "nothing is answered"
            left.append([keys[i] for i in unanswered])

        self.submit(Batch(bytes([b.GET]) * len(keys), keys), answered)
        return left

    @rule(keys=st.lists(KEYS, min_size=1, max_size=6))
    def read_until_all_is_answered(self, keys: list[bytes]) -> None:
        """What a reply leaves out is asked for again."""
        while keys:
            left = self.ask_for(keys)
            self.wait_for_the_disk()
            (keys,) = left

    def submit(self, batch: Batch, answered: Any) -> None:
        epoch = self.replica.shard.epoch
        self.replica.writer.submit(batch, batch.encode(), epoch, LATE_NS, answered)
        self.turn()

    @rule(
        start=st.sampled_from([b"", b"b", b"c"]), end=st.sampled_from([None, b"ca", b"d"]),
        limit=st.integers(1, 3), reverse=st.booleans(), keys_only=st.booleans(),
    )  # fmt: skip
    def scan(
        self, start: bytes, end: bytes | None, limit: int, reverse: bool, keys_only: bool
    ) -> None:
        request = ScanRequest("default", None, start, end, limit, reverse, keys_only)

        def answered(page: dict[str, Any] | BusKVError) -> None:
            assert isinstance(page, dict)
            inside = sorted(k for k in self.model if k >= start and (end is None or k < end))
            wanted = inside[::-1] if reverse else inside
            found = [item["key"] for item in page["items"]]
            assert found == wanted[: len(found)]
            assert [item.get("value") for item in page["items"]] == [
                None if keys_only else self.model[key] for key in found
            ]
            self.pages.append(page)
            rest = wanted[len(found) :]
            position = page["next"]
            if position is None:
                assert not rest
            elif reverse:
                assert rest == [key for key in inside if key < position][::-1]
            else:
                assert rest == [key for key in inside if key >= position]

        self.replica.scans.scan(request, self.replica.shard.epoch, answered)
        self.turn()

    @rule(limit=st.integers(1, 2), reverse=st.booleans())
    def scan_to_the_end(self, limit: int, reverse: bool) -> None:
        """Page after page: later ones come from what was read ahead."""
        self.wait_for_the_disk()
        request = ScanRequest("default", None, limit=limit, reverse=reverse)
        found: list[bytes] = []
        pages: list[dict[str, Any]] = [{"next": b""}]
        while (position := pages[-1]["next"]) is not None:
            if reverse and position:
                request = replace(request, end=position)
            elif position:
                request = replace(request, start=position)
            self.replica.scans.scan(request, self.replica.shard.epoch, pages.append)  # type: ignore[arg-type]
            self.turn()
            self.wait_for_the_disk()
            found += [item["key"] for item in pages[-1]["items"]]
        assert found == sorted(self.model, reverse=reverse)

    @rule(start=st.sampled_from([b"", b"b"]), end=st.sampled_from([None, b"d"]))
    def count(self, start: bytes, end: bytes | None) -> None:
        self.wait_for_the_disk()
        request = ScanRequest("default", None, start, end, count_only=True)
        inside = [k for k in self.model if k >= start and (end is None or k < end)]

        def answered(page: dict[str, Any] | BusKVError) -> None:
            assert isinstance(page, dict)
            counts.append(page["count"])

        counts: list[int] = []
        self.replica.scans.scan(request, self.replica.shard.epoch, answered)
        self.turn()
        self.wait_for_the_disk()
        assert counts == [len(inside)]

    # ---- what always holds ----

    @invariant()
    def the_disk_is_the_log_up_to_its_mark(self) -> None:
        seqs = [(row[0], row[1]) for row in self.disk.oplog]
        assert seqs == sorted(set(seqs)), "an operation stands in the oplog twice"

    @invariant()
    def the_counters_are_right(self) -> None:
        if hasattr(self, "replica") and self.replica.commit_seq == self.replica.last[1]:
            sizes = sum(len(key) + len(value) for key, value in self.model.items())
            assert self.replica.table.keys == len(self.model)
            assert self.replica.table.data_bytes == sizes


ReplicaMachine.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestReplicaModel = ReplicaMachine.TestCase


# ---- moments that chance finds too rarely: a fold ends between the disk's look and its telling ----


def rig(fold_bytes: int, lookup_bytes: int = ALL_BYTES) -> ReplicaMachine:
    machine = ReplicaMachine()
    machine.start(cache_bytes=1, runs=0, fold_bytes=fold_bytes, lookup_bytes=lookup_bytes)
    machine.wait_for_the_disk()
    return machine


def test_a_page_read_before_a_fold_is_not_used_after_it() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.write([(b"a", b"1")])
    machine.fold_overtakes()
    machine.scan(b"", None, 3, False, False)
    machine.look(0)
    machine.write([(b"b", b"2")])
    machine.fold_overtakes()
    machine.wait_for_the_disk()
    assert len(machine.pages) == 1


def test_what_the_disk_said_of_requests_before_a_fold_is_not_used_after_it() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.hold_back(b"a", b"1")
    machine.write([(b"b", b"2")])
    machine.fold_overtakes()
    machine.arrive_late_twice()
    machine.look(0)
    machine.look(0)
    machine.tell(0)
    machine.fold_overtakes()
    machine.wait_for_the_disk()
    assert [row[5:7] for row in machine.disk.oplog] == [("c", 2), ("c", 1)]


def test_keys_that_are_written_while_the_filter_is_built_are_in_it() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.write([(b"a", b"1")])
    machine.fold_overtakes()
    machine.restart()
    machine.look(0)
    machine.write([(b"b", b"2")])
    machine.wait_for_the_disk()
    machine.fold_overtakes()
    for key in (b"c", b"d"):
        machine.write([(key, b"3")])
    machine.fold_overtakes()
    assert machine.replica.table.filter.complete
    machine.read([b"b"])
    machine.wait_for_the_disk()


def test_a_record_read_before_a_fold_is_not_used_after_it() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.write([(b"a", b"1")])
    machine.fold_overtakes()
    machine.restart()
    machine.read([b"b"])
    lookup = next(i for i, (query, _, _) in enumerate(machine.asked) if isinstance(query, Lookup))
    _, told, _ = machine.asked.pop(lookup)  # the disk looks now, b is not there, and tells late
    machine.wait_for_the_disk()
    assert machine.replica.table.filter.complete
    machine.write([(b"b", b"2")])
    machine.fold_overtakes()
    for key in (b"c", b"d"):
        machine.write([(key, b"3")])
    machine.fold_overtakes()
    told([], None)
    machine.turn()
    machine.wait_for_the_disk()


def answer_lookups(machine: ReplicaMachine) -> None:
    while True:
        at = next((i for i, (q, _, _) in enumerate(machine.asked) if isinstance(q, Lookup)), None)
        if at is None:
            return
        query, then, _ = machine.asked.pop(at)
        then(machine.disk.answer(query), None)
        machine.turn()


def test_a_key_that_was_looked_for_before_it_was_written_is_in_the_filter() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.write([(b"a", b"1")])
    machine.fold_overtakes()
    machine.restart()
    machine.replica.table.cache_bytes_max = 5000
    machine.write([(b"b", b"2")])  # the filter is not complete: it is looked for first
    machine.wait_for_the_disk()
    machine.fold_overtakes()
    for i in range(40):
        machine.write([(b"x%d" % i, b"")])
    machine.fold_overtakes()
    machine.wait_for_the_disk()
    assert machine.replica.table.filter.complete
    machine.read([b"b"])
    machine.wait_for_the_disk()


def test_two_copies_of_a_delete_prefix_delete_once() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.write([(b"p1", b"v")])
    machine.fold_overtakes()
    machine.restart()
    machine.wait_for_the_disk()
    request = ScanRequest(
        "default", None, b"p", b"q", 1000, keys_only=True, erase=("u", 1)
    )  # fmt: skip
    answers: list[Any] = []
    for _ in range(2):
        erase(machine.replica, request, machine.replica.shard.epoch, LATE_NS, answers.append)
        machine.turn()
        answer_lookups(machine)
    machine.wait_for_the_disk()
    machine.model.pop(b"p1", None)
    machine.write([(b"p1", b"new"), (b"p2", b"new")])
    erase(machine.replica, request, machine.replica.shard.epoch, LATE_NS, answers.append)
    machine.turn()
    machine.wait_for_the_disk()
    machine.read([b"p1", b"p2"])
    machine.wait_for_the_disk()
    assert [answer["deleted"] for answer in answers] == [1, 1, 1]


def test_what_the_disk_said_of_requests_is_not_used_after_a_second_wait_and_a_fold() -> None:
    machine = rig(fold_bytes=1 << 20)
    machine.hold_back(b"c", b"late")
    machine.write([(b"b", b"2")])
    machine.fold_overtakes()
    machine.wait_for_the_disk()
    machine.restart()
    machine.asked = [entry for entry in machine.asked if not isinstance(entry[0], KeysAfter)]
    machine.arrive_late_twice()
    for _ in range(2):
        machine.look(0)
        machine.tell(0)
    at = next(i for i, (query, _, _) in enumerate(machine.asked) if isinstance(query, Lookup))
    query, then, _ = machine.asked.pop(at)
    then(machine.disk.answer(query), None)
    machine.turn()
    machine.fold_overtakes()
    machine.wait_for_the_disk()
    machine.fold_overtakes()
    seqs = [row[5:8] for row in machine.disk.oplog]
    assert len(seqs) == len(set(seqs))
