"""Files of operations, as `bus-kv batch` reads them: JSON lines, or one JSON list."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.errors import MalformedRequest
from bus_kv.knobs import OPS_MAX
from bus_kv.protocol.codec import decode_body

if TYPE_CHECKING:
    from collections.abc import Iterator

_PART_OPERATIONS = 1000
_PART_BYTES = 256 * 1024
"""Fits into one message also where max_payload is half its default."""


def parse(text: bytes) -> list[dict[str, Any]]:
    """The operations, keys and values as bytes. Raises MalformedRequest, naming the line."""
    stripped = text.strip()
    if stripped.startswith(b"["):
        operations = decode_body(b'{"ops":' + stripped + b"}")[1]["ops"]
    else:
        lines = enumerate(text.splitlines(), start=1)
        operations = [_line(number, line) for number, line in lines if line.strip()]
    if not operations:
        raise MalformedRequest("there are no operations in the file")
    for number, operation in enumerate(operations, start=1):
        _check(number, operation)
    return list(operations)


def _line(number: int, line: bytes) -> dict[str, Any]:
    try:
        return decode_body(line.strip())[1]
    except MalformedRequest as error:
        raise MalformedRequest(f"line {number}: {error.message}") from None


def _check(number: int, operation: Any) -> None:
    """What the command itself relies on; the node checks the rest."""
    if not isinstance(operation, dict) or "op" not in operation or "key" not in operation:
        raise MalformedRequest(f"operation {number} is no object with op and key")
    if operation["op"] not in ("get", "put", "delete"):
        raise MalformedRequest(f"op of operation {number} is not one of get, put, delete")


def parts(operations: list[dict[str, Any]], *, atomic: bool) -> Iterator[list[dict[str, Any]]]:
    """Cut into requests; an atomic batch is one. Raises MalformedRequest when that is too long."""
    if atomic:
        if len(operations) > OPS_MAX:
            raise MalformedRequest(f"an atomic batch has at most {OPS_MAX} operations")
        yield operations
        return
    part: list[dict[str, Any]] = []
    size_bytes = 0
    for operation in operations:
        size = 64 + len(operation["key"]) + len(operation.get("value") or b"")
        if part and (len(part) == _PART_OPERATIONS or size_bytes + size > _PART_BYTES):
            yield part
            part, size_bytes = [], 0
        part.append(operation)
        size_bytes += size
    yield part
