"""What `bus-kv load` reads from files: rows, places to go on from, and what is wrong with a bad row."""

import datetime
import decimal
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bus_kv.cli import load_rows, row_files
from bus_kv.cli.load_note import Done, Note, identity
from bus_kv.cli.load_rows import BadRow, Chunk, Shape, chunks
from bus_kv.cli.row_files import Format, Place, RowsError, open_rows

PLAIN = Shape(value_bytes_max=1000)
WHOLE = Shape(key_column="id", json_value=True, value_bytes_max=1000)
START = Place()


def parquet(columns: dict[str, Any], **options: Any) -> bytes:
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream, **options)
    return stream.getvalue()


def read(
    content: bytes, format: Format, shape: Shape = PLAIN, place: Place = START, *,
    skip_bad: bool = False,
) -> list[Chunk]:  # fmt: skip
    wanted = None if shape.json_value else shape.wanted()
    file = open_rows(io.BytesIO(content), format, wanted)
    return [*chunks(file, shape, place, skip_bad=skip_bad)]


def rows(content: bytes, format: Format, shape: Shape = PLAIN) -> dict[bytes, Any]:
    return {key: row for chunk in read(content, format, shape) for key, row in chunk.rows.items()}


# ---- what a row is ----


def test_json_lines():
    text = (
        b'\xef\xbb\xbf{"key":"a","value":"1"}\r\n\n  {"key_b64":"/w==","value_b64":"AP8="}\n'
        b'{"key":"c","value":"","ttl_ms":5}'
    )
    expected = {b"a": (b"1", None), b"\xff": (b"\x00\xff", None), b"c": (b"", 5)}
    assert rows(text, Format.JSONL) == expected


def test_csv():
    text = b'key,ttl_ms,value\r\na,,"x, ""y""\n z"\r\n\r\nb,7,\n'
    assert rows(text, Format.CSV) == {b"a": (b'x, "y"\n z', None), b"b": (b"", 7)}


def test_parquet():
    columns = {"key": [1, 2], "value": [b"\xff", b"x"], "ttl_ms": [None, 9], "more": [1.5, 2.5]}
    assert rows(parquet(columns), Format.PARQUET) == {b"1": (b"\xff", None), b"2": (b"x", 9)}


def test_chosen_columns():
    shape = Shape("id", "name", value_bytes_max=100)
    expected = {b"7": ("Zoë".encode(), None)}
    assert rows("id,name,age\n7,Zoë,40\n".encode(), Format.CSV, shape) == expected
    text = '{"id":7,"name":"Zoë","age":40}\n'.encode()
    assert rows(text, Format.JSONL, shape) == expected


def test_a_whole_row_as_json():
    line = b'{"id":"a","tags":["x",{"y":null}],"n":1.5}\n'
    (value,) = (value for value, _ in rows(line, Format.JSONL, WHOLE).values())
    assert json.loads(value) == json.loads(line)
    columns = {
        "id": ["a"],
        "day": [datetime.date(2024, 2, 29)],
        "price": [decimal.Decimal("1.10")],
        "raw": [b"\xff"],
        "parts": [[b"\xff"]],
    }
    (value,) = (value for value, _ in rows(parquet(columns), Format.PARQUET, WHOLE).values())
    assert json.loads(value) == {
        "id": "a", "day": "2024-02-29", "price": "1.10", "raw_b64": "/w==", "parts": [{"b64": "/w=="}],
    }  # fmt: skip


def test_the_last_row_of_a_key_counts():
    text = b"key,value,ttl_ms\na,1,5\nb,2,\na,3,\n"
    (chunk,) = read(text, Format.CSV)
    assert chunk.count == 3
    assert chunk.by_ttl() == {None: [(b"a", b"3"), (b"b", b"2")]}


# ---- what is wrong with it ----

