"""What one run is made of, drawn from its seed: a swarm, so not every fault is in every run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bus_kv.knobs import Knobs
from tests.simulator.world import MILLISECOND_NS, SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from tests.simulator.world import World

KEYS = [f"k{i}".encode() for i in range(6)]
KINDS = (
    "crash", "crash", "pause", "pause", "cut", "store", "full", "operate", "operate", "loss", "forget",
)  # fmt: skip
SAFETY_NS = {1: 6 * SECOND_NS, 3: 3 * SECOND_NS, 10: 3 * SECOND_NS // 2}
"""How long faults last in a long run, by its haste."""
LONG_RUNS = 0.1
"""Part of the runs that are long; the others last a quarter of the time."""


@dataclass(frozen=True, slots=True)
class Shape:
    nodes: int
    coordinators: int
    clients: int
    loss: float
    slowness: float
    lost_answers: float
    fault_interval_ns: int
    knobs: Knobs
    kinds: Sequence[str] = ("crash",)
    """Of the faults that happen in this run."""
    haste: int = 1
    """Faults, and what is done about them, follow each other so many times faster."""
    bounds: Sequence[bytes] | None = None
    """Where one shard ends and the next begins, in a cluster that begins with a map; None: it lays out its first."""
    safety_ns: int = SECOND_NS
    """How long faults last."""


def draw_shape(world: World) -> Shape:
    random = world.random("shape")
    is_long = random.random() < LONG_RUNS
    haste = random.choice([1, 3, 10] if is_long else [3, 10])
    return Shape(
        nodes=random.choice([1, 2, 2, 3, 3, 3, 3, 3, 4, 4, 5, 7]),
        coordinators=random.randint(1, 3),
        clients=random.randint(1, 3),
        loss=random.choice([0.0, 0.0, 0.01, 0.05, 0.2]),
        slowness=random.choice([0.0, 0.01, 0.05, 0.3]),
        lost_answers=random.choice([0.0, 0.02, 0.2]),
        fault_interval_ns=random.choice([300, 800, 2000]) * MILLISECOND_NS // haste,
        kinds=random.sample(KINDS, random.randint(2, len(KINDS))),
        haste=haste,
        bounds=_bounds(random),
        safety_ns=SAFETY_NS[haste] if is_long else SAFETY_NS[haste] // 4,
        knobs=_knobs(random, haste),
    )


def _bounds(random: Random) -> Sequence[bytes] | None:
    """One to four shards."""
    shards = random.choice([0, 1, 2, 3, 4])
    return sorted(random.sample(KEYS[1:], shards - 1)) if shards else None


def _knobs(random: Random, haste: int) -> Knobs:
    return Knobs(
        step_retry_ms=500 // haste,
        attempt_patience_ms=random.choice([1000, 5000]) // haste,
        remind_ms=random.choice([20, 100]),
        pull_retry_ms=random.choice([30, 500]),
        replication_factor=random.choice([1, 2, 3, 3, 3, 5, 7]),
        heartbeat_interval_s=random.choice([0.5, 1.0]) / haste,
        heartbeat_misses_max=2,
        hello_wait_ms=300 // haste,
        layout_wait_s=0.5 / haste,
        lease_s=random.choice([0.6, 2.0]) / haste,
        inbox_messages_max=random.choice([8, 1000]),
        tail_operations_max=random.choice([5, 10_000]),
        cache_bytes=random.choice([1, 2000, 2500, 3000, 1_000_000]),
        fold_interval_ms=random.choice([1, 50, 2000]),
        fold_bytes=random.choice([1, 1000, 100_000]),
        unfolded_bytes_max=random.choice([2000, 1_000_000]),
        log_keep_bytes=random.choice([0, 200, 1000, 1_000_000]),
        log_bytes_max=random.choice([0, 1000, 1_000_000]),
        log_fetched_bytes_max=1000,
        snapshot_retry_ms=500 // haste,
        dedup_runs_max=random.choice([0, 3, 1000]),
        client_window_messages=random.choice([1, 4]),
        answer_within_ms=random.choice([300, 1500]) // haste,
        store_timeout_ms=2000 // haste,
        client_attempt_ms=random.choice([8, 2000 // haste, 2000 // haste]),
        client_pause_ms_max=500 // haste,
        suspect_after_ms=250 // haste,
        client_fill_operations=random.choice([1, 3]),
        turn_operations_max=random.choice([1, 4, 100]),
        client_batch_operations_max=random.choice([2, 100]),
        client_timeout_s=random.choice([1.2, 4.0, 8.0]) / haste,
        wipe_after_s=random.choice([0.0, 0.1, 600.0]),
    )
