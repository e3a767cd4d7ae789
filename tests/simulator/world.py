"""The world of one run: the virtual clock, the schedule, randomness by purpose, and the digest of all that happened."""

from __future__ import annotations

import hashlib
import heapq
import random
from typing import TYPE_CHECKING

from tests.simulator.describe import describe_message

if TYPE_CHECKING:
    from collections.abc import Callable

START_NS = 1_700_000_000_000_000_000
MICROSECOND_NS = 1_000
MILLISECOND_NS = 1_000_000
SECOND_NS = 1_000_000_000


class Violation(AssertionError):
    """The system broke a promise; the message says which, the seed replays it."""


class World:
    def __init__(self, seed: int, trace: bool = False) -> None:
        self.seed = seed
        self.now_ns = START_NS
        self.tell: Callable[[str, str], None] | None = self._print if trace else None
        """Gets (who, what) of everything that happens, in words."""
        self.events = 0
        self._order = 0
        self._heap: list[tuple[int, int, Callable[[], None]]] = []
        self._digest = hashlib.blake2b(digest_size=16)

    def random(self, purpose: str) -> random.Random:
        """A generator of its own for each purpose, so that a draw more in one place changes no other."""
        return random.Random(f"{self.seed}/{purpose}")

    def at(self, when_ns: int, action: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._heap, (max(when_ns, self.now_ns), self._order, action))

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        self.at(self.now_ns + delay_ns, action)

    def run_until(self, end_ns: int, done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until `end_ns` or until `done`."""
        while self._heap and self._heap[0][0] <= end_ns and not done():
            self.now_ns, _, action = heapq.heappop(self._heap)
            self.events += 1
            action()
        if not done():
            self.now_ns = max(self.now_ns, end_ns)

    def note(self, who: str, what: str, body: bytes = b"") -> None:
        """Put something that happened into the digest, and tell it when that is wanted."""
        self._digest.update(f"{self.now_ns}|{who}|{what}|".encode())
        self._digest.update(body)
        if self.tell is not None:
            self.tell(who, describe_message(what[3:], body) if what.startswith("-> ") else what)

    def _print(self, who: str, what: str) -> None:
        print(f"{(self.now_ns - START_NS) / 1e9:10.6f}  {who:<10} {what}")

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()
