"""Three nodes hold the same log and the same state; members come and go, and nothing that was acknowledged is lost."""

import contextlib
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nats.errors import NoRespondersError

from tests.support.cluster import Cluster, cluster_on, until
from tests.support.recorded import Recorder, sql
from tests.support.replicas import (
    LEVELS,
    NEVER_NOTICED,
    NODES,
    QUICK,
    assert_kept,
    cuts_of,
    log_of,
    state_of,
    until_folded,
    until_logs_equal,
)  # fmt: skip


@pytest.fixture
async def cluster(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three members that notice it soon when one is gone."""
    async with cluster_on(nats_url, tmp_path, nodes=3, **QUICK) as cluster:
        yield cluster


@pytest.fixture
async def patient(nats_url: str, tmp_path: Path) -> AsyncIterator[Cluster]:
    """Three members that wait for an operator when one is gone."""
    async with cluster_on(nats_url, tmp_path, nodes=3, **NEVER_NOTICED) as cluster:
        yield cluster


# ---- the same everywhere ----


async def test_all_nodes_end_with_the_same_log_and_the_same_state(
    nats_url: str, tmp_path: Path
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=3, fold_interval_ms=100) as cluster:
        recorder = Recorder(cluster, levels=LEVELS)
        await recorder.until_more(500)
        await assert_kept(cluster, recorder, *NODES)
        await until_folded(cluster, *NODES)
        # Without a coordinator nothing changes any more while the nodes end.
        cluster.kill("c1")
        for node in NODES:
            assert (await cluster.stop(node))[0] == 0
        states = [state_of(cluster, node) for node in NODES]
        assert states[0].mark.last == log_of(cluster, "n1")[-1][0]
        assert len(states[0].oplog) >= len(recorder.done)
        assert states[1:] == states[:1] * 2


async def test_a_replica_fetches_the_largest_values(cluster: Cluster) -> None:
    value_bytes_max = (await cluster.bus.ok("health"))["value_bytes_max"]
    cluster.kill("n3")
    await cluster.until_members("n1", "n2")
    for i in range(4):
        key, value = str(i).ljust(4096, "x"), b"v" * value_bytes_max
        await cluster.bus.ok("put", codec="cbor", key=key, value=value, ttl_ms=60_000)
    cluster.restart("n3")
    await cluster.until_members(*NODES)
    await until_logs_equal(cluster, *NODES)


async def test_the_replication_factor_changes_under_load(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    for factor in (1, 3, 2, 3):
        await recorder.until_more(50)
        await cluster.admin("config", replication_factor=factor)
        await until(partial(has_members, cluster, factor))
    await recorder.until_more(50)
    await assert_kept(cluster, recorder, *NODES)


async def has_members(cluster: Cluster, count: int) -> bool:
    shard = await cluster.shard()
    return (shard["state"], len(shard["members"]), shard["learners"]) == ("active", count, [])


# ---- one of three is killed ----


async def test_after_a_failover_nothing_is_lost_and_the_killed_primary_comes_back(
    patient: Cluster,
) -> None:
    recorder = Recorder(patient, levels=LEVELS)
    await recorder.until_more(200)
    patient.kill("n1")
    told = await patient.admin("failover", shard="s1")
    assert told["primary"] in ("n2", "n3")
    await recorder.until_more(200)
    patient.restart("n1")
    await recorder.until_more(200)
    await patient.until_members(*NODES)
    await recorder.until_more(200)
    await assert_kept(patient, recorder, *NODES)


async def test_what_only_the_killed_primary_had_is_cut_when_it_comes_back(patient: Cluster) -> None:
    await patient.bus.ok("put", key="kept", value="1", request_id="w:1", consistency="all")
    epoch = (await patient.shard())["epoch"]
    for backup in ("n2", "n3"):
        patient.kill(backup)
    ops = [{"op": "put", "key": "lost", "value": "1"}]
    lost = await patient.bus.ok(
        "shard.s1.request", epoch=epoch, ops=ops, request_id="w:2", consistency="one"
    )
    patient.kill("n1")
    for backup in ("n2", "n3"):
        patient.restart(backup)
    await patient.admin("failover", shard="s1")
    assert (await patient.until_ok("get", key="lost"))["found"] is False
    assert (await patient.until_ok("get", key="kept"))["value"] == "1"
    events = await patient.bus.client.subscribe(f"{patient.root}.event.failover.s1")
    patient.restart("n1")
    await patient.until_members(*NODES)
    event: dict[str, Any] = {}
    while event.get("type") != "rolled_back":  # before it there are others: it has cut its log
        event = json.loads((await events.next_msg(10)).data)
    version = lost["results"][0]["version"]
    assert (event["type"], event["node"], event["versions"]) == ("rolled_back", "n1", [version])
    await until(partial(is_forgotten, patient, "n1"))
    told = "SELECT request_id, epoch, seq, key_text, op FROM oplog WHERE outcome = 'rolled_back'"
    assert await sql(patient, told) == [["w:2", *version, "lost", "put"]]
    versions = (await patient.bus.ok("history", key="lost"))["versions"]
    assert versions == []
    # What was cut has not happened: the same request may be done now.
    assert (await patient.bus.ok("put", key="lost", value="1", request_id="w:2"))["found"] is False


async def is_forgotten(cluster: Cluster, node: str) -> bool:
    return cuts_of(cluster, node) == []


async def test_a_killed_primary_is_replaced_and_comes_back(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(200)
    cluster.kill("n1")
    await cluster.until_members("n2", "n3")
    await recorder.until_more(200)
    cluster.restart("n1")
    await cluster.until_members(*NODES)
    await recorder.until_more(200)
    await assert_kept(cluster, recorder, *NODES)


async def test_a_primary_that_is_restarted_at_once_loses_nothing(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    for _ in range(3):
        await recorder.until_more(100)
        cluster.restart(await cluster.primary())
        await recorder.until_more(100)
        await cluster.until_members(*NODES)
    await assert_kept(cluster, recorder, *NODES)


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_a_lost_backup_leaves_and_comes_back(cluster: Cluster, how: str) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    cluster.kill("n3") if how == "kill" else cluster.pause("n3")
    await cluster.until_members("n1", "n2")
    # A frozen node still gets its share of the requests, and each waits for it.
    await recorder.until_more(60)
    cluster.restart("n3") if how == "kill" else cluster.resume("n3")
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)


@pytest.mark.parametrize("how", ["kill", "freeze"])
async def test_the_active_coordinator_is_lost_and_then_the_primary(
    cluster: Cluster, how: str
) -> None:
    cluster.start_coordinator("c2")
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(200)
    cluster.kill("c1") if how == "kill" else cluster.pause("c1")
    await recorder.until_more(100)
    cluster.kill("n1")
    await cluster.until_members("n2", "n3")
    await recorder.until_more(100)
    # It holds the lease no more, whatever it was about to do.
    cluster.restart("c1") if how == "kill" else cluster.resume("c1")
    cluster.restart("n1")
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)


async def test_a_map_that_was_lost_is_restored_from_the_nodes(cluster: Cluster) -> None:
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(100)
    await cluster.bus.client.jetstream().delete_key_value(f"bus_kv_{cluster.root}")
    cluster.restart("c1")
    await recorder.until_more(100)
    await until(partial(is_restored, cluster))
    cluster.kill("n1")
    await cluster.until_members("n2", "n3")
    cluster.restart("n1")
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)


async def is_restored(cluster: Cluster) -> bool:
    """The coordinator that has come up does what it is told."""
    with contextlib.suppress(NoRespondersError, TimeoutError):
        return (await cluster.bus.ask("admin.restore", timeout_s=1.5)).code is None
    return False
