"""Writing one fold: everything it carries, and the mark, in one transaction.

Rows reach DuckDB as Arrow tables over its C interface, and Python does as little for a row as it can, because it holds
the interpreter that the event loop needs as well: columns are built from whole lists, a piece at a time; what is the
same for a batch, or counts up in it, is one run of a column; the rest is SQL's to compute. The records are not built
at all: they are the operations that are the newest of their keys. Each source is registered once and hands out what is
current, as Python variables are out of reach of a locked instance.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from bus_kv.protocol.batch import APPLIED
from bus_kv.protocol.codec import encode_cbor
from bus_kv.protocol.entry import applied_count
from nodes.state_file import transaction
from nodes.state_schema import ROLLED_BACK, key_hash
from nodes.state_snapshot import clear_shard, largest_in_chunk, write_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from duckdb import DuckDBPyConnection

    from bus_kv.core.machine import Fold, Load, LoggedBatch, Mark
    from nodes.state_file import ShardTable

OPERATION_BYTES = 64
"""What an operation takes in the oplog beside its key and value."""
PIECE_ROWS = 4096
"""Operations whose columns are built at once: some 300 us, in which the event loop can do nothing."""
PIECE_PAUSE_S = 0.0005
"""After each, so that the loop's turns are not late by several pieces."""


def _run(value: Any) -> Any:
    return pa.run_end_encoded(pa.int32(), value)


_NEWEST = pa.schema({"seq": pa.int64()})
_DELETED = pa.schema({"key": pa.binary()})
_OPERATIONS = pa.schema(
    {
        "place": pa.int32(), "begin": _run(pa.int32()), "epoch": _run(pa.int64()),
        "first_seq": _run(pa.int64()), "time_ms": _run(pa.int64()), "op": pa.uint8(),
        "key": pa.binary(), "value": pa.binary(), "expires_at": pa.int64(),
        "client": _run(pa.string()), "first_number": _run(pa.uint64()),
        "request_index": _run(pa.uint32()), "outcome": pa.uint8(),
    }
)  # fmt: skip
"""`place` counts the rows of a piece; `begin`, `first_seq` and `first_number` are those of the run's first row."""
_RUNS = (
    pa.int32(), pa.int64(), pa.uint64(), pa.uint32(), pa.int64(), pa.int64(), pa.string()
)  # fmt: skip
"""begin, first_seq, first_number, request_index, epoch, time_ms, client."""
_PLACES = pa.array(range(2 * PIECE_ROWS), pa.int32())

_REQUESTS = pa.schema(
    {
        "client": pa.string(), "first": pa.uint64(), "last": pa.uint64(), "numbers": pa.binary(),
        "indexes": pa.binary(), "outcomes": pa.binary(), "epoch": pa.int64(),
        "first_seq": pa.int64(), "time_ms": pa.int64(),
    }
)  # fmt: skip

_SEQ = "first_seq + (place - begin)"
_LOGGED = f"""
epoch, {_SEQ}, time_ms, op, key, {key_hash("key")}, value, client,
first_number + (place - begin)::UBIGINT, request_index
"""
_UPSERT = f"""
INSERT INTO state.{{table}}
SELECT key, value, octet_length(value), epoch, {_SEQ}, expires_at FROM operations
WHERE {_SEQ} IN (SELECT seq FROM newest)
ON CONFLICT (key) DO UPDATE SET
    value = excluded.value, value_bytes = excluded.value_bytes, epoch = excluded.epoch,
    seq = excluded.seq, expires_at = excluded.expires_at
"""
_DELETE = "DELETE FROM state.{table} USING deleted WHERE {table}.key = deleted.key"
_LOG = f"INSERT INTO state.oplog SELECT ?, {_LOGGED}, outcome FROM operations"
_LOG_ROLLED_BACK = f"""
INSERT INTO state.oplog SELECT $shard, {_LOGGED}, {ROLLED_BACK} FROM rolled_back AS told
WHERE NOT EXISTS (
    SELECT 1 FROM state.oplog
    WHERE oplog.shard_number = $shard AND oplog.epoch = told.epoch AND oplog.seq = {_SEQ}
)
"""
"""Several replicas may have had it, and each tells it."""
_REMEMBER = "INSERT INTO state.requests SELECT ?, * FROM requests"
_MARK = """
UPDATE state.marks
SET epoch = ?, last = ?, time_ms = ?, keys = ?, data_bytes = ?, lineage = ? WHERE shard = ?
"""


