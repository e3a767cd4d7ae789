"""The simulated disk: an append is durable only at its completion. A crash keeps everything completed, and of what was
under way nothing or a whole prefix, since a log transaction is atomic. Reading back goes through the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import AppendCompleted, AppendStalled
from tests.simulator.state import State
from tests.simulator.world import MICROSECOND_NS, MILLISECOND_NS, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Append, EntryRow, ReplicaRow, Trim
    from tests.simulator.world import World

FSYNC_NS = (150 * MICROSECOND_NS, 900 * MICROSECOND_NS)


class Disk:
    def __init__(self, world: World, name: str) -> None:
        self._world = world
        self._random = world.random(f"disk/{name}")
        self.entries: dict[str, list[EntryRow]] = {}
        self.archive: dict[str, list[EntryRow]] = {}
        """Every entry that was ever durable, for the checkers: the log itself is trimmed."""
        self.state = State(world, name, self)
        self.replicas: dict[str, ReplicaRow] = {}
        self.incarnation = f"i{self._random.getrandbits(32):08x}"
        self._under_way: list[Append] = []
        self._waiting: list[Append] = []
        self._notify: Callable[[Any], None] = lambda _: None
        self._life = 0
        self.full_until_ns = 0

    def open(self, notify: Callable[[Any], None]) -> None:
        self._notify = notify
        self.state.open(notify)
        self._life += 1

    def append(self, append: Append) -> None:
        self._waiting.append(append)
        if not self._under_way:
            self._begin()

    def _begin(self) -> None:
        self._under_way, self._waiting = self._waiting, []
        life = self._life
        delay_ns = self._random.randint(*FSYNC_NS)
        if self._random.random() < 0.01:
            delay_ns += self._random.randint(0, 50 * MILLISECOND_NS)
        self._world.after(delay_ns, lambda: self._complete(life))

    def _complete(self, life: int) -> None:
        if life != self._life:
            return
        if self._world.now_ns < self.full_until_ns:
            self._notify(AppendStalled("no space left"))
            self._world.after(200 * MILLISECOND_NS, lambda: self._complete(life))
            return
        self._keep(self._under_way)
        ticket = self._under_way[-1].ticket
        self._under_way = []
        self._notify(AppendCompleted(ticket))
        if self._waiting:
            self._begin()

    def _keep(self, appends: list[Append]) -> None:
        for append in appends:
            for row in append.entries:
                self.entries.setdefault(row.shard, []).append(row)
                self.archive.setdefault(row.shard, []).append(row)
            for replica in append.replicas:
                self.replicas[replica.shard] = replica

    def trim(self, trim: Trim) -> None:
        mark = self.state.shard(trim.shard).mark
        if trim.last > mark.last:
            raise Violation(f"the log is trimmed up to {trim.last}, the state has it up to {mark}")
        self.entries[trim.shard] = [e for e in self.entries[trim.shard] if e.last > trim.last]

    def crash(self) -> None:
        """The process died: what was under way is on disk as a prefix, possibly empty, possibly whole."""
        self._life += 1
        if self._world.now_ns >= self.full_until_ns and self._random.random() < 0.5:
            self._keep(self._under_way)
        self._under_way, self._waiting = [], []
        self.state.crash()
