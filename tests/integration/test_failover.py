"""Takeovers at default settings: nobody has to ask for them, and what they did can be read afterwards."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import bus_kv
from tests.support.cluster import Cluster, cluster_on, until
from tests.support.command import Ran, run_module
from tests.support.recorded import Recorder
from tests.support.replicas import LEVELS, NODES, assert_kept

DEFAULTS: dict[str, Any] = {"heartbeat_interval_s": 5.0, "lease_s": 3.0, "step_retry_ms": 500}
PATIENCE_S = 60.0


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3, **DEFAULTS) as cluster:
        yield cluster


async def command(cluster: Cluster, *arguments: str) -> Ran:
    env = {"BUS_KV_NATS": cluster.url, "BUS_KV_ROOT": cluster.root}
    return await run_module("bus_kv", *arguments, env=env)


async def until_replaced(cluster: Cluster, node: str) -> None:
    """Return when shard s1 is active under another primary."""

    async def is_replaced() -> bool:
        shards = (await cluster.until_ok("map"))["shards"]
        return bool(shards[0]["state"] == "active" and shards[0]["primary"] != node)

    await until(is_replaced, PATIENCE_S)


class Events:
    """What is told about the takeovers of shard s1."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    async def listen(self, cluster: Cluster) -> None:
        async def hear(message: Any) -> None:
            self.told.append(json.loads(message.data))

        await cluster.bus.client.subscribe(f"{cluster.root}.event.failover.s1", cb=hear)
        await cluster.bus.client.flush()

    @property
    def states(self) -> list[str]:
        return [event["state"] for event in self.told if "state" in event]

    async def until_told(self, state: str) -> dict[str, Any]:
        async def is_told() -> bool:
            return state in self.states

        await until(is_told, PATIENCE_S)
        return next(event for event in self.told if event.get("state") == state)


async def test_a_killed_primary_is_replaced_without_an_operator(cluster: Cluster) -> None:
    events = Events()
    await events.listen(cluster)
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    cluster.kill("n1")
    story = await events.until_told("completed")
    await recorder.until_more(100)
    assert events.states[:3] == ["detecting", "recovering", "completed"]
    assert (story["old_primary"], story["suspected"]["node"]) == ("n1", "n1")
    assert story["new_primary"] == await cluster.primary() != "n1"
    assert story["cause"] == "it has answered none of 3 probes"
    assert story["positions"].keys() >= {"n2", "n3"}
    assert story["sealed"].keys() == {"n2", "n3"}
    assert story["unknown_from_seq"] == story["longest"][1] + 1
    assert story["duration_ms"].keys() == {
        "detecting", "sealing", "opening", "announcing", "total",
    }  # fmt: skip
    cluster.restart("n1")
    await cluster.until_members(*NODES, deadline_s=PATIENCE_S)
    await assert_kept(cluster, recorder, *NODES)


