"""Commands that ask what is and what was: sql, history; the third, oplog, has its own file."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.cells import cell_text, json_cell, time_text
from bus_kv.cli.command import Call, ask, command
from bus_kv.cli.data import Key, Keyspace
from bus_kv.cli.output import version_text
from bus_kv.runtime.process import OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client

HISTORY_LIMIT_DEFAULT = 100
HISTORY_PAGE = 1000


def register(app: typer.Typer) -> None:
    command(app, "sql")(sql)
    command(app, "history")(history)


async def sql(
    call: Call,
    query: Annotated[str, typer.Argument(help="'-' reads it from stdin", show_default=False)],
) -> int:
    """Run a SELECT over the whole cluster's data (kv) and over every operation (oplog).

    - kv: keyspace, shard, key, key_text, value, value_text, epoch, seq, expires_at
    - oplog: keyspace, shard, epoch, seq, time, op, key, key_text, value, value_text, client,
      request_id, txn_id, trace_id, outcome

    The _text columns are NULL where the bytes are no UTF-8. Only reading is possible, for a limited
    time and size. Bytes are shown as text when they are UTF-8, else as hex.

    - `bus-kv sql "SELECT count(*) FROM kv"`
    - `bus-kv sql "SELECT op, count(*) FROM oplog GROUP BY op" --json`
    - `bus-kv sql - < report.sql`
    """
    text = _read_query() if query == "-" else query
    found = await ask(call.options, lambda db: db.sql(text))
    if call.out.as_json:
        call.out.document({"columns": found.columns, "rows": json_cell(found.rows)})
    else:
        call.out.table(found.columns, [[cell_text(cell) for cell in row] for row in found.rows])
    return OK


def _read_query() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise typer.BadParameter("the query on stdin is not UTF-8 text") from None


async def history(
    call: Call,
    key: Key,
    limit: Annotated[int, typer.Option(min=1, help="versions at most")] = HISTORY_LIMIT_DEFAULT,
    keyspace: Keyspace = "default",
) -> int:
    """List what was written to a key, the newest first, also before it was deleted.

    - `bus-kv history apple`
    - `bus-kv history apple --limit 5 --json`
    """
    fields = {"key": os.fsencode(key), "keyspace": keyspace}
    versions, cursor = await ask(call.options, lambda db: _versions(db, fields, limit))
    if call.out.as_json:
        call.out.document({"key": fields["key"], "versions": versions, "cursor": cursor})
        return OK
    rows = [
        [
            time_text(v["time"]),
            version_text(v["version"]),
            v["op"],
            v.get("value"),
            v.get("request_id"),
        ]
        for v in versions
    ]
    call.out.table(["time", "version", "op", "value", "request_id"], rows)
    if cursor is not None:
        call.out.note("there is more: raise --limit")
    return OK


async def _versions(
    db: Client, fields: dict[str, Any], limit: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Up to `limit` versions, and the cursor after them (None at the end)."""
    versions: list[dict[str, Any]] = []
    while True:
        count = min(limit - len(versions), HISTORY_PAGE)
        page = await db.call("history", {**fields, "limit": count})
        versions += page["versions"]
        cursor: str | None = page["cursor"]
        if cursor is None or len(versions) >= limit:
            return versions, cursor
        fields = {**fields, "cursor": cursor}
