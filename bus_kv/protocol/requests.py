"""The verbs of contract §2: a decoded body becomes a typed request, or MalformedRequest names what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv import knobs
from bus_kv.errors import (
    KeyspaceUnknown,
    KeyTooLarge,
    MalformedRequest,
    ShardUnknown,
    UnknownVerb,
)  # fmt: skip
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch, BatchReply
from bus_kv.subjects import is_id

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.sizes import Sizes

RequestId: TypeAlias = tuple[str, int]
"""(client, number)."""

_REQUEST_ID = re.compile(r"(?P<client>.{1,64}):(?P<number>[0-9]{1,20})\Z", re.DOTALL)


@dataclass(slots=True)
class DataRequest:
    """get, put, delete or batch: operations that have no identity yet."""

    verb: str
    keyspace: str
    consistency: str | None
    request_id: RequestId | None
    batch: Batch


@dataclass(slots=True)
class ScanRequest:
    """Keys of [start, end), or of `prefix`, from the low or the high end. `end` None is the end of the keyspace."""

    keyspace: str
    consistency: str | None
    start: bytes = b""
    end: bytes | None = None
    limit: int = knobs.SCAN_LIMIT_DEFAULT
    reverse: bool = False
    keys_only: bool = False
    count_only: bool = False
    erase: RequestId | None = None
    """Delete what is found instead of returning it, as this request (a batch's `delete_prefix`)."""
    verb: str = field(default="scan", init=False)

    def to_wire(self) -> dict[str, Any]:
        return {
            "start": self.start, "end": self.end, "limit": self.limit,
            "reverse": self.reverse, "keys_only": self.keys_only,
            "count_only": self.count_only, "erase": self.erase and [*self.erase],
            "consistency": self.consistency,
        }  # fmt: skip


@dataclass(slots=True)
class HistoryRequest:
    """Versions of a key, newest first, those before `before`."""

    keyspace: str
    key: bytes
    limit: int = knobs.SCAN_LIMIT_DEFAULT
    before: b.Version | None = None
    consistency: str | None = None
    verb: str = field(default="history", init=False)

    def to_wire(self) -> dict[str, Any]:
        return {"key": self.key, "limit": self.limit, "before": self.before}


@dataclass(slots=True)
class ReceiptRequest:
    """What became of the write with this version: see `Replica.fate`."""

    keyspace: str
    shard: str
    version: b.Version
    consistency: str | None = None
    verb: str = field(default="receipt", init=False)

    def to_wire(self) -> list[int]:
        return [*self.version]


@dataclass(slots=True)
class SqlRequest:
    query: str
    verb: str = field(default="sql", init=False)


@dataclass(slots=True)
class InfoRequest:
    """health, stats or map."""

    verb: str
    cached: bool = False
    """map only: answer from the node's own copy, for a client that cannot reach the store through any node."""


PageRequest: TypeAlias = ScanRequest | HistoryRequest
"""What one shard answers a page at a time."""
ShardRequest: TypeAlias = PageRequest | ReceiptRequest
"""What goes to one shard as it is."""
Request: TypeAlias = DataRequest | ShardRequest | SqlRequest | InfoRequest


def parse_request(verb: str, body: dict[str, Any], sizes: Sizes) -> Request:
    """Raises UnknownVerb, MalformedRequest, KeyTooLarge, ValueTooLarge, KeyspaceUnknown, ShardUnknown."""
    parse = _PARSERS.get(verb)
    if parse is None:
        raise UnknownVerb(f"there is no verb {verb!r}; there are {', '.join(VERBS)}")
    request = parse(verb, body)
    if isinstance(request, DataRequest):
        b.check_values([v for v in request.batch.values if v is not None], sizes.value)
        if len(request.batch) > sizes.operations:
            raise MalformedRequest(f"ops holds at most {sizes.operations} operations")
    return request


def parse_request_id(text: Any) -> RequestId:
    match = _REQUEST_ID.match(text) if type(text) is str else None
    if match is None or int(match["number"]) > knobs.NUMBER_MAX:
        raise MalformedRequest(
            "request_id is '<client>:<number>', a client of 1 to 64 characters and an unsigned 64-bit number"
        )
    return match["client"], int(match["number"])


class _Fields:
    """Reads the fields of one map, each at most once, and refuses what is left over."""

    def __init__(self, body: dict[str, Any], what: str) -> None:
        self.body, self.what, self.known = body, what, set[str]()

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        self.known.add(name)
        value = self.body.get(name)
        if value is None and name not in self.body:
            return default
        if type(value) is not kind:
            raise MalformedRequest(f"{name} of {self.what} is not {_KIND_NAMES[kind]}")
        return value

    def key(self) -> bytes:
        key: bytes | None = self.take("key", bytes)
        if key is None:
            raise MalformedRequest(f"{self.what} needs a key")
        b.check_keys([key])
        return key

    def finish(self) -> None:
        for name in self.body:
            if name not in self.known:
                raise MalformedRequest(f"{self.what} has no field {name!r}")


_KIND_NAMES = {
    bytes: "text or bytes", int: "a whole number", bool: "true or false",
    str: "text", list: "a list", dict: "a map",
}  # fmt: skip


def _common(fields: _Fields) -> tuple[str, str | None, RequestId | None]:
    keyspace = fields.take("keyspace", str, "default")
    if not keyspace:
        raise MalformedRequest(f"keyspace of {fields.what} is empty")
    if not is_id(keyspace):
        raise KeyspaceUnknown(f"there is no keyspace {keyspace!r}")
    consistency = fields.take("consistency", str)
    if consistency is not None and consistency not in b.CONSISTENCIES:
        raise MalformedRequest(f"consistency {consistency!r} is not one of one, quorum, all")
    request_id = fields.take("request_id", str)
    return keyspace, consistency, None if request_id is None else parse_request_id(request_id)


def parse_common(body: dict[str, Any], what: str) -> tuple[str, str | None, RequestId | None]:
    """(keyspace, consistency, request_id) of a request that has other fields too. Raises MalformedRequest."""
    return _common(_Fields(body, what))


def _single(verb: str, body: dict[str, Any]) -> DataRequest:
    fields = _Fields(body, verb)
    keyspace, consistency, request_id = _common(fields)
    batch = Batch(kinds=bytes([b.KIND_NAMES.index(verb)]), keys=[])
    _add_operation(batch, verb, fields)
    fields.finish()
    return DataRequest(verb, keyspace, consistency, request_id, batch)


def _batch(verb: str, body: dict[str, Any]) -> DataRequest | ScanRequest:
    fields = _Fields(body, verb)
    keyspace, consistency, request_id = _common(fields)
    operations = fields.take("ops", list)
    atomic = fields.take("atomic", bool, False)
    fields.finish()
    if operations and any(_is_delete_prefix(operation) for operation in operations):
        if len(operations) > 1:
            raise MalformedRequest("delete_prefix is the only operation of its batch")
        return _delete_prefix(operations[0], keyspace, consistency, request_id)
    batch = parse_operations(operations)
    batch.atomic = atomic
    return DataRequest(verb, keyspace, consistency, request_id, batch)


def _is_delete_prefix(operation: Any) -> bool:
    return type(operation) is dict and operation.get("op") == "delete_prefix"


def _delete_prefix(
    operation: dict[str, Any], keyspace: str, consistency: str | None, id: RequestId | None
) -> ScanRequest:
    fields = _Fields(operation, "operation 0")
    fields.take("op", str)
    prefix = fields.take("prefix", bytes)
    if not prefix:
        raise MalformedRequest("delete_prefix needs a prefix")
    b.check_keys([prefix])
    fields.finish()
    return ScanRequest(
        keyspace, consistency, prefix, prefix_end(prefix), knobs.ERASE_KEYS_MAX, keys_only=True,
        erase=id or ("", 0),
    )  # fmt: skip


def parse_operations(operations: Any) -> Batch:
    """The `ops` of a batch or of a shard request, as a batch without identity. Raises MalformedRequest."""
    if type(operations) is not list or not 0 < len(operations) <= knobs.OPS_MAX:
        raise MalformedRequest(f"ops is a list of 1 to {knobs.OPS_MAX} operations")
    batch = Batch(kinds=b"", keys=[])
    kinds = bytearray()
    for i, operation in enumerate(operations):
        if type(operation) is not dict:
            raise MalformedRequest(f"operation {i} is not a map")
        fields = _Fields(operation, f"operation {i}")
        verb = fields.take("op", str)
        if verb not in ("get", "put", "delete"):
            raise MalformedRequest(f"op of operation {i} is not one of get, put, delete")
        try:
            _add_operation(batch, verb, fields)
        except KeyTooLarge as error:
            raise KeyTooLarge(f"operation {i}: {error.message}") from None
        fields.finish()
        kinds.append(b.KIND_NAMES.index(verb))
    batch.kinds = bytes(kinds)
    return batch


def _add_operation(batch: Batch, verb: str, fields: _Fields) -> None:
    i = len(batch.keys)
    batch.keys.append(fields.key())
    value = fields.take("value", bytes) if verb == "put" else None
    if verb == "put" and value is None:
        raise MalformedRequest(f"{fields.what} needs a value")
    batch.values.append(value)
    if verb != "get":
        _add_condition(batch, i, verb, fields)


def _add_condition(batch: Batch, i: int, verb: str, fields: _Fields) -> None:
    if_version = fields.take("if_version", list)
    if_absent = fields.take("if_absent", bool, False) if verb == "put" else False
    if if_version is not None and if_absent:
        raise MalformedRequest(f"{fields.what} has both if_absent and if_version")
    if if_version is not None:
        batch.conditions[i] = b.as_version(if_version)
    elif if_absent:
        batch.conditions[i] = None
    ttl_ms = fields.take("ttl_ms", int) if verb == "put" else None
    if ttl_ms is not None:
        b.check_ttl(ttl_ms)
        batch.ttls_ms[i] = ttl_ms


def _scan(verb: str, body: dict[str, Any]) -> ScanRequest:
    fields = _Fields(body, verb)
    keyspace, consistency, _ = _common(fields)
    request = ScanRequest(keyspace, consistency)
    cursor = fields.take("cursor", str) if body.get("cursor") is not None else None
    fields.known.add("cursor")
    read_range(request, fields.take)
    prefix = fields.take("prefix", bytes)
    fields.finish()
    if prefix:
        request.start = max(request.start, prefix)
        request.end = _least(request.end, prefix_end(prefix))
    if cursor is not None:
        _resume(request, cursor)
    return request


def read_range(request: ScanRequest, take: Callable[..., Any]) -> None:
    """Fill in what a scan and its form on a shard's subject have in common."""
    request.start = take("start", bytes, b"")
    request.end = take("end", bytes)
    request.limit = _limit(take)
    request.reverse = take("reverse", bool, False)
    request.keys_only = take("keys_only", bool, False)
    request.count_only = take("count_only", bool, False)


def _limit(take: Callable[..., Any]) -> int:
    limit: int = take("limit", int, knobs.SCAN_LIMIT_DEFAULT)
    if not 1 <= limit <= knobs.SCAN_LIMIT_MAX:
        raise MalformedRequest(f"limit is from 1 to {knobs.SCAN_LIMIT_MAX}")
    return limit


def parse_shard_scan(body: Any) -> ScanRequest:
    """The `scan` field of a shard request."""
    if type(body) is not dict:
        raise MalformedRequest("scan is not a map")
    fields = _Fields({k: v for k, v in body.items() if v is not None}, "scan")
    request = ScanRequest("default", fields.take("consistency", str))
    read_range(request, fields.take)
    erase = fields.take("erase", list)
    fields.finish()
    if erase is not None:
        request.erase = parse_request_id(":".join(map(str, erase)))
    return request


def _history(verb: str, body: dict[str, Any]) -> HistoryRequest:
    fields = _Fields(body, verb)
    keyspace, consistency, _ = _common(fields)
    cursor = fields.take("cursor", str) if body.get("cursor") is not None else None
    fields.known.add("cursor")
    request = HistoryRequest(keyspace, fields.key(), _limit(fields.take), None, consistency)
    fields.finish()
    if cursor is not None:
        epoch, _, seq = cursor.partition(".")
        if not (epoch.isdecimal() and seq.isdecimal()):
            raise MalformedRequest("cursor is not one that history has returned")
        request.before = (int(epoch), int(seq))
    return request


def parse_shard_history(body: Any) -> HistoryRequest:
    """The `history` field of a shard request."""
    if type(body) is not dict:
        raise MalformedRequest("history is not a map")
    fields = _Fields({k: v for k, v in body.items() if v is not None}, "history")
    request = HistoryRequest("default", fields.key(), _limit(fields.take))
    before = fields.take("before", list)
    fields.finish()
    request.before = None if before is None else b.as_version(before)
    return request


def _receipt(verb: str, body: dict[str, Any]) -> ReceiptRequest:
    fields = _Fields(body, verb)
    keyspace, consistency, _ = _common(fields)
    shard = fields.take("shard", str)
    version = fields.take("version", list)
    fields.finish()
    if not shard:
        raise MalformedRequest("receipt needs a shard")
    if version is None:
        raise MalformedRequest("receipt needs a version, [epoch, seq]")
    if not is_id(shard):
        raise ShardUnknown(f"there is no shard {shard!r}")
    # A keyspace at ONE is no reason to take one replica's word for what all of them have.
    return ReceiptRequest(keyspace, shard, b.as_version(version), consistency or "quorum")


def parse_shard_receipt(shard: str, version: Any) -> ReceiptRequest:
    """The `receipt` field of a shard request."""
    return ReceiptRequest("default", shard, b.as_version(version))


def _sql(verb: str, body: dict[str, Any]) -> SqlRequest:
    fields = _Fields(body, verb)
    _common(fields)
    query: str | None = fields.take("query", str)
    fields.finish()
    if not query:
        raise MalformedRequest("sql needs a query")
    return SqlRequest(query)


def _least(a: bytes | None, other: bytes | None) -> bytes | None:
    return min((x for x in (a, other) if x is not None), default=None)


def prefix_end(prefix: bytes) -> bytes | None:
    """The first key after every key with this prefix; None when that is the end of all keys."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None


def make_cursor(request: ScanRequest, position: bytes) -> str:
    """Where the next page begins: `position` is its lowest key, or in reverse its exclusive highest."""
    return ("r" if request.reverse else "f") + position.hex()


def cursor_before(last_key: bytes, next_key: bytes, reverse: bool) -> str:
    """The cursor of a page that ends with `last_key` and would go on with `next_key`."""
    return f"r{last_key.hex()}" if reverse else f"f{next_key.hex()}"


def _resume(request: ScanRequest, cursor: str) -> None:
    try:
        direction, position = cursor[:1], bytes.fromhex(cursor[1:])
    except ValueError:
        direction = ""
    if direction != ("r" if request.reverse else "f"):
        raise MalformedRequest("cursor is not one that a scan with the same fields has returned")
    if request.reverse:
        request.end = _least(request.end, position)
    else:
        request.start = max(request.start, position)


def _info(verb: str, body: dict[str, Any]) -> InfoRequest:
    fields = _Fields(body, verb)
    _common(fields)
    cached = fields.take("cached", bool, False) if verb == "map" else False
    fields.finish()
    return InfoRequest(verb, cached)


_PARSERS: dict[str, Callable[[str, dict[str, Any]], Request]] = {
    "get": _single, "put": _single, "delete": _single, "batch": _batch, "scan": _scan,
    "history": _history, "receipt": _receipt, "sql": _sql,
    "health": _info, "stats": _info, "map": _info,
}  # fmt: skip


VERBS = tuple(_PARSERS)
"""What any node answers."""


def result_of(batch: Batch, reply: BatchReply, i: int, shard: str, node: str) -> dict[str, Any]:
    """The reply of contract §2 to one operation of a batch; a failed one is its failure body."""
    if i in reply.failures:
        return reply.failures[i]
    version = reply.version(i)
    if batch.kinds[i] == b.GET:
        return _get_result(batch, reply, i, shard, node)
    return {
        "version": None if version is None else list(version),
        "shard": shard,
        "consistency": batch.consistency,
        "found": reply.outcomes[i] in (b.REPLACED, b.DELETED),
    }


def _get_result(batch: Batch, reply: BatchReply, i: int, shard: str, node: str) -> dict[str, Any]:
    result: dict[str, Any] = {"key": batch.keys[i], "found": reply.outcomes[i] == b.FOUND}
    version = reply.version(i)
    if result["found"] and version is not None:
        assert reply.values is not None
        result |= {"value": reply.values[i], "version": list(version)}
        if i in reply.expires_at:
            result["expires_at"] = reply.expires_at[i]
    result |= {"shard": shard, "node": node, "consistency": batch.consistency}
    if reply.read is not None:
        result["read"] = dict(zip(("epoch", "seq", "age_ms"), reply.read, strict=True))
    return result
