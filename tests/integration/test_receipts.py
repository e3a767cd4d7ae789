"""What became of a write, and reads at ONE: three nodes, each with a replica, and what happens when one is away."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import bus_kv
from bus_kv.errors import ConsistencyNotMet, ShardUnknown
from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import ConnectOptions
from tests.support.cluster import Cluster, assert_failure, cluster_on, until

ENOUGH_TO_MEET_EVERY_NODE = 12
READS = 30
"""So many that every replica has answered some of them, but for one run in a hundred thousand."""


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3) as cluster:
        yield cluster


@pytest.fixture
async def db(cluster: Cluster) -> AsyncIterator[bus_kv.Client]:
    options = ConnectOptions(servers=(cluster.url,), root=cluster.root)
    async with bus_kv.connect(options=options, knobs=Knobs(client_timeout_s=3.0)) as db:
        yield db


def version_of(receipt: bus_kv.Receipt) -> list[int]:
    assert receipt.version is not None
    return [*receipt.version]


# ---- receipts ----


async def test_a_write_at_one_becomes_one_at_quorum_and_at_all(
    cluster: Cluster, db: bus_kv.Client
) -> None:
    receipt = await db.put("k", "v", consistency="one")
    assert receipt.consistency == "one"
    await receipt.quorum()
    await receipt.all()
    assert await receipt.state() == "all"
    named = await db.delete("k", consistency="one", request_id="me:1")
    await named.all()
    many = await db.put_many([("a", "1"), ("b", "2")], consistency="one")
    await asyncio.gather(*(one.quorum() for one in many))
    nothing = await db.delete("never there")
    await nothing.all()
    for codec in ("json", "cbor"):
        fields: dict[str, Any] = {"shard": "s1", "version": version_of(named)}
        for _ in range(ENOUGH_TO_MEET_EVERY_NODE):
            assert await cluster.bus.ok("receipt", codec=codec, **fields) == {"state": "all"}


async def test_what_cannot_be_told_is_unknown_and_what_is_not_there_is_said(
    cluster: Cluster, db: bus_kv.Client
) -> None:
    ask, epoch = cluster.bus.ask, (await cluster.shard())["epoch"]
    for version in ([epoch, 9999], [epoch + 1, 1]):
        assert (await ask("receipt", shard="s1", version=version)).fields == {"state": "unknown"}
    for shard in ("s9", "no id"):
        reply = await ask("receipt", shard=shard, version=[1, 1])
        assert_failure(reply, "SHARD_UNKNOWN", 404, says=shard)
    for fields in ({}, {"shard": "s1"}, {"shard": "s1", "version": "1,1"}, {"version": [1, 1]}):
        assert_failure(await ask("receipt", **fields), "MALFORMED_REQUEST", 400)
    reply = await ask("receipt", shard="s1", version=[1, 1], keyspace="nope")
    assert_failure(reply, "KEYSPACE_UNKNOWN", 404)
    with pytest.raises(ShardUnknown):
        await bus_kv.Receipt("s9", (1, 1), False, "one", db._fates).state()


async def test_the_primary_tells_on_its_own_subject(cluster: Cluster, db: bus_kv.Client) -> None:
    version = version_of(await db.put("k", "v"))
    ask, epoch = cluster.bus.ask, (await cluster.shard())["epoch"]
    told = await ask("shard.s1.request", epoch=epoch, receipt=version)
    assert told.fields["state"] in ("quorum", "all")
    stale = await ask("shard.s1.request", epoch=epoch - 1, receipt=version)
    assert_failure(stale, "STALE_EPOCH", 421, retry=True)
    for receipt in ("1,2", [1], None):
        reply = await ask("shard.s1.request", epoch=epoch, receipt=receipt)
        assert_failure(reply, "MALFORMED_REQUEST", 400, says="version")
    anywhere = await ask("shard.s1.read", receipt=version)
    assert_failure(anywhere, "MALFORMED_REQUEST", 400)


async def test_all_waits_for_a_member_that_is_away(cluster: Cluster, db: bus_kv.Client) -> None:
    primary = await cluster.primary()
    backup = next(node for node in ("n1", "n2", "n3") if node != primary)
    cluster.kill(backup)
    receipt = await db.put("k", "v")
    await receipt.quorum()
    with pytest.raises(ConsistencyNotMet) as failure:
        await receipt.all()
    assert failure.value.detail["met"] == "quorum"
    cluster.restart(backup)

    async def is_everywhere() -> bool:
        return await receipt.state() == "all"

    await until(is_everywhere)
    await receipt.all()


async def test_a_committed_write_stays_committed_under_the_next_primary(
    cluster: Cluster, db: bus_kv.Client
) -> None:
    receipt = await db.put("k", "v")
    await db.admin("failover", {"shard": "s1"})
    assert await receipt.state() in ("quorum", "all")
    later = await db.put("k", "w")
    assert version_of(later)[0] > version_of(receipt)[0]


# ---- reads at ONE ----


async def seen_everywhere(db: bus_kv.Client) -> None:
    """Return when every replica shows the value v of the key k: backups learn a moment later what is committed."""

    async def is_seen() -> bool:
        entries = [await db.get("k", consistency="one") for _ in range(READS)]
        assert all(entry.read is not None for entry in entries)
        return {entry.text for entry in entries} == {"v"}

    await until(is_seen)


async def test_every_replica_answers_reads_at_one(cluster: Cluster, db: bus_kv.Client) -> None:
    receipt = await db.put("k", "v", consistency="all")
    ops, nodes = [{"op": "get", "key": "k"}], set[str]()
    for _ in range(READS):
        (result,) = (await cluster.bus.ok("shard.s1.read", ops=ops))["results"]
        nodes.add(result["node"])
        assert result["consistency"] == "one"
        assert result["read"].keys() == {"epoch", "seq", "age_ms"}
    assert nodes == {"n1", "n2", "n3"}
    await seen_everywhere(db)
    entry = await db.get("k", consistency="one")
    assert entry.read is not None
    assert entry.read.seq >= version_of(receipt)[1]
    assert (await db.get("k")).read is None


async def test_any_node_answers_reads_at_one_from_its_own_replica(cluster: Cluster) -> None:
    await cluster.bus.ok("put", key="k", value="v", consistency="all")
    ops, nodes = [{"op": "get", "key": "k"}, {"op": "get", "key": "no"}], set[str]()
    for _ in range(READS):
        nodes.add((await cluster.bus.ok("get", key="k", consistency="one"))["node"])
        both = (await cluster.bus.ok("batch", ops=ops, consistency="one"))["results"]
        assert both[0]["node"] == both[1]["node"]
    assert nodes == {"n1", "n2", "n3"}


async def test_a_node_without_a_replica_has_another_one_answer(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=2, replication_factor=1) as cluster:
        await cluster.bus.ok("put", key="k", value="v")
        primary = await cluster.primary()
        for _ in range(ENOUGH_TO_MEET_EVERY_NODE):
            result = await cluster.bus.ok("get", key="k", consistency="one")
            assert (result["value"], result["node"]) == ("v", primary)
            assert result["read"]["age_ms"] == 0


async def test_without_a_primary_reads_at_one_go_on(cluster: Cluster, db: bus_kv.Client) -> None:
    await db.put("k", "v", consistency="all")
    await seen_everywhere(db)
    primary = await cluster.primary()
    cluster.kill("c1")
    cluster.kill(primary)
    ops = [{"op": "get", "key": "k"}]

    async def is_read() -> bool:
        return (await db.get("k", consistency="one")).text == "v"

    await until(is_read)
    for _ in range(ENOUGH_TO_MEET_EVERY_NODE):
        assert await is_read()
        assert (await cluster.bus.ok("get", key="k", consistency="one"))["node"] != primary
        (result,) = (await cluster.bus.ok("shard.s1.read", ops=ops))["results"]
        assert result["node"] != primary
    reply = await cluster.bus.ask("get", key="k")
    assert reply.code == "SHARD_UNAVAILABLE"


async def test_a_replica_that_stands_still_holds_up_nobody(
    cluster: Cluster, db: bus_kv.Client
) -> None:
    await db.put("k", "v", consistency="all")
    await seen_everywhere(db)
    primary = await cluster.primary()
    backup = next(node for node in ("n1", "n2", "n3") if node != primary)
    cluster.pause(backup)
    try:
        for _ in range(READS):
            assert (await db.get("k", consistency="one")).found
    finally:
        cluster.resume(backup)


async def test_a_default_of_one_sends_reads_to_replicas(
    cluster: Cluster, db: bus_kv.Client
) -> None:
    await db.put("k", "v")
    assert (await db.get("k")).read is None
    await db.admin("config", {"consistency": "one"})

    async def is_followed() -> bool:
        return (await db.get("k")).read is not None

    await until(is_followed)
    assert (await db.put("k", "w")).consistency == "one"
    epoch = (await cluster.shard())["epoch"]
    ops = [{"op": "put", "key": "k", "value": "x"}]
    (result,) = (await cluster.bus.ok("shard.s1.request", epoch=epoch, ops=ops))["results"]
    assert result["consistency"] == "one"
