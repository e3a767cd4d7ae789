"""The state of a node: its shards' data and what was done to them, in DuckDB.

Folds are written by one thread, the machine's queries are read by another, users' SQL by a few more. None of them is on
the way of a commit: what is acknowledged is in the log, and what a fold carries stays in memory until it is told to be
on disk. The folding thread looks after the file as well: it checkpoints it by size and age of its write-ahead log, and
takes out of it what is older than is to be kept. A full disk stalls a fold, which is tried again until there is space;
a file that is damaged ends the node.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import duckdb
import pyarrow as pa

from bus_kv.core.machine import Answered, Checkpointed, Fold, FoldStalled, Load, Mark, Sql
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.threads import NamedThread
from nodes.log import STALL_RETRY_S, DiskError, DiskFull
from nodes.sql import SqlRefused, run_query
from nodes.state_file import (
    Invalidated,
    NoMemory,
    StateFile,
    explain,
    first_line,
    is_corruption,
    is_refused,
    set_aside,
)
from nodes.state_fold import FoldWriter
from nodes.state_queries import CLIENTS, Reader
from nodes.state_retention import Retention

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from duckdb import DuckDBPyConnection

    from bus_kv.core.machine import Query
    from nodes.state_file import GoesOn, ShardTable
    from nodes.state_queries import PointQuery

    OnEvent: TypeAlias = Callable[[Any], object]
    OnFailure: TypeAlias = Callable[[DiskError], object]

__all__ = ["StateStore", "set_aside"]

QUERIES_MAX = 4096
"""Queries that wait for the reader; past it they are refused at once."""
SQL_THREADS = 2
SQL_QUERIES_MAX = 16
FOLDS_MAX = 1 << 16
"""A machine has one fold per shard under way, so there is always room for the next."""
RETENTION_INTERVAL_S = 60.0
IDLE_S = 2.0
"""How often the folding thread looks after the file when nothing is folded."""
CHECKPOINT_PAUSE = 20
"""A checkpoint is made again after so many times its own duration: it takes a twentieth of the time, and there is never
much to replay after a crash."""
CHECKPOINT_REST_S = 10.0
"""Once nothing was folded for so long it costs nobody anything, and is not put off any more."""
CHECKPOINT_BYTES_MIN = 1 << 20
"""Less than this, of the file's log or of operations, is replayed at once."""
CHECKPOINT_MEMORY_SHARE = 8
"""Rows that are not checkpointed yet are in memory: their log is checkpointed at this part of it."""
CHECKPOINT_RETRY_S = 1.0
FREED_AT_ONCE = 256
"""Operations of a fold that is done; it takes some 50 us."""
FREEING_PAUSE_S = 0.0005
INTERRUPT_INTERVAL_S = 0.05
ATTACH_TRIES_MAX = 150
"""Every STALL_RETRY_S: longer than a user's query may run and hold on to the file."""

log = logging.getLogger("bus_kv.state")
Item = TypeVar("Item")


class _Inbox(Generic[Item]):
    """A bounded queue between threads that can be closed."""

    def __init__(self, items_max: int) -> None:
        self._items: deque[Item] = deque()
        self._items_max = items_max
        self._filled = threading.Condition()
        self.is_closed = False

    def offer(self, item: Item) -> bool:
        with self._filled:
            if self.is_closed or len(self._items) >= self._items_max:
                return False
            self._items.append(item)
            self._filled.notify()
            return True

    def take(self, timeout_s: float | None = None) -> Item | None:
        """The next item; None when there is none in time, or ever."""
        with self._filled:
            self._filled.wait_for(lambda: self._items or self.is_closed, timeout_s)
            return self._items.popleft() if self._items and not self.is_closed else None

    def items(self) -> list[Item]:
        """Those that wait."""
        with self._filled:
            return [*self._items]

    def close(self) -> None:
        with self._filled:
            self.is_closed = True
            self._items.clear()
            self._filled.notify_all()


