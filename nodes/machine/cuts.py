"""What was cut from this replica's log, until the shard's log says that it was rolled back.

A cut entry is lost for good once another entry is committed at its place (R2); the log keeps it aside until then. It is
told to the primary, which puts it into the log of all as an entry of its own: so each operation appears in the oplog of
every replica once, whoever had it and however often it is told. Only then the node announces it and forgets it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import CutsRead, EntryRow, LoggedBatch
from bus_kv.core.timers import NEVER_NS
from bus_kv.errors import BusKVError
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.entry import ROLLED_BACK, applied_count, decode_entry
from nodes.machine.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.protocol.batch import Version
    from bus_kv.protocol.entry import Entry
    from nodes.machine.replica import Replica

RETRY_NS = 2000 * MILLISECOND_NS
VERSIONS_MAX = 100
"""Versions that one event names; it tells the count of all."""


class Cuts:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.is_due = False
        """There may be something that the log has not written down."""
        self._told = 0
        """Place in what was cut, up to which it may be forgotten."""
        self._asked = 0
        """Number of what is under way; answers to others are late."""
        self._again_ns = 0

    def found(self) -> None:
        """Something was cut, now or in a former life."""
        self.is_due, self._again_ns = True, 0

    def next_ns(self) -> int:
        is_told = self.is_due and self._replica.status in (Status.FOLLOWING, Status.ACTIVE)
        return self._again_ns if is_told else NEVER_NS

    def tell_if_due(self) -> None:
        """At the end of a turn: take up what is next."""
        replica = self._replica
        if self.next_ns() > replica.now_ns:
            return
        self._asked += 1
        self._again_ns = replica.now_ns + RETRY_NS
        query = CutsRead(0, replica.shard.id, self._told, replica.sizes.entry)
        replica.ports.ask(query, partial(self._on_rows, self._asked))

    def _on_rows(self, asked: int, rows: list[tuple[int, EntryRow]], failure: str | None) -> None:
        if asked != self._asked or failure is not None:
            return
        replica = self._replica
        self.is_due = bool(rows)
        settled: list[EntryRow] = []
        for _, row in rows:
            if decode_entry(row.body).first > replica.commit_seq:
                break  # nothing is committed in its place yet
            settled.append(row)
        if settled:
            place = rows[len(settled) - 1][0]
            epoch, token = replica.promised
            bodies = [row.body for row in settled]
            fields = {
                "type": ROLLED_BACK, "shard": replica.shard.id, "epoch": epoch, "token": token,
                "entries": bodies,
            }  # fmt: skip
            noted = partial(self._on_noted, asked, place, bodies)
            replica.ports.call(replica.primary, fields, noted)

    def _on_noted(
        self, asked: int, place: int, bodies: list[bytes], answer: dict[str, Any]
    ) -> None:
        if asked != self._asked or answer["type"] != "noted":
            return
        entries = [decode_entry(bodies[at]) for at in answer["lost"]]
        versions = [version for entry in entries for version in versions_of(entry)]
        if versions:
            replica = self._replica
            replica.ports.announce(
                {
                    "shard": replica.shard.id, "type": ROLLED_BACK, "node": replica.node,
                    "epoch": replica.promised[0], "versions": versions[:VERSIONS_MAX],
                    "count": len(versions),
                }
            )  # fmt: skip
        self._told, self._again_ns = place, 0


def note(replica: Replica, bodies: list[bytes], reply: Callable[[dict[str, Any]], None]) -> None:
    """The primary writes down what somebody has cut; answered once that is committed, with what is lost indeed."""
    entries = [decode_entry(body) for body in bodies]
    lost = [at for at, entry in enumerate(entries) if entry.batches and _is_lost(replica, entry)]
    noted = {"type": "noted", "lost": lost}
    if not lost:
        return reply(noted)

    def respond(result: dict[str, Any] | BusKVError) -> None:
        reply({"type": "refused"} if isinstance(result, BusKVError) else result)

    replica.append_record({ROLLED_BACK: [bodies[at] for at in lost]})
    deadline_ns = replica.now_ns + replica.knobs.answer_within_ms * MILLISECOND_NS
    return replica.answer_written("quorum", deadline_ns, respond, noted)


def _is_lost(replica: Replica, entry: Entry) -> bool:
    if entry.epoch >= replica.shard.epoch:
        raise ValueError("an entry of this epoch cannot have been cut")
    return replica.fate((entry.epoch, entry.first)) == ROLLED_BACK


def rolled_back_in(record: dict[str, Any] | None) -> list[LoggedBatch]:
    """The batches that an entry with this record says were rolled back."""
    return [
        batch
        for body in (record or {}).get(ROLLED_BACK, ())
        for batch in logged(decode_entry(body))
    ]


def logged(entry: Entry) -> list[LoggedBatch]:
    """Its batches, as they would have been applied."""
    batches: list[LoggedBatch] = []
    seq = entry.first
    for outcomes, batch in entry.decoded():
        batches.append(LoggedBatch(batch, outcomes, entry.epoch, seq, entry.time_ms))
        seq += applied_count(outcomes)
    return batches


def versions_of(entry: Entry) -> list[Version]:
    """Of the operations that it would have applied."""
    count = sum(map(applied_count, entry.outcomes))
    return [(entry.epoch, seq) for seq in range(entry.first, entry.first + count)]
