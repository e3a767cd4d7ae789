"""What the fold costs: a node that folds beside one that never does, workload by workload, round by round."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import bus_kv
from bus_kv.cli.local_cluster import LocalCluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence
    from pathlib import Path

    from bus_kv.cli.measure import Result
    from bus_kv.client.client import Client

    Run = Callable[[Client, Any, int], Awaitable[Result]]
    """(client, workload, callers) -> what one round did."""

ROUNDS = 7
NEVER = {"fold_interval_ms": 10**9, "fold_bytes": 10**12, "unfolded_bytes_max": 10**12}


async def measure_fold(
    folder: Path, plan: Sequence[tuple[Any, int]], load: Callable[[Client], Awaitable[None]],
    run: Run, note: Callable[[str], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """One node of each kind on one nats-server; `plan` lists workloads and callers."""
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
                    await load(db)
                return [
                    await _compare(with_fold, without, workload, callers, run, note)
                    for workload, callers in plan
                ]


async def _compare(
    with_fold: Client, without: Client, workload: Any, callers: int, run: Run,
    note: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    note(f"measuring {workload} with {callers} caller(s), with and without the fold")
    rounds: list[tuple[Result, Result]] = []
    for i in range(ROUNDS):
        order = (with_fold, without) if i % 2 else (without, with_fold)
        results = {id(db): await run(db, workload, callers) for db in order}
        rounds.append((results[id(with_fold)], results[id(without)]))
    ratios = [fold.operations_per_s / never.operations_per_s for fold, never in rounds]
    tails = [fold.latency_ms(99) / fold.latency_ms(50) for fold, _ in rounds]
    return {
        "workload": str(workload),
        "callers": callers,
        "with_fold_per_s": round(median(fold.operations_per_s for fold, _ in rounds)),
        "without_per_s": round(median(never.operations_per_s for _, never in rounds)),
        "ratio": round(median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "p99_to_p50": round(median(tails), 2),
    }
