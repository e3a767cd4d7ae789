"""Answers that have to be given in time, by somebody else if need be."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Generic, TypeVar

from bus_kv.core.timers import NEVER_NS

if TYPE_CHECKING:
    from collections.abc import Callable

Answer = TypeVar("Answer")


class Deadlines(Generic[Answer]):
    """Each answer is given once: by the one who works on it, or at its deadline. What comes later is dropped."""

    def __init__(self) -> None:
        self._open: dict[int, tuple[Callable[[Answer], None], Answer]] = {}
        self._heap: list[tuple[int, int]] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._open)

    def guard(
        self, deadline_ns: int, answer: Callable[[Answer], None], otherwise: Answer
    ) -> Callable[[Answer], None]:
        """What to call instead of `answer`; at the deadline `answer(otherwise)` is called."""
        self._next += 1
        id = self._next
        self._open[id] = (answer, otherwise)
        heapq.heappush(self._heap, (deadline_ns, id))

        def answered(outcome: Answer) -> None:
            if self._open.pop(id, None) is not None:
                answer(outcome)

        return answered

    def next_ns(self) -> int:
        while self._heap and self._heap[0][1] not in self._open:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else NEVER_NS

    def expire(self, now_ns: int) -> None:
        while self._heap and self._heap[0][0] <= now_ns:
            answer, otherwise = self._open.pop(heapq.heappop(self._heap)[1], (None, None))
            if answer is not None and otherwise is not None:
                answer(otherwise)
