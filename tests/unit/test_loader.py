"""How much the loader has in memory of what it fetches, and who is answered by it when."""

from __future__ import annotations

from typing import Any

from bus_kv.core.machine import Lookup, Mark, Unread
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from nodes.machine.loader import LOOKUP_KEYS_MAX, UNREACHED, Loader
from nodes.machine.table import UNKNOWN, Table
from tests.simulator.state import Shard

REPLY_BYTES = 1000


class Rig:
    """A loader over a simulated disk that answers when told to."""

    def __init__(self, sizes: dict[bytes, int]) -> None:
        self.disk = Shard()
        for seq, (key, size) in enumerate(sizes.items(), 1):
            self.disk.rows[key] = (seq, (b"v" * size, 1, seq, None))
        mark = Mark(1, len(sizes), 0, len(sizes), sum(sizes.values()))
        self.table = Table(mark, cache_bytes_max=1 << 20)
        self.asked: list[tuple[Any, Any]] = []
        self.loader = Loader("s1", self.table, self.ask, REPLY_BYTES)
        self.loaded: dict[str, Any] = {}
        self.value_bytes: list[int] = []
        """Of the values of each lookup."""

    def ask(self, query: Any, then: Any) -> None:
        self.asked.append((query, then))

    def want(self, name: str, heads: list[bytes], whole: list[bytes]) -> None:
        self.loader.want(heads, whole, lambda loaded: self.loaded.update({name: loaded}))

    def answer(self) -> Lookup:
        """Let the disk answer one lookup."""
        self.loader.take_wanted()
        ((query, then),) = self.asked
        self.asked.clear()
        rows = self.disk.answer(query)
        values = [row[1] for row in rows[1:] if isinstance(row[1], bytes)]
        self.value_bytes.append(sum(map(len, values)))
        then(rows, None)
        assert isinstance(query, Lookup)
        return query

    def values(self, name: str) -> dict[bytes, int | None]:
        """Lengths of the values that a request got; None where it got none."""
        return {
            key: len(record[0]) if record and isinstance(record[0], bytes) else None
            for key, record in self.loaded[name].items()
        }


def keys(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}{i:04}".encode() for i in range(count)]


def test_what_is_to_be_written_comes_without_its_value() -> None:
    rig = Rig(dict.fromkeys(keys("k", 10), 900))
    rig.want("write", [*keys("k", 10), b"absent"], [])
    rig.answer()
    assert rig.value_bytes == [0]
    assert rig.loaded["write"][b"k0003"] == (Unread(900), 1, 4, None)
    assert rig.loaded["write"][b"absent"] is None


def test_the_table_learns_whole_records_only() -> None:
    rig = Rig(dict.fromkeys(keys("k", 4), 900))
    rig.want("both", [b"k0000", b"absent"], [b"k0001", b"k0002", b"k0003"])
    rig.answer()
    known = {key: rig.table.get(key) for key in [*keys("k", 4), b"absent"]}
    assert {key for key, record in known.items() if record is UNKNOWN} == {b"k0000", b"k0003"}
    assert known[b"k0001"] == (b"v" * 900, 1, 2, None)
    assert known[b"absent"] is None


def test_a_lookup_brings_one_reply_of_values_whatever_is_asked_for() -> None:
    rig = Rig(dict.fromkeys(keys("k", 3000), 300))
    for name in range(20):
        rig.want(f"read {name}", [], keys("k", 3000)[name:])
    for name in range(20):
        rig.answer()
        got = rig.values(f"read {name}")
        assert [*got.values()] == [300] * 4 + [None] * (2996 - name)
        assert rig.loaded[f"read {name}"][b"k2999"] == UNREACHED
    assert max(rig.value_bytes) == 1200
    assert not rig.asked


