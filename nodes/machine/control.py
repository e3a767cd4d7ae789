"""Messages on a node's inbox: hello, seal, open, active, sql (DESIGN.md, "Life of a replica")."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.errors import BusKVError
from bus_kv.protocol.codec import decode_cbor, encode_cbor
from bus_kv.protocol.messages import record_from_wire, seal_from_wire
from nodes.machine.replica import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Received
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica

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
                "open": self._on_open,
                "active": self._on_active,
                "sql": self._on_sql,
            }[fields["type"]]
            handle(fields, partial(self._reply_control, message))
        except (BusKVError, KeyError, TypeError, ValueError, AttributeError) as error:
            self._reply_control(
                message, {"type": "refused", "reason": f"not understood: {error!r}"}
            )

    def _reply_control(self, message: Received, fields: dict[str, Any]) -> None:
        self._node.reply(message, encode_cbor({"node": self._node.config.id, **fields}))

    def _on_hello(self, fields: dict[str, Any], reply: Reply) -> None:
        if tuple(fields["run"]) != self._node.config.run:
            reply({"type": "here", "run": self._node.config.run})

    def _on_seal(self, fields: dict[str, Any], reply: Reply) -> None:
        """Step 2: promise, durably, and report how far the log goes (R1)."""
        seal = seal_from_wire(fields)
        replica = self._node.replicas.get(seal.shard)
        attempt = (seal.epoch, seal.token)
        if seal.incarnation != self._node.config.incarnation or replica is None:
            return reply({"type": "refused", "reason": "this replica is not here"})
        if attempt == replica.promised and seal.epoch == replica.opened_epoch:
            return None  # a late repeat: this attempt has gone on to its opening
        if attempt != replica.promised and seal.epoch <= replica.promised[0]:
            return reply(_promised_more(replica))
        self._node.stop_serving(replica)
        replica.promise(*attempt)
        report = {
            "type": "sealed", "shard": seal.shard, "epoch": seal.epoch, "token": seal.token,
            "incarnation": self._node.config.incarnation, "last": replica.last,
            "commit_seq": replica.commit_seq,
        }  # fmt: skip
        return self._node.persist(replica, lambda: reply(report))

    def _on_open(self, fields: dict[str, Any], reply: Reply) -> None:
        """Step 3: begin the epoch as its primary."""
        shard = record_from_wire(fields)
        member = shard.member(self._node.config.id)
        if member is None or member.incarnation != self._node.config.incarnation:
            return reply({"type": "refused", "reason": "this replica is not here"})
        replica = self._node.replicas.get(shard.id)
        if replica is None and shard.last_active is not None:
            return reply({"type": "refused", "reason": "the shard has a past that is not here"})
        replica = replica or self._node.new_replica(shard)
        opened = {"type": "opened", "shard": shard.id, "epoch": shard.epoch, "token": shard.token}
        attempt = (shard.epoch, shard.token)
        if attempt == replica.promised and replica.status in (Status.OPENED, Status.ACTIVE):
            return reply(opened)
        if attempt == replica.promised and replica.status is Status.OPENING:
            return None
        if shard.epoch <= replica.opened_epoch:
            return reply(_promised_more(replica))
        if attempt != replica.promised and shard.epoch <= replica.promised[0]:
            return reply(_promised_more(replica))
        self._node.stop_serving(replica)
        replica.open(shard, self._node.now_ns // 1_000_000)
        return self._node.persist(replica, lambda: self._after_open(replica, lambda: reply(opened)))

    def _after_open(self, replica: Replica, tell: Callable[[], None]) -> None:
        tell()
        self._node.beat()
        shard = self._node.map.shards.get(replica.shard.id)
        if shard is not None:
            self._node.follow(replica, shard)

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
        replica = self._node.replicas.get(shard.id)
        if replica is not None:
            self._node.follow(replica, shard)
        self._node.fetch_map()


def _promised_more(replica: Replica) -> dict[str, Any]:
    return {"type": "refused", "reason": "promised more", "promised": replica.promised}
