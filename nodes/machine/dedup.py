"""Exactly once (R6): what became of each (client, number, index) of the last window, kept per batch, not per operation.

Memory holds the newest runs; older ones of the window are in the state on disk, which is asked when a number comes that
is not newer than what has left memory. Numbers of clients grow, so that is for late repeats only.

A run remembers the identities of one logged batch and the decisions about them, which is enough to compute each
operation's result again. A client's numbers almost always grow, so asking whether a batch is new costs one comparison.
Runs follow the log, so a replica that replays or receives the log has the same window.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bus_kv.errors import OutcomeUnknown
from bus_kv.protocol.batch import APPLIED, GET, Version
from bus_kv.protocol.entry import applied_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bus_kv.knobs import Knobs
    from bus_kv.protocol.batch import Batch


@dataclass(slots=True)
class Run:
    numbers: Sequence[int]
    indexes: Sequence[int]
    outcomes: bytes
    epoch: int
    first: int
    """Seq of the run's first applied operation."""
    time_ms: int

    def find(self, number: int, index: int) -> tuple[Version, int] | None:
        """(version, outcome) of an applied operation."""
        at = bisect_left(self.numbers, number)
        while at < len(self.numbers) and self.numbers[at] == number:
            if (self.indexes[at] if self.indexes else 0) == index:
                outcome = self.outcomes[at]
                seq = self.first + applied_count(self.outcomes[:at])
                return ((self.epoch, seq), outcome) if outcome in APPLIED else None
            at += 1
        return None


@dataclass(slots=True)
class _Client:
    runs: list[Run] = field(default_factory=list)
    """Those in memory, in order of their first number; they may overlap."""
    newest: int = -1
    on_disk: int = -1
    """Greatest number of the runs that have left memory: a number up to here may be in the state on disk."""
    time_ms: int = 0
    """Log time of the newest run."""
    span_max: int = 0
    """Greatest distance between the first and the last number of a run: how far back to look for one number."""


@dataclass(slots=True)
class DiskRuns:
    """What the state on disk says about a client: its runs around some numbers, and the greatest number forgotten."""

    floor: int
    runs: list[Run]
    folds: int
    """How many folds had ended when it was read: runs that the next one took out of memory may be missing."""

    def find(self, number: int, index: int) -> tuple[Version, int] | None:
        return next(filter(None, [run.find(number, index) for run in self.runs]), None)


def disk_runs(rows: list[Any], folds: int) -> DiskRuns:
    """Read the answer to `RequestsOf`."""
    floor, *runs = rows
    return DiskRuns(floor, [Run(*run) for run in runs], folds)


class DedupWindow:
    def __init__(self, knobs: Knobs, clients: Sequence[tuple[str, int]], time_ms: int) -> None:
        """`clients` are those whose runs are on disk, with their newest numbers."""
        self._knobs = knobs
        self._clients = {
            id: _Client(newest=newest, on_disk=newest, time_ms=time_ms) for id, newest in clients
        }
        """In order of their last write."""
        self._by_age: deque[tuple[str, Run]] = deque()

    def needs_disk(self, batch: Batch) -> bool:
        """Whether memory cannot tell if all of the batch is new."""
        client = self._clients.get(batch.client)
        if client is None or batch.numbers[0] > client.on_disk:
            return False
        identities = map(batch.identity, range(len(batch)))
        return any(n <= client.on_disk and not self._find(client, n, i) for n, i in identities)

    def seen(
        self, batch: Batch, disk: DiskRuns | None
    ) -> dict[int, tuple[Version, int] | OutcomeUnknown]:
        """Operation -> what became of it earlier, for those of the batch that came before. Empty: all are new."""
        client = self._clients.get(batch.client)
        if client is None or batch.numbers[0] > client.newest:
            return {}
        seen: dict[int, tuple[Version, int] | OutcomeUnknown] = {}
        for i in range(len(batch)):
            number, index = batch.identity(i)
            found = self._find(client, number, index) or (disk and disk.find(number, index))
            if found:
                seen[i] = found
            elif disk is not None and number <= disk.floor and batch.kinds[i] != GET:
                seen[i] = _expired(batch.client, number)
        return seen

    def _find(self, client: _Client, number: int, index: int) -> tuple[Version, int] | None:
        at = bisect_left(client.runs, number + 1, key=_first_number)
        while at and client.runs[at - 1].numbers[0] >= number - client.span_max:
            at -= 1
            found = client.runs[at].find(number, index)
            if found is not None:
                return found
        return None

    def add(self, client_id: str, run: Run) -> None:
        """Remember a logged batch."""
        client = self._clients.pop(client_id, None) or _Client()
        self._clients[client_id] = client
        first, last = run.numbers[0], run.numbers[-1]
        if first > client.newest:
            client.runs.append(run)
        else:
            insort(client.runs, run, key=_first_number)
        client.newest = max(client.newest, last)
        client.time_ms = run.time_ms
        client.span_max = max(client.span_max, last - first)
        self._by_age.append((client_id, run))

    def forget_after(self, seq: int) -> None:
        """The log may be cut behind `seq`: what stands there has not happened until it is committed."""
        while self._by_age and self._by_age[-1][1].first > seq:
            client_id, run = self._by_age.pop()
            client = self._clients[client_id]
            client.runs.remove(run)
            left = [other.numbers[-1] for other in client.runs]
            client.newest = max(client.on_disk, *left) if left else client.on_disk

    def leave_to_disk(self, folded: int) -> None:
        """Let runs go that the state on disk has, those with a seq up to `folded`, once there are too many."""
        while len(self._by_age) > self._knobs.dedup_runs_max and self._by_age[0][1].first <= folded:
            client_id, run = self._by_age.popleft()
            client = self._clients[client_id]
            client.runs.remove(run)
            client.on_disk = max(client.on_disk, run.numbers[-1])

    def forget_idle(self, time_ms: int) -> None:
        """Past so many clients, those are forgotten that have written nothing within the window."""
        before_ms = time_ms - self._knobs.dedup_window_ms
        while len(self._clients) > self._knobs.dedup_clients_max:
            id, client = next(iter(self._clients.items()))
            if client.runs or client.time_ms >= before_ms:
                return
            del self._clients[id]


def _first_number(run: Run) -> int:
    return run.numbers[0]


def _expired(client: str, number: int) -> OutcomeUnknown:
    error = OutcomeUnknown(
        f"request {client}:{number} is older than what is kept about requests; read the key to learn its outcome"
    )
    error.retriable = False
    return error
