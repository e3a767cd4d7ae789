"""Decoded bodies become requests; what a node answers on a subject of a shard that it does not serve."""

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus_kv.core.machine import AppendCompleted, Publish, Received, Subscribe
from bus_kv.errors import (
    MalformedRequest,
    RequestError,
    ShardUnknown,
    UnknownVerb,
    ValueTooLarge,
)  # fmt: skip
from bus_kv.knobs import CLIENT_CHARS_MAX, NUMBER_MAX, Knobs
from bus_kv.protocol.batch import DELETE, GET, PUT
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.requests import (
    DataRequest,
    ReceiptRequest,
    ScanRequest,
    make_cursor,
    parse_request,
    parse_request_id,
    prefix_end,
)  # fmt: skip
from bus_kv.protocol.shard_map import Member, Shard, ShardState
from bus_kv.protocol.sizes import Sizes
from bus_kv.subjects import Subjects
from nodes.machine.node import NodeConfig, NodeMachine

SIZES = Sizes(1 << 20)
KEYS = st.binary(min_size=1, max_size=8)


def parse(verb: str, **fields: Any) -> Any:
    return parse_request(verb, fields, SIZES)


def test_a_put_has_its_condition_and_lifetime() -> None:
    request = parse("put", key=b"k", value=b"v", if_version=[3, 42], ttl_ms=5)
    assert isinstance(request, DataRequest)
    assert (request.batch.kinds, request.batch.keys, request.batch.values) == (
        bytes([PUT]), [b"k"], [b"v"],
    )  # fmt: skip
    assert request.batch.conditions == {0: (3, 42)}
    assert request.batch.ttls_ms == {0: 5}
    assert (request.keyspace, request.consistency, request.request_id) == ("default", None, None)


def test_a_batch_keeps_the_order_of_its_operations() -> None:
    ops = [{"op": "delete", "key": b"a"}, {"op": "get", "key": b"b"},
           {"op": "put", "key": b"c", "value": b"v", "if_absent": True}]  # fmt: skip
    batch = parse("batch", ops=ops, atomic=True).batch
    assert batch.kinds == bytes([DELETE, GET, PUT])
    assert batch.keys == [b"a", b"b", b"c"]
    assert batch.values == [None, None, b"v"]
    assert batch.conditions == {2: None}
    assert batch.atomic is True


