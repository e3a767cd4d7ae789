"""What is left of a reply that does not fit into a message."""

from typing import Any

import cbor2
import pytest

from bus_kv.core.machine import Unread
from bus_kv.protocol import batch as b
from bus_kv.protocol.codec import Codec, encode_cbor
from bus_kv.protocol.sizes import Sizes
from nodes.machine.fit import encode_fitting
from nodes.machine.judge import read_reply


def batch(*sizes: int) -> dict[str, Any]:
    return {"results": [{"key": b"k", "value": bytes(size)} for size in sizes]}


@pytest.mark.parametrize(
    ("sizes", "left"),
    [
        ([1000] * 8, [1000] * 4),
        ([3000] * 2 + [10] * 9, [3000] + [10] * 9),
        ([10] * 9 + [9000], [10] * 9),
        ([9000], []),
    ],
)
def test_the_last_of_the_large_values_give_way(sizes: list[int], left: list[int]) -> None:
    body = encode_fitting(Codec.CBOR, batch(*sizes), 5000)
    assert body is not None
    assert len(body) <= 5000
    results = cbor2.loads(body)["results"]
    assert [len(result["value"]) for result in results if "code" not in result] == left
    failures = {result["code"] for result in results if "code" in result}
    assert failures == {"VALUE_TOO_LARGE"}


def test_results_of_writes_are_all_told_or_none() -> None:
    assert encode_fitting(Codec.CBOR, {"results": [{"version": [1, 1]}] * 1000}, 5000) is None


SIZES = Sizes(1 << 20)


@pytest.mark.parametrize("count", [1, 2, 60, 1000, SIZES.operations])
@pytest.mark.parametrize(
    "value_bytes", [0, 1, 100, 1000, 1777, 19_000, 20_000, 300_000, SIZES.value]
)
def test_gets_are_answered_as_far_as_a_reply_goes(count: int, value_bytes: int) -> None:
    record = (b"v" * value_bytes, 2**33, 2**60, 2**41)
    reply = read_reply([record] * count, SIZES.entry)
    body = encode_cbor({"batch": reply.to_wire()})
    assert len(body) <= SIZES.message
    answered = reply.outcomes.count(b.FOUND)
    assert answered == count or (answered + 1) * (value_bytes + 100) > SIZES.entry - 48 * count
    assert reply.outcomes[0] == b.FOUND
    assert reply.outcomes.count(b.UNANSWERED) == count - answered


def test_what_was_not_read_is_not_answered() -> None:
    records = [(b"v", 1, 5, None), (Unread(1), 1, 6, 9000), None, (Unread(0), 0, 0, None)]
    reply = read_reply([*records], SIZES.entry)
    assert reply.outcomes == bytes([b.FOUND, b.UNANSWERED, b.MISSING, b.UNANSWERED])
    assert reply.values == [b"v", None, None, None]
    assert reply.versions() == [(1, 5), None, None, None]
    assert reply.expires_at == {}
