"""The state on disk: what is folded is what every query finds, and what retention leaves."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

import nodes.state
from bus_kv.core.machine import (
    Expiring,
    HistoryOf,
    KeysAfter,
    Lookup,
    Mark,
    RangeCount,
    RangeRead,
    RequestsOf,
    Sql,
    Unread,
)
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from nodes import state_file, state_fold, state_queries
from nodes.state import SQL_QUERIES_MAX, SQL_THREADS
from tests.support.state import ANSWER_WITHIN_S, RandomWriter, State, Writer, puts

MANY_BYTES = 1 << 30


def keys(*numbers: int) -> list[bytes]:
    return [f"key-{number:06}".encode() for number in numbers]


@pytest.fixture
def state(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path)
    yield state
    state.store.close()
    assert state.failures.empty()


@pytest.fixture
def writer() -> Writer:
    return Writer()


def read(state: State, start: bytes = b"", end: bytes | None = None, **fields: Any) -> list[Any]:
    """[(key, value)] of a range."""
    query = RangeRead(7, "s1", start, end, **{"limit": 1000, "bytes_max": MANY_BYTES, **fields})
    return [row[:2] for row in state.ask(query)]


# ---- folds ----


def test_what_is_folded_is_there(state: State) -> None:
    writer = RandomWriter(seed=1)
    for _ in range(20):
        state.do(writer.next_fold())
    assert state.contents("s1") == writer.on_disk


def test_a_fold_of_many_pieces_is_there(state: State) -> None:
    writer = RandomWriter(seed=4)
    batches = [batch for n in range(700) for batch in writer.next_batches(n)]
    state.do(writer.fold(*batches))
    assert state.contents("s1") == writer.on_disk


def test_it_is_there_after_a_restart(tmp_path: Path) -> None:
    writer = RandomWriter(seed=2)
    for _ in range(2):
        state = State(tmp_path)
        state.do(writer.next_fold())
        state.store.close()
    state = State(tmp_path)
    assert state.store.marks() == {"s1": writer.on_disk.mark}
    assert state.contents("s1") == writer.on_disk
    state.store.close()


def test_only_applied_operations_are_in_the_oplog(state: State, writer: Writer) -> None:
    kinds = bytes([b.PUT, b.GET, b.PUT, b.DELETE, b.PUT])
    mixed = Batch(kinds, keys(1, 2, 3, 4, 5), [b"1", None, b"3", None, b"5"], "c", range(10, 15))
    outcomes = bytes([b.CREATED, b.REFUSED, b.REFUSED, b.ABSENT, b.CREATED])
    refused = (puts(keys(6), client="c", numbers=range(20, 21)), bytes([b.REFUSED]))
    state.do(writer.fold((mixed, outcomes), refused))
    rows = state.fetch("SELECT seq, key, number FROM state.oplog ORDER BY seq")
    assert rows == [(1, *keys(1), 10), (2, *keys(5), 14)]
    assert state.contents("s1") == writer.on_disk


def test_what_the_primary_did_by_itself_has_no_client(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(1))))
    state.do(writer.fold((Batch(bytes([b.EXPIRE]), keys(1)), bytes([b.DELETED]))))
    rows = state.fetch("SELECT op, client, request_id, outcome FROM oplog ORDER BY seq")
    assert rows == [("put", None, None, "created"), ("expire", None, None, "deleted")]
    assert state.contents("s1").requests == []


def test_a_fold_without_operations_moves_the_mark(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(1))))
    fold = writer.fold()
    fold.mark = Mark(epoch=4, last=2, time_ms=2000, keys=1, data_bytes=11)
    state.do(fold)
    assert state.store.marks() == {"s1": fold.mark}


def test_shards_are_apart(state: State) -> None:
    one, other = Writer("s1"), Writer("it's; DROP TABLE kv")
    state.do(one.fold(puts(keys(1), b"one")))
    state.do(other.fold(puts(keys(1), b"other")))
    assert state.records(keys(1), one.shard)[0][1] == b"one"
    assert state.records(keys(1), other.shard)[0][1] == b"other"
    rows = state.fetch("SELECT shard, value_text FROM kv ORDER BY shard")
    assert rows == [(other.shard, "other"), (one.shard, "one")]


def test_a_fold_that_cannot_be_done_ends_the_node(tmp_path: Path, writer: Writer) -> None:
    state = State(tmp_path)
    state.do(writer.fold(puts(keys(1))))
    with state.store.cursor() as cursor:
        cursor.execute("DROP TABLE state.requests")
    before = state.store.marks()
    state.store.submit(writer.fold(puts(keys(2), client="c", numbers=range(1))))
    assert "--rebuild" in str(state.failures.get(timeout=30))
    assert state.store.marks() == before
    assert state.records(keys(2)) == []
    state.store.close()


# ---- records ----


def test_lookup_finds_what_is_there(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(*range(1000))), expires_at=5000))
    wanted = keys(*range(500, 1500))
    rows = state.records(wanted)
    assert {key for key, *_ in rows} == set(keys(*range(500, 1000)))
    assert sorted(rows)[0] == (*keys(500), b"v", 3, 501, 5000)
    reached, *rows = state.ask(Lookup(1, "s1", wanted, [], 1))
    assert {key for key, *_ in rows} == set(keys(*range(500, 1000)))
    assert (reached, sorted(rows)[0]) == (0, (*keys(500), Unread(1), 3, 501, 5000))


@pytest.mark.parametrize("piece_bytes", [1, 1 << 20], ids=["lengths first", "at once"])
def test_a_lookup_ends_with_the_value_that_fills_it(
    state: State, writer: Writer, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(state_queries, "LOOKUP_CHUNK_KEYS", 3)
    monkeypatch.setattr(state_queries, "PIECE_BYTES", piece_bytes)
    batch = puts(keys(*range(10)))
    batch.values = [b"v" * size for size in (1, 100, 1, 1, 100, 1, 100, 100, 1, 1)]
    state.do(writer.fold(batch))
    # 90 and 91 are absent, and gone through like the others.
    wanted = keys(0, 90, 5, 1, 91, 2, 8, 4, 3, 6)
    for bytes_max, reached in {
        1: 1,
        2: 3,
        3: 4,
        102: 4,
        103: 6,
        104: 7,
        105: 8,
        10_000: 10,
    }.items():
        told, *rows = state.ask(Lookup(1, "s1", [], wanted, bytes_max))
        assert told == reached, bytes_max
        assert {row[0] for row in rows} == {*wanted[:reached]} - {*keys(90, 91)}
        assert all(
            len(row[1]) == len(batch.values[batch.keys.index(row[0])] or b"") for row in rows
        )


@pytest.mark.parametrize("restarted", [False, True])
def test_large_values_among_many_small_ones_are_not_read_all_at_once(
    tmp_path: Path, writer: Writer, monkeypatch: pytest.MonkeyPatch, restarted: bool
) -> None:
    small, large = keys(*range(20_000)), [f"large-{i:02}".encode() for i in range(40)]
    state = State(tmp_path)
    state.do(writer.fold(puts(small)))
    state.do(writer.fold(puts(large, b"v" * 800_000)))
    if restarted:
        state.store.close()
        state = State(tmp_path)
    read = _sizes_read(monkeypatch)
    wanted = large
    while wanted:
        reached, *rows = state.ask(Lookup(1, "s1", large, wanted, 1_000_000))
        assert reached == min(len(wanted), 2)
        assert [row[:2] for row in sorted(rows[40:])] == [
            (key, b"v" * 800_000) for key in wanted[:reached]
        ]
        wanted = wanted[reached:]
    assert max(read) <= state_queries.PIECE_BYTES
    state.store.close()


def _sizes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of the values that each statement of the reader brings."""
    sizes: list[int] = []

    def fetch(self: state_queries.Reader, statement: str, parameters: list[Any]) -> list[Any]:
        rows = honest(self, statement, parameters)
        sizes.append(sum(len(row[1]) for row in rows if isinstance(row[1], bytes)))
        return rows

    honest = state_queries.Reader._fetch
    monkeypatch.setattr(state_queries.Reader, "_fetch", fetch)
    return sizes


