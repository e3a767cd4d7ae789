"""The simulated state on disk: a fold is there whole or not at all; a query sees some moment before its answer."""

from __future__ import annotations

import pickle
from bisect import insort
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import (
    Answered,
    Checkpointed,
    ClientsOf,
    Expiring,
    Fold,
    FoldStalled,
    KeysAfter,
    Load,
    Lookup,
    Mark,
    RangeCount,
    RangeRead,
    RequestsOf,
    SnapshotRead,
    Unread,
)  # fmt: skip
from bus_kv.protocol import batch as b
from tests.simulator.world import MICROSECOND_NS, MILLISECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Query
    from nodes.machine.table import Record
    from tests.simulator.disk import Disk
    from tests.simulator.world import World

FOLD_NS = (300 * MICROSECOND_NS, 40 * MILLISECOND_NS)
QUERY_NS = (50 * MICROSECOND_NS, 6 * MILLISECOND_NS)


class Shard:
    """What the state holds of one shard."""

    def __init__(self) -> None:
        self.mark = Mark()
        self.rows: dict[bytes, tuple[int, Record]] = {}
        """Key -> (position in the table, record)."""
        self.positions = 0
        self.oplog: list[tuple[Any, ...]] = []
        """(epoch, seq, kind, key, value, client, number, index, time_ms) of every applied operation, in order."""
        self.rolled_back: dict[tuple[int, int], bytes] = {}
        """(epoch, seq) -> key of every operation that the log says was rolled back."""
        self.requests: list[tuple[str, tuple[Any, ...]]] = []
        self.clients: dict[str, int] = {}

    def apply(self, fold: Fold) -> None:
        for key, record in fold.records.items():
            if record is None:
                self.rows.pop(key, None)
            else:
                self.positions += 1
                position = self.rows[key][0] if key in self.rows else self.positions
                self.rows[key] = (position, record)
        for logged in fold.batches:
            batch, seq = logged.batch, logged.first
            for i, outcome in enumerate(logged.outcomes):
                if outcome in b.APPLIED:
                    value = batch.values[i] if batch.kinds[i] == b.PUT else None
                    identity = (batch.client, *batch.identity(i)) if batch.client else ("", 0, 0)
                    row = (logged.epoch, seq, batch.kinds[i], batch.keys[i], value, *identity)
                    self.oplog.append((*row, logged.time_ms))
                    seq += 1
            if batch.client:
                run = (
                    batch.numbers, batch.indexes, logged.outcomes, logged.epoch, logged.first,
                    logged.time_ms,
                )  # fmt: skip
                self.requests.append((batch.client, run))
                newest = self.clients.get(batch.client, -1)
                self.clients[batch.client] = max(newest, batch.numbers[-1])
        for logged in fold.rolled_back:
            seq = logged.first
            for key, outcome in zip(logged.batch.keys, logged.outcomes, strict=True):
                if outcome in b.APPLIED:
                    self.rolled_back[logged.epoch, seq] = key
                    seq += 1
        self.mark = fold.mark

    def answer(self, query: Query) -> list[Any]:
        rows = self.rows
        match query:
            case Lookup():
                return self._lookup(query)
            case RangeRead():
                return self._range(query)
            case RangeCount():
                return [len(self._keys(query.start, query.end))]
            case KeysAfter():
                order = sorted((position, key) for key, (position, _) in rows.items())
                page = [item for item in order if item[0] > query.after][: query.count]
                return [(page[-1][0], [key for _, key in page])] if page else []
            case Expiring():
                ends: list[tuple[int, bytes, int]] = []
                for key, (_, record) in rows.items():
                    if record[3] is not None and record[3] <= query.until_ms:
                        insort(ends, (record[3], key, record[2]))
                return [*ends[: query.limit]]
            case RequestsOf():
                runs = [
                    run for client, run in self.requests
                    if client == query.client
                    and run[0][0] <= query.last and run[0][-1] >= query.first
                ]  # fmt: skip
                return [-1, *runs]
            case SnapshotRead() | ClientsOf():
                return self._chunk(query)
            case _:
                raise TypeError(f"unknown query {query!r}")

    def _lookup(self, query: Lookup) -> list[Any]:
        found: list[Any] = []
        for key in query.heads:
            if key in self.rows:
                value, *rest = self.rows[key][1]
                found.append((key, Unread(len(value)), *rest))
        room = query.bytes_max
        for reached, key in enumerate(query.whole):
            if room <= 0:
                return [reached, *found]
            if key in self.rows:
                found.append((key, *self.rows[key][1]))
                room -= len(self.rows[key][1][0])
        return [len(query.whole), *found]

    def _chunk(self, query: SnapshotRead | ClientsOf) -> list[Any]:
        """Two keys a chunk, then the rest; what was written after `last` is left out."""
        if isinstance(query, ClientsOf):
            return [*self.clients.items()]
        after, keys = query.place or b"", sorted(self.rows)
        page = [key for key in keys if key > after][:2]
        if page:
            rows = [(key, self.rows[key]) for key in page if self.rows[key][1][2] <= query.last]
            return ["rows", pickle.dumps(rows), page[-1]]
        oplog = [row for row in self.oplog if row[1] <= query.last]
        requests = [(client, run) for client, run in self.requests if run[4] <= query.last]
        return ["rest", pickle.dumps((oplog, requests, self.rolled_back)), None]

    def load(self, load: Load) -> None:
        if load.mark is not None:
            self.mark = load.mark
        elif load.table == "rows":
            for key, (_, record) in pickle.loads(load.chunk):
                self.positions += 1
                self.rows[key] = (self.positions, record)
        elif load.table == "rest":
            self.oplog, self.requests, self.rolled_back = pickle.loads(load.chunk)
            for client, run in self.requests:
                self.clients[client] = max(self.clients.get(client, -1), run[0][-1])
        else:
            self.clear()

    def clear(self) -> None:
        self.__init__()  # type: ignore[misc]

    def _keys(self, start: bytes, end: bytes | None) -> list[bytes]:
        return sorted(k for k in self.rows if k >= start and (end is None or k < end))

    def _range(self, query: RangeRead) -> list[Any]:
        keys = self._keys(query.start, query.end)
        if query.reverse:
            keys.reverse()
        page: list[Any] = []
        room = query.bytes_max
        for key in keys[: query.limit]:
            page.append((key, *self.rows[key][1]))
            room -= len(key) + len(self.rows[key][1][0])
            if room <= 0:
                break
        return page


