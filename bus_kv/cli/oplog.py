"""`bus-kv oplog`: the operations of the cluster, asked for by SQL on the view oplog."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli.cells import bytes_text, json_cell
from bus_kv.cli.command import Call, ask, command
from bus_kv.cli.data import duration_ms as duration_ms
from bus_kv.runtime.clock import Clock
from bus_kv.runtime.process import OK, unless_stopped

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bus_kv.client.client import Client

LIMIT_DEFAULT = 50
POLL_INTERVAL_S = 1.0
POLL_ROWS_MAX = 500
"""Operations of one query while following; a longer queue takes several, without a pause."""
VALUE_BYTES_SHOWN = 200
"""So much of a value is asked for when people read it; JSON gets all of it."""

COLUMNS = (
    "time", "keyspace", "shard", "epoch", "seq", "op", "key", "value", "request_id", "txn_id",
    "trace_id", "outcome",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    command(app, "oplog")(oplog)


async def oplog(
    call: Call,
    limit: Annotated[int, typer.Option(min=1, help="operations at most")] = LIMIT_DEFAULT,
    key: Annotated[str | None, typer.Option(help="only on this key")] = None,
    op: Annotated[str | None, typer.Option(help="only of this kind: put, delete, expire")] = None,
    outcome: Annotated[
        str | None,
        typer.Option(help="only with this one: created, replaced, deleted, absent, rolled_back"),
    ] = None,
    since: Annotated[
        Any,
        typer.Option(parser=duration_ms, metavar="DURATION", help="not older than: 60s, 10m, 2h"),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="go on with new ones until Ctrl-C")
    ] = False,
) -> int:
    """List the newest operations of the whole cluster, the last one at the end.

    Expirations are operations too. With --follow and --json every operation is a document on a line
    of its own. For other questions use bus-kv sql.

    - `bus-kv oplog --limit 10`
    - `bus-kv oplog --key apple --since 10m`
    - `bus-kv oplog --op delete --follow`
    - `bus-kv oplog --outcome rolled_back`: what was lost with a primary, writes at ONE or unacknowledged
    """
    filters = conditions(key, op, outcome, since, Clock().now_ns() // 1_000_000)
    log = _Oplog(call, filters)
    if follow:
        await ask(call.options, lambda db: _until_interrupted(log, db, limit))
        return OK
    rows = await ask(call.options, lambda db: log.newest(db, limit))
    if call.out.as_json:
        wire_rows = [[row[name] for name in COLUMNS] for row in rows]
        call.out.document({"columns": [*COLUMNS], "rows": json_cell(wire_rows)})
    else:
        call.out.table([*_SHOWN], [_shown(row) for row in rows])
    return OK


# ---- SQL ----


def literal(value: str | bytes | int | datetime) -> str:
    """The value in SQL, whatever it holds."""
    match value:
        case bytes():
            return "'" + "".join(f"\\x{byte:02X}" for byte in value) + "'::BLOB"
        case str():
            return "'" + value.replace("'", "''") + "'"
        case datetime():
            return f"TIMESTAMP '{value:%Y-%m-%d %H:%M:%S.%f}'"
        case _:
            return str(value)


def conditions(
    key: str | None, op: str | None, outcome: str | None, since_ms: int | None, now_ms: int
) -> list[str]:
    """What --key, --op, --outcome and --since (so many milliseconds before now) ask for, in SQL."""
    found = []
    if key is not None:
        found.append(f"key = {literal(os.fsencode(key))}")
    if op is not None:
        found.append(f"op = {literal(op)}")
    if outcome is not None:
        found.append(f"outcome = {literal(outcome)}")
    if since_ms is not None:
        since = datetime.fromtimestamp(max(now_ms - since_ms, 0) / 1000, UTC)
        found.append(f"time >= {literal(since)}")
    return found


def after(positions: Mapping[str, int]) -> list[str]:
    """The condition of operations behind these positions (shard -> seq); of a shard that is not among them, all."""
    if not positions:
        return []
    newer = [f"(shard = {literal(s)} AND seq > {literal(seq)})" for s, seq in positions.items()]
    known = ", ".join(map(literal, positions))
    return ["(" + " OR ".join([*newer, f"shard NOT IN ({known})"]) + ")"]


def select(filters: Sequence[str], *, newest: bool, limit: int, whole_values: bool) -> str:
    """The query for the newest operations, the newest first, or for the oldest ones, the oldest first."""
    value = "value" if whole_values else f"value[1:{VALUE_BYTES_SHOWN}] AS value"
    columns = ", ".join(value if name == "value" else name for name in COLUMNS)
    where = f" WHERE {' AND '.join(filters)}" if filters else ""
    order = ", ".join(f"{name} DESC" if newest else name for name in ("time", "shard", "seq"))
    return f"SELECT {columns} FROM oplog{where} ORDER BY {order} LIMIT {literal(limit)}"


class _Oplog:
    """What has been shown, by shard: within one the order of seq is that of the log, so nothing is missed or shown
    twice, however late a shard's operations come in. Times alone could not tell that."""

    def __init__(self, call: Call, filters: list[str]) -> None:
        self._call, self._filters = call, filters
        self._positions: dict[str, int] = {}

    async def newest(self, db: Client, limit: int) -> list[dict[str, Any]]:
        rows = await self._ask(db, self._filters, newest=True, limit=limit)
        return rows[::-1]

    async def follow(self, db: Client, limit: int) -> None:
        """Show the newest `limit` operations, then new ones until it is cancelled."""
        self._positions = dict(
            (await db.sql("SELECT shard, max(seq) FROM oplog GROUP BY shard")).rows
        )
        self._show(await self.newest(db, limit))
        while True:
            filters = [*self._filters, *after(self._positions)]
            rows = await self._ask(db, filters, newest=False, limit=POLL_ROWS_MAX)
            self._show(rows)
            if len(rows) < POLL_ROWS_MAX:
                await asyncio.sleep(POLL_INTERVAL_S)

    async def _ask(
        self, db: Client, filters: list[str], *, newest: bool, limit: int
    ) -> list[dict[str, Any]]:
        whole = self._call.out.as_json
        found = await db.sql(select(filters, newest=newest, limit=limit, whole_values=whole))
        return [dict(zip(COLUMNS, row, strict=True)) for row in found.rows]

    def _show(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            shard, seq = row["shard"], row["seq"]
            self._positions[shard] = max(seq, self._positions.get(shard, 0))
            if self._call.out.as_json:
                self._call.out.document(row)
            else:
                self._call.out.line(
                    "  ".join("-" if cell is None else cell for cell in _shown(row))
                )


async def _until_interrupted(log: _Oplog, db: Client, limit: int) -> None:
    """Follow until Ctrl-C or SIGTERM, which is the orderly end of it."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await unless_stopped(log.follow(db, limit), stop)


_SHOWN = ("time", "shard", "version", "op", "key", "value", "request_id")


def _shown(row: dict[str, Any]) -> list[str | None]:
    """The cells of a line for people."""
    version = f"{row['epoch']},{row['seq']}"
    key, value = (None if row[n] is None else bytes_text(row[n]) for n in ("key", "value"))
    return [row["time"], row["shard"], version, row["op"], key, value, row["request_id"]]