def test_a_lookup_tells_how_long_values_are(state: State) -> None:
    writer = RandomWriter(seed=3)
    for _ in range(20):
        state.do(writer.next_fold())
    _, *rows = state.ask(Lookup(1, "s1", [*writer.on_disk.kv], [], 0))
    assert {key: len(value) for key, value, *_ in rows} == {
        key: len(record[0]) for key, record in writer.on_disk.kv.items()
    }


def test_heads_and_whole_records_come_together(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(1, 2, 3), b"value")))
    reached, *rows = state.ask(Lookup(1, "s1", keys(1, 3, 9), keys(1, 2), 1))
    assert reached == 1
    assert [row[:2] for row in sorted(rows[:2])] == [
        (*keys(1), Unread(5)), (*keys(3), Unread(5)),
    ]  # fmt: skip
    assert [row[:2] for row in rows[2:]] == [(*keys(1), b"value")]


@pytest.mark.parametrize("query", [
    RangeRead(1, "none", b"", None, 10, MANY_BYTES),
    KeysAfter(1, "none", 0, 10), Expiring(1, "none", 10, 10),
    HistoryOf(1, "none", b"k", None, 10, MANY_BYTES),
])  # fmt: skip
def test_a_shard_that_was_never_folded_is_empty(state: State, query: Any) -> None:
    assert state.ask(query) == []


