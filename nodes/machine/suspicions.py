"""Who does not answer: what this node has met itself and says on the bus, and what others have said.

All of it is for speed and for those who look; whether a node is down is decided by a coordinator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import Publish
from bus_kv.errors import BusKVError
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.codec import decode_body, encode_json
from nodes.machine.status import Status

if TYPE_CHECKING:
    from bus_kv.core.machine import Received
    from bus_kv.protocol.messages import Heartbeat
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.node import NodeMachine

REMINDERS = 3
"""So many of a primary's reminders are missed before it is suspected."""
NOT_REMINDED = "its backups hear nothing of it"
SHOWN_MS = 30_000
"""A suspicion that nobody has repeated for so long is shown no more."""


class Suspicions:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self.silent: dict[str, str] = {}
        """Shards that did not answer this node's last forward, and how."""
        self._told: dict[str, tuple[int, dict[str, Any]]] = {}
        """Node -> when somebody said that it does not answer, and what."""

    def say(self, shard: str, reason: str) -> Publish | None:
        """A shard's primary does not answer."""
        record = self._node.map.shards.get(shard)
        if record is None:
            return None
        self.silent[shard] = reason
        return self._event(record, reason)

    def _event(self, record: Shard, reason: str) -> Publish:
        config = self._node.config
        said = {"node": record.primary, "shard": record.id, "by": config.id, "reason": reason}
        return Publish(config.subjects.suspect_event(record.primary), encode_json(said))

    def listen(self) -> list[Publish]:
        """Suspect primaries that have reminded no backup here for too long: perhaps nobody asks them for anything."""
        node = self._node
        patience_ns = REMINDERS * node.knobs.remind_idle_ms * MILLISECOND_NS
        silent: dict[str, Shard] = {}
        heard: set[str] = set()
        for replica in node.replicas.values():
            primary, record = replica.backup.primary, node.map.shards.get(replica.shard.id)
            if replica.status is not Status.FOLLOWING or record is None:
                continue
            if node.now_ns - replica.backup.heard_ns < patience_ns:
                heard.add(primary)
            elif record.primary == primary:
                silent.setdefault(primary, record)
        return [self._event(r, NOT_REMINDED) for id, r in silent.items() if id not in heard]

    def on_message(self, message: Received) -> None:
        """Kept to be shown: whoever decides what follows from it hears it, too."""
        try:
            fields = decode_body(message.body)[1]
        except BusKVError:
            return
        if message.name in self._node.map.nodes:
            said = {name: str(fields.get(name, ""))[:200] for name in ("by", "reason")}
            self._told[message.name] = (self._node.now_ns, said)

    def on_heartbeat(self, beat: Heartbeat) -> None:
        """The node is there; a primary that beats is, too, be it that nobody asks this node for its shards any more."""
        self._told.pop(beat.node, None)
        for report in beat.shards:
            shard = self._node.map.shards.get(report.id)
            if report.status == "active" and shard is not None and shard.primary == beat.node:
                self.silent.pop(report.id, None)

    def shown(self) -> list[dict[str, Any]]:
        """Nodes that somebody lately had no answer of, and that have given no sign of life since."""
        now_ns = self._node.now_ns
        shown = []
        for id, (at_ns, said) in sorted(self._told.items()):
            age_ms = (now_ns - at_ns) // MILLISECOND_NS
            if id in self._node.map.nodes and age_ms < SHOWN_MS:
                shown.append({"node": id, "age_ms": age_ms, **said})
        return shown
