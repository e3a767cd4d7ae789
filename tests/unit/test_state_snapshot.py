"""A snapshot, chunk by chunk from one state into another, is the state at the mark with which it began."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.core.machine import ClientsOf, HistoryOf, Load, LoggedBatch, Mark, SnapshotRead
from bus_kv.protocol import batch as b
from tests.support.state import RandomWriter, State, Writer, puts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from bus_kv.core.machine import Fold

CHUNK_BYTES = 4000


@pytest.fixture
def source(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "source")
    yield state
    state.store.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[State]:
    state = State(tmp_path / "target")
    # In every state the shards have other numbers.
    state.do(Writer("s3").fold(puts([b"first here"])))
    yield state
    state.store.close()


def transfer(
    source: State, target: State, mark: Mark, between: Callable[[], None] = lambda: None
) -> int:
    """Copy shard s1 as it is at `mark`; returns how many chunks it took."""
    assert target.do(Load(1, "s1", "default", "", b"")).failure is None
    place, chunks = None, 0
    while chunks == 0 or place is not None:
        table, chunk, place = source.ask(SnapshotRead(1, "s1", mark.last, place, CHUNK_BYTES))
        assert target.do(Load(2, "s1", "default", table, chunk)).failure is None
        chunks += 1
        between()
    assert target.do(Load(3, "s1", "default", "", b"", mark)).failure is None
    return chunks


def test_everything_of_the_shard_is_there_afterwards(source: State, target: State) -> None:
    writer = RandomWriter(seed=1)
    for _ in range(20):
        source.do(writer.next_fold())
    source.do(Writer("s2").fold(puts([b"other"])))
    assert transfer(source, target, writer.on_disk.mark) > 10
    assert target.contents("s1") == writer.on_disk
    assert target.contents("s2").kv == {}
    assert list(target.contents("s3").kv) == [b"first here"]
    assert len(target.contents("s3").oplog) == 1
    assert sorted(target.ask(ClientsOf(1, "s1"))) == sorted(source.ask(ClientsOf(1, "s1")))


def test_the_target_finds_operations_whose_keys_the_source_hashed_otherwise(
    source: State, target: State
) -> None:
    writer = Writer()
    source.do(writer.fold(puts([b"key"])))
    with source.store.cursor() as cursor:
        cursor.execute("UPDATE state.oplog SET key_hash = 1")
    transfer(source, target, writer.on_disk.mark)
    assert [row[1] for row in target.ask(HistoryOf(1, "s1", b"key", None, 9, 1000))] == [1]


@pytest.mark.parametrize("chunk_bytes", [2000, 2300, 2500, 2700, 3000])
def test_chunks_may_end_between_what_was_rolled_back_and_what_came_in_its_place(
    source: State, target: State, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have the same seq; and a batch of which nothing was applied begins where the next one does."""
    monkeypatch.setattr("tests.unit.test_state_snapshot.CHUNK_BYTES", chunk_bytes)
    writer = Writer()
    for n in range(30):
        lost = [LoggedBatch(puts([b"lost"]), bytes([b.CREATED]), 2, n + 1, 1000)]
        refused = (puts([b"k"], client=f"r{n}", numbers=range(1)), bytes([b.REFUSED]))
        taken = puts([b"%d" % n], client="c", numbers=range(n, n + 1))
        source.do(replace(writer.fold(refused, taken), rolled_back=lost))
    transfer(source, target, writer.on_disk.mark)
    assert target.contents("s1") == source.contents("s1")
    assert len(target.contents("s1").oplog) == len(target.contents("s1").requests) == 60


def test_a_chunk_of_another_format_is_refused(source: State, target: State) -> None:
    source.do(Writer().fold(puts([b"k"])))
    with source.store.cursor() as cursor:
        cursor.execute("ALTER TABLE state.oplog DROP COLUMN outcome")
    assert target.do(Load(1, "s1", "default", "", b"")).failure is None
    place: list[Any] | None = ["oplog", 0, 1, None]
    table, chunk, place = source.ask(SnapshotRead(1, "s1", 1, place, CHUNK_BYTES))
    refusal = target.do(Load(2, "s1", "default", table, chunk)).failure
    assert refusal is not None
    assert "another release" in refusal


def test_what_was_in_the_target_before_is_gone(source: State, target: State) -> None:
    target.do(Writer().fold(puts([b"stale", b"key-1"], client="old", numbers=range(2))))
    writer = RandomWriter(seed=2)
    source.do(writer.next_fold())
    transfer(source, target, writer.on_disk.mark)
    assert target.contents("s1") == writer.on_disk


def test_folds_in_between_change_nothing_once_their_log_has_followed(
    source: State, target: State
) -> None:
    """What was written meanwhile is left out of the chunks, and comes with the log behind the mark."""
    writer = RandomWriter(seed=3)
    for _ in range(10):
        source.do(writer.next_fold())
    mark = writer.on_disk.mark
    later: list[Fold] = []

    def fold() -> None:
        if len(later) < 10:
            later.append(writer.next_fold())
            source.do(later[-1])

    transfer(source, target, mark, fold)
    for fold_behind in later:
        target.do(fold_behind)
    assert target.contents("s1") == writer.on_disk


def test_data_that_grows_by_much_in_between_leaves_no_key_out(source: State, target: State) -> None:
    """The division into parts is made once (found by review: it followed the growing size, and keys were left out)."""
    writer, value = Writer(), b"x" * 20_000
    source.do(writer.fold(puts([f"old-{i}".encode() for i in range(100)], value)))
    mark = writer.on_disk.mark
    later: list[Fold] = []

    def grow() -> None:
        if len(later) < 4:
            at = len(later)
            keys = [f"new-{at}-{i}".encode() for i in range(100)]
            later.append(writer.fold(puts(keys, value)))
            source.do(later[-1])

    transfer(source, target, mark, grow)
    for fold_behind in later:
        target.do(fold_behind)
    assert target.contents("s1") == writer.on_disk


def test_a_snapshot_that_did_not_end_leaves_nothing(source: State, tmp_path: Path) -> None:
    writer = RandomWriter(seed=4)
    source.do(writer.next_fold())
    half = State(tmp_path / "half")
    half.do(Load(1, "s1", "default", "", b""))
    table, chunk, _ = source.ask(SnapshotRead(1, "s1", writer.on_disk.mark.last, None, CHUNK_BYTES))
    half.do(Load(2, "s1", "default", table, chunk))
    assert half.contents("s1").kv
    half.store.close()
    again = State(tmp_path / "half")
    assert again.contents("s1").kv == {}
    assert again.store.marks()["s1"] == Mark()
    again.store.close()


def test_a_chunk_that_cannot_be_written_is_refused_and_the_snapshot_begins_anew(
    source: State, target: State
) -> None:
    writer = RandomWriter(seed=2)
    for _ in range(5):
        source.do(writer.next_fold())
    last = writer.on_disk.mark.last
    _, chunk, _ = source.ask(SnapshotRead(1, "s1", last, None, CHUNK_BYTES))
    assert target.do(Load(1, "s1", "default", "", b"")).failure is None
    assert target.do(Load(2, "s1", "default", "kv", chunk)).failure is None
    for table, bad in (("kv", chunk), ("kv", b"no rows"), ("no table", chunk), ("oplog", chunk)):
        assert target.do(Load(3, "s1", "default", table, bad)).failure
    transfer(source, target, writer.on_disk.mark)
    assert target.contents("s1") == writer.on_disk
    assert target.failures.empty()
