"""Where the CPU of an operation goes: every process of a cluster and its threads, while many callers are busy."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli import cpu
from bus_kv.cli.local_cluster import ClusterError, LocalCluster
from bus_kv.cli.measure import Timing
from bus_kv.cli.workloads import Workload, load, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus_kv.cli.workloads import Data, Plan
    from bus_kv.client.client import Client

_ALL_THREADS = "all"
_NATS = "nats-server"


@dataclass(frozen=True, slots=True)
class Part:
    """What one kind of thread of one process used; `role` is that of a node in its shards."""

    process: str
    role: str | None
    thread: str
    cpu_us: float
    """Per operation."""
    cores: float


@dataclass(frozen=True, slots=True)
class Profile:
    workload: Workload
    callers: int
    operations_per_s: float
    parts: list[Part]

    @property
    def cpu_us(self) -> float:
        """Of all parts, per operation."""
        return sum(part.cpu_us for part in self.parts)

    @property
    def cores(self) -> float:
        return sum(part.cores for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        return {
            "workload": str(self.workload),
            "callers": self.callers,
            "operations_per_s": round(self.operations_per_s, 1),
            "cpu_us": round(self.cpu_us, 3),
            "cores": round(self.cores, 3),
            "parts": [asdict(part) for part in self.parts],
        }


async def measure_profile(
    folder: Path, plan: Plan, nodes: int, note: Callable[[str], None]
) -> list[Profile]:
    """One profile for each workload of the plan, of a cluster that is started for it. Raises ClusterError."""
    note(f"starting a private cluster of {nodes} node(s) in {folder}")
    async with LocalCluster(folder, nodes=nodes) as cluster:
        await cluster.wait_healthy()
        async with bus_kv.connect(options=cluster.connection) as db:
            data = plan.data("bench/")
            note(f"loading {plan.keys:,} keys")
            await load(db, data)
            return [
                await _profile(cluster, db, workload, data, plan, note)
                for workload in plan.workloads
            ]


async def _profile(
    cluster: LocalCluster, db: Client, workload: Workload, data: Data, plan: Plan,
    note: Callable[[str], None],
) -> Profile:  # fmt: skip
    callers = plan.callers_of(workload)
    note(f"measuring {workload} with {callers} caller(s)")
    await run(db, workload, data, callers, Timing(0.0, plan.timing.warmup_s))
    pids = {"client": os.getpid(), **cluster.pids}
    before_s = _used_s(pids, cluster)
    result = await run(db, workload, data, callers, Timing(0.0, plan.timing.seconds))
    after_s = _used_s(pids, cluster)
    roles = _roles(await db.map())
    parts = [
        Part(
            process, roles.get(process), thread,
            cpu_us=round((used_s - before_s[process, thread]) * 1e6 / result.operations, 3),
            cores=round((used_s - before_s[process, thread]) / result.seconds, 3),
        )
        for (process, thread), used_s in after_s.items()
    ]  # fmt: skip
    return Profile(workload, callers, result.operations_per_s, parts)


def _used_s(pids: dict[str, int], cluster: LocalCluster) -> dict[tuple[str, str], float]:
    """CPU time so far by (process, kind of thread). Raises ClusterError when a process has ended."""
    used_s: dict[tuple[str, str], float] = {}
    try:
        for process, pid in pids.items():
            if process.startswith(_NATS):
                used_s[process, _ALL_THREADS] = cpu.cpu_s(pid)
            else:
                by_thread = cpu.cpu_by_thread_s(pid)
                used_s |= {(process, thread): s for thread, s in by_thread.items()}
    except OSError:
        ended = "; ".join(cluster.obituaries().values())
        raise ClusterError(ended or "a process ended while it was measured") from None
    return used_s


def _roles(map: dict[str, Any]) -> dict[str, str]:
    """What the nodes are in their shards: primary of one at least, or backup; other nodes hold none."""
    roles = {node: "backup" for shard in map["shards"] for node in shard["members"]}
    return roles | {shard["primary"]: "primary" for shard in map["shards"]}
