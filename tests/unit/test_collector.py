"""When a node collects garbage that reference counts do not free."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from bus_kv.runtime import collector
from bus_kv.runtime.collector import INTERVAL_NS, OLDER_EVERY, Collector


class Knot:
    def __init__(self) -> None:
        self.self = self


class Clock:
    now_ns = 10 * INTERVAL_NS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    """Nothing is collected but by a turn."""
    clock = Clock()
    monkeypatch.setattr(collector, "perf_counter_ns", lambda: clock.now_ns)
    gc.disable()
    yield clock
    gc.enable()


def dropped() -> "weakref.ref[Knot]":
    return weakref.ref(Knot())


def test_what_is_dropped_goes_after_a_turn_but_not_after_every_one(clock: Clock):
    collector = Collector()
    first = dropped()
    collector.after_turn()
    assert first() is None
    second = dropped()
    clock.now_ns += INTERVAL_NS - 1
    collector.after_turn()
    assert second() is not None
    clock.now_ns += 1
    collector.after_turn()
    assert second() is None


def test_what_was_dropped_after_it_had_outlived_a_collection_goes_as_well(clock: Clock):
    collector = Collector()
    held = Knot()
    told = weakref.ref(held)
    collector.after_turn()
    del held
    for _ in range(OLDER_EVERY):
        clock.now_ns += INTERVAL_NS
        collector.after_turn()
    assert told() is None


def test_a_record_is_tracked_until_its_first_collection(clock: Clock):
    value = b"value"
    record = (value, 3, 7 + len(value), None)
    assert gc.is_tracked(record)
    Collector().after_turn()
    assert not gc.is_tracked(record)
