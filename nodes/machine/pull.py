"""Fetching what this replica's log lacks from another one's, entry by entry from the place where both are equal.

One mechanism for all who lag: a backup that missed a message, a learner, a replica that was down, and a new primary
that has to take over the longest sealed log (step 3). The source reads its log on disk; one question is under way at a
time, so a lagging replica takes no more than it can write.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bus_kv.core.timers import NEVER_NS
from bus_kv.knobs import MILLISECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Member
    from nodes.machine.replica import Replica
    from nodes.machine.tail import Position


@dataclass(slots=True)
class Source:
    member: Member
    goal: Position | None
    """Where it is enough; None: with all that the source has."""
    reached: Callable[[], None]
    failed: Callable[[], None]
    """With a goal: the source's log begins behind the end of this one, so it never leads there."""


class Pull:
    def __init__(self, replica: Replica, knobs: Knobs) -> None:
        self._replica, self._knobs = replica, knobs
        self._source: Source | None = None
        self._after: Position = (0, 0)
        self._asked = 0
        """Number of the question that is under way; answers to others are late."""
        self._again_ns = 0

    @property
    def is_on(self) -> bool:
        return self._source is not None

    def start(
        self,
        member: Member,
        goal: Position | None = None,
        reached: Callable[[], None] = lambda: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        """Fetch from this replica, unless that goes on already."""
        source = self._source
        if source is not None and (source.member, source.goal) == (member, goal):
            return
        self._source = Source(member, goal, reached, failed)
        self._ask(self._replica.last)

    def stop(self) -> None:
        self._source = None

    def _ask(self, after: Position) -> None:
        replica, source = self._replica, self._source
        assert source is not None
        self._after = after
        self._asked += 1
        self._again_ns = replica.now_ns + self._knobs.pull_retry_ms * MILLISECOND_NS
        fields = {
            "type": "fetch", "shard": replica.shard.id, "epoch": replica.promised[0],
            "token": replica.promised[1], "incarnation": source.member.incarnation, "after": after,
        }  # fmt: skip
        asked = self._asked
        replica.ports.call(
            source.member.node, fields, lambda answer: self._on_answer(asked, answer)
        )

    def _on_answer(self, asked: int, answer: dict[str, Any]) -> None:
        if asked != self._asked or self._source is None:
            return
        match answer["type"]:
            case "entries":
                self._on_entries(answer)
            case "elsewhere":
                # The source has no entry that ends there: try the last place that both may have.
                have = (answer["have"][0], answer["have"][1])
                after = self._replica.tail.before(have)
                if after != self._after:
                    self._ask(after)
            case "trimmed":
                self._on_trimmed(self._source)
            case _:
                pass  # refused: asked again later, or given up by a new epoch

    def _on_entries(self, answer: dict[str, Any]) -> None:
        source, replica = self._source, self._replica
        assert source is not None
        end = replica.backup.take_fetched(self._after, answer["entries"])
        if source.goal is None:
            enough = end is None or end >= (answer["last"][0], answer["last"][1])
        else:
            enough = replica.last >= source.goal
        if enough:
            self._source = None
            source.reached()
        elif answer["entries"]:
            self._ask(end or replica.last)

    def _on_trimmed(self, source: Source) -> None:
        """The source's log begins behind the end of this one."""
        replica = self._replica
        if source.goal is not None:
            self._source = None
            source.failed()
        elif replica.is_learner:
            self._source = None
            replica.ports.load(replica, source.member)
        else:
            replica.is_stranded = True

    def next_ns(self) -> int:
        return self._again_ns if self._source is not None else NEVER_NS

    def on_deadline(self, now_ns: int) -> None:
        """No answer, or none that helps: ask again."""
        if self.is_on and self._again_ns <= now_ns:
            self._ask(self._replica.last)
