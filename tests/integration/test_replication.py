"""Three nodes hold the same log and the same state; members come and go, and nothing that was acknowledged is lost."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, cluster_on
from tests.support.recorded import Recorder
from tests.support.replicas import (
    assert_kept,
    cuts_of,
    log_of,
    requests_in,
    state_of,
    until_folded,
)  # fmt: skip

NODES = ("n1", "n2", "n3")
LEVELS = ("quorum", "quorum", "all")
"""Of the writers, in turn."""
QUICK: dict[str, Any] = {"heartbeat_interval_s": 0.2}
"""A dead node is noticed within two seconds."""
NEVER_NOTICED: dict[str, Any] = {"heartbeat_misses_max": 1000}
"""What happens to a dead node happens because an operator says so."""


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
    patient.restart("n1")
    await patient.until_members(*NODES)
    [(request_id, version, key)] = requests_in(cuts_of(patient, "n1"))
    assert (request_id, [*version], key) == ("w:2", lost["results"][0]["version"], b"lost")
    # What was cut has not happened: the same request may be done now.
    assert (await patient.bus.ok("put", key="lost", value="1", request_id="w:2"))["found"] is False


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
    await recorder.until_more(200)
    cluster.kill("n3") if how == "kill" else cluster.pause("n3")
    await cluster.until_members("n1", "n2")
    await recorder.until_more(200)
    cluster.restart("n3") if how == "kill" else cluster.resume("n3")
    await cluster.until_members(*NODES)
    await recorder.until_more(200)
    await assert_kept(cluster, recorder, *NODES)


async def test_the_active_coordinator_is_killed_with_the_primary(cluster: Cluster) -> None:
    cluster.start_coordinator("c2")
    recorder = Recorder(cluster, levels=LEVELS)
    await recorder.until_more(200)
    cluster.kill("c1")
    await recorder.until_more(200)
    cluster.kill("n1")
    await cluster.until_members("n2", "n3")
    await recorder.until_more(200)
    cluster.restart("n1")
    await cluster.until_members(*NODES)
    await recorder.until_more(100)
    await assert_kept(cluster, recorder, *NODES)
