"""Named deadlines of a machine."""

from __future__ import annotations

NEVER_NS = 2**62
"""Later than any deadline."""


class Timers:
    """A deadline per name; the earliest tells the driver when to wake the machine."""

    def __init__(self) -> None:
        self._deadlines_ns: dict[str, int] = {}

    def start(self, name: str, deadline_ns: int) -> None:
        self._deadlines_ns[name] = deadline_ns

    def start_once(self, name: str, deadline_ns: int) -> None:
        """Start it unless it runs already."""
        self._deadlines_ns.setdefault(name, deadline_ns)

    def stop(self, name: str) -> None:
        self._deadlines_ns.pop(name, None)

    def runs(self, name: str) -> bool:
        return name in self._deadlines_ns

    def next_ns(self) -> int | None:
        return min(self._deadlines_ns.values()) if self._deadlines_ns else None

    def pop_due(self, now_ns: int) -> list[str]:
        """Names whose deadline has passed, in the order in which they were started."""
        due = [name for name, deadline_ns in self._deadlines_ns.items() if deadline_ns <= now_ns]
        for name in due:
            del self._deadlines_ns[name]
        return due
