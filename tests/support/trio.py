"""Some replicas of one shard without a bus: the test does every message, fsync and crash by hand, in its order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import CutRow, CutsRead, EntryRow, ReplicaRow
from bus_kv.knobs import Knobs
from bus_kv.protocol import batch as b
from bus_kv.protocol.batch import Batch
from bus_kv.protocol.shard_map import Configuration, Member, Shard, ShardState
from bus_kv.protocol.sizes import Sizes
from nodes.machine.control import _answer_fetch
from nodes.machine.cuts import note
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
    cuts: list[tuple[int, EntryRow]] = field(default_factory=list)
    """(place, entry) of what was cut from the log and not told yet."""
    asked: list[tuple[Any, Any]] = field(default_factory=list)
    """Queries to the disk, and who waits for the answer."""
    events: list[dict[str, Any]] = field(default_factory=list)
    """What was announced on the bus."""


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
        asked: list[Any] = []
        events: list[Any] = []
        ports = Ports(
            lambda query, then: asked.append((query, then)), lambda: self.now_ns,
            lambda to, fields: tells.append((to, fields)),
            lambda to, fields, then: calls.append((to, fields, then)), announce=events.append,
        )  # fmt: skip
        replica = Replica(self.shard, name, "i", self.knobs, Sizes(1 << 20), Past(), ports)
        return Node(name, replica, tells=tells, calls=calls, asked=asked, events=events)

    def __getitem__(self, name: str) -> Replica:
        """As in the next turn."""
        replica = self.nodes[name].replica
        replica.settle()
        return replica

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
        node.replica.make_due()

    def fsync(self, name: str) -> None:
        """All that was handed to the log, and what is decided now, becomes durable."""
        self.turn(name)
        node = self.nodes[name]
        pending, node.pending[:] = [*node.pending], []
        for rows, row in pending:
            for entry in rows:
                if isinstance(entry, CutRow):
                    gone = [row for row in node.log if row.last > entry.last and entry.keep]
                    node.cuts += enumerate(gone, node.cuts[-1][0] + 1 if node.cuts else 1)
                    node.log = [kept for kept in node.log if kept.last <= entry.last]
                else:
                    node.log.append(entry)
            node.row = row or node.row
            node.replica.on_durable()

    def restart(self, name: str) -> None:
        """The process dies, and comes back with what was durable."""
        old = self.nodes[name]
        node = self._node(name)
        node.log, node.row, node.cuts = old.log, old.row, old.cuts
        if node.cuts:
            node.replica.cuts.found()
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
        fetches = [call for call in node.calls if call[1]["type"] == "fetch"]
        while fetches:
            node.calls.remove(fetches[0])
            to, fields, then = fetches[0]
            source, after = self.nodes[to], fields["after"]
            have = [
                (e.epoch, e.last) for e in source.log
                if e.last <= after[1] and e.epoch <= after[0]
            ]  # fmt: skip
            rows = [entry for entry in source.log if not have or entry.last > after[1]]
            answer = [have[-1] if have else None, rows]
            _answer_fetch(source.replica, source.replica.promised, after, then, answer, None)
            fetches = [call for call in node.calls if call[1]["type"] == "fetch"]

    def read_cuts(self, name: str) -> None:
        """At the end of a turn: the disk answers who asks for what was cut, having forgotten what was told."""
        node = self.nodes[name]
        node.replica.cuts.tell_if_due()
        for query, then in [item for item in node.asked if isinstance(item[0], CutsRead)]:
            node.asked.remove((query, then))
            node.cuts = [item for item in node.cuts if item[0] > query.told]
            then([*node.cuts], None)

    def tell_cuts(self, name: str) -> list[dict[str, Any]]:
        """What a replica tells of its cuts reaches the primary. Returns the answers, which come when it is settled."""
        node, answers = self.nodes[name], list[dict[str, Any]]()
        for to, fields, then in [c for c in node.calls if c[1]["type"] == "rolled_back"]:
            node.calls.remove((to, fields, then))

            def reply(answer: dict[str, Any], then: Any = then) -> None:
                answers.append(answer)
                then(answer)

            note(self[to], fields["entries"], reply)
        return answers

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

    def get_anywhere(self, name: str, key: bytes) -> list[Any]:
        """A get at ONE from any replica."""
        return self._submit(name, Batch(bytes([b.GET]), [key], consistency="one"), is_for_any=True)

    def _submit(
        self, primary: str, batch: Batch, is_for_any: bool = False
    ) -> list[BatchReply | BusKVError]:
        answers: list[BatchReply | BusKVError] = []
        replica = self[primary]
        epoch = None if is_for_any else replica.shard.epoch
        replica.writer.submit(batch, batch.encode(), epoch, LATE_NS, answers.append)
        return answers

    def logs(self) -> dict[str, list[tuple[int, int]]]:
        return {name: [(e.epoch, e.last) for e in node.log] for name, node in self.nodes.items()}
