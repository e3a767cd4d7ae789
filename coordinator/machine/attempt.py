"""One attempt to open a new epoch of a shard: seal the last active configuration, then open at the new primary.

Steps 2 and 3 of a reconfiguration (DESIGN.md). An attempt exists only after its compare-and-set is known to have
succeeded, so nothing is ever sealed for an epoch that the map does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bus_kv.knobs import MILLISECOND_NS, SECOND_NS
from bus_kv.protocol.shard_map import Member, shard_to_document

if TYPE_CHECKING:
    from bus_kv.knobs import Knobs
    from bus_kv.protocol.shard_map import Shard


@dataclass(slots=True)
class Attempt:
    shard: Shard
    started_ns: int
    retry_ns: int
    """When what is unanswered is sent again."""
    sealed: dict[Member, tuple[int, int]] = field(default_factory=dict)
    """Member of the last active configuration -> (epoch, seq) of the end of its log."""
    opened: bool = False
    is_unreached: bool = False
    """The primary cannot get the longest of the sealed logs: who has it begins too far behind."""
    sealed_ns: int = 0
    opened_ns: int = 0

    @property
    def id(self) -> tuple[int, str]:
        return self.shard.epoch, self.shard.token

    def patience_ns(self, knobs: Knobs) -> int:
        """How long it may take: twice as long as the one before it, so that the record of attempts stays small."""
        first_ns = knobs.attempt_patience_ms * MILLISECOND_NS
        doubled_ns = first_ns << min(len(self.shard.attempts), 32)
        return min(doubled_ns, max(first_ns, int(knobs.attempt_patience_max_s * SECOND_NS)))

    @property
    def is_sealed(self) -> bool:
        """n−W+1 members of the last active configuration have promised: no write of it can commit any more."""
        last = self.shard.last_active
        if last is None:
            return True
        n = len(last.members)
        return len(self.sealed) >= n - (n // 2 + 1) + 1

    def messages(self) -> list[tuple[Member, dict[str, Any]]]:
        """What is still to be said, and to whom."""
        shard = self.shard
        if self.opened:
            return []
        if not self.is_sealed:
            assert shard.last_active is not None
            return [
                (member, self._seal(member))
                for member in shard.last_active.members
                if member not in self.sealed
            ]
        member = shard.member(shard.primary)
        assert member is not None, "a primary is a member"
        return [(member, self._open(member))]

    def _seal(self, member: Member) -> dict[str, Any]:
        record = shard_to_document(self.shard)
        return {"type": "seal", "record": record, "incarnation": member.incarnation}

    def _open(self, primary: Member) -> dict[str, Any]:
        """The new primary takes the greatest of the sealed logs, from the member that has it."""
        sealed = self.sealed or {primary: (0, 0)}
        source = max(sealed, key=lambda member: (sealed[member], member == primary))
        return {
            "type": "open", "record": shard_to_document(self.shard), "best": sealed[source],
            "source": [source.node, source.incarnation],
        }  # fmt: skip

    def on_answer(self, member: Member, fields: dict[str, Any]) -> None:
        """Take a seal report or the news that the epoch is open or never will be; else nothing changes."""
        if fields.get("unreached") == [*self.id]:
            self.is_unreached = True
        if (fields.get("epoch"), fields.get("token")) != self.id:
            return
        if fields["type"] == "sealed":
            epoch, seq = fields["last"]
            self.sealed[member] = (epoch, seq)
        elif fields["type"] == "opened":
            self.opened = True


def refused_with(fields: dict[str, Any]) -> int:
    """The epoch that a replica has promised instead; 0 when it has not refused for that."""
    promised = fields.get("promised") if fields["type"] == "refused" else None
    return int(promised[0]) if promised and type(promised[0]) is int else 0
