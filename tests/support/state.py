"""A node's state for tests: the real one with answers one can wait for, and folds that a number determines."""

import logging
import queue
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bus_kv.core.machine import Answered, Checkpointed, Fold, LoggedBatch, Lookup, Mark
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from nodes.state import StateStore

ANSWER_WITHIN_S = 30.0
INCARNATION = "incarnation"


def open_state(directory: Path, incarnation: str = INCARNATION, **settings: Any) -> StateStore:
    defaults = {"oplog_keep_s": 1e9, "oplog_keep_bytes": 1 << 50, "dedup_window_ms": 10**12}
    return StateStore(directory, incarnation, **{**defaults, **settings})


class State:
    """The state of one node, running."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.store = open_state(directory, **settings)
        self.events: queue.Queue[Any] = queue.Queue()
        self.checkpoints: queue.Queue[dict[str, int]] = queue.Queue()
        self.failures: queue.Queue[Any] = queue.Queue()
        self.store.start(self._on_event, self.failures.put)

    def _on_event(self, event: Any) -> None:
        if isinstance(event, Checkpointed):
            self.checkpoints.put(event.lasts)
        else:
            self.events.put(event)

    def next_event(self) -> Any:
        return self.events.get(timeout=ANSWER_WITHIN_S)

    def wait_checkpointed(self, shard: str, last: int) -> None:
        """Until a checkpoint has the shard up to this seq. Raises queue.Empty."""
        while self.checkpoints.get(timeout=ANSWER_WITHIN_S).get(shard) != last:
            pass

    def do(self, effect: Any) -> Answered:
        if isinstance(effect, Fold):
            # The store lets the batches go when they are on disk.
            self.store.submit(replace(effect, batches=[*effect.batches]))
        else:
            self.store.submit(effect)
        event = self.next_event()
        assert isinstance(event, Answered), event
        assert event.ticket == effect.ticket
        return event

    def ask(self, query: Any) -> list[Any]:
        """The rows of the answer."""
        answer = self.do(query)
        assert answer.failure is None, answer
        return answer.rows

    def records(self, keys: list[bytes], shard: str = "s1") -> list[Any]:
        """Those of these keys that are there, with their values."""
        reached, *rows = self.ask(Lookup(1, shard, [], keys, 1 << 40))
        assert reached == len(keys)
        return rows

    def fetch(self, statement: str) -> list[Any]:
        with self.store.cursor() as cursor:
            return cursor.execute(statement).fetchall()

    def contents(self, shard: str) -> "Contents":
        """All that is there of a shard."""
        kv = "SELECT key, value, epoch, seq, expires_at FROM kv WHERE shard = '{}'"
        oplog = (
            "SELECT oplog.epoch, seq, oplog.time_ms, op, key, value, client, oplog.number, "
            "request_index, outcome FROM state.oplog JOIN state.marks "
            "ON marks.number = shard_number WHERE shard = '{}' ORDER BY oplog.epoch, seq"
        )
        requests = (
            "SELECT client, first, last, outcomes, epoch, first_seq, time_ms FROM state.requests "
            "WHERE shard = '{}' ORDER BY epoch, first_seq, client, first"
        )
        rows = self.fetch(kv.format(shard))
        assert len(dict.fromkeys(key for key, *_ in rows)) == len(rows)
        return Contents(
            self.store.marks().get(shard, Mark()),
            {key: tuple(record) for key, *record in rows},
            self.fetch(oplog.format(shard)),
            self.fetch(requests.format(shard)),
        )


@dataclass(slots=True)
class Contents:
    mark: Mark = field(default_factory=Mark)
    kv: dict[bytes, tuple[Any, ...]] = field(default_factory=dict)
    oplog: list[tuple[Any, ...]] = field(default_factory=list)
    requests: list[tuple[Any, ...]] = field(default_factory=list)


def puts(keys: Iterable[bytes], value: bytes = b"v", **fields: Any) -> Batch:
    keys = [*keys]
    return Batch(bytes([b.PUT]) * len(keys), keys, [value] * len(keys), **fields)


class Writer:
    """What a primary would fold of one shard, and what must be on disk then."""

    def __init__(self, shard: str = "s1", keyspace: str = "default") -> None:
        self.shard, self.keyspace = shard, keyspace
        self.on_disk = Contents()
        self.epoch = 3
        self._tickets = 0

    def fold(
        self,
        *batches: Batch | tuple[Batch, bytes],
        time_ms: int = 1000,
        expires_at: int | None = None,
    ) -> Fold:
        """The fold of these batches; without outcomes every operation is applied."""
        kv: dict[bytes, Any] = dict(self.on_disk.kv)
        logged, seq = [], self.on_disk.mark.last
        written: dict[bytes, Any] = {}
        for item in batches:
            batch, outcomes = item if isinstance(item, tuple) else (item, _outcomes(item, kv))
            if expires_at is not None:
                lives = dict.fromkeys(range(len(batch)), expires_at - time_ms)
                batch = replace(batch, ttls_ms=lives)
            logged.append(LoggedBatch(batch, outcomes, self.epoch, seq + 1, time_ms))
            for i, outcome in enumerate(outcomes):
                if outcome in b.APPLIED:
                    seq += 1
                    put, ttl_ms = batch.kinds[i] == b.PUT, batch.ttls_ms.get(i)
                    ends_ms = None if ttl_ms is None else time_ms + ttl_ms
                    written[batch.keys[i]] = kv[batch.keys[i]] = (
                        (batch.values[i], self.epoch, seq, ends_ms) if put else None
                    )
                    self._log(batch, i, outcome, seq, time_ms)
        self.on_disk.kv = {key: record for key, record in kv.items() if record is not None}
        self.on_disk.requests += [_request(item) for item in logged if item.batch.client]
        # As they are read: a batch of which nothing was applied begins where the next one does.
        self.on_disk.requests.sort(key=lambda row: (row[4], row[5], row[0], row[1]))
        data_bytes = sum(len(key) + len(record[0]) for key, record in self.on_disk.kv.items())
        mark = Mark(self.epoch, seq, time_ms, len(self.on_disk.kv), data_bytes)
        self.on_disk.mark = mark
        self._tickets += 1
        return Fold(self._tickets, self.shard, self.keyspace, written, logged, mark)

    def _log(self, batch: Batch, i: int, outcome: int, seq: int, time_ms: int) -> None:
        identity = (batch.client, *batch.identity(i)) if batch.client else (None, None, 0)
        value = batch.values[i] if batch.values else None
        self.on_disk.oplog.append(
            (
                self.epoch, seq, time_ms, batch.kinds[i], batch.keys[i], value, *identity, outcome,
            )
        )  # fmt: skip


def _outcomes(batch: Batch, kv: dict[bytes, Any]) -> bytes:
    present = {key for key, record in kv.items() if record is not None}
    outcomes = []
    for kind, key in zip(batch.kinds, batch.keys, strict=True):
        if kind == b.PUT:
            outcomes.append(b.REPLACED if key in present else b.CREATED)
            present.add(key)
        else:
            outcomes.append(b.DELETED if key in present else b.ABSENT)
            present.discard(key)
    return bytes(outcomes)


def _request(logged: LoggedBatch) -> tuple[Any, ...]:
    numbers = logged.batch.numbers
    return (
        logged.batch.client, numbers[0], numbers[-1], logged.outcomes, logged.epoch, logged.first,
        logged.time_ms,
    )  # fmt: skip


class RandomWriter(Writer):
    """Folds of puts and deletes in every form of a batch, each determined by the seed and by its place."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.folds = seed, 0

    def next_fold(self) -> Fold:
        self.folds += 1
        return self.fold(*self.next_batches(self.folds), time_ms=self.folds)

    def next_batches(self, place: int) -> list[Batch]:
        randomness = random.Random(f"{self.seed}/{place}")
        return [self._batch(randomness, place, at) for at in range(randomness.randint(1, 4))]

    def _batch(self, randomness: random.Random, place: int, at: int) -> Batch:
        count = randomness.randint(1, 60)
        kinds = bytes(randomness.choices([b.PUT, b.DELETE], [4, 1], k=count))
        keys = [f"key-{randomness.randrange(400)}".encode() for _ in range(count)]
        values = [randomness.randbytes(randomness.choice([3, 300])) for _ in range(count)]
        batch = Batch(
            kinds, keys, [v if k == b.PUT else None for k, v in zip(kinds, values, strict=True)]
        )  # fmt: skip
        if randomness.random() < 0.3:
            lasting = randomness.sample(range(count), count // 3)
            batch.ttls_ms = {i: randomness.randint(1, 99) for i in lasting if kinds[i] == b.PUT}
        first = place * 1000 + at * 100
        form = randomness.choice(["ascending", "gaps", "one request", "nobody"])
        if form != "nobody":
            batch.client = f"client-{randomness.randrange(3)}"
            batch.numbers = range(first, first + count)
        if form == "gaps":
            batch.numbers = sorted(randomness.sample(range(first, first + 100), count))
        elif form == "one request":
            batch.numbers, batch.indexes = [first] * count, [*range(count)]
        return batch


def fold_for_ever(directory: Path, seed: int, checkpoint_wal_bytes: int) -> None:
    """Go on folding where the state on disk ends; each seq that is told to be folded is a line."""
    logging.disable()
    state = State(directory, checkpoint_wal_bytes=checkpoint_wal_bytes)
    writer = RandomWriter(seed)
    while writer.on_disk.mark != state.store.marks().get("s1", Mark()):
        writer.next_fold()
    while True:
        fold = writer.next_fold()
        state.do(fold)
        print(fold.mark.last, flush=True)


def folded_until(seed: int, mark: Mark) -> Contents:
    """What must be on disk when this is the mark: a fold of refused operations alone has the seq of the one before."""
    writer = RandomWriter(seed)
    while writer.folds < mark.time_ms:
        writer.next_fold()
    return writer.on_disk
