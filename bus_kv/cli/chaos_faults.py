"""The faults of `bus-kv chaos`: each chooses whom it befalls, and lasts as long as its context."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus_kv.cli.chaos_cluster import COORDINATORS, ChaosCluster
from bus_kv.cli.local_cluster import ClusterError

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from bus_kv.client.client import Client

    Choose = Callable[[ChaosCluster, Client, random.Random], Awaitable[list[str]]]
    Act = Callable[[ChaosCluster, list[str]], AbstractAsyncContextManager[None]]

SLOW_FSYNC_MS = 100
_ATTACH_DEADLINE_S = 5.0
_ALONE_S = 0.5
"""Too short for anybody to take the dead backups out of the configuration."""


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    choose: Choose
    act: Act
    links: bool = False
    """Needs a link before every node."""
    servers: int = 1
    outlasted: bool = True
    """Writes can be accepted again while it lasts."""
    may_be_short: bool = False
    """Worth ending before anybody has noticed, too."""
    program: str = ""
    """A program that it needs."""

    @property
    def is_possible(self) -> bool:
        return not self.program or shutil.which(self.program) is not None


# ---- whom ----


async def _primary(cluster: ChaosCluster, db: Client, _: random.Random) -> list[str]:
    return [await cluster.primary(db)]


async def _backup(cluster: ChaosCluster, db: Client, rng: random.Random) -> list[str]:
    primary = await cluster.primary(db)
    return [rng.choice([node for node in cluster.node_ids if node != primary])]


async def _primary_first(cluster: ChaosCluster, db: Client, _: random.Random) -> list[str]:
    primary = await cluster.primary(db)
    return [primary, *(node for node in cluster.node_ids if node != primary)]


async def _node(cluster: ChaosCluster, _: Client, rng: random.Random) -> list[str]:
    return [rng.choice(cluster.node_ids)]


async def _coordinator(cluster: ChaosCluster, _: Client, __: random.Random) -> list[str]:
    return [await cluster.active_coordinator()]


async def _primary_and_coordinator(
    cluster: ChaosCluster, db: Client, _: random.Random
) -> list[str]:
    return [await cluster.primary(db), await cluster.active_coordinator()]


async def _all(cluster: ChaosCluster, _: Client, __: random.Random) -> list[str]:
    return [*COORDINATORS, *cluster.node_ids]


async def _servers(cluster: ChaosCluster, _: Client, __: random.Random) -> list[str]:
    return cluster.server_names


async def _leading_server(cluster: ChaosCluster, _: Client, __: random.Random) -> list[str]:
    return [await cluster.jetstream_leader()]


# ---- what ----


@asynccontextmanager
async def _killed(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    await asyncio.gather(*map(cluster.kill, names))
    yield
    await asyncio.gather(*map(cluster.restart, names))


@asynccontextmanager
async def _killed_in_turn(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    """The primary dies last, after a while without a majority: what it alone has must not have been acknowledged."""
    primary, *backups = names
    await asyncio.gather(*map(cluster.kill, backups))
    await asyncio.sleep(_ALONE_S)
    await cluster.kill(primary)
    await asyncio.gather(*map(cluster.restart, backups))
    yield
    await cluster.restart(primary)


@asynccontextmanager
async def _wiped(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    async with _killed(cluster, names):
        await asyncio.gather(*map(cluster.wipe, names))
        yield


@asynccontextmanager
async def _paused(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    for name in names:
        cluster.pause(name)
    yield
    for name in names:
        cluster.resume(name)


def _cut(*, to_bus: bool = True, from_bus: bool = True) -> Act:
    @asynccontextmanager
    async def act(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
        for name in names:
            cluster.links[name].cut(to_bus=to_bus, from_bus=from_bus)
        yield
        for name in names:
            cluster.links[name].mend()

    return act


@asynccontextmanager
async def _without_servers(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    await asyncio.gather(*map(cluster.kill_server, names))
    yield
    await asyncio.gather(*map(cluster.restart_server, names))


@asynccontextmanager
async def _slow_disk(cluster: ChaosCluster, names: list[str]) -> AsyncIterator[None]:
    """strace holds back the return of every fsync of the process: the real program on a disk that takes its time."""
    (name,) = names
    delay = f"inject=fdatasync,fsync:delay_exit={SLOW_FSYNC_MS * 1000}"
    tracer = await asyncio.create_subprocess_exec(
        *("strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync,fsync", "-e", delay),
        *("-p", str(cluster.pids[name])),
        stdin=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield
        if tracer.returncode is not None:
            assert tracer.stderr is not None
            said = (await tracer.stderr.read()).decode(errors="replace").strip()
            raise ClusterError(f"strace cannot slow down the disk: {said}")
    finally:
        with suppress(ProcessLookupError):
            tracer.terminate()
        async with asyncio.timeout(_ATTACH_DEADLINE_S):
            await tracer.wait()


FAULTS: dict[str, Fault] = {
    fault.name: fault
    for fault in (
        Fault("kill-primary", _primary, _killed),
        Fault("kill-backup", _backup, _killed),
        Fault("kill-coordinator", _coordinator, _killed),
        Fault("kill-primary-and-coordinator", _primary_and_coordinator, _killed),
        Fault("kill-all", _all, _killed, outlasted=False),
        Fault("kill-in-turn", _primary_first, _killed_in_turn),
        Fault("pause-primary", _primary, _paused, may_be_short=True),
        Fault("pause-backup", _backup, _paused, may_be_short=True),
        Fault("cut-primary", _primary, _cut(), links=True, may_be_short=True),
        Fault("cut-backup", _backup, _cut(), links=True, may_be_short=True),
        Fault("mute-primary", _primary, _cut(from_bus=False), links=True, may_be_short=True),
        Fault("deaf-primary", _primary, _cut(to_bus=False), links=True, may_be_short=True),
        Fault("restart-nats", _servers, _without_servers, outlasted=False),
        Fault("lose-jetstream-leader", _leading_server, _without_servers, servers=3),
        Fault("wipe-disk", _node, _wiped),
        Fault("slow-disk", _node, _slow_disk, program="strace"),
    )
}
