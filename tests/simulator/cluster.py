"""A simulated cluster: coordinators, nodes and clients, and what is true of them."""

from __future__ import annotations

import json
from bisect import bisect_right
from typing import TYPE_CHECKING, Any

import cbor2

from bus_kv.client.session import Session
from bus_kv.core.machine import CutRow, Publish
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.shard_map import (
    Keyspace,
    Member,
    Node,
    NodeState,
    Shard,
    ShardMap,
    ShardState,
    from_document,
    to_document,
)  # fmt: skip
from bus_kv.subjects import QUEUE, Subjects
from coordinator.machine.coordinator import CoordinatorConfig, CoordinatorMachine
from nodes.machine.node import NodeConfig, NodeMachine
from nodes.machine.replica import Past
from nodes.machine.status import Status
from tests.simulator.bus import MAX_PAYLOAD_BYTES, Bus
from tests.simulator.checkers import check_cache, check_looked_at
from tests.simulator.disk import Disk
from tests.simulator.process import Process
from tests.simulator.store import Store
from tests.simulator.world import MILLISECOND_NS, Violation, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import EntryRow, Ready
    from nodes.machine.replica import Replica
    from tests.simulator.shape import Shape


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
        self._map = ("", ShardMap())
        self.lost_disks: list[Disk] = []
        self.shared = 0
        """Messages and log transactions that served several shards at once."""
        self._tokens = world.random("tokens")

    def _process(self, name: str, has_disk: bool) -> Process:
        disk = Disk(self.world, name) if has_disk else None
        return Process(
            self.world, self.bus, self.store, name, self.peers,
            self.shape.knobs.inbox_messages_max, disk,
        )  # fmt: skip

    def start(self) -> None:
        if self.shape.bounds is not None:
            self.store.begin("map", to_document(self._first_map()))
        for process in self.coordinators:
            self.start_coordinator(process)
        for process in self.nodes:
            self.start_node(process)

    def _first_map(self) -> ShardMap:
        """As many shards as the shape says, RECOVERING, so that a coordinator opens them."""
        random, bounds = self.world.random("layout"), self.shape.bounds or ()
        factor = self.shape.knobs.replication_factor
        owners = [Member(node.name, node.disk.incarnation) for node in self.nodes if node.disk]
        shards: dict[str, Shard] = {}
        for i, (start, end) in enumerate(zip((b"", *bounds), (*bounds, None), strict=True), 1):
            members = tuple(random.sample(owners, min(factor, len(owners))))
            shards[f"s{i}"] = Shard(
                f"s{i}", "default", start, end, i, f"first{i}", members, members[0].node,
                ShardState.RECOVERING,
            )  # fmt: skip
        nodes = {m.node: Node(m.node, m.incarnation, NodeState.UP) for m in owners}
        keyspaces = {"default": Keyspace(replication_factor=factor)}
        return ShardMap(1, len(shards), "", keyspaces, shards, nodes)

    def start_coordinator(self, process: Process) -> None:
        config = CoordinatorConfig(
            process.name, self.subjects, lambda: f"{self._tokens.getrandbits(64):016x}"
        )
        machine = CoordinatorMachine(config, self.shape.knobs)
        process.begin(machine)
        self.bus.subscribe(process, "heartbeat", self.subjects.any_heartbeat)
        self.bus.subscribe(process, "admin", self.subjects.any_admin)
        self.bus.subscribe(process, "suspect", self.subjects.any_suspect)
        self.bus.subscribe(process, "failover", self.subjects.any_failover)
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
        process.after_turn = lambda ready: self.look(process, ready)
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

    # ---- what is true ----

    def look(self, process: Process, ready: Ready) -> None:
        """After a node's turn: at most one primary per epoch (R7), and what is committed stays (R3)."""
        assert isinstance(process.machine, NodeMachine)
        self._see_batched(process, ready)
        rows = ready.append.entries if ready.append else ()
        cuts = [row for row in rows if isinstance(row, CutRow)]
        # A learner that takes a snapshot throws its whole log away.
        replaced = {cut.shard for cut in cuts if not cut.keep}
        for cut in cuts:
            if cut.shard not in replaced:
                self._see_cut(process, cut)
        for replica in process.machine.replicas.values():
            check_looked_at(process.machine, replica)
            check_cache(replica.table)
            self._see_committed(process, replica)
            if replica.status is Status.ACTIVE:
                self._see_active(process, replica)

    def _see_batched(self, process: Process, ready: Ready) -> None:
        """What several shards have to tell one node in a turn travels in one message, and is one transaction."""
        told: set[str] = set()
        for effect in ready.effects:
            if isinstance(effect, Publish) and effect.subject.endswith(".inbox"):
                if effect.subject in told:
                    raise Violation(f"{process.name} tells {effect.subject} twice in a turn")
                told.add(effect.subject)
                self.shared += _is_about_several(effect.body)
        if ready.append is not None:
            self.shared += len({row.shard for row in ready.append.entries}) > 1

    def _see_cut(self, process: Process, cut: CutRow) -> None:
        """What is committed anywhere is cut nowhere (R2)."""
        assert process.disk is not None
        for row in process.disk.entries.get(cut.shard, ()):
            if row.last > cut.last and self.committed.get((cut.shard, row.last)) == row.epoch:
                raise Violation(f"R2: {process.name} cuts {(row.epoch, row.last)}: it is committed")

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
        body = message.body
        if not message.subject.startswith("_INBOX.") or not (
            b"sealed" in body or b"opened" in body
        ):
            return
        if body[:1] == b"{":
            return
        fields = cbor2.loads(message.body)
        for told in fields["items"] if fields.get("type") == "seals" else [fields]:
            if told.get("type") in ("sealed", "opened"):
                self._check_told(process, told)

    def _check_told(self, process: Process, fields: dict[str, Any]) -> None:
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
        shards = self.map().shards.values()
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
        return sum(disk.ends.get((shard, epoch), 0) >= seq for disk in self.disks)

    def shard_of(self, key: bytes) -> str:
        """Which shard a key belongs to, by the layout that the cluster began with."""
        return f"s{bisect_right(self.shape.bounds or (), key) + 1}"

    @property
    def disks(self) -> list[Disk]:
        """Also those that were lost."""
        return [node.disk for node in self.nodes if node.disk is not None] + self.lost_disks

    def entries(self) -> dict[tuple[str, int, int], EntryRow]:
        """Every entry that ever was on a disk, by shard, epoch and last seq."""
        known: dict[tuple[str, int, int], EntryRow] = {}
        for disk in self.disks:
            for name, row in disk.ever.items():
                if known.setdefault(name, row) != row:
                    raise Violation(f"R2: there are two entries {name}")
        return known

    def log(
        self, shard: str, end: tuple[int, int],
        entries: dict[tuple[str, int, int], EntryRow] | None = None,
    ) -> list[EntryRow]:  # fmt: skip
        """The entries up to `end`, one following the other, wherever they are or were."""
        entries = self.entries() if entries is None else entries
        rows: list[EntryRow] = []
        while end != (0, 0):
            rows.append(entries[shard, *end])
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
        text = self.store.text("map")
        if self._map[0] != text:
            self._map = (text, from_document(json.loads(text)))
        return self._map[1]


def _is_about_several(body: bytes) -> bool:
    """Whether what a node is told is about several shards."""
    if body.count(b"shard") < 2:
        return False
    return len({item["shard"] for item in cbor2.loads(body).get("items", ())}) > 1
