"""Some replicas of one shard without a bus: the test does every message, fsync and crash by hand, in its order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import CutRow, EntryRow, ReplicaRow
from bus_kv.knobs import Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.shard_map import Configuration, Member, Shard, ShardState
from bus_kv.protocol.sizes import Sizes
from nodes.machine.control import _answer_fetch
from nodes.machine.replica import Past, Ports, Replica

if TYPE_CHECKING:
    from bus_kv.errors import BusKVError
    from bus_kv.protocol.batch import BatchReply

SECOND_NS = 1_000_000_000
LATE_NS = 2**60


@dataclass
class Node:
    """One replica with its disk: `pending` is on its way to it."""

    name: str
    replica: Replica
    log: list[EntryRow] = field(default_factory=list)
    row: ReplicaRow | None = None
    pending: list[tuple[list[Any], ReplicaRow | None]] = field(default_factory=list)
    tells: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    calls: list[tuple[str, dict[str, Any], Any]] = field(default_factory=list)


class Trio:
    """Replicas n1 … of shard s1, made with their shard; n1 has opened epoch 1 and is ACTIVE when `serve` was called."""

    def __init__(self, count: int = 3) -> None:
        self.now_ns = SECOND_NS
        self.knobs = Knobs(fold_interval_ms=10**9)
        self.members = tuple(Member(f"n{i + 1}", "i") for i in range(count))
        self.shard = Shard(
            "s1", "default", b"", None, 1, "t1", self.members, "n1", ShardState.RECOVERING
        )
        self.nodes = {m.node: self._node(m.node) for m in self.members}
        for node in self.nodes.values():
            node.replica.promise(1, "t1")
            self.fsync(node.name)
        self.answers: list[Any] = []

    def _node(self, name: str) -> Node:
        tells: list[Any] = []
        calls: list[Any] = []
        ports = Ports(
            lambda _query, _then: None, lambda: self.now_ns,
            lambda to, fields: tells.append((to, fields)),
            lambda to, fields, then: calls.append((to, fields, then)),
        )  # fmt: skip
        replica = Replica(self.shard, name, "i", self.knobs, Sizes(1 << 20), Past(), ports)
        return Node(name, replica, tells=tells, calls=calls)

    def __getitem__(self, name: str) -> Replica:
        return self.nodes[name].replica

    # ---- configurations ----

    def record(self, primary: str, *members: str, epoch: int, base: Shard | None = None) -> Shard:
        """The record of a later attempt over what was ACTIVE."""
        base = base or self.shard
        last = Configuration(base.epoch, base.token, base.members)
        chosen = tuple(Member(name, "i") for name in members)
        return replace(
            base, epoch=epoch, token=f"t{epoch}", primary=primary, members=chosen,
            state=ShardState.RECOVERING, last_active=last,
        )  # fmt: skip

    def open(self, shard: Shard) -> None:
        self[shard.primary].open(shard, 0)

    def activate(self, shard: Shard) -> None:
        """The map says ACTIVE."""
        self.shard = replace(shard, state=ShardState.ACTIVE, last_active=None)
        self[shard.primary].activate(self.shard)

    def serve(self) -> None:
        """n1 opens epoch 1 with everybody, and is ACTIVE."""
        self.open(self.shard)
        self.settle()
        self.activate(self.shard)
        self.settle()

    # ---- the disk ----

    def turn(self, name: str) -> None:
        """Hand what was decided to the log; it is durable at `fsync`."""
        node = self.nodes[name]
        rows, row = node.replica.take_rows()
        if rows or row:
            node.pending.append((rows, row))

    def fsync(self, name: str) -> None:
        """All that was handed to the log, and what is decided now, becomes durable."""
        self.turn(name)
        node = self.nodes[name]
        pending, node.pending[:] = [*node.pending], []
        for rows, row in pending:
            for entry in rows:
                if isinstance(entry, CutRow):
                    node.log = [kept for kept in node.log if kept.last <= entry.last]
                else:
                    node.log.append(entry)
            node.row = row or node.row
            node.replica.on_durable()

    def restart(self, name: str) -> None:
        """The process dies, and comes back with what was durable."""
        old = self.nodes[name]
        node = self._node(name)
        node.log, node.row = old.log, old.row
        if node.row is not None:
            node.replica.restore(node.row)
        for entry in node.log:
            node.replica.replay(entry)
        self.nodes[name] = node

    # ---- the bus ----

    def messages(self, primary: str) -> list[dict[str, Any]]:
        """What the primary publishes at the end of this turn."""
        self.turn(primary)
        return self[primary].take_messages()

    def remind(self, primary: str) -> list[dict[str, Any]]:
        self.now_ns += 2 * SECOND_NS
        return self.messages(primary)

    def deliver(self, messages: list[dict[str, Any]], *names: str) -> None:
        for name in names:
            for message in messages:
                self[name].backup.on_append(message)

    def answer(self, name: str) -> None:
        """What a replica has told reaches whom it was told to."""
        node = self.nodes[name]
        tells, node.tells[:] = [*node.tells], []
        for to, fields in tells:
            if to not in self.nodes:
                continue
            if fields["type"] == "matched":
                self[to].on_replica_answer(fields)
            elif fields["type"] == "confirm":
                self[to].backup.on_confirm(fields)

    def fetch(self, name: str) -> None:
        """Every question for another log is answered from that node's disk, until there is none."""
        node = self.nodes[name]
        while node.calls:
            to, fields, then = node.calls.pop(0)
            source, after = self.nodes[to], fields["after"]
            have = [
                (e.epoch, e.last) for e in source.log
                if e.last <= after[1] and e.epoch <= after[0]
            ]  # fmt: skip
            rows = [entry for entry in source.log if not have or entry.last > after[1]]
            answer = [have[-1] if have else None, rows]
            _answer_fetch(source.replica, source.replica.promised, after, then, answer, None)

    def settle(self) -> None:
        """Everybody hears everything, and every disk is done."""
        for _ in range(6):
            for node in [*self.nodes.values()]:
                if node.replica.replication is not None:
                    others = [n for n in self.nodes if n != node.name]
                    self.deliver(self.remind(node.name), *others)
            for name in self.nodes:
                self.fetch(name)
                self.fsync(name)
                self.answer(name)

    # ---- the client ----

    def put(
        self, primary: str, key: bytes, value: bytes, level: str = "quorum", **ids: Any
    ) -> list[Any]:
        """Submit a put; the list gets its answer once there is one."""
        batch = Batch(bytes([b.PUT]), [key], [value], consistency=level, **ids)
        return self._submit(primary, batch)

    def get(self, primary: str, key: bytes, level: str = "quorum") -> list[Any]:
        return self._submit(primary, Batch(bytes([b.GET]), [key], consistency=level))

    def _submit(self, primary: str, batch: Batch) -> list[BatchReply | BusKVError]:
        answers: list[BatchReply | BusKVError] = []
        replica = self[primary]
        epoch = replica.shard.epoch
        replica.writer.submit(batch, batch.encode(), epoch, LATE_NS, answers.append)
        return answers

    def logs(self) -> dict[str, list[tuple[int, int]]]:
        return {name: [(e.epoch, e.last) for e in node.log] for name, node in self.nodes.items()}
