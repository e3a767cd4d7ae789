"""Values of a query as people and JSON see them."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from typing import Any

from bus_kv.cli.output import show

_HEX_BYTES_MAX = 96
"""Longer bytes that are no text are cut in a table."""


def cell_text(cell: Any) -> str:
    """As a table shows it: digit by digit, bytes as text when they are UTF-8, else as hex."""
    match cell:
        case None:
            return "NULL"
        case bool():
            return "true" if cell else "false"
        case str():
            return show(cell.encode())
        case bytes():
            return bytes_text(cell)
        case dict() | list():
            return show(json.dumps(json_cell(cell), ensure_ascii=False).encode())
        case _:
            return str(cell)


def bytes_text(data: bytes) -> str:
    try:
        data.decode()
    except UnicodeDecodeError:
        cut = "…" if len(data) > _HEX_BYTES_MAX else ""
        return f"0x{data[:_HEX_BYTES_MAX].hex()}{cut}"
    return show(data)


def json_cell(cell: Any) -> Any:
    """As JSON holds it: bytes as text when they are UTF-8, else as {"b64": …}."""
    match cell:
        case bytes():
            try:
                return cell.decode()
            except UnicodeDecodeError:
                return {"b64": base64.b64encode(cell).decode()}
        case list():
            return [*map(json_cell, cell)]
        case dict():
            return {name: json_cell(inner) for name, inner in cell.items()}
        case _:
            return cell


def time_text(time_ms: int) -> str:
    """Milliseconds since the Unix epoch as ISO 8601 in UTC."""
    time = datetime.fromtimestamp(time_ms / 1000, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
