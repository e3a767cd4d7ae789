"""The replicated log on disk: SQLite in WAL mode, every commit fsynced (the only module that imports sqlite3).

One row per entry; one row per replica for what it has promised. Appends are handed to a thread that commits all that
has gathered in one transaction: while one fsync is under way the next group forms. A full disk stalls the thread, which
tries again with the same rows until there is space; any other failure of the disk is fatal, because after a failed
fsync nothing is known about what reached it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import sqlite3
import threading
import zlib
from collections import deque
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import (
    Answered,
    Append,
    AppendCompleted,
    AppendStalled,
    CutRow,
    CutsRead,
    EntryRow,
    LogRead,
    ReplicaRow,
    Trim,
)  # fmt: skip
from bus_kv.protocol.sizes import ENTRY_BYTES
from bus_kv.runtime.threads import NamedThread
from nodes.wal import cut_commits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

FORMAT_VERSION = 2
"""2: the shards of the map have a table of their own."""
LOG_NAME = "log.sqlite"
LOCK_NAME = "LOCK"
STALL_RETRY_S = 0.2
TRIM_BYTES, TRIM_ENTRIES = 256 << 10, 16
"""Entries are deleted when so much, or so many, were added: a deletion is a commit, and what is appended waits."""
TRIM_ENTRIES_MORE = 8
ONE_STATEMENT_ENTRIES_MAX = 100
"""A group of up to this many entries is one INSERT, a transaction by itself. Every call into SQLite lets go of the
interpreter and has to get it back from a busy event loop; one call does that once."""
CUTS_BYTES_MAX = 256 << 20
"""What was cut is kept until the shard's primary has written it down, but not more than this; the oldest goes first."""
CHECKPOINT_PAGES = 1024
"""WAL pages after which SQLite copies them into the database file; larger means rarer and longer stalls."""

