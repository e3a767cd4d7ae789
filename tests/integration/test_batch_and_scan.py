"""Batches and scans: many keys in one request."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.support.cluster import Bus, assert_failure, cluster_on, unique

pytestmark = pytest.mark.asyncio(loop_scope="module")

ENOUGH_TO_MEET_EVERY_NODE = 8
"""Either of two nodes may answer: so often that each does, but for one run in a hundred."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bus(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    async with cluster_on(nats_url, tmp_path_factory.mktemp("many"), nodes=2) as cluster:
        yield cluster.bus


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key of this test alone."""
    return unique(request.node.originalname)


# ---- batches ----


async def test_a_batch_is_answered_in_order_and_sees_itself(bus: Bus, key: str) -> None:
    ops = [
        {"op": "get", "key": key},
        {"op": "put", "key": key, "value": "1"},
        {"op": "get", "key": key},
        {"op": "put", "key": key, "value": "2", "if_absent": True},
        {"op": "delete", "key": key},
        {"op": "get", "key": key},
        {"op": "put", "key": key, "value": "3"},
    ]
    results = (await bus.ok("batch", ops=ops))["results"]
    assert [r.get("found") for r in results] == [False, False, True, None, True, False, False]
    assert results[2]["value"] == "1"
    assert results[2]["version"] == results[1]["version"]
    assert results[3]["code"] == "PRECONDITION_FAILED"
    assert results[3].keys() >= {"code", "message", "retry"}
    assert (await bus.ok("get", key=key))["version"] == results[6]["version"]


async def test_an_atomic_batch_happens_whole_or_not_at_all(bus: Bus, key: str) -> None:
    ops = [{"op": "put", "key": f"{key}-{i}", "value": "1", "if_absent": True} for i in range(3)]
    first = await bus.ok("batch", ops=ops[1:2], atomic=True)
    assert first["results"][0]["found"] is False
    refused = (await bus.ok("batch", ops=ops, atomic=True))["results"]
    assert [r["code"] for r in refused] == ["PRECONDITION_FAILED"] * 3
    assert "operation 1" in refused[0]["message"]
    found = [(await bus.ok("get", key=f"{key}-{i}"))["found"] for i in range(3)]
    assert found == [False, True, False]


@pytest.mark.parametrize("codec", ["json", "cbor"])
async def test_a_batch_holds_thousands_of_operations(bus: Bus, key: str, codec: str) -> None:
    puts = [{"op": "put", "key": f"{key}-{i:05}", "value": str(i)} for i in range(3000)]
    results = (await bus.ok("batch", codec=codec, ops=puts))["results"]
    versions = [r["version"] for r in results]
    assert versions == sorted(versions)
    assert len({tuple(v) for v in versions}) == 3000
    gets = [{"op": "get", "key": op["key"]} for op in puts]
    values = [r["value"] for r in (await bus.ok("batch", codec=codec, ops=gets))["results"]]
    wanted = [op["value"] for op in puts]
    assert values == (wanted if codec == "json" else [v.encode() for v in wanted])


async def test_a_batch_whose_reply_is_too_big_tells_which_writes_are_done(
    bus: Bus, key: str
) -> None:
    """VALUE_TOO_LARGE for the whole would say that nothing was applied."""
    for i in range(3):
        await bus.ok("put", codec="cbor", key=f"{key}-{i}", value=b"v" * 500_000)
    ops = [{"op": "get", "key": f"{key}-{i}"} for i in range(3)]
    ops.append({"op": "put", "key": key, "value": "1"})
    for _ in range(ENOUGH_TO_MEET_EVERY_NODE):
        fields = (await bus.ask("batch", codec="cbor", ops=ops)).fields
        put = fields if "code" in fields else fields["results"][3]
        entry = await bus.ok("get", key=key)
        assert entry["found"] is ("code" not in put), put


# ---- scans ----


async def scan_all(bus: Bus, **fields: Any) -> list[dict[str, Any]]:
    """All pages of a scan."""
    items: list[dict[str, Any]] = []
    cursor = None
    while True:
        page = await bus.ok("scan", **fields, **({"cursor": cursor} if cursor else {}))
        items += page["items"]
        cursor = page["cursor"]
        if cursor is None:
            return items


async def filled(bus: Bus, prefix: str, count: int) -> list[str]:
    keys = [f"{prefix}/{i:04}" for i in range(count)]
    await bus.ok("batch", ops=[{"op": "put", "key": k, "value": k[-4:]} for k in keys])
    return keys


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("limit", [1, 7, 100])
async def test_pages_of_a_scan_hold_each_key_once_in_order(
    bus: Bus, key: str, reverse: bool, limit: int
) -> None:
    keys = await filled(bus, key, 23)
    items = await scan_all(bus, prefix=key + "/", limit=limit, reverse=reverse)
    assert [i["key"] for i in items] == sorted(keys, reverse=reverse)
    assert all(i["value"] == i["key"][-4:] and len(i["version"]) == 2 for i in items)


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_scan_takes_its_start_and_leaves_out_its_end(
    bus: Bus, key: str, reverse: bool
) -> None:
    keys = await filled(bus, key, 10)
    page = await bus.ok("scan", start=keys[2], end=keys[7], reverse=reverse)
    assert [i["key"] for i in page["items"]] == sorted(keys[2:7], reverse=reverse)
    assert page["cursor"] is None
    narrowed = await bus.ok("scan", start=keys[8], prefix=key + "/", reverse=reverse)
    assert [i["key"] for i in narrowed["items"]] == sorted(keys[8:], reverse=reverse)


async def test_a_scan_of_keys_only_leaves_out_values(bus: Bus, key: str) -> None:
    await filled(bus, key, 2)
    page = await bus.ok("scan", prefix=key, keys_only=True)
    assert [i.keys() for i in page["items"]] == [{"key", "version"}] * 2


async def test_a_scan_of_an_empty_range_is_empty(bus: Bus, key: str) -> None:
    keys = await filled(bus, key, 2)
    for fields in ({"start": keys[1], "end": keys[0]}, {"prefix": key + "/absent"}):
        assert await bus.ok("scan", **fields) == {"items": [], "cursor": None}


async def test_a_scan_gives_a_hundred_keys_unless_asked_for_more(bus: Bus, key: str) -> None:
    await filled(bus, key, 1200)
    assert len((await bus.ok("scan", prefix=key))["items"]) == 100
    assert len((await bus.ok("scan", prefix=key, limit=1000))["items"]) == 1000


async def test_a_scan_over_big_values_makes_short_pages(bus: Bus, key: str) -> None:
    for i in range(4):
        await bus.ok("put", codec="cbor", key=f"{key}-{i}", value=bytes([i]) * 400_000)
    items = await scan_all(bus, codec="cbor", prefix=key)
    assert [i["value"][0] for i in items] == [0, 1, 2, 3]


async def test_a_cursor_of_another_scan_is_refused(bus: Bus, key: str) -> None:
    await filled(bus, key, 3)
    cursor = (await bus.ok("scan", prefix=key, limit=1))["cursor"]
    reply = await bus.ask("scan", prefix=key, reverse=True, cursor=cursor)
    assert_failure(reply, "MALFORMED_REQUEST", 400, says="cursor")
