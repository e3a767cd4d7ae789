"""What is large and no longer needed goes bit by bit: freeing it all at once would take as long as many turns."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nodes.machine.table import Writes

RECORDS_PER_TURN = 4000
"""More than a turn writes, so that it does not pile up; freeing them takes a fraction of a millisecond."""


class Spent:
    def __init__(self) -> None:
        self._spent: deque[Writes] = deque()

    def add(self, writes: Writes) -> None:
        """Nobody else may look at it any more."""
        self._spent.append(writes)

    def release_some(self) -> None:
        room = RECORDS_PER_TURN
        while self._spent and room:
            writes = self._spent[0]
            if len(writes) <= room:
                room -= len(writes)
                self._spent.popleft()
                continue
            for _ in range(room):
                writes.popitem()
            room = 0