_MAP_SHARDS = """
CREATE TABLE map_shards (shard TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID
"""
_SCHEMA = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE replicas (
    shard TEXT PRIMARY KEY, promised_epoch INTEGER NOT NULL, promised_token TEXT NOT NULL,
    opened_epoch INTEGER NOT NULL, record TEXT NOT NULL, base_seq INTEGER NOT NULL,
    checksum INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE entries (
    shard TEXT NOT NULL, last INTEGER NOT NULL, epoch INTEGER NOT NULL,
    checksum INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (shard, last)
) WITHOUT ROWID;
CREATE TABLE cuts (
    shard TEXT NOT NULL, last INTEGER NOT NULL, epoch INTEGER NOT NULL,
    checksum INTEGER NOT NULL, body BLOB NOT NULL, cut_epoch INTEGER NOT NULL
);
{_MAP_SHARDS};
"""
"""`cuts` keeps what was taken out of the log because the epoch `cut_epoch` began with another one, until the
primary has written down that it was rolled back."""


class DiskError(Exception):
    """The data directory cannot be used; the message names the file and says what to do."""


class DiskFull(DiskError):
    """No space left."""


class NodeLog:
    """The log of one node. Opening locks the data directory for this process (the lock dies with it)."""

    def __init__(self, directory: Path, node: str) -> None:
        self.path = directory / LOG_NAME
        self._directory = directory
        self._lock = _lock(directory)
        try:
            self._db = self._open()
            self.incarnation = self._identify(node)
        except sqlite3.Error as error:
            os.close(self._lock)
            raise _explain(self.path, error) from None
        except DiskError:
            os.close(self._lock)
            raise
        self._on_event: Callable[[Any], object] = lambda _: None
        self._on_failure: Callable[[DiskError], object] = lambda _: None
        self._queue: deque[Append] = deque()
        self._reads: deque[LogRead | CutsRead] = deque()
        self._trims: dict[str, int] = {}
        """Shard -> seq up to which its entries may go."""
        self._added = self._added_bytes = 0
        """Entries since some were deleted, while there are some to delete."""
        self._filled = threading.Condition()
        self._closing = False
        self._thread = NamedThread(target=self._work, name="log", daemon=True)

    def _open(self) -> sqlite3.Connection:
        # The thread is the only user after `start`; before it, the opening thread is.
        db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute("PRAGMA cache_size = -8192")
        # Some distributions build SQLite so that it overwrites what is deleted: as many pages again.
        db.execute("PRAGMA secure_delete = OFF")
        _, valid_frames, _ = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        if cut_commits(self.path.with_name(f"{LOG_NAME}-wal"), valid_frames) > 1:
            raise _damaged(self.path, "its write-ahead log has a bad frame before whole commits")
        return db

    def _identify(self, node: str) -> str:
        """Read or write who this directory belongs to."""
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if not tables:
            meta = {
                "format_version": str(FORMAT_VERSION), "node": node,
                "incarnation": secrets.token_hex(8),
            }  # fmt: skip
            statements = "".join(f"{s};" for s in _SCHEMA.split(";") if s.strip())
            values = ",".join(f"('{name}','{value}')" for name, value in meta.items())
            self._db.executescript(f"BEGIN;{statements}INSERT INTO meta VALUES {values};COMMIT;")
            sync_directory(self._directory)
            sync_directory(self._directory.absolute().parent)
            return meta["incarnation"]
        meta = dict(self._db.execute("SELECT name, value FROM meta").fetchall())
        if not meta.keys() >= {"format_version", "node", "incarnation"}:
            raise _damaged(self.path, "it does not say whose it is")
        if not meta["format_version"].isdigit():
            raise _damaged(self.path, "it does not say its format")
        version = int(meta["format_version"])
        if version > FORMAT_VERSION:
            raise DiskError(
                f"{self.path} has format {version}, newer than the {FORMAT_VERSION} this release "
                "reads; start the release that wrote it"
            )
        if meta["node"] != node:
            raise DiskError(
                f"{self._directory} belongs to node {meta['node']}, not {node}; "
                "use that --id or another --data"
            )
        if version < FORMAT_VERSION:
            self._upgrade(meta.get("map", "{}"))
        return meta["incarnation"]

    def _upgrade(self, map: str) -> None:
        """From format 1: the map was one row, which goes on as what is not about shards."""
        try:
            shards = json.loads(map).get("shards", {})
        except ValueError as error:
            raise _damaged(self.path, f"its map is not readable: {error}") from None
        self._db.execute("BEGIN")
        self._db.execute(_MAP_SHARDS)
        self._put_map(shards, head=None)
        version = [str(FORMAT_VERSION)]
        self._db.execute("UPDATE meta SET value = ? WHERE name = 'format_version'", version)
        self._db.execute("COMMIT")

    def next_run(self, now_ms: int) -> int:
        """The number of this life of the process: the time, but greater than any before, whatever the clock did."""
        try:
            row = self._db.execute("SELECT value FROM meta WHERE name = 'run'").fetchone()
            run = max(now_ms, int(row[0]) + 1 if row else 0)
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('run', ?)", [str(run)])
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None
        return run

    # ---- what was there ----

    def map(self) -> dict[str, Any] | None:
        """The newest shard map that the node has seen (R10)."""
        try:
            row = self._db.execute("SELECT value FROM meta WHERE name = 'map'").fetchone()
            shards = self._db.execute("SELECT shard, record FROM map_shards").fetchall()
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None
        if row is None:
            return None
        return {**json.loads(row[0]), "shards": {id: json.loads(record) for id, record in shards}}

    def replicas(self) -> list[ReplicaRow]:
        """Every replica that this node has promised anything for. Raises DiskError."""
        try:
            rows = self._db.execute("SELECT * FROM replicas ORDER BY shard").fetchall()
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None
        for *columns, checksum in rows:
            if _checksum(*columns) != checksum:
                raise _damaged(self.path, f"the row of replica {columns[0]} has a wrong checksum")
        return [
            ReplicaRow(shard, epoch, token, opened, json.loads(record), base)
            for shard, epoch, token, opened, record, base, _ in rows
        ]

    def has_cuts(self, shard: str) -> bool:
        """Whether there is something that was cut and not told yet. Raises DiskError."""
        query = "SELECT count(*) FROM (SELECT 1 FROM cuts WHERE shard = ? LIMIT 1)"
        try:
            return bool(self._db.execute(query, (shard,)).fetchone()[0])
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None

    def end(self, shard: str) -> int:
        """Last seq of the shard's log, 0 when it is empty. Raises DiskError."""
        query = "SELECT max(last) FROM entries WHERE shard = ?"
        try:
            return self._db.execute(query, (shard,)).fetchone()[0] or 0
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None

    def entries(self, shard: str, after: int = 0) -> Iterator[EntryRow]:
        """The shard's log behind seq `after`, in order. Raises DiskError when an entry is not as it was written."""
        query = (
            "SELECT last, epoch, checksum, body FROM entries WHERE shard = ? AND last > ? "
            "ORDER BY last"
        )
        try:
            for last, epoch, checksum, body in self._db.execute(query, (shard, after)):
                if _checksum(shard, last, epoch, body) != checksum:
                    raise _damaged(self.path, f"entry {last} of shard {shard} has a wrong checksum")
                yield EntryRow(shard, last, epoch, body)
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None

    # ---- appends ----

    def start(
        self, on_event: Callable[[Any], object], on_failure: Callable[[DiskError], object]
    ) -> None:
        """Begin to append. Both callbacks are called from the log's thread."""
        self._on_event, self._on_failure = on_event, on_failure
        self._thread.start()

    def append(self, append: Append) -> None:
        with self._filled:
            self._queue.append(append)
            self._filled.notify()

    def read(self, read: LogRead | CutsRead) -> None:
        """Answered once everything that was appended before is durable."""
        with self._filled:
            self._reads.append(read)
            self._filled.notify()

    def trim(self, trim: Trim) -> None:
        with self._filled:
            self._trims[trim.shard] = trim.last

    def close(self, deadline_s: float = 5.0) -> None:
        """Finish what was appended, then let go of the directory."""
        with self._filled:
            self._closing = True
            self._filled.notify()
        if self._thread.is_alive():
            self._thread.join(deadline_s)
        if not self._thread.is_alive():
            self._db.close()
            os.close(self._lock)

    def _work(self) -> object:
        while True:
            with self._filled:
                while not self._queue and not self._reads and not self._closing:
                    self._filled.wait()
                group, reads = [*self._queue], [*self._reads]
                self._queue.clear()
                self._reads.clear()
            if not group and not reads:
                return None
            try:
                if group:
                    self._commit_until_done(group)
                    self._on_event(AppendCompleted(group[-1].ticket))
                    self._trim_if_due(group)
                for read in reads:
                    self._on_event(self._answer(read))
            except DiskError as error:
                return self._on_failure(error)
            except Exception as error:  # whatever it is, nobody may wait for this thread in vain
                return self._on_failure(DiskError(f"the log {self.path} failed: {error!r}"))

    def _commit_until_done(self, group: list[Append]) -> None:
        while True:
            try:
                return self._commit(group)
            except DiskFull as error:
                self._on_event(AppendStalled(str(error)))
            with self._filled:
                if self._closing:
                    raise DiskError(f"{self.path}: closed while the disk was full")
                self._filled.wait(STALL_RETRY_S)

    def _trim_if_due(self, group: list[Append]) -> None:
        """Delete a few more entries than were added: soon none is left to delete, and no commit waits long for it."""
        if not self._trims:
            return
        rows = [row for append in group for row in append.entries if isinstance(row, EntryRow)]
        self._added += len(rows)
        self._added_bytes += sum([len(row.body) for row in rows])
        if self._added < TRIM_ENTRIES and self._added_bytes < TRIM_BYTES:
            return
        count = 2 * self._added + TRIM_ENTRIES_MORE
        self._added = self._added_bytes = 0
        for shard, last in [*self._trims.items()]:
            try:
                deleted = self._db.execute(
                    "DELETE FROM entries WHERE shard = ?1 AND last IN (SELECT last FROM entries "
                    "WHERE shard = ?1 AND last <= ?2 ORDER BY last LIMIT ?3)",
                    (shard, last, count),
                ).rowcount
            except sqlite3.Error as error:
                problem = _explain(self.path, error)
                if isinstance(problem, DiskFull):
                    return  # when there is space again
                raise problem from None
            if deleted < count and self._trims[shard] == last:
                del self._trims[shard]

    def _answer(self, read: LogRead | CutsRead) -> Answered:
        if isinstance(read, LogRead):
            return Answered(read.ticket, self._read(read))
        try:
            return Answered(read.ticket, self._read_cuts(read))
        except sqlite3.Error as error:
            problem = _explain(self.path, error)
            if isinstance(problem, DiskFull):
                return Answered(read.ticket, failure=str(problem))
            raise problem from None

    def _read_cuts(self, read: CutsRead) -> list[tuple[int, EntryRow]]:
        if read.told:
            forget = "DELETE FROM cuts WHERE shard = ? AND rowid <= ?"
            self._db.execute(forget, (read.shard, read.told))
        query = "SELECT rowid, last, epoch, checksum, body FROM cuts WHERE shard = ? ORDER BY rowid"
        room = read.bytes_max
        rows: list[tuple[int, EntryRow]] = []
        for rowid, last, epoch, checksum, body in self._db.execute(query, (read.shard,)):
            room -= len(body) + ENTRY_BYTES
            if rows and room < 0:
                break
            if _checksum(read.shard, last, epoch, body) != checksum:
                raise _damaged(self.path, f"entry {last} that was cut has a wrong checksum")
            rows.append((rowid, EntryRow(read.shard, last, epoch, body)))
        return rows

    def _read(self, read: LogRead) -> list[Any]:
        epoch, seq = read.after
        query = (
            "SELECT epoch, last FROM entries WHERE shard = ? AND last <= ? AND epoch <= ? "
            "ORDER BY last DESC LIMIT 1"
        )
        try:
            have = self._db.execute(query, (read.shard, seq, epoch)).fetchone()
        except sqlite3.Error as error:
            raise _explain(self.path, error) from None
        rows: list[EntryRow] = []
        room = read.bytes_max
        for row in self.entries(read.shard, seq if have else 0):
            room -= len(row.body) + ENTRY_BYTES
            if rows and room < 0:
                break
            rows.append(row)
        return [have, rows]

    def _commit(self, group: list[Append]) -> None:
        rows = [row for append in group for row in append.entries]
        replicas = [
            (*columns, _checksum(*columns))
            for append in group
            for columns in map(_columns, append.replicas)
        ]
        maps = [append.map for append in group if append.map is not None]
        if not (rows or replicas or maps):
            return  # somebody waits for what was appended before, and that is done
        plain = not (replicas or maps or any(isinstance(row, CutRow) for row in rows))
        try:
            if plain and len(rows) <= ONE_STATEMENT_ENTRIES_MAX:
                values = ",".join(["(?,?,?,?,?)"] * len(rows))
                columns = chain(*map(_entry_columns, rows))  # type: ignore[arg-type]  # no cut
                self._db.execute(f"INSERT INTO entries VALUES {values}", [*columns])
                return
            self._db.execute("BEGIN IMMEDIATE")
            for is_cut, run in groupby(rows, lambda row: isinstance(row, CutRow)):
                if is_cut:
                    self._cut(run)  # type: ignore[arg-type]
                else:
                    insert = "INSERT INTO entries VALUES (?,?,?,?,?)"
                    self._db.executemany(insert, map(_entry_columns, run))  # type: ignore[arg-type]
            self._db.executemany("INSERT OR REPLACE INTO replicas VALUES (?,?,?,?,?,?,?)", replicas)
            for change in maps:
                self._put_map(change["shards"], {**change, "shards": {}})
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise _explain(self.path, error) from None

    def _put_map(self, shards: dict[str, Any], head: dict[str, Any] | None) -> None:
        """Write records of shards, None for one that is gone, and the rest of the map."""
        gone = [(id,) for id, record in shards.items() if record is None]
        records = [(id, json.dumps(record)) for id, record in shards.items() if record is not None]
        self._db.executemany("DELETE FROM map_shards WHERE shard = ?", gone)
        self._db.executemany("INSERT OR REPLACE INTO map_shards VALUES (?, ?)", records)
        if head is not None:
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('map', ?)", (json.dumps(head),))

    def _cut(self, cuts: Iterable[CutRow]) -> None:
        for cut in cuts:
            kept = (cut.epoch, cut.shard, cut.last)
            if cut.keep:
                self._db.execute(
                    "INSERT INTO cuts SELECT shard, last, epoch, checksum, body, ? FROM entries "
                    "WHERE shard = ? AND last > ?", kept,
                )  # fmt: skip
            self._db.execute("DELETE FROM entries WHERE shard = ? AND last > ?", kept[1:])
        self._db.execute(
            "DELETE FROM cuts WHERE rowid IN (SELECT place FROM (SELECT rowid AS place, "
            "sum(length(body)) OVER (ORDER BY rowid DESC) AS size FROM cuts) WHERE size > ?)",
            (CUTS_BYTES_MAX,),
        )  # fmt: skip


def _entry_columns(row: EntryRow) -> tuple[str, int, int, int, bytes]:
    checksum = _checksum(row.shard, row.last, row.epoch, row.body)
    return (row.shard, row.last, row.epoch, checksum, row.body)


def _columns(row: ReplicaRow) -> tuple[str, int, str, int, str, int]:
    promise = (row.promised_epoch, row.promised_token)
    return (row.shard, *promise, row.opened_epoch, json.dumps(row.record), row.base_seq)


def _checksum(*columns: str | int | bytes) -> int:
    """CRC-32 of a row, its key included: a row in the wrong place is as wrong as a wrong byte."""
    checksum = 0
    for column in columns:
        data = column if isinstance(column, bytes) else f"{column}/".encode()
        checksum = zlib.crc32(data, checksum)
    return checksum


def _lock(directory: Path) -> int:
    """Take the data directory for this process; a lock of a killed process is gone with it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"data directory {directory} cannot be written: {reason}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise DiskError(f"{directory / LOCK_NAME} cannot be locked: {error.strerror}") from None
        raise DiskError(
            f"data directory {directory} is in use by another process; stop it or use another --data"
        ) from None
    return handle


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(path: Path, reason: str) -> DiskError:
    return DiskError(
        f"the log {path} is damaged ({reason}); restore the file from a backup, or move the data "
        "directory away and start the node with an empty one"
    )


def _explain(path: Path, error: Exception) -> DiskError:
    code = getattr(error, "sqlite_errorname", "")
    if code.startswith(("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")):
        return DiskFull(f"no space left for {path}")
    if code.startswith(("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_PERM")):
        return DiskError(f"the log {path} cannot be opened for writing: {error}")
    if code.startswith(("SQLITE_IOERR", "SQLITE_BUSY")):
        return DiskError(f"the log {path} cannot be written: {error} ({code})")
    return _damaged(path, str(error))
