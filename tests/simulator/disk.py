"""The simulated disk: an append is durable only at its completion. A crash keeps everything completed, and of what was
under way nothing or a whole prefix, since a log transaction is atomic. Reading back goes through the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bus_kv.core.machine import (
    Answered,
    AppendCompleted,
    AppendStalled,
    CutRow,
    CutsRead,
    Trim,
)  # fmt: skip
from bus_kv.protocol.entry import decode_entry
from bus_kv.protocol.shard_map import document_after
from tests.simulator.describe import describe_append
from tests.simulator.state import State
from tests.simulator.world import MICROSECOND_NS, MILLISECOND_NS, Violation

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.core.machine import Append, EntryRow, LogRead, ReplicaRow
    from tests.simulator.world import World

FSYNC_NS = (150 * MICROSECOND_NS, 900 * MICROSECOND_NS)


class Disk:
    def __init__(self, world: World, name: str) -> None:
        self._world, self._name = world, name
        self._random = world.random(f"disk/{name}")
        self.entries: dict[str, list[EntryRow]] = {}
        self.ever: dict[tuple[str, int, int], EntryRow] = {}
        """Every entry that was ever durable here, by shard, epoch and last seq: the log itself is trimmed and cut."""
        self.cuts: dict[str, list[tuple[int, EntryRow]]] = {}
        """Per shard (place, entry) of what was cut and not told yet."""
        self._cut_count = 0
        self.ends: dict[tuple[str, int], int] = {}
        """Last seq that was ever durable here, by shard and epoch."""
        self.state = State(world, name, self)
        self.replicas: dict[str, ReplicaRow] = {}
        self.incarnation = f"i{self._random.getrandbits(32):08x}"
        self.map: dict[str, Any] | None = None
        self._reads: list[LogRead | CutsRead] = []
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
        self._answer_reads()
        if self._waiting:
            self._begin()

    def _keep(self, appends: list[Append]) -> None:
        for append in appends:
            if self._world.tell is not None:
                for line in describe_append(append):
                    self._world.tell(self._name, line)
            for row in append.entries:
                rows = self.entries.setdefault(row.shard, [])
                if isinstance(row, CutRow):
                    self._set_aside(row)
                    self.entries[row.shard] = [entry for entry in rows if entry.last <= row.last]
                elif rows and rows[-1].last >= row.last:
                    raise Violation(f"entry {row.last} is appended behind {rows[-1].last}")
                else:
                    rows.append(row)
                    self.ever[row.shard, row.epoch, row.last] = row
                    self.ends[row.shard, row.epoch] = row.last
            for replica in append.replicas:
                self.replicas[replica.shard] = replica
            if append.map is not None:
                self.map = document_after(self.map, append.map)

    def _set_aside(self, cut: CutRow) -> None:
        for row in self.entries[cut.shard]:
            if cut.keep and row.last > cut.last:
                self._cut_count += 1
                self.cuts.setdefault(cut.shard, []).append((self._cut_count, row))

    def do(self, effect: LogRead | CutsRead | Trim) -> None:
        """A read is answered once everything that was appended before is durable."""
        if isinstance(effect, Trim):
            return self._trim(effect)
        self._reads.append(effect)
        if not self._under_way:
            self._world.after(50 * MICROSECOND_NS, self._answer_reads)
        return None

    def _answer_reads(self) -> None:
        reads, self._reads = self._reads, []
        for read in reads:
            if isinstance(read, CutsRead):
                left = [item for item in self.cuts.get(read.shard, []) if item[0] > read.told]
                self.cuts[read.shard] = left
                self._notify(Answered(read.ticket, left[:3]))
                continue
            epoch, seq = read.after
            log = self.entries.get(read.shard, [])
            have = [(row.epoch, row.last) for row in log if row.last <= seq and row.epoch <= epoch]
            rows = [row for row in log if not have or row.last > seq][:5]
            self._notify(Answered(read.ticket, [have[-1] if have else None, rows]))

    def _trim(self, trim: Trim) -> None:
        mark = self.state.shard(trim.shard).mark
        if trim.last > mark.last:
            raise Violation(f"the log is trimmed up to {trim.last}, the state has it up to {mark}")
        self.entries[trim.shard] = [e for e in self.entries[trim.shard] if e.last > trim.last]

    def goes_on(self, lasts: dict[str, int]) -> bool:
        """Whether the log has everything behind these seqs."""
        for row in self.replicas.values():
            last, entries = lasts.get(row.shard, 0), self.entries.get(row.shard, [])
            end = entries[-1].last if entries else row.base_seq
            behind = [entry for entry in entries if entry.last > last]
            start = decode_entry(behind[0].body).previous[1] if behind else end
            if last != start:
                return False
        return True

    def crash(self) -> None:
        """The process died: what was under way is on disk as a prefix, possibly empty, possibly whole."""
        self._life += 1
        if self._world.now_ns >= self.full_until_ns and self._random.random() < 0.5:
            self._keep(self._under_way)
        self._under_way, self._waiting, self._reads = [], [], []
        self.state.crash()
