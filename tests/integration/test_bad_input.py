"""Whatever arrives on the bus: a malformed request is refused with a code that says why, and nothing else happens."""

import json
from collections.abc import AsyncIterator
from typing import Any

import cbor2
import pytest
import pytest_asyncio

from tests.support.cluster import Bus, Cluster, Reply, assert_failure, cluster_on, encode

pytestmark = pytest.mark.asyncio(loop_scope="module")

DATA_VERBS = ("get", "put", "delete", "batch", "scan")
VERBS = (*DATA_VERBS, "health", "stats", "map")
NESTED = b"[" * 600 + b"]" * 600
"""Deep enough to exhaust a careless interpreter, shallow enough to pass a JSON parser."""
REPLY_BYTES_MAX = 4096
"""A refusal quotes at most a piece of what it refuses."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(
    nats_url: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path_factory.mktemp("bad"), nodes=2) as cluster:
        yield cluster


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_happens(cluster: Cluster) -> AsyncIterator[None]:
    """Around every test: no process ends, and no operation is written."""
    before = await _next_seq(cluster)
    yield
    ended = cluster.exited()
    for name in ended:
        cluster.restart(name)
    await cluster.wait_healthy()
    assert not ended, f"a message has ended {ended}"
    assert await _next_seq(cluster) == before + 1, "something was written"


async def _next_seq(cluster: Cluster) -> int:
    seq: int = (await cluster.until_ok("put", key="marker", value=""))["version"][1]
    return seq


@pytest.fixture
def bus(cluster: Cluster) -> Bus:
    return cluster.bus


def assert_malformed(reply: Reply, says: str = "") -> None:
    assert_failure(reply, "MALFORMED_REQUEST", 400, says=says)
    assert len(reply.body) < REPLY_BYTES_MAX


# ---- bodies that are no map, or no clear one ----

NOT_JSON = {
    "array": b"[]",
    "text": b'"key"',
    "null": b"null",
    "number": b"1",
    "space first": b' {"key":"a"}',
    "byte order mark": b'\xef\xbb\xbf{"key":"a"}',
    "zero byte": b"\x00",
    "cbor array": b"\x81\x01",
    "cbor text": b"\x63key",
    "cbor tag 55799": b"\xd9\xd9\xf7\xa1\x63key\x61a",
    "cbor break": b"\xff",
    "open": b"{",
    "truncated": b'{"key":"a"',
    "half a text": b'{"key":"a',
    "trailing text": b'{"key":"a"}x',
    "second object": b'{"key":"a"}{"key":"a"}',
    "trailing zero": b'{"key":"a"}\x00',
    "same name twice": b'{"key":"a","key":"a"}',
    "same name, escaped": b'{"key":"a","k\\u0065y":"a"}',
    "same name, nested": b'{"ops":[{"op":"get","key":"a","op":"get"}]}',
    "both names": b'{"key":"a","key_b64":"YQ=="}',
    "bad base64": b'{"key_b64":"YQ"}',
    "base64 with spaces": b'{"key_b64":"Y Q=="}',
    "base64 of a number": b'{"key_b64":1}',
    "NaN": b'{"key":NaN}',
    "Infinity": b'{"limit":Infinity}',
    "-Infinity": b'{"limit":-Infinity}',
    "overflow": b'{"limit":1e999}',
    "lone surrogate": b'{"key":"\\ud800"}',
    "lone surrogate, name": b'{"\\udfff":"a"}',
    "not UTF-8": b'{"key":"\xff"}',
    "surrogate as UTF-8": b'{"key":"\xed\xa0\x80"}',
    "huge integer": b'{"limit":' + b"9" * 5000 + b"}",
    "deep lists": b'{"key":' + NESTED + b"}",
    "deep objects": b'{"key":' * 600 + b"1" + b"}" * 600,
    "very deep": b'{"key":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "single quotes": b"{'key':'a'}",
    "comma at the end": b'{"key":"a",}',
}
NOT_CBOR = {
    "truncated": b"\xa1\x63key\x62a",
    "value missing": b"\xa1\x63key",
    "trailing": b"\xa1\x63key\x61a\x00",
    "second map": b"\xa1\x63key\x61a" * 2,
    "same name twice": b"\xa2" + b"\x63key\x61a" * 2,
    "same name, nested": b"\xa1\x63ops\x81\xa2" + b"\x62op\x63get" * 2,
    "no end": b"\xbf\x63key\x61a",
    "no name at the end": b"\xbf\x63key\x61a\x63key\xff",
    "date tag": b"\xa1\x63key\xc0\x741970-01-01T00:00:00Z",
    "bignum tag": b"\xa1\x65limit\xc2\x41\x01",
    "embedded cbor tag": b"\xa1\x63key\xd8\x18\x41\x61",
    "shared value tags": b"\xa1\x63key\xd8\x1c\x41\x61",
    "string reference tags": b"\xa1\x63key\xd9\x01\x00\x41\x61",
    "unknown tag": b"\xa1\x63key\xd9\xea\x60\x41\x61",
    "tag 55799 inside": b"\xa1\x63key\xd9\xd9\xf7\x41\x61",
    "tagged name": b"\xa1\xc0\x63key\x61a",
    "NaN": b"\xa1\x65limit\xf9\x7e\x00",
    "Infinity": b"\xa1\x65limit\xf9\x7c\x00",
    "undefined": b"\xa1\x63key\xf7",
    "simple value": b"\xa1\x63key\xf8\xff",
    "surrogate as UTF-8": b"\xa1\x63key\x63\xed\xa0\x80",
    "not UTF-8": b"\xa1\x63key\x61\xff",
    "number as a name": b"\xa1\x01\x61a",
    "bytes as a name": b"\xa1\x43key\x61a",
    "list as a name": b"\xa1\x80\x61a",
    "map as a name": b"\xa1\xa0\x61a",
    "reserved length": b"\xa1\x63key\x5c",
    "length without bytes": b"\xa1\x63key\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
    "list of 2**62": b"\xa1\x63key\x9b\x3f\xff\xff\xff\xff\xff\xff\xff",
    "deep lists": b"\xa1\x63key" + b"\x81" * 600 + b"\x01",
    "deep maps": b"\xa1\x63key" * 600 + b"\x01",
    "very deep": b"\xa1\x63key" + b"\x81" * 200_000 + b"\x01",
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON.keys())
async def test_what_is_no_clear_json_object_is_refused_in_json(bus: Bus, body: bytes) -> None:
    for verb in (*VERBS, "shard.s1.request"):
        reply = await bus.ask_raw(verb, body)
        assert_malformed(reply)
        assert reply.body.startswith(b"{")


@pytest.mark.parametrize("body", NOT_CBOR.values(), ids=NOT_CBOR.keys())
async def test_what_is_no_clear_cbor_map_is_refused_in_cbor(bus: Bus, body: bytes) -> None:
    for verb in (*VERBS, "shard.s1.request"):
        reply = await bus.ask_raw(verb, body)
        assert_malformed(reply)
        assert not reply.body.startswith(b"{")


async def test_an_empty_body_is_an_empty_map(bus: Bus) -> None:
    for verb in ("health", "stats", "map", "scan"):
        assert (await bus.ask_raw(verb, b"")).code is None
    for verb in ("get", "put", "delete"):
        assert_malformed(await bus.ask_raw(verb, b""), "key")
    assert_malformed(await bus.ask_raw("batch", b""), "ops")


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_an_unknown_verb_is_named(bus: Bus, codec: str) -> None:
    reply = await bus.ask("fetch", codec=codec, key="a")
    assert_failure(reply, "UNKNOWN_VERB", 404, says="'fetch'")
    assert reply.body.startswith(b"{") is (codec == "json")


# ---- fields ----


def odd(*values: Any) -> tuple[Any, ...]:
    """Values of many types, which a type checker would have in one."""
    return values


KEY = {"key": "bad"}
PUT = {"key": "bad", "value": "1"}
VERSION = "if_version"
FIELDS: list[tuple[str, dict[str, Any], str]] = [
    *((verb, {}, "key") for verb in ("get", "put", "delete")),
    *((verb, {"key": ""}, "key is empty") for verb in ("get", "put", "delete")),
    *(("get", {"key": junk}, "key") for junk in odd(None, 1, True, 1.5, [], {}, ["a"], {"a": 1})),
    *(("put", {"key": "bad", "value": junk}, "value") for junk in odd(None, 1, False, [], {})),
    ("put", KEY, "value"),
    ("get", PUT, "'value'"),
    ("delete", PUT, "'value'"),
    ("get", {**KEY, "kye": 1}, "'kye'"),
    ("put", {**PUT, "ttl": 1}, "'ttl'"),
    ("get", {**KEY, "ttl_ms": 1}, "'ttl_ms'"),
    ("get", {**KEY, "if_absent": True}, "'if_absent'"),
    ("delete", {**KEY, "if_absent": True}, "'if_absent'"),
    *(("put", {**PUT, "ttl_ms": ttl}, "ttl_ms") for ttl in (0, -1, 1.5, "5", True, None, 2**62)),
    *(("put", {**PUT, "if_absent": junk}, "if_absent") for junk in odd(1, "true", None, [])),
    *(
        ("put", {**PUT, VERSION: junk}, "version")
        for junk in odd([], [1], [1, 2, 3], [1, "2"], [1, True], [-1, 2], [1, 2**63], "1,2", 7, {})
    ),
    ("put", {**PUT, "if_absent": True, VERSION: [1, 1]}, "both"),
    *(("get", {**KEY, "consistency": junk}, "consistency") for junk in odd("", "ONE", "most", 1, [])),
    *(("get", {**KEY, "keyspace": junk}, "keyspace") for junk in odd("", 1, [], None)),
    *(
        ("put", {**PUT, "request_id": junk}, "request_id")
        for junk in odd("", "a", "a:", ":1", "a:-1", "a:1.0", "a: 1", f"a:{2**64}", "x" * 65 + ":1",
                     "a:\u0663", "a:1\n", 1, None, ["a", 1])
    ),
    *(("batch", {"ops": junk}, "ops") for junk in odd(None, [], {}, "x", 1)),
    *(("batch", {"ops": [junk]}, "operation 0") for junk in odd(None, 1, "get", [], {})),
    ("batch", {"ops": [{"op": "get", **KEY}] * 10_001}, "operations"),
    ("batch", {"ops": [{"op": "get", **KEY}, {"op": "scan"}]}, "operation 1"),
    ("batch", {"ops": [{"op": ["get"], **KEY}]}, "operation 0"),
    ("batch", {"ops": [{"op": "expire", **KEY}]}, "operation 0"),
    ("batch", {"ops": [{"op": "get"}]}, "operation 0 needs a key"),
    ("batch", {"ops": [{"op": "get", "key": ""}]}, "key is empty"),
    ("batch", {"ops": [{"op": "put", **PUT}, {"op": "put", **KEY}]}, "operation 1 needs a value"),
    ("batch", {"ops": [{"op": "put", **PUT, "ops": []}]}, "'ops'"),
    ("batch", {"ops": [{"op": "put", **PUT, "request_id": "a:1"}]}, "'request_id'"),
    ("batch", {"ops": [{"op": "put", **PUT, "ttl_ms": -5}]}, "ttl_ms"),
    ("batch", {"ops": [{"op": "put", **PUT}], "atomic": 1}, "atomic"),
    ("batch", {"ops": [{"op": "put", **PUT}], **KEY}, "'key'"),
    *(("scan", {"limit": junk}, "limit") for junk in odd(0, -1, 2**63, 1.0, "5", True, None)),
    *(("scan", {name: 1}, name) for name in ("start", "end", "prefix", "reverse", "keys_only")),
    *(("scan", {"cursor": junk}, "cursor") for junk in odd("", "x", "fzz", "f0", "r00", 1, [])),
    ("scan", KEY, "'key'"),
    *((verb, KEY, "'key'") for verb in ("health", "stats", "map")),
]  # fmt: skip


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_wrong_field_is_named(bus: Bus, codec: str) -> None:
    asked = [
        (verb, fields, says, await bus.ask_raw(verb, encode(fields, codec)))
        for verb, fields, says in FIELDS
    ]
    assert [a for a in asked if not _is_malformed(a[3], a[2])] == []
    for *_, reply in asked:
        assert_malformed(reply)


def _is_malformed(reply: Reply, says: str) -> bool:
    return reply.code == "MALFORMED_REQUEST" and says in reply.message


async def test_base64_names_are_for_json_alone(bus: Bus) -> None:
    assert_malformed(await bus.ask("get", codec="cbor", key="a", key_b64="YQ=="), "'key_b64'")
    assert_malformed(await bus.ask("get", key="a", ops_b64="YQ=="), "'ops_b64'")


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_refusal_does_not_repeat_what_was_sent_at_length(bus: Bus, codec: str) -> None:
    """Its headers would break the limits of a NATS message, and the node's connection with them."""
    long = "x" * 900_000
    for verb, fields in (
        ("get", {**KEY, long: 1}), ("get", {**KEY, "keyspace": long}),
        ("get", {**KEY, "consistency": long}), ("put", {**PUT, "request_id": long}),
        ("batch", {"ops": [{"op": long}]}), ("batch", {"ops": [{"op": "get", **KEY, long: 1}]}),
        ("scan", {"cursor": long}), ("shard.s1.request", {"epoch": 1, long: 1}),
    ):  # fmt: skip
        reply = await bus.ask(verb, codec=codec, **fields)
        assert reply.code in ("MALFORMED_REQUEST", "KEYSPACE_UNKNOWN"), verb
        assert len(reply.body) < REPLY_BYTES_MAX, verb


