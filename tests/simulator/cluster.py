"""A simulated cluster: coordinators, nodes and clients, and the faults that befall them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cbor2

from bus_kv.client.session import Session
from bus_kv.knobs import Knobs
from bus_kv.protocol.codec import encode_json
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.shard_map import ShardMap, ShardState, from_document
from bus_kv.subjects import QUEUE, Subjects
from coordinator.machine.coordinator import CoordinatorConfig, CoordinatorMachine
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replica import Past
from nodes.machine.status import Status
from tests.simulator.bus import Bus
from tests.simulator.disk import Disk
from tests.simulator.process import Process
from tests.simulator.store import Store
from tests.simulator.world import MILLISECOND_NS, SECOND_NS, Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bus_kv.core.machine import EntryRow, Publish
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.replica import Replica

MAX_PAYLOAD_BYTES = 65_536


KINDS = ("crash", "crash", "pause", "pause", "cut", "store", "full", "operate", "operate", "loss")


@dataclass(frozen=True, slots=True)
class Shape:
    """What one run is made of, drawn from its seed (a swarm: not every fault in every run)."""

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


def draw_shape(world: World) -> Shape:
    random = world.random("shape")
    haste = random.choice([1, 3, 10])
    return Shape(
        nodes=random.choice([1, 2, 3, 3, 3, 4, 5]),
        coordinators=random.randint(1, 3),
        clients=random.randint(1, 3),
        loss=random.choice([0.0, 0.0, 0.01, 0.05, 0.2]),
        slowness=random.choice([0.0, 0.01, 0.05, 0.3]),
        lost_answers=random.choice([0.0, 0.02, 0.2]),
        fault_interval_ns=random.choice([300, 800, 2000]) * MILLISECOND_NS // haste,
        kinds=random.sample(KINDS, random.randint(2, len(KINDS))),
        haste=haste,
        knobs=Knobs(
            step_retry_ms=500 // haste,
            attempt_patience_ms=random.choice([1000, 5000]) // haste,
            remind_ms=random.choice([20, 100]),
            pull_retry_ms=random.choice([30, 500]),
            replication_factor=random.choice([1, 2, 3, 3, 3, 5]),
            heartbeat_interval_s=random.choice([0.2, 0.5, 1.0]) / haste,
            layout_wait_s=0.5,
            lease_s=random.choice([0.3, 1.0]),
            inbox_messages_max=random.choice([8, 1000]),
            tail_operations_max=random.choice([5, 10_000]),
            cache_bytes=random.choice([1, 2000, 2500, 3000, 1_000_000]),
            fold_interval_ms=random.choice([1, 50, 2000]),
            fold_bytes=random.choice([1, 1000, 100_000]),
            unfolded_bytes_max=random.choice([2000, 1_000_000]),
            log_keep_bytes=random.choice([0, 200, 1000, 1_000_000]),
            log_bytes_max=random.choice([0, 1000, 1_000_000]),
            snapshot_retry_ms=500 // haste,
            dedup_runs_max=random.choice([0, 3, 1000]),
            client_window_messages=random.choice([1, 4]),
            answer_within_ms=random.choice([300, 1500]) // haste,
            store_timeout_ms=2000 // haste,
            client_attempt_ms=2000 // haste,
            suspect_after_ms=250 // haste,
            client_fill_operations=random.choice([1, 3]),
            turn_operations_max=random.choice([1, 4, 100]),
            client_batch_operations_max=random.choice([2, 100]),
            client_timeout_s=random.choice([1.2, 4.0, 20.0]),
        ),
    )


class Cluster:
    def __init__(self, world: World, shape: Shape) -> None:
        self.world, self.shape = world, shape
        self.bus, self.store = Bus(world, shape.haste), Store(world, shape.haste)
        self.subjects = Subjects("sim")
        self.peers: dict[str, Process] = {}
        self.nodes = [self._process(f"n{i + 1}", True) for i in range(shape.nodes)]
        self.coordinators = [self._process(f"c{i + 1}", False) for i in range(shape.coordinators)]
        self.active: dict[tuple[str, int], tuple[str, int]] = {}
        """(shard, epoch) -> (node, life) that was seen serving it."""
        self.committed: dict[tuple[str, int], int] = {}
        """(shard, seq) of the end of a committed entry -> its epoch."""
        self._map = (0, ShardMap())
        self.lost: set[str] = set()
        """Incarnations of disks that are gone."""
        self.lost_disks: list[Disk] = []
        self._random = world.random("faults")
        self._tokens = world.random("tokens")

    def _process(self, name: str, has_disk: bool) -> Process:
        disk = Disk(self.world, name) if has_disk else None
        return Process(
            self.world, self.bus, self.store, name, self.peers,
            self.shape.knobs.inbox_messages_max, disk,
        )  # fmt: skip

    def start(self) -> None:
        for process in self.coordinators:
            self.start_coordinator(process)
        for process in self.nodes:
            self.start_node(process)

    def start_coordinator(self, process: Process) -> None:
        config = CoordinatorConfig(
            process.name, self.subjects, lambda: f"{self._tokens.getrandbits(64):016x}"
        )
        machine = CoordinatorMachine(config, self.shape.knobs)
        process.begin(machine)
        self.bus.subscribe(process, "heartbeat", self.subjects.any_heartbeat)
        self.bus.subscribe(process, "admin", self.subjects.any_admin)
        machine.start(process.now_ns)

    def start_node(self, process: Process) -> None:
        disk = process.disk
        assert disk is not None
        run = (self.world.now_ns // MILLISECOND_NS, f"{process.name}{process.life:04d}")
        config = NodeConfig(process.name, disk.incarnation, run, self.subjects, MAX_PAYLOAD_BYTES)
        machine = NodeMachine(config, self.shape.knobs)
        if disk.map is not None:
            machine.restore_map(disk.map)
        for row in disk.replicas.values():
            state = disk.state.shard(row.shard)
            replica = machine.restore(row, Past(state.mark, [*state.clients.items()]))
            for entry in disk.entries.get(row.shard, []):
                if entry.last > state.mark.last:
                    replica.replay(entry)
            if disk.cuts.get(row.shard):
                replica.cuts.found()
        process.begin(machine)
        process.tap = lambda message: self._check_leaving(process, message)
        process.refuse = machine.door.overloaded
        process.after_turn = lambda: self.look(process)
        life = process.life
        disk.open(lambda event: process.receive(life, event))
        process.subjects = {
            "verb": (lambda _: self.subjects.any_verb, QUEUE),
            "shard": (self.subjects.shard_request, ""),
            "read": (self.subjects.shard_read, QUEUE),
            "replicate": (self.subjects.shard_replicate, ""),
        }
        self.bus.subscribe(process, "node", self.subjects.node_inbox(process.name))
        self.bus.subscribe(process, "heartbeat", self.subjects.any_heartbeat)
        self.bus.subscribe(process, "map", self.subjects.map_event)
        machine.start(process.now_ns)

    def start_client(self, name: str, done: Callable[[Any, Any], None]) -> Process:
        """A client process; its machine is a Session that tells outcomes to `done`."""
        process = self._process(name, False)
        process.begin(Session(name, self.subjects, self.shape.knobs, MAX_PAYLOAD_BYTES, done))
        self.bus.subscribe(process, "map", self.subjects.map_event)
        return process

    # ---- faults ----

    def begin_faults(self) -> None:
        self.bus.loss, self.bus.slowness = self.shape.loss, self.shape.slowness
        self.store.lost_answers = self.shape.lost_answers
        self._next_fault()

    def _next_fault(self) -> None:
        delay_ns = int(self._random.expovariate(1.0) * self.shape.fault_interval_ns)
        self.world.after(delay_ns, self._fault)

    def _fault(self) -> None:
        if self.healed:
            return
        kinds = {
            "crash": self._crash, "pause": self._pause, "cut": self._cut,
            "store": self._store_down, "full": self._disk_full, "operate": self._operate,
            "loss": self._lose_disk,
        }  # fmt: skip
        # The first node is the one that gets the first shard: faults elsewhere teach less.
        victims = [self.nodes[0]] * 3 + self.nodes + self.coordinators
        kinds[self._random.choice(self.shape.kinds)](self._random.choice(victims))
        self._next_fault()

    def _duration_ns(self, seconds_max: int) -> int:
        return self._random.randint(0, seconds_max * SECOND_NS // self.shape.haste)

    healed = False

    def _crash(self, process: Process) -> None:
        if process.alive:
            process.crash()
            delay_ns = self._duration_ns(3)
            self.world.after(delay_ns, lambda: self._restart(process))

    def _restart(self, process: Process) -> None:
        if process.alive:
            return
        if process in self.nodes:
            self.start_node(process)
        else:
            self.start_coordinator(process)

    def _pause(self, process: Process) -> None:
        process.pause(self._duration_ns(4))

    def _cut(self, process: Process) -> None:
        """Cut a link, both ways or one way; when it comes back the process knows that it was away."""
        process.cut_in, process.cut_out = self._random.choice(
            [(True, True), (True, False), (False, True)]
        )
        self.world.note(process.name, f"is cut: in={process.cut_in} out={process.cut_out}")
        life = process.life
        self.world.after(self._duration_ns(3), lambda: self._mend(process, life))

    def _mend(self, process: Process, life: int) -> None:
        process.cut_in = process.cut_out = False
        if process.alive and process.life == life and isinstance(process.machine, NodeMachine):
            process.machine.reconnected(process.now_ns)
            process.schedule()

    def _store_down(self, process: Process) -> None:
        del process
        self.store.down_until_ns = self.world.now_ns + self._duration_ns(5)

    def _lose_disk(self, process: Process) -> None:
        """A disk is lost for good, with its incarnation; not more of them than a shard can bear."""
        if process.disk is None or not all(
            self._can_lose(shard, process.disk.incarnation) for shard in self.map().shards.values()
        ):
            return
        if process.alive:
            process.crash()
        self.world.note(process.name, "loses its disk")
        self.lost.add(process.disk.incarnation)
        self.lost_disks.append(process.disk)
        process.disk = Disk(self.world, f"{process.name}/{len(self.lost)}")
        delay_ns = self._duration_ns(3)
        self.world.after(delay_ns, lambda: self._restart(process))

    def _can_lose(self, shard: Shard, incarnation: str) -> bool:
        """Whether what a majority has is still there without this disk, also if an attempt becomes active right now."""
        lost = self.lost | {incarnation}
        for members in (shard.members, shard.last_active.members if shard.last_active else ()):
            if members and sum(m.incarnation in lost for m in members) > len(members) // 2:
                return False
        return True

    def _operate(self, process: Process) -> None:
        """An operator has a primary replaced or moved, or changes the replication factor."""
        node = self._random.choice(self.nodes).name
        orders: list[tuple[str, dict[str, Any]]] = [
            ("failover", {"shard": "s1"}),
            ("transfer", {"shard": "s1", "to": node}),
            ("config", {"replication_factor": self._random.choice([1, 2, 3, 3, 5])}),
        ]
        verb, fields = self._random.choice(orders)
        self.world.note("operator", f"{verb} {fields}")
        subject = f"{self.subjects.root}.admin.{verb}"
        self.bus.publish(process, subject, encode_json(fields), f"_INBOX.{process.name}.0.0")

    def _disk_full(self, process: Process) -> None:
        if process.disk is not None:
            duration_ns = self._duration_ns(3)
            process.disk.full_until_ns = self.world.now_ns + duration_ns

    def heal(self) -> None:
        """End all faults: what follows is the liveness phase."""
        self.healed = True
        self.bus.loss = self.bus.slowness = self.store.lost_answers = 0.0
        self.store.down_until_ns = 0
        for process in self.nodes + self.coordinators:
            self._mend(process, process.life)
            if process.disk is not None:
                process.disk.full_until_ns = 0
            process.paused_until_ns = min(process.paused_until_ns, self.world.now_ns)
            self._restart(process)

    # ---- what is true ----

    def look(self, process: Process) -> None:
        """After a node's turn: at most one primary per epoch (R7), and what is committed stays (R3)."""
        assert isinstance(process.machine, NodeMachine)
        for replica in process.machine.replicas.values():
            self._see_committed(process, replica)
            if replica.status is Status.ACTIVE:
                self._see_active(process, replica)

    def _see_committed(self, process: Process, replica: Replica) -> None:
        """What is committed is the same everywhere, and for ever (R3)."""
        epoch, seq = replica.tail.base
        known = self.committed.setdefault((replica.shard.id, seq), epoch)
        if known != epoch:
            raise Violation(
                f"R3: {process.name} has committed seq {seq} of epoch {epoch}, another had {known}"
            )

    def _check_leaving(self, process: Process, message: Publish) -> None:
        """A promise or an opening is told only when it is on disk (R1, step 3)."""
        if not message.subject.startswith("_INBOX.") or message.body[:1] == b"{":
            return
        fields = cbor2.loads(message.body)
        if fields.get("type") not in ("sealed", "opened"):
            return
        assert process.disk is not None
        row = process.disk.replicas.get(fields["shard"])
        told = (fields["epoch"], fields["token"])
        on_disk = (row.promised_epoch, row.promised_token) if row else (0, "")
        if on_disk != told and on_disk[0] <= told[0]:
            raise Violation(f"R1: {process.name} told {fields['type']} {told}, on disk is {row}")

    def _see_active(self, process: Process, replica: Replica) -> None:
        shard, epoch = replica.shard.id, replica.shard.epoch
        if (shard, *replica.promised) not in self.store.active:
            raise Violation(
                f"step 4: {process.name} serves {replica.promised}, never ACTIVE in the map"
            )
        who = (process.name, process.life)
        if self.active.setdefault((shard, epoch), who) != who:
            raise Violation(f"R7: epoch {epoch} of {shard} served by {who} and another")

    @property
    def is_serving(self) -> bool:
        """Every shard of the map has its primary ACTIVE."""
        shards = self.map().shards.values() if self.store.revision("map") else ()
        return bool(shards) and all(map(self._serves, shards))

    @property
    def is_settled(self) -> bool:
        """Every shard has all the members it should have, and all of them have all that is committed; no operator has
        asked for anything else."""
        machines = [coordinator.machine for coordinator in self.coordinators]
        if any(isinstance(m, CoordinatorMachine) and m.has_orders for m in machines):
            return False
        return self.is_serving and all(map(self._is_settled, self.map().shards.values()))

    def _is_settled(self, shard: Shard) -> bool:
        map = self.map()
        wanted = min(map.keyspaces[shard.keyspace].replication_factor, len(map.nodes))
        replicas = [self.replica(member.node, shard.id) for member in shard.members]
        ends = {(r.last, r.commit_seq) if r else None for r in replicas}
        return len(shard.members) == wanted and not shard.learners and len(ends) == 1

    def replica(self, node: str, shard: str) -> Replica | None:
        machine = self.peers[node].machine
        assert isinstance(machine, NodeMachine)
        return machine.replicas.get(shard)

    def holders(self, shard: str, version: tuple[int, int]) -> int:
        """On how many disks an operation is durable."""
        epoch, seq = version
        return sum(
            any(id == shard and e == epoch and last >= seq for id, e, last in disk.ever)
            for disk in self.disks
        )

    @property
    def disks(self) -> list[Disk]:
        """Also those that were lost."""
        return [node.disk for node in self.nodes if node.disk is not None] + self.lost_disks

    def log(self, shard: str, end: tuple[int, int]) -> list[EntryRow]:
        """The entries up to `end`, one following the other, wherever they are or were."""
        known: dict[tuple[str, int, int], EntryRow] = {}
        for disk in self.disks:
            for name, row in disk.ever.items():
                if known.setdefault(name, row) != row:
                    raise Violation(f"R2: there are two entries {name}")
        rows: list[EntryRow] = []
        while end != (0, 0):
            rows.append(known[shard, *end])
            end = decode_entry(rows[-1].body).previous
        rows.reverse()
        return rows

    def _serves(self, shard: Shard) -> bool:
        machine = self.peers[shard.primary].machine
        assert isinstance(machine, NodeMachine)
        replica = machine.serving(shard.id)
        active = shard.state is ShardState.ACTIVE
        return active and replica is not None and replica.shard.epoch == shard.epoch

    def map(self) -> ShardMap:
        revision = self.store.revision("map")
        if self._map[0] != revision:
            document = self.store.document("map")
            assert document is not None
            self._map = (revision, from_document(document))
        return self._map[1]
