"""Lifetimes that end soon, in order. Those that end later stay on disk until their time comes near."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nodes.machine.table import Writes

HORIZON_MS = 600_000
"""How far ahead memory knows every lifetime."""
RETRY_MS = 200
COUNT_MAX = 100_000
"""Lifetimes read from disk at once; where more end within the horizon, it is nearer."""


class Lifetimes:
    def __init__(self, all_known: bool) -> None:
        """`all_known`: nothing is on disk yet."""
        self.horizon_ms = 2**62 if all_known else 0
        """Every lifetime that ends up to here is in memory."""
        self._heap: list[tuple[int, bytes, int]] = []
        self._ask_ms = self.horizon_ms - HORIZON_MS // 2
        """When to ask the disk for more."""
        self.asked_until_ms = 0
        """Up to where the disk is being asked at the moment; 0 when it is not."""

    def add(self, writes: Writes) -> None:
        for key, record in writes.items():
            if record is not None and record[3] is not None:
                heapq.heappush(self._heap, (record[3], key, record[2]))

    def next_ms(self) -> int | None:
        """When something is to be done: a lifetime ends, or the disk has to be asked for more."""
        ends = [self._heap[0][0]] if self._heap else []
        if self.horizon_ms < 2**62 and not self.asked_until_ms:
            ends.append(self._ask_ms)
        return min(ends, default=None)

    def pop_ended(self, time_ms: int, count_max: int) -> dict[bytes, int]:
        """Key -> seq of the write whose lifetime ended at or before `time_ms`; each is told once."""
        ended: dict[bytes, int] = {}
        while self._heap and self._heap[0][0] <= time_ms and len(ended) < count_max:
            _, key, seq = heapq.heappop(self._heap)
            ended[key] = seq
        return ended

    def put_back(self, ended: dict[bytes, int], time_ms: int) -> None:
        """They could not be looked at now: tell them again a little later."""
        for key, seq in ended.items():
            heapq.heappush(self._heap, (time_ms + RETRY_MS, key, seq))

    def folded(self, seq: int, time_ms: int) -> None:
        """What was written up to `seq` is on disk: lifetimes beyond the horizon are found there in time.

        An answer that is on its way may have been read before the fold, so what it would be about stays here.
        """
        if self.horizon_ms == 2**62:
            self.horizon_ms = time_ms + HORIZON_MS
            self._ask_ms = time_ms + HORIZON_MS // 2
        kept_ms = max(self.horizon_ms, self.asked_until_ms)
        self._heap = [item for item in self._heap if item[0] <= kept_ms or item[2] > seq]
        heapq.heapify(self._heap)

    def needs_more(self, time_ms: int) -> bool:
        return not self.asked_until_ms and self._ask_ms <= time_ms

    def ask_later(self, time_ms: int) -> None:
        """The disk gave no answer."""
        self.asked_until_ms = 0
        self._ask_ms = time_ms + RETRY_MS

    def extend(self, rows: Sequence[tuple[int, bytes, int]], limit: int, time_ms: int) -> None:
        """Lifetimes that the disk knows up to what was asked for, the first `limit` of them."""
        self._heap = [*{*self._heap, *[(ends, key, seq) for ends, key, seq in rows]}]
        heapq.heapify(self._heap)
        if len(rows) < limit:
            self.horizon_ms = self.asked_until_ms
            self._ask_ms = self.horizon_ms - HORIZON_MS // 2
        else:
            self.horizon_ms = rows[-1][0]
            self._ask_ms = max(self.horizon_ms - RETRY_MS, time_ms + RETRY_MS)
        self.asked_until_ms = 0
