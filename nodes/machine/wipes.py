"""Emptying replicas that the map has no part for any more.

A node that has left a shard keeps its copy for a while, because who comes back soon has little to catch up. A copy is
wiped only after a configuration without it is ACTIVE and has all the members it should have (R8), and not before the
node has promised that configuration's epoch: so nothing older ever counts on what was here. The promise stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus_kv.core.machine import Load, Mark
from bus_kv.core.timers import Timers
from bus_kv.knobs import SECOND_NS
from bus_kv.protocol.shard_map import Member, ShardState

if TYPE_CHECKING:
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica


class Wipes:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._timers = Timers()

    def look(self, shard: str) -> None:
        """A shard's record has changed: whether the copy here is superfluous, and since when."""
        replica = self._node.replicas.peek(shard)
        if replica is None or self._record_without(replica) is None:
            self._timers.stop(shard)
        else:
            due_ns = self._node.now_ns + int(self._node.knobs.wipe_after_s * SECOND_NS)
            self._timers.start_once(shard, due_ns)

    def next_deadline_ns(self) -> int:
        return self._timers.next_ns

    def on_deadline(self, now_ns: int) -> None:
        for shard in self._timers.pop_due(now_ns):
            replica = self._node.replicas[shard]
            record = self._record_without(replica)
            if record is not None:
                self._wipe(replica, record)

    def _record_without(self, replica: Replica) -> Shard | None:
        """The ACTIVE record that does without this copy, unless the replica is empty or knows of something newer."""
        map, config = self._node.map, self._node.config
        record = map.shards.get(replica.shard.id)
        if record is None or record.state is not ShardState.ACTIVE:
            return None
        own = Member(config.id, config.incarnation)
        is_named = own in record.members or own in record.learners
        is_full = len(record.members) >= map.keyspaces[record.keyspace].replication_factor
        is_newest = replica.promised[0] < record.epoch or replica.promised == (
            record.epoch, record.token
        )  # fmt: skip
        is_empty = not (replica.last[1] or replica.folder.mark.last)
        return record if is_full and is_newest and not (is_named or is_empty) else None

    def _wipe(self, replica: Replica, record: Shard) -> None:
        """First the log, durably, then the state: a log that ends before the state would be taken for an older copy."""
        replica.shard = record
        replica.promise(record.epoch, record.token)
        self._node.replace(replica, Mark(), (), replica.folder.mark.last)
        clear = Load(0, record.id, record.keyspace, "", b"")
        self._node.when_durable(lambda: self._node.ask(clear, lambda _rows, _failure: None))
