"""How a learner gets what no log has any more: the state on disk of its primary, chunk by chunk.

The snapshot is the primary's state up to the mark that it has when the first chunk is asked for. Chunks are read while
folds go on: what was written after the mark is left out of them, and comes with the log behind the mark, which the
primary keeps for its learners. So the state of the learner is whole when the last chunk is written with the mark, and
not a moment before: a node that dies in between begins anew, with nothing.

Only a learner throws its own log away: a member may have acknowledged what stands there. A member that is stranded says
so, is taken out of the configuration, and comes back as a learner (R8).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from zlib import crc32

from bus_kv.core.machine import ClientsOf, Load, Mark, SnapshotRead
from bus_kv.core.timers import Timers
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.shard_map import Member
    from nodes.machine.node import NodeMachine
    from nodes.machine.replica import Replica

    Reply = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class _Transfer:
    replica: Replica
    source: Member
    attempt: tuple[int, str]
    """The epoch in which it goes on; in the next one everything begins anew."""
    whole_seq: int = 0
    """Where the source's state was when a chunk was read, at most: behind it the copy is whole."""
    mark: Mark | None = None
    place: Any = None
    """Of the next chunk; opaque to the learner."""
    asked: int = 0
    """Number of the question that is open: answers to others are late."""


class Snapshots:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._transfers: dict[str, _Transfer] = {}
        self._timers = Timers()

    # ---- the learner ----

    def start(self, replica: Replica, source: Member) -> None:
        """Fetch the whole shard from its primary, unless that goes on already in this epoch."""
        shard, transfer = replica.shard.id, self._transfers.get(replica.shard.id)
        if transfer is not None and (transfer.attempt, transfer.source) != (
            replica.promised, source
        ):  # fmt: skip
            self._drop(shard)
        if shard not in self._transfers:
            self._transfers[shard] = _Transfer(replica, source, replica.promised)
            self._ask(shard)

    def _goes_on(self, shard: str, transfer: _Transfer) -> bool:
        """Whether the replica still is a learner of the same epoch: only then may its log be thrown away (R8)."""
        replica = transfer.replica
        here = self._node.replicas.get(shard) is replica
        return here and replica.promised == transfer.attempt and replica.is_learner

    def _ask(self, shard: str) -> None:
        transfer = self._transfers[shard]
        replica = transfer.replica
        if not self._goes_on(shard, transfer):
            return self._drop(shard)
        transfer.asked += 1
        fields = {
            "type": "snapshot", "shard": shard, "epoch": replica.promised[0],
            "token": replica.promised[1], "incarnation": transfer.source.incarnation,
            "last": transfer.mark.last if transfer.mark else None, "place": transfer.place,
        }  # fmt: skip
        answered = partial(self._on_answer, shard, transfer, transfer.asked)
        self._node.links.call(transfer.source.node, fields, answered)
        retry_ns = self._node.knobs.snapshot_retry_ms * MILLISECOND_NS
        self._timers.start(shard, self._node.now_ns + retry_ns)
        return None

    def _drop(self, shard: str) -> None:
        """Give it up; a part of a snapshot is worth nothing."""
        transfer = self._forget(shard)
        if transfer.mark is not None:
            clear = Load(0, shard, transfer.replica.shard.keyspace, "", b"")
            self._node.ask(clear, lambda _rows, _failure: None)

    def _forget(self, shard: str) -> _Transfer:
        self._timers.stop(shard)
        return self._transfers.pop(shard)

    def _on_answer(
        self, shard: str, transfer: _Transfer, asked: int, answer: dict[str, Any]
    ) -> None:
        if self._transfers.get(shard) is not transfer or transfer.asked != asked:
            return
        if answer["type"] != "chunk" or crc32(answer["chunk"]) != answer["checksum"]:
            return  # refused or damaged: asked again when the timer says so
        if not self._goes_on(shard, transfer):
            return self._drop(shard)
        self._timers.stop(shard)
        transfer.asked += 1
        transfer.whole_seq = max(transfer.whole_seq, answer["mark"]["last"])
        if transfer.mark is None:
            transfer.mark = mark_from_wire(answer["mark"])
            self._begin(shard, transfer, answer)
        else:
            self._load(shard, transfer, answer)

    def _begin(self, shard: str, transfer: _Transfer, answer: dict[str, Any]) -> None:
        """Throw away what is here, durably, before the first chunk is written."""
        assert transfer.mark is not None
        assert transfer.replica.is_learner, "R8: only a learner throws its log away"
        transfer.replica = self._node.replace(transfer.replica, Mark(), (), transfer.mark.last)
        self._node.when_durable(
            lambda: self._write(shard, transfer, Load(0, shard, "", "", b""), answer)
        )

    def _load(self, shard: str, transfer: _Transfer, answer: dict[str, Any]) -> None:
        load = Load(0, shard, "", answer["table"], answer["chunk"])
        self._write(shard, transfer, load, None)
        transfer.place = answer["place"]

    def _write(
        self, shard: str, transfer: _Transfer, load: Load, behind: dict[str, Any] | None
    ) -> None:
        load.keyspace = transfer.replica.shard.keyspace
        self._node.ask(load, partial(self._on_written, shard, transfer, load, behind))

    def _on_written(
        self, shard: str, transfer: _Transfer, load: Load, behind: dict[str, Any] | None,
        rows: list[Any], failure: str | None,
    ) -> None:  # fmt: skip
        """Go on with the chunk that waited behind, or ask for the next, or come to the end."""
        del rows
        if self._transfers.get(shard) is not transfer:
            return
        if failure is not None:
            # Unreadable here, whatever its checksum says. Begins anew when the log is asked for again.
            return self._drop(shard)
        if load.mark is not None:
            query = ClientsOf(0, shard)
            return self._node.ask(query, partial(self._on_clients, shard, transfer))
        if behind is not None:
            return self._load(shard, transfer, behind)
        if transfer.place is None:
            end = Load(0, shard, "", "", b"", transfer.mark)
            return self._write(shard, transfer, end, None)
        # Not faster than is good for those who use the node meanwhile.
        pause_ns = len(load.chunk) * SECOND_NS // self._node.knobs.snapshot_bytes_per_s
        self._timers.start(shard, self._node.now_ns + pause_ns)
        return None

    def _on_clients(
        self, shard: str, transfer: _Transfer, rows: list[Any], failure: str | None
    ) -> None:
        if self._transfers.get(shard) is not transfer:
            return
        if failure is not None or not self._goes_on(shard, transfer):
            return self._drop(shard)
        self._forget(shard)
        assert transfer.mark is not None
        replica = self._node.replace(transfer.replica, transfer.mark, rows, transfer.mark.last)
        replica.whole_seq = transfer.whole_seq

    # ---- the primary ----

    def on_question(self, fields: dict[str, Any], reply: Reply) -> None:
        """A learner asks for a chunk of the own state, up to the mark of its first question."""
        replica = self._node.replicas.get(fields["shard"])
        attempt = (fields["epoch"], fields["token"])
        here = fields["incarnation"] == self._node.config.incarnation
        if replica is None or not here or replica.promised != attempt or not replica.is_active:
            return reply({"type": "refused", "reason": "this replica is not the primary"})
        replica.note_fetch()
        mark = replica.folder.mark
        last = mark.last if fields["last"] is None else fields["last"]
        place = fields["place"]
        query = SnapshotRead(0, replica.shard.id, last, place, self._node.sizes.entry)
        return self._node.ask(query, partial(_answer_chunk, mark, reply))

    # ---- deadlines ----

    def next_deadline_ns(self) -> int:
        return self._timers.next_ns

    def on_deadline(self, now_ns: int) -> None:
        for shard in self._timers.pop_due(now_ns):
            self._ask(shard)


def _answer_chunk(mark: Mark, reply: Reply, rows: list[Any], failure: str | None) -> None:
    if failure is not None:
        return reply({"type": "refused", "reason": failure})
    table, chunk, place = rows
    return reply(
        {
            "type": "chunk", "mark": asdict(mark), "table": table, "chunk": chunk,
            "checksum": crc32(chunk), "place": place,
        }
    )  # fmt: skip


def mark_from_wire(wire: dict[str, Any]) -> Mark:
    return Mark(**{**wire, "lineage": tuple((epoch, seq) for epoch, seq in wire["lineage"])})
