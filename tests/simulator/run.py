"""One run: a safety phase under faults, then heal, a liveness phase, and the checkers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nodes.machine.status import Status
from tests.simulator import checkers
from tests.simulator.cluster import Cluster
from tests.simulator.faults import Faults
from tests.simulator.shape import draw_shape
from tests.simulator.workload import Call, Workload
from tests.simulator.world import MILLISECOND_NS, SECOND_NS, START_NS, Violation, World

if TYPE_CHECKING:
    from bus_kv.core.machine import EntryRow
    from tests.simulator.checkers import Logged

CALM_NS = SECOND_NS // 2
"""How long clients go on when everything has healed."""
STABLE_NS = 2 * SECOND_NS
LIVENESS_NS = 120 * SECOND_NS


@dataclass(frozen=True, slots=True)
class Result:
    seed: int
    digest: str
    events: int
    calls: int
    acknowledged: int
    epochs: int
    """Epochs that were seen serving: how much the run had to go through."""
    shared: int
    """Messages and log transactions that served several shards at once."""
    forgot: bool
    """Whether the map's store forgot something."""


def run(seed: int, trace: bool = False) -> Result:
    """Raises Violation, with the seed in its message."""
    world = World(seed, trace)
    try:
        return _run(world)
    except Exception as error:
        reason = str(error) if isinstance(error, Violation) else repr(error)
        raise Violation(f"seed {seed}: {reason}\n  replay: make sim SEED={seed}") from error


def _run(world: World) -> Result:
    shape = draw_shape(world)
    cluster = Cluster(world, shape)
    faults = Faults(cluster)
    history: list[Call] = []
    cluster.start()
    workloads = [Workload(world, cluster, f"w{i}", 5, history) for i in range(shape.clients)]
    world.run_until(START_NS + SECOND_NS, done=lambda: cluster.is_serving)
    faults.begin()
    world.run_until(world.now_ns + shape.safety_ns)
    faults.heal()
    world.run_until(world.now_ns + CALM_NS // shape.haste)
    for workload in workloads:
        workload.stopped = True
    end_ns = world.now_ns + LIVENESS_NS
    world.run_until(end_ns, done=lambda: cluster.is_settled and not any(w.open for w in workloads))
    if not cluster.is_settled:
        raise Violation(f"liveness: shards are not whole after healing: {cluster.map().public()}")
    epochs = cluster.map().last_epoch
    world.run_until(world.now_ns + STABLE_NS // shape.haste)
    if cluster.map().last_epoch != epochs:
        raise Violation("liveness: epochs change although nothing fails")
    _check(cluster, workloads, history)
    acknowledged = sum(c.outcome == "ok" and c.kind != "get" for c in history)
    return Result(
        world.seed, world.digest, world.events, len(history), acknowledged, len(cluster.active),
        cluster.shared, cluster.store.has_forgotten,
    )  # fmt: skip


def _check(cluster: Cluster, workloads: list[Workload], history: list[Call]) -> None:
    still_open = sum(w.open for w in workloads)
    if still_open:
        raise Violation(f"liveness: {still_open} calls have no outcome")
    entries, everywhere = cluster.entries(), []
    for shard in cluster.map().shards.values():
        replica = cluster.replica(shard.primary, shard.id)
        if replica is None or replica.status is not Status.ACTIVE:
            raise Violation(f"liveness: shard {shard.id} is not served after healing")
        rows = cluster.log(shard.id, replica.tail.base, entries)
        log = checkers.read_log(rows)
        own = [call for call in history if cluster.shard_of(call.key) == shard.id]
        checkers.check_range(log, shard)
        checkers.check_durability(log, own)
        checkers.check_linearizable(log, own)
        checkers.check_expired(log, cluster.world.now_ns // MILLISECOND_NS)
        for member in shard.members:
            _check_member(cluster, member.node, shard.id, rows, log)
        everywhere += log
    checkers.check_exactly_once(everywhere)


def _check_member(
    cluster: Cluster, node: str, shard: str, rows: list[EntryRow], log: list[Logged]
) -> None:
    """Log, state and memory of one member against the primary's log."""
    disk, copy = cluster.peers[node].disk, cluster.replica(node, shard)
    assert disk is not None
    assert copy is not None
    checkers.check_same(rows, disk.entries.get(shard, []), copy)
    committed = [op for op in log if op.version[1] <= copy.commit_seq]
    state = disk.state.shard(shard)
    checkers.check_state(committed, state, copy.whole_seq)
    checkers.check_table(committed, copy.table, state)
