"""Answers to the machine's queries, read from the state's file.

One thread asks. A page of rows is read in pieces, each with as many rows as are likely to fit, so that large values
neither fill the memory nor end a page before its time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

import cbor2
import duckdb

from bus_kv.core.machine import (
    ClientsOf,
    Expiring,
    HistoryOf,
    KeysAfter,
    Lookup,
    Mark,
    RangeCount,
    RangeRead,
    RequestsOf,
    SnapshotRead,
    Unread,
)
from nodes.state_schema import OP_NAME, ROLLED_BACK, key_hash
from nodes.state_snapshot import read_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from duckdb import DuckDBPyConnection

    from nodes.state_file import StateFile

    Row: TypeAlias = tuple[Any, ...]
    PointQuery: TypeAlias = (
        Lookup
        | RangeRead
        | RangeCount
        | KeysAfter
        | Expiring
        | RequestsOf
        | HistoryOf
        | SnapshotRead
        | ClientsOf
    )

LOOKUP_CHUNK_KEYS = 256
"""Keys per statement: more of them pin too much memory at once."""
PIECE_BYTES = 8 << 20
"""A piece of a page has as many rows as this holds by the mean, unless `bytes_max` is less. The values that a lookup
reads at once are not more, unless one alone is."""
TOP_ROWS_MAX = 4096
"""Rows up to which the first rows of a range are cheaper to pick in passing than to look for twice."""
PIECE_ROWS_MAX = 100_000
ROW_BYTES = 100
"""What a row takes beside its key and value, as an estimate."""
PART_KEYS = 500_000
"""About so many keys of a walk over all of them are read at once."""


@dataclass(slots=True)
class _Walk:
    """One walk over all keys of a shard."""

    parts: int
    part: int = 0
    """The one to be read next."""
    keys: Any = ()
    offset: int = 0
    position: int = 0


CLIENTS = """
SELECT client, max(number) FROM (
    SELECT client, last AS number FROM state.requests WHERE shard = ?
    UNION ALL SELECT client, floor FROM state.clients WHERE shard = ?
) GROUP BY client
"""


@dataclass(slots=True)
class Reader:
    file: StateFile
    _cursor: DuckDBPyConnection = field(init=False)
    _walks: dict[str, _Walk] = field(default_factory=dict)
    _positions: count[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self._cursor = self.file.cursor()

    def answer(self, query: PointQuery) -> list[Any]:
        """Rows as the query's class says. Raises duckdb.Error."""
        match query:
            case Lookup():
                return self._lookup(query)
            case RangeRead():
                return self._range(query)
            case RangeCount():
                return self._count(query)
            case KeysAfter():
                return self._keys_after(query)
            case Expiring():
                return self._expiring(query)
            case RequestsOf():
                return self._requests_of(query)
            case HistoryOf():
                return self._history_of(query)
            case SnapshotRead():
                mark = self.file.known.get(query.shard, Mark())
                return read_chunk(self._cursor, self.file.tables.get(query.shard), mark, query)
            case ClientsOf():
                return self._fetch(CLIENTS, [query.shard, query.shard])

    def _fetch(self, statement: str, parameters: list[Any]) -> list[Row]:
        return self._cursor.execute(statement, parameters).fetchall()

    def _table(self, shard: str) -> str | None:
        table = self.file.tables.get(shard)
        return f"state.{table.name}" if table else None

    # ---- records ----

    def _lookup(self, query: Lookup) -> list[Any]:
        table = self._table(query.shard)
        if table is None:
            return [len(query.whole)]
        rows: list[Row] = []
        for at in range(0, len(query.heads), LOOKUP_CHUNK_KEYS):
            heads = self._of_keys(table, "value_bytes", query.heads[at : at + LOOKUP_CHUNK_KEYS])
            rows += [(key, Unread(value_bytes), *rest) for key, value_bytes, *rest in heads]
        reached, room = 0, query.bytes_max
        pace = room // (self._mean_bytes(query.shard) + 1) + 1
        while reached < len(query.whole) and room > 0:
            piece = query.whole[reached : reached + min(pace, LOOKUP_CHUNK_KEYS)]
            keys = self._readable(query.shard, table, piece, room)
            found = {row[0]: row for row in self._of_keys(table, "value", keys)}
            for row in map(found.get, keys):
                reached += 1
                if row is not None:
                    rows.append(row)
                    room -= len(row[1])
                if room <= 0:
                    break
            pace *= 2
        return [reached, *rows]

    def _readable(self, shard: str, table: str, keys: list[bytes], room: int) -> list[bytes]:
        """The first of these keys: as many as have values that can be read at once, or come to `room`."""
        if len(keys) * self.file.longest[shard] <= PIECE_BYTES:
            return keys
        sizes = {row[0]: row[1] for row in self._of_keys(table, "value_bytes", keys)}
        for i, key in enumerate(keys):
            room -= sizes.get(key, 0)
            if room <= 0:
                return keys[: i + 1]
        return keys

    def _of_keys(self, table: str, value: str, keys: list[bytes]) -> list[Row]:
        """Records of these keys, with this column for the value: a length costs next to nothing."""
        return self._fetch(
            f"SELECT key, {value}, epoch, seq, expires_at FROM {table} "
            f"WHERE key IN ({','.join('?' * len(keys))})",
            keys,
        )

    def _mean_bytes(self, shard: str) -> int:
        """Of a key and its value."""
        mark = self.file.known.get(shard, Mark())
        return mark.data_bytes // max(mark.keys, 1)

    def _range(self, query: RangeRead) -> list[Row]:
        table = self._table(query.shard)
        if table is None:
            return []
        mean_bytes = self._mean_bytes(query.shard) if query.values else 0
        return read_page(
            lambda after, rows_max: self._range_piece(query, table, after, rows_max),
            min(query.bytes_max, PIECE_BYTES) // (mean_bytes + ROW_BYTES),
            query.limit,
            query.bytes_max,
            lambda row: len(row[0]) + len(row[1] or b""),
        )

    def _range_piece(
        self, query: RangeRead, table: str, after: Row | None, rows_max: int
    ) -> list[Row]:
        """The table is not in order of keys, so this looks at all of them, and at the values of those that it takes.

        DuckDB picks few rows in passing, but would sort all for many; so for these the last key is found first.
        """
        beyond, order, first = ("<", "DESC", "max") if query.reverse else (">", "ASC", "min")
        conditions, keys = _bounds(query.start, query.end)
        if after is not None:
            conditions.append(f"key {beyond} ?")
            keys.append(after[0])
        value = "value" if query.values else "NULL"
        with self._snapshot():
            if rows_max > TOP_ROWS_MAX:
                last = self._fetch(
                    f"SELECT {first}(key, {rows_max})[-1] FROM {table} "
                    f"WHERE {' AND '.join(conditions)}",
                    keys,
                )[0][0]
                if last is None:
                    return []
                conditions.append(f"NOT key {beyond} ?")
                keys.append(last)
            return self._fetch(
                f"SELECT key, {value}, epoch, seq, expires_at FROM {table} "
                f"WHERE {' AND '.join(conditions)} ORDER BY key {order} LIMIT {rows_max}",
                keys,
            )

    @contextlib.contextmanager
    def _snapshot(self) -> Iterator[None]:
        self._cursor.execute("BEGIN TRANSACTION READ ONLY")
        try:
            yield
        finally:
            with contextlib.suppress(duckdb.Error):
                self._cursor.execute("ROLLBACK")

    def _count(self, query: RangeCount) -> list[int]:
        table = self._table(query.shard)
        if table is None:
            return [0]
        conditions, keys = _bounds(query.start, query.end)
        where = " AND ".join(conditions)
        return [self._fetch(f"SELECT count(*) FROM {table} WHERE {where}", keys)[0][0]]

    def _expiring(self, query: Expiring) -> list[Row]:
        table = self._table(query.shard)
        if table is None:
            return []
        return self._fetch(
            f"SELECT expires_at, key, seq FROM {table} WHERE expires_at <= ? "
            f"ORDER BY expires_at, key LIMIT {query.limit}",
            [query.until_ms],
        )

    # ---- all keys ----

    def _keys_after(self, query: KeysAfter) -> list[tuple[int, list[bytes]]]:
        """All keys, those with the same hash in one part, and each part read at once.

        A snapshot that stays open for the whole walk would hold up checkpoints. A key that was there all the time is in
        its part whenever that is read, whatever is folded or checkpointed in between. A position names what follows; a
        walk that is lost starts over, and keys are told again.
        """
        table = self._table(query.shard)
        if table is None:
            return []
        walk = self._walks.get(query.shard)
        if walk is None or walk.position != query.after:
            keys = self.file.known.get(query.shard, Mark()).keys
            walk = self._walks[query.shard] = _Walk(keys // PART_KEYS + 1)
        while walk.offset >= len(walk.keys) and walk.part < walk.parts:
            walk.keys = self._part(table, walk.part, walk.parts)
            walk.part, walk.offset = walk.part + 1, 0
        page = walk.keys[walk.offset : walk.offset + query.count].to_pylist()
        if not page:
            del self._walks[query.shard]
            return []
        walk.offset += len(page)
        walk.position = next(self._positions)
        return [(walk.position, page)]

    def _part(self, table: str, part: int, parts: int) -> Any:
        """An Arrow column: a tenth of what the keys would take as objects."""
        statement = f"SELECT key FROM {table} WHERE hash(key) % {parts} = {part}"
        table_of_keys: Any = self._cursor.sql(statement).to_arrow_table()
        return table_of_keys.column(0)

    def interrupt(self) -> None:
        """End the query under way. Any thread may ask for it."""
        with contextlib.suppress(duckdb.Error):
            self._cursor.interrupt()

    def close(self) -> None:
        self._cursor.close()

    # ---- what was asked and done ----

    def _requests_of(self, query: RequestsOf) -> list[Any]:
        """In one snapshot: what leaves the one table has entered the other."""
        with self._snapshot():
            floors = self._fetch(
                "SELECT max(floor) FROM state.clients WHERE shard = ? AND client = ?",
                [query.shard, query.client],
            )
            rows = self._fetch(
                "SELECT numbers, indexes, outcomes, epoch, first_seq, time_ms FROM state.requests "
                "WHERE last >= ? AND first <= ? AND client = ? AND shard = ?",
                [query.first, query.last, query.client, query.shard],
            )
        floor = floors[0][0]
        return [-1 if floor is None else floor, *map(_run, rows)]

    def _history_of(self, query: HistoryOf) -> list[Row]:
        table = self.file.tables.get(query.shard)
        if table is None:
            return []

        def piece(after: Row | None, rows_max: int) -> list[Row]:
            conditions = ["key = ?", "shard_number = ?", f"outcome <> {ROLLED_BACK}"]
            parameters: list[Any] = [query.key, table.number]
            if self.file.is_hashed:
                conditions.append(f"key_hash = {key_hash('?::BLOB')}")
                parameters.append(query.key)
            before = after[:2] if after else query.before
            if before is not None:
                conditions.append("(epoch < ? OR epoch = ? AND seq < ?)")
                parameters += [before[0], *before]
            return self._fetch(
                f"SELECT epoch, seq, {OP_NAME}, value, time_ms, client, number FROM state.oplog "
                f"WHERE {' AND '.join(conditions)} ORDER BY epoch DESC, seq DESC LIMIT {rows_max}",
                parameters,
            )

        pace = min(query.bytes_max, PIECE_BYTES) // (self._mean_bytes(query.shard) + ROW_BYTES)
        return read_page(piece, pace, query.limit, query.bytes_max, lambda row: len(row[3] or b""))


def read_page(
    piece: Callable[[Row | None, int], list[Row]],
    pace: int,
    limit: int,
    bytes_max: int,
    size: Callable[[Row], int],
) -> list[Row]:
    """Rows up to `limit`, or up to the one with which their sizes come to `bytes_max`, or all there are.

    `piece(after, n)` reads the n rows that follow a row. It is asked for `pace` rows first, for more when they were
    small, for fewer when there is no memory for them.
    """
    rows: list[Row] = []
    pace = max(pace, 1)
    while len(rows) < limit:
        wanted = min(pace, limit - len(rows), PIECE_ROWS_MAX)
        try:
            read = piece(rows[-1] if rows else None, wanted)
        except duckdb.OutOfMemoryException:
            if wanted == 1:
                raise
            pace = wanted // 2
            continue
        for row in read:
            rows.append(row)
            bytes_max -= size(row)
            if bytes_max <= 0:
                return rows
        if len(read) < wanted:
            break
        pace *= 2
    return rows


def _bounds(start: bytes, end: bytes | None) -> tuple[list[str], list[bytes]]:
    """Conditions of [start, end) and their parameters."""
    return (["key >= ?"], [start]) if end is None else (["key >= ?", "key < ?"], [start, end])


def _run(row: Row) -> Row:
    numbers, indexes, outcomes, *rest = row
    return (
        _numbers(numbers, len(outcomes)),
        cbor2.loads(indexes) if indexes is not None else (),
        outcomes,
        *rest,
    )


def _numbers(packed: bytes, count: int) -> Sequence[int]:
    """What `pack_numbers` has packed."""
    numbers = cbor2.loads(packed)
    return range(numbers, numbers + count) if isinstance(numbers, int) else numbers
