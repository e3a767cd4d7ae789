"""The file of a node's state: one DuckDB instance in memory with `state.duckdb` attached as `state`.

The instance itself holds nothing but views, so that a failed write of the file spoils the attachment and not the
instance: detaching and attaching again replays the file's own write-ahead log. After the first attachment external
access is off and the configuration is locked; only this file can still be attached. A new file is made complete under
another name and renamed, so a file of this name always says whose it is.

A checkpoint is made by `checkpoint` alone, which makes it possible to undo one that is cut short (state_undo.py).
DuckDB replays its write-ahead log row by row, which takes it many seconds over a large table. Where the node's own log
goes on from the last checkpoint, the file starts from there and that log is thrown away.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import duckdb

from bus_kv.core.machine import Mark
from nodes.log import DiskError, DiskFull, sync_directory
from nodes.state_schema import (
    KV_COLUMNS,
    KV_OF_SHARD,
    NO_KV,
    OPLOG_VIEW,
    SAMPLE_HASH,
    SCHEMA,
)  # fmt: skip
from nodes.state_snapshot import clear_shard
from nodes.state_undo import (
    BLOCK_BYTES,
    UNDO_SUFFIX,
    UNFINISHED_SUFFIX,
    Undo,
    forget,
    undo_unfinished,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import TypeAlias

    from duckdb import DuckDBPyConnection

    GoesOn: TypeAlias = Callable[[dict[str, Mark]], bool]

FORMAT_VERSION = 3
STATE_NAME = "state.duckdb"
TEMPORARY_NAME = "state.tmp"
TEMPORARY_SIZE_MAX = "4GB"
"""What queries may spill to disk; the disk is needed for the log."""
PEEK_NAME = "state.peek"
ROW_GROUP_ROWS = 30_720
"""A quarter of DuckDB's default; it has to be a multiple of 2048. Whole row groups of a fold go straight to the file;
what is less than one goes through the write-ahead log, and a checkpoint writes it again with its neighbours."""
WAL_SUFFIXES = (".wal", ".wal.checkpoint", ".wal.recovery")
SUFFIXES = ("", *WAL_SUFFIXES, UNDO_SUFFIX)


class NoMemory(DiskFull):
    """DuckDB has no memory left for what it was to do."""


class Invalidated(DiskError):
    """DuckDB has given this attachment of the file up; the file itself may be whole."""


@dataclass(frozen=True, slots=True)
class ShardTable:
    number: int
    keyspace: str

    @property
    def name(self) -> str:
        """Of its kv table; a shard's id is never part of a statement."""
        return f"kv_{self.number}"


