"""User SQL on a node: one SELECT over `kv` and `oplog`, checked before it runs and bounded while it runs.

A query passes three gates, and each would hold if another one leaked:

1. The check (sql_check.py). DuckDB's own parser serializes the statement; every node of that tree must be of a known
   kind, every relation `kv`, `oplog` or a CTE in scope, every function on a list, the whole not too complex.
2. The instance, set up by who owns it: no access to files, no extensions, configuration locked.
3. The run: a READ ONLY transaction on a cursor of its own, views that hold this node's shards only, a deadline, and a
   limit on rows and bytes.

What remains: DuckDB looks at the deadline between steps, and memory inside one step does not count against its limit.
A query made to do harm (a megabyte value blown up row by row) can take more than its share, so whoever may use the
subject `sql` should be trusted with the node's time and memory; nothing else is within reach.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from typing import TYPE_CHECKING, Any

import duckdb

from nodes.sql_check import VIEWS, SqlRefused, check_tree, refused, too_complex

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bus_kv.core.machine import Sql

__all__ = ["SqlRefused", "run_query"]

TEXT_CHARS_MAX = 65_536
BRACKETS_MAX = 500
"""The parser's time grows with the square of the depth of brackets, and no interrupt reaches it."""
SEMICOLONS_MAX = 4
"""Each takes a look by the parser to see whether it closes the statement."""
OPERATOR_MEMORY_LIMIT = "256MB"
ROWS_PER_FETCH = 64
INTERRUPT_INTERVAL_S = 0.05
INT64_MIN, UINT64_MAX = -(1 << 63), (1 << 64) - 1


def run_query(cursor: duckdb.DuckDBPyConnection, sql: Sql) -> list[Any]:
    """[columns, rows] of the user's query over this node's part of `sql.shards`; the cursor is closed at the end.

    Values are None, bool, int (64 bits), float (finite), str, bytes, or lists and dicts of these without bytes. Raises
    SqlRefused. Blocks until done, at most `sql.timeout_ms` and the step that DuckDB is in.
    """
    with contextlib.closing(cursor), _deadline(cursor, sql.timeout_ms) as expired:
        try:
            text = check(cursor, sql.query)
            _restrict(cursor, sql.shards)
            # Closing the cursor ends the transaction, also while rows are still to come.
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            return _rows(cursor, text, sql, expired)
        except duckdb.Error as error:
            raise _failed(error, sql, expired) from None


@contextlib.contextmanager
def _deadline(cursor: duckdb.DuckDBPyConnection, timeout_ms: int) -> Iterator[threading.Event]:
    """Interrupts the cursor again and again once the time is over; the event says that it is.

    One interrupt is not enough: it is forgotten if it meets the cursor between two statements.
    """
    finished, expired = threading.Event(), threading.Event()

    def interrupt() -> None:
        if finished.wait(timeout_ms / 1000):
            return
        expired.set()
        while not finished.is_set():
            cursor.interrupt()
            finished.wait(INTERRUPT_INTERVAL_S)

    watcher = threading.Thread(target=interrupt, name="sql-deadline", daemon=True)
    watcher.start()
    try:
        yield expired
    finally:
        finished.set()
        watcher.join()


def _failed(error: duckdb.Error, sql: Sql, expired: threading.Event) -> SqlRefused:
    if expired.is_set():
        return _too_slow(sql)
    if isinstance(error, duckdb.OutOfMemoryException):
        message = "the query needs more memory than the node has for it: read fewer rows"
        return SqlRefused("SQL_FAILED", message)
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return SqlRefused("SQL_FAILED", ": ".join(lines[:1]) or type(error).__name__)


def _too_slow(sql: Sql) -> SqlRefused:
    message = f"the query took longer than {sql.timeout_ms} ms: read less, by shard, key or seq"
    return SqlRefused("SQL_FAILED", message)


# ---- the check ----


def check(cursor: duckdb.DuckDBPyConnection, query: str) -> str:
    """The query's one statement, without a closing semicolon, if it may run. Raises SqlRefused."""
    _check_text(query)
    explained = re.match(r"\s*explain\s+(analy[sz]e\b)?", query, re.IGNORECASE)
    if explained and explained[1]:
        raise refused("EXPLAIN ANALYZE is not allowed: use EXPLAIN")
    # Only a SELECT can be serialized. What follows EXPLAIN has to be one by itself: no options.
    text = _without_semicolon(cursor, query[explained.end() :] if explained else query)
    statements = _statements(cursor, text)
    if len(statements) > 1:
        raise refused("several statements at once: send them one by one")
    check_tree(statements[0])
    return f"EXPLAIN {text}" if explained else text


def _check_text(query: str) -> None:
    if len(query) > TEXT_CHARS_MAX:
        raise refused(f"the query is longer than {TEXT_CHARS_MAX} characters: shorten it")
    if sum(map(query.count, "([{")) > BRACKETS_MAX:
        raise refused(f"the query has more than {BRACKETS_MAX} opening brackets: shorten it")
    if "\0" in query:
        raise refused("the query holds a NUL character: leave it out")


