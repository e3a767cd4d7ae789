"""What the fold costs: a node that folds beside one that never does, workload by workload, round by round."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli.local_cluster import LocalCluster
from bus_kv.cli.measure import Spread, in_turn
from bus_kv.cli.workloads import load, run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bus_kv.cli.workloads import Data, Plan, Workload
    from bus_kv.client.client import Client

NEVER = {"fold_interval_ms": 10**9, "fold_bytes": 10**12, "unfolded_bytes_max": 10**12}


async def measure_fold(
    folder: Path, plan: Plan, note: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One node of each kind on one nats-server. Raises ClusterError."""
    data = plan.data("bench/")
    async with LocalCluster(folder / "fold", nodes=1, root="fold") as folding:
        connection = replace(folding.connection, root="never")
        never = LocalCluster(
            folder / "never", nodes=1, connection=connection, root="never", knobs=NEVER
        )
        async with never:
            await asyncio.gather(folding.wait_healthy(), never.wait_healthy())
            async with (
                bus_kv.connect(options=folding.connection) as with_fold,
                bus_kv.connect(options=connection) as without,
            ):
                for db in (with_fold, without):
                    await load(db, data)
                return [
                    await _compare(with_fold, without, workload, data, plan, note)
                    for workload in plan.workloads
                ]


async def _compare(
    with_fold: Client, without: Client, workload: Workload, data: Data, plan: Plan,
    note: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    callers = plan.callers_of(workload)
    note(f"measuring {workload} with {callers} caller(s), with and without the fold")
    rounds = await in_turn(
        lambda _: run(with_fold, workload, data, callers, plan.timing),
        lambda _: run(without, workload, data, callers, plan.timing),
        plan.rounds,
    )
    ratio = Spread.of([fold.operations_per_s / never.operations_per_s for fold, never in rounds])
    tails = [fold.latency_ms(99) / fold.latency_ms(50) for fold, _ in rounds]
    return {
        "workload": str(workload),
        "callers": callers,
        "with_fold_per_s": round(median(fold.operations_per_s for fold, _ in rounds)),
        "without_per_s": round(median(never.operations_per_s for _, never in rounds)),
        "ratio": ratio.median,
        "ratio_min": ratio.min,
        "ratio_max": ratio.max,
        "p99_to_p50": round(median(tails), 2),
    }
