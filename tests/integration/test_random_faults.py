"""Faults at random under load, several at a time: whatever was acknowledged is there once, and all nodes end alike."""

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from nats.errors import NoRespondersError

from tests.support.cluster import Cluster, cluster_on, encode
from tests.support.recorded import Recorder
from tests.support.replicas import LEVELS, NODES, QUICK, state_of, until_folded

FAULTS = 10
ALL_OF_IT = 1 << 30
KNOBS: list[dict[str, Any]] = [
    {"log_keep_bytes": ALL_OF_IT},
    # Who was away finds no log any more that goes on where its own ends.
    {"log_keep_bytes": 1, "checkpoint_interval_s": 0.05, "fold_interval_ms": 20},
]


class Faults:
    """What befalls a cluster of three nodes and two coordinators; it is over after a while."""

    def __init__(self, cluster: Cluster, seed: int) -> None:
        self._cluster, self._random = cluster, random.Random(seed)
        self._away: set[str] = set()
        self._endings: list[asyncio.Task[None]] = []

    async def next(self) -> None:
        faults = [self._kill, self._kill, self._stop, self._freeze, self._administer]
        name = self._random.choice([*NODES, *NODES, "c1", "c2"])
        await asyncio.sleep(self._random.expovariate(2.0))
        if name not in self._away:
            self._random.choice(faults)(name)

    async def end(self) -> None:
        async with asyncio.timeout(30):
            await asyncio.gather(*self._endings)

    def _kill(self, name: str) -> None:
        self._cluster.kill(name)
        self._later(name, self._cluster.restart)

    def _stop(self, name: str) -> None:
        """It has some time to end in good order; if that is too short, it is killed."""
        self._cluster.terminate(name)
        self._later(name, self._cluster.restart)

    def _freeze(self, name: str) -> None:
        self._cluster.pause(name)
        self._later(name, self._cluster.resume)

    def _administer(self, name: str) -> None:
        verb = "transfer" if name in NODES else "failover"
        fields = {"shard": "s1", "to": name} if verb == "transfer" else {"shard": "s1"}
        self._endings.append(asyncio.create_task(self._ask(verb, fields)))

    async def _ask(self, verb: str, fields: dict[str, str]) -> None:
        """Whether it can be done depends on who is there."""
        with contextlib.suppress(NoRespondersError, TimeoutError):
            await self._cluster.bus.ask_raw(f"admin.{verb}", encode(fields, "json"), 12)

    def _later(self, name: str, over: Any) -> None:
        self._away.add(name)
        pause_s = self._random.choice([0.0, 0.1, 0.5, 1.0, 2.0])
        self._endings.append(asyncio.create_task(self._come_back(name, over, pause_s)))

    async def _come_back(self, name: str, over: Any, pause_s: float) -> None:
        await asyncio.sleep(pause_s)
        over(name)
        self._away.discard(name)


@pytest.mark.parametrize("knobs", KNOBS, ids=["all of the log", "snapshots"])
@pytest.mark.parametrize("seed", [1])
async def test_random_faults_lose_nothing(
    nats_url: str, tmp_path: Path, seed: int, knobs: dict[str, Any]
) -> None:
    async with cluster_on(nats_url, tmp_path, nodes=3, **QUICK, **knobs) as cluster:
        cluster.start_coordinator("c2")
        recorder, faults = Recorder(cluster, levels=LEVELS), Faults(cluster, seed)
        for _ in range(FAULTS):
            await faults.next()
        await faults.end()
        await cluster.wait_healthy()
        await cluster.until_members(*NODES)
        await recorder.until_more(20)
        await recorder.stop()
        await recorder.until_all_expired()
        await recorder.assert_values()
        await recorder.assert_oplog()
        await until_folded(cluster, *NODES)
        await assert_same_states(cluster)


async def assert_same_states(cluster: Cluster) -> None:
    """Without a coordinator nothing changes any more while the nodes end."""
    for name in ("c1", "c2"):
        cluster.kill(name)
    for node in NODES:
        assert (await cluster.stop(node))[0] == 0
    first, *others = [state_of(cluster, node) for node in NODES]
    for other in others:
        assert other == first