class _Source:
    """What DuckDB reads as a table of its own: the rows that are current (the Arrow PyCapsule interface)."""

    def __init__(self, schema: Any) -> None:
        self._empty = schema.empty_table()
        self.rows = self._empty

    def clear(self) -> None:
        self.rows = self._empty

    def __arrow_c_schema__(self) -> Any:
        return self._empty.schema.__arrow_c_schema__()

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self.rows.__arrow_c_stream__(requested_schema)


class FoldWriter:
    """Writes folds over a cursor of its own."""

    def __init__(self, cursor: DuckDBPyConnection, expect: Callable[[str, int], None]) -> None:
        """`expect` is told, before values are written, of which shard and how long they are at most."""
        self._cursor, self._expect = cursor, expect
        self._sources = {
            "newest": _Source(_NEWEST), "deleted": _Source(_DELETED),
            "operations": _Source(_OPERATIONS), "requests": _Source(_REQUESTS),
            "rolled_back": _Source(_OPERATIONS),
        }  # fmt: skip
        for name, source in self._sources.items():
            cursor.register(name, source)

    def write(self, fold: Fold, table: ShardTable) -> int:
        """All of it or nothing; the bytes of its operations. Raises duckdb.Error."""
        live = [record for record in fold.records.values() if record is not None]
        gone: list[bytes] = []
        if len(live) < len(fold.records):
            gone = [key for key, record in fold.records.items() if record is None]
        rows = {
            "newest": _table(_NEWEST, [[record[2] for record in live]]),
            "deleted": _table(_DELETED, [gone]), "operations": _operations(fold.batches),
            "requests": _requests(fold.batches),
            "rolled_back": _operations(_each_once(fold.rolled_back)),
        }  # fmt: skip
        self._expect(fold.shard, _longest(rows["operations"]["value"]))
        for name, source in self._sources.items():
            source.rows = rows[name]
        try:
            transaction(self._cursor, lambda db: self._write(db, fold, table))
        finally:
            for source in self._sources.values():
                source.clear()
        return _bytes(rows["operations"])

    def _write(self, db: DuckDBPyConnection, fold: Fold, table: ShardTable) -> None:
        operations, mark = self._sources["operations"].rows, fold.mark
        if self._sources["rolled_back"].rows.num_rows:
            db.execute(_LOG_ROLLED_BACK, {"shard": table.number})
        if self._sources["newest"].rows.num_rows:
            written = db.execute(_UPSERT.format(table=table.name)).fetchall()[0][0]
            newest = self._sources["newest"].rows.num_rows
            assert written == newest, "F1: what is written are the newest of the operations"
        if self._sources["deleted"].rows.num_rows:
            db.execute(_DELETE.format(table=table.name))
        if operations.num_rows:
            part = [mark.last, mark.time_ms, _bytes(operations)]
            db.execute(_LOG, [table.number])
            db.execute("INSERT INTO state.oplog_parts VALUES (?, ?, ?, ?)", [table.number, *part])
        if self._sources["requests"].rows.num_rows:
            db.execute(_REMEMBER, [fold.shard])
        set_mark(db, fold.shard, mark)

    def load(self, load: Load, table: ShardTable) -> None:
        """Write a chunk of a snapshot, or begin or end it. Raises duckdb.Error."""

        if load.table:
            self._expect(load.shard, largest_in_chunk(load))
            return write_chunk(self._cursor, load, table)

        def write(db: DuckDBPyConnection) -> None:
            if load.mark is not None:
                set_mark(db, load.shard, load.mark)
            else:
                clear_shard(db, load.shard, table)

        return transaction(self._cursor, write)

    def close(self) -> None:
        for name in self._sources:
            self._cursor.unregister(name)
        self._cursor.close()


def _bytes(operations: Any) -> int:
    """What they take in the oplog."""
    data_bytes = operations["key"].nbytes + operations["value"].nbytes
    return int(data_bytes + OPERATION_BYTES * operations.num_rows)


def _longest(values: Any) -> int:
    return int(pc.max(pc.binary_length(values)).as_py() or 0)


def set_mark(db: DuckDBPyConnection, shard: str, mark: Mark) -> None:
    rest = [mark.keys, mark.data_bytes, json.dumps(mark.lineage), shard]
    db.execute(_MARK, [mark.epoch, mark.last, mark.time_ms, *rest])


def _each_once(batches: Iterable[LoggedBatch]) -> list[LoggedBatch]:
    return [*{(logged.epoch, logged.first): logged for logged in batches}.values()]