# ---- a shard's own subject ----

OPS = [{"op": "put", **PUT}]
SHARD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "epoch"),
    ({"ops": OPS}, "epoch"),
    *(({"epoch": junk, "ops": OPS}, "epoch") for junk in odd(None, "1", 1.0, True, [])),
    ({"epoch": 1}, "one of ops, batch, scan"),
    ({"epoch": 1, "ops": OPS, "scan": {}}, "one of ops, batch, scan"),
    ({"epoch": 1, "ops": OPS, "batch": "x"}, "one of ops, batch, scan"),
    ({"epoch": 1, "ops": OPS, "key": "a"}, "'key'"),
    *(({"epoch": 1, "ops": junk}, "ops") for junk in odd(None, [], {}, "x")),
    *(({"epoch": 1, "ops": [junk]}, "operation 0") for junk in odd(None, 1, [], {})),
    ({"epoch": 1, "ops": OPS, "consistency": "most"}, "consistency"),
    ({"epoch": 1, "ops": OPS, "consistency": []}, "consistency"),
    ({"epoch": 1, "ops": OPS, "atomic": 1}, "atomic"),
    ({"epoch": 1, "ops": OPS, "request_id": "x"}, "request_id"),
    ({"epoch": 1, "ops": OPS, "keyspace": 5}, "keyspace"),
    *(({"epoch": 1, "batch": junk}, "batch") for junk in odd(None, "text", 1, [], {})),
    *(({"epoch": 1, "scan": junk}, "scan") for junk in odd(None, 1, "x", [])),
    ({"epoch": 1, "scan": {"limit": 0}}, "limit"),
    ({"epoch": 1, "scan": {"prefix": "a"}}, "'prefix'"),
    ({"epoch": 1, "scan": {"start": 5}}, "start"),
    ({"epoch": 1, "scan": {}, "consistency": "most"}, "consistency"),
]


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_wrong_shard_request_is_refused(bus: Bus, codec: str) -> None:
    asked = [
        (fields, says, await bus.ask_raw("shard.s1.request", encode(fields, codec)))
        for fields, says in SHARD_FIELDS
    ]
    assert [a for a in asked if not _is_malformed(a[2], a[1])] == []
    for *_, reply in asked:
        assert_malformed(reply)


