"""Answers that are ready and wait for a promise to come true: so much durable, so much committed, so many confirmed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bus_kv.core.timers import NEVER_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from bus_kv.errors import BusKVError

Reply = TypeVar("Reply")


@dataclass(slots=True)
class Waiting(Generic[Reply]):
    seq: int
    """It holds once the log has come this far,"""
    round: int
    """and a confirm round with this number or a later one is complete (0: none is needed)."""
    deadline_ns: int
    respond: Callable[[Reply | BusKVError], None]
    reply: Reply
    is_read: bool
    """Nothing was or will be written for it."""


class Waiters:
    """A queue in order of arrival, in which seqs and rounds never go back: what is behind the head waits as long.

    Deadlines are in no order: a request that was routed again, or came from afar, has less time left.
    """

    def __init__(self) -> None:
        self._queue: deque[Waiting[Any]] = deque()
        self.next_ns = NEVER_NS
        """When to look for late ones: no deadline is earlier; that of one that was answered may have been."""

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, waiting: Waiting[Any]) -> None:
        self.next_ns = min(self.next_ns, waiting.deadline_ns)
        self._queue.append(waiting)

    def release(self, seq: int, round: int) -> bool:
        """Answer those for whom this is enough; whether there were any."""
        queue, is_any = self._queue, False
        while queue and queue[0].seq <= seq and queue[0].round <= round:
            waiting, is_any = queue.popleft(), True
            if not queue:
                self.next_ns = NEVER_NS
            waiting.respond(waiting.reply)
        return is_any

    def take_late(self, now_ns: int) -> list[Waiting[Any]]:
        """Those whose time is over."""
        if self.next_ns > now_ns:
            return []
        late = [w for w in self._queue if w.deadline_ns <= now_ns]
        self._queue = deque(w for w in self._queue if w.deadline_ns > now_ns)
        self.next_ns = min((w.deadline_ns for w in self._queue), default=NEVER_NS)
        return late

    def take_all(self) -> list[Waiting[Any]]:
        all, self._queue, self.next_ns = [*self._queue], deque(), NEVER_NS
        return all
