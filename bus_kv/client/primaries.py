"""Which primaries this client has messages at, and which of them are silent at the moment.

Of a silent one, one message at a time is tried, for all its shards: it would hold up every lane else. Only silence
counts: that nobody listens is told at once and costs nothing.
"""

from __future__ import annotations

from collections import Counter


class Primaries:
    def __init__(self) -> None:
        self._in_flight: Counter[str] = Counter()
        """Node -> messages that it has not answered yet."""
        self._silent: set[str] = set()
        self._answered_ns: dict[str, int] = {}

    def lets_through(self, node: str) -> bool:
        """Whether a message may be sent to it now."""
        return node not in self._silent or not self._in_flight[node]

    def is_silent(self, node: str) -> bool:
        return node in self._silent

    def answered_ns(self, node: str) -> int:
        """When it has answered last, about whatever shard; 0 never."""
        return self._answered_ns.get(node, 0)

    # ---- what happens ----

    def on_sent(self, node: str) -> None:
        self._in_flight[node] += 1

    def on_left(self, node: str) -> None:
        """A message is answered, or no longer waited for."""
        self._in_flight[node] -= 1

    def on_answer(self, node: str, now_ns: int) -> bool:
        """It has answered with results, which nobody else can give; whether that has ended its silence."""
        self._answered_ns[node] = now_ns
        was_silent = node in self._silent
        self._silent.discard(node)
        return was_silent

    def on_silence(self, node: str) -> None:
        self._silent.add(node)
