"""What a primary knows about the other replicas of its epoch, and what it says to them.

One publish on the shard's subject reaches all of them. They answer with how far their durable log equals the primary's
(`match`) and with the newest confirm round that they have seen (`rounds`): both only grow within an epoch, so a lost
or repeated answer does no harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.knobs import MILLISECOND_NS

if TYPE_CHECKING:
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Shard
    from nodes.machine.tail import Position


class Replication:
    def __init__(self, shard: Shard, node: str, knobs: Knobs, opening: int) -> None:
        self.shard, self.node = shard, node
        self.opening = opening
        """Seq of the epoch's opening entry: nothing below it is committed by counting (R3)."""
        self.round = 0
        """Number of the newest confirm round; a read waits for one that began after it came (R5)."""
        self.round_wanted = False
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

    def want_round(self) -> int:
        """The number of the next confirm round: it begins at the end of this turn."""
        self.round_wanted = True
        return self.round + 1

    def send_entry(self, previous: Position, body: bytes) -> None:
        self._pending.append((previous, body))

    def take_messages(
        self, now_ns: int, last: Position, commit_seq: int, bytes_max: int
    ) -> list[dict[str, Any]]:
        """The messages of this turn: new entries, a new round, or now and then a reminder of both."""
        if self.round_wanted:
            self.round_wanted = False
            self.round += 1
            self.rounds[self.node] = self.round
        elif not self._pending and now_ns < self._next_ns:
            return []
        if self.is_alone:
            self._pending = []
            return []
        pending, self._pending = self._pending, []
        messages = [self._message(last, [], commit_seq)] if not pending else []
        room = 0
        for previous, body in pending:
            if len(body) > room:
                messages.append(self._message(previous, [], commit_seq))
                room = bytes_max
            messages[-1]["entries"].append(body)
            room -= len(body)
        settled = (
            not pending and commit_seq == last[1] == self.all(self.match)
            and self.quorum(self.rounds) == self.round
        )  # fmt: skip
        pause_ms = self._knobs.remind_idle_ms if settled else self._knobs.remind_ms
        self._next_ns = now_ns + pause_ms * MILLISECOND_NS
        return messages

    def _message(self, previous: Position, entries: list[bytes], commit: int) -> dict[str, Any]:
        return {
            "type": "append", "shard": self.shard.id, "epoch": self.shard.epoch,
            "token": self.shard.token, "from": self.node, "to": self.incarnations,
            "previous": previous, "entries": entries, "commit": commit, "round": self.round,
        }  # fmt: skip

    def next_ns(self) -> int | None:
        """When to remind the others."""
        return None if self.is_alone else self._next_ns
