"""Messages between nodes and from coordinators (DESIGN.md, "Life of a replica")."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.machine import LogRead, Publish
from bus_kv.errors import BusKVError
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.messages import PROBE, position_from_wire, record_from_wire, seal_from_wire
from bus_kv.protocol.shard_map import Member, ShardState, shard_to_document, to_document
from nodes.machine.cuts import note
from nodes.machine.status import LEADING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Received
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica
    from nodes.machine.tail import Position

    Reply: TypeAlias = Callable[[dict[str, Any]], None]


class Control:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node

    def on_message(self, message: Received) -> None:
        try:
            fields = decode_cbor(message.body)
            handle = {
                "hello": self._on_hello,
                "seal": self._on_seal,
                "seals": self._on_seals,
                "open": self._on_open,
                "active": self._on_active,
                "fetch": self._on_fetch,
                "rolled_back": self._on_rolled_back,
                "snapshot": self._node.snapshots.on_question,
                "told": self._on_told,
                "remembered": self._on_remembered,
                "sql": self._on_sql,
                "beat": self._on_beat,
            }[fields["type"]]
            handle(fields, partial(self._reply_control, message))
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._reply_control(
                message, {"type": "refused", "reason": f"not understood: {error!r}"}
            )

    def _reply_control(self, message: Received, fields: dict[str, Any]) -> None:
        self._node.reply(message, encode_cbor({"node": self._node.config.id, **fields}))

    def _on_beat(self, fields: dict[str, Any], reply: Reply) -> None:
        """A coordinator cannot wait for the next heartbeat."""
        del fields
        if self._node.is_running:
            reply({"type": "beat", **self._node.heartbeat().to_wire()})

    def express(self, message: Received) -> Publish | None:
        """The answer to a probe, before everything that waits for its turn: who is busy is not gone."""
        if message.body != PROBE or not message.reply or not self._node.is_running:
            return None
        beat = {"type": "beat", **self._node.heartbeat().to_wire()}
        return Publish(message.reply, encode_cbor(beat))

    def _on_hello(self, fields: dict[str, Any], reply: Reply) -> None:
        if tuple(fields["run"]) != self._node.config.run:
            reply({"type": "here", "run": self._node.config.run})

    def _on_seals(self, fields: dict[str, Any], reply: Reply) -> None:
        """Several of them, answered together in their order once all are durable."""
        items = [*fields["items"]]
        answers: list[dict[str, Any]] = [{} for _ in items]
        for answer, item in zip(answers, items, strict=True):
            self._on_seal(item, answer.update)
        self._node.when_durable(lambda: reply({"type": "seals", "items": answers}))

    def _on_seal(self, fields: dict[str, Any], reply: Reply) -> None:
        """Step 2: promise, durably, and report how far the log goes: all that was or will be acknowledged (R1)."""
        seal = seal_from_wire(fields)
        node = self._node
        replica = node.replicas.get(seal.record.id)
        attempt = (seal.record.epoch, seal.record.token)
        if seal.incarnation != node.config.incarnation or replica is None:
            return reply({"type": "refused", "reason": "this replica is not here"})
        if attempt == replica.promised and attempt[0] == replica.opened_epoch:
            return None  # a late repeat: this attempt has gone on to its opening
        if attempt != replica.promised and attempt[0] <= replica.promised[0]:
            return reply(_promised_more(replica))
        forgotten = self._forgotten_by(seal.record, replica)
        if forgotten is not None:
            return reply(forgotten)
        if attempt != replica.promised:
            replica.promise(*attempt)
        report = {
            "type": "sealed", "shard": replica.shard.id, "epoch": attempt[0], "token": attempt[1], "last": replica.last,
            "commit_seq": replica.commit_seq,
        }  # fmt: skip
        return node.when_durable(lambda: reply(report))

    def _forgotten_by(self, record: Shard, replica: Replica) -> dict[str, Any] | None:
        """A refusal when the map that asks has forgotten something that this node remembers (R10)."""
        last = record.last_active
        known = self._node.map.shards.get(record.id)
        active_epoch = max(
            record.epoch if record and record.state is ShardState.ACTIVE else 0
            for record in (known, replica.shard)
        )
        if last is None:
            return None
        tokens = {token for _, token in (*record.attempts, (0, last.token), (0, record.token))}
        older = replica.promised[0] < last.epoch
        if (older or replica.promised[1] in tokens) and active_epoch <= last.epoch:
            return None
        return {
            "type": "refused", "reason": "the map has forgotten what this replica knows",
            "forgotten": shard_to_document(known or replica.shard),
        }  # fmt: skip

    def _on_open(self, fields: dict[str, Any], reply: Reply) -> None:
        """Step 3: take over the longest of the sealed logs, then begin the epoch as its primary."""
        shard, node = record_from_wire(fields), self._node
        member = shard.member(node.config.id)
        if member is None or member.incarnation != node.config.incarnation:
            return reply({"type": "refused", "reason": "this replica is not here"})
        replica = node.replicas.get(shard.id)
        if replica is None and shard.last_active is not None:
            return reply({"type": "refused", "reason": "the shard has a past that is not here"})
        replica = replica or node.new_replica(shard)
        attempt = (shard.epoch, shard.token)
        if attempt == replica.promised and replica.status in LEADING:
            return reply(_opened(shard)) if replica.is_opened else None
        if shard.epoch <= replica.opened_epoch:
            return reply(_promised_more(replica))
        if attempt != replica.promised and shard.epoch <= replica.promised[0]:
            return reply(_promised_more(replica))
        if attempt != replica.promised:
            replica.promise(*attempt)
        return self._take_over(replica, shard, fields, reply)

    def _take_over(
        self, replica: Replica, shard: Shard, fields: dict[str, Any], reply: Reply
    ) -> None:
        def begin() -> None:
            if replica.promised == (shard.epoch, shard.token) and not replica.replication:
                replica.open(shard, self._node.now_ns // 1_000_000, opened)

        def failed() -> None:
            reason = "the longest log begins behind the end of this one"
            reply({"type": "refused", "reason": reason, "unreached": [shard.epoch, shard.token]})

        def opened() -> None:
            reply(_opened(shard))
            self._node.beat()
            known = self._node.map.shards.get(shard.id)
            if known is not None:
                self._node.follow(known)

        best = position_from_wire(fields["best"])
        if replica.last >= best:
            return begin()
        return replica.pull.start(Member(*fields["source"]), best, begin, failed)

    def _on_fetch(self, fields: dict[str, Any], reply: Reply) -> None:
        """Another replica asks for the log behind a place that it has (`Pull`)."""
        replica = self._node.replicas.get(fields["shard"])
        attempt = (fields["epoch"], fields["token"])
        here = fields["incarnation"] == self._node.config.incarnation
        if replica is None or not here or replica.promised != attempt:
            return reply({"type": "refused", "reason": "this replica is not in that epoch"})
        after = position_from_wire(fields["after"])
        replica.note_fetch()
        read = LogRead(0, replica.shard.id, after, self._node.sizes.entry)
        return self._node.ask(read, partial(_answer_fetch, replica, attempt, after, reply))

    def _on_rolled_back(self, fields: dict[str, Any], reply: Reply) -> None:
        """A replica of the own epoch tells what was cut from its log."""
        replica = self._node.replicas.get(fields["shard"])
        attempt = (fields["epoch"], fields["token"])
        if replica is None or replica.promised != attempt or not replica.is_active:
            return reply({"type": "refused", "reason": "this replica is not the primary"})
        return note(replica, fields["entries"], reply)

    def on_answer(self, then: Callable[[dict[str, Any]], None], body: bytes | None) -> None:
        """The answer to a question of one of the replicas."""
        try:
            if body is not None:
                then(decode_cbor(body))
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            return  # what is not understood is as good as lost: it is asked again

    def on_replicate(self, message: Received) -> None:
        """A primary's entries, commit_seq and confirm round, for all its replicas at once."""
        replica = self._node.replicas.get(message.name)
        try:
            if replica is not None:
                replica.backup.on_append(decode_cbor(message.body))
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            return  # as good as lost: the primary will remind

    def _on_told(self, fields: dict[str, Any], reply: Reply) -> None:
        """What replicas tell one another, of all their shards at once."""
        del reply
        replicas = self._node.replicas
        for item in fields["items"]:
            shard, is_news = item["shard"], True
            replica = replicas.glance(shard)
            if replica is None:
                continue
            try:
                is_news = self._hear(replica, item)
            finally:
                if is_news:
                    replicas.look_at(shard)

    def _hear(self, replica: Replica, item: dict[str, Any]) -> bool:
        """What another replica tells this one; whether the turn has to look at it for that."""
        if item["type"] == "matched":
            return replica.on_replica_answer(item)
        if item["type"] == "confirm":
            return replica.backup.on_confirm(item)
        if item["type"] == "here":
            if replica.replication is not None:
                replica.replication.remind()
            return True
        self._node.fetch_map()  # a replica has promised more: a newer epoch has begun
        return False

    def _on_remembered(self, fields: dict[str, Any], reply: Reply) -> None:
        """The newest map that this node has seen (R10)."""
        del fields
        records = [shard_to_document(r.shard) for r in self._node.replicas.values()]
        reply({"map": to_document(self._node.map), "records": records})

    def _on_sql(self, fields: dict[str, Any], reply: Reply) -> None:
        """A query over the shards that this node serves, for another node's gateway."""
        shards, query = fields["shards"], fields["query"]
        if type(shards) is not list or {*map(type, shards), type(query)} != {str}:
            raise TypeError("shards and query are text")
        self._node.sql.answer_for(
            shards, query, lambda part: reply(part if isinstance(part, dict) else part.to_body())
        )

    def _on_active(self, fields: dict[str, Any], reply: Reply) -> None:
        """Step 4, told directly: the record is ACTIVE."""
        del reply
        shard = record_from_wire(fields)
        if shard.id in self._node.replicas:
            self._node.follow(shard)
        self._node.fetch_map()


def _opened(shard: Shard) -> dict[str, Any]:
    return {"type": "opened", "shard": shard.id, "epoch": shard.epoch, "token": shard.token}


def _promised_more(replica: Replica) -> dict[str, Any]:
    return {"type": "refused", "reason": "promised more", "promised": replica.promised}


def _answer_fetch(
    replica: Replica, attempt: tuple[int, str], after: Position, reply: Reply, rows: list[Any],
    failure: str | None,
) -> None:  # fmt: skip
    if failure is None and replica.promised != attempt:
        failure = "another epoch has begun"  # and the log may have been read after it was cut
    if failure is not None:
        return reply({"type": "refused", "reason": failure})
    have, entries = rows
    begins = decode_entry(entries[0].body).previous if entries else after
    have = begins if have is None else (have[0], have[1])
    if have == after:
        bodies = [row.body for row in entries]
        return reply({"type": "entries", "entries": bodies, "last": replica.last})
    if have[0] <= after[0] and have[1] <= after[1]:
        return reply({"type": "elsewhere", "have": have})
    return reply({"type": "trimmed"})
