"""Snapshots of one shard's state: read in chunks on one node, written on another.

A chunk is an Arrow table of rows as they stand in the state, in IPC form. The places of chunks follow the tables, and
within a table the parts of a fixed division and the order in a part, so a lost chunk is read again wherever folds have
got to by then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from nodes.state_schema import key_hash

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

    from bus_kv.core.machine import Load, Mark, SnapshotRead
    from nodes.state_file import ShardTable

PART_BYTES = 1 << 20
"""Of keys and values in a part of the data, on average: a part is read at once."""
PART_SEQS = 20_000
"""Operations, and requests by their first, in a part."""
TABLES = ("kv", "oplog", "oplog_parts", "requests", "clients")
BY_NUMBER = ("oplog", "oplog_parts")
"""Tables that know a shard by its number, which is another one in every state."""
_ORDER = {
    "kv": ("key",), "oplog": ("seq", "epoch"), "oplog_parts": ("last",),
    "requests": ("first_seq", "epoch", "client", "first"), "clients": ("client",),
}  # fmt: skip
"""No two rows of a shard have the same: what was rolled back has the seq of what came in its place, and a batch of
which nothing was applied begins where the next one does."""
_SEQ = {"kv": "seq", "oplog": "seq", "oplog_parts": "last", "requests": "first_seq"}


def read_chunk(
    db: DuckDBPyConnection, table: ShardTable | None, mark: Mark, query: SnapshotRead
) -> list[Any]:
    """[table, chunk, next place]. Raises duckdb.Error.

    A place is [table, part, parts, what the chunk before ended with]: the division is made once for each table, because
    the data may grow while its chunks are read.
    """
    name, part, parts, after = query.place or _first_place("kv", mark, query.last)
    if table is None:
        return [name, b"", None]
    rows = _rows(db, table, query, (name, part, parts, after))
    chunk, taken = _fitting(rows, query.bytes_max)
    if taken < rows.num_rows:
        reached = rows.slice(taken - 1, 1).select(_ORDER[name]).to_pylist()[0]
        return [name, chunk, [name, part, parts, [*reached.values()]]]
    if part + 1 < parts:
        return [name, chunk, [name, part + 1, parts, None]]
    following = TABLES[TABLES.index(name) + 1 :]
    return [name, chunk, _first_place(following[0], mark, query.last) if following else None]


def _first_place(name: str, mark: Mark, last: int) -> list[Any]:
    parts = 1
    if name == "kv":
        parts = mark.data_bytes // PART_BYTES + 1
    elif name in ("oplog", "requests"):
        parts = last // PART_SEQS + 1
    return [name, 0, parts, None]


def _rows(
    db: DuckDBPyConnection, table: ShardTable, query: SnapshotRead,
    place: tuple[str, int, int, Any],
) -> Any:  # fmt: skip
    name, part, parts, after = place
    conditions: list[str] = []
    parameters: list[Any] = []
    if name == "kv":
        conditions.append(f"hash(key) % {parts} = {part}")
    elif name in BY_NUMBER:
        conditions.append("shard_number = ?")
        parameters.append(table.number)
    else:
        conditions.append("shard = ?")
        parameters.append(query.shard)
    if name in ("oplog", "requests"):
        first = part * PART_SEQS
        conditions.append(f"{_SEQ[name]} >= {first} AND {_SEQ[name]} < {first + PART_SEQS}")
    if name in _SEQ:
        conditions.append(f"{_SEQ[name]} <= ?")
        parameters.append(query.last)
    order = ", ".join(_ORDER[name])
    if after is not None:
        conditions.append(f"({order}) > ({', '.join('?' * len(after))})")
        parameters += after
    source = table.name if name == "kv" else name
    statement = f"SELECT * FROM state.{source} WHERE {' AND '.join(conditions)} ORDER BY {order}"
    rows: Any = db.sql(statement, params=parameters).to_arrow_table()
    return rows


def _fitting(rows: Any, bytes_max: int) -> tuple[bytes, int]:
    """As many rows as fit; one always goes."""
    count = rows.num_rows
    while True:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows.slice(0, count))
        chunk = sink.getvalue().to_pybytes()
        if len(chunk) <= bytes_max or count <= 1:
            return chunk, count
        count = max(1, min(count // 2, count * bytes_max // len(chunk)))


def clear_shard(db: DuckDBPyConnection, shard: str, table: ShardTable) -> None:
    """Nothing of the shard is left, and its mark says so."""
    db.execute(f"DELETE FROM state.{table.name}")
    for name in BY_NUMBER:
        db.execute(f"DELETE FROM state.{name} WHERE shard_number = ?", [table.number])
    for name in ("requests", "clients"):
        db.execute(f"DELETE FROM state.{name} WHERE shard = ?", [shard])
    db.execute(
        "UPDATE state.marks SET epoch = 0, last = 0, time_ms = 0, keys = 0, data_bytes = 0, "
        "lineage = '[]' WHERE shard = ?", [shard],
    )  # fmt: skip


def largest_in_chunk(load: Load) -> int:
    """Bytes of the largest value in a chunk."""
    if load.table != "kv" or not load.chunk:
        return 0
    sizes = pa.ipc.open_stream(load.chunk).read_all()["value_bytes"]
    return max(sizes.to_pylist(), default=0)


def write_chunk(db: DuckDBPyConnection, load: Load, table: ShardTable) -> None:
    """All of it or nothing. Raises duckdb.Error, pyarrow's errors or ValueError when it is no chunk."""
    if load.table not in TABLES:
        raise ValueError(f"a snapshot has no table {load.table!r}")
    if not load.chunk:
        return  # of a shard of which the source has written nothing
    rows = pa.ipc.open_stream(load.chunk).read_all()
    target = table.name if load.table == "kv" else load.table
    described = db.execute(f"SELECT * FROM state.{target} LIMIT 0").description or []
    if rows.column_names != [column[0] for column in described]:
        raise ValueError("the source has another format: it runs another release than this node")
    # Not within the transaction: what is aborted can only be rolled back.
    db.register("chunk", rows)
    try:
        own = [f"{table.number} AS shard_number"] if load.table in BY_NUMBER else []
        if load.table == "oplog":
            own.append(f"{key_hash('key')} AS key_hash")  # the source may compute another one
        chosen = f"* REPLACE ({', '.join(own)})" if own else "*"
        db.execute(f"INSERT INTO state.{target} SELECT {chosen} FROM chunk")
    finally:
        db.unregister("chunk")
