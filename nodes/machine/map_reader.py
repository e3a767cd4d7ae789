"""When a node reads the map from the store: because its copy is old, or because a client asked for the true one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from bus_kv.core.timers import Timers
from bus_kv.errors import BusKVError, Overloaded, ShardUnavailable
from bus_kv.knobs import MILLISECOND_NS, SECOND_NS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nodes.machine.node import NodeMachine

    Answer: TypeAlias = Callable[[dict[str, Any] | BusKVError], None]

FETCH_PAUSE_NS = 50 * MILLISECOND_NS
"""The store is read at most this often, however many requests meet an old map."""


class MapReader:
    def __init__(self, node: NodeMachine) -> None:
        self._node = node
        self._timers = Timers()
        self._fetching = 0
        """Correlation of the question to the store that is open; 0 when none is."""
        self._fetched_ns = 0
        self._reading = 0
        self._waiters: list[Answer] = []

    def fetch(self) -> None:
        """Soon, and not again before the answer or its timeout."""
        if not self._fetching and not self._timers.runs("fetch"):
            wait_ns = max(self._fetched_ns + FETCH_PAUSE_NS - self._node.now_ns, 0)
            self._timers.start("fetch", self._node.now_ns + wait_ns)

    def fetch_now(self) -> None:
        """Ask the store; an earlier question that has no answer by now is forgotten."""
        self._fetching = self._node.next_correlation()
        self._fetched_ns = self._node.now_ns
        self._node.ask_store(self._fetching)
        timeout_ns = self._node.knobs.store_timeout_ms * MILLISECOND_NS
        self._timers.start("fetch", self._node.now_ns + timeout_ns)

    def read(self, answer: Answer) -> None:
        """Answer with the map as the store has it. Requests that come together share one question."""
        if len(self._waiters) >= self._node.knobs.calls_max:
            return answer(Overloaded("too many map requests under way; send it again"))
        self._waiters.append(answer)
        if len(self._waiters) == 1:
            self._reading = self._node.next_correlation()
            self._node.ask_store(self._reading)
            patience_ns = self._node.answer_within_ns - 100 * MILLISECOND_NS
            self._timers.start("read", self._node.now_ns + patience_ns)
        return None

    def on_answer(self, correlation: int, failure: str | None) -> None:
        """The store has answered; what it said is adopted already."""
        if correlation == self._reading:
            self._answer(failure)
        elif correlation == self._fetching:
            self._fetching = 0
            self._timers.stop("fetch")
            if failure is not None:
                self._timers.start("fetch", self._node.now_ns + SECOND_NS)

    def _answer(self, failure: str | None) -> None:
        waiters, self._waiters, self._reading = self._waiters, [], 0
        self._timers.stop("read")
        result: dict[str, Any] | BusKVError = self._node.map.public()
        if failure is not None:
            result = ShardUnavailable(f"the map's store does not answer: {failure}")
        for answer in waiters:
            answer(result)

    def next_deadline_ns(self) -> int:
        return self._timers.next_ns

    def on_deadline(self, now_ns: int) -> None:
        for name in self._timers.pop_due(now_ns):
            if name == "fetch":
                self.fetch_now()
            else:
                self._answer("no answer in time")
