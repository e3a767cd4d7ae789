"""How the replicas of a node reach other nodes: what they listen on, what they publish, tell and ask.

What several shards have to tell one node in a turn travels in one message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import CutRow, Publish, Subscribe
from bus_kv.knobs import SECOND_NS
from bus_kv.protocol.codec import encode_cbor, encode_json
from nodes.machine.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Effect, EntryRow
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica

    Then = Callable[[dict[str, Any]], None]

CHANNELS = {
    Status.RESTARTED: ("replicate",),
    Status.PROMISED: ("replicate", "read"),
    Status.FOLLOWING: ("replicate", "read"),
    Status.OPENING: (),
    Status.OPENED: ("shard",),
    Status.ACTIVE: ("shard", "read"),
}
"""The subjects of a shard that a replica listens on. Clients learn that it is ACTIVE as soon as its primary does, so
that one listens before."""
CALL_NS = 10 * SECOND_NS
"""Answers of other nodes are not expected any more after this."""


class Links:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._listening: dict[str, tuple[str, ...]] = {}
        """Shard -> channels."""
        self._tells: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
        """Node -> (type, shard) -> what it is told at the end of the turn."""
        self._calls: dict[int, tuple[int, Then]] = {}
        """Questions to other nodes: until when, and who waits."""

    def tell(self, node: str, fields: dict[str, Any]) -> None:
        """At the end of the turn; of the same type and shard only the last."""
        self._tells.setdefault(node, {})[(fields["type"], fields["shard"])] = fields

    def call(self, node: str, fields: dict[str, Any], then: Then) -> None:
        """Ask a node; `then` gets its answer if one comes soon."""
        self._calls = {c: call for c, call in self._calls.items() if call[0] > self._node.now_ns}
        correlation = self._node.request_node(node, encode_cbor(fields))
        self._calls[correlation] = (self._node.now_ns + CALL_NS, then)

    def take_call(self, correlation: int) -> Then | None:
        """Who waits for this answer."""
        call = self._calls.pop(correlation, None)
        return call[1] if call else None

    def end_turn(self, replica: Replica) -> list[Effect]:
        """Publish what the primary has for its replicas; subscribe to what the replica's status calls for."""
        effects = self._listen(replica)
        if messages := replica.take_messages():
            subject = self._node.config.subjects.shard_replicate(replica.shard.id)
            effects[:0] = [Publish(subject, encode_cbor(message)) for message in messages]
        return effects

    def _listen(self, replica: Replica) -> list[Effect]:
        shard = replica.shard.id
        wanted = CHANNELS[replica.status] if self._node.is_running else ()
        if "read" in wanted and not self._node.may_read(replica):
            wanted = tuple([channel for channel in wanted if channel != "read"])
        before = self._listening.get(shard, ())
        if wanted == before:
            return []
        self._listening[shard] = wanted
        changes = [(c, False) for c in before if c not in wanted]
        changes += [(c, True) for c in wanted if c not in before]
        return [Subscribe(channel, shard, on) for channel, on in changes]

    def tell_cuts(self, rows: list[EntryRow | CutRow]) -> list[Effect]:
        """What this node takes out of its log, because another log was chosen, is said on the bus."""
        config = self._node.config
        return [
            Publish(
                config.subjects.failover_event(row.shard),
                encode_json({"shard": row.shard, "node": config.id, "cut_behind": row.last}),
            )
            for row in rows
            if isinstance(row, CutRow) and row.keep
        ]

    def take_tells(self) -> list[Effect]:
        tells, self._tells = self._tells, {}
        subjects = self._node.config.subjects
        return [
            Publish(
                subjects.node_inbox(node),
                encode_cbor({"type": "told", "items": [*items.values()]}),
            )
            for node, items in tells.items()
        ]
