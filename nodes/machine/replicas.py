"""The replicas of a node, and which of them a turn has to look at.

A node may hold hundreds, and a turn is about a few: those that somebody reached for, those that got an answer, and
those whose time has come. All others have nothing to say, so they cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bus_kv.core.timers import NEVER_NS

if TYPE_CHECKING:
    from collections.abc import ValuesView

    from nodes.machine.replica import Replica


class Replicas:
    def __init__(self) -> None:
        self._held: dict[str, Replica] = {}
        self._touched: set[str] = set()
        """To be looked at in this turn."""
        self._glanced: dict[str, None] = {}
        """Which were told something in this turn, and are not to be looked at for that."""
        self._unsettled: dict[str, None] = {}
        """Which have left something to be done after the last turn, and were not touched since."""
        self._unplanned: dict[str, None] = {}
        """Whose next deadline is to be asked for again."""
        self._deadlines_ns: dict[str, int] = {}

    def put(self, replica: Replica) -> None:
        self._held[replica.shard.id] = replica
        self.touch(replica.shard.id)

    def get(self, shard: str) -> Replica | None:
        """The replica of a shard, to do something with it."""
        return self[shard] if shard in self._held else None

    def peek(self, shard: str) -> Replica | None:
        """The replica of a shard, to be read only."""
        return self._held.get(shard)

    def __getitem__(self, shard: str) -> Replica:
        self.touch(shard)
        return self._held[shard]

    def touch(self, shard: str) -> None:
        """Something has come for this replica, or it is about to be changed: what is committed is applied by then."""
        self.look_at(shard)
        self._unsettled.pop(shard, None)
        self._held[shard].settle()

    def look_at(self, shard: str) -> None:
        """The turn has something to do for this replica."""
        self._touched.add(shard)
        self._unplanned[shard] = None

    def glance(self, shard: str) -> Replica | None:
        """The replica of a shard, to tell it what most often leaves the turn nothing to do; `look_at` it otherwise."""
        if shard in self._unsettled:
            self.touch(shard)
        if shard in self._held:
            self._glanced[shard] = None
        return self._held.get(shard)

    def values(self) -> ValuesView[Replica]:
        """All of them, to be read only."""
        return self._held.values()

    def __contains__(self, shard: str) -> bool:
        return shard in self._held

    def __len__(self) -> int:
        return len(self._held)

    # ---- the turn ----

    def on_deadline(self, now_ns: int) -> None:
        due = {id for id, deadline_ns in self._deadlines_ns.items() if deadline_ns <= now_ns}
        for shard in [shard for shard in self._held if shard in due]:
            self[shard].on_deadline(now_ns)

    def take_touched(self) -> list[Replica]:
        """Those that this turn has to look at: also those for which there was no time after the last one."""
        for shard in [*self._unsettled]:
            self.touch(shard)
        touched, self._touched = self._touched, set()
        return [replica for shard, replica in self._held.items() if shard in touched]

    def looked_at(self, replica: Replica) -> None:
        """Its part of the turn is over."""
        self._glanced.pop(replica.shard.id, None)
        if not replica.is_settled:
            self._unsettled[replica.shard.id] = None

    def end_turn(self) -> None:
        """The turn has looked at all that it has to."""
        for shard in [*self._glanced]:
            self.looked_at(self._held[shard])

    @property
    def are_settled(self) -> bool:
        return not self._unsettled

    def settle(self) -> None:
        """Do what the last turn has left to be done after it. The next one looks at what has come of it."""
        for shard in [*self._unsettled]:
            self.touch(shard)
            self._held[shard].loader.take_wanted()  # it may be long until then

    def next_deadline_ns(self) -> int:
        """When the next of them has to be looked at although nothing has come for it."""
        unplanned, self._unplanned = self._unplanned, {}
        for shard in unplanned:
            self._deadlines_ns[shard] = self._held[shard].next_deadline_ns()
        return min(self._deadlines_ns.values(), default=NEVER_NS)
