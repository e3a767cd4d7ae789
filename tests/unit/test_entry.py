"""Log entries: the same bytes for every member, and back."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus_kv.errors import MalformedRequest
from bus_kv.protocol.batch import (
    ABSENT,
    CREATED,
    DELETED,
    PUT,
    REFUSED,
    REPLACED,
    Batch,
)  # fmt: skip
from bus_kv.protocol.codec import encode_cbor
from bus_kv.protocol.entry import Entry, applied_count, decode_entry

SEQS = st.integers(0, 2**62)
PARTS = st.lists(st.binary(max_size=20), max_size=3).map(tuple)


@given(SEQS, SEQS, SEQS, st.tuples(SEQS, SEQS), PARTS, st.data())
def test_an_entry_comes_back_from_its_bytes(
    epoch: int, first: int, time_ms: int, previous: tuple[int, int], batches: tuple[bytes, ...],
    data: st.DataObject,
) -> None:  # fmt: skip
    outcomes = tuple(data.draw(st.binary(max_size=5)) for _ in batches)
    record = data.draw(st.none() | st.just({"id": "s1", "epoch": 3}))
    entry = Entry("s1", epoch, first, first + 1, previous, time_ms, -7, outcomes, batches, record)
    assert decode_entry(entry.encode()) == entry
    assert decode_entry(entry.encode()).encode() == entry.encode()


def test_an_entry_holds_the_clients_bytes_unchanged() -> None:
    raw = Batch(bytes([PUT]), [b"k"], [b"v"], "c", [1]).encode()
    entry = Entry("s1", 1, 2, 2, (1, 1), 5, 1, (bytes([CREATED]),), (raw,))
    assert raw in entry.encode()
    ((outcomes, batch),) = entry.decoded()
    assert (outcomes, batch.keys, batch.values) == (bytes([CREATED]), [b"k"], [b"v"])


@pytest.mark.parametrize(
    ("outcomes", "count"),
    [([], 0), ([REFUSED, ABSENT], 0), ([CREATED, REFUSED, REPLACED, DELETED, ABSENT], 3)],
)
def test_only_applied_operations_take_a_seq(outcomes: list[int], count: int) -> None:
    assert applied_count(bytes(outcomes)) == count


@given(st.binary(max_size=60))
def test_bytes_that_are_no_entry_are_refused(body: bytes) -> None:
    with pytest.raises((MalformedRequest, KeyError, TypeError, ValueError)):
        decode_entry(body)


@pytest.mark.parametrize(
    "fields", [{}, {"header": []}, {"header": [1] * 8}, {"header": [1] * 8, "batches": 5}]
)
def test_maps_that_are_no_entry_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises((MalformedRequest, KeyError, TypeError, ValueError)):
        decode_entry(encode_cbor(fields))
