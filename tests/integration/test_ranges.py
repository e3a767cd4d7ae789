"""Shards that do not cover every key, on two nodes: routing, refusals, batches and scans over several shards."""

import base64
import json
from collections.abc import AsyncIterator

import nats.js.api
import pytest
import pytest_asyncio

from tests.integration.test_batch_and_scan import scan_all
from tests.integration.test_contract import VERBS
from tests.support.cluster import Bus, Cluster, assert_failure, cluster_on

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranged(nats_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bus]:
    """Shard `low` is [b, m) on n1 and `high` is [m, \\xff) on n2: a map that was written by hand."""
    folder = tmp_path_factory.mktemp("ranged")
    async with cluster_on(nats_url, folder, nodes=0) as cluster:
        cluster.start_node("n1", "--weight=2")
        cluster.start_node("n2", "--zone=z")
        await _write_map(cluster, ("low", "n1", "b", "m"), ("high", "n2", "m", "base64:/w=="))
        cluster.start_coordinator()
        await cluster.wait_healthy("n1", "n2")
        yield cluster.bus


async def _write_map(cluster: Cluster, *shards: tuple[str, str, str, str]) -> None:
    """The document of a fresh store: these shards, RECOVERING, so that the coordinator opens them."""
    heard = await _incarnations(cluster, 2)
    jetstream = cluster.bus.client.jetstream()
    config = nats.js.api.KeyValueConfig(bucket=f"bus_kv_{cluster.root}")
    document = {
        "map_version": 1, "last_epoch": len(shards), "writer": "",
        "keyspaces": {
            "default": {"policy": "range", "replication_factor": 1, "consistency": "quorum"}
        },
        "shards": {
            id: {
                "id": id, "keyspace": "default", "start": start, "end": end, "epoch": i + 1,
                "token": id, "members": [{"node": node, "incarnation": heard[node]}],
                "primary": node, "state": "recovering", "last_active": None, "attempts": [],
                "learners": [],
            }
            for i, (id, node, start, end) in enumerate(shards)
        },
        "nodes": {},
    }  # fmt: skip
    await (await jetstream.create_key_value(config)).put("map", json.dumps(document).encode())


async def _incarnations(cluster: Cluster, count: int) -> dict[str, str]:
    """Node -> incarnation, as they tell in their heartbeats."""
    heard: dict[str, str] = {}
    beats = await cluster.bus.client.subscribe(f"{cluster.root}.event.heartbeat.*")
    while len(heard) < count:
        beat = json.loads((await beats.next_msg(10)).data)
        heard[beat["node"]] = beat["incarnation"]
    await beats.unsubscribe()
    return heard


@pytest.mark.parametrize("outside", [b"a", b"azzz", b"\xff", b"\xff\xff"])
async def test_a_key_outside_every_shard_is_refused(ranged: Bus, outside: bytes) -> None:
    key_b64 = base64.b64encode(outside).decode()
    for verb, fields in VERBS:
        reply = await ranged.ask(verb, key_b64=key_b64, **fields)
        assert_failure(reply, "NO_SHARD", 404, says="outside every shard")


async def test_a_batch_over_several_shards_keeps_its_order(ranged: Bus) -> None:
    ops = [{"op": "put", "key": k, "value": k} for k in ("c1", "x1", "a1", "d1", "m1")]
    results = (await ranged.ok("batch", ops=ops))["results"]
    assert [r.get("shard") for r in results] == ["low", "high", None, "low", "high"]
    assert results[2]["code"] == "NO_SHARD"
    reply = await ranged.ask("batch", ops=ops[:2], atomic=True)
    assert_failure(reply, "MALFORMED_REQUEST", 400, says="one shard")


@pytest.mark.parametrize("reverse", [False, True])
async def test_a_scan_goes_over_several_shards(ranged: Bus, reverse: bool) -> None:
    keys = [f"{c}2" for c in "bclmnz"]
    await ranged.ok("batch", ops=[{"op": "put", "key": k, "value": "1"} for k in keys])
    items = await scan_all(ranged, reverse=reverse, limit=2)
    seen = [i["key"] for i in items if i["key"].endswith("2")]
    assert seen == sorted(keys, reverse=reverse)
    some = await scan_all(ranged, start="a", end="n", reverse=reverse)
    assert [i["key"] for i in some if i["key"].endswith("2")] == [
        k for k in sorted(keys, reverse=reverse) if k < "n"
    ]
    assert await scan_all(ranged, end="b", reverse=reverse) == []


async def test_a_key_of_another_shard_is_refused_on_a_shards_subject(ranged: Bus) -> None:
    shards = (await ranged.ok("map"))["shards"]
    assert [(s["id"], s["start"], s.get("end")) for s in shards] == [
        ("low", "b", "m"), ("high", "m", None),
    ]  # fmt: skip
    assert shards[1]["end_b64"] == base64.b64encode(b"\xff").decode()
    for key in ("m", "zz", "a"):
        ops = [{"op": "put", "key": "c3", "value": "1"}, {"op": "put", "key": key, "value": "1"}]
        reply = await ranged.ask("shard.low.request", epoch=shards[0]["epoch"], ops=ops)
        assert_failure(reply, "WRONG_SHARD", 421, retry=True, says="outside shard low")
    assert (await ranged.ok("get", key="c3"))["found"] is False


async def test_the_map_tells_what_is_known_of_nodes(ranged: Bus) -> None:
    nodes = (await ranged.ok("map"))["nodes"]
    assert [(n["id"], n["state"], n["zone"], n["weight"]) for n in nodes] == [
        ("n1", "up", None, 2), ("n2", "up", "z", 1),
    ]  # fmt: skip