COLUMNS = {
    "kinds": b"\x01\x01", "keys": [b"bad1", b"bad2"], "values": [b"1", b"2"], "client": "c",
    "numbers": [1, 2], "consistency": "quorum",
}  # fmt: skip
WRONG_COLUMNS: dict[str, list[Any]] = {
    "kinds": [b"", b"\x01", b"\x01\x01\x01", b"\x01\x03", b"\x01\xff", "ab", [1, 1], None, 5],
    "keys": [[], [b"a"], [b"a", "b"], [b"a", b""], [b"a", None], [[b"a"], b"b"], b"ab", None, 5, {}],
    "values": [[], [b"1"], [b"1", b"2", b"3"], [b"1", None], [b"1", "2"], b"12", None, 5, {}],
    "client": ["", "x" * 65, 5, None, b"c", []],
    "numbers": [[], [1], [2, 1], [1, 1], [1, -1], [1, 2**64 - 1, 3], [1, True], ["1", "2"], -1,
                2**64 - 1, "1", None, {}, 1.5],
    "indexes": [[0], [-1, 0], ["a", "b"], 5, "ab", {"a": 1}, [0, 2**32], [0, True]],
    "conditions": [[[2, None]], [[-1, None]], [["0", None]], [[0, [1]]], [[0, "x"]], [0], 5, "ab",
                   {"0": None}, [[0, None, 1]], [[[], None]]],
    "ttls_ms": [[[2, 5]], [[0, 0]], [[0, -1]], [[0, "5"]], [[0, True]], [[0, None]], 5, [5], "ab"],
    "consistency": ["most", "", None, 5, []],
    "atomic": [1, "true", None, []],
    "unknown": [1, None],
}  # fmt: skip