def _operations(batches: Iterable[LoggedBatch]) -> Any:
    """The applied operations, a row each."""
    pieces, piece = [], _Piece()
    for logged in batches:
        piece.add(logged)
        if len(piece.keys) >= PIECE_ROWS:
            pieces.append(piece.rows())
            piece = _Piece()
            time.sleep(PIECE_PAUSE_S)
    return pa.Table.from_batches([*pieces, piece.rows()], _OPERATIONS)


class _Piece:
    """Rows of some operations; of a batch that was applied as it is, nothing is looked at one by one."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self._values: list[bytes | None] = []
        self._kinds, self._outcomes = bytearray(), bytearray()
        self._expires_at: dict[int, int] = {}
        self._runs: list[tuple[Any, ...]] = []
        """Where each ends, and what the columns of `_RUNS` have in it."""

    def add(self, logged: LoggedBatch) -> None:
        batch, applied = logged.batch, logged.outcomes
        if applied_count(applied) < len(applied):
            taken = [i for i, outcome in enumerate(applied) if outcome in APPLIED]
            if not taken:
                return
            batch, applied = batch.select(taken), bytes([applied[i] for i in taken])
        begin, count = len(self.keys), len(applied)
        self.keys += batch.keys
        self._values += batch.values or [None] * count
        self._kinds += batch.kinds
        self._outcomes += applied
        for i, ttl_ms in batch.ttls_ms.items():
            self._expires_at[begin + i] = logged.time_ms + ttl_ms
        rest = (logged.epoch, logged.time_ms, batch.client or None)
        numbers, indexes = batch.numbers, batch.indexes
        if not numbers or (isinstance(numbers, range) and not indexes):
            number = numbers[0] if numbers else None
            self._runs.append((begin + count, begin, logged.first, number, 0, *rest))
            return
        for i, number in enumerate(numbers):
            index = indexes[i] if indexes else 0
            run = (begin + i + 1, begin + i, logged.first + i, number, index, *rest)
            self._runs.append(run)

    def rows(self) -> Any:
        count = len(self.keys)
        ends, *columns = zip(*self._runs, strict=True) if count else [()] * (1 + len(_RUNS))
        run_ends = pa.array(ends, pa.int32())
        begins, seqs, numbers, indexes, epochs, times_ms, clients = [
            # Not from_arrays: with its checks it takes forty times as long.
            pa.Array.from_buffers(
                _run(type), count, [None], 0, 0, [run_ends, pa.array(column, type)]
            )
            for column, type in zip(columns, _RUNS, strict=True)
        ]
        expires_at = pa.nulls(count, pa.int64())
        if self._expires_at:
            expires_at = pa.array([*map(self._expires_at.get, range(count))], pa.int64())
        return pa.record_batch(
            [
                _places(count), begins, epochs, seqs, times_ms,
                _codes(self._kinds), pa.array(self.keys, pa.binary()),
                pa.array(self._values, pa.binary()), expires_at, clients, numbers, indexes,
                _codes(self._outcomes),
            ], schema=_OPERATIONS,
        )  # fmt: skip


def _places(count: int) -> Any:
    return _PLACES.slice(0, count) if count <= len(_PLACES) else pa.array(range(count), pa.int32())


def _requests(batches: Iterable[LoggedBatch]) -> Any:
    rows = [_request(logged) for logged in batches if logged.batch.client and logged.batch.numbers]
    columns = [*zip(*rows, strict=True)] if rows else [()] * len(_REQUESTS)
    return _table(_REQUESTS, columns)


def _request(logged: LoggedBatch) -> tuple[Any, ...]:
    batch, numbers = logged.batch, logged.batch.numbers
    indexes = encode_cbor([*batch.indexes]) if batch.indexes else None
    return (
        batch.client, numbers[0], numbers[-1], pack_numbers(numbers), indexes, logged.outcomes,
        logged.epoch, logged.first, logged.time_ms,
    )  # fmt: skip


def pack_numbers(numbers: Sequence[int]) -> bytes:
    """CBOR: the numbers; of a gapless ascent the first alone, as the outcomes tell how many there are."""
    if isinstance(numbers, range) and numbers.step == 1:
        return encode_cbor(numbers[0])
    return encode_cbor([*numbers])


def _codes(codes: bytearray) -> Any:
    return pa.Array.from_buffers(pa.uint8(), len(codes), [None, pa.py_buffer(bytes(codes))])


def _table(schema: Any, columns: Sequence[Any]) -> Any:
    arrays = [
        column if isinstance(column, pa.Array | pa.ChunkedArray) else pa.array(column, field.type)
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.table(arrays, schema=schema)
