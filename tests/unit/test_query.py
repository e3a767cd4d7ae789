"""What the commands about queries ask for, on a real DuckDB, and how they show what comes back."""

from collections.abc import Iterator
from typing import Any

import duckdb
import pytest

from bus_kv.cli.cells import cell_text, json_cell, time_text
from bus_kv.cli.oplog import COLUMNS, after, conditions, literal, select
from bus_kv.client.pages import count_pages, pages

NOW_MS = 1_700_000_000_000
"""2023-11-14 22:13:20 UTC."""


@pytest.fixture(scope="module")
def sql() -> Iterator[duckdb.DuckDBPyConnection]:
    """An oplog of two shards; operation i of each is i seconds before NOW_MS."""
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE oplog (keyspace VARCHAR, shard VARCHAR, epoch BIGINT, seq BIGINT, "
            "time TIMESTAMP_MS, op VARCHAR, key BLOB, value BLOB, request_id VARCHAR, "
            "txn_id VARCHAR, trace_id VARCHAR, outcome VARCHAR)"
        )
        for shard in ("s1", "o'clock"):
            connection.execute(
                "INSERT INTO oplog SELECT 'default', ?, 3, 100 - i, "
                f"make_timestamp_ms({NOW_MS} - i * 1000), if(i % 2 = 0, 'put', 'delete'), "
                "encode('k' || i), encode(repeat('v', 1000)), 'c:1', NULL, NULL, "
                "if(i = 3, 'rolled_back', 'created') "
                "FROM range(10) t(i)",
                [shard],
            )
        yield connection


def found(sql: duckdb.DuckDBPyConnection, filters: list[str], **options: Any) -> list[Any]:
    """(shard, seq) of the operations found."""
    settings = {"newest": False, "limit": 100, "whole_values": True, **options}
    rows = sql.execute(select(filters, **settings)).fetchall()
    named = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    return [(row["shard"], row["seq"]) for row in named]


@pytest.mark.parametrize(
    "value",
    [
        *("", "it's", "''; DROP TABLE oplog --", "\\x41\\", "$$a$$", "Zoë\n\t\u2028", "/* */"),
        *(bytes(range(256)), b"", b"'", b"\\x41"),
        *(0, -1, 2**63 - 1),
    ],
)
def test_a_literal_is_its_value_whatever_it_holds(
    sql: duckdb.DuckDBPyConnection, value: bytes | str | int
):
    assert sql.execute(f"SELECT {literal(value)}").fetchall() == [(value,)]


def test_operations_come_oldest_first_or_newest_first(sql: duckdb.DuckDBPyConnection):
    expected = [(shard, seq) for seq in range(91, 101) for shard in ("o'clock", "s1")]
    assert found(sql, []) == expected
    assert found(sql, [], newest=True, limit=3) == expected[:-4:-1]


def test_operations_are_chosen_by_key_kind_outcome_and_age(sql: duckdb.DuckDBPyConnection):
    assert found(sql, conditions("k4", None, None, None, NOW_MS)) == [("o'clock", 96), ("s1", 96)]
    deletes = found(sql, conditions(None, "delete", None, None, NOW_MS))
    assert {seq for _, seq in deletes} == {99, 97, 95, 93, 91}
    lost = found(sql, conditions(None, None, "rolled_back", None, NOW_MS))
    assert lost == [("o'clock", 97), ("s1", 97)]
    young = found(sql, conditions(None, "put", None, 2000, NOW_MS))
    assert {seq for _, seq in young} == {100, 98}
    assert found(sql, conditions(None, "put' OR '1'='1", None, None, NOW_MS)) == []
    everything = conditions(None, None, None, 10**18, NOW_MS)
    assert len(found(sql, everything)) == 20


def test_after_positions_come_newer_ones_and_shards_that_were_not_known(
    sql: duckdb.DuckDBPyConnection,
):
    assert len(found(sql, after({}))) == 20
    assert found(sql, after({"s1": 100, "o'clock": 99})) == [("o'clock", 100)]
    assert found(sql, after({"o'clock": 100})) == [("s1", seq) for seq in range(91, 101)]
    mixed = [*conditions("k0", None, None, None, NOW_MS), *after({"s1": 99, "o'clock": 100})]
    assert found(sql, mixed) == [("s1", 100)]


def test_only_the_beginning_of_a_value_is_asked_for_when_it_is_shown(
    sql: duckdb.DuckDBPyConnection,
):
    place = COLUMNS.index("value")
    for whole, size_bytes in ((True, 1000), (False, 200)):
        row = sql.execute(select([], newest=True, limit=1, whole_values=whole)).fetchone()
        assert row is not None
        assert row[place] == b"v" * size_bytes


# ---- cells ----


@pytest.mark.parametrize(
    ("cell", "text", "in_json"),
    [
        (None, "NULL", None),
        (True, "true", True),
        (1234567, "1234567", 1234567),
        (1.23456789, "1.23456789", 1.23456789),
        ("a\x1b[31m\n", "a\\x1b[31m\\n", "a\x1b[31m\n"),
        ("Zoë".encode(), "Zoë", "Zoë"),
        (b"\x00\xff", "0x00ff", {"b64": "AP8="}),
        ([1, {"a": b"\xff"}], '[1, {"a": {"b64": "/w=="}}]', [1, {"a": {"b64": "/w=="}}]),
    ],
)
def test_a_cell_as_people_and_as_json_see_it(cell: Any, text: str, in_json: Any):
    assert cell_text(cell) == text
    assert json_cell(cell) == in_json


def test_long_cells_are_cut_in_tables_only():
    for cell in ("x" * 5000, b"\xff" * 5000):
        assert len(cell_text(cell)) <= 200
        assert cell_text(cell).endswith("…")


def test_times_are_iso_8601_in_utc():
    assert time_text(NOW_MS + 7) == "2023-11-14T22:13:20.007Z"


# ---- pages ----


class Pager:
    """Answers requests for pages of the numbers below 10, at most 4 to a page."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    async def __call__(self, verb: str, fields: dict[str, Any]) -> dict[str, Any]:
        self.asked.append(fields)
        start = int(fields.get("cursor", 0))
        end = min(start + min(fields.get("limit", 4), 4), 10)
        cursor = None if end == 10 else str(end)
        return {"items": [*range(start, end)], "count": end - start, "cursor": cursor}


@pytest.mark.parametrize("limit", [None, 0, 1, 4, 5, 10, 99])
@pytest.mark.parametrize("page_size", [1, 3, 1000])
async def test_pages_go_on_to_the_limit_or_the_end(limit: int | None, page_size: int):
    pager = Pager()
    fields = {"prefix": b"p"}
    got = [item async for page in pages(pager, "scan", fields, "items", limit, page_size)
           for item in page]  # fmt: skip
    assert got == [*range(10)][:limit]
    assert all(asked["prefix"] == b"p" for asked in pager.asked)
    assert fields == {"prefix": b"p"}


async def test_counts_of_all_pages_are_added_up():
    pager = Pager()
    assert await count_pages(pager, {"prefix": b"p"}) == 10
    assert [asked["count_only"] for asked in pager.asked] == [True] * 3
