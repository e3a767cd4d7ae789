"""The faults that befall a cluster, what operators do meanwhile, and how all of it heals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.protocol.codec import encode_json
from bus_kv.protocol.shard_map import ShardState, from_document
from nodes.machine.node import NodeMachine
from tests.simulator.disk import Disk
from tests.simulator.world import SECOND_NS

if TYPE_CHECKING:
    from bus_kv.protocol.shard_map import Shard, ShardMap
    from tests.simulator.cluster import Cluster
    from tests.simulator.process import Process


class Faults:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._world = cluster, cluster.world
        self._bus, self._store, self._shape = cluster.bus, cluster.store, cluster.shape
        self._random = cluster.world.random("faults")
        self._healed = False
        self._lost: set[str] = set()
        """Incarnations of disks that are gone."""

    def begin(self) -> None:
        self._bus.loss, self._bus.slowness = self._shape.loss, self._shape.slowness
        self._store.lost_answers = self._shape.lost_answers
        self._next()

    def _next(self) -> None:
        delay_ns = int(self._random.expovariate(1.0) * self._shape.fault_interval_ns)
        self._world.after(delay_ns, self._fault)

    def _fault(self) -> None:
        if self._healed:
            return
        kinds = {
            "crash": self.crash, "pause": self._pause, "cut": self._cut,
            "store": self._store_down, "full": self._disk_full, "operate": self._operate,
            "loss": self.lose_disk, "forget": self._forget,
        }  # fmt: skip
        kinds[self._random.choice(self._shape.kinds)](self._victim())
        self._next()

    def _victim(self) -> Process:
        """Mostly a primary: faults elsewhere teach less."""
        cluster = self._cluster
        if self._random.random() < 0.4:
            return self._random.choice(cluster.nodes + cluster.coordinators)
        shards = [*cluster.map().shards.values()]
        return cluster.peers[self._random.choice(shards).primary] if shards else cluster.nodes[0]

    def _duration_ns(self, seconds_max: int) -> int:
        return self._random.randint(0, seconds_max * SECOND_NS // self._shape.haste)

    # ---- processes ----

    def crash(self, process: Process) -> None:
        if process.alive:
            process.crash()
            self._world.after(self._duration_ns(3), lambda: self._restart(process))

    def _restart(self, process: Process) -> None:
        if process.alive:
            return
        if process in self._cluster.nodes:
            self._cluster.start_node(process)
        else:
            self._cluster.start_coordinator(process)

    def _pause(self, process: Process) -> None:
        process.pause(self._duration_ns(4))

    def _cut(self, process: Process) -> None:
        """Cut a link, both ways or one way; when it comes back the process knows that it was away."""
        process.cut_in, process.cut_out = self._random.choice(
            [(True, True), (True, False), (False, True)]
        )
        self._world.note(process.name, f"is cut: in={process.cut_in} out={process.cut_out}")
        life = process.life
        self._world.after(self._duration_ns(3), lambda: self._mend(process, life))

    def _mend(self, process: Process, life: int) -> None:
        process.cut_in = process.cut_out = False
        if process.alive and process.life == life and isinstance(process.machine, NodeMachine):
            process.machine.reconnected(process.now_ns)
            process.schedule()

    # ---- disks ----

    def _disk_full(self, process: Process) -> None:
        if process.disk is not None:
            process.disk.full_until_ns = self._world.now_ns + self._duration_ns(3)

    def lose_disk(self, process: Process) -> None:
        """A disk is lost for good, with its incarnation; not more of them than a shard can bear.

        None once the store has forgotten: what only that disk and the store knew would be gone with it (R10).
        """
        disk = process.disk
        if disk is None or self._store.has_forgotten or not self._can_lose(disk.incarnation):
            return
        if process.alive:
            process.crash()
        self._world.note(process.name, "loses its disk")
        self._lost.add(disk.incarnation)
        self._cluster.lost_disks.append(disk)
        process.disk = self._new_disk(process, disk)
        self._world.after(self._duration_ns(3), lambda: self._restart(process))

    def _new_disk(self, process: Process, lost: Disk) -> Disk:
        """An empty one, with an incarnation of its own."""
        del lost
        return Disk(self._world, f"{process.name}/{len(self._lost)}")

    def _can_lose(self, incarnation: str) -> bool:
        """Whether what a majority has is still there without this disk, also if an attempt becomes active right now."""
        lost = self._lost | {incarnation}
        for shard in self._cluster.map().shards.values():
            last = shard.last_active.members if shard.last_active else ()
            for members in (shard.members, last):
                if members and sum(m.incarnation in lost for m in members) > len(members) // 2:
                    return False
        return True

    # ---- the map's store ----

    def _store_down(self, process: Process) -> None:
        del process
        self._store.down_until_ns = self._world.now_ns + self._duration_ns(5)

    def _forget(self, process: Process) -> None:
        """The store forgets its last revisions, once in a run, and as many as replicas are sure to notice (R10)."""
        del process
        if self._store.has_forgotten:
            return
        count = self._random.randint(1, 8)
        while count and not self._is_noticed(self._store.before("map", count)):
            count -= 1
        if count:
            self._world.note("store", f"forgets {count} changes of the map")
            self._store.forget("map", count)

    def _is_noticed(self, document: dict[str, Any] | None) -> bool:
        if document is None:
            return False
        old: ShardMap = from_document(document)
        shards = self._cluster.map().shards.values()
        return bool(old.shards) and all(_is_noticed(old.shards[s.id], s) for s in shards)

    # ---- operators ----

    def _operate(self, process: Process) -> None:
        """An operator has a primary replaced or moved, or changes the replication factor."""
        node = self._random.choice(self._cluster.nodes).name
        shard = self._random.choice([*self._cluster.map().shards] or ["s1"])
        orders: list[tuple[str, dict[str, Any]]] = [
            ("failover", {"shard": shard}),
            ("transfer", {"shard": shard, "to": node}),
            ("config", {"replication_factor": self._random.choice([1, 2, 3, 3, 5])}),
        ]
        if self._store.has_forgotten:
            orders.append(("restore", {}))
        self._order(process, *self._random.choice(orders))

    def _order(self, process: Process, verb: str, fields: dict[str, Any]) -> None:
        self._world.note("operator", f"{verb} {fields}")
        subject = self._cluster.subjects.admin(verb)
        self._bus.publish(process, subject, encode_json(fields), f"_INBOX.{process.name}.0.0")

    # ---- the end ----

    def heal(self) -> None:
        """End all faults: what follows is the liveness phase."""
        self._healed = True
        cluster = self._cluster
        self._bus.loss = self._bus.slowness = self._store.lost_answers = 0.0
        self._store.down_until_ns = 0
        for process in cluster.nodes + cluster.coordinators:
            self._mend(process, process.life)
            if process.disk is not None:
                process.disk.full_until_ns = 0
            process.resume()
            self._restart(process)
        if self._store.has_forgotten:
            self._restore()

    def _restore(self) -> None:
        """An operator sees that the map was forgotten, and has it restored, until the cluster is whole."""
        if not self._cluster.is_settled:
            self._order(self._cluster.nodes[0], "restore", {})
            self._world.after(2 * SECOND_NS // self._shape.haste, self._restore)


def _is_noticed(old: Shard, now: Shard) -> bool:
    """Whether no takeover can succeed under the old record and miss what was committed since.

    Two seal quorums of an odd number of members have a member in common, and that one has promised what the store has
    forgotten. With an even number they may have none: two members are the worst case.
    """
    if old == now:
        return True
    if old.state is ShardState.ACTIVE:
        return now.epoch > old.epoch and len(old.members) % 2 == 1
    last = old.last_active
    if last is None or old.epoch != now.epoch or now.state is not ShardState.ACTIVE:
        return False
    # That the attempt became active is forgotten: the former members' seal quorum meets every majority of the new ones.
    added = sum(member not in last.members for member in now.members)
    return now.quorum - added >= len(last.members) // 2 + 1