def test_what_is_counted_and_remembered_of_an_unknown_shard(state: State) -> None:
    assert state.ask(RangeCount(1, "none", b"", None)) == [0]
    assert state.ask(RequestsOf(1, "none", "c", 0, 9)) == [-1]
    assert state.ask(Lookup(1, "none", [b"k"], [b"a", b"b"], 1)) == [2]
    assert state.store.clients("none") == []


def test_ranges(state: State, writer: Writer) -> None:
    present = keys(*range(100))
    state.do(writer.fold(puts(reversed(present))))
    assert [key for key, _ in read(state)] == present
    assert [key for key, _ in read(state, present[3], present[6])] == present[3:6]
    assert [key for key, _ in read(state, present[3], None, limit=2)] == present[3:5]
    assert [key for key, _ in read(state, b"", present[6], limit=2, reverse=True)] == [
        present[5], present[4],
    ]  # fmt: skip
    assert read(state, present[3], present[4], values=False) == [(present[3], None)]
    assert read(state, present[6], present[3]) == []
    assert state.ask(RangeCount(1, "s1", present[10], present[20])) == [10]
    assert state.ask(RangeCount(1, "s1", b"", None)) == [100]


def test_a_range_ends_with_the_row_that_fills_it(state: State, writer: Writer) -> None:
    present = keys(*range(20))
    state.do(writer.fold(puts(present, b"v" * 90)))
    assert len(read(state, bytes_max=300)) == 3
    assert len(read(state, bytes_max=301)) == 4
    assert len(read(state, bytes_max=1)) == 1
    assert len(read(state, bytes_max=300, values=False)) == 20