async def test_columns_that_do_not_match_are_refused(bus: Bus) -> None:
    # A single number stands for ascending ones.
    columns = [
        {**COLUMNS, "numbers": numbers, name: value}
        for name, values in WRONG_COLUMNS.items()
        for value in values
        for numbers in ([1, 2], 1)
    ]
    asked = [
        (c, await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=cbor2.dumps(c)))
        for c in columns
    ]
    assert [a for a in asked if not _is_malformed(a[1], "")] == []


async def test_a_column_that_is_missing_is_noticed(bus: Bus) -> None:
    for name in ("kinds", "keys", "values", "client", "numbers"):
        raw = cbor2.dumps({k: v for k, v in COLUMNS.items() if k != name})
        reply = await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=raw)
        assert reply.code == "MALFORMED_REQUEST", (name, reply.fields)


@pytest.mark.parametrize("raw", [b"", b"x", b"\x80", b"\xa0", cbor2.dumps(COLUMNS)[:-1],
                                 cbor2.dumps(COLUMNS) + b"\x00", b"\xa1\x01\x02"])  # fmt: skip
async def test_a_batch_that_is_no_batch_is_refused(bus: Bus, raw: bytes) -> None:
    assert_malformed(await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=raw))


@pytest.mark.parametrize(
    ("kind", "sparse"),
    [(0, "conditions"), (0, "ttls_ms"), (2, "ttls_ms"), (2, "conditions")],
    ids=["condition of a get", "lifetime of a get", "lifetime of a delete", "delete if absent"],
)
async def test_a_condition_needs_the_right_operation(bus: Bus, kind: int, sparse: str) -> None:
    columns = {**COLUMNS, "kinds": bytes([kind] * 2), sparse: [[0, None if kind else 5]]}
    del columns["values"]
    reply = await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=cbor2.dumps(columns))
    assert_malformed(reply)