async def test_a_frozen_primary_is_replaced_without_an_operator(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    cluster.pause("n1")
    await until_replaced(cluster, "n1")
    await recorder.until_more(100)
    cluster.resume("n1")
    await cluster.until_members(*NODES, deadline_s=PATIENCE_S)
    await assert_kept(cluster, recorder, *NODES)


async def test_the_next_coordinator_replaces_a_primary_that_died_with_the_active_one(
    cluster: Cluster,
) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    cluster.start_coordinator("c2")
    await until_standing_by(cluster)
    cluster.kill("c1")
    cluster.kill("n1")
    await until_replaced(cluster, "n1")
    await recorder.until_more(100)
    cluster.restart("n1")
    await cluster.until_members(*NODES, deadline_s=PATIENCE_S)
    await assert_kept(cluster, recorder, *NODES)


async def until_standing_by(cluster: Cluster) -> None:
    """Return when two coordinators answer PING."""

    async def are_two() -> bool:
        inbox = cluster.bus.client.new_inbox()
        answers = await cluster.bus.client.subscribe(inbox)
        await cluster.bus.client.publish("$SRV.PING.bus_kv-coordinator", b"", reply=inbox)
        names = set[str]()
        try:
            while len(names) < 2:
                fields = json.loads((await answers.next_msg(1)).data)
                if fields["metadata"]["root"] == cluster.root:
                    names.add(fields["metadata"]["coordinator"])
        except TimeoutError:
            return False
        finally:
            await answers.unsubscribe()
        return True

    await until(are_two, PATIENCE_S)


async def test_a_flapping_node_gets_nothing_that_it_could_take_down(cluster: Cluster) -> None:
    """It is a member as soon as it has caught up, and primary no more while others can be."""
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    for _ in range(3):
        cluster.kill("n1")
        await until_replaced(cluster, "n1")
        await recorder.until_more(50)
        cluster.restart("n1")
        await cluster.until_members(*NODES, deadline_s=PATIENCE_S)
        assert await cluster.primary() != "n1"
    await assert_kept(cluster, recorder, *NODES)


async def test_with_auto_failover_off_only_an_operator_has_another_take_over(
    cluster: Cluster,
) -> None:
    ran = await command(cluster, "config", "set", "auto_failover", "off")
    assert ran.text == "auto_failover of the cluster is off\n"
    await cluster.bus.ok("put", key="a", value="1")
    await cluster.lose("n1")
    put: dict[str, Any] = {"key": "a", "value": "2", "request_id": "me:1"}
    reply = await cluster.bus.ask("put", **put)
    assert reply.fields["retry"] is True

    async def is_down() -> bool:
        await cluster.bus.ask("put", **put)  # somebody has to notice
        nodes = (await cluster.bus.ok("map"))["nodes"]
        return {n["id"]: n["state"] for n in nodes}["n1"] == "down"

    await until(is_down, PATIENCE_S)
    shard = await cluster.shard()
    assert (shard["primary"], shard["state"]) == ("n1", "active")
    assert (await command(cluster, "failover", "run", "s1")).code == 0
    assert await cluster.primary() != "n1"
    await cluster.until_ok("put", **put)
    assert (await cluster.until_ok("get", key="a"))["value"] == "2"


async def test_with_auto_failover_off_a_primary_that_restarts_serves_again(
    cluster: Cluster,
) -> None:
    await cluster.admin("config", auto_failover=False)
    await cluster.bus.ok("put", key="a", value="1")
    cluster.restart("n1")
    assert (await cluster.until_ok("get", key="a"))["value"] == "1"
    assert await cluster.primary() == "n1"


async def test_a_primary_that_nobody_asks_is_missed_by_its_backups(cluster: Cluster) -> None:
    """Long before three of its heartbeats are."""
    events = Events()
    await events.listen(cluster)
    await cluster.bus.ok("put", key="a", value="1", consistency="all")
    cluster.kill("n1")
    story = await events.until_told("completed")
    assert story["suspected"]["by"] in ("n2", "n3")
    assert story["cause"] == "it has answered none of 3 probes"


async def test_a_takeover_is_told_as_a_story(cluster: Cluster) -> None:
    nothing = await command(cluster, "explain", "failover")
    assert (nothing.code, "no takeover of any shard is known" in nothing.text) == (0, True)
    cluster.start_coordinator("c2")
    await until_standing_by(cluster)
    cluster.kill("n1")
    await cluster.until_ok("put", key="a", value="1", request_id="me:1")
    story = (await command(cluster, "explain", "failover", "s1")).text
    new = await cluster.primary()
    assert story.startswith(f"shard s1: {new} took over from n1 on ")
    for words in ("had no answer of n1", "has answered none of 3 probes", f"{new} serves"):
        assert words in story
    # Whoever is the active one later knows it as well.
    cluster.kill("c1")

    async def is_known() -> bool:
        ran = await command(cluster, "explain", "failover", "s1", "--json")
        return ran.code == 0 and bool(ran.document()["failovers"])

    await until(is_known, PATIENCE_S)
    # And so does one that starts when no other is left.
    cluster.kill("c2")
    cluster.restart("c1")
    await until(is_known, PATIENCE_S)
    told = (await command(cluster, "explain", "failover", "s1")).text
    assert told.splitlines()[0] == story.splitlines()[0], told
    unknown = await command(cluster, "explain", "failover", "s9")
    assert (unknown.code, "SHARD_UNKNOWN" in unknown.err) == (1, True)


async def test_a_returning_primary_tells_what_it_cuts(cluster: Cluster) -> None:
    """Writes at ONE that it alone had: where they begin is known at once, that they are gone when it is back."""
    events = Events()
    await events.listen(cluster)
    await cluster.bus.ok("put", key="a", value="1", consistency="all")
    for node in ("n2", "n3"):
        await cluster.lose(node)
    only = await cluster.bus.ok("put", key="a", value="2", consistency="one")
    cluster.kill("n1")
    for node in ("n2", "n3"):
        cluster.restart(node)
    await cluster.until_ok("put", key="b", value="1", request_id="me:1")
    await until_replaced(cluster, "n1")
    story = await events.until_told("completed")
    assert story["unknown_from_seq"] <= only["version"][1]
    cluster.restart("n1")
    await cluster.until_members(*NODES, deadline_s=PATIENCE_S)
    assert [e["node"] for e in events.told if "cut_behind" in e] == ["n1"]
    assert (await cluster.until_ok("get", key="a"))["value"] == "1"


async def test_the_client_and_status_tell_who_is_suspected_and_what_is_missing(
    cluster: Cluster,
) -> None:
    await cluster.admin("config", auto_failover=False)
    async with bus_kv.connect(cluster.url, root=cluster.root) as db:
        await db.put("a", "1")
        assert await db.is_cluster_healthy()
        stats = await db.get_cluster_stats()
        assert (stats.total_nodes, stats.healthy_nodes, stats.total_shards) == (3, 3, 1)
        assert (stats.under_replicated_shards, stats.suspects) == (0, [])
        cluster.kill("n1")
        put = asyncio.create_task(db.put("a", "2"))

        async def is_suspected() -> bool:
            ran = await command(cluster, "status")
            return "suspected: n1, by " in ran.text

        await until(is_suspected, PATIENCE_S)
        await cluster.admin("failover", shard="s1")
        await put

        async def is_missing_one() -> bool:
            return (await db.get_cluster_stats()).under_replicated_shards == 1

        await until(is_missing_one, PATIENCE_S)
        assert (await db.get("a")).text == "2"