@pytest.mark.parametrize("reverse", [False, True])
def test_a_range_of_many_rows_is_the_same_as_one_of_few(
    state: State, writer: Writer, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    state.do(writer.fold(puts(keys(*range(3000)))))
    once = read(state, *keys(5, 2990), limit=2900, reverse=reverse)
    monkeypatch.setattr(state_queries, "TOP_ROWS_MAX", 100)
    monkeypatch.setattr(state_queries, "PIECE_ROWS_MAX", 700)
    assert read(state, *keys(5, 2990), limit=2900, reverse=reverse) == once
    assert len(once) == 2900


def test_a_page_is_read_in_smaller_pieces_where_memory_is_short() -> None:
    asked: list[int] = []

    def piece(after: Any, count: int) -> list[Any]:
        asked.append(count)
        if count > 3:
            raise duckdb.OutOfMemoryException("no memory")
        first = after[0] + 1 if after else 0
        return [(n,) for n in range(first, min(first + count, 10))]

    rows = state_queries.read_page(piece, 100, 50, MANY_BYTES, lambda row: 1)
    assert rows == [(n,) for n in range(10)]
    assert asked[:5] == [50, 25, 12, 6, 3]


def test_a_row_for_which_there_is_no_memory_is_an_error() -> None:
    def piece(after: Any, count: int) -> list[Any]:
        raise duckdb.OutOfMemoryException("no memory")

    with pytest.raises(duckdb.OutOfMemoryException):
        state_queries.read_page(piece, 4, 4, MANY_BYTES, lambda row: 1)


def test_expiring_tells_the_earliest_first(state: State, writer: Writer) -> None:
    for number, expires_at in ((1, 300), (2, 100), (3, None), (4, 200), (5, 400)):
        state.do(writer.fold(puts(keys(number)), expires_at=expires_at))
    assert state.ask(Expiring(1, "s1", 300, 2)) == [(100, *keys(2), 2), (200, *keys(4), 4)]
    assert len(state.ask(Expiring(1, "s1", 300, 9))) == 3


# ---- a walk over all keys ----


def test_a_walk_misses_no_key_that_was_there(tmp_path: Path, writer: Writer) -> None:
    state = State(tmp_path, checkpoint_wal_bytes=1)
    there = keys(*range(30_000))
    state.do(writer.fold(puts(there)))
    seen: list[bytes] = []
    position = 0
    while rows := state.ask(KeysAfter(1, "s1", position, 5000)):
        ((position, page),) = rows
        seen += page
        # Each fold is followed by a checkpoint.
        state.do(writer.fold(puts(keys(*range(0, 30_000, 7)), b"new")))
        deletes = Batch(bytes([b.DELETE]) * 100, there[:100])
        state.do(writer.fold(deletes, puts(there[:100], b"again")))
    assert sorted(seen) == there
    assert state.contents("s1") == writer.on_disk
    state.store.close()


def test_a_walk_that_is_lost_starts_over(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(*range(100)))))
    ((first, page),) = state.ask(KeysAfter(1, "s1", 0, 60))
    state.ask(KeysAfter(1, "s1", first, 60))
    ((_, again),) = state.ask(KeysAfter(1, "s1", first, 60))
    assert (len(page), len(again)) == (60, 60)


# ---- what was asked and done ----


def test_requests_are_found_by_their_numbers(state: State, writer: Writer) -> None:
    state.do(
        writer.fold(
            puts(keys(1, 2, 3), client="c", numbers=range(5, 8)),
            puts(keys(1, 2, 3), client="c", numbers=[10, 10, 12], indexes=[0, 1, 0]),
            puts(keys(1), client="other", numbers=range(5, 6)),
            puts(keys(1, 2), client="c", numbers=[2**64 - 2, 2**64 - 1]),
        )
    )
    dense = (range(5, 8), (), bytes([b.CREATED] * 3), 3, 1, 1000)
    sparse = ([10, 10, 12], [0, 1, 0], bytes([b.REPLACED] * 3), 3, 4, 1000)
    assert state.ask(RequestsOf(1, "s1", "c", 7, 9)) == [-1, dense]
    assert state.ask(RequestsOf(1, "s1", "c", 8, 9)) == [-1]
    assert sorted(state.ask(RequestsOf(1, "s1", "c", 0, 20))[1:], key=lambda r: r[4]) == [
        dense, sparse,
    ]  # fmt: skip
    assert len(state.ask(RequestsOf(1, "s1", "c", 2**64 - 1, 2**64 - 1))) == 2
    assert sorted(state.store.clients("s1")) == [("c", 2**64 - 1), ("other", 5)]


def test_history_is_newest_first(state: State, writer: Writer) -> None:
    key, twin = b"key", b"twin"
    for n in range(5):
        batch = puts([key, twin], b"%d" % n, client="c", numbers=range(2 * n, 2 * n + 2))
        state.do(writer.fold(batch, time_ms=n))
    writer.epoch = 4
    state.do(writer.fold((Batch(bytes([b.DELETE]), [key]), bytes([b.DELETED])), time_ms=9))
    rows = state.ask(HistoryOf(1, "s1", key, None, 3, MANY_BYTES))
    assert rows == [
        (4, 11, "delete", None, 9, None, None), (3, 9, "put", b"4", 4, "c", 8),
        (3, 7, "put", b"3", 3, "c", 6),
    ]  # fmt: skip
    older = state.ask(HistoryOf(1, "s1", key, (3, 7), 100, MANY_BYTES))
    assert [row[1] for row in older] == [5, 3, 1]
    assert len(state.ask(HistoryOf(1, "s1", key, (3, 7), 100, 2))) == 2


