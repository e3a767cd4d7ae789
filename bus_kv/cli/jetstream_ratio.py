"""This database beside JetStream's key-value store with three replicas, measured in turn from one process.

Both are reached through the same three nats-servers, and in each round through the same one of them: how far a leader
is from it matters. JetStream has files and its usual settings, with which an acknowledged put is not on disk yet; a
lone put is also compared with servers that put it there first.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli import cpu
from bus_kv.cli.local_cluster import ClusterError, LocalCluster
from bus_kv.cli.measure import Result, Spread, in_turn
from bus_kv.cli.processes import Guard
from bus_kv.cli.workloads import MANY, MANY_CALLERS_MAX, Workload, load, run_on
from bus_kv.knobs import Knobs
from bus_kv.runtime.connection import ConnectOptions
from bus_kv.runtime.jetstream_kv import create_bucket, jetstream_kv
from bus_kv.runtime.nats_server import SYNC_ALWAYS_VERSION_MIN, NatsCluster

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from bus_kv.cli.workloads import Plan

REPLICAS = 3

_RATE, _MEDIAN = "keys/s", "p50 ms"
_BUCKET = "bench"
_UNACKNOWLEDGED_MAX = 2 * MANY * MANY_CALLERS_MAX
"""More than is ever under way, so that nothing waits for room."""
_QUIET_S = Knobs().fold_interval_ms / 1000 + 0.5
"""Processes that used no CPU to speak of for so long have nothing left to bring to disk."""
_QUIET_CORES = 0.1
"""Heartbeats take less."""
_QUIET_DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Compared:
    """One row: figures in `unit` over all rounds, and ours in relation to JetStream's of the same round."""

    name: str
    callers: int
    unit: str
    ours: Spread
    jetstream: Spread
    ratio: Spread


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    workload: Workload
    callers: int
    theirs: ConnectOptions
    unit: str = _RATE

    def figure(self, result: Result) -> float:
        return result.operations_per_s if self.unit == _RATE else result.latency_ms(50)


async def measure_jetstream(
    folder: Path, plan: Plan, nodes: int, note: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Compared]]:
    """Our shards with their members, and the rows. Raises NatsServerError, BusError, ClusterError."""
    note(f"starting nats-servers, a coordinator and {nodes} node(s) in {folder}")
    async with AsyncExitStack() as stack:
        guard = await stack.enter_async_context(Guard())
        usual = await _servers(stack, guard, NatsCluster(folder / "usual", sync_always=False))
        fsynced = None
        if Workload.PUT in plan.workloads and usual.version >= SYNC_ALWAYS_VERSION_MIN:
            fsynced = await _servers(stack, guard, NatsCluster(folder / "fsynced"))
        options = [ConnectOptions(servers=servers.urls) for servers in (usual, fsynced) if servers]
        for theirs in options:
            await create_bucket(theirs, _BUCKET, REPLICAS)
        # Only now: with a bucket of three replicas there, our own can have as many.
        cluster = LocalCluster(folder / "ours", nodes=nodes, connection=options[0])
        await stack.enter_async_context(cluster)
        await cluster.wait_healthy()
        pids = [*cluster.pids.values(), *usual.pids.values()]
        return await _Comparison(plan, options[0], pids, note).measure(_rows(plan, options))


async def _servers(stack: AsyncExitStack, guard: Guard, servers: NatsCluster) -> NatsCluster:
    await stack.enter_async_context(servers)
    for pid in servers.pids.values():
        guard.watch(pid)
    return servers


def _rows(plan: Plan, options: list[ConnectOptions]) -> list[_Row]:
    usual, many = options[0], plan.callers_of(Workload.PUT_MANY)
    rows = [
        _Row("put", Workload.PUT, plan.callers, usual),
        _Row("get", Workload.GET, plan.callers, usual),
        _Row("lone put", Workload.PUT, 1, usual, _MEDIAN),
        *(_Row("lone put, JetStream fsynced", Workload.PUT, 1, o, _MEDIAN) for o in options[1:]),
        _Row("put_many", Workload.PUT_MANY, many, usual),
    ]
    return [row for row in rows if row.workload in plan.workloads]


class _Comparison:
    def __init__(
        self, plan: Plan, ours: ConnectOptions, pids: Iterable[int], note: Callable[[str], None]
    ) -> None:
        self._plan, self._ours, self._pids, self._note = plan, ours, [*pids], note
        self._data = plan.data("bench/")
        self._text_data = self._data.with_text_keys()

    async def measure(self, rows: list[_Row]) -> tuple[list[dict[str, Any]], list[Compared]]:
        self._note(f"loading {self._plan.keys:,} keys")
        async with bus_kv.connect(options=self._ours) as db:
            await load(db, self._data)
            map = await db.map()
        # The same servers; those that fsync would take minutes, and a put needs no key to be there.
        async with jetstream_kv(self._ours, _BUCKET, _UNACKNOWLEDGED_MAX) as kv:
            await load(kv, self._text_data)
        await _until_quiet(self._pids)
        shards = [{n: shard[n] for n in ("id", "primary", "members")} for shard in map["shards"]]
        return shards, [await self._compare(row) for row in rows]

    async def _compare(self, row: _Row) -> Compared:
        self._note(f"measuring {row.name} with {row.callers} caller(s), in turn with JetStream")
        rounds = await in_turn(
            lambda i: self._run_ours(row, i), lambda i: self._run_theirs(row, i), self._plan.rounds
        )
        pairs = [(row.figure(ours), row.figure(theirs)) for ours, theirs in rounds]
        return Compared(
            row.name, row.callers, row.unit,
            ours=Spread.of([ours for ours, _ in pairs]),
            jetstream=Spread.of([theirs for _, theirs in pairs]),
            ratio=Spread.of([ours / theirs for ours, theirs in pairs]),
        )  # fmt: skip

    async def _run_ours(self, row: _Row, round: int) -> Result:
        async with bus_kv.connect(options=_at(self._ours, round)) as db:
            result = await run_on(db, row.workload, self._data, row.callers, self._plan.timing)
        if row.workload is not Workload.GET:
            await _until_quiet(self._pids)
        return result

    async def _run_theirs(self, row: _Row, round: int) -> Result:
        options = _at(row.theirs, round)
        async with jetstream_kv(options, _BUCKET, _UNACKNOWLEDGED_MAX) as kv:
            return await run_on(kv, row.workload, self._text_data, row.callers, self._plan.timing)


def _at(options: ConnectOptions, round: int) -> ConnectOptions:
    return replace(options, servers=(options.servers[round % len(options.servers)],))


async def _until_quiet(pids: list[int]) -> None:
    """What our nodes bring to disk afterwards must not burden whoever is measured next."""
    if not cpu.is_available():
        return await asyncio.sleep(_QUIET_S)
    with suppress(TimeoutError):
        async with asyncio.timeout(_QUIET_DEADLINE_S):
            while await _busy_cores(pids, _QUIET_S) > _QUIET_CORES:
                pass
    return None


async def _busy_cores(pids: list[int], seconds: float) -> float:
    try:
        before_s = sum(map(cpu.cpu_s, pids))
        await asyncio.sleep(seconds)
        return (sum(map(cpu.cpu_s, pids)) - before_s) / seconds
    except OSError:
        raise ClusterError("a process ended while it was measured") from None
