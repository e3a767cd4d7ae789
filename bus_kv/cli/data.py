"""Commands about keys: get, put, delete, scan, batch."""

from __future__ import annotations

import os
import re
import secrets
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bus_kv.cli import operations_file
from bus_kv.cli.command import Call, CommandFailed, ask, command
from bus_kv.cli.output import show, version_text
from bus_kv.knobs import SCAN_LIMIT_DEFAULT, SCAN_LIMIT_MAX
from bus_kv.runtime.process import FAILED, OK

if TYPE_CHECKING:
    from bus_kv.client.client import Client

_TTL = re.compile(r"(\d+)(ms|s|m|h|d)")
_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


class Level(StrEnum):
    ONE = "one"
    QUORUM = "quorum"
    ALL = "all"


def duration_ms(text: str) -> int:
    match = _TTL.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no duration: write 500ms, 60s, 5m, 2h or 7d")
    return int(match[1]) * _UNIT_MS[match[2]]


def _version(text: str) -> list[int]:
    match = re.fullmatch(r"\[?(\d+), ?(\d+)\]?", text)
    if match is None:
        raise typer.BadParameter(
            f"{text!r} is no version: write EPOCH,SEQ as get shows it, like 3,42"
        )
    return [int(match[1]), int(match[2])]


Key = Annotated[str, typer.Argument(help="1 byte to 4 KiB", show_default=False)]
Keyspace = Annotated[str, typer.Option(help="keyspace of the key")]
Consistency = Annotated[
    Level | None, typer.Option(help="how many replicas must agree (default: the keyspace's)")
]
IfVersion = Annotated[
    Any, typer.Option(parser=_version, metavar="EPOCH,SEQ", help="only if the key has this version")
]


def register(app: typer.Typer) -> None:
    for name, body in (
        ("get", get),
        ("put", put),
        ("delete", delete),
        ("scan", scan),
        ("batch", batch),
    ):
        command(app, name)(body)


async def get(
    call: Call, key: Key, keyspace: Keyspace = "default", consistency: Consistency = None
) -> int:
    """Print the value of a key. Exit code 1 if it is absent.

    The value goes to stdout as it is, with a newline after it on a terminal only.

    - `bus-kv get apple`
    - `bus-kv get photo > photo.png`
    - `bus-kv get apple --json`
    """
    reply = await ask(call.options, lambda db: db.call("get", _fields(key, keyspace, consistency)))
    if call.out.as_json:
        call.out.document(reply)
    elif reply["found"]:
        _write(reply["value"])
    else:
        call.out.note(f"bus-kv: key {show(os.fsencode(key))} is absent")
    return OK if reply["found"] else FAILED


async def put(
    call: Call,
    key: Key,
    value: Annotated[str, typer.Argument(help="'-' reads it from stdin", show_default=False)],
    ttl: Annotated[
        Any,
        typer.Option(
            parser=duration_ms, metavar="DURATION", help="lifetime: 500ms, 60s, 5m, 2h, 7d"
        ),
    ] = None,
    ttl_ms: Annotated[int | None, typer.Option(min=1, help="lifetime in milliseconds")] = None,
    if_absent: Annotated[
        bool, typer.Option("--if-absent", help="only if there is no such key")
    ] = False,
    if_version: IfVersion = None,
    keyspace: Keyspace = "default",
    consistency: Consistency = None,
) -> int:
    """Write a key. It is on disk when the command returns.

    - `bus-kv put apple fruit`
    - `bus-kv put photo - < photo.png`
    - `bus-kv put lock me --if-absent --ttl 60s`

    A value that starts with a dash stands after two of them: bus-kv put apple -- -5
    """
    if ttl is not None and ttl_ms is not None:
        raise typer.BadParameter("--ttl and --ttl-ms say the same: give one of them")
    if if_absent and if_version is not None:
        raise typer.BadParameter("--if-absent and --if-version exclude each other")
    fields = _write_fields(key, keyspace, consistency)
    fields["value"] = sys.stdin.buffer.read() if value == "-" else os.fsencode(value)
    fields |= {"if_absent": True} if if_absent else {}
    fields |= {"if_version": if_version} if if_version is not None else {}
    lifetime_ms = ttl_ms if ttl is None else ttl
    fields |= {"ttl_ms": lifetime_ms} if lifetime_ms is not None else {}
    reply = await ask(call.options, lambda db: db.call("put", fields))
    _tell_receipt(call, "replaced" if reply["found"] else "created", reply)
    return OK


async def delete(
    call: Call,
    key: Key,
    if_version: IfVersion = None,
    keyspace: Keyspace = "default",
    consistency: Consistency = None,
) -> int:
    """Delete a key. Deleting an absent key is no failure.

    - `bus-kv delete apple`
    - `bus-kv delete apple --if-version 3,42`
    """
    fields = _write_fields(key, keyspace, consistency)
    fields |= {"if_version": if_version} if if_version is not None else {}
    reply = await ask(call.options, lambda db: db.call("delete", fields))
    _tell_receipt(call, "deleted" if reply["found"] else "was absent", reply)
    return OK


