"""Columnar batches: the bytes that travel, cutting and choosing of operations."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus_kv.errors import KeyTooLarge, MalformedRequest, ValueTooLarge
from bus_kv.knobs import KEY_BYTES_MAX
from bus_kv.protocol.batch import (
    DELETE,
    EXPIRE,
    GET,
    PUT,
    Batch,
    BatchReply,
    check_batch,
    decode_batch,
    decode_batch_reply,
    split_batch,
)  # fmt: skip
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.sizes import Sizes

SIZES = Sizes(1 << 20)
VERSIONS = st.tuples(st.integers(0, 9), st.integers(1, 2**40))


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    """Any batch that a client may send."""
    kinds = draw(st.lists(st.sampled_from([GET, PUT, DELETE]), min_size=1, max_size=12))
    count = len(kinds)
    values = [draw(st.binary(max_size=40)) if kind == PUT else None for kind in kinds]
    batch = Batch(
        bytes(kinds),
        draw(st.lists(st.binary(min_size=1, max_size=9), min_size=count, max_size=count)),
        values if PUT in kinds else [],
        client="c",
        consistency=draw(st.sampled_from(["one", "quorum", "all"])),
        atomic=draw(st.booleans()),
    )
    _identify(draw, batch, count)
    for i, kind in enumerate(kinds):
        if kind != GET and draw(st.booleans()):
            batch.conditions[i] = draw(VERSIONS if kind == DELETE else VERSIONS | st.none())
        if kind == PUT and draw(st.booleans()):
            batch.ttls_ms[i] = draw(st.integers(1, 10**9))
    return batch


def _identify(draw: st.DrawFn, batch: Batch, count: int) -> None:
    if draw(st.booleans()):
        batch.numbers = [draw(st.integers(0, 2**64 - 1))] * count
        batch.indexes = list(range(count))
    else:
        numbers = st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count, unique=True)
        batch.numbers = sorted(draw(numbers))


def parts(batch: Batch) -> list[Any]:
    """All that makes each operation what it is."""
    return [
        (
            batch.kinds[i], batch.keys[i], batch.values[i] if batch.values else None,
            batch.identity(i), batch.conditions.get(i, "none"), batch.ttls_ms.get(i),
        )
        for i in range(len(batch))
    ]  # fmt: skip


@given(batches())
def test_a_batch_comes_back_from_its_bytes(batch: Batch) -> None:
    check_batch(batch, SIZES)
    again = decode_batch(batch.encode())
    check_batch(again, SIZES)
    assert parts(again) == parts(batch)
    assert (again.client, again.consistency, again.atomic) == ("c", batch.consistency, batch.atomic)


@given(batches(), st.data())
def test_chosen_operations_keep_all_that_they_are(batch: Batch, data: st.DataObject) -> None:
    positions = sorted(data.draw(st.sets(st.integers(0, len(batch) - 1), min_size=1)))
    chosen = batch.select(positions)
    check_batch(chosen, SIZES)
    assert parts(chosen) == [parts(batch)[i] for i in positions]
    again = decode_batch(chosen.encode())
    check_batch(again, SIZES)
    assert parts(again) == parts(chosen)


@given(batches(), st.integers(1, 300))
def test_pieces_of_a_batch_are_the_batch(batch: Batch, bytes_max: int) -> None:
    pieces = split_batch(batch, bytes_max)
    assert [part for piece in pieces for part in parts(piece)] == parts(batch)
    assert all(pieces)
    if batch.atomic:
        assert len(pieces) == 1


@pytest.mark.parametrize("value_bytes", [0, 10, 500])
def test_pieces_fit_into_what_they_are_cut_for(value_bytes: int) -> None:
    count, bytes_max = 1000, 10_000
    batch = Batch(
        bytes([PUT]) * count, [b"%08d" % i for i in range(count)], [b"v" * value_bytes] * count,
        "c" * 64, [2**63] * count, list(range(count)),
        conditions=dict.fromkeys(range(count), (2**40, 2**62)),
        ttls_ms=dict.fromkeys(range(count), 2**40),
    )  # fmt: skip
    for piece in split_batch(batch, bytes_max):
        assert len(piece.encode()) <= bytes_max


def test_expirations_are_not_taken_from_the_bus() -> None:
    batch = Batch(bytes([EXPIRE]), [b"a"], client="c", numbers=[1])
    with pytest.raises(MalformedRequest, match="kind"):
        check_batch(batch, SIZES)


def test_sizes_are_checked_to_the_byte() -> None:
    def put(key: bytes, value: bytes) -> Batch:
        return Batch(bytes([PUT]), [key], [value], "c", [1])

    longest = b"v" * SIZES.value
    largest = put(b"k" * KEY_BYTES_MAX, longest)
    check_batch(largest, SIZES)
    assert len(largest.encode()) <= SIZES.batch
    with pytest.raises(KeyTooLarge, match="4097"):
        check_batch(put(b"k" * (KEY_BYTES_MAX + 1), b"v"), SIZES)
    with pytest.raises(ValueTooLarge, match=str(SIZES.value)):
        check_batch(put(b"k", longest + b"v"), SIZES)


def test_a_batch_holds_as_many_operations_as_the_limit_says() -> None:
    most = SIZES.operations
    assert most >= 1000
    check_batch(Batch(bytes(most), [b"k"] * most), SIZES)
    with pytest.raises(MalformedRequest, match=str(most)):
        check_batch(Batch(bytes(most + 1), [b"k"] * (most + 1)), SIZES)


FIELDS = ["kinds", "keys", "values", "client", "numbers", "indexes", "conditions", "ttls_ms",
          "consistency", "atomic", "x"]  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text("a\u2603", max_size=3)
    | st.binary(max_size=3) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


@given(batches(), st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3))
def test_any_columns_are_a_batch_or_malformed(batch: Batch, junk: dict[str, Any]) -> None:
    body = encode_cbor({**decode_cbor(batch.encode()), **junk})
    with contextlib.suppress(MalformedRequest):
        check_batch(decode_batch(body), SIZES)


@given(
    st.binary(min_size=1, max_size=5), st.integers(0, 2**40) | st.none(), st.booleans(), st.data()
)
def test_a_reply_comes_back_from_the_wire(
    outcomes: bytes, first: int | None, with_read: bool, data: st.DataObject
) -> None:
    count = len(outcomes)
    numbers = st.lists(st.integers(0, 2**40), min_size=count, max_size=count)
    reply = BatchReply(
        outcomes, data.draw(st.integers(0, 9) | numbers),
        data.draw(numbers) if first is None else first,
        data.draw(st.none() | st.lists(st.binary() | st.none(), min_size=count, max_size=count)),
        {0: 5}, {count - 1: {"code": "CONFLICT"}}, (1, 2, 3) if with_read else None,
    )  # fmt: skip
    again = decode_batch_reply(decode_cbor(encode_cbor(reply.to_wire())))
    assert [again.version(i) for i in range(count)] == [reply.version(i) for i in range(count)]
    assert (again.outcomes, again.expires_at) == (outcomes, reply.expires_at)
    assert again.failures == reply.failures
    assert list(again.read or ()) == list(reply.read or ())
