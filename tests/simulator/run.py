"""One run: a safety phase under faults, then heal, a liveness phase, and the checkers."""

from __future__ import annotations

from dataclasses import dataclass

from nodes.machine.node import NodeMachine
from nodes.machine.status import Status
from tests.simulator import checkers
from tests.simulator.cluster import Cluster, draw_shape
from tests.simulator.workload import Call, Workload
from tests.simulator.world import SECOND_NS, START_NS, Violation, World

SAFETY_NS = {1: 6 * SECOND_NS, 3: 3 * SECOND_NS, 10: 3 * SECOND_NS // 2}
"""How long faults last, by the haste of the run."""
STABLE_NS = 4 * SECOND_NS
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
    history: list[Call] = []
    cluster.start()
    workloads = [Workload(world, cluster, f"w{i}", 5, history) for i in range(shape.clients)]
    world.run_until(START_NS + SECOND_NS, done=lambda: cluster.is_serving)
    cluster.begin_faults()
    world.run_until(world.now_ns + SAFETY_NS[shape.haste])
    cluster.heal()
    world.run_until(world.now_ns + SECOND_NS // shape.haste)
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
        world.seed, world.digest, world.events, len(history), acknowledged, len(cluster.active)
    )


def world_ms(cluster: Cluster) -> int:
    return cluster.world.now_ns // 1_000_000


def _check(cluster: Cluster, workloads: list[Workload], history: list[Call]) -> None:
    still_open = sum(w.open for w in workloads)
    if still_open:
        raise Violation(f"liveness: {still_open} calls have no outcome")
    for shard in cluster.map().shards.values():
        process = cluster.peers[shard.primary]
        assert process.disk is not None
        assert isinstance(process.machine, NodeMachine)
        replica = process.machine.replicas[shard.id]
        if replica.status is not Status.ACTIVE:
            raise Violation(f"liveness: shard {shard.id} is {replica.status} after healing")
        rows = cluster.log(shard.id, replica.last)
        log = checkers.read_log(rows)
        checkers.check_exactly_once(log)
        checkers.check_durability(log, history)
        checkers.check_linearizable(log, history)
        checkers.check_expired(log, world_ms(cluster))
        for member in shard.members:
            own = cluster.peers[member.node]
            copy = cluster.replica(member.node, shard.id)
            assert copy is not None
            assert own.disk is not None
            checkers.check_same(rows, own.disk.entries[shard.id], copy)
            committed = [op for op in log if op.version[1] <= copy.commit_seq]
            state = own.disk.state.shard(shard.id)
            checkers.check_state(committed, state)
            checkers.check_table(committed, copy.table, state)