class StateStore:
    """One thread may use it. Opening raises DiskError when the file is damaged, of a newer format or of another log."""

    def __init__(
        self, directory: Path, incarnation: str, *, memory_mb: int = 768, oplog_keep_s: float,
        oplog_keep_bytes: int, dedup_window_ms: int, clients_max: int = 100_000,
        checkpoint_wal_bytes: int = 64 << 20, checkpoint_interval_s: float = 300.0,
        goes_on: GoesOn | None = None,
    ) -> None:  # fmt: skip
        self._file = StateFile(directory, incarnation, memory_mb, goes_on)
        self.path = self._file.path
        self._clock = Clock()
        self._retention = Retention(oplog_keep_s, oplog_keep_bytes, dedup_window_ms, clients_max)
        self._checkpoint_wal_bytes = min(
            checkpoint_wal_bytes, (memory_mb << 20) // CHECKPOINT_MEMORY_SHARE
        )  # fmt: skip
        self._checkpoint_interval_ns = int(checkpoint_interval_s * SECOND_NS)
        self._checkpoint_due_ns = self._clock.now_ns() + self._checkpoint_interval_ns
        self._checkpoint_not_before_ns = 0
        self._checkpoint_again_ns = 0
        self._rests_ns = 0
        """When nothing will have been folded for so long that nothing more is expected."""
        self._folded_bytes = 0
        """Of operations, since the last checkpoint."""
        self._retention_due_ns = 0
        self._writer = FoldWriter(self._file.cursor(), self._file.expect)
        self._reader = Reader(self._file)
        self._folds: _Inbox[Fold | Load] = _Inbox(FOLDS_MAX)
        self._queries: _Inbox[PointQuery] = _Inbox(QUERIES_MAX)
        self._sqls: _Inbox[tuple[int, Sql]] = _Inbox(SQL_QUERIES_MAX)
        self._sql_cursors: set[DuckDBPyConnection] = set()
        self._closing = threading.Event()
        self._on_event: OnEvent
        self._on_failure: OnFailure
        works = [self._fold_all, self._answer_queries, *[self._answer_sqls] * SQL_THREADS]
        self._threads = [
            NamedThread(target=work, name=f"state{work.__name__}", daemon=True) for work in works
        ]

    # ---- what was there ----

    def marks(self) -> dict[str, Mark]:
        """Up to where each shard is on disk."""
        return dict(self._file.known)

    def clients(self, shard: str) -> list[tuple[str, int]]:
        """Greatest request number that is known of each client. Raises DiskError."""
        try:
            with self._file.cursor() as cursor:
                return cursor.execute(CLIENTS, [shard, shard]).fetchall()
        except duckdb.Error as error:
            raise explain(self.path, error) from None

    def cursor(self) -> DuckDBPyConnection:
        """A connection of its own for one thread, to query the views. Raises duckdb.Error."""
        self._file.prepare_views()
        return self._file.cursor()

    # ---- work for the threads ----

    def start(self, on_event: OnEvent, on_failure: OnFailure) -> None:
        """Begin to work. Both callbacks are called from the threads."""
        self._on_event, self._on_failure = on_event, on_failure
        for thread in self._threads:
            thread.start()

    def submit(self, effect: Fold | Load | Query) -> None:
        """Never blocks; the answer is an event, which for a fold comes when it is on disk."""
        if isinstance(effect, Fold | Load):
            taken = self._folds.offer(effect)
        elif isinstance(effect, Sql):
            taken = self._sqls.offer((self._clock.now_ns(), effect))
        else:
            taken = self._queries.offer(effect)
        if not taken and not self._closing.is_set():
            self._on_event(Answered(effect.ticket, failure="the state on disk is overloaded"))

    def close(self, deadline_s: float = 5.0) -> None:
        """Finish the fold under way, checkpoint, let go of the file. What else waits is dropped."""
        deadline_ns = self._clock.now_ns() + int(deadline_s * SECOND_NS)
        self._closing.set()
        for inbox in (self._folds, self._queries, self._sqls):
            inbox.close()
        while any(thread.is_alive() for thread in self._threads):
            if self._clock.now_ns() >= deadline_ns:
                return
            self._interrupt_queries()
            for thread in self._threads:
                thread.join(INTERRUPT_INTERVAL_S)
        self._reader.close()
        self._writer.close()
        self._file.close()

    def _interrupt_queries(self) -> None:
        """To be said again and again: it is forgotten if it meets a cursor between two statements."""
        self._reader.interrupt()
        for cursor in [*self._sql_cursors]:
            with contextlib.suppress(duckdb.Error):
                cursor.interrupt()

    # ---- queries ----

    def _answer_queries(self) -> None:
        while (query := self._queries.take()) is not None:
            self._on_event(self._answer(query, self._reader.answer))

    def _answer_sqls(self) -> None:
        while (item := self._sqls.take()) is not None:
            offered_ns, query = item
            if self._clock.now_ns() - offered_ns > query.timeout_ms * MILLISECOND_NS:
                # Whoever asked has been told that it took too long.
                busy = "SQL_FAILED: too many queries at once; send it again later"
                self._on_event(Answered(query.ticket, failure=busy))
                continue
            self._on_event(self._answer(query, self._run_sql))

    def _answer(self, query: Any, read: Callable[[Any], list[Any]]) -> Answered:
        try:
            return Answered(query.ticket, read(query))
        except SqlRefused as refused:
            return Answered(query.ticket, failure=f"{refused.code}: {refused.message}")
        except duckdb.Error as error:
            if is_corruption(error):
                self._on_failure(explain(self.path, error))
            reason = first_line(error)
        except Exception as error:  # whatever it is, nobody may wait for this thread in vain
            log.exception("a query of the state failed")
            reason = repr(error)
        return Answered(query.ticket, failure=f"the state on disk cannot answer: {reason}")

    def _run_sql(self, query: Sql) -> list[Any]:
        cursor = self.cursor()
        self._sql_cursors.add(cursor)
        try:
            return run_query(cursor, query)
        except SqlRefused as refused:
            cause = refused.__context__
            if isinstance(cause, duckdb.Error) and is_corruption(cause):
                raise cause from None
            raise
        finally:
            self._sql_cursors.discard(cursor)
            cursor.close()

    # ---- folds ----

    def _fold_all(self) -> None:
        try:
            while not self._closing.is_set():
                fold = self._folds.take(IDLE_S)
                if fold is not None:
                    failure = self._write_until_done(fold)
                    self._rests_ns = self._clock.now_ns() + int(CHECKPOINT_REST_S * SECOND_NS)
                    self._on_event(Answered(fold.ticket, failure=failure))
                    self._let_go(fold)
                self._look_after()
            if self._file.wal_bytes():
                self._checkpoint()
        except _Closed:
            log.warning("closed while the state %s could not be written", self.path)
        except DiskError as error:
            self._on_failure(error)
        except Exception as error:  # whatever it is, nobody may wait for this thread in vain
            log.exception("the state failed")
            self._on_failure(DiskError(f"the state {self.path} failed: {error!r}"))

    def _write_until_done(self, effect: Fold | Load) -> str | None:
        """None; or why a chunk of a snapshot cannot be written: another node has sent it, so it spoils nothing here."""
        told, done, failure = "", False, None
        while not done:
            try:
                self._write(effect)
                done = True
            except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
                if not (isinstance(effect, Load) and effect.table):
                    raise
                failure, done = first_line(error), True
            except duckdb.Error as error:
                if isinstance(effect, Load) and effect.table and is_refused(error):
                    failure = first_line(error)
                    break
                reason = self._overcome(error)
                if reason and reason != told:
                    told = reason
                    self._on_event(FoldStalled(reason))
                if reason:
                    self._wait()
        if told:
            self._on_event(FoldStalled(""))
        if failure is not None:
            log.warning(
                "a chunk of a snapshot of shard %s is not usable: %s", effect.shard, failure
            )
        return failure

    def _write(self, effect: Fold | Load) -> None:
        known = self._file.known
        if isinstance(effect, Fold):
            if known.get(effect.shard) == effect.mark:
                return  # what failed was durable before
            self._folded_bytes += self._writer.write(effect, self._table(effect))
            self._file.known = {**known, effect.shard: effect.mark}
        else:
            self._writer.load(effect, self._table(effect))
            mark = Mark() if not effect.table and effect.mark is None else effect.mark
            if mark is not None:
                self._file.known = {**known, effect.shard: mark}

    def _let_go(self, effect: Fold | Load) -> None:
        """Bit by bit, with pauses: freeing all of it in one go would keep the interpreter from as many turns."""
        freed = 0
        while isinstance(effect, Fold) and effect.batches and not self._closing.is_set():
            freed += len(effect.batches.pop().batch)
            if freed >= FREED_AT_ONCE:
                freed = 0
                time.sleep(FREEING_PAUSE_S)

    def _table(self, fold: Fold | Load) -> ShardTable:
        """Of a shard; new ones are made for all that wait, as they are not left to the replay of the file's log."""
        tables = self._file.tables
        if fold.shard not in tables:
            wanted = {effect.shard: effect.keyspace for effect in [fold, *self._folds.items()]}
            self._file.add_shards({s: k for s, k in wanted.items() if s not in tables})
            self._checkpoint()
        return self._file.tables[fold.shard]

    def _overcome(self, error: duckdb.Error) -> str:
        """Make it possible to try again; the reason if there has to be more space for it. Raises DiskError."""
        problem = explain(self.path, error)
        if isinstance(problem, NoMemory):
            self._checkpoint()  # what is in the file needs not be in memory
            return str(problem)
        if isinstance(problem, DiskFull):
            return str(problem)
        if isinstance(problem, Invalidated):
            log.warning("%s; reading it anew", problem)
            self._attach_again()
            return ""
        raise problem

    def _wait(self) -> None:
        if self._closing.wait(STALL_RETRY_S):
            raise _Closed

    def _attach_again(self) -> None:
        """Read the file anew. Queries that still run on the former attachment end by their own deadlines."""
        for _ in range(ATTACH_TRIES_MAX):
            try:
                return self._file.attach_again()
            except duckdb.ResourceInUseException:
                self._wait()
            except (duckdb.Error, OSError) as error:
                raise explain(self.path, error) from None
        raise DiskError(f"{self.path} is held by a query that does not end; start the node again")

    # ---- upkeep ----

    def _look_after(self) -> None:
        now_ns = self._clock.now_ns()
        if now_ns >= self._retention_due_ns:
            self._retention_due_ns = now_ns + int(RETENTION_INTERVAL_S * SECOND_NS)
            self._keep_only()
        wal_bytes = self._file.wal_bytes()
        # What was appended in bulk is in the file, and next to nothing of it in the file's log.
        much = max(wal_bytes, self._folded_bytes) >= CHECKPOINT_BYTES_MIN
        paused = now_ns >= min(self._checkpoint_again_ns, self._rests_ns)
        full = wal_bytes >= self._checkpoint_wal_bytes
        due = full or (much and paused) or now_ns >= self._checkpoint_due_ns
        if due and wal_bytes and now_ns >= self._checkpoint_not_before_ns:
            self._checkpoint()

    def _keep_only(self) -> None:
        try:
            self._file.do(self._retention.apply)
        except duckdb.Error as error:
            log.warning("old operations are not taken out for now: %s", first_line(error))
            self._overcome(error)

    def _checkpoint(self) -> None:
        """Move the write-ahead log into the file. After a failure it is tried again later; nothing is lost."""
        began_ns = self._clock.now_ns()
        wal_bytes = self._file.wal_bytes()
        try:
            self._file.checkpoint()
        except duckdb.TransactionException as error:
            log.info("checkpoint put off: %s", first_line(error))
        except OSError as error:
            problem = explain(self.path, error)
            if not isinstance(problem, DiskFull):
                raise problem from None
            log.warning("checkpoint put off: %s", problem)
        except duckdb.Error as error:
            if is_corruption(error):
                raise explain(self.path, error) from None
            log.warning("checkpoint of %s failed: %s", self.path, first_line(error))
            self._attach_again()
        else:
            ended_ns = self._clock.now_ns()
            self._folded_bytes = 0
            took_ms = (ended_ns - began_ns) // MILLISECOND_NS
            log.info("checkpoint of %d bytes took %d ms; folds waited", wal_bytes, took_ms)
            self._checkpoint_due_ns = ended_ns + self._checkpoint_interval_ns
            self._checkpoint_again_ns = ended_ns + CHECKPOINT_PAUSE * (ended_ns - began_ns)
            marks = self._file.known
            self._on_event(Checkpointed({shard: mark.last for shard, mark in marks.items()}))
            return
        self._checkpoint_not_before_ns = self._clock.now_ns() + int(CHECKPOINT_RETRY_S * SECOND_NS)


class _Closed(Exception):
    """The store is being closed: what stalls is given up."""
