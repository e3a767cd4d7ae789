"""Exactly once (R6): what became of each (client, number, index) of the last window, kept per batch, not per operation.

A run remembers the identities of one logged batch and the decisions about them, which is enough to compute each
operation's result again. A client's numbers almost always grow, so asking whether a batch is new costs one comparison.
Runs follow the log, so a replica that replays or receives the log has the same window.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

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
    """In order of their first number; they may overlap."""
    newest: int = -1
    floor: int = -1
    """Greatest number of the runs that have been forgotten."""
    span_max: int = 0
    """Greatest distance between the first and the last number of a run: how far back to look for one number."""


class DedupWindow:
    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        self._clients: dict[str, _Client] = {}
        self._by_age: deque[tuple[str, Run]] = deque()

    def seen(self, batch: Batch) -> dict[int, tuple[Version, int] | OutcomeUnknown]:
        """Operation -> what became of it earlier, for those of the batch that came before. Empty: all are new."""
        client = self._clients.get(batch.client)
        if client is None or batch.numbers[0] > client.newest:
            return {}
        seen: dict[int, tuple[Version, int] | OutcomeUnknown] = {}
        for i in range(len(batch)):
            number, index = batch.identity(i)
            found = self._find(client, number, index)
            if found is not None:
                seen[i] = found
            elif number <= client.floor and batch.kinds[i] != GET:
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
        """Remember a logged batch; runs older than the window, in log time, are forgotten."""
        client = self._clients.setdefault(client_id, _Client())
        first, last = run.numbers[0], run.numbers[-1]
        if first > client.newest:
            client.runs.append(run)
        else:
            insort(client.runs, run, key=_first_number)
        client.newest = max(client.newest, last)
        client.span_max = max(client.span_max, last - first)
        self._by_age.append((client_id, run))
        self._forget(run.time_ms - self._knobs.dedup_window_ms)

    def _forget(self, before_ms: int) -> None:
        runs_max = self._knobs.dedup_runs_max
        while self._by_age and (
            self._by_age[0][1].time_ms < before_ms or len(self._by_age) > runs_max
        ):
            client_id, run = self._by_age.popleft()
            client = self._clients[client_id]
            client.runs.remove(run)
            client.floor = max(client.floor, run.numbers[-1])
        while len(self._clients) > self._knobs.dedup_clients_max:
            idle = next((id for id, c in self._clients.items() if not c.runs), None)
            if idle is None:
                return
            del self._clients[idle]


def _first_number(run: Run) -> int:
    return run.numbers[0]


def _expired(client: str, number: int) -> OutcomeUnknown:
    error = OutcomeUnknown(
        f"request {client}:{number} is older than what is kept about requests; read the key to learn its outcome"
    )
    error.retriable = False
    return error
