"""What clients see of a takeover: first results stay, a former primary serves nothing, losses down to the last one."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import bus_kv
from bus_kv.runtime.nats_server import NatsServer
from tests.support.cluster import Cluster, Reply, cluster_on, decode, encode
from tests.support.recorded import Recorder
from tests.support.replicas import assert_kept, until_logs_equal, versions_in

NODES = ("n1", "n2", "n3")
LEVELS = ("quorum", "quorum", "all")
QUICK: dict[str, Any] = {"heartbeat_interval_s": 0.2}
NEVER_NOTICED: dict[str, Any] = {"heartbeat_misses_max": 1000}


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3, **QUICK) as cluster:
        yield cluster


@pytest.fixture
async def patient(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster_on(nats_url, tmp_path, nodes=3, **NEVER_NOTICED) as cluster:
        yield cluster


# ---- one after the other ----


async def lose(cluster: Cluster, node: str, how: str) -> None:
    if how == "kill":
        cluster.kill(node)
    else:
        code, text = await cluster.stop(node)
        assert code == 0, text


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_down_to_the_last_of_three_and_back(cluster: Cluster, how: str) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    left = [*NODES]
    while len(left) > 1:
        primary = await cluster.primary()
        await lose(cluster, primary, how)
        left.remove(primary)
        await cluster.until_members(*left)
        await recorder.until_more(100)
    assert (await cluster.bus.ok("health"))["status"] == "ok"
    for node in NODES:
        if not cluster.is_running(node):
            cluster.restart(node)
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)


async def test_of_two_members_the_survivor_goes_on_alone(nats_url: str, tmp_path: Path) -> None:
    knobs: dict[str, Any] = {**QUICK, "replication_factor": 2, "layout_wait_s": 10}
    async with cluster_on(nats_url, tmp_path, nodes=2, **knobs) as cluster:
        await cluster.until_members("n1", "n2")
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(200)
        primary = await cluster.primary()
        [survivor] = {"n1", "n2"} - {primary}
        cluster.kill(primary)
        await cluster.until_members(survivor)
        await recorder.until_more(200)
        cluster.restart(primary)
        await cluster.until_members("n1", "n2")
        await recorder.until_more(100)
        await assert_kept(cluster, recorder, "n1", "n2")


@pytest.mark.parametrize("lost", ["primary", "backup"])
async def test_a_spare_node_fills_in_for_a_dead_one(
    nats_url: str, tmp_path: Path, lost: str
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=4, **QUICK) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(200)
        shard = await cluster.shard()
        [spare] = {"n1", "n2", "n3", "n4"} - set(shard["members"])
        dead = next(m for m in shard["members"] if (m == shard["primary"]) == (lost == "primary"))
        cluster.kill(dead)
        members = [spare, *(m for m in shard["members"] if m != dead)]
        await cluster.until_members(*members)
        await recorder.until_more(200)
        await assert_kept(cluster, recorder, *members)
        cluster.restart(dead)
        await cluster.wait_healthy()
        await cluster.until_members(*members)


async def test_an_empty_disk_comes_back_as_a_new_member(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(200)
    for node in ("n2", "n1"):
        cluster.kill(node)
        cluster.data(node).rename(cluster.folder / f"former-{node}")
        cluster.restart(node)
        await recorder.until_more(100)
        await cluster.until_members(*NODES)
    await assert_kept(cluster, recorder, *NODES)


async def test_after_all_were_killed_at_once_everything_is_there(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    for _ in range(2):
        await recorder.until_more(150)
        for node in NODES:
            cluster.kill(node)
        for node in NODES:
            cluster.restart(node)
        await recorder.until_more(50)
    await cluster.until_members(*NODES)
    await assert_kept(cluster, recorder, *NODES)


# ---- exactly once ----


async def test_a_repeat_after_a_takeover_gives_the_first_result(patient: Cluster) -> None:
    put: dict[str, Any] = {"key": "a", "value": "1", "request_id": "me:7"}
    first = await patient.bus.ok("put", **put)
    ops = [{"op": "put", "key": f"b{i}", "value": "1"} for i in range(3)]
    batch = await patient.bus.ok("batch", ops=ops, request_id="me:5")
    deleted = await patient.bus.ok("delete", key="a", request_id="me:8")
    patient.kill("n1")
    await patient.admin("failover", shard="s1")
    assert await patient.until_ok("put", **put) == first
    assert await patient.until_ok("batch", ops=ops, request_id="me:5") == batch
    assert await patient.until_ok("delete", key="a", request_id="me:8") == deleted
    assert (await patient.until_ok("get", key="a"))["found"] is False
    # A new primary remembers what it did itself as well.
    patient.restart("n1")
    await patient.until_members(*NODES)
    await patient.admin("failover", shard="s1")
    assert await patient.until_ok("put", **put) == first


async def test_a_write_of_unknown_outcome_is_done_once(patient: Cluster) -> None:
    """The frozen primary has the request in its inbox, and finds it there when it goes on."""
    patient.pause("n1")
    puts: list[dict[str, Any]] = [
        {"key": f"a{i}", "value": str(i), "request_id": f"me:{i}"} for i in range(20)
    ]
    asked = [patient.bus.ask("put", timeout_s=2.5, **put) for put in puts]
    replies = await asyncio.gather(*asked, return_exceptions=True)
    assert {r.code for r in replies if isinstance(r, Reply)} == {"OUTCOME_UNKNOWN"}
    await patient.admin("failover", shard="s1")
    versions = [(await patient.until_ok("put", **put))["version"] for put in puts]
    patient.resume("n1")
    await patient.until_members(*NODES)
    assert [(await patient.until_ok("put", **put))["version"] for put in puts] == versions
    assert versions_in(await until_logs_equal(patient, *NODES)) == {
        f"me:{i}": [tuple(version)] for i, version in enumerate(versions)
    }


# ---- the former primary ----


async def test_a_former_primary_that_thaws_serves_nothing(patient: Cluster) -> None:
    """It has the requests in its inbox before it hears that it was replaced."""
    bus = patient.bus
    await bus.ok("put", key="a", value="old")
    epoch = (await patient.shard())["epoch"]
    patient.pause("n1")
    await patient.admin("failover", shard="s1")
    await patient.until_ok("put", key="a", value="new")
    requests: list[dict[str, Any]] = [
        {"ops": [{"op": "get", "key": "a"}]},
        {"ops": [{"op": "get", "key": "a"}], "consistency": "all"},
        {"ops": [{"op": "put", "key": "a", "value": "late"}], "request_id": "late:1"},
        {
            "ops": [{"op": "put", "key": "a", "value": "late"}],
            "request_id": "late:2",
            "consistency": "all",
        },
        {
            "ops": [{"op": "put", "key": "a", "value": "late", "if_absent": True}],
            "request_id": "late:3",
        },
        {"scan": {}},
    ]
    inbox = bus.client.new_inbox()
    answers = await bus.client.subscribe(inbox)
    for request in requests:
        body = encode({"epoch": epoch, **request}, "json")
        await bus.client.publish(f"{patient.root}.shard.s1.request", body, reply=inbox)
    await bus.client.flush()
    patient.resume("n1")
    # Both the former and the new primary answer each.
    codes = []
    for _ in range(2 * len(requests)):
        answer = decode((await answers.next_msg(5)).data)
        codes.append(answer.get("code"))
        if "results" in answer:
            codes[-1] = answer["results"][0].get("code")
    assert None not in codes
    assert codes.count("STALE_EPOCH") >= len(requests)
    assert (await patient.until_ok("get", key="a"))["value"] == "new"
    await patient.until_members(*NODES)
    assert (await patient.until_ok("get", key="a"))["value"] == "new"


# ---- the bus ----


async def test_nats_restarts_under_three_members(nats_server: NatsServer, tmp_path: Path) -> None:
    async with cluster_on(nats_server.url, tmp_path / "c", nodes=3) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        async with bus_kv.connect(nats_server.url, root=cluster.root) as db:
            for number in range(2):
                await recorder.until_more(150)
                receipt = await db.put("a", str(number))
                await nats_server.kill()
                await nats_server.start()
                assert (await db.get("a")).version == receipt.version
        await recorder.until_more(100)
        await cluster.until_members(*NODES)
        await assert_kept(cluster, recorder, *NODES)