def _without_semicolon(cursor: duckdb.DuckDBPyConnection, text: str) -> str:
    """The text is put into a larger statement, so closing semicolons go, also those before a comment.

    A cut that leaves the same tree has cut no semicolon of a string.
    """
    text = text.rstrip("; \t\r\n")
    tree = _serialized(cursor, text)
    for _ in range(min(text.count(";"), SEMICOLONS_MAX)):
        head = text.rpartition(";")[0]
        if _serialized(cursor, head) != tree:
            break
        text = head
    return text


def _statements(cursor: duckdb.DuckDBPyConnection, text: str) -> list[Any]:
    try:
        tree = json.loads(_serialized(cursor, text))
    except RecursionError:
        raise too_complex() from None
    if tree.get("error") and tree.get("error_type") == "not implemented":
        raise refused("only SELECT is allowed: write with put, delete, batch or txn")
    if tree.get("error"):
        raise SqlRefused("SQL_FAILED", f"the query does not parse: {tree.get('error_message')}")
    if not tree.get("statements"):
        raise SqlRefused("SQL_FAILED", "the query is empty: send a SELECT")
    statements: list[Any] = tree["statements"]
    return statements


def _serialized(cursor: duckdb.DuckDBPyConnection, text: str) -> str:
    try:
        row = cursor.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchone()
    except UnicodeEncodeError:
        raise SqlRefused("SQL_FAILED", "the query is not valid Unicode: send UTF-8") from None
    return str(row[0]) if row else "{}"


# ---- the run ----


def _restrict(cursor: duckdb.DuckDBPyConnection, shards: list[str]) -> None:
    """Views of the cursor's own hide those of all shards: the same names, only the rows of these shards."""
    # The settings may be locked; then the instance's memory limit is the only one.
    with contextlib.suppress(duckdb.InvalidInputException):
        cursor.execute(f"SET operator_memory_limit = '{OPERATOR_MEMORY_LIMIT}'")
    row = cursor.execute("SELECT current_database()").fetchone()
    catalog = '"' + str(row[0] if row else "memory").replace('"', '""') + '"'
    wanted = ", ".join("'" + shard.replace("'", "''") + "'" for shard in shards) or "NULL"
    for view in VIEWS:
        source = f"SELECT * FROM {catalog}.main.{view} WHERE shard IN ({wanted})"
        cursor.execute(f"CREATE TEMP VIEW {view} AS {source}")


def _rows(
    cursor: duckdb.DuckDBPyConnection, text: str, sql: Sql, expired: threading.Event
) -> list[Any]:
    relation = cursor.sql(text)
    columns = list(relation.columns)
    kinds = [str(kind) for kind in relation.types]
    if text.startswith("EXPLAIN"):
        cursor.execute(text)
    else:
        readable = ", ".join(_readable(place + 1, kind) for place, kind in enumerate(kinds))
        cursor.execute(relation.project(readable).sql_query())
    nested = [_is_nested(kind) for kind in kinds]
    rows: list[Any] = []
    size_bytes = 0
    while batch := cursor.fetchmany(ROWS_PER_FETCH):
        for values in batch:
            row = [_wire(value, deep) for value, deep in zip(values, nested, strict=True)]
            size_bytes += sum(map(_size_bytes, values))
            rows.append(row)
            if len(rows) > sql.rows_max or size_bytes > sql.bytes_max:
                raise _too_much(sql)
        if expired.is_set():
            raise _too_slow(sql)
    return [columns, rows]


def _readable(place: int, kind: str) -> str:
    """The column at this place as a type that Python holds without loss: exotic ones as text, nested ones as JSON."""
    if _is_nested(kind):
        return f"to_json(#{place})"
    if kind == "TIMESTAMP WITH TIME ZONE":
        return _iso(f"(#{place} AT TIME ZONE 'UTC')")
    if kind.startswith("TIMESTAMP"):
        return _iso(f"#{place}")
    if kind.startswith(("DATE", "TIME", "INTERVAL", "UUID", "DECIMAL", "BIT", "BIGNUM")):
        return f"CAST(#{place} AS VARCHAR)"
    return f"#{place}"


def _iso(timestamp: str) -> str:
    text = f"CAST({timestamp} AS VARCHAR)"
    return f"CASE WHEN isfinite({timestamp}) THEN replace({text}, ' ', 'T') || 'Z' ELSE {text} END"


def _is_nested(kind: str) -> bool:
    return kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION", "TUPLE", "VARIANT"))


def _wire(value: Any, is_json: bool) -> Any:
    if is_json and value is not None:
        return json.loads(value, parse_int=_int, parse_constant=str)
    if isinstance(value, int) and not isinstance(value, bool):
        return _int(value)
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return str(value)
    return value if isinstance(value, bool | float | str | bytes | None) else str(value)


def _int(value: str | int) -> int | str:
    """An integer that the wire's 64 bits hold, anything longer as text."""
    number = int(value)
    return number if INT64_MIN <= number <= UINT64_MAX else str(number)


def _size_bytes(value: Any) -> int:
    if isinstance(value, bytes):
        return len(value)
    return len(value.encode()) if isinstance(value, str) else 8


def _too_much(sql: Sql) -> SqlRefused:
    limits = f"{sql.rows_max} rows or {sql.bytes_max} bytes"
    return SqlRefused("SQL_FAILED", f"the result is larger than {limits}: add LIMIT or aggregate")