def test_history_is_of_one_shard(state: State, writer: Writer) -> None:
    state.do(Writer("s0").fold(puts([b"other", b"key"])))
    state.do(writer.fold(puts([b"key"])))
    for shard, seqs in (("s0", [2]), ("s1", [1])):
        rows = state.ask(HistoryOf(1, shard, b"key", None, 9, MANY_BYTES))
        assert [row[1] for row in rows] == seqs


@pytest.mark.parametrize("is_back", [False, True], ids=["there", "and back"])
def test_history_is_found_although_another_version_of_duckdb_hashes_keys_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_back: bool
) -> None:
    writer, key = Writer(), b"key"

    def write_and_read() -> list[int]:
        state = State(tmp_path)
        state.do(writer.fold(puts([key])))
        rows = state.ask(HistoryOf(1, "s1", key, None, 10, MANY_BYTES))
        state.store.close()
        return [row[1] for row in rows]

    assert write_and_read() == [1]
    with monkeypatch.context() as other:
        other.setattr(state_file, "SAMPLE_HASH", "7::UINTEGER")
        other.setattr(state_fold, "_LOG", state_fold._LOG.replace("hash(key)", "1"))
        assert write_and_read() == [2, 1]
    if is_back:
        assert write_and_read() == [3, 2, 1]


# ---- SQL ----


def test_the_views_show_data_and_operations(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts([b"\xff", b"text"], b"v", client="c", numbers=[4, 9]), time_ms=1500))
    kv = "SELECT keyspace, shard, key, key_text, value_text, epoch, seq, expires_at FROM kv"
    assert state.fetch(f"{kv} ORDER BY seq") == [
        ("default", "s1", b"\xff", None, "v", 3, 1, None),
        ("default", "s1", b"text", "text", "v", 3, 2, None),
    ]
    oplog = (
        "SELECT keyspace, shard, epoch, seq, time::VARCHAR, op, key_text, value_text, client, "
        "request_id, txn_id, trace_id, outcome FROM oplog ORDER BY seq DESC LIMIT 1"
    )
    assert state.fetch(oplog) == [
        (
            "default", "s1", 3, 2, "1970-01-01 00:00:01.5", "put", "text", "v", "c", "c:9", None,
            None, "created",
        )
    ]  # fmt: skip


def test_the_instance_reaches_no_other_file(state: State, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with state.store.cursor() as cursor, pytest.raises(duckdb.PermissionException):
        cursor.execute(f"SELECT * FROM read_text('{tmp_path / 'secret'}')")


def sql(query: str) -> Sql:
    return Sql(1, ["s1"], query, rows_max=10, bytes_max=1000, timeout_ms=60_000)


def test_sql_is_answered_or_refused_with_a_code(state: State, writer: Writer) -> None:
    state.do(writer.fold(puts(keys(1, 2))))
    assert state.ask(sql("SELECT key_text FROM kv ORDER BY 1")) == [
        ["key_text"], [["key-000001"], ["key-000002"]],
    ]  # fmt: skip
    assert str(state.do(sql("CHECKPOINT")).failure).startswith("SQL_REFUSED: ")
    assert str(state.do(sql("SELECT nothing FROM kv")).failure).startswith("SQL_FAILED: ")


def test_a_query_too_many_is_refused_at_once(
    state: State, writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = threading.Semaphore(0)

    def never_ends(cursor: Any, query: Sql) -> list[Any]:
        running.release()
        rows: list[Any] = cursor.execute("SELECT sum(range) FROM range(1000000000000)").fetchall()
        return rows

    monkeypatch.setattr(nodes.state, "run_query", never_ends)
    for _ in range(SQL_THREADS):
        state.store.submit(sql(""))
        assert running.acquire(timeout=ANSWER_WITHIN_S)
    for _ in range(SQL_QUERIES_MAX + 1):
        state.store.submit(sql(""))
    assert "overloaded" in state.next_event().failure
    # Neither folds nor other queries wait for it.
    state.do(writer.fold(puts(keys(1))))
    assert read(state) == [(*keys(1), b"v")]
