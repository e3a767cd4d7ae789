"""The table against a plain dictionary that is sorted for every scan."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bus_kv.protocol.requests import ScanRequest
from nodes.machine.table import Record, Table

KEYS = st.binary(min_size=1, max_size=2) | st.sampled_from([b"a", b"b", b"c", b"\xff"])
WRITES = st.dictionaries(
    KEYS, st.none() | st.tuples(st.binary(max_size=5), st.none() | st.integers(0, 20)), max_size=6
)
ENOUGH_BYTES = 1 << 20


def applied(table: Table, model: dict[bytes, Record], steps: list[dict[bytes, Any]]) -> None:
    """Write all steps to both; each write has its own seq."""
    seq = 0
    for step in steps:
        writes: dict[bytes, Record | None] = {}
        for key, write in step.items():
            seq += 1
            writes[key] = None if write is None else (write[0], 1, seq, write[1])
        table.apply(dict(writes))
        for key, record in writes.items():
            model.pop(key, None)
            if record is not None:
                model[key] = record


@given(st.lists(WRITES, max_size=8))
def test_the_table_holds_the_newest_record_of_each_key(steps: list[dict[bytes, Any]]) -> None:
    table, model = Table(), dict[bytes, Record]()
    applied(table, model, steps)
    assert table.records == model
    assert table.data_bytes == sum(len(key) + len(record[0]) for key, record in model.items())


@given(
    st.lists(WRITES, max_size=8), st.binary(max_size=2), st.none() | st.binary(max_size=2),
    st.integers(1, 4), st.booleans(), st.integers(1, 400),
)  # fmt: skip
def test_pages_of_a_scan_are_the_sorted_range(
    steps: list[dict[bytes, Any]], start: bytes, end: bytes | None, limit: int, reverse: bool,
    page_bytes_max: int,
) -> None:  # fmt: skip
    table, model = Table(), dict[bytes, Record]()
    applied(table, model, steps)
    wanted = sorted((k for k in model if k >= start and (end is None or k < end)), reverse=reverse)
    request = ScanRequest("default", None, start, end, limit, reverse)
    found: list[bytes] = []
    position: bytes | None = b""
    while position is not None:
        page, position = table.scan(request, page_bytes_max)
        assert len(page) <= limit
        assert page or position is None, "a page that leads on is not empty"
        found += page
        if position is not None and reverse:
            request.end = position
        elif position is not None:
            request.start = position
    assert found == wanted


@given(st.lists(WRITES, max_size=8), st.lists(WRITES, max_size=3))
def test_a_scan_between_writes_changes_nothing(
    before: list[dict[bytes, Any]], after: list[dict[bytes, Any]]
) -> None:
    table, model = Table(), dict[bytes, Record]()
    applied(table, model, before)
    table.scan(ScanRequest("default", None), ENOUGH_BYTES)
    applied(table, model, after)
    page, _ = table.scan(ScanRequest("default", None, limit=1000), ENOUGH_BYTES)
    assert page == sorted(model)


@given(st.lists(WRITES, max_size=8), st.integers(0, 20), st.integers(1, 3))
def test_lifetimes_end_once_and_only_those_of_the_newest_record(
    steps: list[dict[bytes, Any]], time_ms: int, count_max: int
) -> None:
    table, model = Table(), dict[bytes, Record]()
    applied(table, model, steps)
    due = {key for key, record in model.items() if record[3] is not None and record[3] <= time_ms}
    popped: list[bytes] = []
    while keys := table.pop_expired(time_ms, count_max):
        assert len(keys) <= count_max
        popped += keys
    assert sorted(popped) == sorted(due)
    next_ms = table.next_expiry_ms()
    assert next_ms is None or next_ms > time_ms


def test_a_page_always_holds_something_however_big() -> None:
    table = Table()
    table.apply({b"a": (b"v" * 1000, 1, 1, None), b"b": (b"v", 1, 2, None)})
    assert table.scan(ScanRequest("default", None), 10) == ([b"a"], b"b")
