"""The layers of memory: what may be dropped, what may not, and what a filter may say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from bus_kv.core.machine import Mark
from nodes.machine.key_filter import KeyFilter
from nodes.machine.lifetimes import HORIZON_MS, Lifetimes
from nodes.machine.table import RECORD_BYTES, UNKNOWN, Table

if TYPE_CHECKING:
    from nodes.machine.table import Writes


def write(*keys: bytes, seq: int = 1) -> Writes:
    return {key: (b"v%d" % seq, 1, seq, None) for key in keys}


def test_a_new_shard_knows_that_a_key_is_absent_without_the_disk() -> None:
    table = Table(Mark(), 1 << 20)
    assert table.get(b"a") is None


def test_after_a_start_every_key_may_be_on_disk() -> None:
    table = Table(Mark(epoch=1, last=9, keys=3), 1 << 20)
    assert table.get(b"a") is UNKNOWN


def test_what_is_not_folded_stays_however_small_the_cache() -> None:
    table = Table(Mark(), 0)
    for i in range(100):
        table.apply(write(b"k%d" % i, seq=i + 1), (), 1, 0)
    assert [table.get(b"k%d" % i)[2] for i in range(100)] == [*range(1, 101)]


def test_what_is_folded_leaves_a_cache_that_is_full() -> None:
    room_for_ten = 20 * (RECORD_BYTES + 30)
    table = Table(Mark(), room_for_ten)
    for i in range(100):
        table.apply(write(b"k%d" % i, seq=i + 1), (), 1, 0)
    table.freeze()
    table.folded()
    held = [i for i in range(100) if table.get(b"k%d" % i) is not UNKNOWN]
    assert 99 in held
    assert len(held) <= 20


def test_a_fold_under_way_and_newer_writes_of_the_same_key() -> None:
    table = Table(Mark(), 0)
    table.apply(write(b"a", seq=1), (), 1, 0)
    assert table.freeze() == write(b"a", seq=1)
    table.apply(write(b"a", seq=2), (), 0, 0)
    table.folded()
    assert table.get(b"a")[2] == 2
    assert table.freeze() == write(b"a", seq=2)


@given(st.sets(st.binary(min_size=1, max_size=8), max_size=50), st.binary(min_size=1, max_size=8))
def test_the_filter_never_denies_a_key_that_is_there(keys: set[bytes], other: bytes) -> None:
    filter = KeyFilter(len(keys), complete=True)
    assert not filter.may_hold(other)
    filter.add(keys)
    assert all(filter.may_hold(key) for key in keys)
    assert KeyFilter(1, complete=False).may_hold(other)


def test_lifetimes_end_in_order_and_once() -> None:
    lifetimes = Lifetimes(all_known=True)
    lifetimes.add({b"a": (b"", 1, 1, 30), b"b": (b"", 1, 2, 10), b"c": (b"", 1, 3, None)})
    assert lifetimes.next_ms() == 10
    assert lifetimes.pop_ended(9, 5) == {}
    assert lifetimes.pop_ended(30, 1) == {b"b": 2}
    assert lifetimes.pop_ended(30, 1) == {b"a": 1}
    assert lifetimes.pop_ended(99, 1) == {}


def test_lifetimes_that_end_late_are_left_to_the_disk() -> None:
    lifetimes = Lifetimes(all_known=True)
    late_ms = 3 * HORIZON_MS
    lifetimes.add({b"soon": (b"", 1, 1, 10), b"late": (b"", 1, 2, late_ms)})
    lifetimes.folded(seq=2, time_ms=0)
    assert lifetimes.pop_ended(late_ms, 9) == {b"soon": 1}
    assert lifetimes.needs_more(late_ms)
    lifetimes.asked_until_ms = late_ms + HORIZON_MS
    lifetimes.extend([(late_ms, b"late", 2)], limit=10, time_ms=0)
    assert lifetimes.pop_ended(late_ms, 9) == {b"late": 2}


def test_a_lifetime_that_no_fold_has_carried_is_not_left_to_the_disk() -> None:
    """A backup becomes primary between two folds: the disk, asked then, does not know the newest write yet."""
    lifetimes = Lifetimes(all_known=False)
    lifetimes.add({b"on disk": (b"", 5, 219, 10), b"newest": (b"", 5, 220, 20)})
    lifetimes.folded(seq=219, time_ms=5)
    assert lifetimes.needs_more(6)
    lifetimes.asked_until_ms = 6 + HORIZON_MS
    lifetimes.extend([(10, b"on disk", 219)], limit=10, time_ms=6)
    assert lifetimes.pop_ended(20, 9) == {b"on disk": 219, b"newest": 220}