def test_a_value_larger_than_the_rest_of_a_reply_comes_alone() -> None:
    rig = Rig({b"a": 5000, b"b": 1})
    rig.want("read", [], [b"a", b"b"])
    rig.answer()
    assert rig.values("read") == {b"a": 5000, b"b": None}


def test_a_request_gets_all_its_values_if_they_fit_a_reply() -> None:
    """It may have to wait for the next lookup; it never gets a part because of those before it."""
    rig = Rig(dict.fromkeys([*keys("a", 3), *keys("b", 3), *keys("c", 3)], 250))
    for name in "abc":
        rig.want(name, [], keys(name, 3))
    rig.answer()
    assert [*rig.loaded] == ["a"]
    rig.want("late", [], [b"a0000"])
    rig.answer()
    assert [*rig.loaded] == ["a", "b"]
    rig.answer()
    assert [*rig.loaded] == ["a", "b", "c", "late"]
    assert all(None not in rig.values(name).values() for name in rig.loaded)


def test_writes_do_not_wait_for_values_of_others() -> None:
    rig = Rig(dict.fromkeys([b"a", b"b", b"c"], 1000))
    rig.want("write a", [b"a"], [])
    rig.want("read a", [], [b"a"])
    rig.want("read b", [], [b"b"])
    rig.want("write b", [b"b"], [])
    rig.want("both", [b"c"], [b"c"])
    rig.answer()
    assert [*rig.loaded] == ["write a", "read a", "write b"]
    assert rig.loaded["write b"][b"b"] == (Unread(1000), 1, 2, None)
    rig.answer()
    assert rig.values("read b") == {b"b": 1000}
    rig.answer()
    assert rig.values("both") == {b"c": 1000}


def test_a_record_that_is_written_and_out_of_reach_is_known_but_for_its_value() -> None:
    rig = Rig({b"a": 1000, b"b": 7})
    rig.want("both", [b"b"], [b"a", b"b", b"c"])
    rig.answer()
    assert rig.loaded["both"][b"b"] == (Unread(7), 1, 2, None)
    assert rig.loaded["both"][b"c"] == UNREACHED


def test_a_lookup_has_a_bound_of_keys() -> None:
    many = keys("k", LOOKUP_KEYS_MAX)
    rig = Rig({})
    rig.want("one", many[:1000], [])
    rig.want("two", [], many[1000:])
    rig.want("three", [b"more"], [])
    assert len(rig.answer().heads) == 1000
    assert rig.answer().heads == [b"more"]
    assert [*rig.loaded] == ["one", "two", "three"]


def test_who_does_not_wait_any_more_is_not_asked_for() -> None:
    rig = Rig({b"a": 1, b"b": 1})
    rig.loader.want([b"a"], [], lambda _: None, lambda: False)
    rig.want("other", [b"b"], [])
    assert rig.answer().heads == [b"b"]


def test_a_lookup_that_a_fold_overtook_is_asked_again() -> None:
    rig = Rig({b"a": 1})
    rig.want("read", [], [b"a", b"b"])
    rig.loader.take_wanted()
    rig.disk.rows[b"b"] = (2, (b"new", 1, 2, None))
    rig.table.folded()
    ((_, then),) = rig.asked
    rig.asked.clear()
    then([2, (b"a", b"v", 1, 1, None)], None)
    assert not rig.loaded
    rig.answer()
    assert rig.values("read") == {b"a": 1, b"b": 3}


def test_the_keys_of_a_batch_by_what_is_done_to_them() -> None:
    rig = Rig(dict.fromkeys([b"a", b"b", b"c", b"d"], 5))
    kinds = bytes([b.GET, b.PUT, b.GET, b.DELETE, b.GET])
    batch = Batch(kinds, [b"c", b"a", b"a", b"b", b"d"])
    rig.loader.want_for(batch, {b"a", b"b", b"c"}, lambda _: None, lambda: True)
    lookup = rig.answer()
    assert (lookup.heads, lookup.whole) == ([b"a", b"b"], [b"c", b"a"])
