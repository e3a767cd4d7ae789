"""What a client is told while a node is dead, frozen or has too much to do, and that repeating is safe."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from nats.errors import NoRespondersError

from tests.support.cluster import Bus, Cluster, Reply, assert_failure, cluster_on, unique, until
from tests.support.replicas import NEVER_NOTICED

PUT: dict[str, Any] = {"key": "a", "value": "2"}
GET: dict[str, Any] = {"key": "a"}
ANSWER_S = 2.5
"""A node answers within 1.5 s whatever the primary does; the rest is for a slow machine."""


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three nodes, all members of shard s1."""
    async with cluster_on(nats_url, tmp_path, nodes=3) as cluster:
        yield cluster


@pytest.fixture
async def alone(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with alone_on(nats_url, tmp_path) as cluster:
        yield cluster


@asynccontextmanager
async def alone_on(nats_url: str, tmp_path: Path, **knobs: Any) -> AsyncIterator[Cluster]:
    """Shard s1 is on n1 alone; n2 and n3 are there to be asked."""
    async with cluster_on(nats_url, tmp_path, nodes=0, replication_factor=1, **knobs) as cluster:
        cluster.start_coordinator()
        cluster.start_node("n1")
        await cluster.wait_healthy()
        cluster.start_node("n2")
        cluster.start_node("n3")
        await cluster.wait_healthy()
        yield cluster


async def answers(bus: Bus, subject: str, *bodies: dict[str, Any]) -> list[Reply]:
    """Ask all at once; the replies in time, for a node that is frozen gives none."""
    asked = [bus.ask(subject, timeout_s=ANSWER_S, **body) for body in bodies]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    return [r for r in replies if isinstance(r, Reply)]


async def nobody_serves(bus: Bus) -> bool:
    """NATS has noticed that the primary is gone: until then a request may be under way to it."""
    try:
        await bus.ask("shard.s1.request", timeout_s=1.0, epoch=0, ops=[{"op": "get", "key": "a"}])
    except NoRespondersError:
        return True
    except TimeoutError:
        pass
    return False


async def test_without_its_only_member_a_shard_is_unavailable(
    nats_url: str, tmp_path: Path
) -> None:
    """Nobody is suspected before the word that nobody listens has come, however late: so the refusal is definite."""
    async with alone_on(nats_url, tmp_path, suspect_after_ms=1200) as alone:
        await alone.bus.ok("put", key="a", value="1")
        alone.kill("n1")
        await until(lambda: nobody_serves(alone.bus))
        puts = await answers(alone.bus, "put", *[PUT] * 3)
        others = [*await answers(alone.bus, "get", GET), *await answers(alone.bus, "scan", {})]
        assert (len(puts), len(others)) == (3, 2)
        for reply in (*puts, *others):
            assert_failure(reply, "SHARD_UNAVAILABLE", 503, retry=True, says="s1")
        alone.restart("n1")
        assert (await alone.until_ok("get", key="a"))["value"] == "1"


async def test_a_batch_tells_for_each_operation_that_its_shard_is_gone(
    nats_url: str, tmp_path: Path
) -> None:
    async with alone_on(nats_url, tmp_path, suspect_after_ms=1200) as alone:
        alone.kill("n1")
        await until(lambda: nobody_serves(alone.bus))
        ops = [{"op": "put", "key": "a", "value": "1"}, {"op": "get", "key": "a"}]
        results = (await alone.bus.ask("batch", ops=ops)).fields["results"]
        assert [r["code"] for r in results] == ["SHARD_UNAVAILABLE"] * 2


async def test_health_tells_of_a_dead_primary_that_nobody_can_replace(alone: Cluster) -> None:
    alone.kill("n1")
    await until(lambda: is_degraded(alone.bus, "n1"))
    await until(lambda: is_down(alone.bus, "n1"))
    alone.restart("n1")
    await alone.wait_healthy()


async def test_health_is_good_again_when_a_frozen_primary_goes_on(alone: Cluster) -> None:
    """Nobody has to ask a node for that shard again before it says so."""
    alone.pause("n1")
    await answers(alone.bus, "get", *[GET] * 6)
    await until(lambda: is_degraded(alone.bus, "s1 does not answer"))
    alone.resume("n1")
    await alone.wait_healthy()


async def test_health_is_good_again_when_another_member_serves(cluster: Cluster) -> None:
    cluster.kill("n1")
    await until(lambda: is_down(cluster.bus, "n1"))
    await cluster.wait_healthy()
    assert (await cluster.shard())["members"] == ["n2", "n3"]


async def test_health_tells_of_a_primary_that_has_lost_its_disk(alone: Cluster) -> None:
    """Its node is up, and nobody has the data: the map alone would look well."""
    alone.kill("n1")
    await until(lambda: is_down(alone.bus, "n1"))
    kept = alone.data("n1").rename(alone.data("n1").with_name("kept"))
    alone.restart("n1")
    await until(lambda: is_degraded(alone.bus, "primary n1 of shard s1 has come back without"))
    await alone.stop("n1")
    shutil.rmtree(alone.data("n1"))
    kept.rename(alone.data("n1"))
    alone.restart("n1")
    await alone.wait_healthy()


async def is_degraded(bus: Bus, says: str) -> bool:
    told = [reply.fields for reply in await answers(bus, "health", {})]
    return any(h["status"] == "degraded" and says in " ".join(h["reasons"]) for h in told)


async def is_down(bus: Bus, node: str) -> bool:
    nodes = (await bus.ok("map"))["nodes"]
    return [n["state"] for n in nodes if n["id"] == node] == ["down"]


async def test_without_a_majority_nothing_is_acknowledged(cluster: Cluster) -> None:
    """The primary has the writes and cannot know what becomes of them."""
    await cluster.bus.ok("put", key="a", value="1")
    await cluster.lose("n2")
    await cluster.lose("n3")
    puts: list[dict[str, Any]] = [
        {"key": "a", "value": "2", "request_id": f"me:{i}"} for i in range(3)
    ]
    for reply in await answers(cluster.bus, "put", *puts):
        assert_failure(reply, "OUTCOME_UNKNOWN", 504, retry=True, says="same request_id")
    for reply in await answers(cluster.bus, "get", GET):
        assert_failure(reply, "SHARD_UNAVAILABLE", 503, retry=True)
    assert (await cluster.bus.ok("get", key="a", consistency="one"))["value"] == "1"
    await until(lambda: is_degraded(cluster.bus, "1 of the 2 members"))
    cluster.restart("n2")
    versions = [(await cluster.until_ok("put", **put))["version"] for put in puts]
    assert len({*map(tuple, versions)}) == 3
    assert [(await cluster.until_ok("put", **put))["version"] for put in puts] == versions


async def test_a_write_that_a_frozen_primary_may_have_is_of_unknown_outcome(
    alone: Cluster,
) -> None:
    suspicions = await alone.bus.client.subscribe(f"{alone.root}.event.suspect.n1")
    alone.pause("n1")
    client = unique("client")
    puts: list[dict[str, Any]] = [
        {"key": f"a{i}", "value": str(i), "request_id": f"{client}:{i}"} for i in range(12)
    ]
    replies = await answers(alone.bus, "put", *puts)
    assert replies
    for reply in replies:
        assert_failure(reply, "OUTCOME_UNKNOWN", 504, retry=True, says="send it again")
    for reply in await answers(alone.bus, "get", *[GET] * 3):
        assert_failure(reply, "SHARD_UNAVAILABLE", 503, retry=True)
    assert json.loads((await suspicions.next_msg(1)).data)["shard"] == "s1"
    alone.resume("n1")
    versions = [(await alone.until_ok("put", **put))["version"] for put in puts]
    again = [(await alone.until_ok("put", **put))["version"] for put in puts]
    assert again == versions
    seqs = [version[1] for version in versions]
    assert sorted(seqs) == list(range(min(seqs), min(seqs) + 12)), "a repeat was written twice"


async def test_more_forwards_than_a_node_may_have_are_refused_at_once(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=2, calls_max=2, **NEVER_NOTICED) as cluster:
        cluster.pause("n1")
        replies = await answers(cluster.bus, "put", *[PUT] * 30)
        codes = [r.code for r in replies]
        assert codes.count("OUTCOME_UNKNOWN") == 2
        refused = [r for r in replies if r.code != "OUTCOME_UNKNOWN"]
        assert refused
        for reply in refused:
            assert_failure(reply, "OVERLOADED", 429, retry=True, says="send it again")
        # They came first: nobody is kept waiting to be told to come back.
        assert await _first_code(cluster.bus) == "OVERLOADED"
        cluster.resume("n1")


async def _first_code(bus: Bus) -> str | None:
    """Of many requests at once, the failure that arrives first."""
    asked = [
        asyncio.create_task(bus.ask("put", key="a", value="1", timeout_s=ANSWER_S))
        for _ in range(30)
    ]
    done, waiting = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return done.pop().result().code


async def test_a_full_inbox_refuses_and_loses_nothing_it_acknowledged(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=1, inbox_messages_max=4) as cluster:
        bodies: list[dict[str, Any]] = [{"key": f"a{i}", "value": str(i)} for i in range(500)]
        replies = await answers(cluster.bus, "put", *bodies)
        assert len(replies) == 500
        for reply in replies:
            if reply.code is not None:
                assert_failure(reply, "OVERLOADED", 429, retry=True, says="inbox")
        for i, reply in enumerate(replies):
            entry = await cluster.bus.ok("get", key=f"a{i}")
            assert entry.get("version") == reply.fields.get("version")


async def test_a_full_tail_refuses(nats_url: str, tmp_path: Path) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=1, tail_operations_max=10) as cluster:
        epoch = (await cluster.shard())["epoch"]
        ops = [{"op": "put", "key": f"a{i}", "value": "1"} for i in range(200)]
        bodies = [{"epoch": epoch, "ops": ops}] * 40
        replies = await answers(cluster.bus, "shard.s1.request", *bodies)
        assert len(replies) == 40
        refused = [r for r in replies if r.code is not None]
        assert refused
        assert len(refused) < 40
        for reply in refused:
            assert_failure(reply, "OVERLOADED", 429, retry=True, says="s1")