async def scan(
    call: Call,
    start: Annotated[str | None, typer.Option(help="first key")] = None,
    end: Annotated[str | None, typer.Option(help="the key before which it ends")] = None,
    prefix: Annotated[str | None, typer.Option(help="only keys that begin so")] = None,
    limit: Annotated[int, typer.Option(min=1, help="items at most")] = SCAN_LIMIT_DEFAULT,
    reverse: Annotated[
        bool, typer.Option("--reverse", help="from the last key to the first")
    ] = False,
    keys_only: Annotated[bool, typer.Option("--keys-only", help="without values")] = False,
    cursor: Annotated[
        str | None, typer.Option(help="go on where a scan with these options ended")
    ] = None,
    keyspace: Keyspace = "default",
    consistency: Consistency = None,
) -> int:
    """List keys in order: all, from --start up to --end, or those with a --prefix.

    - `bus-kv scan --prefix user/ --limit 20`
    - `bus-kv scan --start a --end m --reverse --keys-only`
    """
    fields: dict[str, Any] = {"keyspace": keyspace, "reverse": reverse, "keys_only": keys_only}
    bounds = {"start": start, "end": end, "prefix": prefix}
    fields |= {name: os.fsencode(text) for name, text in bounds.items() if text is not None}
    fields |= {} if consistency is None else {"consistency": str(consistency)}
    fields |= {} if cursor is None else {"cursor": cursor}
    items, cursor = await ask(call.options, lambda db: _pages(db, fields, limit))
    if call.out.as_json:
        call.out.document({"items": items, "cursor": cursor})
        return OK
    columns = ["key", "version"] if keys_only else ["key", "value", "version"]
    call.out.table(columns, [_scan_row(item, columns) for item in items])
    if cursor is not None:
        call.out.note(f"there is more: raise --limit, or add --cursor {cursor}")
    return OK


async def _pages(
    db: Client, fields: dict[str, Any], limit: int
) -> tuple[list[dict[str, Any]], str | None]:
    """Up to `limit` items, and the cursor after them (None at the end)."""
    items: list[dict[str, Any]] = []
    while True:
        page = await db.call("scan", {**fields, "limit": min(limit - len(items), SCAN_LIMIT_MAX)})
        items += page["items"]
        cursor: str | None = page["cursor"]
        if cursor is None or len(items) >= limit:
            return items, cursor
        fields = {**fields, "cursor": cursor}


def _scan_row(item: dict[str, Any], columns: list[str]) -> list[Any]:
    return [version_text(item[name]) if name == "version" else item[name] for name in columns]


async def batch(
    call: Call,
    file: Annotated[str, typer.Argument(help="'-' reads stdin", show_default=False)],
    atomic: Annotated[
        bool, typer.Option("--atomic", help="all or nothing; then it must fit into one message")
    ] = False,
    keyspace: Keyspace = "default",
    consistency: Consistency = None,
) -> int:
    """Do many operations, in order: one JSON object per line, or one JSON list.

    An operation is {"op":"put","key":"a","value":"1"}, {"op":"get","key":"a"} or
    {"op":"delete","key":"a"}; puts take ttl_ms, if_absent, if_version; key_b64 and value_b64 take
    base64. Exit code 1 if any of them failed.

    - `bus-kv batch operations.jsonl`
    - `bus-kv batch - --atomic < operations.json`
    """
    operations = operations_file.parse(_read(file))
    shared: dict[str, Any] = {"keyspace": keyspace, "atomic": atomic}
    shared |= {} if consistency is None else {"consistency": str(consistency)}
    results = await ask(call.options, lambda db: _batches(db, operations, shared))
    if call.out.as_json:
        call.out.document({"results": results})
    else:
        pairs = zip(operations, results, strict=True)
        rows = [_batch_row(operation, result) for operation, result in pairs]
        call.out.table(["op", "key", "result", "version"], rows)
    return FAILED if any("code" in result for result in results) else OK


async def _batches(
    db: Client, operations: list[dict[str, Any]], shared: dict[str, Any]
) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for part in operations_file.parts(operations, atomic=shared["atomic"]):
        results += (await db.call("batch", {**shared, "ops": part}))["results"]
    return results


def _batch_row(operation: dict[str, Any], result: dict[str, Any]) -> list[Any]:
    op, key = operation["op"], operation["key"]
    if "code" in result:
        return [op, key, f"{result['code']}: {result['message']}", None]
    words = {"put": ("created", "replaced"), "delete": ("was absent", "deleted")}
    outcome = words[op][result["found"]] if op in words else result.get("value", "is absent")
    return [op, key, outcome, version_text(result.get("version"))]


def _fields(key: str, keyspace: str, consistency: Level | None) -> dict[str, Any]:
    fields = {"key": os.fsencode(key), "keyspace": keyspace}
    return fields if consistency is None else fields | {"consistency": str(consistency)}


def _write_fields(key: str, keyspace: str, consistency: Level | None) -> dict[str, Any]:
    """With an identity, so that sending it again does not do it twice."""
    identity = f"{secrets.token_hex(8)}:1"
    return _fields(key, keyspace, consistency) | {"request_id": identity}


def _tell_receipt(call: Call, word: str, reply: dict[str, Any]) -> None:
    if call.out.as_json:
        return call.out.document(reply)
    version = version_text(reply["version"])
    at = "" if version is None else f" at version {version} of shard {reply['shard']}"
    return call.out.line(f"{word}{at}")


def _write(value: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(value + (b"\n" if sys.stdout.isatty() else b""))
    sys.stdout.buffer.flush()


def _read(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read()
        with open(file, "rb") as stream:
            return stream.read()
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandFailed("FILE", f"cannot read {file}: {reason}") from None