async def test_sizes_hold_in_columns_too(bus: Bus) -> None:
    long_key = cbor2.dumps({**COLUMNS, "keys": [b"a", b"k" * 4097]})
    reply = await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=long_key)
    assert_failure(reply, "KEY_TOO_LARGE", 413, says="4096")
    long_value = cbor2.dumps({**COLUMNS, "values": [b"", b"v" * 1_044_000]})
    reply = await bus.ask("shard.s1.request", codec="cbor", epoch=1, batch=long_value)
    assert_failure(reply, "VALUE_TOO_LARGE", 413)


# ---- what is not a request ----

BEAT = {
    "node": "n9", "incarnation": "x", "run": [1, "x"], "leaving": False, "zone": None, "weight": 1,
    "version": "0", "value_bytes_max": 1, "map_version": 0, "shards": [],
}  # fmt: skip
EMPTY_OR_ODD = [b"", b"x", b"{}", b"\xa0", b"null", b'{"run":5}', b'{"key":' + NESTED + b"}"]


async def test_junk_on_the_control_plane_ends_nothing(bus: Bus) -> None:
    beats = [
        {**BEAT, name: junk}
        for name in ("run", "map_version", "shards", "incarnation", "weight")
        for junk in odd(None, 5, "x", [], ["a", "b"], {"a": 1}, [{"id": "s1"}])
        # These are no junk: a newer map that exists, a node n9 that could be a member.
        if (name, junk) not in (
            ("map_version", 5), ("shards", []), ("weight", 5), ("incarnation", "x")
        )
    ]  # fmt: skip
    bodies = [*EMPTY_OR_ODD, *(json.dumps(beat).encode() for beat in beats)]
    for subject in (
        "event.heartbeat.n1", "event.heartbeat.n9", "event.map", "event.node.n1", "node.n1.inbox",
        "node.n2.inbox", "admin.x", "event.suspect.n1", "event.failover.s1",
    ):  # fmt: skip
        for body in bodies:
            await bus.client.publish(f"{bus.root}.{subject}", body)
    for type in ("hello", "seal", "open", "active", "nonsense", 5, None):
        for fields in ({}, {"run": 5}, {"shard": "s1"}, {"record": 5}, {"record": {"id": "s1"}}):
            body = cbor2.dumps({"type": type, **fields})
            await bus.client.publish(f"{bus.root}.node.n1.inbox", body)
    await bus.client.flush()
    assert (await bus.ok("get", key="marker"))["found"] is True


@pytest.mark.parametrize("junk", [b"not json", b"{}", b"[]", b'{"map_version":"x"}'])
async def test_a_map_that_was_overwritten_with_junk_ends_no_node(
    cluster: Cluster, junk: bytes
) -> None:
    """Nodes go on with the map that they know; when the document is there again, all is well."""
    bus = cluster.bus
    store = await bus.client.jetstream().key_value(f"bus_kv_{cluster.root}")
    document = (await store.get("map")).value
    assert document is not None
    await store.put("map", junk)
    try:
        reply = await bus.ask("map")
        assert reply.code in ("SHARD_UNAVAILABLE", "INTERNAL"), reply.fields
        assert (await bus.ok("get", key="marker"))["found"] is True
    finally:
        await store.put("map", document)
    assert (await bus.ok("map"))["shards"][0]["id"] == "s1"