class State:
    def __init__(self, world: World, name: str, disk: Disk) -> None:
        self._world, self._disk = world, disk
        self._random = world.random(f"state/{name}")
        self.shards: dict[str, Shard] = {}
        self._notify: Callable[[Any], None] = lambda _: None
        self._folds: list[Fold | Load] = []
        self._life = 0
        self._checkpoint = pickle.dumps(self.shards)

    def open(self, notify: Callable[[Any], None]) -> None:
        self._notify = notify
        self._life += 1

    def shard(self, id: str) -> Shard:
        return self.shards.setdefault(id, Shard())

    def submit(self, effect: Fold | Load | Query) -> None:
        life = self._life
        if isinstance(effect, Fold | Load):
            self._folds.append(effect)
            if len(self._folds) == 1:
                self._begin_fold()
            return
        look_ns = self._random.randint(*QUERY_NS)
        tell_ns = look_ns + self._random.randint(*QUERY_NS)
        shard = self.shard(effect.shard)  # type: ignore[union-attr]  # no SQL here

        def look() -> None:
            if life == self._life:
                rows = shard.answer(effect)
                self._world.after(tell_ns - look_ns, lambda: self._tell(life, effect.ticket, rows))

        self._world.after(look_ns, look)

    def _tell(self, life: int, ticket: int, rows: list[Any]) -> None:
        if life == self._life:
            failure = "unreadable just now" if self._random.random() < 0.002 else None
            self._notify(Answered(ticket, rows, failure))

    def _begin_fold(self) -> None:
        life = self._life
        self._world.after(self._random.randint(*FOLD_NS), lambda: self._commit(life))

    def _commit(self, life: int) -> None:
        """The transaction is durable; its completion is told a little later, folds and queries in between see it."""
        if life != self._life:
            return
        if self._world.now_ns < self._disk.full_until_ns:
            self._notify(FoldStalled("no space left"))
            self._world.after(200 * MILLISECOND_NS, lambda: self._commit(life))
            return
        effect = self._folds[0]
        is_chunk = isinstance(effect, Load) and bool(effect.table)
        failure = "refused" if is_chunk and self._random.random() < 0.02 else None
        if failure is None:
            self._write(effect)
        self._world.after(self._random.randint(*QUERY_NS), lambda: self._complete(life, failure))

    def _complete(self, life: int, failure: str | None) -> None:
        if life == self._life:
            self._notify(FoldStalled(""))
            self._notify(Answered(self._folds.pop(0).ticket, failure=failure))
            if self._random.random() < 0.2:
                self._checkpoint = pickle.dumps(self.shards)
                lasts = {id: shard.mark.last for id, shard in self.shards.items()}
                self._notify(Checkpointed(lasts))
            if self._folds:
                self._begin_fold()

    def crash(self) -> None:
        """A fold under way is there, or not; what came after the last checkpoint may come from the node's log again."""
        self._life += 1
        if self._folds and self._world.now_ns >= self._disk.full_until_ns:
            fold = self._folds[0]
            if self.shard(fold.shard).mark != fold.mark and self._random.random() < 0.5:
                self._write(fold)
        self._folds = []
        checkpoint: dict[str, Shard] = pickle.loads(self._checkpoint)
        lasts = {id: shard.mark.last for id, shard in checkpoint.items()}
        if self._random.random() < 0.5 and self._disk.goes_on(lasts):
            self.shards = checkpoint
        for shard in self.shards.values():
            if not shard.mark.last:
                shard.clear()  # a snapshot that did not come to its end is nothing

    def _write(self, effect: Fold | Load) -> None:
        shard = self.shard(effect.shard)
        if isinstance(effect, Fold):
            shard.apply(effect)
        else:
            shard.load(effect)
