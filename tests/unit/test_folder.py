"""What has gathered goes to disk in folds that DuckDB can bear, and is exact after each of them."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from bus_kv.core.machine import Answered, Fold, Mark, Trim
from bus_kv.knobs import SECOND_NS, Knobs
from bus_kv.protocol.batch import DELETE, Batch
from nodes.machine.folder import FOLD_MEMORY_SHARE, Folder
from nodes.machine.lifetimes import Lifetimes
from nodes.machine.table import UNKNOWN, Table
from tests.support.state import State, Writer, puts

if TYPE_CHECKING:
    from pathlib import Path

MEMORY_MB = 64
VALUE = b"v" * 20_000
ENTRIES = 60
KEYS_PER_ENTRY = 25


class Folding:
    """Entries of large values that were all committed before the first fold could begin."""

    def __init__(self) -> None:
        self.table = Table(Mark(), 1 << 20)
        self.asked: list[tuple[Fold, Any]] = []
        knobs = Knobs(duckdb_memory_mb=MEMORY_MB)
        self.folder = Folder(
            "s1", "default", Mark(), self.table, Lifetimes(all_known=True), knobs,
            lambda query, then: self.asked.append((query, then)),
        )  # fmt: skip
        self.versions: dict[int, dict[bytes, tuple[int, int]]] = {0: {}}
        """Seq of the end of an entry -> key -> version, as it was then."""
        self.last = 0
        writer, keys = Writer(), count()
        for _ in range(ENTRIES):
            # Every entry writes the last keys of the one before it once more.
            batch = puts([str(next(keys) // 2).encode() for _ in range(KEYS_PER_ENTRY)], VALUE)
            self._commit(writer.fold(batch))

    def _commit(self, entry: Fold) -> None:
        self.table.apply(entry.records, entry.batches, len(entry.records), 0)
        size = sum(len(VALUE) for logged in entry.batches for _ in logged.batch.keys)
        self.folder.add(entry.batches, [], entry.mark, size, 0)
        versions = {key: (r[1], r[2]) for key, r in entry.records.items() if r is not None}
        self.versions[entry.mark.last] = self.versions[self.last] | versions
        self.last = entry.mark.last

    def next_fold(self) -> tuple[Fold, Any] | None:
        self.folder.end_turn(1 << 62)
        return self.asked.pop() if self.asked else None


def test_what_is_too_much_for_one_fold_goes_in_several(tmp_path: Path) -> None:
    folding, state = Folding(), State(tmp_path, memory_mb=MEMORY_MB)
    folds = 0
    while (item := folding.next_fold()) is not None:
        fold, then = item
        values = sum(len(VALUE) for logged in fold.batches for _ in logged.batch.keys)
        assert values <= (MEMORY_MB << 20) // FOLD_MEMORY_SHARE
        newest = folding.versions[folding.last].items()
        unfolded = [key for key, (_, seq) in newest if seq > folding.folder.mark.last]
        assert all(folding.table.get(key) is not UNKNOWN for key in unfolded)
        assert isinstance(state.do(fold), Answered), "without a stall"
        then([], None)
        rows = state.fetch("SELECT key, epoch, seq FROM state.kv_1")
        assert {key: (e, s) for key, e, s in rows} == folding.versions[fold.mark.last]
        folds += 1
    assert folds > 5
    assert folding.folder.mark.last == folding.last
    assert folding.folder.bytes == 0
    assert (folding.table.dirty, folding.table.frozen) == ({}, {})
    assert state.fetch("SELECT count(*) FROM state.oplog") == [(folding.last,)]
    state.store.close()


def test_a_key_that_is_deleted_in_several_folds_is_gone_at_the_end() -> None:
    asked: list[tuple[Fold, Any]] = []
    table, writer = Table(Mark(), 1), Writer()
    folder = Folder(
        "s1", "default", Mark(), table, Lifetimes(all_known=True), Knobs(fold_bytes=1),
        lambda query, then: asked.append((query, then)),
    )  # fmt: skip
    delete = Batch(bytes([DELETE]), [b"k"])
    for batch in (puts([b"k"]), delete, puts([b"k"]), delete):
        entry = writer.fold(batch)
        table.apply(entry.records, entry.batches, 0, 0)
        folder.add(entry.batches, [], entry.mark, 2, 0)
    disk: dict[bytes, Any] = {}
    for _ in range(4):
        folder.end_turn(1 << 62)
        fold, then = asked.pop()
        assert fold.records.keys() == {b"k"}
        disk |= fold.records
        then([], None)
    assert disk == {b"k": None}
    assert (table.dirty, table.frozen) == ({}, {})


def test_a_barrier_waits_for_the_last_of_them() -> None:
    folding, passed = Folding(), list[str]()
    folding.folder.barrier(lambda: passed.append("passed"))
    while (item := folding.next_fold()) is not None:
        assert passed == []
        item[1]([], None)
    assert passed == ["passed"]


# ---- when ----


@pytest.mark.parametrize("per_second", [100, 100_000], ids=["by age", "by size"])
def test_members_fold_in_turn(per_second: int) -> None:
    """They have the same log at the same time; a majority of them does not fold."""
    knobs = Knobs(fold_interval_ms=1000, fold_bytes=100_000)
    asked: list[tuple[int, Any]] = []

    def folder_of(at: int) -> Folder:
        def ask(_: Any, then: Any) -> None:
            asked.append((at, then))

        table, lifetimes = Table(Mark(), 1 << 20), Lifetimes(all_known=True)
        return Folder("s1", "default", Mark(), table, lifetimes, knobs, ask, at / 3)

    folders = [folder_of(at) for at in range(3)]
    order: list[int] = []
    for seq in range(1, 1000):
        now_ns = seq * SECOND_NS // 100
        for folder in folders:
            folder.add([], [], Mark(1, seq), per_second // 100, now_ns)
            folder.end_turn(now_ns)
        assert len(asked) <= 1, "nobody else at this moment"
        for at, then in asked:
            order.append(at)
            then([], None)
        asked.clear()
    assert order[:9] == [0, 1, 2] * 3


# ---- what the log may forget ----


def folded_log(**knobs: int) -> Folder:
    """Three entries of ten bytes each, all of them in the state and on every replica."""
    table = Table(Mark(), 1 << 20)
    asked: list[tuple[Fold, Any]] = []
    folder = Folder(
        "s1", "default", Mark(), table, Lifetimes(all_known=True), Knobs(log_keep_bytes=0, **knobs),
        lambda query, then: asked.append((query, then)),
    )  # fmt: skip
    for seq in (1, 2, 3):
        folder.add([], [], Mark(1, seq), 10, 0)
    folder.end_turn(1 << 62)
    [(_, then)] = asked
    then([], None)
    return folder


def test_what_no_checkpoint_has_stays_in_the_log() -> None:
    folder = folded_log()
    assert folder.trim(others_have=3) is None
    folder.checkpointed = 2
    assert folder.trim(others_have=3) == Trim("s1", 2)


def test_what_another_replica_lacks_stays_in_the_log() -> None:
    folder = folded_log()
    folder.checkpointed = 3
    assert folder.trim(others_have=1) == Trim("s1", 1)


def test_a_very_long_log_is_trimmed_behind_the_fold() -> None:
    assert folded_log(log_bytes_max=10).trim(others_have=0) == Trim("s1", 2)


def test_what_somebody_is_fetching_stays_in_a_very_long_log() -> None:
    assert folded_log(log_bytes_max=10).trim(others_have=0, is_fetched=True) is None
    folder = folded_log(log_bytes_max=10, log_fetched_bytes_max=20)
    assert folder.trim(others_have=0, is_fetched=True) == Trim("s1", 1)
