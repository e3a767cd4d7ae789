"""What `bus-kv load` makes of a file's rows: key, value and lifetime, checked, and gathered into chunks."""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bus_kv.cli.row_files import Place, RowsError
from bus_kv.errors import BusKVError
from bus_kv.knobs import KEY_BYTES_MAX
from bus_kv.protocol import batch as b
from bus_kv.protocol.codec import to_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bus_kv.cli.row_files import RowFile

CHUNK_ROWS_MAX = 2000
CHUNK_BYTES_MAX = 1 << 20

Row = tuple[bytes, bytes, int | None]
"""Key, value, ttl_ms."""


class BadRow(RowsError):
    """One row cannot be loaded; the message names it."""


@dataclass(frozen=True)
class Shape:
    """Which columns make a row. With `json_value` the value is the whole row as a JSON object."""

    key_column: str = "key"
    value_column: str = "value"
    json_value: bool = False
    value_bytes_max: int = 0
    """Largest value that the cluster takes."""

    def wanted(self) -> list[str]:
        """Columns that may take part, in either spelling."""
        names = (self.key_column, self.value_column)
        return [*names, *(f"{name}_b64" for name in names), "ttl_ms"]

    def unused(self, columns: Sequence[str]) -> list[str]:
        """The columns that are not loaded. Raises RowsError when one that must be there is not."""
        needed = [self.key_column] if self.json_value else [self.key_column, self.value_column]
        for name in needed:
            if name not in columns and f"{name}_b64" not in columns:
                raise RowsError(
                    f"there is no column {name!r}; there are {', '.join(columns)}: choose with "
                    "--key-column and --value-column, or --json-value for whole rows"
                )
        return [] if self.json_value else [n for n in columns if n not in self.wanted()]

    @property
    def is_plain(self) -> bool:
        """Whether nothing was chosen: then a field without a meaning is a mistake rather than of no interest."""
        return (self.key_column, self.value_column, self.json_value) == ("key", "value", False)

    def row(self, cells: dict[str, Any], *, strict: bool) -> Row:
        """Raises BadRow; with `strict` also for a field that has no meaning."""
        if strict and not cells.keys() <= _PLAIN_FIELDS:
            unknown = min(cells.keys() - _PLAIN_FIELDS)
            raise BadRow(f"there is no field {unknown!r}; see --value-column, --json-value")
        try:
            key = _bytes_of(cells, self.key_column)
            value = _json(cells) if self.json_value else _bytes_of(cells, self.value_column)
            ttl_ms = _ttl_ms(cells.get("ttl_ms"))
            if not 0 < len(key) <= KEY_BYTES_MAX:
                b.check_keys([key])
            if len(value) > self.value_bytes_max:
                b.check_values([value], self.value_bytes_max)
        except UnicodeEncodeError:
            raise BadRow("it holds a lone surrogate, which is no text") from None
        except BusKVError as error:
            raise BadRow(error.message) from None
        return key, value, ttl_ms


_PLAIN_FIELDS = frozenset(Shape().wanted())


def _bytes_of(cells: dict[str, Any], name: str) -> bytes:
    cell = cells.get(name)
    if isinstance(cell, str):
        return cell.encode()
    if isinstance(cell, bytes):
        return cell
    if type(cell) is int:
        return str(cell).encode()
    if cell is not None:
        raise BadRow(f"{name} is neither text nor bytes; --json-value takes whole rows")
    encoded = cells.get(f"{name}_b64")
    if encoded is None:
        raise BadRow(f"{name} is missing")
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise BadRow(f"{name}_b64 is not base64 text") from None


def _ttl_ms(cell: Any) -> int | None:
    if cell is None or cell == "":
        return None
    ttl_ms = int(cell) if isinstance(cell, str) and cell.isdecimal() else cell
    b.check_ttl(ttl_ms)
    return int(ttl_ms)


def _json(cells: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(
            to_json(cells), ensure_ascii=False, separators=(",", ":"), allow_nan=False,
            default=_json_cell,
        )  # fmt: skip
    except ValueError as error:
        raise BadRow(f"it cannot be written as JSON: {error}") from None
    return text.encode()


def _json_cell(cell: Any) -> str:
    """What JSON has no form for: bytes within a list, times, decimals."""
    if isinstance(cell, bytes):
        return base64.b64encode(cell).decode()
    return cell.isoformat() if hasattr(cell, "isoformat") else str(cell)


# ---- chunks ----


@dataclass
class Chunk:
    """Rows that are written and acknowledged together."""

    end: Place
    rows: dict[bytes, tuple[bytes, int | None]] = field(default_factory=dict)
    """The last row of each key counts."""
    count: int = 0
    bad: list[str] = field(default_factory=list)
    """What is wrong with the rows that were left out."""
    size_bytes: int = 0

    def add(self, row: Row) -> None:
        key, value, ttl_ms = row
        self.rows[key] = (value, ttl_ms)
        self.count += 1
        self.size_bytes += len(key) + len(value)

    @property
    def is_full(self) -> bool:
        rows = self.count + len(self.bad)
        return rows >= CHUNK_ROWS_MAX or self.size_bytes >= CHUNK_BYTES_MAX

    def by_ttl(self) -> dict[int | None, list[tuple[bytes, bytes]]]:
        """Pairs of key and value by their lifetime."""
        groups: dict[int | None, list[tuple[bytes, bytes]]] = {}
        for key, (value, ttl_ms) in self.rows.items():
            groups.setdefault(ttl_ms, []).append((key, value))
        return groups


def chunks(file: RowFile, shape: Shape, place: Place, *, skip_bad: bool) -> Iterator[Chunk]:
    """The rows after `place`. A bad row raises BadRow, and the chunk it stands in is not handed out; with `skip_bad`
    it is left out."""
    strict = file.columns is None and shape.is_plain
    chunk = Chunk(place)
    for record in file.records(place):
        try:
            if record.problem:
                raise BadRow(record.problem)
            chunk.add(shape.row(record.cells, strict=strict))
        except BadRow as error:
            problem = f"{file.unit} {record.line}: {error}"
            if not skip_bad:
                raise BadRow(problem) from None
            chunk.bad.append(problem)
        chunk.end = record.end
        if chunk.is_full:
            yield chunk
            chunk = Chunk(record.end)
    if chunk.rows or chunk.bad:
        yield chunk