BAD_LINES = [
    (b"x", "not valid JSON"),
    (b"[1]", "not a JSON object"),
    (b'{"key":"a","value":"\xff"}', "utf-8"),
    (b'{"key":"a","key":"b","value":"x"}', "stands twice"),
    (b'{"value":"x"}', "key is missing"),
    (b'{"key":"a"}', "value is missing"),
    (b'{"key":"","value":"x"}', "a key is empty"),
    (b'{"key":"a","value":1.5}', "value is neither text nor bytes"),
    (b'{"key":true,"value":"x"}', "key is neither text nor bytes"),
    (b'{"key":"a","value_b64":"!"}', "value_b64 is not base64"),
    (b'{"key":"a","value":"\\ud800"}', "surrogate"),
    (b'{"key":"a","value":"x","ttl":5}', "no field 'ttl'"),
    (b'{"key":"a","value":"x","ttl_ms":0}', "ttl_ms"),
    (b'{"key":"a","value":"x","ttl_ms":"soon"}', "ttl_ms"),
    (b'{"key":"' + b"k" * 4097 + b'","value":"x"}', "a key of 4097 bytes"),
    (b'{"key":"a","value":"' + b"v" * 1001 + b'"}', "a value of 1001 bytes"),
]


@pytest.mark.parametrize(("line", "says"), BAD_LINES)
def test_a_bad_line_is_named_or_left_out(line: bytes, says: str):
    text = b'{"key":"good","value":"1"}\n\n' + line + b'\n{"key":"later","value":"2"}\n'
    with pytest.raises(BadRow, match=says) as caught:
        read(text, Format.JSONL)
    assert str(caught.value).startswith("line 3: ")
    (chunk,) = read(text, Format.JSONL, skip_bad=True)
    assert [*chunk.rows] == [b"good", b"later"]
    assert len(chunk.bad) == 1
    assert chunk.end == Place(len(text), 4)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"c", "it has 1 fields, line 1 names 2"),
        (b"c,1,2", "it has 3 fields, line 1 names 2"),
        (b'c,"x"y', "not valid CSV"),
        (b"c,\xff", "not valid CSV in UTF-8"),
        (b",x", "a key is empty"),
    ],
)
def test_a_bad_csv_row_is_named_by_its_first_line(line: bytes, says: str):
    text = b'key,value\na,"two\nlines"\n' + line + b"\nd,4\n"
    with pytest.raises(BadRow, match=says) as caught:
        read(text, Format.CSV)
    assert str(caught.value).startswith("line 4: ")
    (chunk,) = read(text, Format.CSV, skip_bad=True)
    assert [*chunk.rows] == [b"a", b"d"]


def test_a_bad_row_of_parquet_has_its_number():
    content = parquet({"key": ["a", None], "value": ["1", "2"]})
    with pytest.raises(BadRow, match=r"^row 2: key is missing"):
        read(content, Format.PARQUET)


@pytest.mark.parametrize("format", [*Format])
def test_a_number_that_json_has_not_is_a_bad_row(format: Format):
    content = {
        Format.JSONL: b'{"id":"a","n":NaN}',
        Format.CSV: b"id,n\na,\xff\n",
        Format.PARQUET: parquet({"id": ["a"], "n": [float("nan")]}),
    }
    with pytest.raises(BadRow):
        read(content[format], format, WHOLE)


def test_nothing_of_the_chunk_with_the_bad_row_is_handed_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(load_rows, "CHUNK_ROWS_MAX", 2)
    file = open_rows(io.BytesIO(b"key,value\na,1\nb,2\nc,3\nbad\n"), Format.CSV, None)
    parts = chunks(file, PLAIN, START, skip_bad=False)
    assert [*next(parts).rows] == [b"a", b"b"]
    with pytest.raises(BadRow, match="line 5"):
        next(parts)


# ---- files that hold no rows ----