def test_a_receipt_is_a_shard_and_a_version() -> None:
    request = parse("receipt", shard="s1", version=[3, 43])
    assert isinstance(request, ReceiptRequest)
    assert (request.shard, request.version, request.consistency) == ("s1", (3, 43), "quorum")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "needs a shard"), ({"shard": ""}, "needs a shard"), ({"shard": "s1"}, "needs a version"),
        ({"version": [3, 43]}, "needs a shard"), ({"shard": 1, "version": [3, 43]}, "shard of"),
        ({"shard": "s1", "version": None}, "version of"), ({"shard": "s1", "version": 3}, "version of"),
        ({"shard": "s1", "version": [3]}, "two whole numbers"),
        ({"shard": "s1", "version": [3, "43"]}, "two whole numbers"),
        ({"shard": "s1", "version": [3, -1]}, "two whole numbers"),
        ({"shard": "s1", "version": [3, 43], "key": b"k"}, "no field 'key'"),
        ({"shard": "s1", "version": [3, 43], "consistency": "some"}, "consistency"),
    ],
)  # fmt: skip
def test_anything_else_is_no_receipt(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(MalformedRequest, match=says):
        parse("receipt", **fields)


def test_a_shard_whose_name_is_no_id_is_unknown() -> None:
    with pytest.raises(ShardUnknown, match=r"'s\.1'"):
        parse("receipt", shard="s.1", version=[3, 43])


def test_verbs_are_known_by_name() -> None:
    with pytest.raises(UnknownVerb, match="'fly'"):
        parse("fly")


def test_a_value_may_have_the_largest_size_and_no_byte_more() -> None:
    parse("put", key=b"k", value=b"v" * SIZES.value)
    with pytest.raises(ValueTooLarge, match=str(SIZES.value)):
        parse("put", key=b"k", value=b"v" * (SIZES.value + 1))


@given(
    st.text("aZ-:.0 \n\u00e9\u2603", min_size=1, max_size=CLIENT_CHARS_MAX),
    st.integers(0, NUMBER_MAX),
)
def test_a_request_id_is_a_client_and_a_number(client: str, number: int) -> None:
    assert parse_request_id(f"{client}:{number}") == (client, number)


@pytest.mark.parametrize(
    "text", ["", ":", "a", "a:", ":1", "a:-1", "a:+1", "a: 1", "a:1 ", "a:1\n", "a:0x1", "a:1_0",
             "a:1.0", "a:\u0663", "a:\u00b2", f"a:{NUMBER_MAX + 1}", "a:" + "0" * 21,
             "x" * 65 + ":1"],
)  # fmt: skip
def test_anything_else_is_no_request_id(text: str) -> None:
    with pytest.raises(MalformedRequest, match="request_id"):
        parse_request_id(text)


@given(st.dictionaries(
    st.sampled_from(["key", "value", "ops", "limit", "cursor", "start", "end", "prefix", "reverse",
                     "if_version", "if_absent", "ttl_ms", "request_id", "keyspace", "consistency",
                     "atomic", "keys_only", "cached", "shard", "version", "x"]),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a:0\u2603", max_size=4)
    | st.binary(max_size=4) | st.lists(st.integers(), max_size=3) | st.just([{"op": "get"}])
    | st.just({"a": 1}),
), st.sampled_from(["get", "put", "delete", "batch", "scan", "receipt", "health", "map"]))  # fmt: skip
def test_any_fields_are_a_request_or_a_failure_with_a_code(
    fields: dict[str, Any], verb: str
) -> None:
    with contextlib.suppress(RequestError):
        assert parse_request(verb, fields, SIZES).verb == verb


@given(KEYS, KEYS)
def test_a_prefix_holds_what_begins_with_it(prefix: bytes, key: bytes) -> None:
    end = prefix_end(prefix)
    inside = prefix <= key and (end is None or key < end)
    assert inside is key.startswith(prefix)


@given(st.binary(max_size=4), st.none() | KEYS, st.booleans(), KEYS)
def test_a_cursor_narrows_the_scan_it_came_from(
    start: bytes, end: bytes | None, reverse: bool, position: bytes
) -> None:
    fields: dict[str, Any] = {"start": start, "reverse": reverse}
    if end is not None:
        fields["end"] = end
    first = parse("scan", **fields)
    assert isinstance(first, ScanRequest)
    again = parse("scan", **fields, cursor=make_cursor(first, position))
    if reverse:
        assert (again.start, again.end) == (start, min(end or position, position))
    else:
        assert (again.start, again.end) == (max(start, position), end)
    with pytest.raises(MalformedRequest, match="cursor"):
        parse("scan", reverse=not reverse, cursor=make_cursor(first, position))


def test_a_node_that_does_not_serve_a_shard_says_so() -> None:
    config = NodeConfig("n1", "incarnation", (1, "run"), Subjects(), 1 << 20)
    node = NodeMachine(config, Knobs())
    body = encode_cbor({"epoch": 1, "ops": [{"op": "get", "key": b"a"}]})
    node.step(Received("shard", "s9", body, reply="inbox"), 0)
    (answer,) = node.take_ready(0).effects
    assert isinstance(answer, Publish)
    fields = decode_cbor(answer.body)
    assert (fields["code"], fields["retry"]) == ("NOT_PRIMARY", True)
    assert answer.headers is not None
    assert answer.headers["Nats-Service-Error-Code"] == "421"


@pytest.mark.parametrize(("epoch", "code"), [(1, "NOT_PRIMARY"), (2, "OUTCOME_UNKNOWN")])
def test_a_former_primary_refuses_only_what_is_of_its_epoch_for_good(epoch: int, code: str) -> None:
    """It hears for a moment longer what is for the next one, which may do it (found by a seed)."""
    node = NodeMachine(NodeConfig("n1", "i1", (1, "run"), Subjects(), 1 << 20), Knobs())
    record = Shard(
        "s1", "default", b"", None, 1, "t1", (Member("n1", "i1"),), "n1", ShardState.RECOVERING
    )
    replica = node.new_replica(record)
    replica.promise(1, "t1")
    replica.open(record, 0)
    replica.step_down("another configuration is active")
    node.take_ready(0)
    body = encode_cbor({"epoch": epoch, "ops": [{"op": "put", "key": b"a", "value": b"1"}]})
    node.step(Received("shard", "s1", body, reply="inbox"), 0)
    (answer,) = [e for e in node.take_ready(0).effects if isinstance(e, Publish)]
    assert decode_cbor(answer.body)["code"] == code


@pytest.mark.parametrize(("epoch", "code"), [(2, "NOT_PRIMARY"), (1, "OUTCOME_UNKNOWN")])
def test_a_primary_listens_before_it_serves_and_leaves_earlier_epochs_to_their_primary(
    epoch: int, code: str
) -> None:
    """Clients hear that the shard is served as soon as it does; and should its attempt come to nothing, what an earlier
    primary still does may yet be chosen."""
    node = NodeMachine(NodeConfig("n1", "i1", (1, "run"), Subjects(), 1 << 20), Knobs())
    node.start(0)
    node.on_deadline(Knobs().hello_wait_ms * 1_000_000)
    members = (Member("n1", "i1"),)
    record = Shard("s1", "default", b"", None, 2, "t2", members, "n1", ShardState.RECOVERING)
    node.new_replica(record).open(record, 0)
    append = node.take_ready(0).append
    assert append is not None
    node.step(AppendCompleted(append.ticket), 0)
    assert Subscribe("shard", "s1", True) in node.take_ready(0).effects
    body = encode_cbor({"epoch": epoch, "ops": [{"op": "put", "key": b"a", "value": b"1"}]})
    node.step(Received("shard", "s1", body, reply="inbox"), 0)
    (answer,) = [e for e in node.take_ready(0).effects if isinstance(e, Publish)]
    assert decode_cbor(answer.body)["code"] == code
