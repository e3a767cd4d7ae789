"""A replica as backup or learner: takes the primary's entries, joins them to its log, and says what matches (R1, R2).

What is acknowledged is durable and known to equal the primary's log; what is committed is what the primary has said, as
far as that is durable here. Entries that come before those they follow wait until these are fetched.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.shard_map import Member
from nodes.machine.status import LEADING, Status

if TYPE_CHECKING:
    from bus_kv.protocol.entry import Entry
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.replica import Replica
    from nodes.machine.tail import Position

AHEAD_BYTES_MAX = 8 << 20
"""Entries that arrived before those they follow, kept while these are fetched."""


class Backup:
    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.heard_ns = 0
        """When the primary was last heard."""
        self.fresh_ns = 0
        """When all that was committed at that time was committed here, too, as far as the primary has said."""
        self.primary = ""
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Another epoch was promised: nothing is known about its primary's log."""
        self._matched = 0
        """Seq up to which the own log is known to equal the primary's, in the promised epoch."""
        self._primary_commit = 0
        self._told_ns = 0
        """When the primary has said that."""
        self._round = 0
        """The primary's newest confirm round."""
        self._ahead: deque[tuple[Position, list[bytes]]] = deque()
        """What came before the entries that it follows: (place before it, entries), in order of arrival."""
        self._ahead_bytes = 0

    def on_append(self, fields: dict[str, Any]) -> None:
        """Entries, the primary's commit_seq and its confirm round (R1, R2)."""
        if not self._follow(fields):
            return
        replica = self._replica
        self._primary_commit = max(self._primary_commit, fields["commit"])
        self._told_ns = replica.now_ns
        replica.everywhere_seq = max(replica.everywhere_seq, fields.get("everywhere", 0))
        is_new_round = fields["round"] > self._round
        self._round = max(self._round, fields["round"])
        previous = (fields["previous"][0], fields["previous"][1])
        replica.heard_end(previous[1])
        end = self._join(previous, fields["entries"])
        if end is None:
            self._keep_ahead(previous, fields["entries"])
            replica.pull.start(Member(self.primary, fields["to"].get(self.primary, "")))
        else:
            self._matched = max(self._matched, end[1])
        if is_new_round or self._matched <= replica.durable_seq:
            self.acknowledge()  # else soon, when what has come is durable

    def on_confirm(self, fields: dict[str, Any]) -> bool:
        """A confirm round alone: say that nothing higher is promised (R5). Whether the turn has to look at the replica
        for it."""
        before, is_first = (self._replica.promised, self._replica.status), False
        if self._follow(fields):
            self._round = max(self._round, fields["round"])
            is_first = self.acknowledge()
        return is_first or before != (self._replica.promised, self._replica.status)

    def _follow(self, fields: dict[str, Any]) -> bool:
        """Whether what a primary says is for this replica, and of the epoch that it takes part in from now on (R1)."""
        replica = self._replica
        epoch, token, primary = fields["epoch"], fields["token"], fields["from"]
        if fields["to"].get(replica.node) != replica.incarnation or primary == replica.node:
            return False
        if epoch < replica.promised[0] or (
            epoch == replica.promised[0] and token != replica.promised[1]
        ):
            answer = {"type": "refused", "shard": replica.shard.id, "promised": replica.promised}
            replica.ports.tell(primary, answer)
            return False
        if (epoch, token) != replica.promised:
            replica.promise(epoch, token)
        if replica.status in LEADING:
            return False
        replica.status = Status.FOLLOWING
        self.primary, self.heard_ns = primary, replica.now_ns
        return True

    def greet(self, shard: Shard) -> None:
        """Tell the primary of this record that nobody has told the replica anything: it will remind."""
        replica = self._replica
        if replica.status in (Status.RESTARTED, Status.PROMISED) and (
            replica.own in shard.members or replica.own in shard.learners
        ):
            replica.ports.tell(shard.primary, {"type": "here", "shard": shard.id})

    def take_fetched(self, after: Position, bodies: list[bytes]) -> Position | None:
        """Entries that were fetched, to stand behind `after`; None when the own log has no such place any more."""
        replica = self._replica
        end = self._join(after, bodies)
        while self._ahead and end is not None:
            previous, waiting = self._ahead[0]
            joined = self._join(previous, waiting)
            if joined is None:
                break
            end = max(end, joined)
            self._ahead.popleft()
            self._ahead_bytes -= sum(map(len, waiting))
        if end is not None and replica.status is Status.FOLLOWING:
            self._matched = max(self._matched, end[1])
            self.acknowledge()
        return end

    def _join(self, previous: Position, bodies: list[bytes]) -> Position | None:
        """Put entries behind the place `previous`, cutting what conflicts; returns the end of what now matches."""
        replica = self._replica
        entries = [decode_entry(body) for body in bodies]
        _check_chain(replica.shard.id, previous, entries)
        if entries and entries[-1].epoch > replica.promised[0]:
            raise ValueError("R1: an entry of an epoch that is not promised")
        at = replica.tail.find(previous)
        if at is None:
            return None
        segments = replica.tail.segments
        for entry, body in zip(entries, bodies, strict=True):
            previous = (entry.epoch, entry.last)
            if entry.last <= replica.commit_seq:
                continue
            if at < len(segments) and segments[at].end != previous:
                replica.cut(at)
            if at == len(segments):
                replica.append_received(entry, body)
            at += 1
        return previous

    def _keep_ahead(self, previous: Position, bodies: list[bytes]) -> None:
        if bodies:
            self._ahead.append((previous, bodies))
            self._ahead_bytes += sum(map(len, bodies))
        if self._ahead_bytes > AHEAD_BYTES_MAX:
            self._ahead.clear()
            self._ahead_bytes = 0

    def acknowledge(self) -> bool:
        """Tell the primary what is durable of what matches; commit as far as it has said, after that (R1, R2). Whether
        it is the first time in this life that all of that is here, so that it can be read."""
        replica = self._replica
        if replica.status is not Status.FOLLOWING or replica.durable_promise != replica.promised:
            return False
        match = min(self._matched, replica.durable_seq)
        replica.commit_soon(min(self._primary_commit, match))
        had_all = self.fresh_ns > 0
        if match >= self._primary_commit:
            self.fresh_ns = max(self.fresh_ns, self._told_ns)
        epoch, token = replica.promised
        answer = {
            "type": "matched", "shard": replica.shard.id, "epoch": epoch, "token": token,
            "node": replica.node, "incarnation": replica.incarnation, "match": match,
            "round": self._round,
        }  # fmt: skip
        replica.ports.tell(self.primary, answer)
        return self.fresh_ns > 0 and not had_all


def _check_chain(shard: str, previous: Position, entries: list[Entry]) -> None:
    """Raises ValueError when the entries do not follow one another."""
    for entry in entries:
        if entry.shard != shard or entry.previous != previous:
            raise ValueError(f"entry {entry.first} of shard {entry.shard} does not follow")
        previous = (entry.epoch, entry.last)