@pytest.mark.parametrize(
    ("content", "format", "says"),
    [
        (b"", Format.CSV, "name the columns"),
        (b"key,key\n", Format.CSV, "each once"),
        (b"\xff\n", Format.CSV, "line 1 cannot be read"),
        (b"key,value\n", Format.PARQUET, "not a Parquet file"),
        (parquet({"key": ["a"]})[:-20], Format.PARQUET, "not a Parquet file"),
    ],
)
def test_a_file_of_another_kind_is_told(content: bytes, format: Format, says: str):
    with pytest.raises(RowsError, match=says):
        open_rows(io.BytesIO(content), format, None)


def test_a_missing_column_is_told_with_those_that_are_there():
    with pytest.raises(
        RowsError, match=r"no column 'value'; there are key, name: .*--value-column"
    ):
        PLAIN.unused(["key", "name"])
    assert PLAIN.unused(["key_b64", "value", "ttl_ms", "name"]) == ["name"]
    assert WHOLE.unused(["id", "name"]) == []


def test_a_line_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(row_files, "LINE_BYTES_MAX", 100)
    with pytest.raises(RowsError, match="line 2 is longer than 100 bytes"):
        read(b'{"key":"a","value":"1"}\n' + b"x" * 200, Format.JSONL)
    missing_quote = b'key,value\na,"' + b"x\n" * 200
    with pytest.raises(RowsError, match=r"line 2: .*field larger than field limit"):
        read(missing_quote, Format.CSV)


# ---- going on where it was ----

LINES = b"".join(b'{"key":"%d","value":"\xc3\xab"}\n\n' % i for i in range(10))
TABLE = b"key,value\n" + b"".join(b'%d,"a\nb"\n' % i for i in range(10))
COLUMNS = {"key": [*range(10)], "value": ["x"] * 10}


@pytest.mark.parametrize(
    ("content", "format"),
    [
        (LINES, Format.JSONL),
        (TABLE, Format.CSV),
        (parquet(COLUMNS), Format.PARQUET),
        (parquet(COLUMNS, row_group_size=3), Format.PARQUET),
    ],
)
@pytest.mark.parametrize("rows_per_chunk", [1, 3, 10])
def test_from_every_place_on_come_exactly_the_rows_after_it(
    content: bytes, format: Format, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(load_rows, "CHUNK_ROWS_MAX", rows_per_chunk)
    parts = read(content, format)
    for i, part in enumerate(parts):
        later = read(content, format, place=part.end)
        assert [(c.rows, c.end) for c in later] == [(c.rows, c.end) for c in parts[i + 1 :]]
    assert parts[-1].end.offset >= len(content) - 1
    assert [key for part in parts for key in part.rows] == [b"%d" % i for i in range(10)]


def test_a_note_counts_for_the_very_same_load_only(tmp_path: Path):
    path, done = tmp_path / "note", Done(Place(100, 7), 5, 2)
    note = Note(path, {"size_bytes": 3, "root": "bkv"})
    assert note.read() is None
    note.write(done)
    assert note.read() == done
    assert Note(path, {"size_bytes": 3, "root": "other"}).read() is None
    assert [*tmp_path.iterdir()] == [path]
    note.remove()
    note.remove()
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"load":{},"place":[1]}', b"\xff"])
def test_a_torn_note_is_no_note(tmp_path: Path, content: bytes):
    path = tmp_path / "note"
    path.write_bytes(content)
    assert Note(path, {}).read() is None


def test_a_changed_file_has_another_identity(tmp_path: Path):
    path = tmp_path / "file"

    def look(content: bytes, times: Sequence[int] = (1, 1)) -> dict[str, Any]:
        path.write_bytes(content)
        os.utime(path, (times[0], times[1]))
        with path.open("rb") as stream:
            found = identity(stream)
            assert stream.read() == content
        return found

    first = look(b"abc")
    assert look(b"abc") == first
    assert look(b"abd") != first
    assert look(b"abcd") != first
    assert look(b"abc", (1, 2)) != first
