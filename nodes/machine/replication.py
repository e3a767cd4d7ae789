"""What a primary knows about the other replicas of its epoch, and what it says to them.

One publish on the shard's subject reaches all of them. They answer with how far their durable log equals the primary's
(`match`) and with the newest confirm round that they have seen (`rounds`): both only grow within an epoch, so a lost
or repeated answer does no harm. A confirm round without entries is asked of no more members than it takes, those that
answered last; if one of them keeps silent, the next reminder asks all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import MILLISECOND_NS
from bus_kv.protocol.sizes import ENTRY_BYTES

if TYPE_CHECKING:
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.tail import Position


class Replication:
    def __init__(self, shard: Shard, node: str, knobs: Knobs, opening: int) -> None:
        self.shard, self.node = shard, node
        self.opening = opening
        """Seq of the epoch's opening entry: nothing below it is committed by counting (R3)."""
        self.everywhere = 0
        """Up to here the log is known to have been on every member, in this epoch or before."""
        self.round = 0
        """Number of the newest confirm round; a read waits for one that began after it came (R5)."""
        self._round_wanted = False
        self._all_wanted = False
        """Every member is to confirm the next round."""
        self._knobs = knobs
        self._members = [member.node for member in shard.members]
        self.incarnations = {m.node: m.incarnation for m in (*shard.members, *shard.learners)}
        self.match = dict.fromkeys(self.incarnations, 0)
        self.rounds = dict.fromkeys(self.incarnations, 0)
        self._pending: list[tuple[Position, bytes]] = []
        """Entries to be sent with the next message: (place before it, bytes)."""
        self._next_ns = 0

    @property
    def is_alone(self) -> bool:
        return len(self.incarnations) == 1

    # ---- what they have said ----

    def on_answer(self, node: str, incarnation: str, match: int, round: int) -> bool:
        """Take a replica's answer; False when it is not one of this epoch's."""
        if self.incarnations.get(node) != incarnation:
            return False
        self.match[node] = max(self.match[node], match)
        self.rounds[node] = max(self.rounds[node], round)
        return True

    def quorum(self, of: dict[str, int]) -> int:
        """The greatest number that W members have reached."""
        reached = sorted([of[node] for node in self._members], reverse=True)
        return reached[self.shard.quorum - 1]

    def all(self, of: dict[str, int]) -> int:
        """The greatest number that every member has reached."""
        return min([of[node] for node in self._members])

    # ---- what to say ----

    def remind(self) -> None:
        """Say at the end of this turn how things stand: a replica has come that knows of nothing."""
        self._next_ns = 0

    def want_round(self, of_all: bool = False) -> int:
        """The number of the next confirm round: it begins at the end of this turn."""
        self._round_wanted = True
        self._all_wanted |= of_all
        return self.round + 1

    def send_entry(self, previous: Position, body: bytes) -> None:
        self._pending.append((previous, body))

    def take_question(self, now_ns: int) -> tuple[list[str], dict[str, Any]] | None:
        """Begin a round that is wanted; whom to ask to confirm it, and what, unless all are told of it anyway."""
        if not self._round_wanted:
            return None
        self._round_wanted = False
        self.round += 1
        self.rounds[self.node] = self.round
        if self._all_wanted or self._pending:
            self._all_wanted = False
            self.remind()
            return None
        self._next_ns = min(self._next_ns, now_ns + self._knobs.remind_ms * MILLISECOND_NS)
        others = [node for node in self._members if node != self.node]
        others.sort(key=lambda node: (-self.rounds[node], -self.match[node], node))
        return others[: self.shard.quorum - 1], {"type": "confirm", **self._head()}

    def take_messages(
        self, now_ns: int, last: Position, commit_seq: int, bytes_max: int
    ) -> list[dict[str, Any]]:
        """What all replicas are told in this turn: new entries, or now and then a reminder."""
        if not self._pending and now_ns < self._next_ns:
            return []
        if self.is_alone:
            self._pending = []
            return []
        pending, self._pending = self._pending, []
        messages = [self._message(last, [], commit_seq)] if not pending else []
        room = 0
        for previous, body in pending:
            if len(body) + ENTRY_BYTES > room:
                messages.append(self._message(previous, [], commit_seq))
                room = bytes_max
            messages[-1]["entries"].append(body)
            room -= len(body) + ENTRY_BYTES
        settled = (
            not pending and commit_seq == last[1] == self.all(self.match)
            and self.quorum(self.rounds) == self.round
        )  # fmt: skip
        pause_ms = self._knobs.remind_idle_ms if settled else self._knobs.remind_ms
        self._next_ns = now_ns + pause_ms * MILLISECOND_NS
        return messages

    def _message(self, previous: Position, entries: list[bytes], commit: int) -> dict[str, Any]:
        return {
            "type": "append", **self._head(), "previous": previous, "entries": entries,
            "commit": commit, "everywhere": self.everywhere,
        }  # fmt: skip

    def _head(self) -> dict[str, Any]:
        return {
            "shard": self.shard.id, "epoch": self.shard.epoch, "token": self.shard.token,
            "from": self.node, "to": self.incarnations, "round": self.round,
        }  # fmt: skip

    def next_ns(self) -> int:
        """When to remind the others."""
        return NEVER_NS if self.is_alone else self._next_ns
