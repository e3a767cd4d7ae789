"""Files of rows, as `bus-kv load` reads them: JSON lines, CSV, Parquet.

A row file yields Records one after the other and never holds the whole file. Each Record tells the Place after it,
where another run can begin.
"""

from __future__ import annotations

import csv
import json
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import BinaryIO

_BATCH_ROWS = 2000
"""Rows of Parquet that are decoded at once."""
LINE_BYTES_MAX = 16 << 20
"""A line, or a CSV field, that is longer is no row: without a bound, a missing quote would take all memory."""
_BOM = b"\xef\xbb\xbf"


class Format(StrEnum):
    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"


class RowsError(Exception):
    """The file cannot be read on; the message says why."""


class Place(NamedTuple):
    """Between two rows. In Parquet `line` counts rows and `offset` is only an estimate."""

    offset: int = 0
    """Bytes before it."""
    line: int = 0
    """Lines before it."""


class Record(NamedTuple):
    line: int
    """Its first line; in Parquet its number. Both count from 1."""
    end: Place
    cells: dict[str, Any]
    problem: str = ""
    """Why there are no cells."""


class RowFile(Protocol):
    unit: str
    """What Place and Record count: line or row."""

    @property
    def columns(self) -> list[str] | None:
        """None when every row names its own."""

    def records(self, place: Place) -> Iterator[Record]:
        """The rows after `place`. Raises RowsError."""


def open_rows(stream: BinaryIO, format: Format, wanted: Sequence[str] | None) -> RowFile:
    """Raises RowsError when the stream is no such file. Columns beside `wanted` need not be read; None is all."""
    match format:
        case Format.JSONL:
            return _JsonLines(stream)
        case Format.CSV:
            return _Csv(stream)
        case Format.PARQUET:
            return _Parquet(stream, wanted)


# ---- lines ----


class _Lines:
    """The lines of a stream, and the place after the last one read. An error in one does not end the iteration."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.place = Place()

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> bytes:
        line = self._stream.readline(LINE_BYTES_MAX)
        if not line:
            raise StopIteration
        offset, number = self.place
        if len(line) == LINE_BYTES_MAX:
            raise RowsError(f"line {number + 1} is longer than {LINE_BYTES_MAX} bytes")
        self.place = Place(offset + len(line), number + 1)
        return line if offset else line.removeprefix(_BOM)

    def seek(self, place: Place) -> None:
        if place != self.place:
            self._stream.seek(place.offset)
            self.place = place


class _JsonLines:
    unit = "line"
    columns = None

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = _Lines(stream)

    def records(self, place: Place) -> Iterator[Record]:
        lines = self._lines
        lines.seek(place)
        for line in lines:
            text = line.strip()
            if text:
                yield Record(lines.place.line, lines.place, *_json_cells(text))


def _json_cells(text: bytes) -> tuple[dict[str, Any], str]:
    """The object on a line, or why it is none."""
    try:
        cells = _decode_json(text.decode())
    except json.JSONDecodeError as error:
        return {}, f"it is not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return {}, f"it is not valid JSON: {error}"
    return (cells, "") if type(cells) is dict else ({}, "it is not a JSON object")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    cells = dict(pairs)
    if len(cells) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return cells


_decode_json = json.JSONDecoder(object_pairs_hook=_unique).decode
"""Made once: json.loads would make a decoder for every line."""


class _Csv:
    unit = "line"

    def __init__(self, stream: BinaryIO) -> None:
        csv.field_size_limit(LINE_BYTES_MAX)
        self._lines = _Lines(stream)
        self._rows = csv.reader(map(bytes.decode, self._lines), strict=True)
        try:
            self.columns = next(self._rows, [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise RowsError(f"line 1 cannot be read: {error}") from None
        if len({*self.columns}) != len(self.columns) or not self.columns:
            raise RowsError("line 1 must name the columns, each once: key,value")

    def records(self, place: Place) -> Iterator[Record]:
        if place.line:
            self._lines.seek(place)
        while True:
            line = self._lines.place.line + 1
            cells: list[str] = []
            try:
                cells = next(self._rows)
                problem = self._mismatch(cells)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                problem = f"it is not valid CSV in UTF-8: {error}"
            if cells or problem:
                named = {} if problem else dict(zip(self.columns, cells, strict=True))
                yield Record(line, self._lines.place, named, problem)

    def _mismatch(self, cells: list[str]) -> str:
        if not cells or len(cells) == len(self.columns):
            return ""
        return f"it has {len(cells)} fields, line 1 names {len(self.columns)}"


# ---- Parquet ----


class _Parquet:
    unit = "row"

    def __init__(self, stream: BinaryIO, wanted: Sequence[str] | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._arrow_errors = (pa.ArrowException, OSError, ValueError)
        try:
            self._file = pq.ParquetFile(stream)
        except self._arrow_errors as error:
            raise RowsError(f"it is not a Parquet file: {error}") from None
        self._size_bytes = stream.seek(0, 2)
        self.columns: list[str] = self._file.schema_arrow.names
        self._read = [name for name in self.columns if wanted is None or name in wanted]

    def records(self, place: Place) -> Iterator[Record]:
        groups, number = self._groups_from(place.line)
        total = max(self._file.metadata.num_rows, 1)
        batches = self._file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=self._read)
        try:
            for batch in batches:
                for cells in batch.to_pylist():
                    number += 1
                    if number > place.line:
                        end = Place(self._size_bytes * number // total, number)
                        yield Record(number, end, cells)
        except self._arrow_errors as error:
            raise RowsError(f"it cannot be read after row {number}: {error}") from None

    def _groups_from(self, rows: int) -> tuple[list[int], int]:
        """The row groups from the one that holds the next row on, and how many rows come before them."""
        meta, before = self._file.metadata, 0
        for group in range(meta.num_row_groups):
            count = meta.row_group(group).num_rows
            if before + count > rows:
                return [*range(group, meta.num_row_groups)], before
            before += count
        return [], before