class StateFile:
    """Cursors may be asked for by any thread; everything else is for one thread."""

    def __init__(
        self, directory: Path, incarnation: str, memory_mb: int, goes_on: GoesOn | None = None
    ) -> None:
        """`goes_on` tells whether the node's log goes on from these marks."""
        self.path = directory / STATE_NAME
        self._guard = threading.Lock()
        self.tables: dict[str, ShardTable] = {}
        self._viewed: dict[str, ShardTable] | None = None
        """Those that the views show."""
        self.known: dict[str, Mark] = {}
        """Marks of what was told to be folded."""
        self.longest: dict[str, int] = {}
        """Per shard, a length that none of its values exceeds."""
        self.is_hashed = False
        """The oplog's key_hash is what this version of DuckDB computes."""
        try:
            _clear(directory)
            if not self.path.exists():
                _create(directory, incarnation)
            else:
                undo_unfinished(self.path)
                if goes_on is not None and _last_checkpoint_suffices(directory, goes_on):
                    _drop_wal(directory)
            self._instance = self._open(directory, memory_mb)
            self._undo = Undo(self.path)
        except (duckdb.Error, OSError) as error:
            raise explain(self.path, error) from None
        try:
            self._check(incarnation)
            self.tables, self.known = self._read_tables(), self.marks()
            self._drop_unfinished()
            self.longest = {shard: self._longest(table) for shard, table in self.tables.items()}
            self.prepare_views()
        except duckdb.Error as error:
            self.close()
            raise explain(self.path, error) from None
        except DiskError:
            self.close()
            raise

    def _open(self, directory: Path, memory_mb: int) -> DuckDBPyConnection:
        instance = duckdb.connect(
            ":memory:",
            config={
                # Folds and checkpoints are never urgent: half of the machine is for requests.
                "threads": max((os.cpu_count() or 1) // 2, 1),
                "memory_limit": f"{memory_mb}MB",
                "temp_directory": str(directory / TEMPORARY_NAME),
                "max_temp_directory_size": TEMPORARY_SIZE_MAX,
                "checkpoint_threshold": "1TB",
                "preserve_insertion_order": False,
                "autoload_known_extensions": False,
                "autoinstall_known_extensions": False,
                "allow_community_extensions": False,
                "python_enable_replacements": False,
            },
        )
        try:
            paths = [str(self.path), *(f"{self.path}{suffix}" for suffix in WAL_SUFFIXES)]
            instance.execute(f"SET allowed_paths = [{', '.join(map(_quoted, paths))}]")
            instance.execute("PRAGMA disable_checkpoint_on_shutdown")
            instance.execute(self._attach_statement)
            instance.execute("SET enable_external_access = false")
            instance.execute("SET lock_configuration = true")
        except duckdb.Error:
            instance.close()
            raise
        return instance

    @property
    def _attach_statement(self) -> str:
        options = f"ROW_GROUP_SIZE {ROW_GROUP_ROWS}, BLOCK_SIZE {BLOCK_BYTES}"
        return f"ATTACH {_quoted(str(self.path))} AS state ({options})"

    def _check(self, incarnation: str) -> None:
        meta = dict(self._instance.execute("SELECT name, value FROM state.meta").fetchall())
        version = meta.get("format_version", "")
        if not version.isdigit():
            raise damaged(self.path, "it does not say its format")
        if int(version) != FORMAT_VERSION:
            age = "newer" if int(version) > FORMAT_VERSION else "older"
            raise DiskError(
                f"{self.path} has format {version}, {age} than the {FORMAT_VERSION} this release "
                "reads; start the release that wrote it, or start with --rebuild"
            )
        if meta.get("incarnation") != incarnation:
            raise DiskError(
                f"{self.path} belongs to another log than the one beside it; start with --rebuild "
                "to make it anew"
            )
        sample = self._instance.execute(f"SELECT {SAMPLE_HASH}").fetchall()[0][0]
        self.is_hashed = meta.get("key_hash") == str(sample)
        if not self.is_hashed and "key_hash" in meta:
            # From now on the file has hashes of both, so the other version cannot rely on its own either.
            self.do(lambda db: db.execute("DELETE FROM state.meta WHERE name = 'key_hash'"))

    def _drop_unfinished(self) -> None:
        """A snapshot that did not come to its end is nothing."""
        for shard, mark in self.known.items():
            if not mark.last:
                table = self.tables[shard]
                self.do(partial(clear_shard, shard=shard, table=table))

    def _read_tables(self) -> dict[str, ShardTable]:
        rows = self._instance.execute("SELECT shard, number, keyspace FROM state.marks").fetchall()
        return {shard: ShardTable(number, keyspace) for shard, number, keyspace in rows}

    def _longest(self, table: ShardTable) -> int:
        query = f"SELECT coalesce(max(value_bytes), 0) FROM state.{table.name}"
        return int(self._instance.execute(query).fetchall()[0][0])

    def expect(self, shard: str, longest: int) -> None:
        """Values up to this length are about to be written."""
        self.longest[shard] = max(self.longest.get(shard, 0), longest)

    def cursor(self) -> DuckDBPyConnection:
        """A connection of its own to the instance, for one thread."""
        with self._guard:
            return self._instance.cursor()

    def marks(self) -> dict[str, Mark]:
        return _marks(self._instance)

    def add_shards(self, keyspaces: Mapping[str, str]) -> None:
        """Make room for shards, each of a keyspace: their tables, and marks that say that nothing is folded."""
        first = max([table.number for table in self.tables.values()], default=0) + 1
        added = {
            shard: ShardTable(number, keyspace)
            for number, (shard, keyspace) in enumerate(keyspaces.items(), first)
        }

        def create(db: DuckDBPyConnection) -> None:
            for shard, table in added.items():
                db.execute(f"CREATE TABLE state.{table.name} ({KV_COLUMNS})")
                mark = "INSERT INTO state.marks VALUES (?, ?, ?, 0, 0, 0, 0, 0, '[]')"
                db.execute(mark, [shard, table.number, table.keyspace])

        transaction(self._instance, create)
        self.tables = {**self.tables, **added}

    def prepare_views(self) -> None:
        """Have the views show every shard; by any thread, before it queries them. Raises duckdb.Error."""
        with self._guard:
            if self._viewed is self.tables:
                return
            tables, parts = self.tables, [NO_KV]
            parts += [
                KV_OF_SHARD.format(
                    keyspace=_quoted(table.keyspace), shard=_quoted(shard), table=table.name
                )
                for shard, table in tables.items()
            ]
            query = " UNION ALL ".join(parts)
            with self._instance.cursor() as cursor:
                cursor.execute(f"CREATE OR REPLACE VIEW memory.main.kv AS {query}")
                cursor.execute(OPLOG_VIEW)
            self._viewed = tables

    def wal_bytes(self) -> int:
        try:
            return os.stat(f"{self.path}.wal").st_size
        except FileNotFoundError:
            return 0

    def checkpoint(self) -> None:
        """Raises duckdb.Error; or OSError when it has not begun."""
        self._undo.keep(self._instance)
        self._instance.execute("CHECKPOINT state")
        self._undo.forget()

    def do(self, work: Callable[[DuckDBPyConnection], object]) -> None:
        """Do it in one transaction. Raises duckdb.Error."""
        transaction(self._instance, work)

    def attach_again(self) -> None:
        """Read the file anew after the attachment was invalidated.

        Raises OSError, and duckdb.Error while a query still has it.
        """
        attached = "SELECT count(*) FROM duckdb_databases() WHERE database_name = 'state'"
        if self._instance.execute(attached).fetchall()[0][0]:
            self._instance.execute("DETACH state")
        undo_unfinished(self.path)
        self._instance.execute(self._attach_statement)
        self.tables = self._read_tables()
        self.prepare_views()
        self._recall()

    def _recall(self) -> None:
        """Take the marks on disk for known: what failed may have been durable before. Raises DiskError."""
        marks = self.marks()
        for shard, mark in self.known.items():
            if shard not in marks or marks[shard].last < mark.last:
                raise damaged(self.path, f"shard {shard} has lost what was folded")
        self.known = marks

    def close(self) -> None:
        with self._guard:
            self._instance.close()
            self._undo.close()


def _clear(directory: Path) -> None:
    """Take away what a killed process left unfinished. Raises OSError."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / TEMPORARY_NAME, ignore_errors=True)
    (directory / PEEK_NAME).unlink(missing_ok=True)
    (directory / f"{STATE_NAME}{UNFINISHED_SUFFIX}").unlink(missing_ok=True)
    for suffix in ("", *WAL_SUFFIXES):
        (directory / f"{STATE_NAME}.new{suffix}").unlink(missing_ok=True)


def _marks(db: DuckDBPyConnection) -> dict[str, Mark]:
    rows = db.execute(
        "SELECT shard, epoch, last, time_ms, keys, data_bytes, lineage FROM state.marks "
        "ORDER BY number"
    ).fetchall()
    return {
        shard: Mark(epoch, last, time_ms, keys, size, tuple(map(tuple, json.loads(lineage))))
        for shard, epoch, last, time_ms, keys, size, lineage in rows
    }


def _last_checkpoint_suffices(directory: Path, goes_on: GoesOn) -> bool:
    """Whether the file without its write-ahead log, and the node's log behind it, have everything. Raises OSError."""
    if not any((directory / f"{STATE_NAME}{suffix}").exists() for suffix in WAL_SUFFIXES):
        return False
    # Under another name no write-ahead log belongs to the file.
    peek = directory / PEEK_NAME
    os.link(directory / STATE_NAME, peek)
    try:
        with duckdb.connect(":memory:") as db:
            db.execute(f"ATTACH {_quoted(str(peek))} AS state (READ_ONLY)")
            version = "SELECT value FROM state.meta WHERE name = 'format_version'"
            if db.execute(version).fetchall() != [(str(FORMAT_VERSION),)]:
                return False
            marks = _marks(db)
    except duckdb.Error:
        return False  # what is wrong will be told when the file is opened
    finally:
        peek.unlink()
    return goes_on(marks)


def _drop_wal(directory: Path) -> None:
    """The log of commits last: without it the others mean nothing. Raises OSError."""
    for suffix in reversed(WAL_SUFFIXES):
        (directory / f"{STATE_NAME}{suffix}").unlink(missing_ok=True)
    sync_directory(directory)


def _create(directory: Path, incarnation: str) -> None:
    path = directory / STATE_NAME
    for suffix in WAL_SUFFIXES:
        if (directory / f"{STATE_NAME}{suffix}").exists():
            raise damaged(path, f"its {suffix[1:]} file is there, but not the file itself")
    forget(path)
    new = directory / f"{STATE_NAME}.new"
    with duckdb.connect(":memory:") as db:
        db.execute(f"ATTACH {_quoted(str(new))} AS state")
        db.execute(SCHEMA)
        db.execute(
            "INSERT INTO state.meta VALUES ('format_version', ?), ('incarnation', ?), "
            f"('key_hash', {SAMPLE_HASH})", [str(FORMAT_VERSION), incarnation],
        )  # fmt: skip
        db.execute("CHECKPOINT state")
        db.execute("DETACH state")
    new.rename(path)
    sync_directory(directory)


def set_aside(directory: Path) -> Path | None:
    """Rename the state's files, so that a new state is made: to `state.duckdb.<n>.damaged`, which is returned.

    None when there is none. Raises DiskError.
    """
    names = [f"{STATE_NAME}{suffix}" for suffix in SUFFIXES]
    present = [name for name in names if (directory / name).exists()]
    if not present:
        return None
    number = 1
    while [*directory.glob(f"{STATE_NAME}.{number}.damaged*")]:
        number += 1
    aside = directory / f"{STATE_NAME}.{number}.damaged"
    try:
        for name in present:
            (directory / name).rename(f"{aside}{name.removeprefix(STATE_NAME)}")
        sync_directory(directory)
    except OSError as error:
        raise explain(directory / STATE_NAME, error) from None
    return aside


def transaction(db: DuckDBPyConnection, work: Callable[[DuckDBPyConnection], object]) -> None:
    """Do it as a whole or not at all."""
    db.execute("BEGIN TRANSACTION")
    try:
        work(db)
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(duckdb.Error):
            db.execute("ROLLBACK")
        raise


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def damaged(path: Path, reason: str) -> DiskError:
    return DiskError(
        f"the state {path} is damaged ({reason}); start with --rebuild to make it anew from the "
        "log and the other nodes"
    )


_CORRUPT = ("Corrupt database file", "computed checksum", "Could not read enough bytes")
_NO_MEMORY = ("failed to pin block", "failed to allocate data")
"""What a commit says that had no memory: the error is not one of memory then."""
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


def explain(path: Path, error: Exception) -> DiskError:
    """What an error of DuckDB or the file system means for the one who runs the node."""
    text = first_line(error)
    if any(sign in str(error) for sign in _FULL):
        return DiskFull(f"no space left for {path}")
    if isinstance(error, duckdb.OutOfMemoryException) or any(n in text for n in _NO_MEMORY):
        return NoMemory(f"not enough memory to write {path}: {text}")
    if isinstance(error, duckdb.FatalException) or "has been invalidated" in str(error):
        return Invalidated(f"the state {path} failed: {text}")
    if isinstance(error, OSError):
        return DiskError(f"{path} cannot be used: {error.strerror or error}")
    if "Could not set lock" in text:
        return DiskError(f"{path} is in use by another process; stop it")
    return damaged(path, text)


def is_corruption(error: duckdb.Error) -> bool:
    """Whether bytes on disk are not those that were written."""
    return any(sign in str(error) for sign in _CORRUPT)


def is_refused(error: duckdb.Error) -> bool:
    """Whether the rows themselves cannot be written: they break a constraint, or are of another shape."""
    kinds = (
        duckdb.ConstraintException, duckdb.ConversionException, duckdb.BinderException,
        duckdb.InvalidInputException, duckdb.OutOfRangeException, duckdb.TypeMismatchException,
    )  # fmt: skip
    return isinstance(error, kinds) and not is_corruption(error)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))
